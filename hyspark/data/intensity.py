"""Intensities: which values a network sees of a volume, and how the store keeps them.

A volume is kept as fractions of a range of its values, 0 to 1: the HU window of CT, else a range of the volume's own. A
fraction of 0 is the lowest value, and what is padded. Foreground is what lies above 0. Crops, augmentation and pictures
work with fractions. The last step before a network is one linear map per channel, from fractions to its input.

The ranges of a volume are computed from the voxels of its file, by `volume_scale`. So the check, the preparation and
predictions agree.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hyspark.data.settings import PictureSettings, PrepareSettings
from hyspark.utils.text import nearest

MAX_STORED = 65535
"""Largest number in 16 bits."""
VIEWING_WINDOW = (-400, 400)
"""HU that become black and white in a thumbnail."""
OF_CT = ("ct", "ct-zscore")
"""Intensities of CT: the window of the settings, in HU."""
ROBUST = (2, 98)
"""Percentiles of all voxels of MR, the robust range of FSL's BET (Smith 2002)."""
BACKGROUND = 0.1
"""Fraction of the robust range up to which voxels of MR are background, as in FSL's BET."""
CLIPPED = (0.5, 99.5)
"""Percentiles of the foreground of MR to which its values are clipped."""


class LinearMap(NamedTuple):
    """From fractions of a range to the input of a network: fraction * slope + intercept."""

    slope: float
    intercept: float


@dataclass(frozen=True)
class VolumeScale:
    """How the values of one channel of a volume become fractions.

    Attributes:
        low: value that becomes 0; lower values are clipped.
        high: value that becomes 1; higher values are clipped.
        threshold: value above which voxels are foreground.
        steps: number that 1 is stored as.
        map: from fractions to the network's input; None if it is in the settings (CT).
    """

    low: float
    high: float
    threshold: float
    steps: int
    map: LinearMap | None = None


def window_scale(voxels: np.ndarray, settings: PrepareSettings) -> VolumeScale:
    """Return the HU window of the settings."""
    return VolumeScale(settings.hu_min, settings.hu_max, settings.hu_min, stored_steps(settings))


def foreground_scale(voxels: np.ndarray, settings: PrepareSettings) -> VolumeScale:
    """Return the range of the foreground of MR, for z-scores by the mean and deviation of the clipped foreground."""
    least, most = (float(value) for value in np.percentile(voxels, ROBUST))
    threshold = least + BACKGROUND * (most - least)
    foreground = voxels[voxels > threshold].astype(np.float64)
    if foreground.size == 0:
        return VolumeScale(threshold, threshold, threshold, MAX_STORED)
    low, high = (float(value) for value in np.percentile(foreground, CLIPPED))
    foreground = foreground.clip(low, high)
    mean, deviation = float(foreground.mean()), float(foreground.std()) or 1.0
    return VolumeScale(low, high, threshold, MAX_STORED, LinearMap((high - low) / deviation, (low - mean) / deviation))


def image_scale(voxels: np.ndarray, settings: PrepareSettings) -> VolumeScale:
    """Return the range of an image within its border of zeros, for z-scores by the mean and deviation of the same.

    These are the values of nnU-Net's ZScoreNormalization without a mask, which follows its crop to nonzero voxels.
    """
    inner = within_zeros(voxels)
    low, high = float(inner.min()), float(inner.max())
    mean, deviation = float(inner.mean(dtype=np.float64)), float(inner.std(dtype=np.float64)) or 1.0
    return VolumeScale(low, high, low, MAX_STORED, LinearMap((high - low) / deviation, (low - mean) / deviation))


def within_zeros(voxels: np.ndarray) -> np.ndarray:
    """Return the box of voxels that are not 0, border of zeros excluded; all of an image of zeros."""
    box = []
    for axis in range(voxels.ndim):
        others = tuple(other for other in range(voxels.ndim) if other != axis)
        (filled,) = np.nonzero((voxels != 0).any(axis=others))
        box.append(slice(filled[0], filled[-1] + 1) if filled.size else slice(None))
    return voxels[tuple(box)]


def whole_scale(voxels: np.ndarray, settings: PrepareSettings) -> VolumeScale:
    """Return the range of all values, for these values themselves; whole numbers are stored exactly."""
    low, high = float(voxels.min()), float(voxels.max())
    steps = steps_of_range(high - low) if high > low else MAX_STORED
    return VolumeScale(low, high, low, steps, LinearMap(high - low, low))


SCALES: Mapping[str, Callable[[np.ndarray, PrepareSettings], VolumeScale]] = {
    "ct": window_scale,
    "ct-zscore": window_scale,
    "mr": foreground_scale,
    "zscore": image_scale,
    "none": whole_scale,
}
"""The range of a volume by intensity; the keys are the intensities."""


def volume_scale(voxels: np.ndarray, settings: PrepareSettings, channel: int) -> VolumeScale:
    """Return how the finite voxels of a file become fractions, for one of the channels that are read."""
    return SCALES[intensity_of(settings, channel)](voxels, settings)


def intensity_of(settings: PrepareSettings, channel: int) -> str:
    """Return the intensity of one of the channels that are read, counted from 0."""
    return of_channel(settings.intensity, channel)


def of_channel(values: Sequence[Any], channel: int) -> Any:
    """Return the value of a channel, of one value for all channels or one per channel."""
    return values[channel] if len(values) > 1 else values[0]


def intensities_of(settings: PrepareSettings) -> tuple[str, ...]:
    """Return the intensity of each channel that is read."""
    return tuple(intensity_of(settings, channel) for channel in range(settings.num_image_channels))


def reads_window(settings: PrepareSettings) -> bool:
    """Return whether a channel is CT, of which the HU window is read."""
    return any(name in OF_CT for name in intensities_of(settings))


def hu_maps(settings: PrepareSettings) -> tuple[LinearMap | None, ...]:
    """Return the map of each channel that the settings give, from fractions of the HU window; None for the others."""
    return tuple(
        LinearMap(
            (settings.hu_max - settings.hu_min) / of_channel(settings.input_std, channel),
            (settings.hu_min - of_channel(settings.input_mean, channel)) / of_channel(settings.input_std, channel),
        )
        if name == "ct-zscore"
        else None
        for channel, name in enumerate(intensities_of(settings))
    )


def store_key(settings: PrepareSettings) -> dict[str, Any]:
    """Return the settings that voxels in the store depend on; those of one channel of CT are as they always were."""
    key: dict[str, Any] = {"spacing": settings.spacing}
    kinds = ["ct" if name in OF_CT else name for name in intensities_of(settings)]
    if "ct" in kinds:
        key |= {"hu_min": settings.hu_min, "hu_max": settings.hu_max}
    return key if kinds == ["ct"] else key | {"intensity": kinds}


def check_intensity(settings: PrepareSettings) -> None:
    """Check the settings of intensities and channels against each other.

    Raises:
        ValueError: A value does not fit.
    """
    channels, num = settings.image_channels, settings.num_image_channels
    if not channels or min(channels) < 0 or len(set(channels)) < num:
        raise ValueError(
            f"image_channels: expected different numbers from 0, as in the file names CASE_0000, CASE_0001, got "
            f"{list(channels)}"
        )
    for name in settings.intensity or ("",):
        if name not in SCALES:
            raise ValueError(f"intensity: expected {', '.join(SCALES)}, got {name!r}{nearest(name.lower(), SCALES)}")
    for name in ("intensity", "input_mean", "input_std"):
        values = getattr(settings, name)
        if len(values) > 1 and len(values) != num:
            raise ValueError(
                f"{name}: expected one value, or one for each of the {num} image_channels, got {len(values)}: "
                f"{' '.join(map(str, values))}"
            )
    is_zscored = "ct-zscore" in settings.intensity
    if is_zscored and not (settings.input_mean and settings.input_std):
        raise ValueError(
            "intensity ct-zscore: expected input_mean and input_std in HU; nnU-Net's plans.json and "
            "dataset_fingerprint.json have them as mean and std in foreground_intensity_properties_per_channel"
        )
    if not is_zscored and (settings.input_mean or settings.input_std):
        raise ValueError("input_mean and input_std: read by intensity ct-zscore alone; set that, or drop the two")
    window = (settings.hu_min, settings.hu_max)
    if not reads_window(settings) and window != (PrepareSettings.hu_min, PrepareSettings.hu_max):
        raise ValueError("hu_min and hu_max: read by the intensities ct and ct-zscore alone; drop them")
    if settings.input_std and min(settings.input_std) <= 0:
        raise ValueError(f"input_std: expected numbers above 0, got {' '.join(map(str, settings.input_std))}")


def fractions_of(values: np.ndarray, scale: VolumeScale) -> tuple[np.ndarray, np.ndarray]:
    """Convert the values of a channel, float32, to fractions of its range in 0..1, and find its foreground.

    Foreground is at least one step above 0 where the range is the volume's own, so that it stays so in the store.

    Returns:
        The fractions, float32, and the foreground, bool.
    """
    fractions = values - scale.low
    fractions /= scale.high - scale.low
    fractions.clip(0, 1, out=fractions)
    if scale.map is None:
        return fractions, fractions > 0
    foreground = values > scale.threshold
    fractions[foreground] = np.maximum(fractions[foreground], 1 / scale.steps)
    fractions[~foreground] = 0
    return fractions, foreground


def to_input(fractions: Any, maps: Sequence[LinearMap | None], axis: int = 0) -> Any:
    """Convert fractions to the input of a network, in place; the channels of the array or tensor lie on an axis."""
    for channel, found in enumerate(maps):
        if found is not None:
            part = fractions[(slice(None),) * axis + (channel,)]
            part *= found.slope
            part += found.intercept
    return fractions


def to_fractions(values: Any, maps: Sequence[LinearMap | None], axis: int = 0) -> Any:
    """Convert the input of a network back to fractions, in place, for pictures."""
    for channel, found in enumerate(maps):
        if found is not None:
            part = values[(slice(None),) * axis + (channel,)]
            part -= found.intercept
            part /= found.slope
    return values


def stored_steps(settings: PrepareSettings) -> int:
    """Return the number that 1 is stored as, for the HU window."""
    return steps_of_range(settings.hu_max - settings.hu_min)


def steps_of_range(width: float) -> int:
    """Return the largest power of two per unit that fits 16 bits, times the width of a range of values."""
    return round(width * 2.0 ** math.floor(math.log2(MAX_STORED / width)))


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


def viewing_greys(values: np.ndarray, bounds: tuple[float, float] = VIEWING_WINDOW) -> np.ndarray:
    """Scale float32 values, which may hold NaN, to uint8 between two values; by default the HU of thumbnails."""
    low, high = bounds
    return np.nan_to_num((values - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)
