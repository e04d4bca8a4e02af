"""Values of label maps: whole numbers from 0 to 255, within rounding."""

from collections.abc import Iterable

import numpy as np

from hyspark.utils.text import list_of

ROUNDING = 1e-3
"""Difference from a whole number up to which a value counts as one, as of a scaled label (0.9999999998)."""
DIGITS = 10
"""Digits of a value in a message; fewer would show 0.9999999 as 1."""


def whole_values(values: np.ndarray) -> np.ndarray:
    """Round the values that are whole but for rounding; the others stay."""
    if values.dtype.kind in "iu":
        return values
    nearest = np.rint(values)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return np.where(np.abs(values - nearest) <= ROUNDING, nearest, values)


def label_value_fault(values: Iterable[float]) -> tuple[str, str] | None:
    """Return why values are none of a label, as a kind of finding and its text; None if they are."""
    values = [float(value) for value in values]
    if odd := [value for value in values if not np.isfinite(value)]:
        return "NaN or infinite", f"values {list_of(odd)}"
    if odd := [value for value in values if value != np.rint(value)]:
        return "label not whole", f"values {list_of(odd, DIGITS)}"
    if odd := [value for value in values if not 0 <= value <= 255]:
        return "label outside 0 to 255", f"values {list_of(odd, DIGITS)}"
    return None
