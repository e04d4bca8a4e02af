"""NIfTI files made byte by byte, independent of any library that reads them."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (22, 20, 18)
CUBE = (slice(4, 11), slice(9, 15), slice(3, 9))
"""A bright cube off the centre, without symmetry."""

# name: (format in NIfTI-1, number of values)
FIELDS_1 = [
    *[("sizeof_hdr", "i"), ("data_type", "10s"), ("db_name", "18s"), ("extents", "i"), ("session_error", "h")],
    *[("regular", "c"), ("dim_info", "B"), ("dim", "8h"), ("intent_p", "3f"), ("intent_code", "h"), ("datatype", "h")],
    *[("bitpix", "h"), ("slice_start", "h"), ("pixdim", "8f"), ("vox_offset", "f"), ("scl_slope", "f")],
    *[("scl_inter", "f"), ("slice_end", "h"), ("slice_code", "B"), ("xyzt_units", "B"), ("cal_max", "f")],
    *[("cal_min", "f"), ("slice_duration", "f"), ("toffset", "f"), ("glmax", "i"), ("glmin", "i")],
    *[("descrip", "80s"), ("aux_file", "24s"), ("qform_code", "h"), ("sform_code", "h"), ("quatern", "3f")],
    *[("qoffset", "3f"), ("srow", "12f"), ("intent_name", "16s"), ("magic", "4s")],
]
FIELDS_2 = [
    *[("sizeof_hdr", "i"), ("magic", "8s"), ("datatype", "h"), ("bitpix", "h"), ("dim", "8q"), ("intent_p", "3d")],
    *[("pixdim", "8d"), ("vox_offset", "q"), ("scl_slope", "d"), ("scl_inter", "d"), ("cal_max", "d")],
    *[("cal_min", "d"), ("slice_duration", "d"), ("toffset", "d"), ("slice_start", "q"), ("slice_end", "q")],
    *[("descrip", "80s"), ("aux_file", "24s"), ("qform_code", "i"), ("sform_code", "i"), ("quatern", "3d")],
    *[("qoffset", "3d"), ("srow", "12d"), ("slice_code", "i"), ("xyzt_units", "i"), ("intent_code", "i")],
    *[("intent_name", "16s"), ("dim_info", "B"), ("unused_str", "15s")],
]
DEFAULTS: dict[str, Any] = {
    "dim": (3, *SHAPE, 1, 1, 1, 1),
    "pixdim": (1, 2, 2.5, 3, 1, 1, 1, 1),
    "datatype": 4,
    "bitpix": 16,
    "scl_slope": 1,
    "xyzt_units": 2,
    "regular": b"r",
}


def header_bytes(version: int = 1, order: str = "<", **fields: Any) -> bytes:
    size, offset = (348, 352) if version == 1 else (540, 544)
    magic = b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n"
    fields = DEFAULTS | {"sizeof_hdr": size, "vox_offset": offset, "magic": magic} | fields
    packed = b""
    for name, kind in FIELDS_1 if version == 1 else FIELDS_2:
        value = fields.get(name, b"" if kind[-1] in "sc" else 0)
        values = np.ravel(value).tolist() if kind[0].isdigit() and kind[-1] != "s" else [value]
        values = values * int(kind[:-1]) if values == [0] and kind[0].isdigit() else values
        packed += struct.pack(order + kind, *(value or b"\0" if kind == "c" else value for value in values))
    assert len(packed) == size
    return packed


def voxels() -> np.ndarray:
    values = np.full(SHAPE, -1000, np.int16)
    values[CUBE] = 200
    return values


def nifti_bytes(values: np.ndarray, version: int = 1, order: str = "<", gap: int = 4, **fields: Any) -> bytes:
    stored = values.astype(values.dtype.newbyteorder(order))
    return header_bytes(version, order, **fields) + bytes(gap) + stored.tobytes(order="F")


def write_bytes(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)
    return path
