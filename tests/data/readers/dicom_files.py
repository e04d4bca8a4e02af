"""DICOM files made on the fly, as a CT scanner writes them."""

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_dicom(path: Path, **values: Any) -> None:
    """One object with these elements; `syntax`: its transfer syntax, which the pixels are not encoded by."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = values.setdefault("SOPInstanceUID", generate_uid(entropy_srcs=[str(path)]))
    meta.TransferSyntaxUID = values.pop("syntax", ExplicitVRLittleEndian)
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = CTImageStorage
    for name, value in values.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def write_slice(path: Path, pixels: np.ndarray, position: tuple[float, ...], **values: Any) -> None:
    """A CT slice of stored pixels (rows, columns), int16, at a place in mm, LPS."""
    write_dicom(
        path,
        **{
            "Modality": "CT",
            "PatientID": "P1",
            "SeriesInstanceUID": "1.2.3",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "Rows": pixels.shape[0],
            "Columns": pixels.shape[1],
            "PixelSpacing": [1.0, 1.0],
            "ImagePositionPatient": list(position),
            "ImageOrientationPatient": list(AXIAL),
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            "PixelData": pixels.astype("<i2").tobytes(),
            **values,
        },
    )


def write_series(folder: Path, hu: np.ndarray, spacing: float = 2.0, prefix: str = "IM", **values: Any) -> None:
    """A CT series of Hounsfield units (x, y, z), axes to the patient's left, back and head; file names say nothing of
    the order.
    """
    order = np.random.default_rng(0).permutation(hu.shape[2])
    for number, z in enumerate(order):
        extra = {"InstanceNumber": hu.shape[2] - int(z), **values}  # numbered from the head down
        write_slice(folder / f"{prefix}{number:04d}", hu[:, :, z].T + 1024, (0, 0, spacing * z), **extra)
