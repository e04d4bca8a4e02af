"""Subjects: which cases are of one patient, by names and folders, and whether a split of them is one to trust."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.near_subjects import near_subject_faults
from hyspark.data.datasets.visits import (
    IDENTIFIER,
    VISIT_FOLDER,
    has_digit,
    is_numbered_visit,
    named_subject,
    subject_of,
)
from hyspark.data.datasets.words import IMAGE_WORDS, words_of
from hyspark.utils.log import LOG
from hyspark.utils.paths import nifti_stem
from hyspark.utils.text import listing

FORMER_VISIT = re.compile(r"__|_(visit|session|ses-|scan|series|t\d)", re.IGNORECASE)
"""The marker of earlier versions, whose subjects keep their ranks in splits."""
FEW_SCANS = 4
"""Number of scans of one form that a subject may have in a data set of fewer subjects."""
Parts = tuple[str, ...]
"""Names of folders and of a file, from the top down."""
LARGE_SUBJECT = 0.2
"""Fraction of the cases above which one subject is reported."""


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
    by_name = subjects_by_name(names)
    found = [
        bids_folder(image) or folders.get(image) or subject for subject, image in zip(by_name, images, strict=True)
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


def subjects_by_name(names: Sequence[str]) -> list[str]:
    """Return the subject of each case of a data set by its name alone.

    A beginning that numbers cases (covid19_scan_1, Dataset1__liver_1) is no subject. It has more cases of one form than
    there are subjects, or nine tenths of all cases.
    """
    found = [named_subject(name) for name in names]
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for name, (subject, _) in zip(names, found, strict=True):
        forms[subject][form_of(name)] += 1
    few = max(len(forms), FEW_SCANS)
    beginnings = {
        subject
        for subject, counts in forms.items()
        if (most := max(counts.values())) > few or (most > 2 and counts.total() >= 0.9 * len(names))
    }
    return [
        name if doubtful and subject in beginnings else subject
        for name, (subject, doubtful) in zip(names, found, strict=True)
    ]


def form_of(name: str) -> str:
    """Return a name with # for its numbers and for a letter that counts at its end: case_a, ct_12."""
    return re.sub(r"\d+|(?<=[-_])[A-Za-z]$", "#", name)


def bids_folder(image: Path) -> str:
    """Return the subject's folder sub-XX of BIDS that holds an image; empty without one."""
    return next((part for part in image.parts[-5:-1] if IDENTIFIER.fullmatch(part)), "")


def patient_folders(images: Sequence[Path]) -> dict[Path, str]:
    """Return the patient's folder of each image that lies in one, relative to the folder of all.

    A folder is a patient's if its name begins the names in it (patient001/patient001_frame01.nii.gz), or if file names
    repeat in such folders (case_0/imaging.nii.gz). No folder has more images of one form than there are folders.
    Folders of visits and of images alone belong to the folder above.
    """
    if len(images) < 2:
        return {}
    is_on_one_drive = len({image.anchor for image in images}) == 1
    num_above = len(Path(os.path.commonpath([image.parent for image in images])).parts) if is_on_one_drive else 1
    below = {image: image.parts[num_above:] for image in images if image.parent.name not in ("imagesTr", "imagesTs")}
    repeating = without_groups(repeating_folders(below))
    named = without_groups({image: unit for image, parts in below.items() if (unit := named_folder(parts))})
    return {image: "/".join(unit) for image, unit in {**repeating, **named}.items()}


def repeating_folders(below: dict[Path, Parts]) -> dict[Path, Parts]:
    """Return the folder of each image, above folders of visits, if a file in it has the name of one elsewhere.

    Args:
        below: path of each image below the folder of all.
    """
    places = defaultdict(set)
    for parts in below.values():
        places[parts[-1]].add(parts[:-1])
    above = {folder: folder_above_visits(folder) for folders in places.values() for folder in folders if folder}
    units = {image: above[parts[:-1]] for image, parts in below.items() if parts[1:]}
    repeating = {unit for image, unit in units.items() if len(places[image.name]) > 1}
    return {image: unit for image, unit in units.items() if unit in repeating}


def folder_above_visits(folder: Parts) -> Parts:
    """Return the folder above those of visits and of images alone, from the names down to a folder."""
    for num, name in enumerate(folder[1:], 1):
        if is_numbered_visit(name):
            return folder[:num]
    while len(folder) > 1 and is_inner_folder(folder[-1]):
        folder = folder[:-1]
    return folder


def named_folder(below: Parts) -> Parts:
    """Return the topmost folder with a number whose name begins a name in it, or that above its visits.

    Args:
        below: names of folders, and of the image, below the folder of all.

    Returns:
        The names down to the folder; none without one.
    """
    for num, name in enumerate(below[:-1], 1):
        if has_digit(name) and any(begins_with(inner, name) for inner in below[num:]):
            return below[:num] if name.isdecimal() else folder_above_visits(below[:num])
    return ()


def begins_with(name: str, beginning: str) -> bool:
    """Return whether a name is a beginning, or goes on behind it with neither letter nor digit; case is ignored."""
    size = len(beginning)
    return name[:size].lower() == beginning.lower() and not name[size : size + 1].isalnum()


def without_groups(units: dict[Path, Parts]) -> dict[Path, Parts]:
    """Return folders of patients; none if one has more images of one form than there are folders, as one of a site."""
    forms = Counter((unit, form_of(nifti_stem(image))) for image, unit in units.items())
    folders = set(units.values())
    if len(folders) < 2 or max(forms.values()) > len(folders):
        return {}
    return units


def is_inner_folder(name: str) -> bool:
    """Return whether a folder's name is that of a visit, or says no more than that it holds images."""
    return bool(VISIT_FOLDER.fullmatch(name)) or all(word in IMAGE_WORDS for word in words_of(name))


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
    """List what makes a split doubtful.

    That are no validation cases, a subject on both sides or perhaps so, and one with over a fifth of all cases.
    """
    cases = [*training, *validation]
    subjects = subjects_of_cases(cases, pattern)
    faults = [f"all {len(cases)} cases are for training, none for validation"] if cases and not validation else []
    faults += both_sides_faults(training, validation, subjects)
    near = [] if pattern else near_subject_faults(training, validation, subjects)
    return [*faults, *near, *large_subject_faults(subjects)]


def subjects_of_cases(cases: Sequence[Case], pattern: str = "") -> list[str]:
    """Return the subject of each case of a data set; see `subjects_of`."""
    return subjects_of([case.name for case in cases], [case.image for case in cases], pattern)


def both_sides_faults(training: Sequence[Case], validation: Sequence[Case], subjects: Sequence[str]) -> list[str]:
    """Report subjects with cases in training and in validation.

    Args:
        training: cases to train on.
        validation: cases to validate on.
        subjects: subject of each case, those of training first.
    """
    both = set(subjects[: len(training)]) & set(subjects[len(training) :])
    return [f"subjects in training and in validation: {listing(both, 5)}"] if both else []


def large_subject_faults(subjects: Sequence[str]) -> list[str]:
    """Report the largest subject if it has several cases and more than a fifth of all.

    Args:
        subjects: subject of each case.
    """
    ((largest, num),) = Counter(subjects).most_common(1) or [("", 0)]
    if num <= max(1, LARGE_SUBJECT * len(subjects)):
        return []
    return [
        f"{num} of {len(subjects)} cases count as one subject, {largest!r}; if they are of several, set subject_regex "
        "to a pattern of the subject in their names"
    ]


def warn_of_split(training: Sequence[Case], validation: Sequence[Case], pattern: str = "") -> None:
    """Log what makes a split doubtful (see `split_faults`)."""
    for fault in split_faults(training, validation, pattern):
        LOG.warning("split: %s", fault)
