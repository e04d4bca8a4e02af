"""Faults of headers, as a table."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tests.data.quality.faults_of_files import Expected, Fault, image, image_and_label, label
from tests.data.quality.small_data import AFFINE, SHAPE, SmallData, compress, edit, save, set_fields


def fields(**values: Any) -> Callable[[Path], object]:
    return lambda path: set_fields(path, **values)


def as_type(kind: str) -> Callable[[SmallData, str], object]:
    return lambda data, case: save(data.image(case), data.voxels(case).astype(kind))


def image_of(name: str, expected: Expected, make: Callable[[np.ndarray], tuple[Any, ...]]) -> Fault:
    """An image written anew from its voxels: the arguments of `save` behind the path."""
    return Fault(
        f"image {name}", "image", expected, lambda data, case: save(data.image(case), *make(data.voxels(case)))
    )


def swapped_bytes(path: Path) -> None:
    """Write the file big endian."""
    whole = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    header = whole.header.as_byteswapped(">")
    path.write_bytes(compress(nib.Nifti1Image(np.asanyarray(whole.dataobj), whole.affine, header).to_bytes()))


def scaled(dtype: str, slope: float, inter: float) -> Callable[[SmallData, str], object]:
    """Store an image as integers with a scale factor."""

    def change(data: SmallData, case: str) -> None:
        save(data.image(case), np.rint((data.voxels(case) - inter) / slope).astype(dtype))
        set_fields(data.image(case), scl_slope=slope, scl_inter=inter)

    return change


def colours(number: int) -> Callable[[SmallData, str], object]:
    kind = np.dtype([(name, "u1") for name in "RGBA"[:number]])
    return lambda data, case: save(data.image(case), np.zeros(SHAPE, kind))


def moved_data(by: int) -> Callable[[Path], object]:
    """Put bytes between header and voxels."""

    def change(path: Path) -> None:
        edit(path, lambda content: content[:352] + bytes(by) + content[352:])
        set_fields(path, vox_offset=352.0 + by)

    return change


SHEARED = AFFINE + np.array([[0, 0, 0, 0], [0, 0, 1.2, 0], [0, 0, 0, 0], [0, 0, 0, 0.0]])
FLAT = np.concatenate([AFFINE[:3, :1], AFFINE[:3, :1], AFFINE[:3, 2:]], 1)
ROWS = tuple(AFFINE[:3].ravel())
AWAY = tuple((AFFINE[:3] + np.array([0, 0, 0, 30.0])).ravel())
MIRRORED = tuple((AFFINE @ np.diag([-1.0, 1, 1, 1]))[:3].ravel())
DOUBLED = tuple((AFFINE @ np.diag([2.0, 2, 2, 1]))[:3].ravel())
SFORM = {"sform_code": 1, "qform_code": 0, "srow": ROWS}
BOTH = {"sform_code": 1, "qform_code": 1, "quatern": (0, 0, 0), "qoffset": AFFINE[:3, 3]}
NAN, INF = float("nan"), float("inf")

HEADERS = [
    image_of("NIfTI-2", "fine", lambda v: (v, AFFINE, nib.Nifti2Image)),
    label(
        "NIfTI-2",
        "fine",
        lambda p: save(
            p,
            np.asanyarray(nib.Nifti1Image.from_bytes(gzip.decompress(p.read_bytes())).dataobj),
            AFFINE,
            nib.Nifti2Image,
        ),
    ),
    image("big endian", "fine", swapped_bytes),
    label("big endian", "fine", swapped_bytes),
    image_of("2D", "refused", lambda v: (v[:, :, 9],)),
    image_of("4D with one volume", "fine", lambda v: (v[..., None],)),
    image_of("4D with three volumes", "refused", lambda v: (np.stack([v, v, v], -1),)),
    image_of("5D vector", "refused", lambda v: (np.stack([v, v, v], -1)[:, :, :, None],)),
    image_of("5D with one volume", "agree", lambda v: (v[..., None, None],)),
    image("no voxels", "refused", fields(dim=(3, 17, 0, 18))),
    image("negative size", "refused", fields(dim=(3, 17, -16, 18))),
    image("huge size", "refused", fields(dim=(3, 30000, 30000, 30000))),
    image("larger size than its data", "refused", fields(dim=(3, 17, 16, 19))),
    image("smaller size than its data", "agree", fields(dim=(3, 17, 16, 17))),
    image("no axes", "refused", fields(dim=(0, 17, 16, 18))),
    image("nine axes", "refused", fields(dim=(9, 17, 16, 18))),
    Fault("image RGB", "image", "refused", colours(3)),
    Fault("image RGBA", "image", "refused", colours(4)),
    image_of("complex", "refused", lambda v: (v.astype(np.complex64),)),
    *(Fault(f"image of {kind}", "image", "fine", as_type(kind)) for kind in ("int32", "float32", "float64", "int64")),
    Fault("image uint16 with an intercept", "image", "fine", scaled("uint16", 1, -1024)),
    Fault("image uint8 with slope and intercept", "image", "agree", scaled("uint8", 8, -1024)),
    Fault("image int16 with a slope of .5", "image", "fine", scaled("int16", 0.5, 0)),
    image("negative slope", "agree", fields(scl_slope=-1.0)),
    image("slope 0", "fine", fields(scl_slope=0.0, scl_inter=0.0)),
    image("slope NaN", "fine", fields(scl_slope=NAN, scl_inter=NAN)),
    image("slope infinite", "agree", fields(scl_slope=INF)),
    image("slope tiny", "refused", fields(scl_slope=1e-30)),
    image("slope huge", "refused", fields(scl_slope=1e30)),
    image("intercept NaN", "agree", fields(scl_slope=1.0, scl_inter=NAN)),
    image("intercept infinite", "agree", fields(scl_slope=1.0, scl_inter=INF)),
    image("intercept 1024 too much", "refused", fields(scl_slope=1.0, scl_inter=1024.0)),
    label("slope .5", "refused", fields(scl_slope=0.5, scl_inter=0.0)),
    label("slope NaN", "fine", fields(scl_slope=NAN, scl_inter=NAN)),
    label("slope infinite", "agree", fields(scl_slope=INF, scl_inter=0.0)),
    label("intercept NaN", "agree", fields(scl_slope=1.0, scl_inter=NAN)),
    image("type 0", "refused", fields(datatype=0)),
    image("type of bits", "refused", fields(datatype=1, bitpix=1)),
    image("unknown type", "refused", fields(datatype=77)),
    image("wrong bitpix", "agree", fields(bitpix=8)),
    image("wrong magic", "refused", fields(magic=b"nope")),
    image("magic of a pair", "agree", fields(magic=b"ni1\0")),
    image("no magic", "agree", fields(magic=bytes(4))),
    image("wrong size of the header", "agree", fields(sizeof_hdr=111)),
    image("voxels at 0", "agree", fields(vox_offset=0.0)),
    image("voxels at an odd byte", "agree", moved_data(1)),
    image("voxels further behind", "fine", moved_data(48)),
    image("voxels behind the end", "refused", fields(vox_offset=1e6)),
    image("voxels at NaN", "agree", fields(vox_offset=NAN)),
    image("voxels at a negative byte", "agree", fields(vox_offset=-352.0)),
    image("spacing 0", "agree", fields(pixdim=(1, 0, 0, 0))),
    image("one spacing 0", "agree", fields(pixdim=(1, 3, 3, 0))),
    image("spacing negative", "agree", fields(pixdim=(1, -3, 3, 3))),
    image("spacing NaN", "agree", fields(pixdim=(1, NAN, 3, 3))),
    image("spacing infinite", "agree", fields(pixdim=(1, INF, 3, 3))),
    image("spacing other than the sform's", "otherwise", fields(**SFORM, pixdim=(1, 2, 2, 5))),
    image("spacing 0 without codes", "refused", fields(sform_code=0, qform_code=0, pixdim=(1, 0, 0, 0))),
    image("spacing 0 by qform alone", "refused", fields(**BOTH | {"sform_code": 0}, pixdim=(1, 0, 3, 3))),
    image("spacing NaN by qform alone", "refused", fields(**BOTH | {"sform_code": 0}, pixdim=(1, NAN, 3, 3))),
    image_and_label(
        "in metres",
        "agree",
        lambda p: set_fields(
            p, **SFORM | {"srow": tuple((AFFINE[:3] / 1000).ravel())}, pixdim=(1, 0.003, 0.003, 0.003), xyzt_units=1
        ),
    ),
    image_and_label(
        "in microns",
        "agree",
        lambda p: set_fields(
            p, **SFORM | {"srow": tuple((AFFINE[:3] * 1000).ravel())}, pixdim=(1, 3000, 3000, 3000), xyzt_units=3
        ),
    ),
    *(
        image_and_label(
            f"of {mm} mm a voxel",
            "refused",
            fields(**SFORM | {"srow": tuple((AFFINE[:3] * mm / 3).ravel())}, pixdim=(1, mm, mm, mm), xyzt_units=2),
        )
        for mm in (0.003, 3000.0)
    ),
    image_and_label("in unknown units", "fine", fields(xyzt_units=0)),
    image_and_label("sform alone", "fine", fields(**SFORM)),
    image_and_label("qform alone", "fine", fields(**BOTH | {"sform_code": 0})),
    image_and_label("codes of standard spaces", "fine", fields(**BOTH | {"sform_code": 4, "qform_code": 2}, srow=ROWS)),
    image_and_label("without codes", "otherwise", fields(sform_code=0, qform_code=0)),
    image_and_label("sform and qform of other sizes", "otherwise", fields(**BOTH, srow=DOUBLED)),
    image_and_label("sform and qform of other positions", "otherwise", fields(**BOTH, srow=AWAY)),
    image_and_label("sform and qform mirrored", "otherwise", fields(**BOTH, srow=MIRRORED)),
    image("sform and qform of other sizes, label by the qform", "refused", fields(**BOTH, srow=DOUBLED)),
    image_and_label(
        "invalid quaternion beside an sform", "agree", fields(**BOTH | {"quatern": (0.9, 0.9, 0.9)}, srow=ROWS)
    ),
    image_and_label(
        "invalid quaternion alone", "agree", fields(**BOTH | {"sform_code": 0, "quatern": (0.9, 0.9, 0.9)})
    ),
    image_and_label("quaternion NaN alone", "refused", fields(**BOTH | {"sform_code": 0, "quatern": (NAN, 0, 0)})),
    image_and_label("singular", "refused", fields(**SFORM | {"srow": tuple(FLAT.ravel())})),
    image("singular, label sound", "refused", fields(**SFORM | {"srow": tuple(FLAT.ravel())})),
    label("singular", "refused", fields(**SFORM | {"srow": tuple(FLAT.ravel())})),
    image_and_label("sheared", "otherwise", fields(**SFORM | {"srow": tuple(SHEARED[:3].ravel())})),
    image_and_label("sform NaN", "refused", fields(**SFORM | {"srow": (NAN,) * 12})),
    image_and_label("origin NaN", "refused", fields(**SFORM | {"srow": (*ROWS[:3], NAN, *ROWS[4:])})),
    image_and_label("sform of zeros", "refused", fields(**SFORM | {"srow": (0,) * 12})),
    image_and_label(
        "axes turned by 90 degrees",
        "fine",
        lambda p: set_fields(p, **SFORM | {"srow": (0, 3, 0, -24, 3, 0, 0, -22, 0, 0, -3, 40)}),
    ),
    image_and_label("axes turned by 20 degrees", "agree", lambda p: set_fields(p, **SFORM | {"srow": turned(20)})),
    image("personal text", "otherwise", fields(descrip=b"DOE^JANE 19510203")),
    image("text full of letters", "fine", fields(descrip=b"x" * 80)),
    image(
        "extension cut short",
        "agree",
        lambda p: (moved_data(32)(p), edit(p, lambda c: c[:348] + b"\1\0\0\0" + struct.pack("<2i", 4096, 6) + c[360:])),
    ),
    image(
        "extension of DICOM",
        "otherwise",
        lambda p: (moved_data(32)(p), edit(p, lambda c: c[:348] + b"\1\0\0\0" + struct.pack("<2i", 32, 2) + c[360:])),
    ),
]
"""Faults of headers."""


def turned(degrees: float) -> tuple[float, ...]:
    """Rows of an affine that is turned about the third axis."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return tuple(np.concatenate([turn @ AFFINE[:3, :3], AFFINE[:3, 3:]], 1).ravel())
