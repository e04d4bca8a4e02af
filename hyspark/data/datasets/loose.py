"""Folders without imagesTr -> cases: loose files, a folder per patient (KiTS, TotalSegmentator), BIDS.

A file is a label map by its name or its folder's name, and belongs to the image whose path differs in words for images
and label maps alone: volume-3 and segmentation-3, images/a and labels/a, case_0/imaging and case_0/segmentation.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hyspark.data.datasets.cases import Case, ignored_value
from hyspark.data.datasets.channels import complete_cases, first_cases, further_cases
from hyspark.data.datasets.file_names import OTHER_FORMATS, labelled_stems, pair_key, unique_names
from hyspark.data.datasets.found import DataSet, FoundData
from hyspark.data.datasets.nnunet import ANOTHER_CHANNEL, NO_NIFTI, add_once, num_channels, read_declaration
from hyspark.data.datasets.words import (
    FIRST_CHANNELS,
    is_anatomy_name,
    is_image_name,
    is_label_folder,
    is_label_name,
    is_prediction,
)
from hyspark.utils.paths import NIFTI, nifti_stem, walk_folders

PREDICTION = "a prediction by its name; to train on it, move it into a folder named labels"
WITHOUT_IMAGE = "a label map without an image of its name"
SEVERAL_IMAGES = "a label map whose name fits several images; put it beside its image"
STORE_ENTRY = re.compile(r"[0-9a-f]{32}")
"""The name of a folder in a store of prepared volumes, which is not searched."""
MASKS = (
    "several label maps of one image, such as one per organ, which have to be combined into one label map (by "
    "TotalSegmentator's option --ml, for example)"
)


def read_loose(
    root: Path,
    found: FoundData,
    channels: Sequence[int] = FIRST_CHANNELS,
    *,
    deep: bool = True,
    skip: Collection[Path] = (),
) -> None:
    """Add the cases of a folder of loose NIfTI files, with the label maps that belong to them.

    Args:
        root: the folder.
        found: where cases and files that are not used are added.
        channels: the channels that are read.
        deep: whether folders below are searched.
        skip: folders that are not entered.
    """
    content, near_stems = surroundings(root, found)
    images, labels = sort_files(root, found, deep, skip)
    stems: dict[Path, str] = {}
    complete: dict[Path, tuple[Path, ...]] = {}
    label_stems = {nifti_stem(file) for file in labels}
    for files in images.values():
        image_stems = [nifti_stem(file) for file in files]
        known = near_stems | labelled_stems(image_stems, label_stems)
        cases = first_cases(files, known, channels, num_channels(content))
        others = further_cases(image_stems, known, channels, num_channels(content))
        taken: dict[str, Path] = {}
        further: dict[str, dict[int, Path]] = {}
        for file in files:
            if nifti_stem(file) in others:
                number, name = others[nifti_stem(file)]
                add_once(further.setdefault(name, {}), number, file, found)
            elif (case := cases[nifti_stem(file)]) is None:
                found.pass_over(*ANOTHER_CHANNEL, file)
            else:
                add_once(taken, case, file, found)
        whole = complete_cases(taken, further, channels)
        stems |= {of[0]: case for case, of in whole.items()}
        complete |= {of[0]: of for of in whole.values()}
    made = [file for file in labels if is_prediction(file.relative_to(root))]
    for file in made:
        found.pass_over("unused label map", PREDICTION, file)
    paired = pair_labels(root, list(stems), [file for file in labels if file not in made], found)
    try:
        ignore = ignored_value(content.get("labels"), root / "dataset.json")
    except ValueError as error:
        found.add_unreadable(root / "dataset.json", error)
        ignore = None
    names = unique_names(stems)
    found_cases = [
        Case(names[image], root.name, image, paired.get(image), ignore, complete[image][1:]) for image in stems
    ]
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
            elif "derivatives" in parts:
                found.pass_over("unused file", "in derivatives, which are made from other images", file)
            else:
                images.setdefault(folder, []).append(file)
    if not images:
        for file in [file for file in labels if is_doubtful_label(file.relative_to(root))]:
            labels.remove(file)
            images.setdefault(file.parent, []).append(file)
    return images, labels + take_anatomy(images)


def is_doubtful_label(below: Path) -> bool:
    """Return whether a file is a label map by a word amid a folder's name alone."""
    folders = below.parts[:-1]
    return not is_label_name(nifti_stem(below)) and not any(is_label_folder(name, surely=True) for name in folders)


def take_anatomy(images: dict[Path, list[Path]]) -> list[Path]:
    """Take the files named as parts of the body, in or below the folder of a file named as an image, out of images."""
    anchors = {folder for folder, files in images.items() if any(is_image_name(nifti_stem(file)) for file in files)}
    masks = [
        file
        for folder, files in images.items()
        if folder in anchors or folder.parent in anchors
        for file in files
        if is_anatomy_name(nifti_stem(file))
    ]
    for file in masks:
        images[file.parent].remove(file)
    return masks


def pair_labels(root: Path, images: list[Path], labels: list[Path], found: FoundData) -> dict[Path, Path]:
    """Return the label map of each image that has exactly one; the other label maps are passed over.

    Without a common path, the only label map of a folder belongs to the folder's only image, and one whose file name
    fits a single image belongs to it.
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
    paired: dict[Path, Path] = {}
    without_image = []
    for key, files in labels_of.items():
        if len(files) == len(images_of[key]) == 1:
            paired[images_of[key][0]] = files[0]
        elif not images_of[key]:
            without_image += files
        else:
            for file in files:
                found.pass_over("unused label map", MASKS, file)
    of_name: dict[tuple[str, ...], tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for side, files in enumerate((images, without_image)):
        for file in files:
            of_name[pair_key(file.relative_to(root))[1]][side].append(file)
    in_folder = Counter(file.parent for file in without_image)
    for name, (of_image, of_label) in of_name.items():
        if name and len(of_image) == len(of_label) == 1 and of_image[0] not in paired:
            paired[of_image[0]] = of_label[0]
            continue
        for file in of_label:
            beside = in_folder[file.parent] > 1 and 1 in (len(near[file.parent]), len(near[file.parent.parent]))
            reason = MASKS if beside or (len(of_image) == 1 and name) else WITHOUT_IMAGE
            found.pass_over("unused label map", SEVERAL_IMAGES if name and of_image[1:] else reason, file)
    return paired
