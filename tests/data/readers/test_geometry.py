"""One geometry of a NIfTI file in all verbs: that of SimpleITK, an independent reader, or that of the standard."""

import gzip
import math
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from nibabel.affines import apply_affine, voxel_sizes
from scipy.spatial.transform import Rotation

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.quality.examine import examine
from hyspark.data.quality.findings import FINDING_KINDS
from hyspark.data.readers.nifti import file_grid
from hyspark.data.readers.volumes import Volume, read_volume
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.label_output import LabelOutput
from hyspark.evaluation.segmentation.predict import write_label_map
from hyspark.evaluation.segmentation.segmenter import VolumeSegmenter
from hyspark.evaluation.segmentation.windows import Windows
from hyspark.training.distributed import find_processes
from tests.data.readers.nifti_files import CUBE, SHAPE, nifti_bytes, voxels, write_bytes

EDGES = (2, 2.5, 3)
ORIGIN = (-31.5, 12, -204)
TURNED = Rotation.from_euler("xyz", (7, -12, 25), degrees=True).as_matrix()


def sform(linear: np.ndarray, origin: tuple[float, ...] = ORIGIN, code: int = 1) -> dict[str, Any]:
    return {"sform_code": code, "srow": np.column_stack([linear, origin])}


def qform(rotation: np.ndarray, origin: tuple[float, ...] = ORIGIN, code: int = 1, scale: float = 1) -> dict[str, Any]:
    x, y, z, w = Rotation.from_matrix(rotation).as_quat()
    quaternion = np.array([x, y, z]) * (1 if w >= 0 else -1) * scale
    return {"qform_code": code, "quatern": quaternion, "qoffset": origin}


def pixdim(*edges: float, sign: float = 1) -> dict[str, Any]:
    return {"pixdim": (sign, *edges, 1, 1, 1, 1)}


@dataclass
class Row:
    """A file, the kinds of finding that `check` reports of it, and its affine where SimpleITK departs from NIfTI."""

    fields: dict[str, Any] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    affine: np.ndarray | None = None
    ending: str = ".nii"


def made(linear: np.ndarray, origin: tuple[float, ...] = ORIGIN) -> np.ndarray:
    return np.vstack([np.column_stack([linear, origin]), [0, 0, 0, 1]])


SIZES = np.diag(EDGES)
BOTH = sform(TURNED @ SIZES) | qform(TURNED)
ROWS: dict[str, Row] = {}
for version in (1, 2):
    for order in "<>":
        for ending in (".nii", ".nii.gz"):
            for name, forms in (("both", BOTH), ("qform", qform(TURNED)), ("sform", sform(TURNED @ SIZES))):
                fields = forms | {"version": version, "order": order}
                known = made(TURNED @ SIZES) if version == 2 else None  # ITK does not read NIfTI-2
                ROWS[f"{name} {version}{order}{ending}"] = Row(fields, set(), known, ending)
for code in (1, 2, 3, 4, 5):
    ROWS[f"sform code {code}"] = Row(sform(TURNED @ SIZES, code=code))
    ROWS[f"qform code {code}"] = Row(qform(TURNED, code=code))
    ROWS[f"qform code {code}, sform code 1"] = Row(BOTH | {"qform_code": code})
for number, (axes, signs) in enumerate(zip(permutations(range(3)), np.ndindex(2, 2, 2), strict=False)):
    matrix = (np.eye(3) * np.where(signs, -1, 1))[:, axes]
    ROWS[f"order {number}"] = Row(sform(matrix @ SIZES))
    ROWS[f"order {number}, oblique"] = Row(sform(TURNED @ matrix @ SIZES))
    sign = np.sign(np.linalg.det(matrix))
    ROWS[f"order {number}, qform"] = Row(qform(matrix @ np.diag([1, 1, sign])) | pixdim(*EDGES, sign=sign))
FAR = (-131.5, 12, -204)
MIRROR = np.diag([-1, 1, 1])
FLAT = np.array([[2, 2, 0], [0, 0, 0], [0, 0, 3.0]])
SHEARED = SIZES + np.array([[0, 0, 0.9], [0, 0, 0], [0, 0, 0]])
ODD, APART = {"odd field"}, {"sform and qform disagree"}
FLIPPED = np.diag([-1, -1, 1, 1])
ROWS |= {
    "qfac 0": Row(qform(TURNED) | pixdim(*EDGES, sign=0)),
    "qfac -1": Row(qform(TURNED) | pixdim(*EDGES, sign=-1)),
    "qfac 5": Row(qform(TURNED) | pixdim(*EDGES, sign=5), ODD),
    "qfac -3": Row(qform(TURNED) | pixdim(*EDGES, sign=-3), ODD),
    "quaternion rounded above 1": Row(qform(np.diag([-1, -1, 1]), scale=1.00001), ODD),
    "quaternion of length 1.4": Row(qform(np.diag([-1, -1, 1]), scale=1.4), ODD),
    "quaternion NaN": Row(qform(TURNED, scale=np.nan), {"singular affine"}),
    "quaternion NaN, sform": Row(sform(TURNED @ SIZES) | qform(TURNED, scale=np.nan), APART, made(TURNED @ SIZES)),
    "sizes: sform, pixdim": Row(
        sform(TURNED @ SIZES * 1.2), {"pixdim disagrees"}, made(TURNED @ SIZES * 1.2)
    ),
    "sizes: sform, qform and pixdim": Row(
        sform(TURNED @ SIZES * 1.2) | qform(TURNED), {"pixdim disagrees"} | APART, made(TURNED @ SIZES * 1.2)
    ),
    "sizes: rounded": Row(sform(TURNED @ SIZES) | pixdim(2, 2.5, 3.0004), set(), made(TURNED @ SIZES)),
    "position: scanner": Row(sform(TURNED @ SIZES) | qform(TURNED, FAR), APART),
    "position: aligned": Row(sform(TURNED @ SIZES, code=2) | qform(TURNED, FAR), APART, made(TURNED @ SIZES)),
    "position: MNI": Row(sform(TURNED @ SIZES, code=4) | qform(TURNED, FAR), APART, made(TURNED @ SIZES)),
    "position: within half a voxel": Row(sform(SIZES) | qform(np.eye(3), (-31, 12, -204))),
    "handedness": Row(sform(MIRROR @ SIZES) | qform(np.eye(3)), APART),
    "handedness, aligned": Row(sform(MIRROR @ SIZES, code=2) | qform(np.eye(3)), APART, made(MIRROR @ SIZES)),
    "no codes": Row({}, {"no orientation"}, made(MIRROR @ SIZES, (21, -23.75, -25.5))),
    "sform code 7": Row(sform(TURNED @ SIZES, code=7), ODD),
    "sform code -3": Row(sform(SIZES, FAR, code=-3) | qform(TURNED), ODD),
    "qform code -1, no sform": Row(
        qform(TURNED, code=-1), ODD | {"no orientation"}, made(MIRROR @ SIZES, (21, -23.75, -25.5))
    ),
    "sform zero": Row(sform(SIZES * 0, (0, 0, 0)), {"singular affine"}),
    "sform zero, qform": Row(sform(SIZES * 0, (0, 0, 0)) | qform(TURNED), {"singular affine"}),
    "sform singular": Row(sform(FLAT), {"singular affine"}),
    "sform NaN": Row(sform(SIZES * np.nan), {"singular affine"}),
    "sform infinite": Row(sform(SIZES, (np.inf, 0, 0)), {"singular affine"}),
    "sform sheared": Row(sform(SHEARED), {"sheared affine", "pixdim disagrees"}, made(SHEARED)),
    "sform sheared, qform": Row(
        sform(SHEARED) | qform(np.eye(3)), {"sheared affine", "pixdim disagrees"} | APART, made(SHEARED)
    ),
    "sform of 1 km": Row(sform(SIZES * 500), {"impossible spacing", "pixdim disagrees"}),
    "pixdim zero": Row(qform(TURNED) | pixdim(2, 0, 3), {"impossible spacing"}),
    "pixdim zero, sform": Row(BOTH | pixdim(2, 0, 3), {"impossible spacing"}),
    "pixdim negative": Row(qform(TURNED) | pixdim(-2, 2.5, 3), {"impossible spacing"}),
    "pixdim negative, sform": Row(BOTH | pixdim(-2, 2.5, 3), {"impossible spacing"}),
    "pixdim NaN": Row(qform(TURNED) | pixdim(2, np.nan, 3), {"impossible spacing"}),
    "pixdim infinite, no codes": Row(pixdim(2, np.inf, 3), {"impossible spacing", "no orientation"}),
    "metres": Row(sform(TURNED @ SIZES / 1000, (-0.03, 0, 0.2)) | pixdim(*np.divide(EDGES, 1000)) | {"xyzt_units": 1},
                  {"not in mm"}),
    "metres, qform": Row(qform(TURNED, (-0.03, 0, 0.2)) | pixdim(*np.divide(EDGES, 1000)) | {"xyzt_units": 17},
                         {"not in mm"}),
    "micrometres": Row(sform(TURNED @ SIZES * 1000) | pixdim(*np.multiply(EDGES, 1000)) | {"xyzt_units": 3},
                       {"not in mm"}),
    "unit unknown": Row(BOTH | {"xyzt_units": 0}),
    "unit of no length": Row(BOTH | {"xyzt_units": 5}, ODD),
    "mm that are called metres": Row(BOTH | {"xyzt_units": 1}, {"impossible spacing", "not in mm"}),
    "a fourth axis": Row(BOTH | {"dim": (4, *SHAPE, 1, 1, 1, 1)}),
    "five axes": Row(BOTH | {"dim": (5, *SHAPE, 1, 1, 9, 9)}),
    "slope 0": Row(BOTH | {"scl_slope": 0, "scl_inter": 77}),
    "slope NaN": Row(BOTH | {"scl_slope": np.nan}),
    "voxels from 353": Row(BOTH | {"vox_offset": 353, "gap": 5}),
    "voxels from 0": Row(BOTH | {"vox_offset": 0}, ODD),
    "voxels from 100": Row(BOTH | {"vox_offset": 100}, ODD),
    "size of another header": Row(BOTH | {"sizeof_hdr": 340}, ODD),
    "magic of a pair": Row(BOTH | {"magic": b"ni1\0"}, ODD),
}  # fmt: skip
SETTINGS = PrepareSettings(spacing=(2.0, 2.0, 2.0))
FATAL = ("impossible spacing", "singular affine")


def itk_affine(path: Path) -> tuple[np.ndarray, Any]:
    """The affine to RAS mm of the first three axes, and the image, by SimpleITK."""
    image = sitk.ReadImage(str(path))
    dims = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(dims, dims)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing())[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return FLIPPED @ affine, image


@pytest.fixture(autouse=True)
def _quiet():
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def test_there_are_enough_rows():
    assert len(ROWS) >= 60


@pytest.mark.parametrize("name", ROWS)
def test_every_verb_has_the_geometry_of_an_independent_reader(tmp_path, name):
    row = ROWS[name]
    path = write_bytes(tmp_path / f"a{row.ending}", nifti_bytes(voxels(), **row.fields))
    seen = examine(Case("a", "D", path), SETTINGS, None)
    assert {f.kind for f in seen.findings} == row.kinds
    assert seen.shape == SHAPE
    if any(kind in FATAL for kind in row.kinds):
        for read in (file_grid, lambda path: read_volume(Volume("a", "a", path)), prepare):
            with pytest.raises(ValueError, match=r"impossible spacing|singular affine|expected a"):
                read(path)
        return

    expected = itk_affine(path)[0] if row.affine is None else row.affine
    scale = voxel_sizes(expected).max() * 1e-5
    assert np.allclose(seen.spacing, voxel_sizes(expected), atol=scale)
    assert np.allclose(file_grid(path).affine, expected, atol=40 * scale)
    cube = apply_affine(expected, [(c.start + c.stop - 1) / 2 for c in CUBE])
    turned, own = read_volume(Volume("a", "a", path))
    assert np.abs(centre(turned > 0, own) - cube).max() < 0.01
    prepared = prepare(path)
    assert np.abs(centre(prepared["image"][0] > 0.5, prepared["affine"]) - cube).max() < 1.5

    edge = prepared["image"].max() / 2
    scores = torch.from_numpy(np.concatenate([edge - prepared["image"], prepared["image"] - edge]))
    target = tmp_path / "label.nii.gz"
    segmenter = VolumeSegmenter(torch.nn.Identity(), 2, Windows((32, 32, 32)), find_processes("cpu"), "fp32", tmp_path)
    write_label_map(
        segmenter, [(0, scores)], scores.shape[1:], prepared["affine"], Case("a", "a", path), target, LabelOutput()
    )
    found = np.frombuffer(gzip.decompress(target.read_bytes())[-math.prod(SHAPE) :], np.uint8).reshape(SHAPE, order="F")
    truth = voxels() > 0
    assert 2 * (found * truth).sum() / (found.sum() + truth.sum()) > 0.8
    assert np.array_equal(file_grid(target).affine, file_grid(path).affine)
    if row.fields.get("version") == 2 or row.kinds == {"sheared affine", "pixdim disagrees"}:
        return  # which ITK does not read
    (source, image), (written, labels) = itk_affine(path), itk_affine(target)
    assert np.array_equal(written, source)
    assert labels.GetSize()[:3] == image.GetSize()[:3]
    assert np.array_equal(sitk.GetArrayFromImage(labels).T, found)


def prepare(path: Path) -> dict[str, Any]:
    return prepare_case(Case("a", "D", path), SETTINGS)


def centre(where: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return apply_affine(affine, np.argwhere(where).mean(axis=0))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("not NIfTI", {"magic": b"xx1\0"}),
        ("not NIfTI", {"magic": b"ni1\0", "vox_offset": 0}),
        ("not NIfTI", {"datatype": 77}),
        ("not NIfTI", {"datatype": 1}),
        ("damaged", {"version": 2, "magic": b"n+2\0\n\x1a\n\0"}),
        ("damaged", {"dim": (3, 30000, 30000, 30000, 1, 1, 1, 1)}),
        ("damaged", {"vox_offset": 1e9}),
        ("not 3D", {"dim": (9, *SHAPE, 1, 1, 1, 1)}),
        ("not 3D", {"dim": (0, *SHAPE, 1, 1, 1, 1)}),
        ("not 3D", {"dim": (2, *SHAPE, 1, 1, 1, 1)}),
        ("not 3D", {"dim": (3, 22, -20, 18, 1, 1, 1, 1)}),
        ("not 3D", {"dim": (6, 11, 10, 18, 2, 1, 2, 1)}),
        ("colours", {"datatype": 128}),
        ("complex numbers", {"datatype": 32}),
        ("NaN or infinite", {"scl_slope": 2, "scl_inter": np.inf}),
    ],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_that_is_no_volume_is_named_by_every_verb(tmp_path, kind, fields, ending):
    path = write_bytes(tmp_path / f"a{ending}", nifti_bytes(voxels(), **BOTH | fields))
    assert [f.kind for f in examine(Case("a", "D", path), SETTINGS, None).findings] == [kind]
    for read in (file_grid, lambda path: read_volume(Volume("a", "a", path)), prepare):
        with pytest.raises(ValueError, match=r"expected .*|unreadable as NIfTI .*; copy or convert"):
            read(path)


def test_every_kind_is_known():
    assert {kind for row in ROWS.values() for kind in row.kinds} <= set(FINDING_KINDS)
