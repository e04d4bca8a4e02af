"""Elements of a DICOM file that are read, and the header of a slice with their values as plain numbers and texts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom

from hyspark.utils.private_text import private

MARKS = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase"),
    *("TriggerTime", "EchoNumbers", "ImageType", "ConvolutionKernel", "FilterType", "KVP", "StackID", "SliceThickness"),
    *("ContrastBolusAgent", "FrameOfReferenceUID", "IrradiationEventUID", "SeriesNumber", "SeriesDescription"),
    *("ProtocolName", "ScanOptions", "PatientPosition", "ReconstructionDiameter", "ReconstructionMethod", "EchoTime"),
    *("StudyInstanceUID", "ImageComments", "DiffusionBValue", "SequenceName", "InversionTime", "EffectiveEchoTime"),
    *("InversionTimes", "ComplexImageComponent", "FlipAngle", "RepetitionTime", "FrameReferenceTime"),
    *("DiffusionDirectionality", "DiffusionGradientOrientation", "TemporalPositionTimeOffset"),
)
"""Elements that may differ between the scans of a series, the most specific first; behind ImageComments those of MR."""
FREE_TEXTS = ("SeriesDescription", "ProtocolName", "ImageComments", "ContrastBolusAgent", "ScanOptions", "SequenceName")
"""Elements of MARKS in which people write, perhaps a name."""
TIMES = ("AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime", "ContentDate", "ContentTime")
FRAME_NAMES = {
    "FrameType": "ImageType",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
}
"""Names of elements of a frame, with their names in a file of one slice."""
FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
B_VALUES = {0x0019100C: "SIEMENS MR HEADER", 0x00431039: "GEMS_PARM_01", 0x20011003: "Philips Imaging DD 001"}
"""Private elements of the b-value of diffusion, with their creators."""


def creator_tag(tag: int) -> int:
    """Return the tag of the element that names the creator of a private element's block."""
    return (tag & 0xFFFF0000) | (tag >> 8 & 0xFF)


TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "NumberOfFrames"),
    *("PatientID", "PatientName", "PatientBirthDate"),
    *("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient"),
    *("ImageOrientationPatient", "InstanceNumber", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("ModalityLUTSequence", "Units", "BurnedInAnnotation", *MARKS, *TIMES, *FRAME_GROUPS),
    *(tag for found in B_VALUES for tag in (found, creator_tag(found))),
)


@dataclass(frozen=True)
class Header:
    """The header of a slice, as far as it is used.

    Attributes:
        path: the file.
        frame: index of the frame in a multi-frame file; None in a file of one slice.
        modality: Modality, "DICOMDIR", or "no modality".
        uid: SOPInstanceUID.
        series: SeriesInstanceUID.
        patient: PatientID.
        person: PatientName and PatientBirthDate in small letters; empty unless both are given.
        localizer: whether the image is a localizer.
        fault: why the image is no grey slice; empty if it is one.
        plane: rows, columns, mm between rows and between columns, direction cosines of a row and of a column; None if
            missing or no numbers.
        position: ImagePositionPatient in mm (LPS); None if missing or no numbers.
        is_placed: whether position and directions are given, and the pixel spacing alone may be missing.
        number: InstanceNumber; None if missing.
        thickness: SliceThickness in mm.
        rescale: RescaleSlope and RescaleIntercept, 1 and 0 where only the other is given; None if both are missing.
        lacks: the one of both that is missing; empty if none or both are.
        has_table: whether a look-up table gives the values instead of slope and intercept.
        unit: RescaleType, or Units of PET; empty if missing.
        burned_in: whether the pixels hold text, perhaps a name (BurnedInAnnotation).
        inverted: whether the image is displayed inverted (MONOCHROME1).
        marks: values of MARKS, in their order; empty where missing.
        acquired: date and time of the acquisition; empty if missing.
        created: date and time of the image; empty if missing.
    """

    path: Path
    frame: int | None
    modality: str
    uid: str
    series: str
    patient: str
    person: str
    localizer: bool
    fault: str
    plane: tuple[float, ...] | None
    position: tuple[float, ...] | None
    is_placed: bool
    number: int | None
    thickness: float
    rescale: tuple[float, float] | None
    lacks: str
    has_table: bool
    unit: str
    burned_in: bool
    inverted: bool
    marks: tuple[str, ...]
    acquired: str
    created: str

    @property
    def name(self) -> str:
        """Name of the file, with the frame in a multi-frame file; private."""
        return private(self.path.name if self.frame is None else f"{self.path.name}, frame {self.frame + 1}")

    def mark(self, name: str) -> str:
        """Return the value of an element of MARKS; empty if missing."""
        return self.marks[MARKS.index(name)]

    @property
    def is_derived(self) -> bool:
        """Whether the image was made from others after the scan, as reformatted ones are (ImageType)."""
        return self.mark("ImageType").upper().split("\\")[:2] == ["DERIVED", "SECONDARY"]


def as_header(path: Path, frame: int | None, modality: str, data: pydicom.Dataset, fault: str) -> Header:
    """Convert the elements of a header to plain values."""
    colours = str(data.get("PhotometricInterpretation") or "")
    if not fault and (int(data.get("SamplesPerPixel") or 1) != 1 or colours.startswith("PALETTE")):
        fault = "colour images"
    if not fault and "MOSAIC" in (data.get("ImageType") or ()):
        fault = "mosaics of several slices; convert them to NIfTI, e.g. by dcm2niix"
    sizes, position = numbers([data.get("Rows"), data.get("Columns")], 2), numbers(data.get("ImagePositionPatient"), 3)
    spacing, directions = numbers(data.get("PixelSpacing"), 2), numbers(data.get("ImageOrientationPatient"), 6)
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    number = data.get("InstanceNumber")
    texts = {name: as_text(data.get(name)) for name in (*MARKS, *TIMES)}
    texts["DiffusionBValue"] = texts["DiffusionBValue"] or private_b_value(data)
    acquired = texts["AcquisitionTime"] and texts["AcquisitionDate"] + texts["AcquisitionTime"]
    return Header(
        path,
        frame,
        modality=modality or "no modality",
        uid=str(data.get("SOPInstanceUID", "")),
        series=str(data.get("SeriesInstanceUID", "")),
        patient=str(data.get("PatientID") or "").strip(" \0"),
        person=person_of(data),
        localizer="LOCALIZER" in (data.get("ImageType") or ()),
        fault=fault,
        plane=(*sizes, *spacing, *directions) if sizes and spacing and directions else None,
        position=position,
        is_placed=bool(position and directions),
        number=None if number is None else int(number),
        thickness=(numbers([data.get("SliceThickness")], 1) or (1.0,))[0] or 1.0,
        rescale=None if slope is None and intercept is None else (as_number(slope, 1.0), as_number(intercept, 0.0)),
        lacks="" if (slope is None) == (intercept is None) else f"Rescale{'Slope' if slope is None else 'Intercept'}",
        has_table=bool(data.get("ModalityLUTSequence")),
        unit=str(data.get("Units" if modality == "PT" else "RescaleType") or "").strip().upper(),
        burned_in=str(data.get("BurnedInAnnotation") or "").strip().upper() == "YES",
        inverted=colours == "MONOCHROME1",
        marks=tuple(texts[name] for name in MARKS),
        acquired=texts["AcquisitionDateTime"] or acquired,
        created=texts["ContentTime"] and texts["ContentDate"] + texts["ContentTime"],
    )


def person_of(data: pydicom.Dataset) -> str:
    """Return a patient's name and birth date in small letters; empty unless both are given."""
    name, born = (str(data.get(element) or "").strip(" ^=\0") for element in ("PatientName", "PatientBirthDate"))
    return f"{name.casefold()}, {born}" if name and born else ""


def private_b_value(data: pydicom.Dataset) -> str:
    """Return the b-value in a manufacturer's private element; empty without one."""
    for tag, creator in B_VALUES.items():
        owner = data.get(creator_tag(tag))
        if tag in data and owner is not None and owner.value == creator:
            value = data[tag].value
            return as_text(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
    return ""


def as_number(value: Any, default: float) -> float:
    """Convert an element's value to a finite number, an empty one to the default."""
    number = default if value is None or value == "" else float(value)
    if not math.isfinite(number):
        raise ValueError(f"RescaleSlope and RescaleIntercept: expected numbers, got {value}")
    return number


def numbers(values: Any, count: int) -> tuple[float, ...] | None:
    """Convert an element's values to `count` finite numbers; None if they are not."""
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def as_text(value: Any) -> str:
    """Convert an element's value to text, an empty one to an empty text."""
    if value is None:
        return ""
    return "\\".join(map(str, value)) if isinstance(value, list | pydicom.multival.MultiValue) else str(value).strip()
