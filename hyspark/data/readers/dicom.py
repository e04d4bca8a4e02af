"""DICOM files -> CT series, each one volume.

What a file is, its content says, not its name. The slices of a series are ordered by where they lie along the normal of
their plane (DICOM PS3.3, C.7.6.2.1.1), not by name or number.
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

from hyspark.utils.processes import pool

TAGS = (
    *("SOPInstanceUID", "Modality", "PatientID", "SeriesInstanceUID", "ImageType", "NumberOfFrames", "SamplesPerPixel"),
    *("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
    *("AcquisitionNumber", "InstanceNumber", "SliceThickness"),
)
SAME_PLACE = 0.01
"""mm along the normal by which two slices of one place may differ."""
UNEVEN = 0.1
"""Share of the usual distance between slices by which one may differ and still count as even."""
ASIDE = 1.0
"""mm by which a slice may leave the line of the others and still lie on it."""
MANY = 2000
"""Files from which on several processes read headers; fewer are read before these have started."""
DECODERS = 'pip install "pylibjpeg[all]" (or python-gdcm)'


@dataclass(frozen=True)
class Header:
    """What a DICOM file says of itself. plane: rows, columns, mm between rows and between columns, direction cosines of
    a row and of a column; None, like the position (mm, LPS), where it does not say.
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
    """CT slices that make one volume, in order. affine: (4, 4), from (column, row, slice) to mm in RAS. uneven: why the
    slices are no even stack, if they are not. notes: what is odd and was seen to.
    """

    uid: str
    files: tuple[Path, ...]
    affine: np.ndarray
    uneven: str
    notes: tuple[str, ...]


def read_headers(files: Sequence[Path], num_workers: int, progress: bool) -> Iterable[Header | str | None]:
    """What `read_header` says of each file, in their order."""
    with tqdm(total=len(files), desc="look for series", unit="file", disable=not progress) as bar:
        if num_workers == 1 or len(files) < MANY:
            for file in files:
                yield read_header(file)
                bar.update()
            return
        with pool(num_workers) as processes:
            for header in processes.map(read_header, files, chunksize=64):
                yield header
                bar.update()


def read_header(path: Path) -> Header | str | None:
    """The header of a DICOM file; why it cannot be read, in one line; None for a file that is no DICOM."""
    try:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                return "not readable as DICOM (its mark, DICM, is missing)" if path.suffix.lower() == ".dcm" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of values that break the standard
            return as_header(path, pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS)))
    except Exception as error:  # a damaged file may raise anything
        return f"not readable as DICOM ({first_line(error)})"


def as_header(path: Path, data: pydicom.Dataset) -> Header:
    """The values of a header as plain ones."""
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


def assemble(headers: Sequence[Header], min_slices: int) -> Series:
    """The slices of one series, in order from one end to the other; raises ValueError for what is no volume, with why.

    min_slices: fewer are none. Files that come twice, localizers among slices, and further slices at one place are left
    out, with a note.
    """
    notes = []
    slices = [header for header in headers if not header.localizer]
    if not slices:
        raise ValueError(f"localizer ({len(headers)} images)")
    if len(slices) < len(headers):
        notes.append(f"{len(headers) - len(slices)} localizers are left out")
    if any(not header.grey_slice for header in slices):
        raise ValueError("images of several frames or colours; convert multi-frame CT to NIfTI first, e.g. by dcm2niix")
    once = {header.uid or str(header.path): header for header in reversed(slices)}
    if len(once) < len(slices):
        notes.append(f"{len(slices) - len(once)} files are copies of others and are left out")
    slices = sorted(once.values(), key=lambda header: (header.number, header.path))

    same_plane(slices)
    places: dict[int, Header] = {}
    for header in slices:
        places.setdefault(round(along_normal(header) / SAME_PLACE), header)
    if len(places) < len(slices):
        notes.append(f"{len(slices) - len(places)} slices repeat a position and are left out")
    if len(places) < min_slices:
        raise ValueError(f"{len(places)} slices, fewer than --min_slices {min_slices}")
    slices = [places[place] for place in sorted(places)]
    uneven = why_uneven(slices)
    files = tuple(header.path for header in slices)
    return Series(slices[0].series, files, affine_of(slices), uneven, tuple(filter(None, [*notes, uneven])))


def same_plane(headers: Sequence[Header]) -> None:
    """Raises ValueError unless all slices have a place in the patient, one size, one spacing and one orientation."""
    lost = [header.path.name for header in headers if header.plane is None or header.position is None]
    if lost:
        raise ValueError(f"{len(lost)} of {len(headers)} images give no place in the patient, e.g. {lost[0]}")
    planes = np.array([header.plane for header in headers])
    if not (planes[:, 2:4] > 0).all() or np.abs(np.linalg.norm(normals(planes), axis=1) - 1).max() > 0.01:
        raise ValueError("no valid pixel spacing or orientation")
    sizes = Counter(f"{rows:g} x {columns:g}" for rows, columns in planes[:, :2])
    if len(sizes) > 1:
        raise ValueError("slices of different sizes: " + ", ".join(f"{n} of {size}" for size, n in sizes.most_common()))
    if np.abs(planes[:, 2:4] / planes[0, 2:4] - 1).max() > 0.01:
        raise ValueError("slices of different pixel spacing")
    if np.abs(planes[:, 4:] - planes[0, 4:]).max() > 0.01:
        raise ValueError("slices of different orientation")


def normals(planes: np.ndarray) -> np.ndarray:
    """Normals (n, 3), LPS, of planes (n, 10)."""
    return np.cross(planes[:, 4:7], planes[:, 7:10])


def along_normal(header: Header) -> float:
    """Where a slice lies along the normal of its plane, in mm."""
    return float(normals(np.array([header.plane]))[0] @ header.position)


def why_uneven(headers: Sequence[Header]) -> str:
    """What keeps ordered slices from being an even stack: missing ones, changing distances, shifts; nothing if none."""
    if len(headers) < 3:
        return ""
    where = np.array([along_normal(header) for header in headers])
    positions = np.array([header.position for header in headers])
    steps = np.diff(where)
    usual = float(np.median(steps))
    missing = int((np.rint(steps / usual) - 1).clip(0).sum())
    if missing and (np.abs(steps / usual - np.rint(steps / usual)) <= UNEVEN).all():
        return f"{missing} slices are missing: they lie {usual:.4g} mm apart, but up to {steps.max():.4g} mm in places"
    if np.abs(steps - usual).max() > UNEVEN * usual:
        return f"slices lie from {steps.min():.4g} to {steps.max():.4g} mm apart"
    line = positions[0] + np.outer((where - where[0]) / (where[-1] - where[0]), positions[-1] - positions[0])
    shift = np.linalg.norm(positions - line, axis=1).max()
    return f"slices are shifted against each other by up to {shift:.4g} mm" if shift > ASIDE else ""


def affine_of(headers: Sequence[Header]) -> np.ndarray:
    """Affine (4, 4) from (column, row, slice) to mm in RAS, of ordered slices."""
    plane = np.array(headers[0].plane)
    first, last = np.array(headers[0].position), np.array(headers[-1].position)
    step = (last - first) / (len(headers) - 1) if len(headers) > 1 else normals(plane[None])[0] * headers[0].thickness
    affine = np.eye(4)
    affine[:3] = np.column_stack([plane[4:7] * plane[3], plane[7:10] * plane[2], step, first])
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS


def read_series(series: Series) -> np.ndarray:
    """Hounsfield units (columns, rows, slices), int16, or float32 where they are not whole numbers.

    Raises ValueError, with the file, for one that is damaged or whose compression nothing here can undo.
    """
    return np.stack([read_slice(path) for path in series.files]).transpose(2, 1, 0)


def read_slice(path: Path) -> np.ndarray:
    """Hounsfield units (rows, columns) of a slice, int16 or float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = pydicom.dcmread(path)
            syntax = data.file_meta.TransferSyntaxUID
        except Exception as error:
            raise ValueError(f"{path.name}: not readable as DICOM ({first_line(error)})") from error
        if not decodable(syntax):
            raise ValueError(f"{path.name}: compressed as {syntax.name}, for which no decoder is installed: {DECODERS}")
        try:
            values: Any = np.asarray(apply_modality_lut(data.pixel_array, data))
        except Exception as error:
            raise ValueError(f"{path.name}: its pixels cannot be read ({first_line(error)})") from error
        whole = values.astype(np.int16)
    return whole if np.array_equal(whole, values) else values.astype(np.float32)


def decodable(syntax: UID) -> bool:
    """Whether what is installed can read pixels of a transfer syntax."""
    if not syntax.is_compressed:
        return True
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
