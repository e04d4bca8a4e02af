"""Scans that no run reads but `hyspark import` converts: which command to type."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from hyspark.data.datasets.file_names import BY_NIBABEL, BY_SIMPLEITK
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
    """Raise ValueError for a folder of volumes that nnU-Net has prepared: a data set's, or that of a configuration."""
    is_data_set = (path / "dataset_fingerprint.json").is_file() and not (path / "imagesTr").is_dir()
    if is_data_set or (any(path.glob("*.b2nd")) and any(path.glob("*.pkl"))):
        raise ValueError(
            f"{path}: expected scans, found what nnU-Net has prepared, which is not read; name the data set in "
            "nnUNet_raw, or unlabelled scans"
        )


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
