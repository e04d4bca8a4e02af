"""Slices of one series and plane -> scans: each a stack in which no position repeats.

A series may hold several phases, reconstructions or acquisitions of the same body. They are separated by the first
elements that leave each position once; slices that no element separates are not guessed apart.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hyspark.data.readers.elements import FREE_TEXTS, MARKS, Header
from hyspark.data.readers.stacks import num_repeats, ordered, position_indices, positions_of, why_uneven
from hyspark.utils.private_text import private

LEAST_SLICES = 3
"""Number of slices from which on an even stack is evidence of a scan of its own."""
MAX_CONTINUED = 3
"""Number of even stacks up to which an uneven series is taken for several scans, one behind the other."""
LONGEST_VALUE = 16
"""Characters of an element's value in the name of a scan."""


@dataclass(frozen=True)
class SeriesPart:
    """Slices of one scan.

    Attributes:
        label: what distinguishes it from others of the series; empty if there is no other.
        slices: its slices, ordered by position.
        repeats: largest number of slices at one position, which is 1 unless nothing separates them.
        num_copies: number of slices that were excluded as copies.
    """

    label: str
    slices: list[Header]
    repeats: int = 1
    num_copies: int = 0


def separate(slices: Sequence[Header], label: str = "") -> list[SeriesPart]:
    """Separate slices of one plane into scans.

    Args:
        slices: slices of one size, spacing and orientation, without copies.
        label: what distinguishes these slices from others of the series.
    """
    repeats = num_repeats(slices)
    parts = repeated_parts(slices, repeats) if repeats > 1 else interleaved_parts(slices)
    if not parts:
        return [SeriesPart(label, ordered(slices), repeats)]
    return [scan for name, part in parts.items() for scan in separate(part, f"{label}, {name}" if label else name)]


def repeated_parts(slices: Sequence[Header], repeats: int) -> dict[str, list[Header]]:
    """Separate slices whose positions repeat; return the parts by label, none if nothing separates them."""
    divided = [parts for index in range(len(MARKS)) if len(parts := by_mark(slices, index)) > 1]

    def by_merit(parts: dict[str, list[Header]]) -> tuple[int, int, int]:
        most = max(map(num_repeats, parts.values()))
        uneven = sum(bool(why_uneven(ordered(part))) for part in parts.values()) if most == 1 else 0
        return most, uneven, len(parts)

    few = [parts for parts in divided if len(parts) <= repeats and by_merit(parts)[0] < repeats]
    if few:
        return min(few, key=by_merit)
    whole = [parts for parts in divided if is_separated(parts)]
    if close := [parts for parts in whole if len(parts) <= 2 * repeats]:
        return min(close, key=len)
    return by_order(slices, repeats) or min(whole, key=len, default={})


def is_separated(parts: dict[str, list[Header]]) -> bool:
    """Return whether each part is an even stack of its own."""
    return all(
        len(part) >= LEAST_SLICES and num_repeats(part) == 1 and not why_uneven(ordered(part))
        for part in parts.values()
    )


def by_mark(slices: Sequence[Header], index: int) -> dict[str, list[Header]]:
    """Group slices by an element of MARKS, given by its index; the parts have labels."""
    parts: dict[str, list[Header]] = {}
    for header in slices:
        parts.setdefault(header.marks[index], []).append(header)
    name = MARKS[index]
    labelled = {}
    for number, value in enumerate(sorted(parts), 1):
        is_shown = value and len(value) <= LONGEST_VALUE and name != "ImageComments"
        shown = private(value) if name in FREE_TEXTS or name.endswith("UID") else value
        labelled[f"{name} {shown}" if is_shown else f"{name} {number} of {len(parts)}"] = parts[value]
    return labelled


def by_order(slices: Sequence[Header], repeats: int) -> dict[str, list[Header]]:
    """Separate scans by the order in which they were acquired: one whole scan after the other, or position by position.

    Returns:
        As many parts as slices repeat, by label; none if the order does not separate them.
    """
    for name, key in orders(slices):
        runs = whole_runs(slices, key, repeats) or (by_rank(slices, key, repeats) if name in RANKED else [])
        if runs:
            return {f"scan {number} of {len(runs)} by {name}": run for number, run in enumerate(runs, 1)}
    return {}


RANKED = ("AcquisitionTime", "TriggerTime")
"""Times of the acquisition itself: the n-th slice of each position belongs to the n-th scan."""


def orders(slices: Sequence[Header]) -> Iterator[tuple[str, Callable[[Header], float | str]]]:
    """Yield the elements that all slices have and that order them, each with its value of a slice."""
    trigger = MARKS.index("TriggerTime")
    if all(header.acquired for header in slices):
        yield "AcquisitionTime", lambda header: header.acquired
    if all(is_number(header.marks[trigger]) for header in slices):
        yield "TriggerTime", lambda header: float(header.marks[trigger])
    if all(header.number is not None for header in slices):
        yield "InstanceNumber", lambda header: header.number or 0
    if all(header.created for header in slices):
        yield "ContentTime", lambda header: header.created


def is_number(text: str) -> bool:
    """Return whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def whole_runs(slices: Sequence[Header], key: Callable[[Header], float | str], repeats: int) -> list[list[Header]]:
    """Divide slices, sorted by a key, where a position repeats; none if that gives another number of scans.

    Scans must not share a value of the key.
    """
    indices = position_indices(slices)
    runs: list[list[int]] = [[]]
    met: set[int] = set()
    for i in sorted(range(len(slices)), key=lambda i: key(slices[i])):
        if indices[i] in met:
            runs.append([])
            met.clear()
        met.add(int(indices[i]))
        runs[-1].append(i)
    found = [[slices[i] for i in run] for run in runs]
    apart = all(key(one[-1]) < key(other[0]) for one, other in pairwise(found))  # type: ignore[operator]
    return found if apart and len(found) == repeats else []


def by_rank(slices: Sequence[Header], key: Callable[[Header], float | str], repeats: int) -> list[list[Header]]:
    """Put the n-th slice of each position, by a key, into the n-th scan; none if positions repeat unequally."""
    indices = position_indices(slices)
    at: list[list[Header]] = [[] for _ in range(int(indices.max()) + 1)]
    for header, index in zip(slices, indices, strict=True):
        at[index].append(header)
    if any(len({key(header) for header in same}) < repeats or len(same) != repeats for same in at):
        return []
    return [list(scan) for scan in zip(*(sorted(same, key=key) for same in at), strict=True)]


def interleaved_parts(slices: Sequence[Header]) -> dict[str, list[Header]]:
    """Separate even stacks between whose slices others lie, or that follow each other unevenly; none if there is one.

    An even series whose parts lie one behind the other, such as the rotations of a scanner, stays one scan.
    """
    is_uneven = bool(why_uneven(ordered(slices)))
    for index in range(len(MARKS)):
        parts = by_mark(slices, index)
        if len(parts) < 2 or not is_separated(parts):
            continue
        if overlap(slices, list(parts.values())) or (is_uneven and len(parts) <= MAX_CONTINUED):
            return parts
    for name, key in orders(slices) if is_uneven else ():
        runs = monotone_runs(slices, key)
        parts = {f"scan {number} of {len(runs)} by {name}": run for number, run in enumerate(runs, 1)}
        if 2 <= len(parts) <= len(slices) // LEAST_SLICES and is_separated(parts) and overlap(slices, runs):
            return parts
    return {}


def overlap(slices: Sequence[Header], parts: Sequence[Sequence[Header]]) -> bool:
    """Return whether the ranges of positions of any two parts overlap."""
    where = dict(zip(map(id, slices), positions_of(slices), strict=True))
    ranges = sorted((min(at), max(at)) for at in ([where[id(header)] for header in part] for part in parts))
    return any(start < end for (_, end), (start, _) in pairwise(ranges))


def monotone_runs(slices: Sequence[Header], key: Callable[[Header], float | str]) -> list[list[Header]]:
    """Divide slices, sorted by a key, where their positions jump back; none if slices share a value."""
    if len({key(header) for header in slices}) < len(slices):
        return []
    in_order = sorted(slices, key=key)
    steps = np.diff(positions_of(in_order))
    direction = np.sign(np.median(steps))
    starts = [0, *(np.flatnonzero(np.sign(steps) != direction) + 1).tolist(), len(in_order)]
    return [in_order[start:end] for start, end in pairwise(starts)]
