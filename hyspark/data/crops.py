"""Where to crop and how to augment: pure functions of (seed, position).

Nothing here keeps a random state. The volume, crop and flips of slot i of batch t depend on the seed, t and i alone,
not on the number of workers, processes or restarts.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAffined,
    RandFlipd,
    RandomizableTransform,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
)

from hyspark.data.store import StoredVolume

STREAMS = ("order", "crop", "mask", "validation-crop", "validation-mask", "weights", "labelled", "step")
"""Independent sources of randomness in a run; a new one goes to the end, so that the others stay as they are."""


def seed_at(seed: int, stream: str, *position: int) -> int:
    """A 63-bit seed for one use of randomness, independent of every other (stream, position) of the run."""
    sequence = np.random.SeedSequence([seed, STREAMS.index(stream), *position])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def rng_at(seed: int, stream: str, *position: int) -> np.random.Generator:
    """A generator seeded by `seed_at`."""
    return np.random.default_rng(seed_at(seed, stream, *position))


def volume_at(position: int, num_volumes: int, seed: int) -> int:
    """Which volume stands at a position of the endless stream: every pass over the data is a permutation of its own."""
    number, within = divmod(position, num_volumes)
    return int(rng_at(seed, "order", number).permutation(num_volumes)[within])


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


class AffineRange(NamedTuple):
    """Random turns and stretches of a crop. prob: of one. degrees: largest turn about each axis. scale: largest change
    of size along each axis, as a share of it.
    """

    prob: float = 0.0
    degrees: float = 0.0
    scale: float = 0.0


NO_AFFINE = AffineRange()


class RandMirrord(RandomizableTransform):
    """Flip image and label, (1, h, w, d), on their left-right axis, and swap the labels of left and right organs."""

    def __init__(self, prob: float, swaps: Sequence[tuple[int, int]]) -> None:
        super().__init__(prob)
        self.swaps = swaps

    def __call__(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.randomize(None)
        if not self._do_transform:
            return data
        image, label = (data[key].flip(1) for key in ("image", "label"))
        mirrored = label.clone()
        for a, b in self.swaps:
            mirrored[label == a] = b
            mirrored[label == b] = a
        return {"image": image, "label": mirrored}


def augmentation(
    flip_prob: Sequence[float],
    rot90_prob: float,
    intensity_prob: float,
    swaps: Sequence[tuple[int, int]] = (),
    affine: AffineRange = NO_AFFINE,
) -> Compose:
    """MONAI's random transforms of the BTCV recipe, and turns and stretches where asked for; set its state before each
    sample to make it a function of the position.

    swaps: pairs of label values that change places in a flip of the first axis (left-right). What an affine transform
    brings in from beyond the crop is air and background.
    """
    keys = ["image", "label"]
    flips: list[Any] = [RandFlipd(keys, prob=p, spatial_axis=axis) for axis, p in enumerate(flip_prob) if p > 0]
    if swaps and flip_prob[0] > 0:
        flips[0] = RandMirrord(flip_prob[0], swaps)
    affines = []
    if affine.prob > 0:
        turns, stretches = (math.radians(affine.degrees),) * 3, (affine.scale,) * 3
        modes = ("bilinear", "nearest")
        affines = [RandAffined(keys, None, affine.prob, turns, None, None, stretches, modes, padding_mode="zeros")]
    return Compose(
        [
            *flips,
            RandRotate90d(keys, prob=rot90_prob, max_k=3),
            *affines,
            RandScaleIntensityd("image", factors=0.1, prob=intensity_prob),
            RandShiftIntensityd("image", offsets=0.1, prob=intensity_prob),
        ]
    )
