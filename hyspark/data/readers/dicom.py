"""DICOM files -> their headers, one for each slice.

Files are recognised by their content, not by their name. A multi-frame file has one header for each frame.
"""

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)
from pydicom.valuerep import VR
from tqdm import tqdm

from hyspark.utils.processes import KILLED, map_unordered
from hyspark.utils.text import first_line

MARKS = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase"),
    *("TriggerTime", "EchoNumbers", "ImageType", "ConvolutionKernel", "FilterType", "KVP", "StackID", "SliceThickness"),
    *("ContrastBolusAgent", "FrameOfReferenceUID", "IrradiationEventUID", "SeriesNumber", "SeriesDescription"),
    *("ProtocolName", "ScanOptions", "PatientPosition", "ReconstructionDiameter", "ReconstructionMethod", "EchoTime"),
    *("StudyInstanceUID", "ImageComments"),
)
"""Elements that may differ between the scans of a series, the most specific first."""
TIMES = ("AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime", "ContentDate", "ContentTime")
FRAME_NAMES = {
    "FrameType": "ImageType",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
}
"""Names of elements of a frame, with their names in a file of one slice."""
FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "PatientID", "SeriesInstanceUID", "NumberOfFrames"),
    *("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient"),
    *("ImageOrientationPatient", "InstanceNumber", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("ModalityLUTSequence", *MARKS, *TIMES, *FRAME_GROUPS),
)
SEVERAL_FRAMES = "images of several frames without functional groups; convert them to NIfTI, e.g. by dcm2niix"
CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
"""Endings of names that promise DICOM."""
FIRST_GROUPS, MAX_FIRST_LENGTH = (2, 8), 128
"""Groups and largest length in bytes of the first element of a file without preamble."""
PARALLEL_FROM, CHUNK = 2000, 64
"""Number of files from which on several processes read headers; fewer are read before these have started."""


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
        localizer: whether the image is a localizer.
        fault: why the image is no grey slice; empty if it is one.
        plane: rows, columns, mm between rows and between columns, direction cosines of a row and of a column; None if
            missing or no numbers.
        position: ImagePositionPatient in mm (LPS); None if missing or no numbers.
        is_placed: whether position and directions are given, and the pixel spacing alone may be missing.
        number: InstanceNumber; None if missing.
        thickness: SliceThickness in mm.
        rescale: RescaleSlope and RescaleIntercept, 1 and 0 where only the other is given; None if both are missing.
        has_table: whether a look-up table gives the values instead of slope and intercept.
        unit: RescaleType, empty if missing.
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
    localizer: bool
    fault: str
    plane: tuple[float, ...] | None
    position: tuple[float, ...] | None
    is_placed: bool
    number: int | None
    thickness: float
    rescale: tuple[float, float] | None
    has_table: bool
    unit: str
    inverted: bool
    marks: tuple[str, ...]
    acquired: str
    created: str

    @property
    def name(self) -> str:
        """Name of the file, with the frame in a multi-frame file."""
        return self.path.name if self.frame is None else f"{self.path.name}, frame {self.frame + 1}"


ReadHeader = tuple[Header, ...] | str | None
"""The header of each slice of a file, the reason why it is unreadable, or None for a file that is no DICOM."""


def read_headers(files: Sequence[Path], num_workers: int, progress: bool) -> list[ReadHeader]:
    """Return the result of `read_header` for each file; a killed process costs its file alone."""
    num_workers = num_workers if len(files) >= PARALLEL_FROM else 1
    found: dict[Path, ReadHeader] = {}
    with tqdm(total=len(files), desc="look for series", unit="file", disable=not progress) as bar:
        for size in (CHUNK, 1):  # files of a chunk whose process was killed are read again one by one
            left = [file for file in files if file not in found]
            jobs = [(left[start : start + size],) for start in range(0, len(left), size)]
            for read in map_unordered(read_chunk, jobs, num_workers, killed_chunk):
                found |= read
                bar.update(len(read))
    return [found[file] for file in files]


def read_chunk(files: Sequence[Path]) -> dict[Path, ReadHeader]:
    """Return the result of `read_header` by file."""
    return {file: read_header(file) for file in files}


def killed_chunk(files: Sequence[Path]) -> dict[Path, ReadHeader]:
    """Return the result for files whose process was killed: none unless it is one file alone."""
    return {files[0]: KILLED} if len(files) == 1 else {}


def read_header(path: Path) -> ReadHeader:
    """Read the header of each slice of a DICOM file.

    Returns:
        The headers; the reason in one line if the file is unreadable; None if it is no DICOM.
    """
    promised = path.suffix.lower() in DICOM_ENDINGS
    try:
        if not is_dicom(path):
            found = "neither its prefix DICM nor a first element" if path.stat().st_size else "an empty file"
            return f"unreadable as DICOM (expected a header, found {found})" if promised else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of values that violate the standard
            data = open_dicom(path, stop_before_pixels=True, specific_tags=list(TAGS))
            return tuple(headers_of(path, data))
    except Exception as error:  # a damaged file may raise anything
        return f"unreadable as DICOM ({first_line(error)})"


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM: with the prefix after its preamble, or with a plausible first element."""
    with path.open("rb") as file:
        first = file.read(132)
    if first[128:] == b"DICM":
        return True
    if len(first) < 16:
        return False
    for order in ("little", "big"):
        group = int.from_bytes(first[:2], order)
        is_explicit = first[4:6].decode("latin-1") in VR.__members__
        length = int.from_bytes(first[6:8] if is_explicit else first[4:8], order)
        # Without preamble and VR, files are little-endian and hold no file meta group.
        can_begin = group in FIRST_GROUPS if is_explicit else order == "little" and group == FIRST_GROUPS[1]
        if can_begin and length <= MAX_FIRST_LENGTH:
            return True
    return False


class BoundedFile(io.BufferedReader):
    """A file of which no read takes more memory than it has bytes, whatever length a damaged element states."""

    def read(self, size: int | None = -1) -> bytes:
        """Read at most `size` bytes."""
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, os.fstat(self.fileno()).st_size)
        return super().read(size)


def open_dicom(path: Path, **options: Any) -> pydicom.FileDataset:
    """Read a DICOM file, with or without preamble and file meta group; fill in a missing transfer syntax.

    Args:
        path: the file.
        options: options of `pydicom.dcmread`.
    """
    with BoundedFile(io.FileIO(path)) as file:
        data = pydicom.dcmread(file, force=True, **options)
    if getattr(data, "file_meta", None) is None:
        data.file_meta = FileMetaDataset()
    if not data.file_meta.get("TransferSyntaxUID"):
        is_implicit, is_little = data.original_encoding
        explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return data


def headers_of(path: Path, data: pydicom.FileDataset) -> Iterator[Header]:
    """Yield the header of each slice of a file that is read.

    Raises:
        ValueError: if the elements of an image are missing.
    """
    in_meta = data.file_meta.get("MediaStorageSOPClassUID")  # whole in a file that is cut short
    kind = UID(str(in_meta or data.get("SOPClassUID") or ""))
    modality = str(data.get("Modality") or "")
    if kind == MediaStorageDirectoryStorage:
        modality = "DICOMDIR"
    elif not modality and kind in CT_CLASSES:
        modality = "CT"
    elif not modality and not data.get("SOPClassUID"):
        raise ValueError("neither Modality nor SOPClassUID; is the file cut short?")
    if modality == "CT" and "Rows" not in data:
        if kind in CT_CLASSES or not kind:
            raise ValueError("no Rows; is the file cut short?")
        modality = f"CT without image ({kind.name})"
    num_frames = int(data.get("NumberOfFrames") or 1)
    groups = data.get(FRAME_GROUPS[1]) or ()
    if modality != "CT" or not groups:
        yield as_header(path, None, modality, data, SEVERAL_FRAMES if num_frames != 1 else "")
        return
    if len(groups) != num_frames:
        raise ValueError(f"NumberOfFrames is {num_frames}, but {len(groups)} frames are described")
    shared = data.get(FRAME_GROUPS[0]) or ()
    plain = pydicom.Dataset({element.tag: element for element in data if element.keyword not in FRAME_GROUPS})
    for frame, group in enumerate(groups):
        merged = pydicom.Dataset(plain)
        for item in (*shared, group):
            take_elements(item, merged)
        yield as_header(path, frame, modality, merged, "")


def take_elements(group: pydicom.Dataset, merged: pydicom.Dataset) -> None:
    """Copy the elements of a frame's functional groups to the level of a file of one slice."""
    for sequence in group:
        for element in sequence.value[0] if sequence.VR == "SQ" and sequence.value else ():
            name = FRAME_NAMES.get(element.keyword, element.keyword)
            if name in TAGS:
                setattr(merged, name, element.value)


def as_header(path: Path, frame: int | None, modality: str, data: pydicom.Dataset, fault: str) -> Header:
    """Convert the elements of a header to plain values."""
    colours = str(data.get("PhotometricInterpretation") or "")
    if not fault and (int(data.get("SamplesPerPixel") or 1) != 1 or colours.startswith("PALETTE")):
        fault = "colour images"
    sizes, position = numbers([data.get("Rows"), data.get("Columns")], 2), numbers(data.get("ImagePositionPatient"), 3)
    spacing, directions = numbers(data.get("PixelSpacing"), 2), numbers(data.get("ImageOrientationPatient"), 6)
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    number = data.get("InstanceNumber")
    texts = {name: as_text(data.get(name)) for name in (*MARKS, *TIMES)}
    acquired = texts["AcquisitionTime"] and texts["AcquisitionDate"] + texts["AcquisitionTime"]
    return Header(
        path,
        frame,
        modality=modality or "no modality",
        uid=str(data.get("SOPInstanceUID", "")),
        series=str(data.get("SeriesInstanceUID", "")),
        patient=str(data.get("PatientID") or "").strip(" \0"),
        localizer="LOCALIZER" in (data.get("ImageType") or ()),
        fault=fault,
        plane=(*sizes, *spacing, *directions) if sizes and spacing and directions else None,
        position=position,
        is_placed=bool(position and directions),
        number=None if number is None else int(number),
        thickness=(numbers([data.get("SliceThickness")], 1) or (1.0,))[0] or 1.0,
        rescale=None if slope is None and intercept is None else (as_number(slope, 1.0), as_number(intercept, 0.0)),
        has_table=bool(data.get("ModalityLUTSequence")),
        unit=str(data.get("RescaleType") or "").strip().upper(),
        inverted=colours == "MONOCHROME1",
        marks=tuple(texts[name] for name in MARKS),
        acquired=texts["AcquisitionDateTime"] or acquired,
        created=texts["ContentTime"] and texts["ContentDate"] + texts["ContentTime"],
    )


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
