"""Numbers and lists as text for people."""

import difflib
from collections.abc import Iterable, Mapping


def nearest(word: str, choices: Iterable[str], renamed: Mapping[str, str] | None = None) -> str:
    """Write "; did you mean X?" for a near miss, else nothing.

    Args:
        word: What was given.
        choices: What is known.
        renamed: Earlier names of choices, which are known too; the present one is suggested.
    """
    present = {choice: choice for choice in choices} | dict(renamed or {})
    matches = [c for c in present if c.startswith(word)] or difflib.get_close_matches(word, present, n=1, cutoff=0.5)
    return f"; did you mean {present[matches[0]]}?" if matches else ""


def listing(items: Iterable[str], limit: int = 10) -> str:
    """Up to `limit` items, in order, and how many there are if not all are shown."""
    items = sorted(items)
    return ", ".join(items[:limit]) + (f", ... ({len(items)} in all)" if len(items) > limit else "")


def scaled(number: float) -> str:
    """A count with three digits and its unit: 1.23 G."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def size(number: float) -> str:
    """Bytes, with a unit."""
    text = scaled(number)
    return f"{text}B" if " " in text else f"{text} B"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, with two digits at least."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
