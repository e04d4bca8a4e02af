"""Folders without imagesTr -> cases: loose files, a folder per patient (KiTS, TotalSegmentator), BIDS.

A file is a label map by its name or its folder's name, and belongs to the image whose path differs in words for images
and label maps alone: volume-3 and segmentation-3, images/a and labels/a, case_0/imaging and case_0/segmentation.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hyspark.data.datasets.cases import Case, ignored_value
from hyspark.data.datasets.file_names import (
    FIRST_CHANNEL,
    OTHER_FORMATS,
    cases_of_stems,
    is_label_folder,
    is_label_name,
    pair_key,
    unique_names,
)
from hyspark.data.datasets.found import DataSet, FoundData
from hyspark.data.datasets.nnunet import ANOTHER_CHANNEL, NO_NIFTI, add_once, num_channels, read_declaration
from hyspark.utils.paths import NIFTI, nifti_stem, walk_folders

STORE_ENTRY = re.compile(r"[0-9a-f]{32}")
"""The name of a folder in a store of prepared volumes, which is not searched."""
MASKS = (
    "several label maps of one image, such as one per organ, which have to be combined into one label map (by "
    "TotalSegmentator's option --ml, for example)"
)


def read_loose(
    root: Path, found: FoundData, channel: str = FIRST_CHANNEL, *, deep: bool = True, skip: Collection[Path] = ()
) -> None:
    """Add the cases of a folder of loose NIfTI files, with the label maps that belong to them.

    Args:
        root: the folder.
        found: where cases and files that are not used are added.
        channel: channel of the images that are used.
        deep: whether folders below are searched.
        skip: folders that are not entered.
    """
    content, near_stems = surroundings(root, found)
    images, labels = sort_files(root, found, deep, skip)
    stems: dict[Path, str] = {}
    for files in images.values():
        cases = cases_of_stems([nifti_stem(file) for file in files], near_stems, channel, num_channels(content))
        taken: dict[str, Path] = {}
        for file in files:
            if (case := cases[nifti_stem(file)]) is None:
                found.pass_over(*ANOTHER_CHANNEL, file)
            else:
                add_once(taken, case, file, found)
        stems |= {file: case for case, file in taken.items()}
    paired = pair_labels(root, list(stems), labels, found)
    try:
        ignore = ignored_value(content.get("labels"), root / "dataset.json")
    except ValueError as error:
        found.add_unreadable(root / "dataset.json", error)
        ignore = None
    names = unique_names(stems)
    found_cases = [Case(names[image], root.name, image, paired.get(image), ignore) for image in stems]
    found.sets.append(DataSet(root, sorted(found_cases, key=lambda case: case.name)))


def surroundings(root: Path, found: FoundData) -> tuple[dict[str, Any], set[str]]:
    """Return what dataset.json declares, and the names of the label maps beside a folder imagesTr or imagesTs."""
    if not root.name.startswith("images"):
        return read_declaration(root, found), set()
    labels = root.with_name(root.name.replace("images", "labels", 1))
    stems = {nifti_stem(file) for file in labels.iterdir()} if labels.is_dir() else set()
    return read_declaration(root.parent, found), stems


def sort_files(
    root: Path, found: FoundData, deep: bool = True, skip: Collection[Path] = ()
) -> tuple[dict[Path, list[Path]], list[Path]]:
    """Sort the NIfTI files of a folder into images, by folder, and label maps; pass over other formats."""
    images: dict[Path, list[Path]] = {}
    labels: list[Path] = []
    skipped = {os.path.realpath(folder) for folder in skip}
    for folder, below in walk_folders(root):
        below[:] = [name for name in below if deep and not STORE_ENTRY.fullmatch(name)]
        if os.path.realpath(folder) in skipped:
            below.clear()
            continue
        parts = folder.relative_to(root).parts
        of_labels = any(is_label_folder(part) for part in parts)
        for file in sorted(folder.iterdir()):
            if file.name.startswith(".") or file.is_dir():
                continue
            if not NIFTI.fullmatch(file.name):
                if file.suffix.lower() in OTHER_FORMATS:
                    found.pass_over("another format", f"{NO_NIFTI}; convert it to NIfTI", file)
            elif of_labels or is_label_name(nifti_stem(file)):
                labels.append(file)
            elif parts[:1] == ("derivatives",):
                found.pass_over("unused file", "in derivatives, which are made from other images", file)
            else:
                images.setdefault(folder, []).append(file)
    return images, labels


def pair_labels(root: Path, images: list[Path], labels: list[Path], found: FoundData) -> dict[Path, Path]:
    """Return the label map of each image that has exactly one; the other label maps are passed over.

    Without a common name, the only label map of a folder belongs to the folder's only image.
    """
    images_of, labels_of, near = defaultdict(list), defaultdict(list), defaultdict(list)
    for image in images:
        images_of[pair_key(image.relative_to(root))].append(image)
        near[image.parent].append(image)
    for label in labels:
        key = pair_key(label.relative_to(root))
        if key not in images_of and len(near[label.parent]) == 1:
            key = pair_key(near[label.parent][0].relative_to(root))
        labels_of[key].append(label)
    paired = {}
    for key, files in labels_of.items():
        if len(files) == len(images_of[key]) == 1:
            paired[images_of[key][0]] = files[0]
            continue
        folders = {file.parent.parent for file in files} | {file.parent for file in files}
        several = bool(images_of[key]) or any(near[folder] for folder in folders)
        for file in files:
            found.pass_over("unused label map", MASKS if several else "a label map without an image of its name", file)
    return paired
