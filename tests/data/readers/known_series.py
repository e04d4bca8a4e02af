"""The 18 kinds of CT series by which readers are compared; each maker changes a plain series of files."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from tests.data.readers.dicom_files import write_series

Slices = list[pydicom.FileDataset]
GRID = 64
"""Rows and columns of the real slices that are taken."""


def made_series(folder: Path, hu: np.ndarray) -> Slices:
    """Slices of made-up Hounsfield units (x, y, z), from the feet up, with all elements that references need."""
    study, frame = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=["frame"])
    write_series(
        folder,
        hu,
        **{"PatientName": "Doe^Jane", "PatientBirthDate": "19500102", "PatientSex": "F", "PatientID": "MRN 4711"},
        **{"StudyInstanceUID": study, "FrameOfReferenceUID": frame, "SeriesInstanceUID": generate_uid(None)},
        **{"StudyDate": "20240506", "StudyTime": "101500", "AccessionNumber": "A7", "StudyID": "9"},
        **{"SliceThickness": 2.0, "SeriesNumber": 3},
    )
    return in_order([pydicom.dcmread(path) for path in folder.iterdir()])


def real_series(folder: Path) -> Slices:
    """The middle of 12 slices of a real series, from the feet up."""
    slices = in_order([pydicom.dcmread(path) for path in folder.iterdir()])[:12]
    for data in slices:
        middle = slice((data.Rows - GRID) // 2, (data.Rows + GRID) // 2)
        pixels = data.pixel_array[middle, middle]
        data.Rows = data.Columns = GRID
        data.PixelData = pixels.tobytes()
    return slices


def in_order(slices: Slices) -> Slices:
    return sorted(slices, key=lambda data: data.ImagePositionPatient[2])


def truth(slices: Slices) -> tuple[np.ndarray, np.ndarray]:
    """Hounsfield units (column, row, slice), and the affine to RAS, by the elements of each slice."""
    hu = np.stack([data.pixel_array.T * float(data.RescaleSlope) + float(data.RescaleIntercept) for data in slices], 2)
    first, last = (np.array(data.ImagePositionPatient, float) for data in (slices[0], slices[-1]))
    directions = np.array(slices[0].ImageOrientationPatient, float)
    affine = np.eye(4)
    affine[:3, 0] = directions[:3] * float(slices[0].PixelSpacing[1])
    affine[:3, 1] = directions[3:] * float(slices[0].PixelSpacing[0])
    affine[:3, 2] = (last - first) / (len(slices) - 1)
    affine[:3, 3] = first
    return hu, np.diag([-1, -1, 1, 1]) @ affine


def save(folder: Path, slices: Slices, name: str = "IM{:04d}.dcm") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(slices):
        data.save_as(folder / name.format(number), enforce_file_format=True)


def plain(folder: Path, slices: Slices) -> None:
    save(folder, slices)


def shuffled(folder: Path, slices: Slices) -> None:
    """File names without ending that say nothing of the order."""
    order = np.random.default_rng(7).permutation(len(slices))
    save(folder, [slices[i] for i in order], "{:05d}")


def numbers_reversed(folder: Path, slices: Slices) -> None:
    for number, data in enumerate(reversed(slices)):
        data.InstanceNumber = number
    save(folder, slices)


def compressed(syntax: str) -> Callable[[Path, Slices], None]:
    def write(folder: Path, slices: Slices) -> None:
        for data in slices:
            if syntax == DeflatedExplicitVRLittleEndian:
                data.file_meta.TransferSyntaxUID = syntax
                continue
            try:
                data.compress(syntax, generate_instance_uid=False)
            except RuntimeError as error:
                pytest.skip(f"no encoder of {syntax} is installed: pip install 'hyspark[dicom]' ({error})")
        save(folder, slices)

    return write


def jpeg_lossless(folder: Path, slices: Slices) -> None:
    """Process 14, which GDCM alone encodes."""
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm is not installed: pip install 'hyspark[dicom]'")
    save(folder, slices)
    for path in folder.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGLosslessSV1


def enhanced(folder: Path, slices: Slices) -> None:
    """One file of all slices, as the standard's functional groups describe them; the frames are shuffled."""

    def item(**values: object) -> Dataset:
        data = Dataset()
        for name, value in values.items():
            setattr(data, name, value)
        return data

    frames = [slices[i] for i in np.random.default_rng(3).permutation(len(slices))]
    data = copy.deepcopy(frames[0])
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(data, name)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    data.NumberOfFrames = len(frames)
    first = frames[0]
    data.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=first.ImageOrientationPatient)],
            PixelMeasuresSequence=[item(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)],
        )
    ]
    data.PerFrameFunctionalGroupsSequence = [
        item(
            FrameContentSequence=[item(FrameAcquisitionNumber=1, StackID="1", InStackPositionNumber=number + 1)],
            PlanePositionSequence=[item(ImagePositionPatient=frame.ImagePositionPatient)],
            PixelValueTransformationSequence=[
                item(RescaleSlope=frame.RescaleSlope, RescaleIntercept=frame.RescaleIntercept, RescaleType="HU")
            ],
        )
        for number, frame in enumerate(frames)
    ]
    data.PixelData = np.stack([frame.pixel_array for frame in frames]).tobytes()
    save(folder, [data])


def without_preamble(folder: Path, slices: Slices) -> None:
    folder.mkdir(parents=True)
    for number, data in enumerate(slices):
        data.preamble = None
        del data.file_meta
        encoding = {"implicit_vr": True, "little_endian": True}
        pydicom.dcmwrite(folder / f"{number}", data, force_encoding=True, **encoding)


def one_missing(folder: Path, slices: Slices) -> None:
    del slices[len(slices) // 2]
    save(folder, slices)


def two_series(folder: Path, slices: Slices) -> None:
    save(folder, slices, "a{:04d}.dcm")
    other = copy.deepcopy(slices)
    for data in other:
        data.SeriesInstanceUID = data.SeriesInstanceUID[:-2] + ".7"
        renamed(data, ".7")
        data.PixelData = (data.pixel_array + 100).tobytes()
    save(folder, other, "b{:04d}.dcm")


def renamed(data: pydicom.FileDataset, suffix: str) -> None:
    """Gives a slice another SOPInstanceUID."""
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = str(data.SOPInstanceUID)[:-3] + suffix


def files_copied(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    save(folder, slices[2:5], "copy{:04d}.dcm")


def positions_repeated(folder: Path, slices: Slices) -> None:
    """Three slices lie there twice, under another UID, as a resent series does."""
    save(folder, slices)
    again = copy.deepcopy(slices[2:5])
    for data in again:
        renamed(data, ".9")
    save(folder, again, "again{:04d}.dcm")


def with_localizer(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    scout = copy.deepcopy(slices[0])
    renamed(scout, ".8")
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    save(folder, [scout], "scout{}.dcm")


def tilted(folder: Path, slices: Slices) -> None:
    """The gantry leans by 15 degrees: slices turn about x, while the table moves along z."""
    angle = np.deg2rad(15)
    for data in slices:
        data.ImageOrientationPatient = [1, 0, 0, 0, round(float(np.cos(angle)), 12), round(float(np.sin(angle)), 12)]
    save(folder, slices)


def gaps_change(folder: Path, slices: Slices) -> None:
    """Upper slices lie half as far again apart."""
    heights = [float(data.ImagePositionPatient[2]) for data in slices]
    middle, step = len(slices) // 2, heights[1] - heights[0]
    for k, data in enumerate(slices):
        height = heights[0] + step * (k + 0.5 * max(0, k - middle))
        data.ImagePositionPatient = [*data.ImagePositionPatient[:2], round(height, 6)]
    save(folder, slices)


def rescale_changes(folder: Path, slices: Slices) -> None:
    for k, data in enumerate(slices):
        data.RescaleSlope, data.RescaleIntercept = 1 + k % 3, -1024 - k
    save(folder, slices)


KNOWN = {
    "plain": plain,
    "shuffled names without ending": shuffled,
    "instance numbers reversed": numbers_reversed,
    "RLE": compressed(RLELossless),
    "JPEG-LS": compressed(JPEGLSLossless),
    "JPEG 2000": compressed(JPEG2000Lossless),
    "JPEG lossless": jpeg_lossless,
    "deflated": compressed(DeflatedExplicitVRLittleEndian),
    "enhanced multi-frame": enhanced,
    "no preamble": without_preamble,
    "one slice missing": one_missing,
    "two series in a folder": two_series,
    "3 files copied": files_copied,
    "3 positions repeated": positions_repeated,
    "localizer in the series": with_localizer,
    "gantry tilt": tilted,
    "distances change": gaps_change,
    "rescale changes": rescale_changes,
}
"""The 18 kinds of series, each with what writes it."""
