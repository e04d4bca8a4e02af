"""Defaults and limits of the networks that settings name; without torch, so that help and messages come at once."""

from collections.abc import Sequence

WIDTHS = (32, 64, 128, 256, 384)
DEPTHS = (1, 1, 3, 3, 1)
EXPANSIONS = (2, 4, 4, 4, 2)
CONTRASTIVE_METHODS = ("moco", "byol", "swav")
"""Methods that compare views; BYOL and SwAV do so without negative pairs."""
PATCH = 16
"""Edge of a mask unit in voxels: four halvings of the resolution."""
Edges = int | Sequence[int]
"""Voxels per axis: one number for all axes, or one per axis."""


def edges_per_axis(edges: Edges, axes: int, name: str) -> tuple[int, ...]:
    """Return one number per axis.

    Args:
        edges: one number for all axes, or one per axis.
        axes: number of spatial axes.
        name: name of the argument in the error.

    Raises:
        ValueError: there is another number of axes.
    """
    numbers = (edges,) * axes if isinstance(edges, int) else tuple(edges)
    if len(numbers) != axes:
        raise ValueError(f"{name}: expected one number, or {axes}, one per axis, got {numbers}")
    return numbers


def grid_of(size: Sequence[int], patch: Edges = PATCH) -> tuple[int, ...]:
    """Compute the number of patches per axis.

    Args:
        size: voxels per axis of a crop.
        patch: edge of a patch in voxels, one number or one per axis.

    Raises:
        ValueError: an axis is not a positive multiple of the patch.
    """
    edges = edges_per_axis(patch, len(size), "patch")
    if any(s < edge or s % edge for s, edge in zip(size, edges, strict=True)):
        unit = f"{edges[0]} voxels on every axis" if len(set(edges)) == 1 else f"{edges} voxels, axis by axis"
        raise ValueError(
            f"crop size: expected a positive multiple of {unit}, got {tuple(size)}; the nearest that fits is "
            f"{nearest_multiple(size, edges)}"
        )
    return tuple(s // edge for s, edge in zip(size, edges, strict=True))


def nearest_multiple(size: Sequence[int], edges: Sequence[int]) -> tuple[int, ...]:
    """Return the positive multiple of each edge that is nearest to the size of its axis."""
    return tuple(max(edge, round(s / edge) * edge) for s, edge in zip(size, edges, strict=True))


def check_min_width(decoder_width: int, decoder_min_width: int) -> None:
    """Raise ValueError if the minimum width exceeds the width of the deepest level."""
    if decoder_min_width > decoder_width:
        raise ValueError(
            f"decoder_min_width: expected at most decoder_width={decoder_width}, the width of the widest level, "
            f"got {decoder_min_width}"
        )


def check_reconstruct_fraction(fraction: float) -> None:
    """Raise ValueError if the fraction of reconstructed patches is not above 0 and at most 1."""
    if not 0 < fraction <= 1:
        raise ValueError(
            f"reconstruct_fraction: expected a number above 0 and at most 1, got {fraction}; 1 reconstructs all hidden "
            "patches, as in the paper"
        )


def check_compute(compute: str) -> None:
    """Raise ValueError for an unknown way to exclude hidden voxels."""
    if compute not in ("masked", "packed"):
        raise ValueError(f'compute: expected "masked" or "packed", got {compute!r}')
