"""Labelled subsets: how many items a run trains on, and which, drawn by its seed.

A smaller subset of the same seed lies within a larger one.
"""

from collections.abc import Sequence
from typing import Any

from hyspark.data.seeds import rng_at


def subset_size(available: int, *, num_labelled: int, label_fraction: float, least: int = 1) -> int:
    """Return the number of items to draw: `num_labelled`, or if that is 0, a fraction of the available ones.

    Args:
        available: number of labelled items.
        num_labelled: number asked for, which may exceed the available one.
        label_fraction: fraction of the available items.
        least: the smallest number that a fraction gives.
    """
    return num_labelled or max(least, round(label_fraction * available))


def draw_subset(keys: Sequence[Any], num: int, seed: int) -> list[int]:
    """Draw `num` indices in increasing order; the draw depends on the sortable keys, not on their order.

    Raises:
        ValueError: if there are fewer items.
    """
    if num > len(keys):
        raise ValueError(f"num_labelled: expected at most the {len(keys)} labelled training cases, got {num}")
    by_key = sorted(range(len(keys)), key=lambda i: keys[i])
    drawn = rng_at(seed, "labelled").permutation(len(keys))[:num]
    return sorted(by_key[d] for d in drawn)


def draw_stratified(names: Sequence[str], labels: Sequence[int], num: int, seed: int) -> list[int]:
    """Draw `num` indices in increasing order, from each class in proportion to its size and at least one.

    The draw depends on names and labels, not on their order.

    Raises:
        ValueError: if there are fewer items, or more classes.
    """
    by_class: dict[int, list[int]] = {}
    for index in sorted(range(len(names)), key=lambda i: names[i]):
        by_class.setdefault(labels[index], []).append(index)
    if not len(by_class) <= num <= len(names):
        raise ValueError(
            f"num_labelled: expected at least one image of each of the {len(by_class)} classes and at most the "
            f"{len(names)} training images, got {num}"
        )
    # The k-th image of a class of m is ranked k / m, so that every prefix has the proportions of the whole.
    order = []
    for label, indices in sorted(by_class.items()):
        drawn = rng_at(seed, "labelled", label).permutation(len(indices))
        order += [(rank / len(indices), label, indices[d]) for rank, d in enumerate(drawn)]
    return sorted(index for _, _, index in sorted(order)[:num])
