"""Views of one image to be compared: random parts of a crop, resized, flipped, blurred, in a shifted window.

The views of slot i of batch t depend on the seed, t and i alone.
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

from hyspark.data.batches.crops import SliceSampling, crop_maps, image_crop
from hyspark.data.batches.loader import Batch, Shard
from hyspark.data.batches.volumes import NO_FLIPS
from hyspark.data.intensity import to_input
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.seeds import rng_at, volume_at

WINDOW_PROB, WINDOW_WIDTH, WINDOW_LEVEL = 0.8, 0.3, 0.15
"""Probability of a change of a view's window; largest relative change of its width; largest shift of its level."""
BLUR_PROB, BLUR = 0.5, (0.5, 1.5)
"""Probability that a view is smoothed; range of the Gaussian's deviation in pixels."""
SMALL_EDGES = (0.3, 0.6)
"""Range of the edges of a small view, as fractions of the crop's edges."""


@dataclass(frozen=True)
class ViewRecipe:
    """How views are made of a crop: two large ones, and optional small ones.

    Attributes:
        size: voxels per axis of a crop and of a large view.
        least_edge: shortest edge of the part that becomes a large view, as a fraction of the crop's edge.
        num_small: number of small views.
        flip_prob: probability of a flip of each axis of the volume.
        slices: takes 2D crops of slices.
    """

    size: tuple[int, ...]
    least_edge: float
    num_small: int
    flip_prob: tuple[float, ...]
    slices: SliceSampling | None = None

    @property
    def small_size(self) -> tuple[int, ...]:
        """Voxels per axis of a small view: half a large one's."""
        return tuple(edge // 2 for edge in self.size)

    def draw(self, volume: StoredVolume, rng: np.random.Generator) -> list[Tensor]:
        """Draw two large views, then the small ones: float32 `(c, *size)` each, as a network sees them."""
        crop = torch.from_numpy(image_crop(volume, self.size, NO_FLIPS, rng, slices=self.slices))
        flips = [p for axis, p in enumerate(self.flip_prob) if self.slices is None or axis != self.slices.axis]
        large = view_transform(self.size, (self.least_edge, 1.0), flips)
        small = view_transform(self.small_size, SMALL_EDGES, flips)
        maps = crop_maps(volume, self.slices)
        return [
            to_input(transform.set_random_state(int(rng.integers(2**32)))(crop).as_subclass(Tensor).clamp(0, 1), maps)
            for transform in [large] * 2 + [small] * self.num_small
        ]

    def batch(self, volumes: Sequence[tuple[StoredVolume, np.random.Generator]]) -> Batch:
        """Stack the views of several volumes: views, float32 `(b, c, *size)` each, and cases (names)."""
        drawn = [self.draw(volume, rng) for volume, rng in volumes]
        return {
            "views": [torch.stack(same) for same in zip(*drawn, strict=True)],
            "cases": [v.name for v, _ in volumes],
        }


def view_transform(size: Sequence[int], edges: tuple[float, float], flip_prob: Sequence[float]) -> Compose:
    """Compose the random transforms of one view.

    Set the random state before each view to make it a function of its position. Photographs' colours have no
    counterpart in CT, whose values mean tissue; only the window varies, slightly.

    Args:
        size: voxels per axis of the view.
        edges: range of the edges of the part that becomes the view, as fractions of the crop's edges.
        flip_prob: probability of a flip of each axis.
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
    """Item t: this process's shard of the global batch t, as `ViewRecipe.batch` makes it."""

    volumes: Sequence[StoredVolume]
    shard: Shard
    recipe: ViewRecipe
    crops_per_volume: int
    seed: int

    def __getitem__(self, step: int) -> Batch:
        return self.recipe.batch(
            [
                (
                    self.volumes[volume_at(step * self.shard.bs + slot, len(self.volumes), self.seed)],
                    rng_at(self.seed, "crop", step, slot, number),
                )
                for slot in self.shard.slots
                for number in range(self.crops_per_volume)
            ]
        )


@dataclass(frozen=True)
class ValidationViews(Dataset[Batch]):
    """Item i: the views of the i-th group of validation volumes, the same in every epoch and every run of a seed.

    Attributes:
        volumes: the validation volumes.
        recipe: how views are made.
        crops_per_volume: crops of each volume.
        seed: seed of the views.
        together: volumes per item.
    """

    volumes: Sequence[StoredVolume]
    recipe: ViewRecipe
    crops_per_volume: int
    seed: int
    together: int

    def __len__(self) -> int:
        return math.ceil(len(self.volumes) / self.together)

    def __getitem__(self, index: int) -> Batch:
        positions = range(index * self.together, min((index + 1) * self.together, len(self.volumes)))
        return self.recipe.batch(
            [
                (self.volumes[position], rng_at(self.seed, "validation-crop", position, number))
                for position in positions
                for number in range(self.crops_per_volume)
            ]
        )
