"""Check of a data set: names and pairs, each case (examine.py), and comparisons between cases.

Everything is examined and nothing raises, so that one call reports all that has to be fixed.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hyspark.data.datasets.build import read_data
from hyspark.data.datasets.cases import Case, DifferentClassesError, common_labels
from hyspark.data.datasets.data_folder import read_data_folder
from hyspark.data.datasets.datalist_json import ListedData, is_datalist, read_list
from hyspark.data.datasets.found import UNREADABLE, DataSet, FoundData
from hyspark.data.datasets.import_advice import refuse_scans
from hyspark.data.datasets.near_subjects import near_subject_faults
from hyspark.data.datasets.splits import CONVERT_SPLITS, num_folds, pickled_splits, split_by_file, splits_file
from hyspark.data.datasets.subjects import both_sides_faults, large_subject_faults, subjects_of_cases
from hyspark.data.datasets.words import FIRST_CHANNELS
from hyspark.data.intensity import check_intensity
from hyspark.data.quality.examine import Examined, examine
from hyspark.data.quality.findings import Finding
from hyspark.data.settings import PrepareSettings
from hyspark.utils.paths import NIFTI
from hyspark.utils.processes import KILLED, available_cores, map_unordered

MAX_THUMBNAILS = 120
"""Cases of which a thumbnail is kept for the page."""
DIFFERENT = "different classes"
"""Kind of the finding that data sets name other classes."""
NOT_LISTED = "not in the list dataset.json, which runs use"
FAULTS_OF_NAMES = ("label without image", "two files for a case", "image without label")
"""Kinds of findings that a list makes void, since runs take pairs from it and not from names."""


def check_dataset(
    path: Path,
    *,
    num_workers: int = 0,
    progress: bool = True,
    **given: Any,
) -> tuple[list[Examined], FoundData]:
    """Examine all cases of a folder of data (see `read_data_folder`), or of a decathlon JSON.

    Args:
        path: the folder or the JSON.
        num_workers: processes; 0 takes one per core.
        progress: whether to show a progress bar.
        **given: settings of training, fields of `PrepareSettings`.

    Returns:
        The examined cases, and the search's result with the findings that do not belong to one case.

    Raises:
        FileNotFoundError: if there is nothing to examine.
        ValueError: if the settings do not fit each other.
    """
    settings = PrepareSettings(**given)
    if not settings.hu_min < settings.hu_max:
        raise ValueError(f"hu_min: expected a number below hu_max, got {settings.hu_min:g} and {settings.hu_max:g}")
    check_intensity(settings)
    found = find_dataset(path, settings.image_channels)
    if not found.cases:
        refuse_scans(path)
    if not found.cases and not found.findings:
        raise FileNotFoundError(
            f"{path}: expected a JSON, or a folder with DatasetXXX_Name/imagesTr/CASE_0000.nii.gz, found neither"
        )
    classes = classes_of_cases(found)
    declared = {case: frozenset(names.values()) if names else None for case, names in classes.items()}
    examined = examine_all(found.cases, declared, settings, num_workers or available_cores(), progress)
    found.findings += same_content(examined)
    if any(finding.kind == DIFFERENT for finding in found.findings):
        for one in found.sets:
            seen = [each for each in examined if each.case in set(one.cases)]
            found.findings += unused_classes(seen, classes[one.cases[0]] if one.cases else None, one.folder)
    else:
        found.findings += unused_classes(examined, found.classes, path)
    subjects = subjects_of_cases(found.cases)
    found.findings += [Finding("large subject", str(path), fault) for fault in large_subject_faults(subjects)]
    return examined, found


def classes_of_cases(found: FoundData) -> dict[Case, dict[str, int] | None]:
    """Return the class names of each case: those of all, or of its own data set where data sets differ."""
    if not any(finding.kind == DIFFERENT for finding in found.findings):
        return dict.fromkeys(found.cases, found.classes)
    own: dict[Case, dict[str, int] | None] = {}
    for one in found.sets:
        own |= dict.fromkeys(one.cases, common_labels([one.folder]))
    return own


def find_dataset(path: Path, channels: Sequence[int] = FIRST_CHANNELS) -> FoundData:
    """List the cases of a list, or of a folder of data and the list dataset.json in it; see `read_data_folder`."""
    path = Path(os.path.abspath(path))
    listed: ListedData | None = None
    if path.is_file() and NIFTI.fullmatch(path.name):
        raise ValueError(f"{path}: expected a folder of data or a decathlon JSON, got one volume; name its folder")
    if path.suffix == ".json" or path.is_file():
        found: FoundData = (listed := read_checked_list(path, channels))
    else:
        found = read_data_folder(path, channels)
        file = path / "dataset.json"
        try:
            found.classes = common_labels(one.folder for one in found.sets if any(case.label for case in one.cases))
            if file.is_file() and is_datalist(file):
                listed = read_checked_list(file, channels)
                add_list(found, listed)
        except DifferentClassesError as error:
            found.findings.append(Finding(DIFFERENT, str(path), str(error).partition(";")[0]))
        except ValueError as error:
            found.findings.append(unreadable_list(path, str(error)))
        explained = any(finding.kind in (UNREADABLE, DIFFERENT) for finding in found.findings)
        if found.classes is None and not explained and any(case.label for case in found.cases):
            found.findings.append(Finding("no class names", str(path), "labels, and no dataset.json that names them"))
        if found.cases and not any(case.label for case in found.cases):
            found.findings.append(Finding("image without label", str(path), "no label map for any image"))
        found.findings += [finding for one in found.sets for finding in splits_file_faults(one, found)]
        pickles = [file for folder in {one.folder for one in found.sets} for file in pickled_splits(folder)]
        why = f"a pickle, which is not read; this converts it in its folder: {CONVERT_SPLITS}"
        found.findings += [Finding("pickled splits", str(file), why) for file in pickles]
    has_labels = all(c.label for c in listed.cases) if listed else any(case.label for case in found.cases)
    found.findings += [*found.unused_findings(), *run_faults(path, found, has_labels, channels)]
    return found


def unreadable_list(path: Path, error: str) -> Finding:
    """Make the finding of an error at the file that its text begins with, or else at `path`."""
    file, _, text = error.partition(": ")
    return (
        Finding(UNREADABLE, file, text)
        if text and Path(file).is_file()
        else Finding(UNREADABLE, str(path), error.removeprefix(f"{path}: "))
    )


def run_faults(path: Path, found: FoundData, labels: bool, channels: Sequence[int]) -> list[Finding]:
    """Report what a run with the default split refuses, and a side of its split without cases."""
    if not found.cases or any(finding.severity == "error" for finding in found.findings):
        return []
    try:
        listed = read_data(path, labels=labels, channels=channels)
    except (ValueError, FileNotFoundError) as error:
        return [unreadable_list(path, str(error))]
    if listed.training and listed.validation:
        known = any(finding.kind == "subject on both sides" for finding in found.findings)
        return [] if known else side_findings(path, listed.training, listed.validation)
    sides = f"{len(listed.training)} cases for training and {len(listed.validation)} for validation"
    return [Finding("empty side", str(path), sides)]


def read_checked_list(path: Path, channels: Sequence[int]) -> ListedData:
    """Read a list; subjects on both sides of its split are findings, too."""
    listed = read_list(path, fold=None, channels=channels)
    if not any(finding.kind == "listed twice" for finding in listed.findings):
        listed.findings += side_findings(path, listed.training, listed.validation)
    return listed


def add_list(found: FoundData, listed: ListedData) -> None:
    """Add the cases and findings of a folder's own list, which runs use; its cases may lie in the data sets found.

    Pairs of the list come before those of names. Faults of names that the list does not hold are notes.
    """
    known = {case.image for case in found.cases}
    listed_cases = {case.image: case for case in listed.cases}
    for image in sorted(known - set(listed_cases)):
        found.pass_over("unused file", NOT_LISTED, image)
    for one in found.sets:
        with_labels = ((case, listed_cases.get(case.image)) for case in one.cases)
        one.cases = [listed if listed and listed.label else case for case, listed in with_labels]
    found.sets.append(DataSet(listed.source.parent, [case for case in listed.cases if case.image not in known]))
    for finding in found.findings:
        if finding.kind in FAULTS_OF_NAMES:
            found.pass_over("unused file", NOT_LISTED, Path(finding.file))
    found.findings = [finding for finding in found.findings if finding.kind not in FAULTS_OF_NAMES]
    found.findings += listed.findings
    for key, files in listed.unused.items():
        known_files = set(found.unused.get(key, ()))
        found.unused.setdefault(key, []).extend(file for file in files if file not in known_files)
    found.classes = found.classes or listed.classes


def splits_file_faults(data_set: DataSet, found: FoundData) -> list[Finding]:
    """Return the faults of each fold of a data set's splits file; cases that no fold uses are passed over."""
    file = splits_file(data_set.folder)
    if file is None or not data_set.cases:
        return []
    labels = any(case.label for case in data_set.cases)
    faults: list[Finding] = []
    used: set[Case] = set()
    try:
        for fold in range(num_folds(file)):
            training, validation = split_by_file(data_set.cases, file, labels=labels, fold=fold)
            used |= {*training, *validation}
            faults += side_findings(file, training, validation)
    except ValueError as error:
        return [Finding("unreadable list", str(file), str(error).removeprefix(f"{file}: "))]
    for case in data_set.cases:
        if case not in used and (case.label or not labels):
            found.pass_over("unused file", f"in no part of {file.name}", case.image)
    return list(dict.fromkeys(faults))


def side_findings(path: Path, training: Sequence[Case], validation: Sequence[Case]) -> list[Finding]:
    """Report subjects that are in training and in validation, or perhaps are."""
    subjects = subjects_of_cases([*training, *validation])
    faults = both_sides_faults(training, validation, subjects) + near_subject_faults(training, validation, subjects)
    return [Finding("subject on both sides", str(path), fault) for fault in faults]


def examine_all(
    cases: Sequence[Case],
    declared: Mapping[Case, frozenset[int] | None],
    settings: PrepareSettings,
    num_workers: int,
    progress: bool,
) -> list[Examined]:
    """Return the result of `examine` for each case, in their order; thumbnails of MAX_THUMBNAILS cases are kept.

    Of those, cases with findings come first.

    Args:
        cases: the cases.
        declared: values of the classes that the data set of each declares; None if it declares none.
        settings: settings of training.
        num_workers: processes.
        progress: whether to show a progress bar.
    """
    order = {case: number for number, case in enumerate(cases)}
    kept: dict[bool, list[Examined]] = {True: [], False: []}
    examined: list[Examined] = []
    jobs = [(case, settings, declared[case]) for case in cases]
    with tqdm(total=len(cases), desc="check", unit="case", disable=not progress) as bar:
        for seen in map_unordered(examine, jobs, num_workers, killed_examination):
            examined.append(seen)
            kept[bool(seen.findings)].append(seen)
            if len(kept[True]) + len(kept[False]) > MAX_THUMBNAILS:
                (kept[False] or kept[True]).pop().thumbnail = None
            bar.update()
    return sorted(examined, key=lambda seen: order[seen.case])


def killed_examination(case: Case, settings: PrepareSettings, declared: frozenset[int] | None) -> Examined:
    """Return the result for a case whose process was killed."""
    return Examined(case, [Finding("not examined", str(case.image), KILLED)])


def same_content(examined: Sequence[Examined]) -> Iterator[Finding]:
    """Yield the images that have the voxels of an earlier image."""
    first: dict[str, Examined] = {}
    for seen in examined:
        if seen.digest and (other := first.setdefault(seen.digest, seen)) is not seen:
            yield Finding("same content", str(seen.case.image), f"the voxels of {other.case.image}")


def unused_classes(examined: Sequence[Examined], classes: dict[str, int] | None, path: Path) -> Iterator[Finding]:
    """Yield the declared classes that no label holds."""
    held = {value for seen in examined for value in seen.label_voxels}
    if not held:
        return
    for name, value in (classes or {}).items():
        if value not in held:
            yield Finding("unused class", str(path), f"class {name} ({value}) in no label")
