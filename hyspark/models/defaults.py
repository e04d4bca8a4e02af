"""Defaults and limits of the networks that settings name; without torch, so that help and messages come at once."""

from collections.abc import Sequence

WIDTHS = (32, 64, 128, 256, 384)
DEPTHS = (1, 1, 3, 3, 1)
EXPANSIONS = (2, 4, 4, 4, 2)
CONTRASTIVE_METHODS = ("moco", "byol", "swav")
"""Methods that compare views; BYOL and SwAV do so without negative pairs."""
PATCH = 16
"""Edge of a mask unit in voxels: four halvings of the resolution."""


def grid_of(size: Sequence[int], patch: int = PATCH) -> tuple[int, ...]:
    """Compute the number of patches per axis.

    Args:
        size: voxels per axis of a crop.
        patch: edge of a patch in voxels.

    Raises:
        ValueError: an axis is not a positive multiple of the patch.
    """
    if any(s < patch or s % patch for s in size):
        nearest = tuple(max(patch, round(s / patch) * patch) for s in size)
        raise ValueError(
            f"crop size: expected a positive multiple of {patch} voxels on every axis, got {tuple(size)}; "
            f"the nearest that fits is {nearest}"
        )
    return tuple(s // patch for s in size)


def check_min_width(decoder_width: int, decoder_min_width: int) -> None:
    """Raise ValueError if the minimum width exceeds the width of the deepest level."""
    if decoder_min_width > decoder_width:
        raise ValueError(
            f"decoder_min_width: expected at most decoder_width={decoder_width}, the width of the widest level, "
            f"got {decoder_min_width}"
        )
