"""nnU-Net folders -> cases."""

import os
import re
from collections.abc import Container, Sequence
from pathlib import Path

from hyspark.data.datasets.cases import Case, folder_ignored_value
from hyspark.utils.paths import nifti_files, nifti_stem, walk_folders
from hyspark.utils.text import listing


def scan_cases(data_path: Path, *, labels: bool = False, channel: str = "0000") -> list[Case]:
    """List the cases of every `Dataset*/imagesTr` in or below a folder, by data set and name, with absolute paths.

    Args:
        data_path: folder to search.
        labels: whether to list labelled cases only.
        channel: four digits of the images' channel.

    Raises:
        FileNotFoundError: if there is no case.
        ValueError: if two files belong to one case, or a label has no image.
    """
    cases = scan_images(data_path, labels=labels, channel=channel)
    return only_labelled(cases, data_path) if labels else cases


def scan_images(data_path: Path, *, labels: bool, channel: str) -> list[Case]:
    """List every image below a folder as a case; with `labels`, together with its label if it has one.

    Raises:
        FileNotFoundError: if there is no image.
        ValueError: if two files belong to one case, or a label has no image.
    """
    data_path = Path(os.path.abspath(data_path))
    if not re.fullmatch(r"\d{4}", channel):
        raise ValueError(f'channel: expected four digits as in nnU-Net\'s file names ("0000"), got {channel!r}')
    if not data_path.is_dir():
        raise FileNotFoundError(f"{data_path}: expected a folder that holds DatasetXXX_Name/imagesTr, found none")
    folders: dict[str, Path] = {}
    for folder, below in walk_folders(data_path):
        if folder.name.startswith("Dataset") and (folder / "imagesTr").is_dir():
            if folder.name in folders:
                raise ValueError(f"{folders[folder.name]} and {folder}: two data sets of one name; rename one of them")
            folders[folder.name] = folder
        below[:] = [name for name in below if name not in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")]
    cases = [c for _, f in sorted(folders.items()) for c in dataset_cases(f, labels=labels, channel=channel)]
    if not cases:
        seen = f"; images of this channel are missing in {listing(folders)}" if folders else ""
        raise FileNotFoundError(
            f"{data_path}: expected DatasetXXX_Name/imagesTr/CASE_{channel}.nii.gz (or .nii) in it or below, "
            f"found no image{seen}"
        )
    return cases


def dataset_cases(folder: Path, *, labels: bool, channel: str) -> list[Case]:
    """List the cases of one data set folder by name; with `labels`, together with their labels in labelsTr."""
    images: dict[str, Path] = {}
    for file in nifti_files(folder / "imagesTr"):
        if name := name_of_image(file, channel):
            add_once(images, name, file)
    paired: dict[str, Path] = {}
    orphans: list[str] = []
    for file in nifti_files(folder / "labelsTr") if labels and (folder / "labelsTr").is_dir() else []:
        if name := name_of_label(file, images):
            add_once(paired, name, file)
        else:
            orphans.append(file.name)
    if orphans:
        raise ValueError(
            f"{folder}: labels without an image of channel {channel} in imagesTr: {listing(orphans)}; "
            "add the images or move these labels away"
        )
    ignore = folder_ignored_value(folder) if paired else None
    return [Case(name, folder.name, images[name], paired.get(name), ignore) for name in sorted(images)]


def name_of_image(file: Path, channel: str) -> str | None:
    """Return the case of an image in imagesTr, or None for another channel."""
    stem = nifti_stem(file)
    if len(stem) > 5 and stem.endswith(f"_{channel}"):
        return stem[:-5]
    return stem if channel == "0000" and re.fullmatch(r"img\d+", stem) else None  # BTCV


def name_of_label(file: Path, images: Container[str]) -> str | None:
    """Return the case of a label in labelsTr, or None if no image belongs to it."""
    stem = nifti_stem(file)
    names = (stem, re.sub(r"^label(?=\d+$)", "img", stem))  # BTCV's label0001 belongs to img0001
    return next((name for name in names if name in images), None)


def add_once(files: dict[str, Path], name: str, file: Path) -> None:
    """Add the file of a case; raise ValueError if the case has one already."""
    if name in files:
        raise ValueError(f"{files[name]} and {file}: expected one file for the case {name}, got both; keep one of them")
    files[name] = file


def only_labelled(cases: Sequence[Case], root: Path) -> list[Case]:
    """Return the cases that have a label; raise FileNotFoundError if none has."""
    if found := [case for case in cases if case.label is not None]:
        return found
    raise FileNotFoundError(
        f"{root}: {len(cases)} images but no label; expected labelsTr/CASE.nii.gz beside imagesTr/CASE_0000.nii.gz"
    )
