"""The slices of a series with all elements of their files, which objects that belong to the series need."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import pydicom

from hyspark.data.readers.dicom import headers_of, open_dicom
from hyspark.data.readers.elements import Header
from hyspark.data.readers.series import Series


@dataclass(frozen=True)
class SourceSlice:
    """A slice of the series.

    Attributes:
        data: elements of its file, without pixels.
        header: its header.
    """

    data: pydicom.FileDataset
    header: Header


def read_slices(series: Series) -> list[SourceSlice]:
    """Read the elements of the slices of a series, in the series' order."""
    headers: dict[tuple[Path, int | None], Header] = {}
    files: dict[Path, pydicom.FileDataset] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of values that violate the standard
        for path in series.files:
            files[path] = open_dicom(path, stop_before_pixels=True)
            headers |= {(path, header.frame): header for header in headers_of(path, files[path])}
    return [SourceSlice(files[part.path], headers[part.path, part.frame]) for part in series.slices]
