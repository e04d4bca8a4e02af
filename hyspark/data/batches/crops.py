"""Crops of prepared volumes: pure functions of (seed, position).

Nothing here keeps a random state. The volume, crop and flips of slot i of batch t depend on the seed, t and i alone,
not on the number of workers, processes or restarts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hyspark.data.preprocessing.store import StoredVolume


def place(centre: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> list[int]:
    """First voxel of a crop of `size` around `centre`, moved to lie inside the volume.

    On an axis where the volume is smaller than the crop, the volume lies in the middle of it and the start is
    negative or 0.
    """
    start = []
    for c, n, s in zip(centre, shape, size, strict=True):
        start.append(-((s - n) // 2) if n <= s else min(max(c - s // 2, 0), n - s))
    return start


class Planes(NamedTuple):
    """Planes of a volume in place of crops. axis: the one they lie across. stride: planes whose number is a multiple of
    it. own_range: whether each is scaled by its own smallest and largest value.
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
    planes: Planes | None = None,
) -> np.ndarray:
    """A crop centred on a random foreground voxel, flipped at random: float32 (1, *size) in [0, 1].

    flip_prob: for each axis of the volume. out: array of this shape and type to write to and return, in place of a new
    one. planes: take a part of a plane, of two axes, instead.
    """
    out = np.empty((1, *size), np.float32) if out is None else out
    centre = volume.draw_voxel("foreground", rng)
    assert centre is not None  # preparation refuses volumes without foreground
    flips = [axis for axis, (p, u) in enumerate(zip(flip_prob, rng.random(len(flip_prob)), strict=True)) if u < p]
    box, to = list(size), out[0]
    if planes:
        box.insert(planes.axis, 1)
        to = np.expand_dims(to, planes.axis)
    start = place(centre, volume.entry.shape, box)
    if planes:
        start[planes.axis] -= start[planes.axis] % planes.stride
    # Written through a flipped view, which flips the crop without a copy of it.
    volume.read("image", start, box, out=np.flip(to, tuple(flips)))
    if planes and planes.own_range:
        low, high = out.min(), out.max()
        np.divide(out - low, max(high - low, np.finfo(np.float32).tiny), out=out)
    return out


def labelled_crop(
    volume: StoredVolume, size: Sequence[int], labelled_prob: float, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """A crop with its label, centred on a labelled voxel with the probability given, else on an unlabelled foreground
    voxel; on the other kind where the volume has none of the one drawn.

    Returns image float32 (1, *size) in [0, 1], label int64 (1, *size).
    """
    kinds = ("labelled", "unlabelled") if rng.random() < labelled_prob else ("unlabelled", "labelled")
    centre = volume.draw_voxel(kinds[0], rng) or volume.draw_voxel(kinds[1], rng)
    assert centre is not None
    start = place(centre, volume.entry.shape, size)
    return {
        "image": torch.from_numpy(volume.read("image", start, size)[None]),
        "label": torch.from_numpy(volume.read("label", start, size)[None].astype(np.int64)),
    }
