"""The DICOM series that a label map belongs to: its elements, its slices in order, and what references need."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataelem import DataElement

from hyspark.data.readers.series import Series
from hyspark.data.readers.source_slices import SourceSlice, read_slices

REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID")
"""Elements of a source that an object which refers to it needs."""
TYPE_2 = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber"),
    *("ReferringPhysicianName", "StudyID"),
)
"""Elements of patient and study that every object has, if only empty."""
COPIED = (*TYPE_2, "StudyDescription", "PatientAge", "PatientSize")
"""Elements of patient and study that are copied from the series, beside StudyInstanceUID."""
UTF_8 = "ISO_IR 192"


@dataclass(frozen=True)
class Segments:
    """The classes of a label map, and the origin of the map.

    Attributes:
        names: names of the classes 1, 2, ...; background is none of them.
        colours: red, green and blue of each class, from 0 to 255.
        version: version of the software.
        weights: digest of the network's weights.
    """

    names: Sequence[str]
    colours: Sequence[tuple[int, int, int]]
    version: str
    weights: str


def read_source(series: Series) -> list[SourceSlice]:
    """Read the elements of the slices of a series, in the series' order.

    Raises:
        ValueError: if elements are missing that a reference needs; the message begins with the file's name.
    """
    slices = read_slices(series)
    seen: dict[str, Path] = {}
    for path, data in {part.header.path: part.data for part in slices}.items():
        if missing := [name for name in REQUIRED if not data.get(name)]:
            raise ValueError(
                f"{path.name}: expected {', '.join(missing)}, to which a DICOM object refers, found none; "
                "use --format nifti"
            )
        if (other := seen.setdefault(str(data.SOPInstanceUID), path)) != path:
            raise ValueError(
                f"{path.name}: expected a SOPInstanceUID of its own, found that of {other.name}; use --format nifti"
            )
        for name in TYPE_2:
            if name not in data:
                setattr(data, name, "")
    return slices


def copy_identity(source: pydicom.Dataset, made: pydicom.Dataset) -> None:
    """Copy the elements of patient and study as they are, valid or not; texts become UTF-8, which has all letters."""
    made.SpecificCharacterSet = UTF_8
    for element in (source[name] for name in COPIED if name in source):
        value = str(element.value) if element.VR == "PN" else element.value
        made.add(DataElement(element.tag, element.VR, value, validation_mode=pydicom.config.IGNORE))


def check_segments(labels: np.ndarray, series: Series, segments: Segments) -> None:
    """Raise ValueError unless a label map `(columns, rows, slices)` fits its series and classes."""
    if labels.shape[2] != len(series.slices) or labels.max(initial=0) > len(segments.names):
        raise ValueError(
            f"expected labels of {len(series.slices)} slices with values up to {len(segments.names)}, "
            f"got {labels.shape[2]} slices with values up to {labels.max(initial=0)}"
        )
