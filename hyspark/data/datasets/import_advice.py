"""Scans that no run reads but `hyspark import` converts: which command to type."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from hyspark.data.datasets.file_names import BY_NIBABEL, BY_SIMPLEITK
from hyspark.data.datasets.nnunet_prepared import ARRAY, is_data_set_folder, is_prepared
from hyspark.utils.file_content import DICOM_ENDINGS, DICOM_HEAD, begins_as_dicom
from hyspark.utils.paths import walk_folders

MAX_LOOKED_AT = 1000
"""Number of files after which no scan is expected any more."""


def refuse_scans(path: Path) -> None:
    """Raise ValueError with the command to type if a file or folder holds DICOM, or another format to convert."""
    for number, file in enumerate(files_below(path)):
        if number == MAX_LOOKED_AT:
            return
        if kind := kind_of_scan(file):
            found = kind if file == path else f"{kind}, such as {file.relative_to(path)}"
            raise ValueError(
                f"{path}: expected NIfTI files, found {found}; convert them, and name the new folder instead; type "
                f"hyspark import {shlex.quote(str(path))} --out {free_data_set()}"
            )


def refuse_prepared(path: Path) -> None:
    """Raise ValueError for what nnU-Net has prepared (all, a data set, volumes or a file), with what reads it."""
    text = f"{path}: expected scans, found what nnU-Net has prepared"
    if path.suffix == ARRAY and path.is_file():
        raise ValueError(f"{text}; it is read by its folder and with its plan: {pretraining_of(path.parent)}")
    if is_prepared(path):
        raise ValueError(
            f"{text}; name the data set in nnUNet_raw; pre-training alone reads it: {pretraining_of(path)}"
        )
    if path.is_dir() and (below := sorted(one for one in path.iterdir() if one.is_dir() and is_data_set_folder(one))):
        raise ValueError(
            f"{text}; pre-training reads one data set of it, such as {below[0].name}: {pretraining_of(below[0])}"
        )


def pretraining_of(folder: Path) -> str:
    """Return the command that pre-trains on what nnU-Net has prepared."""
    return f"hyspark pretrain --model spark/nnunet/PLANS.json --data {shlex.quote(str(folder))}"


def files_below(path: Path) -> Iterator[Path]:
    """Yield a file, or the files of a folder, without hidden ones."""
    if path.is_file():
        yield path
    for folder, _ in walk_folders(path) if path.is_dir() else ():
        yield from (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))


def kind_of_scan(file: Path) -> str:
    """Return the format of a file that `hyspark import` converts; empty for others."""
    ending = file.suffix.lower()
    if ending in (*BY_SIMPLEITK, *BY_NIBABEL):
        return f"{ending} files"
    try:
        with file.open("rb") as opened:
            return "DICOM files" if begins_as_dicom(opened.read(DICOM_HEAD)) or ending in DICOM_ENDINGS else ""
    except OSError:
        return ""


def free_data_set() -> str:
    """Return the first data set folder of data/ whose number is free."""
    numbers = {folder.name[len("Dataset") :][:3] for folder in Path("data").glob("Dataset*")}
    return f"data/Dataset{next(n for n in range(1, 1000) if f'{n:03d}' not in numbers):03d}_Imported"
