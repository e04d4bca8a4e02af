"""Label maps as RTSTRUCT: closed contours in each slice of a series."""

import datetime
import warnings
from io import BytesIO
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from scipy.ndimage import find_objects

from hyspark.data.readers.series import Series
from hyspark.data.readers.source_slices import SourceSlice
from hyspark.data.writers.outlines import mask_contours
from hyspark.data.writers.source_images import Segments, check_segments, copy_identity, read_source

RTSTRUCT_NUMBER = 9100
"""What is added to the number of the source's series."""
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management, the class by which structure sets refer to a study."""


def rtstruct_file(labels: np.ndarray, series: Series, segments: Segments) -> bytes:
    """Make the content of an RTSTRUCT file of a label map.

    Every class that is present is a region of interest, whose number is the class's value. Readers stumble over regions
    without contours; a map without any label has a region for each class, since a file without regions is not valid.

    Args:
        labels: label map `(columns, rows, slices)` on the grid of the series.
        series: the series that it belongs to, whose patient and study are copied.
        segments: classes of the map.

    Raises:
        ValueError: the source lacks elements that are referred to.
    """
    check_segments(labels, series, segments)
    slices = read_source(series)
    first = slices[0].data
    now = datetime.datetime.now()
    made = Dataset()
    copy_identity(first, made)
    made.StudyInstanceUID = first.StudyInstanceUID
    made.SOPClassUID, made.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    made.Modality, made.SeriesInstanceUID = "RTSTRUCT", generate_uid()
    made.SeriesNumber = RTSTRUCT_NUMBER + int(first.get("SeriesNumber") or 0)
    made.SeriesDescription = "HySparK segmentation"
    made.Manufacturer, made.ManufacturerModelName = "HySparK", "hyspark"
    made.SoftwareVersions, made.DeviceSerialNumber = segments.version, segments.weights
    made.InstanceCreationDate = made.StructureSetDate = f"{now:%Y%m%d}"
    made.InstanceCreationTime = made.StructureSetTime = f"{now:%H%M%S}"
    made.OperatorsName, made.InstanceNumber = "", 1
    made.StructureSetLabel, made.ApprovalStatus = "HySparK", "UNAPPROVED"
    made.FrameOfReferenceUID, made.PositionReferenceIndicator = first.FrameOfReferenceUID, ""
    made.ReferencedFrameOfReferenceSequence = [frame_of_reference(slices)]
    boxes = find_objects(labels, max_label=len(segments.names))
    numbered = [(number, name) for number, name in enumerate(segments.names, 1) if boxes[number - 1] or not any(boxes)]
    made.StructureSetROISequence = [
        dataset(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=first.FrameOfReferenceUID,
            ROIName=name,
            ROIGenerationAlgorithm="AUTOMATIC",
            ROIGenerationDescription=f"HySparK {segments.version}, weights {segments.weights}",
        )
        for number, name in numbered
    ]
    made.ROIContourSequence = [
        dataset(ROIDisplayColor=list(segments.colours[number - 1]), ReferencedROINumber=number)
        for number, _ in numbered
    ]
    for region in made.ROIContourSequence:
        if box := boxes[region.ReferencedROINumber - 1]:
            region.ContourSequence = contours_of(labels[box] == region.ReferencedROINumber, box, slices)
    made.RTROIObservationsSequence = [
        dataset(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
        for number, _ in numbered
    ]
    return file_content(made)


def file_content(made: Dataset) -> bytes:
    """Write a data set; without VR, since with it no contour may take more than 64 kB."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = made.SOPClassUID, made.SOPInstanceUID
    meta.TransferSyntaxUID = ImplicitVRLittleEndian
    made.file_meta = meta
    made.preamble = bytes(128)
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copied values that violate the standard
        made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dataset(**values: Any) -> Dataset:
    """Make a data set of elements by name."""
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def image_reference(part: SourceSlice) -> Dataset:
    """Refer to a slice, or to a frame of a multi-frame file."""
    made = dataset(ReferencedSOPClassUID=part.data.SOPClassUID, ReferencedSOPInstanceUID=part.data.SOPInstanceUID)
    if part.header.frame is not None:
        made.ReferencedFrameNumber = part.header.frame + 1
    return made


def frame_of_reference(slices: list[SourceSlice]) -> Dataset:
    """Refer to the frame of reference of a series, with its study and all its images."""
    first = slices[0].data
    series = dataset(
        SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=[image_reference(part) for part in slices]
    )
    study = dataset(
        ReferencedSOPClassUID=STUDY_CLASS,
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return dataset(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])


def contours_of(mask: np.ndarray, box: tuple[slice, ...], slices: list[SourceSlice]) -> list[Dataset]:
    """Trace a mask `(columns, rows, slices)`, which fills a box of its series, in each slice, in mm (LPS)."""
    contours = []
    for k in np.flatnonzero(mask.any((0, 1))):
        part = slices[box[2].start + k]
        header = part.header
        assert header.plane is not None
        assert header.position is not None
        between_rows, between_columns = header.plane[2:4]
        along_row, along_column = np.array(header.plane[4:7]), np.array(header.plane[7:])
        to_mm = np.stack([along_row * between_columns, along_column * between_rows])
        for corners in mask_contours(mask[:, :, k].T):
            points = (corners + (box[0].start, box[1].start)) @ to_mm + header.position
            contours.append(
                dataset(
                    ContourImageSequence=[image_reference(part)],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[f"{value:.4f}" for value in points.ravel()],
                )
            )
    return contours
