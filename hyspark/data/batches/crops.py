"""Crops of prepared volumes: pure functions of (seed, position).

No random state is kept. The volume, crop and flips of slot i of batch t depend on the seed, t and i alone. The
numbers of workers, processes and restarts do not matter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hyspark.data.intensity import LinearMap, scale_to_own_range
from hyspark.data.preprocessing.store import StoredVolume


def crop_start(centre: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> list[int]:
    """Compute the first voxel of a crop around a centre, shifted to lie inside the volume.

    On an axis on which the volume is smaller than the crop, the volume is centred and the start is negative or 0.

    Args:
        centre: voxel in the middle of the crop.
        shape: voxels per axis of the volume.
        size: voxels per axis of the crop.
    """
    start = []
    for c, n, s in zip(centre, shape, size, strict=True):
        start.append(-((s - n) // 2) if n <= s else min(max(c - s // 2, 0), n - s))
    return start


class SliceSampling(NamedTuple):
    """How 2D slices are taken of a volume instead of 3D crops.

    Attributes:
        axis: the axis that slices are perpendicular to.
        stride: slices are taken whose index is a multiple of it.
        own_range: whether each crop is scaled by its own smallest and largest value.
    """

    axis: int
    stride: int = 1
    own_range: bool = False


def image_crop(
    volume: StoredVolume,
    size: Sequence[int],
    flip_prob: Sequence[float],
    rng: np.random.Generator,
    out: np.ndarray | None = None,
    slices: SliceSampling | None = None,
) -> np.ndarray:
    """Read a crop, as fractions, centred on a random foreground voxel, flipped at random.

    Args:
        volume: the prepared volume.
        size: voxels per axis; two axes with `slices`.
        flip_prob: probability of a flip of each axis of the volume.
        rng: source of the random choices.
        out: float32 array `(c, *size)` to write to, instead of a new one.
        slices: takes a 2D crop of a slice.

    Returns:
        float32 `(c, *size)` in [0, 1].
    """
    out = np.empty((volume.num_channels, *size), np.float32) if out is None else out
    centre = volume.draw_voxel("foreground", rng)
    assert centre is not None  # preparation refuses volumes without foreground
    flips = [axis for axis, (p, u) in enumerate(zip(flip_prob, rng.random(len(flip_prob)), strict=True)) if u < p]
    box, to = list(size), out
    if slices:
        box.insert(slices.axis, 1)
        to = np.expand_dims(to, 1 + slices.axis)
    start = crop_start(centre, volume.entry.shape, box)
    if slices:
        start[slices.axis] -= start[slices.axis] % slices.stride
    # Written through a flipped view, which flips the crop without a copy of it.
    volume.read_channels(start, box, out=np.flip(to, tuple(1 + axis for axis in flips)))
    if slices and slices.own_range:
        for channel in out:
            scale_to_own_range(channel)
    return out


def crop_maps(volume: StoredVolume, slices: SliceSampling | None) -> Sequence[LinearMap | None]:
    """Return the maps from the fractions of a crop to a network's input; none for a crop in its own range."""
    return () if slices and slices.own_range else volume.maps


def labelled_crop(
    volume: StoredVolume, size: Sequence[int], labelled_prob: float, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Read a crop, as fractions, with its label, centred on a random labelled or unlabelled foreground voxel.

    If the volume has no voxel of the drawn kind, the other kind is used.

    Args:
        volume: the prepared volume.
        size: voxels per axis.
        labelled_prob: probability that the centre is labelled.
        rng: source of the random choices.

    Returns:
        image: float32 `(c, *size)` in [0, 1]; label: int64 `(1, *size)`.
    """
    kinds = ("labelled", "unlabelled") if rng.random() < labelled_prob else ("unlabelled", "labelled")
    centre = volume.draw_voxel(kinds[0], rng) or volume.draw_voxel(kinds[1], rng)
    assert centre is not None
    start = crop_start(centre, volume.entry.shape, size)
    return {
        "image": torch.from_numpy(volume.read_channels(start, size)),
        "label": torch.from_numpy(volume.read("label", start, size)[None].astype(np.int64)),
    }
