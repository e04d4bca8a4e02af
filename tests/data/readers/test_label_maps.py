"""A label lies on its image in space, in any order of its voxels; its values are whole but for rounding."""

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff
from scipy.spatial.transform import Rotation

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.quality.examine import examine
from hyspark.data.readers.geometry import Grid, pair_fault
from hyspark.data.readers.nifti import read_label
from hyspark.data.settings import PrepareSettings

SETTINGS = PrepareSettings(spacing=(2.0, 2.0, 2.0))
AFFINE = np.array([[-1.0, 0, 0, 30], [0, 0, 5, -40], [0, 1, 0, 7], [0, 0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (20, -35, 44), degrees=True).as_matrix() @ np.diag([1, 1, 5])
AXES_AND_SIGNS = product(permutations(range(3)), product((1, -1), repeat=3))
ORDERS = [np.array([*zip(axes, signs, strict=True)]) for axes, signs in AXES_AND_SIGNS]


def write_pair(folder: Path, label: np.ndarray, label_affine: np.ndarray, affine: np.ndarray = AFFINE) -> Case:
    rng = np.random.default_rng(0)
    shape = (20, 24, 17)
    image = np.where(rng.random(shape) > 0.5, 40, -1000).astype(np.int16)
    case = Case("a", "D", folder / "a_0000.nii.gz", folder / "a.nii.gz")
    nib.save(nib.Nifti1Image(image, affine), case.image)
    nib.save(nib.Nifti1Image(label, label_affine), case.label)
    return case


def classes() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 5, (20, 24, 17)).astype(np.uint8)


def kinds(case: Case) -> list[str]:
    return [f.kind for f in examine(case, SETTINGS, None).findings if f.file == str(case.label)]


@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE], ids=["upright", "oblique"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_label_in_any_order_of_voxels(tmp_path, order, affine):
    label = classes()
    case = write_pair(tmp_path, apply_orientation(label, order), affine @ inv_ornt_aff(order, label.shape), affine)
    assert kinds(case) == []
    read = read_label(case.label, case.image)
    assert np.array_equal(read.voxels, label)
    assert np.allclose(read.affine, affine, atol=1e-4)


def test_a_label_in_another_order_is_prepared_as_one_in_the_same(tmp_path):
    label, order = classes(), np.array([[2, -1], [0, 1], [1, -1]])
    expected = prepare_case(write_pair(tmp_path, label, AFFINE), SETTINGS)["label"]
    turned = write_pair(tmp_path, apply_orientation(label, order), AFFINE @ inv_ornt_aff(order, label.shape))
    assert np.array_equal(prepare_case(turned, SETTINGS)["label"], expected)


@pytest.mark.parametrize(
    ("shift", "fault"),
    [
        ((0, 2, 0), None),
        ((0, 2.5, 0), None),
        ((0.4, -2.4, 0.4), None),
        ((4.5, 0, 0), "label elsewhere"),
        ((0.6, 0, 0), "label elsewhere"),
        ((0, 0, -0.6), "label elsewhere"),
        ((0, 2.6, 0), "label elsewhere"),
    ],
)
def test_half_a_voxel_of_each_axis(shift, fault):
    moved = AFFINE.copy()
    moved[:3, 3] += shift
    found = pair_fault(Grid((20, 24, 17), AFFINE), Grid((20, 24, 17), moved))
    assert (found[0] if found else None) == fault


def test_a_mirrored_and_a_turned_and_a_larger_label():
    image = Grid((20, 24, 17), AFFINE)
    for matrix in (np.diag([-1, 1, 1, 1]), np.diag([1, 1, 1.2, 1])):
        assert pair_fault(image, Grid(image.shape, AFFINE @ matrix))[0] == "label elsewhere"
    assert pair_fault(image, Grid((20, 24, 17), AFFINE @ OBLIQUE))[0] in ("label elsewhere", "label of another shape")
    assert pair_fault(image, Grid((24, 20, 17), AFFINE))[0] == "label of another shape"


def test_edges_that_differ_slightly_give_the_shape_of_the_image(tmp_path):
    label_affine = AFFINE @ np.diag([1.015, 1.015, 1, 1])
    prepared = prepare_case(write_pair(tmp_path, classes(), label_affine), SETTINGS)
    assert prepared["label"].shape == prepared["image"].shape[1:]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_whole_but_for_rounding(tmp_path, dtype):
    noise = np.random.default_rng(0).uniform(-9e-4, 9e-4, classes().shape)
    case = write_pair(tmp_path, (classes() + noise).astype(dtype), AFFINE)
    seen = examine(case, SETTINGS, frozenset(range(5)))
    assert kinds(case) == []
    assert set(seen.label_voxels) == set(range(5))
    assert np.array_equal(read_label(case.label, case.image, 5).voxels, classes())
    assert set(np.unique(prepare_case(case, SETTINGS)["label"])) == set(range(5))


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.998, "label not whole", "0.998"),
        (2.5, "label not whole", "2.5"),
        (1.0012345, "label not whole", "1.0012345"),
        (-1, "label outside 0 to 255", "-1"),
        (256, "label outside 0 to 255", "256"),
        (np.nan, "NaN or infinite", "nan"),
        (np.inf, "NaN or infinite", "inf"),
    ],
)
def test_values_that_are_none_of_a_label(tmp_path, value, kind, text):
    label = classes().astype(np.float64)
    label[3, 4, 5] = value
    case = write_pair(tmp_path, label, AFFINE)
    (finding,) = [f for f in examine(case, SETTINGS, None).findings if f.file == str(case.label)]
    assert (finding.kind, finding.found) == (kind, f"values {text}")
    for read in (lambda: read_label(case.label, case.image, 5), lambda: prepare_case(case, SETTINGS)):
        with pytest.raises(ValueError, match=rf"a\.nii\.gz: .*{text}"):
            read()
