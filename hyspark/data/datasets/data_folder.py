"""The one reader of data folders: nnU-Net, the decathlon, a folder per patient, BIDS, loose files.

Each verb that takes a folder finds its images and label maps here, so that `check` looks at what a run looks at. Only
names are read; no image is opened.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.channels import channel_text
from hyspark.data.datasets.found import UNREADABLE, FoundData
from hyspark.data.datasets.import_advice import refuse_prepared, refuse_scans
from hyspark.data.datasets.loose import read_loose, sort_files
from hyspark.data.datasets.nnunet import USED_FOLDERS, is_data_set, read_data_set
from hyspark.data.datasets.words import FIRST_CHANNELS
from hyspark.data.quality.findings import Finding
from hyspark.utils.paths import NIFTI, walk_folders
from hyspark.utils.text import listing

EXPECTED_LAYOUT = "expected DatasetXXX_Name/imagesTr/CASE_0000.nii.gz (or .nii) in it or below, or loose NIfTI files"
DATA_SET_NAMES = ("Dataset", "Task")
"""How names of data set folders begin, of nnU-Net and of the decathlon."""
LABEL_KINDS = ("label without image", UNREADABLE)
"""Errors that do not matter where labels are not used."""


def read_data_folder(
    path: Path, channels: Sequence[int] = FIRST_CHANNELS, *, with_loose: bool = False, skip: Path | None = None
) -> FoundData:
    """Find the cases of a data set folder, of all data set folders below a folder, or of loose files.

    Args:
        path: the folder.
        channels: the channels that are read, as numbered in file names.
        with_loose: whether loose files beside data set folders are cases; else they are passed over.
        skip: folder that is not searched.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds what nnU-Net has prepared.
    """
    path = Path(os.path.abspath(path))
    refuse_prepared(path)
    if not path.is_dir():
        refuse_scans(path)
        there = "expected a folder, got a file" if path.exists() else "no such file or folder"
        raise FileNotFoundError(f"{path}: {there}")
    found = FoundData(path)
    folders = [path] if is_data_set(path) else data_sets_below(path, found, skip)
    for folder in folders:
        read_data_set(folder, found, channels)
    skipped = {*folders, *([skip] if skip else [])}
    if not folders or (with_loose and path not in folders):
        read_loose(path, found, channels, skip=skipped)
    elif path not in folders:
        pass_over_files(path, found, skipped, "outside of the data set folders")
    for folder in folders:
        if (folder / "imagesTr").is_dir():
            pass_over_rest(folder, found, [skip] if skip else [])
    return found


def pass_over_rest(folder: Path, found: FoundData, skip: Collection[Path]) -> None:
    """Pass over the files of a data set outside of its folders for images and labels, and in folders below these."""
    used = [below for name in USED_FOLDERS if (below := folder / name).is_dir()]
    labels_reason = "label maps outside of labelsTr"
    if folder / "labelsTr" not in used:
        labels_reason += ", which is missing; name their folder labelsTr to use them"
    pass_over_files(folder, found, {*used, *skip}, "outside of imagesTr", labels_reason)
    for above in used:
        for below in sorted(above.iterdir()):
            if below.is_dir() and not below.name.startswith(".") and not NIFTI.fullmatch(below.name):
                reason = f"in a folder below {above.name}; move the files up to use them"
                pass_over_files(below, found, skip, reason)


def pass_over_files(root: Path, found: FoundData, skip: Collection[Path], reason: str, labels_reason: str = "") -> None:
    """Pass over the files at or below a folder, except those in some folders; label maps for a reason of their own."""
    images, labels = sort_files(root, found, skip=skip)
    for file in labels:
        found.pass_over("unused label map", labels_reason or reason, file)
    for file in [file for files in images.values() for file in files]:
        found.pass_over("unused file", reason, file)


def data_sets_below(path: Path, found: FoundData, skip: Path | None) -> list[Path]:
    """List the data set folders below a folder by name: those named Dataset* or Task*, or else all with imagesTr."""
    named: dict[str, Path] = {}
    others = []
    for folder, below in walk_folders(path, skip=skip):
        if not (folder / "imagesTr").is_dir() and not (folder.name.startswith("Dataset") and is_data_set(folder)):
            continue
        below.clear()
        if not folder.name.startswith(DATA_SET_NAMES):
            others.append(folder)
        elif folder.name in named:
            reason = f"its name is that of {folder} too"
            found.findings.append(Finding("two data sets of one name", str(named[folder.name]), reason))
        else:
            named[folder.name] = folder
    return [named[name] for name in sorted(named)] or others


def find_cases(path: Path, *, labels: bool = False, channels: Sequence[int] = FIRST_CHANNELS) -> FoundData:
    """Find cases as `read_data_folder` does; faults raise.

    Args:
        path: the folder.
        labels: whether cases have label maps, whose faults count.
        channels: the channels that are read.

    Raises:
        FileNotFoundError: if there is no case.
        ValueError: if two files belong to one case, or, with `labels`, a label has no image; the message lists all.
    """
    found = read_data_folder(path, channels)
    found.check(() if labels else LABEL_KINDS)
    if not labels:
        for one in found.sets:
            one.cases = [replace(case, label=None, ignore=None) for case in one.cases]
    if not found.cases:
        refuse_scans(found.source)
        why = found.unused_lines()
        folders = [one.folder.name for one in found.sets if one.folder != found.source]
        seen = f"; images of channel {channel_text(channels[0])} are missing in {listing(folders)}" if folders else ""
        raise FileNotFoundError("\n  ".join([f"{found.source}: {EXPECTED_LAYOUT}, found no image{seen}", *why]))
    return found


def labelled_of(found: FoundData) -> list[Case]:
    """Return the cases that have a label.

    Raises:
        FileNotFoundError: if none has; the message names label maps that belong to no image.
    """
    if labelled := [case for case in found.cases if case.label is not None]:
        return labelled
    kinds = [kind for kind, _ in sorted(found.unused)]
    why = [line for kind, line in zip(kinds, found.unused_lines(), strict=True) if "label" in kind]
    examples = listing([case.image.name for case in found.cases], 3)
    message = (
        f"{found.source}: {len(found.cases)} images but no label ({examples}); "
        "expected labelsTr/CASE.nii.gz beside imagesTr/CASE_0000.nii.gz, or a name such as CASE_seg.nii.gz beside "
        'CASE.nii.gz (all layouts: page "Data set" of the documentation)'
    )
    raise FileNotFoundError("\n  ".join([message, *why]))
