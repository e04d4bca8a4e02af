"""Batches of images for classification: item t is a pure function of (seed, t), as in volumes.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from hyspark.data.batches.loader import Batch, Share
from hyspark.data.readers.images import ImageSet, with_short_side
from hyspark.data.seeds import rng_at, volume_at

MARGIN = 8 / 7
"""Length of an image's shorter side over the edge of the crop from its centre, as usual (256 and 224)."""
LONGEST = 1.25
"""Longest side of a training crop over its shortest, in the image, unless the image is longer and the crop takes nearly
all of it: anatomy is stretched a little only.
"""


class Augmentation(NamedTuple):
    """What is drawn for each training image. crop_scale: share of its area. degrees: largest turn. jitter: largest
    change of brightness and contrast, as a share.
    """

    crop_scale: tuple[float, float]
    flip_prob: float
    degrees: float
    jitter: float


class Scaling(NamedTuple):
    """From pixels to what the network sees: so many channels; in 0..1, less the mean, over the standard deviation, each
    one number or one per channel.
    """

    channels: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class ImageBatches(Dataset[Batch]):
    """Item t: image float32 (b, c, size, size), label int64 (b,), cases (names)."""

    images: ImageSet
    share: Share
    size: int
    augmentation: Augmentation
    scaling: Scaling
    seed: int

    def __getitem__(self, step: int) -> Batch:
        crops, labels, cases = [], [], []
        for slot in self.share.slots:
            index = volume_at(step * self.share.bs + slot, len(self.images), self.seed)
            rng = rng_at(self.seed, "crop", step, slot)
            crop = training_crop(self.images.images[index], self.size, self.augmentation, rng)
            crops.append(scaled(crop, self.scaling))
            labels.append(self.images.labels[index])
            cases.append(self.images.names[index])
        return {"image": torch.stack(crops), "label": torch.tensor(labels), "cases": cases}


def training_crop(image: Tensor, size: int, augmentation: Augmentation, rng: np.random.Generator) -> Tensor:
    """A random part of a uint8 image (c, h, w), flipped, turned and with other intensities: float (c, size, size) in
    0..1.
    """
    crop = transforms.resized_crop(image, *random_box(image.shape[1:], augmentation.crop_scale, rng), [size, size])
    # As many draws for every image, so that switching one change off leaves the others as they are.
    flip, turn, brightness, contrast = rng.random(4)
    if flip < augmentation.flip_prob:
        crop = transforms.horizontal_flip(crop)
    if augmentation.degrees:
        angle = augmentation.degrees * (2 * turn - 1)
        crop = transforms.rotate(crop, angle, interpolation=InterpolationMode.BILINEAR)
    crop = crop.float() / 255
    if augmentation.jitter:
        crop = transforms.adjust_brightness(crop, 1 + augmentation.jitter * (2 * brightness - 1))
        crop = transforms.adjust_contrast(crop, 1 + augmentation.jitter * (2 * contrast - 1))
    return crop


def random_box(shape: Sequence[int], scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of an image (h, w), of a share of its area within `scale` as far as the
    image's shape allows.
    """
    area = rng.uniform(*scale) * shape[0] * shape[1]
    ratio = np.exp(rng.uniform(-np.log(LONGEST), np.log(LONGEST)))
    # Within the image: where one side would stick out, the other makes up for it.
    height = int(min(shape[0], max(round(np.sqrt(area / ratio)), area / shape[1])))
    width = int(min(shape[1], max(1, round(area / height))))
    top, left = (int(rng.integers(n - s + 1)) for n, s in zip(shape, (height, width), strict=True))
    return top, left, height, width


def centre_crop(image: Tensor, size: int, scaling: Scaling) -> Tensor:
    """What the network sees of a uint8 image (c, h, w) outside of training: float (channels, size, size)."""
    image = with_short_side(image, short_side(size))
    return scaled(transforms.center_crop(image, [size, size]).float() / 255, scaling)


def short_side(size: int) -> int:
    """Pixels of an image's shorter side, of which the network sees `size` outside of training."""
    return round(MARGIN * size)


def scaled(image: Tensor, scaling: Scaling) -> Tensor:
    """Float (c, h, w) in 0..1 -> (channels, h, w), mean and standard deviation applied."""
    if image.shape[0] > scaling.channels:
        image = transforms.rgb_to_grayscale(image)
    image = image.expand(scaling.channels, -1, -1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (scaling.mean, scaling.std))
    return (image - mean) / std
