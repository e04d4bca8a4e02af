"""Pixels of DICOM slices -> their values: Hounsfield units of CT."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import UID

from hyspark.data.readers.dicom import open_dicom
from hyspark.data.readers.elements import Header
from hyspark.utils.install import install_command
from hyspark.utils.private_text import PrivateError, private
from hyspark.utils.text import first_line

MAX_EDGE = 16384
"""Largest number of rows and of columns of a slice; more are taken for damage."""
AIR, LEAST_AIR = (-1024, 0), 0.01
"""Range of HU that stored values without scaling rarely reach, and least fraction of voxels in it of an image in HU."""


class Slice(NamedTuple):
    """Where the pixels of a slice are.

    Attributes:
        path: the file.
        frame: index of the frame in a multi-frame file; None in a file of one slice.
        rescale: slope and intercept; None if the file states none.
        uid: SOPInstanceUID.
    """

    path: Path
    frame: int | None
    rescale: tuple[float, float] | None
    uid: str = ""


def read_series(slices: Sequence[Slice]) -> np.ndarray:
    """Read the values `(columns, rows, slices)`, HU of CT: int16, or float32 if they are not whole numbers.

    Raises:
        PrivateError: if a file is damaged, or no decoder of its compression is installed.
    """
    read = []
    stored: tuple[Path, np.ndarray, pydicom.FileDataset] | None = None
    for part in slices:
        if part.frame is None:
            pixels, data = stored_pixels(part.path)
            if pixels.ndim != 2:
                raise PrivateError(
                    f"{private(part.path.name)}: expected one grey slice, got pixels of shape {pixels.shape}"
                )
        else:
            if stored is None or stored[0] != part.path:
                stored = (part.path, *stored_pixels(part.path))  # one file at a time is in memory
            pixels, data = stored[1][part.frame], stored[2]
        read.append(smallest_type(modality_values(pixels, part, data)))
    try:
        voxels = np.stack(read).transpose(2, 1, 0)
    except ValueError as error:
        name = private(slices[0].path.name)
        raise PrivateError(f"{name}: slices of different sizes ({first_line(error)})") from None
    return voxels


def modality_values(pixels: np.ndarray, part: Slice, data: pydicom.FileDataset) -> np.ndarray:
    """Convert the stored pixels `(rows, columns)` of a slice by its file's look-up table, or by slope and intercept."""
    if not data.get("ModalityLUTSequence"):
        return rescaled(pixels, part.rescale)
    try:
        return np.asarray(apply_modality_lut(pixels, data))
    except Exception as error:
        name, why = private(part.path.name), private(first_line(error))
        raise PrivateError(f"{name}: unreadable ModalityLUTSequence ({why})") from error


def stored_pixels(path: Path) -> tuple[np.ndarray, pydicom.FileDataset]:
    """Read the stored pixels of a file, and its elements.

    Raises:
        PrivateError: if they are unreadable; the message begins with the file's name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = open_dicom(path)
            syntax = data.file_meta.TransferSyntaxUID
            check_pixels(data)
        except Exception as error:
            why = error.text if isinstance(error, PrivateError) else private(first_line(error))
            raise PrivateError(f"{private(path.name)}: unreadable as DICOM ({why})") from error
        if reason := why_undecodable(syntax):
            raise PrivateError(f"{private(path.name)}: compressed as {syntax.name}, {reason}")
        try:
            return np.asarray(data.pixel_array), data
        except BaseException as error:
            # Decoders in Rust raise PanicException for damaged pixels, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise PrivateError(f"{private(path.name)}: unreadable pixels ({private(first_line(error))})") from error


def check_pixels(data: pydicom.FileDataset) -> None:
    """Raise PrivateError for elements with which pixels would be read wrong or take all memory."""
    if max(data.Rows, data.Columns) > MAX_EDGE:
        raise PrivateError(f"{data.Rows} x {data.Columns} pixels, expected at most {MAX_EDGE} x {MAX_EDGE}")
    if "HighBit" in data and "BitsStored" in data and data.HighBit != data.BitsStored - 1:
        raise PrivateError(
            f"HighBit is {data.HighBit}, expected {data.BitsStored - 1} for BitsStored {data.BitsStored}"
        )
    if (
        "PixelData" in data
        and data["PixelData"].is_undefined_length
        and not data.file_meta.TransferSyntaxUID.is_compressed
    ):
        raise PrivateError("compressed pixels, but TransferSyntaxUID names no compression; export it again")


def rescaled(pixels: np.ndarray, rescale: tuple[float, float] | None) -> np.ndarray:
    """Scale stored pixels to float64; without slope and intercept, return them."""
    return pixels if rescale is None else pixels.astype(np.float64) * rescale[0] + rescale[1]


def smallest_type(values: np.ndarray) -> np.ndarray:
    """Convert values to int16, or to float32 if they are no whole numbers in its range."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values beyond int16 have no defined result, and are compared
        whole = values.astype(np.int16)
    return whole if np.array_equal(whole, values) else values.astype(np.float32)


def check_units(voxels: np.ndarray) -> None:
    """Raise PrivateError unless values that no header scales can be Hounsfield units: a part of them is negative."""
    if ((voxels >= AIR[0]) & (voxels < AIR[1])).mean() < LEAST_AIR:
        raise PrivateError(
            f"RescaleSlope and RescaleIntercept are missing, and stored values from {voxels.min():g} to "
            f"{voxels.max():g} are no Hounsfield units; export it again, or write both into the files "
            "(often 1 and -1024)"
        )


def why_undecodable(syntax: UID) -> str:
    """Explain why pixels of a transfer syntax are unreadable, and what to do; empty if a decoder is installed."""
    if not syntax.is_compressed or syntax.is_deflated:
        return ""
    try:
        is_available = get_decoder(syntax).is_available
    except NotImplementedError:
        return "which is a video or an unknown compression; export the series without compression"
    return "" if is_available else f"for which no decoder is installed: {install_command('dicom')}"


def pixels_digest(header: Header) -> str:
    """Digest the stored pixels of a slice; the digest of an unreadable one is its name."""
    try:
        pixels, _ = stored_pixels(header.path)
        shown: Any = pixels if header.frame is None else pixels[header.frame]
    except (ValueError, IndexError):
        return header.name
    return hashlib.sha256(np.ascontiguousarray(shown).tobytes()).hexdigest()
