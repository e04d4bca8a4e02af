"""NIfTI files: grids, voxels, label maps, and label maps to write. Headers are read by `header.py`."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import SpatialImage

from hyspark.data.datasets.cases import UNANNOTATED
from hyspark.data.readers.geometry import Grid, Turned, pair_fault, put_in_order
from hyspark.data.readers.header import FATAL, GZIP_ERRORS, NiftiError, NiftiHeader, read_nifti_header
from hyspark.data.readers.label_values import label_value_fault, whole_values
from hyspark.utils.text import first_line


def placed_header(path: Path, channel: int | None = None) -> NiftiHeader:
    """Read the header of a NIfTI file; raise NiftiError unless it holds one volume with a position in space."""
    header = read_nifti_header(path, channel)
    for kind, found in header.faults:
        if kind in FATAL:
            raise NiftiError(kind, f"{kind}: {found}")
    return header


def file_grid(path: Path) -> Grid:
    """Read shape and affine of an image by its header; raise NiftiError unless it is a volume in space.

    Of a file of several channels, those of each.
    """
    return placed_header(path, channel=0).grid


def read_voxels(header: NiftiHeader) -> np.ndarray:
    """Read the voxels `(h, w, d)` of a NIfTI file, scaled by its slope and intercept.

    A compressed file is unpacked by ISA-L, in half the time of zlib, and its checksum is compared.

    Raises:
        NiftiError: the file is damaged.
    """
    source: BytesIO | str = str(header.path)
    if header.is_compressed:
        try:
            content = igzip.decompress(header.path.read_bytes())
        except GZIP_ERRORS as error:
            raise NiftiError("damaged", first_line(error)) from error
        if len(content) < header.end:
            missing = header.end - len(content)
            raise NiftiError("damaged", f"{missing:,} bytes are missing at its end")
        source = BytesIO(content)
    slope, inter = header.raw.get_slope_inter()
    scaling = (1.0, 0.0) if slope is None else (slope, inter)
    voxels = np.asanyarray(ArrayProxy(source, (header.shape, header.dtype, header.offset, *scaling)))
    return voxels


def read_nifti(path: Path) -> SpatialImage:
    """Read the voxels of a NIfTI file and their affine; raise NiftiError if it is damaged or no volume in space."""
    header = placed_header(path)
    return SpatialImage(read_voxels(header), header.affine)


def read_label(path: Path, image: Path, num_classes: int = 256, ignore: int | None = None) -> Turned:
    """Read a label map and bring its axes into the order and direction of its image's, without interpolation.

    Args:
        path: the label's file.
        image: the image's file.
        num_classes: number of classes; values lie below it.
        ignore: value in the file of voxels to ignore, which become UNANNOTATED.

    Returns:
        The label map, uint8 `(h, w, d)`, with its affine.

    Raises:
        ValueError: a value is no class, the label does not lie on its image, or a file is damaged.
    """
    header, grid = placed_header(path), file_grid(image)
    if fault := pair_fault(grid, header.grid):
        raise ValueError(f"{path}: expected a label on the voxels of its image, got {fault[1]}")
    values = whole_values(read_voxels(header))
    ignored = values == ignore
    values = np.where(ignored, 0, values) if ignore is not None else values
    low, high = float(values.min()), float(values.max())
    fault = label_value_fault(np.unique(values) if math.isfinite(low + high) else [low, high])
    if fault or high >= num_classes:
        found = fault[1] if fault else f"values up to {high:g}"
        raise ValueError(f"{path}: expected whole label values from 0 to {num_classes - 1}, the classes, got {found}")
    labels = values.astype(np.uint8)
    labels[ignored] = UNANNOTATED
    return put_in_order(labels, header.grid, grid)


def label_file(labels: np.ndarray, source: Path) -> bytes:
    """Make the content of a NIfTI file of a label map, uint8 or uint16 `(h, w, d)`, on the grid of a NIfTI file.

    Geometry, units and codes are the source's, field by field, so that every program reads both in one position. Fields
    on intensities are reset. Free text and extensions are removed, since they may name a patient.
    """
    header = read_nifti_header(source, channel=0)
    raw = header.raw.copy()
    raw.set_data_dtype(labels.dtype)
    raw.set_data_shape(labels.shape)
    raw["sizeof_hdr"], raw["vox_offset"], raw["magic"] = raw.sizeof_hdr, raw.single_vox_offset, raw.single_magic
    raw.set_slope_inter(1, 0)
    for name in ("cal_min", "cal_max", *header.text_fields):
        raw[name] = np.zeros_like(raw[name])
    return raw.binaryblock + bytes(4) + labels.astype(raw.get_data_dtype()).tobytes(order="F")
