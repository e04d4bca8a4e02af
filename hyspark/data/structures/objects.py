"""RTSTRUCT and DICOM-SEG files: what they refer to, and the names of their structures."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom

from hyspark.data.readers.dicom import open_dicom
from hyspark.data.readers.volumes import Volume
from hyspark.utils.text import first_line

LONG = ("PerFrameFunctionalGroupsSequence", "ROIContourSequence")
"""Long sequences, whose references mostly stand elsewhere too."""
KINDS = ("RTSTRUCT", "SEG")
"""Modalities of files that hold labels."""


@dataclass(frozen=True)
class LabelObject:
    """A file that holds structures.

    Attributes:
        path: the file.
        kind: RTSTRUCT or SEG.
        patient: PatientID.
        frames: UIDs of frames of reference.
        series: UIDs of the series that it refers to.
        images: UIDs of the images that it refers to.
        made: date and time of the object, empty if unknown; a later one is newer.
        structures: number and name of each structure.
    """

    path: Path
    kind: str
    patient: str
    frames: frozenset[str]
    series: frozenset[str]
    images: frozenset[str]
    made: str
    structures: tuple[tuple[int, str], ...]


def read_label_object(path: Path) -> LabelObject:
    """Read what a file of structures refers to.

    Raises:
        ValueError: the file is damaged, or holds no structure.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of values that violate the standard
            data = open_dicom(path, stop_before_pixels=True)
            made = described(path, data)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"unreadable as DICOM ({first_line(error)})") from error
    if not made.structures:
        raise ValueError(f"expected structures, found a {made.kind} without any")
    return made


def described(path: Path, data: pydicom.Dataset) -> LabelObject:
    """Describe a file of structures by its elements."""
    kind = str(data.Modality)
    if kind == "RTSTRUCT":
        structures = [
            (int(roi.ROINumber), str(roi.get("ROIName") or f"structure {roi.ROINumber}"))
            for roi in data.get("StructureSetROISequence") or ()
        ]
        times = ("StructureSetDate", "StructureSetTime")
    else:
        structures = [
            (int(segment.SegmentNumber), str(segment.get("SegmentLabel") or f"structure {segment.SegmentNumber}"))
            for segment in data.get("SegmentSequence") or ()
        ]
        times = ("ContentDate", "ContentTime")
    frames, series, images = references_of(data, LONG)
    if not (series or images):
        frames, series, images = references_of(data, ())
    made = "".join(str(data.get(name) or "") for name in times)
    return LabelObject(
        path,
        kind,
        str(data.get("PatientID") or "").strip(" \0"),
        frozenset(frames),
        frozenset(series),
        frozenset(images),
        made,
        tuple(structures),
    )


def references_of(data: pydicom.Dataset, skipped: Collection[str]) -> tuple[set[str], set[str], set[str]]:
    """Return the UIDs of frames of reference, series and images that a file refers to, but in some sequences."""
    found: dict[str, set[str]] = {"FrameOfReferenceUID": set(), "SeriesInstanceUID": set(), "SOPInstanceUID": set()}
    for element in elements_below(data, skipped):
        if (name := element.keyword.removeprefix("Referenced")) in found and element.value:
            found[name].add(str(element.value))
    for name in ("SeriesInstanceUID", "SOPInstanceUID"):
        found[name].discard(str(data.get(name)))
    frames, series, images = found.values()
    return frames, series, images


def elements_below(data: pydicom.Dataset, skipped: Collection[str]) -> Iterator[pydicom.DataElement]:
    """Yield the UIDs of a data set and of its sequences, at any depth."""
    for element in data:
        if element.VR == "UI":
            yield element
        elif element.VR == "SQ" and element.keyword not in skipped:
            for item in element.value or ():
                yield from elements_below(item, skipped)


def volumes_of_object(made: LabelObject, volumes: Sequence[Volume]) -> tuple[list[Volume], str]:
    """Find the volumes that a file of structures belongs to.

    These are the volumes with images that it refers to; else those of the series that it refers to; else those of the
    same patient in the same frame of reference, such as another reconstruction of the scan.

    Returns:
        The volumes, and a note if they are not those that the file refers to.
    """
    of_series = [volume for volume in volumes if volume.series is not None]
    counts = [sum(part.uid in made.images for part in volume.series.slices) for volume in of_series if volume.series]
    if any(counts):
        return [volume for volume, num in zip(of_series, counts, strict=True) if num], ""
    if named := [volume for volume in of_series if volume.series and volume.series.uid in made.series]:
        return named, ""
    near = [
        volume
        for volume in of_series
        if volume.series
        and volume.series.frame_of_reference in made.frames
        and volume.series.header.patient == made.patient
    ]
    return near, "drawn on another series in the same frame of reference" if near else ""
