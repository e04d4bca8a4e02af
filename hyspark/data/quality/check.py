"""Check of a data set: names and pairs, each case (examine.py), and comparisons between cases.

Everything is examined and nothing raises, so that one call reports all that has to be fixed.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from hyspark.data.datasets.cases import Case, common_labels
from hyspark.data.datasets.data_folder import read_data_folder
from hyspark.data.datasets.datalist_json import ListedData, is_datalist, read_list
from hyspark.data.datasets.found import DataSet, FoundData
from hyspark.data.datasets.splits import num_folds, split_by_file, splits_file
from hyspark.data.datasets.subjects import large_subject_faults, subjects_on_both_sides
from hyspark.data.quality.examine import Examined, examine
from hyspark.data.quality.findings import Finding
from hyspark.utils.paths import NIFTI
from hyspark.utils.processes import available_cores, worker_pool
from hyspark.utils.text import listing


def check_dataset(
    path: Path, *, hu_min: float, num_workers: int = 0, progress: bool = True
) -> tuple[list[Examined], FoundData]:
    """Examine all cases of a folder of data (see `read_data_folder`), or of a decathlon JSON.

    Args:
        path: the folder or the JSON.
        hu_min: HU at and below which all is air to training.
        num_workers: processes; 0 takes one per core.
        progress: whether to show a progress bar.

    Returns:
        The examined cases, and the search's result with the findings that do not belong to one case.

    Raises:
        FileNotFoundError: if there is nothing to examine.
    """
    found = find_dataset(path)
    if not found.cases and not found.findings:
        raise FileNotFoundError(
            f"{path}: expected a JSON, or a folder with DatasetXXX_Name/imagesTr/CASE_0000.nii.gz, found neither"
        )
    ignored = {case.ignore for case in found.cases if case.ignore is not None}
    declared = frozenset(found.classes.values()) | ignored if found.classes else None
    examined = list(examine_all(found.cases, hu_min, declared, num_workers or available_cores(), progress))
    found.findings += [*same_content(examined), *unused_classes(examined, found.classes, path)]
    found.findings += [Finding("large subject", str(path), fault) for fault in large_subject_faults(found.cases)]
    return examined, found


def find_dataset(path: Path) -> FoundData:
    """List the cases of a list, or of a folder of data and the list dataset.json in it; see `read_data_folder`."""
    path = Path(os.path.abspath(path))
    if path.is_file() and NIFTI.fullmatch(path.name):
        raise ValueError(f"{path}: expected a folder of data or a decathlon JSON, got one volume; name its folder")
    if path.suffix == ".json" or path.is_file():
        found: FoundData = read_checked_list(path)
    else:
        found = read_data_folder(path)
        file = path / "dataset.json"
        try:
            found.classes = common_labels(one.folder for one in found.sets)
            if file.is_file() and is_datalist(file):
                add_list(found, read_checked_list(file))
        except ValueError as error:
            found.findings.append(Finding("unreadable list", str(path), str(error)))
        if found.classes is None and any(case.label for case in found.cases):
            found.findings.append(Finding("no class names", str(path), "labels, and no dataset.json that names them"))
        found.findings += [finding for one in found.sets for finding in splits_file_faults(one)]
    found.findings += found.unused_findings()
    return found


def read_checked_list(path: Path) -> ListedData:
    """Read a list; images that it lists twice, and subjects on both sides of its split, are findings too."""
    listed = read_list(path, fold=None)
    counts = Counter(case.image for case in [*listed.training, *listed.validation])
    for image, times in counts.items():
        if times > 1:
            listed.findings.append(Finding("same content", str(image), f"an image that is listed {times} times"))
    once = ([case for case in part if counts[case.image] == 1] for part in (listed.training, listed.validation))
    listed.findings += both_sides_faults(path, *once)
    return listed


def add_list(found: FoundData, listed: ListedData) -> None:
    """Add the cases and findings of a folder's own list, which runs use, with its labels for cases found before."""
    known = {case.image for case in found.cases}
    listed_cases = {case.image: case for case in listed.cases}
    for image in sorted(known - set(listed_cases)):
        found.pass_over("unused file", "not in the list dataset.json, which runs use", image)
    for one in found.sets:
        with_labels = ((case, listed_cases.get(case.image)) for case in one.cases)
        one.cases = [listed if listed and listed.label else case for case, listed in with_labels]
    others = [case for case in listed.cases if case.image not in known]
    found.sets.append(DataSet(listed.source.parent, others))
    found.findings += listed.findings
    for key, files in listed.unused.items():
        missing = [file for file in files if file not in found.unused.get(key, ())]
        found.unused.setdefault(key, []).extend(missing)
    found.classes = found.classes or listed.classes


def splits_file_faults(data_set: DataSet) -> list[Finding]:
    """Return the faults of each fold of a data set's splits file."""
    file = splits_file(data_set.folder)
    if file is None or not data_set.cases:
        return []
    labels = any(case.label for case in data_set.cases)
    found: list[Finding] = []
    try:
        for fold in range(num_folds(file)):
            sides = split_by_file(data_set.cases, file, labels=labels, fold=fold)
            found += both_sides_faults(file, *sides)
    except ValueError as error:
        found.append(Finding("unreadable list", str(file), str(error).removeprefix(f"{file}: ")))
    return list(dict.fromkeys(found))


def both_sides_faults(path: Path, training: Sequence[Case], validation: Sequence[Case]) -> list[Finding]:
    """Report subjects that are in training and in validation."""
    both = subjects_on_both_sides(training, validation)
    text = f"subjects in training and in validation: {listing(both, 5)}"
    return [Finding("subject on both sides", str(path), text)] if both else []


def examine_all(
    cases: Sequence[Case], hu_min: float, declared: frozenset[int] | None, num_workers: int, progress: bool
) -> Iterator[Examined]:
    """Yield the result of `examine` for each case, in their order."""
    with tqdm(total=len(cases), desc="check", unit="case", disable=not progress) as bar:
        if num_workers == 1 or len(cases) < 2:
            for case in cases:
                yield examine(case, hu_min, declared)
                bar.update()
            return
        with worker_pool(min(num_workers, len(cases))) as processes:
            for seen in processes.map(partial(examine, hu_min=hu_min, declared=declared), cases):
                yield seen
                bar.update()


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
