"""Views of one image to be compared: random parts of a crop, resized, flipped, blurred, in a shifted window.

As everywhere in this package the views of slot i of batch t depend on the seed, t and i alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandFlip,
    RandGaussianSmooth,
    RandScaleCrop,
    RandScaleIntensity,
    RandShiftIntensity,
    Resize,
)
from torch import Tensor
from torch.utils.data import Dataset

from hyspark.data.batches.crops import Planes, image_crop
from hyspark.data.batches.loader import Batch, Share
from hyspark.data.batches.volumes import NO_FLIPS
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.seeds import rng_at, volume_at

WINDOW_PROB, WINDOW_WIDTH, WINDOW_LEVEL = 0.8, 0.3, 0.15
"""How often, and by how much of itself and of the range 0..1, a view's window changes in width and level."""
BLUR_PROB, BLUR = 0.5, (0.5, 1.5)
"""How often a view is smoothed, by a deviation of so many pixels."""
SMALL_EDGES = (0.3, 0.6)
"""Edges of a small view, as shares of the crop's."""


@dataclass(frozen=True)
class ViewRecipe:
    """What views are made of a crop. size: voxels per axis of a crop and of a large view, of which there are two.
    least_edge: the shortest edge of the part that becomes a large view, as a share of the crop's. num_small: further
    views of small parts. flip_prob: for each axis of the volume. planes: as for crops.
    """

    size: tuple[int, ...]
    least_edge: float
    num_small: int
    flip_prob: tuple[float, ...]
    planes: Planes | None = None

    @property
    def small_size(self) -> tuple[int, ...]:
        """Half a large view's."""
        return tuple(edge // 2 for edge in self.size)

    def draw(self, volume: StoredVolume, rng: np.random.Generator) -> list[Tensor]:
        """Two large views, then the small ones: float32 (1, *size) in [0, 1] each."""
        crop = torch.from_numpy(image_crop(volume, self.size, NO_FLIPS, rng, planes=self.planes))
        flips = [p for axis, p in enumerate(self.flip_prob) if self.planes is None or axis != self.planes.axis]
        large = view_transform(self.size, (self.least_edge, 1.0), flips)
        small = view_transform(self.small_size, SMALL_EDGES, flips)
        return [
            transform.set_random_state(int(rng.integers(2**32)))(crop).as_subclass(Tensor).clamp(0, 1)
            for transform in [large] * 2 + [small] * self.num_small
        ]

    def batch(self, volumes: Sequence[tuple[StoredVolume, np.random.Generator]]) -> Batch:
        """Views of several: views float32 (b, 1, *size) each, cases (names)."""
        drawn = [self.draw(volume, rng) for volume, rng in volumes]
        return {
            "views": [torch.stack(same) for same in zip(*drawn, strict=True)],
            "cases": [v.name for v, _ in volumes],
        }


def view_transform(size: Sequence[int], edges: tuple[float, float], flip_prob: Sequence[float]) -> Compose:
    """MONAI's random transforms for one view of `size`; set its state before each to make it a function of the
    position.

    Photographs' colours have no counterpart in CT, whose values mean tissue: what varies is the window, by little.
    """
    low, high = edges
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return Compose(
        [
            RandScaleCrop([low] * len(size), [high] * len(size), random_size=True),
            Resize(size, mode=mode, anti_aliasing=False),
            *(RandFlip(prob=p, spatial_axis=axis) for axis, p in enumerate(flip_prob) if p > 0),
            RandScaleIntensity(factors=WINDOW_WIDTH, prob=WINDOW_PROB),
            RandShiftIntensity(offsets=WINDOW_LEVEL, prob=WINDOW_PROB),
            RandGaussianSmooth(sigma_x=BLUR, sigma_y=BLUR, sigma_z=BLUR, prob=BLUR_PROB),
        ]
    )


@dataclass(frozen=True)
class ViewBatches(Dataset[Batch]):
    """Item t: this process's share of the global batch t, as `ViewRecipe.batch` gives it."""

    volumes: Sequence[StoredVolume]
    share: Share
    recipe: ViewRecipe
    crops_per_volume: int
    seed: int

    def __getitem__(self, step: int) -> Batch:
        return self.recipe.batch(
            [
                (
                    self.volumes[volume_at(step * self.share.bs + slot, len(self.volumes), self.seed)],
                    rng_at(self.seed, "crop", step, slot, number),
                )
                for slot in self.share.slots
                for number in range(self.crops_per_volume)
            ]
        )


@dataclass(frozen=True)
class ValidationViews(Dataset[Batch]):
    """Item i: the fixed views of the i-th so many held-out volumes, the same in every epoch and every run of a seed.
    together: how many volumes.
    """

    volumes: Sequence[StoredVolume]
    recipe: ViewRecipe
    crops_per_volume: int
    seed: int
    together: int

    def __len__(self) -> int:
        return math.ceil(len(self.volumes) / self.together)

    def __getitem__(self, index: int) -> Batch:
        places = range(index * self.together, min((index + 1) * self.together, len(self.volumes)))
        return self.recipe.batch(
            [
                (self.volumes[place], rng_at(self.seed, "validation-crop", place, number))
                for place in places
                for number in range(self.crops_per_volume)
            ]
        )
