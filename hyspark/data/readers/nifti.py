"""NIfTI files: headers, voxels, label maps."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip
from monai.data import NibabelReader
from nibabel.spatialimages import SpatialImage

from hyspark.data.datasets.cases import UNANNOTATED


def check_header(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Read shape `(h, w, d)` and affine `(4, 4)` of a NIfTI file; raise ValueError unless it is one 3D volume."""
    try:
        image: Any = nibabel.load(path)
        shape, affine = tuple(image.shape), image.affine
    except Exception as error:
        raise ValueError(f"unreadable as NIfTI ({error})") from error
    if len(shape) not in (3, 4) or shape[3:] not in ((), (1,)):
        raise ValueError(f"expected one 3D volume, got shape {shape}")
    return shape[:3], affine


def read_nifti(path: Path) -> SpatialImage:
    """Read a NIfTI file by MONAI's reader, which fixes headers.

    A compressed file is unpacked by ISA-L, in half the time of zlib, and its checksum is compared.

    Raises:
        ValueError: if a compressed file is damaged.
    """
    image: SpatialImage = NibabelReader().read(path)
    if path.suffix.lower() != ".gz":
        return image
    try:
        content = igzip.decompress(path.read_bytes())
    except Exception as error:  # ISA-L's own has no base but this
        raise ValueError(f"damaged: {error} ({path})") from error
    kind: Any = type(image)
    unpacked: SpatialImage = kind(kind.from_bytes(content).dataobj, image.affine, image.header)
    return unpacked


def file_grid(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Read shape `(h, w, d)` and affine `(4, 4)`, RAS mm, of a NIfTI file, by the header that preparation uses."""
    image = NibabelReader().read(path)
    h, w, d = image.shape[:3]
    return (h, w, d), np.asarray(image.affine, dtype=np.float64)


def read_label(path: Path, num_classes: int, ignore: int | None = None) -> np.ndarray:
    """Read a label map as stored, uint8 `(h, w, d)`; raise ValueError if a value is no class.

    Args:
        path: the NIfTI file.
        num_classes: number of classes, background included.
        ignore: value in the file of voxels to ignore, which become UNANNOTATED.
    """
    image = read_nifti(path)
    values = np.asanyarray(image.dataobj).reshape(image.shape[:3])
    ignored = values == ignore
    values = np.where(ignored, 0, values) if ignore is not None else values
    if not (values.min() >= 0 and values.max() < num_classes and (values == np.rint(values)).all()):
        raise ValueError(
            f"{path}: expected whole label values from 0 to {num_classes - 1}, the classes of the network, got "
            f"{values.min():g} to {values.max():g}"
        )
    labels: np.ndarray = values.astype(np.uint8)
    labels[ignored] = UNANNOTATED
    return labels
