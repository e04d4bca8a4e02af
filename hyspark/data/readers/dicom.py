"""DICOM files -> CT series, each one volume.

Files are recognised by their content, not by their name. Slices are ordered by their position along their normal
(DICOM PS3.3, C.7.6.2.1.1), not by name or number.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import UID
from tqdm import tqdm

from hyspark.utils.processes import worker_pool
from hyspark.utils.text import first_line

TAGS = (
    *("SOPInstanceUID", "Modality", "PatientID", "SeriesInstanceUID", "ImageType", "NumberOfFrames", "SamplesPerPixel"),
    *("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
    *("AcquisitionNumber", "InstanceNumber", "SliceThickness"),
)
SAME_POSITION = 0.01
"""mm along the normal within which two slices have one position."""
MAX_GAP_DEVIATION = 0.1
"""Largest deviation of a gap between slices, as a fraction of the median gap, in an even stack."""
MAX_SHIFT = 1.0
"""mm by which a slice of a straight stack may leave the line of the others."""
PARALLEL_FROM = 2000
"""Number of files from which on several processes read headers; fewer are read before these have started."""
INSTALL_DECODERS = 'pip install "pylibjpeg[all]" (or python-gdcm)'


@dataclass(frozen=True)
class Header:
    """The header of a DICOM file, as far as it is used.

    Attributes:
        path: the file.
        modality: Modality, or "no modality".
        uid: SOPInstanceUID.
        series: SeriesInstanceUID.
        patient: PatientID.
        localizer: whether the image is a localizer.
        grey_slice: whether the file holds one frame of one channel.
        plane: rows, columns, mm between rows and between columns, direction cosines of a row and of a column; None if
            missing.
        position: ImagePositionPatient in mm (LPS); None if missing.
        number: AcquisitionNumber and InstanceNumber.
        thickness: SliceThickness in mm.
    """

    path: Path
    modality: str
    uid: str
    series: str
    patient: str
    localizer: bool
    grey_slice: bool
    plane: tuple[float, ...] | None
    position: tuple[float, ...] | None
    number: tuple[int, int]
    thickness: float


@dataclass(frozen=True)
class Series:
    """CT slices that make one volume.

    Attributes:
        uid: SeriesInstanceUID.
        files: the slices, in order.
        affine: `(4, 4)`, from (column, row, slice) to mm in RAS.
        uneven: why the slices are no even stack; empty if they are one.
        notes: irregularities, for the summary.
    """

    uid: str
    files: tuple[Path, ...]
    affine: np.ndarray
    uneven: str
    notes: tuple[str, ...]


def read_headers(files: Sequence[Path], num_workers: int, progress: bool) -> Iterable[Header | str | None]:
    """Yield the result of `read_header` for each file, in their order."""
    with tqdm(total=len(files), desc="look for series", unit="file", disable=not progress) as bar:
        if num_workers == 1 or len(files) < PARALLEL_FROM:
            for file in files:
                yield read_header(file)
                bar.update()
            return
        with worker_pool(num_workers) as processes:
            for header in processes.map(read_header, files, chunksize=64):
                yield header
                bar.update()


def read_header(path: Path) -> Header | str | None:
    """Read the header of a DICOM file; return the reason in one line if it is unreadable, None if it is no DICOM."""
    try:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                return "unreadable as DICOM (its prefix DICM is missing)" if path.suffix.lower() == ".dcm" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of values that violate the standard
            return as_header(path, pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS)))
    except Exception as error:  # a damaged file may raise anything
        return f"unreadable as DICOM ({first_line(error)})"


def as_header(path: Path, data: pydicom.Dataset) -> Header:
    """Convert the elements of a header to plain values."""
    spacing, directions = data.get("PixelSpacing"), data.get("ImageOrientationPatient")
    position = data.get("ImagePositionPatient")
    plane = (data.Rows, data.Columns, *spacing, *directions) if spacing and directions else None
    return Header(
        path,
        modality=str(data.get("Modality") or "no modality"),
        uid=str(data.get("SOPInstanceUID", "")),
        series=str(data.get("SeriesInstanceUID", "")),
        patient=str(data.get("PatientID") or "").strip(" \0"),
        localizer="LOCALIZER" in (data.get("ImageType") or ()),
        grey_slice=int(data.get("NumberOfFrames") or 1) == int(data.get("SamplesPerPixel") or 1) == 1,
        plane=tuple(float(value) for value in plane) if plane else None,
        position=tuple(float(value) for value in position) if position else None,
        number=(int(data.get("AcquisitionNumber") or 0), int(data.get("InstanceNumber") or 0)),
        thickness=float(data.get("SliceThickness") or 1),
    )


def assemble_series(headers: Sequence[Header], min_slices: int) -> Series:
    """Put the slices of one series in order.

    Copies of a file, localizers, and further slices at one position are excluded, with a note.

    Args:
        headers: headers of the series' files.
        min_slices: least number of slices of a volume.

    Raises:
        ValueError: if the files are no volume, with the reason.
    """
    notes = []
    slices = [header for header in headers if not header.localizer]
    if not slices:
        raise ValueError(f"localizer ({len(headers)} images)")
    if len(slices) < len(headers):
        notes.append(f"{len(headers) - len(slices)} localizers are excluded")
    if any(not header.grey_slice for header in slices):
        raise ValueError("images of several frames or colours; convert multi-frame CT to NIfTI first, e.g. by dcm2niix")
    once = {header.uid or str(header.path): header for header in reversed(slices)}
    if len(once) < len(slices):
        notes.append(f"{len(slices) - len(once)} files are copies of other files and are excluded")
    slices = sorted(once.values(), key=lambda header: (header.number, header.path))

    check_same_plane(slices)
    by_position: dict[int, Header] = {}
    for header in slices:
        by_position.setdefault(round(along_normal(header) / SAME_POSITION), header)
    if len(by_position) < len(slices):
        notes.append(f"{len(slices) - len(by_position)} slices repeat a position and are excluded")
    if len(by_position) < min_slices:
        raise ValueError(f"{len(by_position)} slices, fewer than --min_slices {min_slices}")
    slices = [by_position[position] for position in sorted(by_position)]
    uneven = why_uneven(slices)
    files = tuple(header.path for header in slices)
    return Series(slices[0].series, files, affine_of(slices), uneven, tuple(filter(None, [*notes, uneven])))


def check_same_plane(headers: Sequence[Header]) -> None:
    """Raise ValueError unless all slices have a position in the patient, one size, one spacing and one orientation."""
    lost = [header.path.name for header in headers if header.plane is None or header.position is None]
    if lost:
        raise ValueError(f"{len(lost)} of {len(headers)} images have no position in the patient, e.g. {lost[0]}")
    grids = np.array([header.plane for header in headers])
    if not (grids[:, 2:4] > 0).all() or np.abs(np.linalg.norm(normals(grids), axis=1) - 1).max() > 0.01:
        raise ValueError("no valid pixel spacing or orientation")
    sizes = Counter(f"{rows:g} x {columns:g}" for rows, columns in grids[:, :2])
    if len(sizes) > 1:
        raise ValueError("slices of different sizes: " + ", ".join(f"{n} of {size}" for size, n in sizes.most_common()))
    if np.abs(grids[:, 2:4] / grids[0, 2:4] - 1).max() > 0.01:
        raise ValueError("slices of different pixel spacing")
    if np.abs(grids[:, 4:] - grids[0, 4:]).max() > 0.01:
        raise ValueError("slices of different orientation")


def normals(grids: np.ndarray) -> np.ndarray:
    """Compute the normals `(n, 3)`, LPS, of slices, each given as a row of `(n, 10)`, see `Header.plane`."""
    return np.cross(grids[:, 4:7], grids[:, 7:10])


def along_normal(header: Header) -> float:
    """Compute the position of a slice along the normal of its image plane, in mm."""
    return float(normals(np.array([header.plane]))[0] @ header.position)


def why_uneven(headers: Sequence[Header]) -> str:
    """Explain why ordered slices are no even stack: missing slices, changing gaps, shifts; empty if they are one."""
    if len(headers) < 3:
        return ""
    where = np.array([along_normal(header) for header in headers])
    positions = np.array([header.position for header in headers])
    steps = np.diff(where)
    usual = float(np.median(steps))
    missing = int((np.rint(steps / usual) - 1).clip(0).sum())
    if missing and (np.abs(steps / usual - np.rint(steps / usual)) <= MAX_GAP_DEVIATION).all():
        return f"{missing} slices are missing: gaps are {usual:.4g} mm, but up to {steps.max():.4g} mm"
    if np.abs(steps - usual).max() > MAX_GAP_DEVIATION * usual:
        return f"slices lie from {steps.min():.4g} to {steps.max():.4g} mm apart"
    line = positions[0] + np.outer((where - where[0]) / (where[-1] - where[0]), positions[-1] - positions[0])
    shift = np.linalg.norm(positions - line, axis=1).max()
    return f"slices are shifted against each other by up to {shift:.4g} mm" if shift > MAX_SHIFT else ""


def affine_of(headers: Sequence[Header]) -> np.ndarray:
    """Compute the affine `(4, 4)` of ordered slices, from (column, row, slice) to mm in RAS."""
    plane = np.array(headers[0].plane)
    first, last = np.array(headers[0].position), np.array(headers[-1].position)
    step = (last - first) / (len(headers) - 1) if len(headers) > 1 else normals(plane[None])[0] * headers[0].thickness
    affine = np.eye(4)
    affine[:3] = np.column_stack([plane[4:7] * plane[3], plane[7:10] * plane[2], step, first])
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS


def read_series(series: Series) -> np.ndarray:
    """Read Hounsfield units `(columns, rows, slices)`: int16, or float32 if they are not whole numbers.

    Raises:
        ValueError: if a file is damaged, or no decoder of its compression is installed; the message names the file.
    """
    return np.stack([read_slice(path) for path in series.files]).transpose(2, 1, 0)


def read_slice(path: Path) -> np.ndarray:
    """Read the Hounsfield units `(rows, columns)` of a slice, int16 or float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = pydicom.dcmread(path)
            syntax = data.file_meta.TransferSyntaxUID
        except Exception as error:
            raise ValueError(f"{path.name}: unreadable as DICOM ({first_line(error)})") from error
        if not decodable(syntax):
            raise ValueError(
                f"{path.name}: compressed as {syntax.name}, for which no decoder is installed: {INSTALL_DECODERS}"
            )
        try:
            values: Any = np.asarray(apply_modality_lut(data.pixel_array, data))
        except Exception as error:
            raise ValueError(f"{path.name}: unreadable pixels ({first_line(error)})") from error
        whole = values.astype(np.int16)
    return whole if np.array_equal(whole, values) else values.astype(np.float32)


def decodable(syntax: UID) -> bool:
    """Return whether an installed decoder reads pixels of a transfer syntax."""
    if not syntax.is_compressed:
        return True
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False
