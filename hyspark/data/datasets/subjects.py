"""Subjects: which cases are of one patient, by their names, and whether a split of them is one to trust."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from hyspark.data.datasets.cases import Case
from hyspark.utils.log import LOG

VISIT = re.compile(r"[-_](visit|session|ses-|ses(?=\d))[-_]?\w", re.IGNORECASE)
"""A marker of a visit."""
SCAN = re.compile(r"[-_](scan|series|t)[-_]?(\d{1,2})(?!\d)", re.IGNORECASE)
"""A marker of a scan or a time: a number of one or two digits. Longer numbers count cases (ct_scan_0017)."""
BIDS = re.compile(r"(?:^|(?<=[-_]))sub-[A-Za-z0-9]+")
"""A subject of the Brain Imaging Data Structure."""
LARGE_SUBJECT = 0.2
"""Fraction of the cases above which one subject is reported."""


def subject_of(name: str, pattern: str = "") -> str:
    """Return the subject in a case name; a name without a marker is its own subject.

    Markers are "__", "_visit", "_session", "_ses-"; behind a name with a digit also "_scan2", "_series2", "_t2". The
    subject is the part before the first of them. "sub-XX" is BIDS's subject. Case is ignored.

    Args:
        name: name of the case.
        pattern: regular expression; its first group, or else all of its match, is the subject. "" uses the markers.
    """
    if pattern:
        found = re.search(pattern, name)
        return name if found is None else found[1] or found[0] if found.re.groups else found[0]
    if found := BIDS.search(name):
        return name[: found.end()]
    ends = [found.start() for found in VISIT.finditer(name)]
    ends += [found.start() for found in SCAN.finditer(name) if is_scan_marker(name, found)]
    ends += [found.start() for found in re.finditer("__", name) if is_subject(name, found.start(), found.end())]
    return name[: min((end for end in ends if end), default=len(name))]


def is_scan_marker(name: str, found: re.Match[str]) -> bool:
    """Return whether a match of SCAN marks one scan of a subject: a digit before it, and none behind a time."""
    is_time = found[1].lower() == "t"
    return bool(re.search(r"\d", name[: found.start()])) and not (is_time and re.search(r"\d", name[found.end() :]))


def is_subject(name: str, end: int, rest: int) -> bool:
    """Return whether the part of a name before "__" is a subject, and not the common beginning of numbered cases."""
    return bool(re.search(r"\d", name[:end])) or not re.fullmatch(r"\d{3,}", name[rest:])


def check_pattern(pattern: str, names: Iterable[str]) -> None:
    """Check that a pattern of subjects is a regular expression that finds a subject in every name.

    Raises:
        ValueError: It is none, or there are names without a match.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"subject_regex: expected a regular expression, got {pattern!r} ({error})") from None
    names = list(names)
    missed = [name for name in names if not compiled.search(name)]
    if pattern and missed:
        raise ValueError(
            f"subject_regex: {pattern!r} matches no part of {len(missed)} of {len(names)} case names, such as "
            f"{missed[0]!r}; change it so that it matches all of them"
        )


def split_faults(training: Sequence[Case], validation: Sequence[Case], pattern: str = "") -> list[str]:
    """List what makes a split doubtful: no validation cases, or one subject with more than a fifth of the cases."""
    cases = [*training, *validation]
    empty = [f"all {len(cases)} cases are for training, none for validation"] if cases and not validation else []
    return [*empty, *large_subject_faults(cases, pattern)]


def large_subject_faults(cases: Sequence[Case], pattern: str = "") -> list[str]:
    """Report the largest subject if it has several cases and more than a fifth of all."""
    ((largest, num),) = Counter(subject_of(case.name, pattern) for case in cases).most_common(1) or [("", 0)]
    if num <= max(1, LARGE_SUBJECT * len(cases)):
        return []
    return [
        f"{num} of {len(cases)} cases count as one subject, {largest!r}; if they are of several, set subject_regex to "
        "a pattern of the subject in their names"
    ]


def warn_of_split(training: Sequence[Case], validation: Sequence[Case], pattern: str = "") -> None:
    """Log what makes a split doubtful (see `split_faults`)."""
    for fault in split_faults(training, validation, pattern):
        LOG.warning("split: %s", fault)
