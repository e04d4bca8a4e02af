"""Folders of volumes that nnU-Net has prepared, below nnUNet_preprocessed, and how it prepared them.

`nnUNet_preprocessed/DATASET` holds plans and, for each way of preparing, a folder such as `nnUNetPlans_3d_fullres`. It
holds `CASE.b2nd`, the image; `CASE_seg.b2nd`, the label map; and `CASE.pkl`, a pickle, which is never read.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from hyspark.utils.text import listing

ARRAY = ".b2nd"
"""Ending of the arrays."""
LABEL_ARRAY = f"_seg{ARRAY}"
EARLIER_ARRAY = ".npz"
"""Ending of the arrays of nnU-Net before 2.6."""
FINGERPRINT = "dataset_fingerprint.json"
"""A file of each data set in nnUNet_preprocessed."""


@dataclass(frozen=True)
class NnunetPreparation:
    """How nnU-Net has prepared the volumes of a folder, by its plan.

    Attributes:
        axis_order: axis of x, y, z (0, 1, 2) that is each axis of an array, behind its channels.
        spacing: mm per voxel of x, y, z.
        hu: by channel of an array, mean and deviation in HU of its z-scores; None where it is not CT.
    """

    axis_order: tuple[int, ...]
    spacing: tuple[float, ...]
    hu: tuple[tuple[float, float] | None, ...]


def preparing_command(dataset: str, plans_name: str, configuration: str) -> str:
    """Return what to type for nnU-Net to prepare a data set by a plan."""
    found = re.match(r"Dataset(\d+)_", dataset)
    return f"nnUNetv2_preprocess -d {int(found[1]) if found else dataset} -plans_name {plans_name} -c {configuration}"


def is_configuration(path: Path) -> bool:
    """Return whether a folder holds the prepared volumes of a configuration."""
    is_store = (path / "entry.json").is_file()
    has_arrays = any(path.glob(f"*{ARRAY}")) or (any(path.glob(f"*{EARLIER_ARRAY}")) and any(path.glob("*.pkl")))
    return has_arrays and not is_store


def is_data_set_folder(path: Path) -> bool:
    """Return whether a folder is that of a data set below nnUNet_preprocessed."""
    return (path / FINGERPRINT).is_file() and not (path / "imagesTr").is_dir()


def is_prepared(path: Path) -> bool:
    """Return whether a folder holds what nnU-Net has prepared: a data set, or the volumes of a configuration."""
    return path.is_dir() and (is_data_set_folder(path) or is_configuration(path))


def image_arrays(folder: Path) -> list[Path]:
    """List the arrays of images in the folder of a configuration, by name.

    Raises:
        FileNotFoundError: it has none.
        ValueError: it has arrays of nnU-Net before 2.6.
    """
    found = sorted(file for file in folder.glob(f"*{ARRAY}") if not file.name.endswith(LABEL_ARRAY))
    found = [file for file in found if not file.name.startswith(".")]
    if found:
        return found
    if earlier := sorted(file.name for file in folder.glob(f"*{EARLIER_ARRAY}")):
        raise ValueError(
            f"{folder}: expected CASE{ARRAY}, found {listing(earlier, 3)} of nnU-Net before 2.6; "
            "prepare them again by nnUNetv2_preprocess of a later one"
        )
    raise FileNotFoundError(f"{folder}: expected CASE{ARRAY} of images, found none")


def array_stem(file: Path) -> str:
    """Return the name of the case of an array."""
    return file.name[: -len(ARRAY)]
