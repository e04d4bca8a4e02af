"""Random changes of labelled crops, by MONAI's transforms."""

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
