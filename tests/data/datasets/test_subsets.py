"""Labelled subsets are nested, reproducible, and independent of the items' order."""

from itertools import pairwise

import numpy as np
import pytest

from hyspark.data.datasets.subsets import draw_stratified, draw_subset, subset_size


def many(counts):
    labels = [label for label, num in enumerate(counts) for _ in range(num)]
    return [f"image_{i:03d}" for i in range(len(labels))], labels


def test_a_number_goes_before_a_fraction_and_a_fraction_has_a_least_number():
    assert subset_size(30, num_labelled=7, label_fraction=0.1) == 7
    assert subset_size(30, num_labelled=0, label_fraction=0.1) == 3
    assert subset_size(30, num_labelled=0, label_fraction=0.001) == 1
    assert subset_size(30, num_labelled=0, label_fraction=0.001, least=4) == 4
    assert subset_size(30, num_labelled=0, label_fraction=1) == 30


def test_smaller_subsets_lie_in_larger_ones():
    keys = [f"case_{i:02d}" for i in range(12)]
    chosen = [draw_subset(keys, num, 3) for num in range(1, 13)]
    assert [len(c) for c in chosen] == list(range(1, 13))
    assert all(set(few) < set(more) for few, more in pairwise(chosen))
    assert all(indices == sorted(indices) for indices in chosen)


def test_a_subset_depends_on_seed_and_keys_not_on_the_order():
    keys = [("set", f"case_{i:02d}") for i in range(12)]
    first = {keys[i] for i in draw_subset(keys, 5, 0)}
    assert {keys[::-1][i] for i in draw_subset(keys[::-1], 5, 0)} == first
    assert {keys[i] for i in draw_subset(keys, 5, 1)} != first
    with pytest.raises(ValueError, match="num_labelled: expected at most the 12 labelled training cases, got 13"):
        draw_subset(keys, 13, 0)


@pytest.mark.parametrize("seed", [0, 3])
def test_smaller_stratified_subsets_lie_in_larger_ones_in_the_proportions_of_the_classes(seed):
    names, labels = many((60, 30, 10))
    chosen = [draw_stratified(names, labels, num, seed) for num in range(3, 101)]
    assert [len(c) for c in chosen] == list(range(3, 101))
    assert all(set(few) < set(more) for few, more in pairwise(chosen))
    for indices in chosen:
        counts = np.bincount([labels[i] for i in indices], minlength=3)
        assert counts.min() >= 1
        assert np.abs(counts - len(indices) * np.array([0.6, 0.3, 0.1])).max() <= 1.5


def test_a_stratified_subset_depends_on_seed_and_names_not_on_the_order():
    names, labels = many((20, 10))
    first = {names[i] for i in draw_stratified(names, labels, 9, 0)}
    assert {names[::-1][i] for i in draw_stratified(names[::-1], labels[::-1], 9, 0)} == first
    assert {names[i] for i in draw_stratified(names, labels, 9, 1)} != first
    for num in (1, 31):
        with pytest.raises(
            ValueError, match=rf"num_labelled: .* each of the 2 classes .* 30 training images, got {num}"
        ):
            draw_stratified(names, labels, num, 0)
