"""Data lists in MONAI's decathlon format (dataset.json)."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyspark.data.datasets.cases import IGNORED_NAME, Case, Datalist, class_values, ignored_value
from hyspark.data.datasets.channels import beside, channels_of_list
from hyspark.data.datasets.file_names import case_names, dataset_of
from hyspark.data.datasets.found import DataSet, FoundData
from hyspark.data.datasets.import_advice import refuse_prepared, refuse_scans
from hyspark.data.datasets.list_parts import (
    PART_KEYS,
    PARTS,
    ListEntry,
    is_for_tests,
    move_to_own_parts,
    pass_over_parts,
    split_by_fold,
)
from hyspark.data.datasets.nnunet import ANOTHER_CHANNEL, absolute
from hyspark.data.datasets.nnunet_prepared import ARRAY
from hyspark.data.datasets.words import FIRST_CHANNEL, FIRST_CHANNELS
from hyspark.data.quality.findings import Finding
from hyspark.data.readers.header import num_volumes
from hyspark.utils.paths import load_json, nifti_stem
from hyspark.utils.text import list_of, listing


def write_datalist(datalist: Datalist, path: Path) -> None:
    """Write a decathlon JSON with POSIX paths relative to its own folder, atomically.

    Raises:
        ValueError: if another kind of file exists at `path`, or the file cannot be written.
    """
    path = Path(os.path.abspath(path))

    def relative(file: Path) -> str:
        parts = Path(os.path.relpath(file, path.parent))
        return parts.as_posix() if parts.parts[0] == ".." else f"./{parts.as_posix()}"

    def entry(case: Case) -> dict[str, Any]:
        files = [relative(file) for file in dict.fromkeys(case.images)]
        image = {"image": files if len(files) > 1 else files[0]}
        return image if case.label is None else image | {"label": relative(case.label)}

    content: dict[str, Any] = {"training": [entry(case) for case in datalist.training]}
    if datalist.validation:
        content["validation"] = [entry(case) for case in datalist.validation]
    ignored = {case.ignore for case in (*datalist.training, *datalist.validation) if case.ignore is not None}
    if len(ignored) > 1:
        raise ValueError(f"{path}: the data sets ignore different label values: {sorted(ignored)}; make one list each")
    if datalist.labels is not None:
        content["labels"] = {**datalist.labels, **({IGNORED_NAME: ignored.pop()} if ignored else {})}
    if os.path.lexists(path):
        check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{path}: not writable ({error.strerror}); choose another output file") from error


def is_datalist(path: Path) -> bool:
    """Return whether a JSON file is a data list (has a list "training"), unlike nnU-Net's own dataset.json."""
    loaded = load_json(path)
    if not isinstance(loaded, dict):
        return False
    names_of_cases = all(isinstance(entry, str) for entry in loaded.get("train") or ())
    return isinstance(loaded.get("training"), list) or (isinstance(loaded.get("train"), list) and not names_of_cases)


def read_datalist(
    path: Path,
    *,
    require_labels: bool = False,
    require_files: bool = True,
    fold: int | None = 0,
    channels: Sequence[int] = FIRST_CHANNELS,
) -> Datalist:
    """Read a decathlon JSON, see `read_list`; faults raise.

    Args:
        path: the JSON file.
        require_labels: whether every entry needs a label.
        require_files: whether every file has to exist.
        fold: fold for validation, where entries have folds; None for the first.
        channels: the channels that are read.

    Raises:
        FileNotFoundError: if a required file is missing.
        ValueError: if the structure is wrong, an image is listed twice, or a required label is missing.
    """
    listed = read_list(path, fold=fold, require_labels=require_labels, channels=channels)
    listed.check()
    cases = [*listed.training, *listed.validation]
    files = [file for case in cases for file in case.files]
    missing = [str(file) for file in files if not file.is_file()]
    if missing and require_files:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(files)} files are missing: {listing(missing)}")
    lines = tuple(listed.unused_lines())
    return Datalist(tuple(listed.training), tuple(listed.validation), listed.classes, unused=lines)


@dataclass
class ListedData(FoundData):
    """The cases of a list.

    Attributes:
        training: cases to train on.
        validation: cases to validate on.
        folds: folds of the entries; none where a part "validation" decides.
    """

    training: list[Case] = field(default_factory=list)
    validation: list[Case] = field(default_factory=list)
    folds: set[int] = field(default_factory=set)


def read_list(
    path: Path, *, fold: int | None = 0, require_labels: bool = False, channels: Sequence[int] = FIRST_CHANNELS
) -> ListedData:
    """Read a list of cases of the decathlon, MONAI or nnU-Net v1; its faults are findings.

    Paths are relative to the list's folder. An entry is {"image": ..., "label": ...} or the image's path alone; an
    image of several channels is a list of files, of which `channels` are read. A part
    "val" stands for "validation", and an entry may name its own part ("split": "val"). Without validation cases,
    entries with "fold" equal to `fold` are for validation, as in MONAI. Entries of other parts are not used.

    Args:
        path: the JSON file.
        fold: fold for validation; None for the first that there is.
        require_labels: whether an entry without a label is a fault.
        channels: the channels that are read.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(os.path.abspath(path))
    refuse_prepared(path)
    listed = ListedData(path)
    try:
        content = load_json(path)
    except ValueError as error:
        refuse_scans(path)
        listed.add_unreadable(path, error)
        return listed
    if not (
        isinstance(content, dict) and any(isinstance(content.get(k), list) and content[k] for k in PARTS["training"])
    ):
        listed.add_unreadable(path, 'expected {"training": [{"image": "./..."}, ...]} with at least one image')
        return listed
    ignore = None
    try:
        listed.classes = class_values(content["labels"], path) if content.get("labels") else None
        ignore = ignored_value(content.get("labels"), path)
    except ValueError as error:
        listed.add_unreadable(path, error)
    parts = {
        part: [entry for key in keys for entry in read_entries(content, key, require_labels, channels, listed)]
        for part, keys in PARTS.items()
    }
    parts = move_to_own_parts(parts, listed)
    if not parts["validation"]:
        listed.folds = {entry.fold for entry in parts["training"] if type(entry.fold) is int}
        parts = split_by_fold(parts["training"], fold, listed)
    elif fold:
        listed.add_unreadable(path, f'fold: expected 0, got {fold}, but the list has a part "validation"; drop --fold')
    pass_over_parts(content, listed)
    names = case_names([entry.image for entries in parts.values() for entry in entries])
    listed.training, listed.validation = (
        [Case(names[e.image], dataset_of(e.image), e.image, e.label, ignore, e.others) for e in parts[key]]
        for key in parts
    )
    unique = {case.image: case for case in [*listed.training, *listed.validation]}
    listed.sets.append(DataSet(path.parent, list(unique.values())))
    listed.findings += entry_faults([*listed.training, *listed.validation], path)
    return listed


def entry_faults(cases: Sequence[Case], path: Path) -> Iterator[Finding]:
    """Yield the images that a list names several times, and its entries without label."""
    for image, times in Counter(case.image for case in cases).items():
        if times > 1:
            yield Finding("listed twice", str(path), f"{image} is listed {times} times")
    if without := [str(case.image) for case in cases if case.label is None]:
        found = f"{len(without)} of {len(cases)} entries without label: {listing(without)}"
        yield Finding("image without label", str(path), found)


def read_entries(
    content: dict[str, Any], key: str, require_labels: bool, channels: Sequence[int], listed: ListedData
) -> list[ListEntry]:
    """Read the entries of a part of a list; faults are findings."""
    values = content.get(key, [])
    if not isinstance(values, list):
        listed.add_unreadable(listed.source, f'"{key}": expected a list, got {type(values).__name__}')
        return []
    entries = []
    for index, value in enumerate(values):
        entry = value if isinstance(value, dict) else {"image": value}
        image, label = entry.get("image"), entry.get("label")
        where = f"{key}[{index}]"
        texts = image if isinstance(image, list) and image else [image]
        if (
            not all(isinstance(text, str) and text for text in texts)
            or not isinstance(label, str | None)
            or label == ""
        ):
            expected = '{"image": "./..."}, optionally with "label": "./...", each the path of one file'
            listed.add_unreadable(listed.source, f"{where}: expected {expected}, got {value!r}")
            continue
        if require_labels and label is None and not is_for_tests(entry):
            listed.add_unreadable(listed.source, f'{where}: expected a "label", got the image {texts[0]} alone')
            continue
        folder = listed.source.parent
        files = [absolute(folder, str(text)) for text in texts]
        if arrays := [str(file) for file in files if file.suffix == ARRAY]:
            expected = "a NIfTI file; what nnU-Net has prepared is not listed, but its folder is named by --data"
            listed.add_unreadable(listed.source, f"{where}: expected {expected}, got {arrays[0]}")
            continue
        of_list = isinstance(image, list) and not (len(files) == 1 and num_volumes(files[0]) > 1)
        chosen = entry_channels(files, channels, listed) if of_list else named_channels(files[0], channels, listed)
        if chosen is None:
            asked = f"channels {list_of(channels)} (image_channels) among the files of its image"
            listed.add_unreadable(listed.source, f"{where}: expected {asked}, got {value!r}")
            continue
        keys = {key: entry[key] for key in PART_KEYS if key in entry}
        first, *others = chosen
        label_file = absolute(folder, label) if label else None
        entries.append(ListEntry(first, label_file, entry.get("fold"), keys, tuple(others)))
    return entries


def entry_channels(files: Sequence[Path], channels: Sequence[int], listed: ListedData) -> list[Path] | None:
    """Choose the files of channels among those of an entry, and pass over the others; None if one is missing."""
    chosen = channels_of_list(files, channels)
    for file in files if chosen else ():
        if file not in (chosen or ()):
            listed.pass_over(*ANOTHER_CHANNEL, file)
    return chosen


def named_channels(image: Path, channels: Sequence[int], listed: ListedData) -> list[Path]:
    """Return the files of channels of an image that a list names as one file, and pass over the others.

    case.nii.gz stands for case_0000.nii.gz and its like, as in lists of nnU-Net v1. Channels of case_0000.nii.gz lie
    beside it. A file of several volumes holds all channels, as in the decathlon.
    """
    stem = nifti_stem(image)
    whole = image.with_name(f"{stem}_{FIRST_CHANNEL}{image.name[len(stem) :]}")
    is_whole = not image.exists() and whole.exists()
    if not is_whole and tuple(channels) == FIRST_CHANNELS:
        return [image]
    near = whole if is_whole else image
    chosen = [beside(near, channel) for channel in channels]
    number = 0
    while (other := beside(near, number)).exists() and not (number and other == near):
        if other not in chosen:
            listed.pass_over(*ANOTHER_CHANNEL, other)
        number += 1
    return chosen


def check_replaceable(path: Path) -> None:
    """Raise ValueError unless `path` holds a data list without anything that `write_datalist` would lose."""
    content: Any = None
    if path.is_file():
        with suppress(ValueError):
            content = load_json(path)
    entries = content.get("training") if isinstance(content, dict) else None
    ours = isinstance(entries, list) and all(isinstance(entry, dict) and "image" in entry for entry in entries)
    if not ours or set(content) - {"training", "validation", "labels"}:
        raise ValueError(
            f"{path}: expected a data list to replace, got another file, which is kept; choose another output name"
        )
