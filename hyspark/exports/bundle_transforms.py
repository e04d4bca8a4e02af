"""Transforms of a bundle that MONAI lacks.

- the voxels of a file that lie in the segmented region, those on its edge included;
- intensities by the values of a volume, or one per channel.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from hyspark.config.recipes import typed_values
from hyspark.data.intensity import fractions_of, hu_maps, to_input, volume_scale
from hyspark.data.readers.geometry import Grid
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.label_grids import MAX_DRIFT, ON_VOXEL

SCALES_KEY = "hyspark_scales"
"""Key of the channels' scales between these transforms."""


class MarkRegiond(MapTransform):
    """Mark the voxels of the file whose centre lies in a voxel of the region that an image is, for its label map.

    Args:
        keys: The image, (c, h, w, d), cropped to its foreground.
        name: Key of the mark, bool (1, *shape of the file).
    """

    def __init__(self, keys: KeysCollection, name: str) -> None:
        super().__init__(keys)
        self.name = name

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        for key in self.key_iterator(found):
            image = found[key]
            _, h, w, d = image.shape
            region = Grid((h, w, d), np.asarray(image.affine, dtype=np.float64))
            x, y, z = (int(length) for length in image.meta["spatial_shape"])
            file = Grid((x, y, z), np.asarray(image.meta["original_affine"], dtype=np.float64))
            found[self.name] = torch.from_numpy(mark_inside(region, file)[None])
        return found


def mark_inside(region: Grid, file: Grid) -> np.ndarray:
    """Mark the voxels of a file (h, w, d) whose centre lies in a voxel of a region, or on the border of one."""
    to_region = np.linalg.solve(region.affine, file.affine)
    inside = np.ones(file.shape, bool)
    indices = np.ogrid[tuple(slice(length) for length in file.shape)]
    for steps, offset, length in zip(to_region[:3, :3], to_region[:3, 3], region.shape, strict=True):
        # Axes that run along each other have one step; what others add over their whole length is rounding.
        moving = [i for i in range(3) if abs(steps[i]) * (file.shape[i] - 1) > MAX_DRIFT]
        at = sum((np.float32(steps[i]) * indices[i] for i in moving), np.full((1, 1, 1), offset, np.float32))
        inside &= (at > -0.5 - ON_VOXEL) & (at < length - 0.5 + ON_VOXEL)
    return inside


class MeasureScalesd(MapTransform):
    """Measure how the values of each channel become fractions, from the voxels of the file.

    Args:
        keys: The image, (c, h, w, d), as it was loaded.
        settings: Settings of preparation, by name.
    """

    def __init__(self, keys: KeysCollection, settings: Mapping[str, Any]) -> None:
        super().__init__(keys)
        self.settings = read_settings(settings)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        for key in self.key_iterator(found):
            voxels = np.asarray(found[key])
            found[SCALES_KEY] = [volume_scale(channel, self.settings, i) for i, channel in enumerate(voxels)]
        return found


class ToFractionsd(MapTransform):
    """Convert the values of each channel to fractions of its range, 0 to 1; 0 is the background."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        for key in self.key_iterator(found):
            image = found[key]
            pairs = zip(np.array(image, dtype=np.float32), found[SCALES_KEY], strict=True)
            fractions = np.stack([fractions_of(channel, scale)[0] for channel, scale in pairs])
            found[key] = copy_with(image, fractions)
        return found


class ToInputd(MapTransform):
    """Convert fractions to the network's input, and forget the scales.

    Args:
        keys: The image, cropped and padded with fractions of 0.
        settings: Settings of preparation, by name.
    """

    def __init__(self, keys: KeysCollection, settings: Mapping[str, Any]) -> None:
        super().__init__(keys)
        self.maps = hu_maps(read_settings(settings))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        scales = found.pop(SCALES_KEY)
        maps = [scale.map or of_settings for scale, of_settings in zip(scales, self.maps, strict=True)]
        for key in self.key_iterator(found):
            found[key] = copy_with(found[key], to_input(np.array(found[key], dtype=np.float32), maps))
        return found


def copy_with(image: Any, values: np.ndarray) -> Any:
    """Return a copy of a MetaTensor with other values, and its position and history."""
    changed = image.clone()
    changed.set_array(torch.from_numpy(values))
    return changed


def read_settings(settings: Mapping[str, Any]) -> PrepareSettings:
    """Read settings of preparation from plain values."""
    return PrepareSettings(**typed_values(settings, PrepareSettings, "settings"))
