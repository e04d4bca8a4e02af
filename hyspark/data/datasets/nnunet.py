"""Folders with imagesTr -> cases: nnU-Net, version 2 and 1, the decathlon, and BTCV's own names."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hyspark.data.datasets.cases import Case, ignored_value
from hyspark.data.datasets.channels import beside, channel_text, complete_cases, first_cases, further_cases
from hyspark.data.datasets.file_names import BTCV_IMAGE, OTHER_FORMATS
from hyspark.data.datasets.found import DataSet, FoundData
from hyspark.data.datasets.words import FIRST_CHANNEL, FIRST_CHANNELS, is_label_name
from hyspark.data.quality.findings import Finding
from hyspark.utils.paths import NIFTI, load_json, nifti_stem

ANOTHER_CHANNEL = ("another channel", "another channel of a case")
NO_NIFTI = "a file that is no .nii.gz or .nii"
TEST_FOLDERS = ("imagesTs", "imagesVa", "imagesVal", "labelsTs", "labelsVa", "labelsVal")
USED_FOLDERS = ("imagesTr", "labelsTr", *TEST_FOLDERS)
"""Folders of a data set whose files are used, or named as for tests."""
Pair = tuple[tuple[Path, ...], Path | None]
"""The file of each channel of a case, and its label map."""


def read_data_set(folder: Path, found: FoundData, channels: Sequence[int] = FIRST_CHANNELS) -> None:
    """Add the cases of a data set folder, and findings on its names and its dataset.json."""
    content = read_declaration(folder, found)
    data_set = DataSet(folder)
    found.sets.append(data_set)
    try:
        ignore = ignored_value(content.get("labels"), folder / "dataset.json")
    except ValueError as error:
        found.add_unreadable(folder / "dataset.json", error)
        ignore = None
    if isinstance(content.get("dataset"), dict):
        pairs = listed_pairs(folder, content["dataset"], channels, found)
    else:
        pairs = folder_pairs(folder, content, channels, found)
    data_set.cases = [
        Case(name, folder.name, image, label, ignore, tuple(others))
        for name, ((image, *others), label) in sorted(pairs.items())
    ]


def is_data_set(folder: Path) -> bool:
    """Return whether a folder is a data set: it has imagesTr, or a dataset.json with nnU-Net's "dataset"."""
    if (folder / "imagesTr").is_dir():
        return True
    file = folder / "dataset.json"
    try:
        content = load_json(file) if file.is_file() else None
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("dataset"), dict)


def read_declaration(folder: Path, found: FoundData) -> dict[str, Any]:
    """Read the dataset.json of a data set; empty without one, or if it is no object (see `common_labels`)."""
    file = folder / "dataset.json"
    try:
        content = load_json(file) if file.is_file() else {}
    except (ValueError, OSError):
        return {}
    if not isinstance(content, dict):
        return {}
    ending = content.get("file_ending", ".nii.gz")
    if not (isinstance(ending, str) and ending.lower() in (".nii.gz", ".nii")):
        found.findings.append(Finding("another format", str(file), f'"file_ending" is {ending!r}'))
    return content


def num_channels(content: dict[str, Any]) -> int | None:
    """Return the number of channels that a dataset.json declares; None if it declares none."""
    names = content.get("channel_names", content.get("modality"))
    return len(names) if isinstance(names, dict) and names else None


def listed_pairs(folder: Path, listed: dict[str, Any], channels: Sequence[int], found: FoundData) -> dict[str, Pair]:
    """Return channels and label of each case of nnU-Net's "dataset": {CASE: {"images": [...], "label": ...}}."""
    pairs: dict[str, Pair] = {}
    for name, entry in listed.items():
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        images = images if isinstance(images, list) else []
        if not images or not all(isinstance(text, str) and text for text in [*images, label or "none"]):
            expected = 'expected {"images": ["./..."], "label": "./..."}'
            found.add_unreadable(folder / "dataset.json", f'"dataset": {name}: {expected}, got {entry!r}')
            continue
        files = [absolute(folder, text) for text in images]
        for number, file in enumerate(files):
            if number not in channels:
                found.pass_over(*ANOTHER_CHANNEL, file)
        if channels[0] < len(files) or len(channels) > 1:
            known = dict(enumerate(files))
            chosen = tuple(known.get(channel) or beside(files[0], channel) for channel in channels)
            pairs[name] = (chosen, absolute(folder, label) if label else None)
    return pairs


def absolute(folder: Path, text: str) -> Path:
    """Return the absolute path of a file that a JSON in `folder` names; backslashes of Windows become slashes."""
    path = Path(os.path.abspath(folder / text))
    if "\\" in text and os.sep != "\\" and not path.exists():
        path = Path(os.path.abspath(folder / text.replace("\\", "/")))
    return path


def folder_pairs(folder: Path, content: dict[str, Any], channels: Sequence[int], found: FoundData) -> dict[str, Pair]:
    """Return channels and label of each case in imagesTr and labelsTr; odd names are findings or passed over."""
    label_files = list(volumes_in(folder / "labelsTr", found))
    label_stems = {name for file in label_files for name in label_cases(file)}
    images: dict[str, Path] = {}
    files = list(volumes_in(folder / "imagesTr", found))
    stems = [nifti_stem(file) for file in files]
    cases = first_cases(files, label_stems, channels, num_channels(content))
    of_further = further_cases(stems, label_stems, channels, num_channels(content))
    further: dict[str, dict[int, Path]] = {}
    has_channels = any(case != stem for stem, case in cases.items())
    for file in files:
        stem = nifti_stem(file)
        case = cases[stem]
        if case == stem and stem not in label_stems:
            if has_channels and not BTCV_IMAGE.fullmatch(stem):
                found.pass_over("odd name", f"a name without the channel _{FIRST_CHANNEL}", file)
                continue
            if is_label_name(stem):
                found.pass_over("odd name", "a name of a label map among images", file)
                continue
        if stem in of_further:
            number, of_case = of_further[stem]
            add_once(further.setdefault(of_case, {}), number, file, found)
        elif case is None:
            found.pass_over(*ANOTHER_CHANNEL, file)
        else:
            add_once(images, case, file, found)
    complete = complete_cases(images, further, channels)
    labels: dict[str, Path] = {}
    for file in label_files:
        if name := next((name for name in label_cases(file) if name in complete), None):
            add_once(labels, name, file, found)
        else:
            found.findings.append(
                Finding("label without image", str(file), f"a label alone, for channel {channel_text(channels[0])}")
            )
    without = [of[0] for name, of in sorted(complete.items()) if (folder / "labelsTr").is_dir() and name not in labels]
    if without:
        others = f", and {len(without) - 1} more" if len(without) > 1 else ""
        found.findings.append(Finding("image without label", str(without[0]), f"an image alone{others}"))
    for name in TEST_FOLDERS:
        for file in volumes_in(folder / name, found):
            found.pass_over("unused file", f"in {name}, which is for tests", file)
    return {name: (files_of, labels.get(name)) for name, files_of in complete.items()}


def label_cases(file: Path) -> tuple[str, ...]:
    """Return the names that the case of a file in labelsTr may have; BTCV's label0001 belongs to img0001."""
    stem = nifti_stem(file)
    return (stem, *((re.sub(r"^label", "img", stem),) if re.fullmatch(r"label\d+", stem) else ()))


def volumes_in(folder: Path, found: FoundData) -> Iterator[Path]:
    """Yield the NIfTI files of a folder by name, broken links included; other files but hidden ones are passed over."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_nifti = NIFTI.fullmatch(file.name)
        if file.name.startswith(".") or (file.is_dir() and not is_nifti):
            continue
        if file.is_dir():
            found.pass_over("odd name", "a folder of the name of a file; move the file in it up", file)
        elif is_nifti:
            yield file
        else:
            is_volume = file.suffix.lower() in OTHER_FORMATS
            kind, advice = ("another format", "; convert it to NIfTI") if is_volume else ("odd name", "")
            found.pass_over(kind, NO_NIFTI + advice, file)


def add_once(files: dict[Any, Path], name: Any, file: Path, found: FoundData) -> None:
    """Add the file of a case; a second one is a finding."""
    if name in files:
        found.findings.append(Finding("two files for a case", str(file), f"another file for the case of {files[name]}"))
    else:
        files[name] = file
