"""What an image holds, decided by its values: CT in Hounsfield units, or what else.

CT in HU is recognised by air and lung (-1100 to -150), or by fat and soft tissue around 0. What is no CT in HU is named
as nearly as the values allow. Whether an image fits a run is judged in value_faults.py.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

ImageKindName = Literal[
    "CT",
    "CT without air",
    "narrow window",
    "offset",
    "inverted",
    "not HU",
    "8-bit",
    "scaled",
    "wrapped around",
    "label map",
    "like PET",
    "no CT",
]
IN_HU = ("CT", "CT without air", "narrow window")
"""Kinds whose values are Hounsfield units."""
AIR, TISSUE = (-1100, -150), (-200, 300)
"""HU of air, lung and most fat; HU of fat, soft tissue and enhanced blood."""
PADDING = -1100
"""HU below which values are padding outside the scanner's field, such as -2000 or -3024."""
OFFSETS = (1024, 1000)
"""Numbers that are commonly added to HU to avoid negative values."""
MAX_UNSIGNED, LEAST_WRAPPED, LARGEST_HU = 65535, 62000, 20000
"""Range of negative HU that are read as unsigned 16 bits, with or without an offset; no HU lie far above metal."""
LEAST_NOISE, MAX_BELOW, MAX_BLURRED = -1500, 0.05, 0.02
"""HU below which no noise of air reaches, and largest fractions of voxels below it but those of one padding value: with
much padding, whose edge resampling blurs, and with little."""
RINGING = 0.03
"""Fraction of its value by which resampling and noise change padding."""
INVERTED_AIR, MAX_BONE = (850, 1100), 0.03
"""Range of air and lung in inverted HU, and largest fraction of voxels of dense bone."""
MAX_STORED, MAX_METAL = 3100, 0.05
"""HU above those that 12 bits hold, and largest fraction of voxels of metal above them."""
MAX_DENSE = 5
"""Largest number of voxels of bone and contrast agent for each voxel of fat and soft tissue."""
LEAST_TISSUE, LEAST_VOXELS = 15, 1000
"""HU that a quarter of the soft tissue of any CT exceeds, and number of its voxels by which that is judged."""
NARROW = 20
"""Range of 99 % of the values, in HU, that noise alone exceeds in any CT."""


@dataclass(frozen=True)
class ImageKind:
    """What an image holds.

    Attributes:
        name: the kind.
        low: least value.
        high: largest value.
        most: range of all values but the lowest and the highest 1 %.
        is_sure: whether nothing else is likely; otherwise a declared modality decides.
        clipped: HU that the image was clipped to, if it is a narrow window; inf where it was not.
    """

    name: ImageKindName
    low: float
    high: float
    most: tuple[float, float]
    is_sure: bool = True
    clipped: tuple[float, float] | None = None

    @property
    def range_text(self) -> str:
        """Both ranges in words."""
        low, high = self.most
        return f"values from {self.low:.6g} to {self.high:.6g}, 98 % of them from {low:.4g} to {high:.4g}"


def image_kind(low: float, high: float, sample: np.ndarray) -> ImageKind:
    """Decide what an image holds.

    Args:
        low: least value, below `high`.
        high: largest value.
        sample: finite values of evenly spaced voxels `(h, w, d)`, in the type they are stored in.
    """
    values = sample.astype(np.float32).ravel()
    bottom, top = (float(value) for value in np.percentile(values, (1, 99)))
    name, is_sure = decide_kind(low, high, sample, values)
    clipped = clipped_to(low, high, values) if name == "narrow window" else None
    return ImageKind(name, low, high, (bottom, top), is_sure, clipped)


def decide_kind(low: float, high: float, sample: np.ndarray, values: np.ndarray) -> tuple[ImageKindName, bool]:
    """Return the kind, and whether it is sure."""
    if is_inverted(values):
        return "inverted", True
    if low >= PADDING and LEAST_WRAPPED < high <= MAX_UNSIGNED and is_wrapped(values):
        return "wrapped around", True
    if low >= 0 and high <= 255 and is_label_map(sample):
        return "label map", True
    if (cut := clipped_to(low, high, values)) and is_tissue_within(values, cut):
        inside = values[(values > cut[0]) & (values < cut[1])]
        return ("not HU" if is_shrunk(inside) else "narrow window"), True
    if low == 0 and high == 255:
        return "8-bit", True
    spread = np.subtract(*np.percentile(values, (99.5, 0.5)))
    if spread < NARROW and not (low < PADDING or high - low > 500):
        return ("like PET" if low >= 0 and high > 1.5 and is_skewed(values) else "scaled"), True
    if is_ct_with_air(values):
        return ("not HU" if is_stretched(values) else "CT"), True
    body = without_background(values)
    if is_ct_without_air(body):
        return ("not HU" if is_shrunk(body) else "CT without air"), True
    if sample.dtype != np.uint8 and (is_soft_tissue(values, low) or is_bone(body)):
        return "CT without air", False
    if low >= 0 and high <= 255:
        return "8-bit", True
    if low > -200 and any(is_ct_with_air(values - shift) and has_tissue_peak(values - shift) for shift in OFFSETS):
        return "offset", False
    return ("like PET" if low >= 0 and is_skewed(values) else "no CT"), True


def fraction(values: np.ndarray, low: float, high: float) -> float:
    """Return the fraction of values from `low` to `high`."""
    return float(np.mean((values >= low) & (values <= high))) if values.size else 0.0


def is_wrapped(values: np.ndarray) -> bool:
    """Return whether some values are negative HU read as unsigned 16 bits, and hardly any lie between them and HU."""
    wrapped = fraction(values, LEAST_WRAPPED, MAX_UNSIGNED)
    return wrapped > 1e-3 and fraction(values, LARGEST_HU, LEAST_WRAPPED) < wrapped / 10


def without_background(values: np.ndarray) -> np.ndarray:
    """Return the values without padding, and without the commonest value if it fills a twentieth of the image."""
    values = values[values >= PADDING]
    found, counts = np.unique(values, return_counts=True)
    if counts.size > 1 and counts.max() > values.size / 20:
        return values[values != found[counts.argmax()]]
    return values


def is_ct_with_air(values: np.ndarray) -> bool:
    """Return whether values hold air, lung or fat at their HU, and little above bone."""
    inside = values[values >= PADDING]
    if inside.size < values.size / 50:
        return False
    return fraction(inside, *AIR) > 0.01 and fraction(inside, PADDING, 1500) > 0.6 and bool(inside.min() < -300)


def without_commonest(values: np.ndarray) -> np.ndarray:
    """Return the values without the commonest, if there is any."""
    found, counts = np.unique(values, return_counts=True)
    return values[values != found[counts.argmax()]] if found.size else values


def is_inverted(values: np.ndarray) -> bool:
    """Return whether air lies at +1000: more voxels than of bone, and hardly any above."""
    air = fraction(values, *INVERTED_AIR)
    if air < MAX_BONE or fraction(values, -INVERTED_AIR[1], -INVERTED_AIR[0]) > air / 10:
        return False
    above = without_commonest(values[values > INVERTED_AIR[1]])
    below = fraction(values, 300, INVERTED_AIR[0])
    bone = np.percentile(values, 0.5)
    return bool(bone < -250 and above.size < air * values.size / 20 and below < 2 * air)


def is_stretched(values: np.ndarray) -> bool:
    """Return whether values hold air or fat at the HU of padding, or nearly all tissue at those of bone."""
    outside = values[values < LEAST_NOISE]
    padding = int(np.sum(np.abs(outside / np.median(outside) - 1) < RINGING)) if outside.size else 0
    below, inside = outside.size - padding, values.size - padding
    if below > max(MAX_BELOW * inside, padding / 25) or below > max(MAX_BLURRED * inside, padding / 4):
        return True
    if fraction(values[values >= PADDING], MAX_STORED, np.inf) > MAX_METAL:
        return True
    dense, soft = fraction(values, 350, 1200), fraction(values, *TISSUE)
    return dense > MAX_BONE and dense > MAX_DENSE * soft


def is_shrunk(values: np.ndarray) -> bool:
    """Return whether values hold all tissue close to 0, where CT has water alone."""
    tissue = values[values > -50]
    return tissue.size > max(LEAST_VOXELS, values.size / 10) and fraction(tissue, -20, LEAST_TISSUE) > 0.75


def is_ct_without_air(body: np.ndarray) -> bool:
    """Return whether most values are soft tissue, and fat or noise reaches below water."""
    if fraction(body, *TISSUE) < 0.5 or fraction(body, -np.inf, -20) < 0.005 or is_noise_around_0(body):
        return False
    least, most = np.percentile(body, (0.5, 99))
    return bool(least < -0.03 * most)


def is_noise_around_0(body: np.ndarray) -> bool:
    """Return whether much of an image is noise around 0 beside far higher values: a background, and no water."""
    near = body[(body > -30) & (body < 30)]
    is_background = near.size > 0.4 * body.size and abs(np.median(near)) < 4 and fraction(body, -150, -30) < 0.02
    return bool(is_background and np.percentile(body, 99) > 150)


def is_soft_tissue(values: np.ndarray, low: float) -> bool:
    """Return whether values are those of soft tissue and vessels alone, which other modalities can have, too."""
    if low < -150 or np.mean(values == low) > 0.01:
        return False
    least, middle, most = np.percentile(values, (0.5, 50, 99.5))
    return bool(least > -100 and -20 < middle < 350 and most < 600 and most - middle < 10 * (middle - least))


def is_bone(body: np.ndarray) -> bool:
    """Return whether values reach from fat or marrow to bone, without a background around 0."""
    if body.size == 0:
        return False
    least, low, high = np.percentile(body, (0.05, 1, 99))
    return bool(least < -10 and low < 100 and 300 < high < 2500 and fraction(body, -10, 10) < 0.15)


def has_tissue_peak(values: np.ndarray) -> bool:
    """Return whether soft tissue stands out between lung and bone."""
    tissue, lung, bone = (fraction(values, a, b) / (b - a) for a, b in ((-150, 150), (-600, -200), (250, 700)))
    return tissue > 2 * lung and tissue > 2 * bone and fraction(values, -150, 150) > 0.05


def is_skewed(values: np.ndarray) -> bool:
    """Return whether a few high values stand far above all others, as radioactive uptake does."""
    middle, most, top = np.percentile(values, (50, 95, 99.99))
    return bool(most < 0.25 * top and middle < 0.05 * top)


def is_label_map(sample: np.ndarray) -> bool:
    """Return whether values from 0 to 255 are few whole numbers, each alike over regions."""
    found = np.unique(sample)
    if found.size > 256 or (found != np.rint(found)).any():
        return False
    if found.size <= 2:
        return True
    if found.size > 32 and found[-1] == 255:  # a smooth picture in grey
        return False
    alike, pairs = 0, 0
    for axis in range(sample.ndim):
        one, other = np.moveaxis(sample, axis, 0)[:-1], np.moveaxis(sample, axis, 0)[1:]
        compared = ((one > found[0]) & (one < found[-1])) | ((other > found[0]) & (other < found[-1]))
        pairs += int(compared.sum())
        alike += int((compared & (one == other)).sum())
    return pairs > 0 and alike > 0.4 * pairs


def clipped_to(low: float, high: float, values: np.ndarray) -> tuple[float, float] | None:
    """Return the HU window that an image was clipped to, inf where not; None if it was not clipped from below."""
    if low <= -900 or low > 300 or np.mean(values == low) < 0.02:
        return None
    return low, high if high < 2000 and np.mean(values == high) > 1e-3 else np.inf


def is_tissue_within(values: np.ndarray, cut: tuple[float, float]) -> bool:
    """Return whether fat or soft tissue at their HU lie inside a window that reaches below 0."""
    inside = values[(values > cut[0]) & (values < cut[1])]
    return cut[0] < -20 and inside.size > 0 and fraction(inside, *TISSUE) > 0.5 and fraction(inside, -150, -5) > 0.01
