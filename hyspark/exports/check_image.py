"""The image that an export is compared on: one that is named, else of the run's validation, else a phantom CT."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation
from nibabel.spatialimages import SpatialImage

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.cases import UNANNOTATED, Case
from hyspark.data.datasets.inputs import read_inputs
from hyspark.data.readers.nifti import read_label, read_nifti
from hyspark.data.synthetic.phantom import make_phantom
from hyspark.training.labelled_cases import find_labelled_cases
from hyspark.utils.text import first_line

REGION = 1.5
"""Edges of a crop per edge of the region of a validation case: two windows per axis, which overlap."""
PHANTOM_SCALE = 0.5
"""Scale of the phantom's body, so that it is predicted in seconds."""


class CheckImage(NamedTuple):
    """An image to compare predictions on.

    Attributes:
        folder: Folder with its files and no others, one per channel.
        text: What it is, in words.
    """

    folder: Path
    text: str


def make_check_image(config: SegmentationConfig, given: str, folder: Path) -> CheckImage:
    """Write the files of the image to compare on.

    Args:
        config: Settings of the network.
        given: A NIfTI file of the image, that of the first channel if it has several; empty to choose one.
        folder: Folder to write to.

    Raises:
        FileNotFoundError: There is no such file, or a channel is missing.
        ValueError: It is no NIfTI file.
    """
    folder.mkdir(parents=True)
    if given:
        (case, *_) = read_inputs([Path(given)], config.image_channels).cases
        if len(set(case.images)) < len(case.images):
            raise ValueError(f"--check {given}: expected a file per channel, got one file; write its channels apart")
        for path, channel in zip(case.images, config.image_channels, strict=True):
            content = path.read_bytes()
            is_compressed = path.name.lower().endswith(".gz")
            target = folder / f"check_{channel:04d}.nii.gz"
            target.write_bytes(content if is_compressed else igzip.compress(content))
        return CheckImage(folder, given)
    try:
        case = first_readable(find_labelled_cases(config)[1])
        write_region(case, config, folder)
    except Exception as error:  # data that was moved or changed since the training, in whatever way
        shutil.rmtree(folder)
        folder.mkdir()
        write_phantom(config, folder)
        return CheckImage(folder, f"a phantom CT (no validation case of the run is readable: {first_line(error)})")
    return CheckImage(folder, f"a region of the validation case {case.name}")


def first_readable(cases: Sequence[Case]) -> Case:
    """Return the first case whose files exist.

    Raises:
        FileNotFoundError: There is none.
    """
    found = next((case for case in cases if all(path.is_file() for path in case.files)), None)
    if found is None:
        raise FileNotFoundError("its files are missing")
    return found


def write_region(case: Case, config: SegmentationConfig, folder: Path) -> None:
    """Write the region of a labelled case around the middle of its labels, `REGION` crops long.

    Axes and directions stay those of the file; of its header nothing else is kept.
    """
    assert case.label is not None
    files = [read_nifti(path) for path in case.images]
    labels = read_label(case.label, case.image, ignore=case.ignore).voxels
    affine = files[0].affine
    along = io_orientation(affine)[:, 0].astype(int)  # the axis of RAS of each axis of the file
    edges = np.array(config.crop_shape)[along] * np.array(config.spacing)[along] * REGION / voxel_sizes(affine)
    middle = middle_of((labels > 0) & (labels != UNANNOTATED))
    start = [
        int(np.clip(round(at - edge / 2), 0, max(0, length - math.ceil(edge))))
        for at, edge, length in zip(middle, edges, labels.shape, strict=True)
    ]
    box = tuple(slice(first, first + math.ceil(edge)) for first, edge in zip(start, edges, strict=True))
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ start + affine[:3, 3]
    for file, channel in zip(files, config.image_channels, strict=True):
        write_channel(folder, channel, SpatialImage(np.asanyarray(file.dataobj)[box], moved))


def middle_of(mask: np.ndarray) -> list[float]:
    """Compute the mean position of the voxels of a mask (h, w, d), or the middle of the array if it has none."""
    if not mask.any():
        return [length / 2 for length in mask.shape]
    counts = [mask.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return [float(np.average(np.arange(len(count)), weights=count)) for count in counts]


def write_phantom(config: SegmentationConfig, folder: Path) -> None:
    """Write a small phantom CT, the same in all channels, at a spacing and orientation that are not the network's."""
    x, y, z = (1.25 * edge for edge in config.spacing)
    phantom = make_phantom(0, spacing=(x, y, z), orientation="LPS", extent_scale=PHANTOM_SCALE)
    for channel in config.image_channels:
        write_channel(folder, channel, SpatialImage(phantom.image, phantom.affine))


def write_channel(folder: Path, channel: int, image: SpatialImage) -> None:
    """Write a channel of the image as NIfTI, of fp32 unless its voxels are integers of 16 bits or fewer."""
    voxels = np.asanyarray(image.dataobj)
    keeps = voxels.dtype in (np.uint8, np.int16, np.uint16)
    nifti = nib.Nifti1Image(voxels if keeps else voxels.astype(np.float32), image.affine)
    nifti.header.set_xyzt_units("mm")
    nib.save(nifti, folder / f"check_{channel:04d}.nii.gz")
