"""Faults of an image's values: each a kind of finding with its text, judged against the intensities of the run."""

from collections.abc import Iterator

import numpy as np

from hyspark.data.intensity import OF_CT, intensity_of, stored_steps
from hyspark.data.quality.image_kind import IN_HU, ImageKind, image_kind
from hyspark.data.quality.modality import Modality
from hyspark.data.settings import PrepareSettings

MIN_COVER = 0.25
"""Least fraction of the range of an image's values that a window chosen for them covers."""
MIN_COVER_OF_RESCALED = 0.75
"""The same for values of rescaled CT, of which windows of HU cover a part, too."""
MIN_FILLED = 0.05
"""Least fraction of such a window that these values fill."""
MAX_OUTSIDE = 0.1
"""Fraction of such a window that may lie below the image's least value."""
MAX_CUT = 0.05
"""Fraction of the HU window that may be missing in an image that was clipped before."""
LEAST_WIDTH, LARGEST_LOW = 20, 700
"""Least width of a window of HU, and the largest HU that it may begin at: nothing but bone and metal lies above."""
WATER_BACKGROUND = 0.2
"""Least fraction of voxels of exactly 0 that counts as a background."""


def value_faults(
    low: float, high: float, sample: np.ndarray, settings: PrepareSettings, modality: Modality, channel: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield the faults of a channel's values.

    Args:
        low: least value.
        high: largest value.
        sample: finite values of evenly spaced voxels `(h, w, d)`.
        settings: the intensities, and the HU window.
        modality: what the data set's file says of the channel.
        channel: which of the channels that are read.
    """
    intensity = intensity_of(settings, channel)
    if low == high:
        yield "constant", f"the value {low:g} everywhere"
    elif intensity in OF_CT:
        yield from ct_faults(low, high, sample, settings, modality)
    elif intensity == "mr":
        yield from mr_faults(low, high, sample, modality)


def mr_faults(low: float, high: float, sample: np.ndarray, modality: Modality) -> Iterator[tuple[str, str]]:
    """Yield the faults of values that are said to be MR: CT or a label map."""
    kind = image_kind(low, high, sample)
    if kind.name == "label map":
        yield "label map", kind.range_text
    elif kind.name in IN_HU and not modality.is_other and (kind.is_sure or modality.is_ct):
        yield "CT as MR", kind.range_text + (f'; {modality.file} names it "{modality.name}"' if modality.is_ct else "")


def ct_faults(
    low: float, high: float, sample: np.ndarray, settings: PrepareSettings, modality: Modality
) -> Iterator[tuple[str, str]]:
    """Yield the faults of values that are said to be CT, see `value_faults`."""
    kind = image_kind(low, high, sample)
    named = f'; {modality.file} names it "{modality.name}"' if modality.is_other else ""
    is_hu = kind.name in IN_HU and (kind.is_sure or not modality.is_other)
    if not is_hu:
        is_fit = fits_window(kind, settings.hu_min, settings.hu_max)
        name: str = "no CT" if kind.name in IN_HU else kind.name
        if modality.is_mr and name != "label map":
            name = "MR as CT"
        yield "another scale" if is_fit else name, kind.range_text + named
        return
    if is_all_air(high, settings):
        yield "all air", f"values from {low:g} to {high:g}"
    elif settings.hu_max - settings.hu_min < LEAST_WIDTH or settings.hu_min > LARGEST_LOW:
        yield "another window", f"{kind.range_text}, the window from {settings.hu_min:g} to {settings.hu_max:g}"
    elif kind.clipped and is_cut(kind.clipped, settings.hu_min, settings.hu_max):
        yield "narrow window", f"values from {low:g} to {high:g}"
    elif modality.is_other:
        yield "another modality", kind.range_text + named
    elif not kind.is_sure and not modality.is_ct:
        yield "perhaps no CT", kind.range_text
    elif kind.name != "CT" and np.mean(sample == 0) > WATER_BACKGROUND:
        yield "background of 0", f"{np.mean(sample == 0):.0%} of the voxels 0, which is water"


def fits_window(kind: ImageKind, hu_min: float, hu_max: float) -> bool:
    """Return whether a window was chosen for values that are no HU: it begins within their range and covers a part."""
    (low, high), width = kind.most, hu_max - hu_min
    if kind.name == "inverted":  # wide windows of HU cover them, too
        return False
    cover = MIN_COVER_OF_RESCALED if kind.name == "not HU" else MIN_COVER
    common = min(hu_max, high) - max(hu_min, low)
    return bool(
        hu_min >= kind.low - MAX_OUTSIDE * width and common >= cover * (high - low) and common >= MIN_FILLED * width
    )


def is_cut(clipped: tuple[float, float], hu_min: float, hu_max: float) -> bool:
    """Return whether an image was clipped inside the window, so that air or bone would not be 0 or 1."""
    tolerance = MAX_CUT * (hu_max - hu_min)
    return clipped[0] > hu_min + tolerance or clipped[1] < hu_max - tolerance


def is_all_air(high: float, settings: PrepareSettings) -> bool:
    """Return whether no value is stored above 0."""
    fraction = (high - settings.hu_min) / (settings.hu_max - settings.hu_min)
    return bool(np.rint(fraction * stored_steps(settings)) <= 0)
