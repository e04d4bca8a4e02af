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

from hyspark.data.batches.loader import Batch, Shard
from hyspark.data.readers.images import ImageSet, with_short_side
from hyspark.data.seeds import rng_at, volume_at

MARGIN = 8 / 7
"""An image's shorter side over the edge of its centre crop, as usual (256 and 224)."""
MAX_ASPECT_RATIO = 1.25
"""Longest side of a training crop over its shortest, in the image: anatomy is stretched only slightly.

A crop that takes nearly all of a longer image exceeds it.
"""


class Augmentation(NamedTuple):
    """Ranges of the augmentation of a training image.

    Attributes:
        crop_scale: smallest and largest fraction of the image's area in a crop.
        flip_prob: probability of a left-right flip.
        degrees: largest rotation.
        jitter: largest relative change of brightness and of contrast.
    """

    crop_scale: tuple[float, float]
    flip_prob: float
    degrees: float
    jitter: float


class Normalisation(NamedTuple):
    """Channels, mean and standard deviation of a network's input, whose pixels in 0..1 are normalised by them.

    Attributes:
        channels: 1 or 3.
        mean: subtracted; one number, or one per channel.
        std: divided by; one number, or one per channel.
    """

    channels: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class ImageBatches(Dataset[Batch]):
    """Item t: image float32 `(b, c, size, size)`, label int64 `(b,)`, cases (names)."""

    images: ImageSet
    shard: Shard
    size: int
    augmentation: Augmentation
    normalisation: Normalisation
    seed: int

    def __getitem__(self, step: int) -> Batch:
        crops, labels, cases = [], [], []
        for slot in self.shard.slots:
            index = volume_at(step * self.shard.bs + slot, len(self.images), self.seed)
            rng = rng_at(self.seed, "crop", step, slot)
            crop = training_crop(self.images.images[index], self.size, self.augmentation, rng)
            crops.append(normalise(crop, self.normalisation))
            labels.append(self.images.labels[index])
            cases.append(self.images.names[index])
        return {"image": torch.stack(crops), "label": torch.tensor(labels), "cases": cases}


def training_crop(image: Tensor, size: int, augmentation: Augmentation, rng: np.random.Generator) -> Tensor:
    """Cut a random crop of a uint8 image `(c, h, w)`, and augment it by flip, rotation, brightness and contrast.

    Returns:
        float32 `(c, size, size)` in 0..1.
    """
    crop = transforms.resized_crop(image, *random_box(image.shape[1:], augmentation.crop_scale, rng), [size, size])
    # Every image takes the same number of draws, so that switching one change off does not alter the others.
    flip, rotation, brightness, contrast = rng.random(4)
    if flip < augmentation.flip_prob:
        crop = transforms.horizontal_flip(crop)
    if augmentation.degrees:
        angle = augmentation.degrees * (2 * rotation - 1)
        crop = transforms.rotate(crop, angle, interpolation=InterpolationMode.BILINEAR)
    crop = crop.float() / 255
    if augmentation.jitter:
        crop = transforms.adjust_brightness(crop, 1 + augmentation.jitter * (2 * brightness - 1))
        crop = transforms.adjust_contrast(crop, 1 + augmentation.jitter * (2 * contrast - 1))
    return crop


def random_box(shape: Sequence[int], scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a crop of an image `(h, w)`.

    Its area is a fraction of the image's within `scale`, as far as the image's shape allows.
    """
    area = rng.uniform(*scale) * shape[0] * shape[1]
    ratio = np.exp(rng.uniform(-np.log(MAX_ASPECT_RATIO), np.log(MAX_ASPECT_RATIO)))
    # Within the image: if one side exceeds it, the other grows to keep the area.
    height = int(min(shape[0], max(round(np.sqrt(area / ratio)), area / shape[1])))
    width = int(min(shape[1], max(1, round(area / height))))
    top, left = (int(rng.integers(n - s + 1)) for n, s in zip(shape, (height, width), strict=True))
    return top, left, height, width


def centre_crop(image: Tensor, size: int, normalisation: Normalisation) -> Tensor:
    """Cut and normalise the centre of a uint8 image `(c, h, w)` for inference: float32 `(channels, size, size)`."""
    image = with_short_side(image, short_side(size))
    return normalise(transforms.center_crop(image, [size, size]).float() / 255, normalisation)


def short_side(size: int) -> int:
    """Return the pixels of the shorter side that an image is resized to before its centre of edge `size` is cut."""
    return round(MARGIN * size)


def normalise(image: Tensor, normalisation: Normalisation) -> Tensor:
    """Convert an image `(c, h, w)` in 0..1 to the network's channels, and normalise it by mean and deviation."""
    if image.shape[0] > normalisation.channels:
        image = transforms.rgb_to_grayscale(image)
    image = image.expand(normalisation.channels, -1, -1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (normalisation.mean, normalisation.std))
    return (image - mean) / std
