"""Folders of data -> a data list, split into training and validation.

Layouts are those of `read_data_folder`, with a splits file for each data set, if it has one. Only file names are read;
no image is opened. Cases found and not used are listed in `Datalist.excluded`. `organize` brings loose files into
nnU-Net's layout.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hyspark.data.datasets.cases import Case, Datalist, common_labels
from hyspark.data.datasets.data_folder import find_cases, labelled_of
from hyspark.data.datasets.datalist_json import is_datalist, read_datalist
from hyspark.data.datasets.found import FoundData
from hyspark.data.datasets.splits import (
    CONVERT_SPLITS,
    SPLIT_SEED,
    check_fold,
    pass_over_rest_of_split,
    pickled_splits,
    split_by_file,
    split_by_subject,
    splits_file,
)
from hyspark.data.datasets.words import FIRST_CHANNELS
from hyspark.utils.text import listing


def build_datalist(
    data_path: Path,
    *,
    labels: bool = False,
    channels: Sequence[int] = FIRST_CHANNELS,
    splits: str = "",
    val_fraction: float = 0.2,
    seed: int = 0,
    subject_regex: str = "",
    fold: int = 0,
    require_files: bool = True,
) -> Datalist:
    """Build the data list of all cases below a folder, with class names if the data sets' dataset.json give them.

    Args:
        data_path: folder of data, see `read_data_folder`.
        labels: whether to use labelled cases only.
        channels: the channels that are read.
        splits: one of
            - "": all cases are for training;
            - path of a splits file, see `split_by_file`;
            - "auto": each data set's own splits.json or splits_final.json, or `split_by_subject` if it has none.
        val_fraction: fraction of subjects for validation, of `split_by_subject`.
        seed: seed of `split_by_subject`.
        subject_regex: pattern of subjects in case names, see `subject_of`.
        fold: fold for validation, of splits files with folds.
        require_files: whether broken links are refused.

    Raises:
        FileNotFoundError: if there is no case, no label or no splits file, or a file is missing.
        ValueError: if files or splits contradict each other, or no case remains for training.
    """
    found = find_cases(Path(os.path.abspath(data_path)), labels=labels, channels=channels)
    if require_files:
        check_files(found.cases)
    drawing: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed, "subject_regex": subject_regex}
    return split_cases(found, labels=labels, splits=splits, fold=fold, **drawing)


def read_folder(
    folder: Path,
    *,
    seed: int,
    val_fraction: float,
    subject_regex: str = "",
    labels: bool = True,
    fold: int = 0,
    channels: Sequence[int] = FIRST_CHANNELS,
) -> Datalist:
    """List the cases of a folder of data for a run, split by its splits file or else by subject; see `build_datalist`.

    Broken links are cases, which the preparation reports.
    """
    drawing: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed, "subject_regex": subject_regex}
    options: dict[str, Any] = {"splits": "auto", "fold": fold, "channels": channels, "require_files": False}
    return build_datalist(folder, labels=labels, **options, **drawing)


def read_data(
    path: Path,
    *,
    labels: bool,
    val_fraction: float = 0.2,
    seed: int = SPLIT_SEED,
    subject_regex: str = "",
    fold: int = 0,
    channels: Sequence[int] = FIRST_CHANNELS,
) -> Datalist:
    """Read the cases of a run: of a list, of a folder with a list dataset.json, or else of a folder of data.

    Validation cases are those of the list, of its folds, or of the splits file beside a dataset.json. Without any, they
    are drawn by subject. Missing files are cases, which the preparation reports.

    Args:
        path: the list or folder.
        labels: whether cases need a label.
        val_fraction: fraction of subjects for validation, of `split_by_subject`.
        seed: seed of `split_by_subject`.
        subject_regex: pattern of subjects in case names, see `subject_of`.
        fold: fold for validation.
        channels: the channels that are read.

    Raises:
        FileNotFoundError: if there is no such file, or no case.
        ValueError: if the list, names or splits have faults.
    """
    drawing: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed, "subject_regex": subject_regex}
    file = path / "dataset.json" if path.is_dir() else path
    if path.is_dir() and not (file.is_file() and is_datalist(file)):
        listed = read_folder(path, labels=labels, fold=fold, channels=channels, **drawing)
    else:
        splits = splits_file(file.parent) if file.name == "dataset.json" else None
        read = partial(read_datalist, file, require_labels=labels, require_files=False, channels=channels)
        listed = read(fold=None if splits else fold)
        if listed.validation:
            listed = read(fold=fold)
        elif splits:
            sides = split_by_file(listed.training, splits, labels=labels, fold=fold)
            rest = FoundData(file)
            pass_over_rest_of_split(listed.training, [*sides[0], *sides[1]], splits, rest, labels=labels, fold=fold)
            unused = (*listed.unused, *rest.unused_lines())
            listed = replace(listed, training=tuple(sides[0]), validation=tuple(sides[1]), unused=unused)
        elif file.name == "dataset.json":
            listed = replace(listed, unused=(*listed.unused, *pickle_lines([file.parent])))
    if not listed.validation:
        sides = split_by_subject(listed.training, **drawing)
        listed = replace(listed, training=tuple(sides[0]), validation=tuple(sides[1]))
    if not listed.training:
        raise ValueError(
            f"{path}: expected cases for training, got {len(listed.validation)} for validation alone; change the split"
        )
    return listed


def check_files(cases: list[Case]) -> None:
    """Raise FileNotFoundError for broken links among the files of cases."""
    if broken := [str(file) for case in cases for file in case.files if not file.is_file()]:
        raise FileNotFoundError(f"files that do not exist, or links to such files: {listing(broken)}")


def count_cases(datalist: Datalist) -> dict[str, dict[str, int]]:
    """Count the cases of each data set: training, validation, labelled (of these two), excluded."""
    table: dict[str, dict[str, int]] = {}
    for key in ("training", "validation", "excluded"):
        for case in getattr(datalist, key):
            row = table.setdefault(case.dataset, dict(training=0, validation=0, labelled=0, excluded=0))
            row[key] += 1
            row["labelled"] += key != "excluded" and case.label is not None
    return dict(sorted(table.items()))


def split_cases(found: FoundData, *, labels: bool, splits: str, fold: int = 0, **drawing: Any) -> Datalist:
    """Split cases, record the excluded ones, and look up the class names.

    `drawing` are the options of `split_by_subject`. See `build_datalist`.
    """
    cases = found.cases
    usable = labelled_of(found) if labels else cases
    training: list[Case] = usable
    validation: list[Case] = []
    if splits == "auto":
        training = []
        files = {one.folder: file for one in found.sets if (file := splits_file(one.folder))}
        if not files:
            check_fold(fold, 0, found.source, pickle_lines([one.folder for one in found.sets]))
        for one in found.sets:
            if file := files.get(one.folder):
                sides = split_by_file(one.cases, file, labels=labels, fold=fold)
                on_sides = [*sides[0], *sides[1]]
                pass_over_rest_of_split(one.cases, on_sides, file, found, labels=labels, fold=fold)
            else:
                members = [case for case in one.cases if not labels or case.label is not None]
                sides = split_by_subject(members, **drawing)
            training, validation = training + sides[0], validation + sides[1]
    elif splits:
        training, validation = split_by_file(cases, Path(splits), labels=labels, fold=fold)
        pass_over_rest_of_split(cases, [*training, *validation], Path(splits), found, labels=labels, fold=fold)
    else:
        check_fold(fold, 0, found.source)
    if not training:
        raise ValueError(
            f"{found.source}: expected at least one training case, got a split without any; fix the splits file"
        )
    used = set(training) | set(validation)
    excluded = tuple(case for case in cases if case not in used)
    folders = [one.folder for one in found.sets if any(case.label for case in one.cases)]
    classes = common_labels(folders) if labels else None
    pickles = pickle_lines([one.folder for one in found.sets]) if splits == "auto" else []
    unused = (*found.unused_lines(), *pickles)
    return Datalist(tuple(training), tuple(validation), classes, excluded, unused)


def pickle_lines(folders: Sequence[Path]) -> list[str]:
    """Return a line for the terminal for each splits file of nnU-Net v1 in data set folders."""
    return [
        f"{file}: a pickle, which is not read; validation cases are drawn anew; "
        f"if you trust it, convert it in its folder: {CONVERT_SPLITS}"
        for folder in folders
        for file in pickled_splits(folder)
    ]
