"""DICOM files -> their headers, one for each slice.

Files are recognised by their content, not by their name. A multi-frame file has one header for each frame.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)
from tqdm import tqdm

from hyspark.data.readers.elements import FRAME_GROUPS, FRAME_NAMES, TAGS, Header, as_header
from hyspark.utils.file_content import DICOM_ENDINGS, DICOM_HEAD, begins_as_dicom
from hyspark.utils.private_text import private
from hyspark.utils.processes import KILLED, map_unordered
from hyspark.utils.text import first_line

SEVERAL_FRAMES = "images of several frames without functional groups; convert them to NIfTI, e.g. by dcm2niix"
IMAGE_CLASSES = {
    **dict.fromkeys((CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage), "CT"),
    **dict.fromkeys((MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage), "MR"),
    PositronEmissionTomographyImageStorage: "PT",
    **dict.fromkeys((EnhancedPETImageStorage, LegacyConvertedEnhancedPETImageStorage), "PT"),
}
"""Classes of slices that make volumes, with their modality."""
MODALITIES = ("CT", "MR", "PT")
"""Modalities of volumes."""
PARALLEL_FROM, CHUNK = 2000, 64
"""Number of files from which on several processes read headers; fewer are read before these have started."""

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
        return f"unreadable as DICOM ({private(first_line(error))})"


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM."""
    with path.open("rb") as file:
        return begins_as_dicom(file.read(DICOM_HEAD))


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
    elif not modality and kind in IMAGE_CLASSES:
        modality = IMAGE_CLASSES[kind]
    elif not modality and not data.get("SOPClassUID"):
        raise ValueError("neither Modality nor SOPClassUID; is the file cut short?")
    fault = ""
    if modality in MODALITIES and "Rows" not in data:
        fault = "no Rows; is the file cut short?"
        if kind and kind not in IMAGE_CLASSES:
            modality = f"{modality} without image ({kind.name})"
        elif modality == "CT":
            raise ValueError(fault)
    num_frames = int(data.get("NumberOfFrames") or 1)
    groups = data.get(FRAME_GROUPS[1]) or ()
    if modality not in MODALITIES or not groups:
        yield as_header(path, None, modality, data, fault or (SEVERAL_FRAMES if num_frames != 1 else ""))
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
