"""RTSTRUCT and DICOM-SEG files as other programs write them."""

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import RTStructureSetStorage, generate_uid

from tests.data.readers.dicom_files import write_dicom

highdicom = pytest.importorskip("highdicom", reason="highdicom is not installed: pip install 'hyspark[dicom]'")


def item(**values):
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return data


def write_rtstruct(path: Path, slices, structures, *, refers="images", **values) -> None:
    """structures: names with contours, each a list of points (n, 3) in mm, or a pair of a type and such points.

    refers: "images", "series", or "frame" of the slices alone.
    """
    first = slices[0]
    images = [item(ReferencedSOPClassUID=s.SOPClassUID, ReferencedSOPInstanceUID=s.SOPInstanceUID) for s in slices]
    series = item(SeriesInstanceUID=first.SeriesInstanceUID)
    if refers == "images":
        series.ContourImageSequence = images
    frame = item(FrameOfReferenceUID=first.FrameOfReferenceUID)
    if refers != "frame":
        frame.RTReferencedStudySequence = [item(RTReferencedSeriesSequence=[series])]
    numbered = list(enumerate(structures.items(), 3))  # numbers are names, not indices
    regions = []
    for number, (_, contours) in numbered:
        region = item(ReferencedROINumber=number)
        region.ContourSequence = [
            item(
                ContourGeometricType=contour[0] if isinstance(contour[0], str) else "CLOSED_PLANAR",
                ContourData=[f"{x:.5f}" for x in np.ravel(contour[1] if isinstance(contour[0], str) else contour)],
            )
            for contour in contours
        ]
        regions.append(region)
    write_dicom(
        path,
        **{
            "Modality": "RTSTRUCT",
            "PatientID": first.PatientID,
            "SOPClassUID": RTStructureSetStorage,
            "SeriesInstanceUID": generate_uid(),
            "StructureSetDate": "20240101",
            "ReferencedFrameOfReferenceSequence": [frame],
            "StructureSetROISequence": [item(ROINumber=number, ROIName=name) for number, (name, _) in numbered],
            "ROIContourSequence": regions,
            **values,
        },
    )


def write_seg(path: Path, slices, pixels, names, kind="BINARY", **options) -> None:
    """pixels: (frame, row, column) of segment numbers, or with a last axis of segments."""
    descriptions = [
        highdicom.seg.SegmentDescription(
            number, name, codes.SCT.Tissue, codes.SCT.Tissue, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for number, name in enumerate(names, 1)
    ]
    made = highdicom.seg.Segmentation(
        slices,
        pixels,
        kind,
        descriptions,
        generate_uid(),
        1,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "2",
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path)
