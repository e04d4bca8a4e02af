"""Check of a data set: names and pairs, each case (examine.py), and comparisons between cases.

Everything is examined and nothing raises, so that one call reports all that has to be fixed.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from hyspark.data.datasets.cases import Case, class_values, common_labels, folder_ignored_value, ignored_value
from hyspark.data.datasets.datalist_json import case_names, dataset_of, entry_paths
from hyspark.data.datasets.nnunet import name_of_image, name_of_label
from hyspark.data.datasets.subjects import large_subject_faults
from hyspark.data.quality.examine import Examined, examine
from hyspark.data.quality.findings import Finding
from hyspark.utils.paths import NIFTI, load_json, nifti_stem, walk_folders
from hyspark.utils.processes import available_cores, worker_pool


@dataclass
class DataSet:
    """The cases of a data set.

    Attributes:
        cases: the cases.
        findings: findings that do not belong to one case.
        classes: label values by class name; None if no file declares any.
    """

    cases: list[Case] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    classes: dict[str, int] | None = None


def check_dataset(
    path: Path, *, hu_min: float, num_workers: int = 0, progress: bool = True
) -> tuple[list[Examined], DataSet]:
    """Examine all cases of a data set folder, of a folder of data sets, or of a decathlon JSON.

    Args:
        path: the folder or the JSON.
        hu_min: HU at and below which all is air to training.
        num_workers: processes; 0 takes one per core.
        progress: whether to show a progress bar.

    Returns:
        The examined cases, and the data set with the findings that do not belong to one case.

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


def find_dataset(path: Path) -> DataSet:
    """List the cases of a decathlon JSON, of a data set folder, or of all data set folders below a folder."""
    path = Path(os.path.abspath(path))
    if path.suffix == ".json":
        return read_list(path)
    found = DataSet()
    folders = [path] if (path / "imagesTr").is_dir() else data_sets_below(path)
    for folder in folders:
        scan_folder(folder, found)
    try:
        found.classes = common_labels(folders)
    except ValueError as error:
        found.findings.append(Finding("unreadable list", str(path), str(error)))
    if found.classes is None and any(case.label for case in found.cases):
        found.findings.append(Finding("no class names", str(path), "labels, and no dataset.json that names them"))
    return found


def data_sets_below(path: Path) -> list[Path]:
    """List the folders Dataset* with images, by name."""
    found = []
    for folder, below in walk_folders(path):
        if folder.name.startswith("Dataset") and (folder / "imagesTr").is_dir():
            found.append(folder)
            below.clear()
    return sorted(found)


def read_list(path: Path) -> DataSet:
    """List the cases of a decathlon JSON; its faults are findings."""
    found = DataSet()
    pairs = []
    ignore = None
    try:
        content = load_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("training"), list):
            raise ValueError('no list "training"')
        found.classes = class_values(content["labels"], path) if content.get("labels") else None
        ignore = ignored_value(content.get("labels"), path)
        for side in ("training", "validation"):
            for index, entry in enumerate(content.get(side, [])):
                pairs.append(entry_paths(entry, path, f"{side}[{index}]", require_label=False))
    except (ValueError, FileNotFoundError) as error:
        found.findings.append(Finding("unreadable list", str(path), str(error)))
    names = case_names([image for image, _ in pairs])
    found.cases = [Case(names[image], dataset_of(image), image, label, ignore) for image, label in dict(pairs).items()]
    for image, times in Counter(image for image, _ in pairs).items():
        if times > 1:
            found.findings.append(Finding("same content", str(image), f"an image that is listed {times} times"))
    return found


def scan_folder(folder: Path, found: DataSet) -> None:
    """Add the cases of one data set folder, and findings about their names."""
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for file in files_in(folder / "imagesTr", found):
        name = name_of_image(file, "0000")
        is_channel = re.fullmatch(r".+_\d{4}", nifti_stem(file))  # other channels are not used, and no fault
        if name is None and not is_channel:
            found.findings.append(Finding("odd name", str(file), "a name without the channel _0000"))
        elif name is not None:
            add_file(images, name, file, found)
    has_labels = (folder / "labelsTr").is_dir()
    for file in files_in(folder / "labelsTr", found) if has_labels else []:
        name = name_of_label(file, images)
        if name is None:
            found.findings.append(Finding("label without image", str(file), "a label alone"))
        else:
            add_file(labels, name, file, found)
    try:
        ignore = folder_ignored_value(folder)
    except ValueError as error:
        found.findings.append(Finding("unreadable list", str(folder / "dataset.json"), str(error)))
        ignore = None
    for name, image in sorted(images.items()):
        found.cases.append(Case(name, folder.name, image, labels.get(name), ignore))
    without = [image for name, image in sorted(images.items()) if has_labels and name not in labels]
    if without:
        others = f", and {len(without) - 1} more" if len(without) > 1 else ""
        found.findings.append(Finding("image without label", str(without[0]), f"an image alone{others}"))


def files_in(folder: Path, found: DataSet) -> Iterator[Path]:
    """Yield the NIfTI files of a folder by name; other files are findings, hidden ones are ignored."""
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue
        if NIFTI.fullmatch(file.name):
            yield file
        else:
            found.findings.append(Finding("odd name", str(file), "a file that is no .nii.gz or .nii"))


def add_file(files: dict[str, Path], name: str, file: Path, found: DataSet) -> None:
    """Add the file of a case; a second one is a finding."""
    if name in files:
        found.findings.append(Finding("two files for a case", str(file), f"another file for the case of {files[name]}"))
    else:
        files[name] = file


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
