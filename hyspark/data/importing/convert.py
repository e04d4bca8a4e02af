"""One volume -> its image in the data set."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes

from hyspark.data.importing.choice import Choice
from hyspark.data.importing.choose import why_thick
from hyspark.data.importing.nifti_content import as_stored, is_sheared, nifti_content
from hyspark.data.quality.image_kind import IN_HU
from hyspark.data.readers.other_formats import why_unoriented
from hyspark.data.readers.volumes import Volume, kind_of_values, notes_on_kind, read_volume, reading_error
from hyspark.utils.atomic import write_whole
from hyspark.utils.processes import KILLED

IMAGES = "imagesTr"


@dataclass(frozen=True)
class Converted:
    """The result of converting one volume. Private parts of the texts are marked.

    Attributes:
        name: name of the case.
        known: shape, spacing, type and size of its image.
        notes: irregularities.
        error: why it is unreadable.
        unfit: why it is excluded.
    """

    name: str
    known: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""
    unfit: str = ""


def image_file(name: str) -> str:
    """Return the file of a case, relative to the data set."""
    return f"{IMAGES}/{name}_0000.nii.gz"


def convert_volume(volume: Volume, name: str, out: Path, choice: Choice) -> Converted:
    """Write the image of a volume; raise OSError if the disk fails, which is no fault of the volume.

    Args:
        volume: the volume.
        name: name of its case.
        out: folder of the data set.
        choice: what is imported; its modality decides whether values should be HU.
    """
    try:
        voxels, affine = read_volume(volume)
        spacing = voxel_sizes(affine)
        if unfit := why_filtered_by_grid(voxels.shape, spacing, volume, choice):
            return Converted(name, unfit=unfit)
        # The modality of files that do not state it is judged by their values.
        kind = kind_of_values(voxels) if choice.modality in ("", "CT") else None
        notes = notes_on_kind(kind, voxels) if choice.modality == "CT" else []
        stored = as_stored(voxels)
        content = nifti_content(stored, affine)
    except Exception as error:  # a damaged file may raise anything, and must not end the others
        return Converted(name, error=reading_error(error))
    with naming_folder(out):
        write_whole(out / image_file(name), content)
    known = {
        "file": image_file(name),
        "bytes": len(content),
        "shape": list(stored.shape),
        "spacing": [round(float(mm), 4) for mm in spacing],
        "values": str(stored.dtype),
        "is_hu": kind is not None and kind.name in IN_HU,
    }
    if volume.pictures:
        notes.append("2D slices are taken as axial, seen from the feet, the first one lowest")
    elif not volume.series and (why := why_unoriented(volume.source)):
        notes.append(why)
    if volume.series and not volume.series.header.patient:
        stand_in = "name and birth date stand" if volume.series.header.person else "its folder stands"
        notes.append(f"no PatientID; {stand_in} for the patient")
    if volume.series and volume.series.header.is_derived:
        notes.append("made from other images, as reformatted scans are (ImageType DERIVED, SECONDARY)")
    if is_sheared(affine):
        notes.append("its axes are not perpendicular, which SimpleITK, and nnU-Net with it, does not read")
    return Converted(name, known, (*(volume.series.marked_notes if volume.series else ()), *notes))


def why_filtered_by_grid(shape: tuple[int, ...], spacing: np.ndarray, volume: Volume, choice: Choice) -> str:
    """Explain why a file of another format than DICOM does not pass the filters; empty if it does."""
    if volume.series:
        return ""
    if min(shape) < choice.min_slices:
        return f"{min(shape)} slices, fewer than --min_slices {choice.min_slices}"
    return why_thick(float(max(spacing)), choice)


def killed_conversion(volume: Volume, name: str, out: Path, choice: Choice) -> Converted:
    """Return the result for a volume whose process was killed."""
    return Converted(name, error=KILLED)


@contextmanager
def naming_folder(out: Path) -> Iterator[None]:
    """Name `out` in an OSError that is raised in the block."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{out}: the data set is not writable ({error.strerror or error}); make room, or choose another folder "
            "with --out"
        ) from error
