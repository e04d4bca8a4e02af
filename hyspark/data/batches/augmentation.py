"""Augmentation of labelled crops, by MONAI's transforms."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class AffineRange(NamedTuple):
    """Ranges of random rotation and scaling of a crop.

    Attributes:
        prob: probability that a crop is transformed.
        degrees: largest rotation about each axis.
        scale: largest relative change of size along each axis.
    """

    prob: float = 0.0
    degrees: float = 0.0
    scale: float = 0.0


NO_AFFINE = AffineRange()


class RandMirrord(RandomizableTransform):
    """A random left-right flip of image and label, `(c, h, w, d)`, that swaps the labels of left and right organs."""

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
    """Compose the random transforms of the BTCV recipe, with optional rotation and scaling.

    Set the random state before each sample to make the result a function of its position. An affine transform fills
    voxels from beyond the crop with the lowest value and background. Intensities are fractions of a range, 0..1.

    Args:
        flip_prob: probability of a flip of each axis.
        rot90_prob: probability of a rotation by multiples of 90 degrees.
        intensity_prob: probability of scaling, and of shifting, the intensities.
        swaps: pairs of label values that a flip of the first axis (left-right) swaps.
        affine: ranges of rotation and scaling.
    """
    keys = ["image", "label"]
    flips: list[Any] = [RandFlipd(keys, prob=p, spatial_axis=axis) for axis, p in enumerate(flip_prob) if p > 0]
    if swaps and flip_prob[0] > 0:
        flips[0] = RandMirrord(flip_prob[0], swaps)
    affines = []
    if affine.prob > 0:
        rotations, scales = (math.radians(affine.degrees),) * 3, (affine.scale,) * 3
        modes = ("bilinear", "nearest")
        affines = [RandAffined(keys, None, affine.prob, rotations, None, None, scales, modes, padding_mode="zeros")]
    return Compose(
        [
            *flips,
            RandRotate90d(keys, prob=rot90_prob, max_k=3),
            *affines,
            RandScaleIntensityd("image", factors=0.1, prob=intensity_prob),
            RandShiftIntensityd("image", offsets=0.1, prob=intensity_prob),
        ]
    )
