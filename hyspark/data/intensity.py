"""Intensities: the CT window of prepared volumes, the grey values of slices, and the precision of the store."""

import math
from typing import Any

import numpy as np

from hyspark.data.settings import PictureSettings, PrepareSettings

MAX_STORED = 65535
"""Largest number in 16 bits."""
VIEWING_WINDOW = (-400, 400)
"""HU that become black and white in a thumbnail."""


def window_transform(settings: PrepareSettings) -> Any:
    """Make MONAI's transform of a dict's image from the HU window to 0..1, clipped."""
    from monai.transforms import ScaleIntensityRanged  # imports torch, which a reader of the store does not need

    return ScaleIntensityRanged("image", settings.hu_min, settings.hu_max, 0.0, 1.0, clip=True)


def stored_steps(settings: PrepareSettings) -> int:
    """Return the number that 1 is stored as: the largest power of two per HU that fits 16 bits, times the window."""
    window = settings.hu_max - settings.hu_min
    return round(window * 2.0 ** math.floor(math.log2(MAX_STORED / window)))


def quantise(image: np.ndarray, steps: int) -> np.ndarray:
    """Round an image in 0..1 to uint16 numbers in 0..steps."""
    return np.rint(image * steps).astype(np.uint16)


def scale_to_own_range(image: np.ndarray) -> None:
    """Scale a float32 image in place, its least value to 0 and its largest to 1; a constant image becomes 0."""
    low, high = image.min(), image.max()
    np.divide(image - low, max(high - low, np.finfo(np.float32).tiny), out=image)


def grey_values(values: np.ndarray, settings: PictureSettings) -> np.ndarray | None:
    """Scale clipped HU, float32, to uint8 by the window or by the image's own range; None if all of it is one grey."""
    low, high = settings.bounds if settings.scaling == "window" else (float(values.min()), float(values.max()))
    if low == high:
        return None
    grey = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
    return grey if grey.min() < grey.max() else None


def viewing_greys(values: np.ndarray) -> np.ndarray:
    """Scale float32 HU, which may hold NaN, to uint8 in the window of thumbnails."""
    low, high = VIEWING_WINDOW
    return np.nan_to_num((values - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
