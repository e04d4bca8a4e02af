"""NIfTI files and folders that are named on a command line -> the volumes to predict."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.channels import complete_cases, first_cases, further_cases
from hyspark.data.datasets.data_folder import read_data_folder
from hyspark.data.datasets.found import DataSet, FoundData
from hyspark.data.datasets.loose import read_loose, sort_files
from hyspark.data.datasets.nnunet import ANOTHER_CHANNEL
from hyspark.data.datasets.words import FIRST_CHANNELS, is_label_name
from hyspark.utils.paths import NIFTI, nifti_stem

OWN_LABELS = "label maps of these volumes"
"""Reason why label maps among the inputs are not used."""


def read_inputs(inputs: Sequence[Path], channels: Sequence[int] = FIRST_CHANNELS) -> FoundData:
    """Find the volumes of NIfTI files and folders, and the files that are not used.

    A case is named as its file, without ending and "_0000". Of a folder with NIfTI files, these are taken; of any
    other, those that `read_data_folder` finds. Of a file, further channels that are read lie beside it. Other channels
    and label maps are not used. A volume that is named twice, as a file and by its folder, is one case.

    Raises:
        FileNotFoundError: A path does not exist, or there is no volume.
        ValueError: A file is no NIfTI file, or two volumes have one name.
    """
    found = FoundData(inputs[0] if len(inputs) == 1 else Path("inputs"))
    add_files([path for path in inputs if not path.is_dir()], channels, found)
    for folder in [path for path in inputs if path.is_dir()]:
        add_folder(folder, channels, found)
    found.check(("label without image",))
    if not found.cases:
        why = found.unused_lines()
        raise FileNotFoundError("\n  ".join([f"{', '.join(map(str, inputs))}: expected a volume, found none", *why]))
    order = {str(path): i for i, path in enumerate(inputs)}
    cases = sorted(found.cases, key=lambda case: order.get(str(case.image), len(order)))
    names: dict[str, Case] = {}
    files: set[str] = set()
    for case in cases:
        if os.path.abspath(case.image) in files:  # named twice, as a file and by its folder
            continue
        files.add(os.path.abspath(case.image))
        if (other := names.setdefault(case.name, case)) is not case:
            raise ValueError(
                f"two volumes are named {case.name}: {other.image} and {case.image}; predict them into two folders"
            )
    cases = list(names.values())
    for label in {case.label for case in cases if case.label}:
        found.pass_over("unused label map", OWN_LABELS, label)
    found.sets = [DataSet(found.source, cases)]
    return found


def add_files(files: Sequence[Path], channels: Sequence[int], found: FoundData) -> None:
    """Add named files; label maps among images are passed over, and a label map alone is what was asked for."""
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file or folder")
        if not NIFTI.fullmatch(file.name):
            raise ValueError(f"{file} is no NIfTI file (.nii, .nii.gz), and no DICOM")
    images = [file for file in files if not is_label_name(nifti_stem(file))]
    for file in files if images else ():
        if is_label_name(nifti_stem(file)):
            found.pass_over("unused label map", "a label map by its name", file)
    images = images or list(files)
    by_folder = defaultdict(list)
    for file in images:
        by_folder[file.parent].append(file)
    for folder, together in by_folder.items():
        add_images(folder, together, channels, found)


def add_images(folder: Path, files: Sequence[Path], channels: Sequence[int], found: FoundData) -> None:
    """Add the cases of named images of one folder; files of other channels are passed over."""
    stems = [nifti_stem(file) for file in files]
    cases = first_cases(files, (), channels)
    others = further_cases(stems, (), channels)
    first: dict[str, list[Path]] = {}
    further: dict[str, dict[int, Path]] = {}
    for file, stem in zip(files, stems, strict=True):
        if stem in others:
            number, case = others[stem]
            further.setdefault(case, {})[number] = file
        elif (name := cases[stem]) is None:
            found.pass_over(*ANOTHER_CHANNEL, file)
        else:
            first.setdefault(name, []).append(file)
    for name in {**first, **further}:
        for known in [{name: file} for file in first.get(name, ())] or [{}]:  # two of one name are refused later
            whole = complete_cases(known, {name: further.get(name, {})}, channels)[name]
            found.sets.append(DataSet(folder, [Case(name, folder.name, whole[0], others=whole[1:])]))


def add_folder(folder: Path, channels: Sequence[int], found: FoundData) -> None:
    """Add the volumes of a folder; raise FileNotFoundError if it has none."""
    num_before = len(found.cases)
    if any(NIFTI.fullmatch(file.name) and not file.name.startswith(".") for file in folder.iterdir()):
        read_loose(folder, found, channels, deep=False)
        for below, files in sort_files(folder, FoundData(folder))[0].items():
            for file in files if below != folder else ():
                found.pass_over("unused file", "in a folder below; name that folder to use it", file)
    else:
        below_it = read_data_folder(folder, channels)
        found.findings += below_it.findings
        found.sets += below_it.sets
        for key, files in below_it.unused.items():
            found.unused.setdefault(key, []).extend(files)
    if len(found.cases) == num_before:
        why = found.unused_lines()
        raise FileNotFoundError(
            "\n  ".join([f"{folder} holds no NIfTI file (.nii, .nii.gz) that is an image, and no DICOM", *why])
        )
