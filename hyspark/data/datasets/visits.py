"""Words of visits, scans, phases and sides in names of files and folders, and the subject before them."""

import re
from typing import NamedTuple

COUNTED = (
    r"visit|session|ses|scans?|series|time[-_]?point|time|tp|t|v|study|exam|acquisition|acq|run|phase|frame|gate|bin|"
    r"week|month|day|year|follow[-_]?up|fu|baseline|bl"
)
"""Words of one of several scans of a subject, before a number."""
NAMED = (
    r"baseline|bl|follow[-_]?up|fu|(?:pre|mid|post)(?:[-_]?(?:rt|op|tx|treatment|therapy|surgery|chemo|contrast))?|"
    r"arterial|art|venous|ven|portal|portal[-_]?venous|pvp?|nc|ncct|cect|native|plain|non[-_]?contrast|contrast|"
    r"delayed|delay|late|early|insp|inspiration|inhale|exp|expiration|exhale|prone|supine|left|right|soft|sharp|bone"
)
"""Words of one of several scans of a subject, without a number."""
KERNEL = r"[bdhiq][rlfpvu]?\d\d[fsdhu]|b[rlfpvu]\d\d"
"""Reconstruction kernels of CT, such as B30f and Br40."""
DATE = (
    r"(?:19|20)\d\d(?P<date_sign>[-_.]?)(?:0\d|1[0-2])(?P=date_sign)(?:[0-2]\d|3[01])|"
    r"\d\d[-.]\d\d[-.](?:19|20)\d\d"
)
VISIT_FOLDER = re.compile(
    rf"(?:{COUNTED}|mr|ct|pet)[-_ ]?\d*(?:[-_]\d+)?|ses-\w+|{NAMED}|{KERNEL}|\d{{1,2}}|(?:{DATE})(?:[-_ ].*)?",
    re.IGNORECASE,
)
"""The name of a folder of one visit of a patient, whose folder is above."""
VISIT = re.compile(r"[-_](?:visit|session|ses-|ses(?=\d))[-_]?(?=\w)(?P<number>\d*)", re.IGNORECASE)
"""A marker of a visit."""
SCAN = re.compile(r"[-_](scan|series|t)[-_]?(\d{1,2})(?!\d)", re.IGNORECASE)
"""A marker of a scan or a time: a number of one or two digits. Longer numbers count cases (ct_scan_0017)."""
ENDING = re.compile(
    rf"[-_.](?:(?:{COUNTED})[-_]?\d{{1,2}}|(?:phase|frame|week|day)[-_]?\d{{3}}|(?:mr|ct|pet)\d{{1,2}}|"
    rf"{NAMED}|{KERNEL}|{DATE}|[lr]$)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
"""A marker that counts behind a digit alone."""
COUNTS_CASES = re.compile(r"[-_.](?:scans?|series|study|exam|run)[-_]?\d|__", re.IGNORECASE)
"""The beginning of a marker that may number cases too (covid19_scan_1)."""
IDENTIFIER = re.compile(r"(?:^|(?<=[-_]))(?:sub-[A-Za-z0-9]+|TCGA-[A-Za-z0-9]{2}-[A-Za-z0-9]{4}(?![A-Za-z0-9]))")
"""A subject of the Brain Imaging Data Structure, or of The Cancer Genome Atlas."""


class NamedSubject(NamedTuple):
    """The subject in a case name.

    Attributes:
        subject: The subject; the whole name without a marker.
        doubtful: Whether the marker may number cases, and not scans of a subject.
    """

    subject: str
    doubtful: bool = False


def subject_of(name: str, pattern: str = "") -> str:
    """Return the subject in a case name; a name without a marker is its own subject.

    Markers are "__", "_visit", "_session", "_ses-", "_t2" at the end; behind a name with a digit also "_scan2",
    "_series2", "_tp1", "_v1", "_baseline", "_fu1", "_pre", "_art", "_B30f", "_left", a date and the like. The subject
    is the part before the first of them. "sub-XX" is BIDS's subject. Case is ignored.

    Args:
        name: name of the case.
        pattern: regular expression; its first group, or else all of its match, is the subject. "" uses the markers.
    """
    if pattern:
        found = re.search(pattern, name)
        return name if found is None else found[1] or found[0] if found.re.groups else found[0]
    return named_subject(name).subject


def named_subject(name: str) -> NamedSubject:
    """Find the subject in a case name by markers; see `subject_of`."""
    if found := IDENTIFIER.search(name):
        return NamedSubject(name[: found.end()])
    doubtful: dict[int, bool] = {}
    for found in VISIT.finditer(name):
        doubtful[found.start()] = not has_digit(name[: found.start()]) or 3 <= len(found["number"]) < 6
    ends = [found.start() for found in SCAN.finditer(name) if is_scan_marker(name, found)]
    ends += [found.start() for found in re.finditer("__", name) if is_subject(name, found.start(), found.end())]
    for end in ends:
        doubtful.setdefault(end, COUNTS_CASES.match(name, end) is not None)
    for found in ENDING.finditer(name):
        if is_ending(name, found):
            counts_cases = COUNTS_CASES.match(name, found.start()) is not None or has_digit(name[found.end() :])
            doubtful.setdefault(found.start(), counts_cases)
    end = min((end for end in doubtful if end), default=0)
    return NamedSubject(name[:end], doubtful[end]) if end else NamedSubject(name)


def has_digit(text: str) -> bool:
    """Return whether a text has a digit."""
    return re.search(r"\d", text) is not None


def is_scan_marker(name: str, found: re.Match[str]) -> bool:
    """Return whether a match of SCAN marks one scan of a subject.

    A digit comes before it, and none behind a time; a time at the very end needs no digit before it.
    """
    is_time = found[1].lower() == "t"
    if is_time and found.end() == len(name):
        return True
    return has_digit(name[: found.start()]) and not (is_time and has_digit(name[found.end() :]))


def is_ending(name: str, found: re.Match[str]) -> bool:
    """Return whether a match of ENDING marks one scan of a subject: behind a digit, and _t2 or _v2 before no digit."""
    is_short = re.match(r".[tv][-_]?\d", found[0], re.IGNORECASE) is not None
    return has_digit(name[: found.start()]) and not (is_short and has_digit(name[found.end() :]))


def is_subject(name: str, end: int, rest: int) -> bool:
    """Return whether the part of a name before "__" is a subject, and not the common beginning of numbered cases."""
    return has_digit(name[:end]) or not re.fullmatch(r"\d{3,}", name[rest:])


def is_numbered_visit(folder: str) -> bool:
    """Return whether a folder's name is that of one visit by a word with a number, or by a date."""
    return len(folder) > 2 and has_digit(folder) and VISIT_FOLDER.fullmatch(folder) is not None
