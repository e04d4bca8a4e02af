"""A tiny labelled data set of four CTs in nnU-Net layout, and edits of its files at the level of bytes."""

import gzip
import json
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SHAPE = (17, 16, 18)
SPACING = (3.0, 3.0, 3.0)
AFFINE = np.array([[3.0, 0, 0, -24], [0, 3, 0, -22], [0, 0, 3, 40], [0, 0, 0, 1]])
CASES = ("p01", "p02", "p03", "p04")
NAMES = {"background": 0, "organ": 1, "node": 2}
DATASET = {"channel_names": {"0": "CT"}, "labels": NAMES, "numTraining": len(CASES), "file_ending": ".nii.gz"}
FIELDS = {
    "sizeof_hdr": (0, "i"),
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"),
    "descrip": (148, "80s"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "quatern": (256, "3f"),
    "qoffset": (268, "3f"),
    "srow": (280, "12f"),
    "magic": (344, "4s"),
}
"""Byte positions and types of fields of a NIfTI-1 header."""


@cache
def ct(seed: int) -> np.ndarray:
    """A body of soft tissue, fat, an air-filled hollow and bone in air, int16 HU."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(SHAPE) - np.array(SHAPE).reshape(3, 1, 1, 1) / 2 + rng.uniform(-0.4, 0.4, (3, 1, 1, 1))
    radius = np.sqrt(x**2 + y**2 + z**2)
    values = np.full(SHAPE, -1000.0)
    values[radius < 7.5] = -100
    values[radius < 6.5] = 45
    values[(np.abs(x) < 2) & (np.abs(y - 3) < 2) & (radius < 6.5)] = -820
    values[(np.abs(x) < 1.2) & (np.abs(y + 3) < 1.5) & (radius < 6.5)] = 500
    voxels = (values + rng.normal(0, 15, SHAPE)).clip(-1024, 3071).astype(np.int16)
    voxels.flags.writeable = False
    return voxels


@cache
def organs(seed: int) -> np.ndarray:
    """Two organs within the body of `ct`, uint8."""
    label = np.zeros(SHAPE, np.uint8)
    label[6:10, 6:9, 6:11] = 1
    label[10:12, 8 + seed % 2 : 11, 8:11] = 2
    label.flags.writeable = False
    return label


@cache
def mr(seed: int, channel: int = 0) -> np.ndarray:
    """The same body in MR: noise of air close to 0, and tissues in other values in each channel, int16."""
    rng = np.random.default_rng([seed, channel])
    tissue = ct(seed)
    values = (
        np.where(tissue > 300, 60, np.where(tissue > -50, 420, 700)) if channel else np.where(tissue > -50, 610, 280)
    )
    body = tissue > -300
    noise = np.abs(rng.normal(0, 9, (2, *SHAPE))).sum(0)
    voxels = np.where(body, values + rng.normal(0, 25, SHAPE), noise).clip(0, 4095).astype(np.int16)
    voxels.flags.writeable = False
    return voxels


def write_mr(folder: Path, channels: Sequence[int] = (0, 1), cases: Sequence[str] = CASES) -> Path:
    """Write the cases as MR of several channels, with their labels, in nnU-Net layout; return the folder."""
    for seed, case in enumerate(cases):
        for channel in channels:
            path = folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, mr(seed, channel))
        (folder / "labelsTr").mkdir(exist_ok=True)
        save(folder / "labelsTr" / f"{case}.nii.gz", organs(seed))
    names = {"channel_names": {str(c): name for c, name in zip(channels, ("T1", "FLAIR"), strict=False)}}
    (folder / "dataset.json").write_text(json.dumps(DATASET | names))
    return folder


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray | None = AFFINE, kind: Any = nib.Nifti1Image) -> bytes:
    """A NIfTI file, not compressed."""
    content: bytes = kind(np.asarray(voxels), affine, dtype=voxels.dtype).to_bytes()
    return content


def compress(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


@cache
def sound_files() -> dict[str, bytes]:
    """The files of the data set by their paths."""
    files = {"dataset.json": json.dumps(DATASET).encode()}
    for seed, case in enumerate(CASES):
        files[f"imagesTr/{case}_0000.nii.gz"] = compress(nifti_bytes(ct(seed)))
        files[f"labelsTr/{case}.nii.gz"] = compress(nifti_bytes(organs(seed)))
    return files


class SmallData:
    """The data set on the disk.

    Attributes:
        cases: names of its cases.
        folder: its folder.
        names: its dataset.json.
    """

    def __init__(self, parent: Path, cases: Sequence[str] = CASES) -> None:
        self.cases = tuple(cases)
        self.folder = parent / "Dataset001_Small"
        self.names = self.folder / "dataset.json"
        for folder in ("imagesTr", "labelsTr"):
            (self.folder / folder).mkdir(parents=True)
        for path, content in sound_files().items():
            if path == "dataset.json" or any(case in path for case in cases):
                (self.folder / path).write_bytes(content)

    def image(self, case: str) -> Path:
        return self.folder / "imagesTr" / f"{case}_0000.nii.gz"

    def label(self, case: str) -> Path:
        return self.folder / "labelsTr" / f"{case}.nii.gz"

    def voxels(self, case: str) -> np.ndarray:
        """The values of a sound image."""
        return ct(CASES.index(case))

    def organs(self, case: str) -> np.ndarray:
        """The values of a sound label."""
        return organs(CASES.index(case))

    def write_names(self, **changed: Any) -> None:
        """Write dataset.json with other keys; None removes one."""
        content = {key: value for key, value in (DATASET | changed).items() if value is not None}
        self.names.write_text(json.dumps(content), encoding="utf-8")

    def write_list(self, change: Callable[[dict[str, Any]], object] = lambda content: None) -> None:
        """Write dataset.json as a decathlon list of all cases, which `change` may edit."""
        content = {
            "labels": dict(NAMES),
            "training": [
                {"image": f"./imagesTr/{case}_0000.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in self.cases
            ],
        }
        change(content)
        self.names.write_text(json.dumps(content), encoding="utf-8")


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = AFFINE, kind: Any = nib.Nifti1Image) -> None:
    """Write a NIfTI file, compressed if its name says so."""
    content = nifti_bytes(voxels, affine, kind)
    path.write_bytes(compress(content) if path.suffix == ".gz" else content)


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace the uncompressed content of a .nii.gz."""
    path.write_bytes(compress(change(gzip.decompress(path.read_bytes()))))


def set_fields(path: Path, **fields: Any) -> None:
    """Overwrite fields of a NIfTI-1 header; pixdim, dim and the like may be given from their beginning."""

    def change(content: bytes) -> bytes:
        whole = bytearray(content)
        for name, value in fields.items():
            offset, kind = FIELDS[name]
            values = list(value) if isinstance(value, tuple | list | np.ndarray) else [value]
            present = struct.unpack_from(f"<{kind}", whole, offset)
            struct.pack_into(f"<{kind}", whole, offset, *values, *present[len(values) :])
        return bytes(whole)

    edit(path, change)
