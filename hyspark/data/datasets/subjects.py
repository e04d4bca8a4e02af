"""Subjects: which cases are of one patient, by names and folders, and whether a split of them is one to trust."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.file_names import IMAGE_WORDS, words_of
from hyspark.utils.log import LOG
from hyspark.utils.text import listing

VISIT = re.compile(r"[-_](visit|session|ses-|ses(?=\d))[-_]?\w", re.IGNORECASE)
"""A marker of a visit."""
SCAN = re.compile(r"[-_](scan|series|t)[-_]?(\d{1,2})(?!\d)", re.IGNORECASE)
"""A marker of a scan or a time: a number of one or two digits. Longer numbers count cases (ct_scan_0017)."""
BIDS = re.compile(r"(?:^|(?<=[-_]))sub-[A-Za-z0-9]+")
"""A subject of the Brain Imaging Data Structure."""
VISIT_FOLDER = re.compile(
    r"(visit|session|ses|scan|series|timepoint|tp|t|acq|run|baseline|followup)[-_ ]?\d*|ses-\w+|\d{1,2}|"
    r"(19|20)\d\d[-_.]?\d\d[-_.]?\d\d",
    re.IGNORECASE,
)
"""The name of a folder of one visit of a patient, whose folder is above."""
FORMER_VISIT = re.compile(r"__|_(visit|session|ses-|scan|series|t\d)", re.IGNORECASE)
"""The marker of earlier versions, whose subjects keep their ranks in splits."""
LARGE_SUBJECT = 0.2
"""Fraction of the cases above which one subject is reported."""


def subject_of(name: str, pattern: str = "") -> str:
    """Return the subject in a case name; a name without a marker is its own subject.

    Markers are "__", "_visit", "_session", "_ses-", "_t2" at the end; behind a name with a digit also "_scan2",
    "_series2", "_t2". The subject is the part before the first of them. "sub-XX" is BIDS's subject. Case is ignored.

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


def subjects_of(names: Sequence[str], images: Sequence[Path], pattern: str = "") -> list[str]:
    """Return the subject of each case of a data set.

    With a pattern, it is that of `subject_of`. Else it is a folder sub-XX of BIDS, or the patient's folder (see
    `patient_folders`), or what `subject_of` finds. Subjects that earlier versions knew keep their names, since splits
    rank subjects by name.

    Args:
        names: names of the cases.
        images: their images.
        pattern: regular expression, see `subject_of`.
    """
    if pattern:
        return [subject_of(name, pattern) for name in names]
    folders = patient_folders(images)
    found = [
        bids_folder(image) or folders.get(image) or subject_of(name) for name, image in zip(names, images, strict=True)
    ]
    former = [name[: match.start()] or name if (match := FORMER_VISIT.search(name)) else name for name in names]
    members, former_members = defaultdict(set), defaultdict(set)
    for i, (subject, before) in enumerate(zip(found, former, strict=True)):
        members[subject].add(i)
        former_members[before].add(i)
    return [
        before if members[subject] == former_members[before] else subject
        for subject, before in zip(found, former, strict=True)
    ]


def bids_folder(image: Path) -> str:
    """Return the subject's folder sub-XX of BIDS that holds an image; empty without one."""
    return next((part for part in image.parts[-5:-1] if BIDS.fullmatch(part)), "")


def patient_folders(images: Sequence[Path]) -> dict[Path, str]:
    """Return the patient's folder of each image that lies in one, relative to the folder of all.

    They are patients' folders if file names repeat in them (case_0/imaging.nii.gz), and no folder has more images than
    there are folders. Folders of visits and of images alone belong to the folder above.
    """
    if len(images) < 2:
        return {}
    root = Path(os.path.commonpath([image.parent for image in images]))
    places = defaultdict(set)
    for image in images:
        places[image.name].add(image.parent)
    units = {}
    for image in images:
        unit = image.parent
        while unit != root and unit.parent != root and is_inner_folder(unit.name):
            unit = unit.parent
        if unit != root and image.parent.name not in ("imagesTr", "imagesTs"):
            units[image] = unit
    repeating = {units[image] for image in units if len(places[image.name]) > 1}
    sizes = Counter(unit for unit in units.values() if unit in repeating)
    if not sizes or max(sizes.values()) > len(sizes):
        return {}
    return {image: unit.relative_to(root).as_posix() for image, unit in units.items() if unit in repeating}


def is_inner_folder(name: str) -> bool:
    """Return whether a folder's name is that of a visit, or says no more than that it holds images."""
    return bool(VISIT_FOLDER.fullmatch(name)) or all(word in IMAGE_WORDS for word in words_of(name))


def is_scan_marker(name: str, found: re.Match[str]) -> bool:
    """Return whether a match of SCAN marks one scan of a subject.

    A digit comes before it, and none behind a time; a time at the very end needs no digit before it.
    """
    is_time = found[1].lower() == "t"
    if is_time and found.end() == len(name):
        return True
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
    """List what makes a split doubtful: no validation cases, a subject on both sides, or with over a fifth of all."""
    cases = [*training, *validation]
    faults = [f"all {len(cases)} cases are for training, none for validation"] if cases and not validation else []
    if both := subjects_on_both_sides(training, validation, pattern):
        faults.append(f"subjects in training and in validation: {listing(both, 5)}")
    return [*faults, *large_subject_faults(cases, pattern)]


def subjects_on_both_sides(training: Sequence[Case], validation: Sequence[Case], pattern: str = "") -> set[str]:
    """Return the subjects with cases in training and in validation."""
    cases = [*training, *validation]
    subjects = subjects_of([case.name for case in cases], [case.image for case in cases], pattern)
    return set(subjects[: len(training)]) & set(subjects[len(training) :])


def large_subject_faults(cases: Sequence[Case], pattern: str = "") -> list[str]:
    """Report the largest subject if it has several cases and more than a fifth of all."""
    subjects = subjects_of([case.name for case in cases], [case.image for case in cases], pattern)
    ((largest, num),) = Counter(subjects).most_common(1) or [("", 0)]
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
