"""Numbers and lists as text for people."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

MAX_LISTED = 5
"""Number of warnings that are shown in full."""


def nearest(word: str, choices: Iterable[str], renamed: Mapping[str, str] | None = None) -> str:
    """Return '; did you mean X?' for the choice nearest to a word, or an empty string if none is near.

    Args:
        word: What was given.
        choices: What is known.
        renamed: Earlier names of choices, which are known too; the present one is suggested.
    """
    present = {choice: choice for choice in choices} | dict(renamed or {})
    starting = sorted((c for c in present if c.startswith(word)), key=len) if word.strip("-") else []
    matches = starting or difflib.get_close_matches(word, present, n=1, cutoff=0.5)
    return f"; did you mean {present[matches[0]]}?" if matches else ""


def listing(items: Iterable[str], limit: int = 10) -> str:
    """Join up to `limit` sorted items; add their total if some are omitted."""
    items = sorted(items)
    return ", ".join(items[:limit]) + (f", ... ({len(items)} in all)" if len(items) > limit else "")


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: '1 key', '3 keys'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_of(numbers: Iterable[float], digits: int = 6) -> str:
    """Join up to eight numbers, each with up to a number of digits."""
    numbers = list(numbers)
    shown = ", ".join(f"{number:.{digits}g}" for number in numbers[:8])
    return shown + (", ..." if len(numbers) > 8 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def failure_reason(error: BaseException) -> str:
    """Return the reason of a failed preparation in one line."""
    while isinstance(error, RuntimeError) and error.__cause__:  # MONAI's own message does not hold the reason
        error = error.__cause__
    if isinstance(error, MemoryError):
        return f"{first_line(error)}; it needs more memory than there is: lower prepare_workers, or crop it"
    return first_line(error)


def format_count(number: float) -> str:
    """Format a count with three digits and its unit, as in 1.23 G."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def format_bytes(number: float) -> str:
    """Format a number of bytes with a decimal unit, as in 1.23 GB."""
    text = format_count(number)
    return f"{text}B" if " " in text else f"{text} B"


def format_duration(seconds: float) -> str:
    """Format seconds as seconds, minutes, hours or days, with two digits at least."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def short_text(value: Any) -> str:
    """Write a setting for people: values of a list side by side, of floats six digits."""
    values = value if isinstance(value, list | tuple) else (value,)
    return " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values)


def flag_text(value: Any) -> str:
    """Write a setting as its flag takes it: values of a list side by side."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
