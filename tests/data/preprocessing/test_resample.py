"""Preparation gives what MONAI's transforms, called plainly, give: on any grid, in any file, wherever the body lies."""

import gzip
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)
from nibabel.affines import from_matvec
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing import resample
from hyspark.data.preprocessing.prepare import prepare_files, prepare_into
from hyspark.data.preprocessing.resample import region_above, whole_grid
from hyspark.data.quality.case_files import read_case
from hyspark.data.readers import nifti
from hyspark.data.settings import PrepareSettings

SETTINGS = PrepareSettings(spacing=(1.5, 1.5, 1.5))


def body(shape: tuple[int, ...], low: float = 0.25, high: float = 0.75, seed: int = 0) -> np.ndarray:
    """HU, int16: air, and rough tissue in a box that spans a part of each axis."""
    rng = np.random.default_rng(seed)
    hu = gaussian_filter(rng.normal(0, 900, shape), 1) + 40
    inside = np.zeros(shape, bool)
    inside[tuple(slice(int(low * n), max(int(high * n), int(low * n) + 1)) for n in shape)] = True
    return np.where(inside, hu, -1000).astype(np.int16)


def organs(image: np.ndarray) -> np.ndarray:
    """A label of the shape of an image, with small and large classes."""
    return np.digitize(image, (-150, 0, 100)).astype(np.uint8)


def write(folder: Path, image: nib.Nifti1Image, label: np.ndarray | None = None, ending: str = ".nii.gz") -> Case:
    paths = folder / f"a_0000{ending}", folder / f"a{ending}"
    nib.save(image, paths[0])
    if label is not None:
        nib.save(nib.Nifti1Image(label, image.affine), paths[1])
    return Case("a", "D", paths[0], None if label is None else paths[1])


def overwrite(path: Path, at: int, values: np.ndarray) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + values.nbytes] = values.tobytes()
    path.write_bytes(content)


def plain(case: Case, settings: PrepareSettings = SETTINGS) -> dict[str, torch.Tensor]:
    """The transforms one after the other, as anyone would call them."""
    data = {"image": case.image} | ({"label": case.label} if case.label else {})
    modes = ["bilinear", "nearest"][: len(data)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = Compose(
            [
                LoadImaged(list(data)),
                EnsureChannelFirstd(list(data)),
                Orientationd(list(data), axcodes="RAS"),
                Spacingd(list(data), pixdim=settings.spacing, mode=modes),
                ScaleIntensityRanged("image", settings.hu_min, settings.hu_max, 0.0, 1.0, clip=True),
                CropForegroundd(list(data), source_key="image"),
            ]
        )
        return steps(data)


def prepared(case: Case, settings: PrepareSettings) -> dict[str, np.ndarray]:
    """What preparation makes of the files, whatever is found wrong with their values."""
    return prepare_files(read_case(case, settings), settings)


def assert_same(case: Case, settings: PrepareSettings = SETTINGS, tolerance: float = 1e-6) -> dict[str, np.ndarray]:
    expected, got = plain(case, settings), prepared(case, settings)
    image = expected["image"].numpy()
    assert image.size > 0
    assert got["image"].shape == image.shape
    assert np.abs(got["image"] - image).max() <= tolerance
    assert np.allclose(got["affine"], expected["image"].affine.numpy(), rtol=0, atol=1e-9)
    if case.label is not None:
        assert np.array_equal(got["label"], expected["label"].numpy()[0])
    return got


def stored_as(code: str, spacing: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Affine of an array whose axes run as the code says; spacing in mm along the axes of the array."""
    turn = inv_ornt_aff(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(tuple(code))), shape)
    return from_matvec(np.eye(3), (-90.3, 17.1, -340)) @ turn @ np.diag([*spacing, 1])


@pytest.mark.parametrize("code", ["RAS", "LPS", "LAS", "SAR", "PIR", "ILP", "AIL"])
@pytest.mark.parametrize("spacing", [(0.703125, 0.703125, 2.5), (3.0, 3.0, 3.0), (1.5, 4.1, 0.9)])
def test_flipped_and_permuted_axes_and_anisotropic_spacing(tmp_path, code, spacing):
    voxels = body((37, 30, 23))
    image = nib.Nifti1Image(voxels, stored_as(code, spacing, voxels.shape))
    assert "".join(nib.aff2axcodes(image.affine)) == code
    got = assert_same(write(tmp_path, image, organs(voxels)))
    assert len(np.unique(got["label"])) == 4


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (1.5004, 1.4996, 1.5), (1.52, 1.5, 1.5)])
def test_spacing_that_is_or_nearly_is_the_target(tmp_path, spacing):
    voxels = body((40, 31, 22))
    assert_same(write(tmp_path, nib.Nifti1Image(voxels, np.diag([*spacing, 1])), organs(voxels)))


@pytest.mark.parametrize("degrees", [(0, 0, 12), (9, -20, 31), (0.01, 0, 0)])
@pytest.mark.parametrize("spacing", [(0.9, 0.9, 2.5), (1.5, 1.5, 1.5)])
def test_oblique_affine(tmp_path, degrees, spacing):
    voxels = body((33, 30, 21))
    linear = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(spacing)
    image = nib.Nifti1Image(voxels, from_matvec(linear, (5, -40, 3)))
    assert_same(write(tmp_path, image, organs(voxels)), tolerance=1e-5)


@pytest.mark.parametrize("shear", [3e-9, 3e-4, 0.02, 0.3])
@pytest.mark.parametrize("spacing", [(0.5, 0.5, 2.5), (1.5, 1.5, 1.5)])
def test_sheared_affine_as_of_a_tilted_gantry(tmp_path, shear, spacing):
    voxels = body((33, 30, 21))
    linear = np.diag(spacing) @ np.array([[1, 0, 0], [0, 1, shear], [0, 0, 1]])
    image = nib.Nifti1Image(voxels, from_matvec(linear, (5, -40, 3)))
    image.header.set_zooms(nib.affines.voxel_sizes(image.affine))
    assert_same(write(tmp_path, image, organs(voxels)))


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.7, 1.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("spacing", [(0.8, 1.1, 2.5), (2.9, 1.5, 1.0)])
def test_foreground_at_the_borders_everywhere_and_in_one_voxel(tmp_path, low, high, spacing):
    voxels = body((28, 25, 19), low, high)
    voxels = np.where(voxels > -1000, np.abs(voxels) + 20000, -1000).astype(np.int16)
    image = nib.Nifti1Image(voxels, np.diag([*spacing, 1]))
    assert_same(write(tmp_path, image, organs(voxels)))


@pytest.mark.parametrize("seed", range(20))
def test_random_grids_and_windows(tmp_path, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 40, 3))
    spacing = tuple(rng.uniform(0.4, 6, 3))
    code = rng.choice(["RAS", "LPS", "SAR", "ILP"])
    voxels = body(shape, rng.uniform(0, 0.5), rng.uniform(0.5, 1), seed)
    target = tuple(float(x) for x in rng.choice([0.8, 1.5, 2, 3.7], 3))
    low = float(rng.choice([-1000.0, -175.0, 0.0, 33.3]))
    case = write(tmp_path, nib.Nifti1Image(voxels, stored_as(code, spacing, shape)), organs(voxels))
    settings = PrepareSettings(spacing=target, hu_min=low, hu_max=low + 400)
    if plain(case, settings)["image"].numel():
        assert_same(case, settings)
    else:
        with pytest.raises(ValueError, match="no voxel lies above"):
            prepared(case, settings)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (1, 40, 40), (64, 64, 1), (5, 6, 7)])
def test_tiny_volumes(tmp_path, shape):
    voxels = np.abs(body(shape, 0, 1))
    assert_same(write(tmp_path, nib.Nifti1Image(voxels, np.diag([2, 0.7, 2.5, 1])), organs(voxels)))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "<i4", "<f4", ">f4", "<f8", "u1"])
def test_kinds_of_numbers(tmp_path, ending, dtype):
    voxels = body((30, 26, 17)).clip(0, 255) if np.dtype(dtype).kind == "u" else body((30, 26, 17)) * 0.9
    affine = np.diag([0.7, 0.7, 2.5, 1])
    image = nib.Nifti1Image(voxels.astype(dtype), affine, nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<"))
    image.set_data_dtype(np.dtype(dtype))
    case = write(tmp_path, image, ending=ending)
    assert nib.load(case.image).get_data_dtype() == np.dtype(dtype)
    assert_same(case)


def test_scaled_integers(tmp_path):
    case = write(tmp_path, nib.Nifti1Image(body((30, 26, 17)) + 1024, np.diag([0.7, 0.7, 2.5, 1])), ending=".nii")
    overwrite(case.image, 112, np.array([0.37, -380.5], "<f4"))  # scl_slope and scl_inter, which nibabel does not take
    assert nib.load(case.image).dataobj.slope == pytest.approx(0.37)
    assert_same(case)


def test_a_fourth_axis_of_length_one(tmp_path):
    voxels = body((30, 26, 17))
    case = write(tmp_path, nib.Nifti1Image(voxels[..., None], np.diag([-0.7, 0.7, 2.5, 1])), organs(voxels)[..., None])
    assert_same(case)


@pytest.mark.parametrize("threshold", [-1001.0, -175.0, 300.0])
def test_region_is_a_part_of_the_whole_grid_and_holds_all_above(threshold):
    voxels = body((40, 30, 25))
    image = nib.Nifti1Image(voxels, np.diag([-0.8, 0.8, 2.5, 1]))
    region, shape, start = region_above([image], (1.5, 1.5, 1.5), [threshold])
    whole = whole_grid(image, (1.5, 1.5, 1.5), "bilinear")
    assert whole.shape[1:] == shape
    box = tuple(slice(a, a + n) for a, n in zip(start, region.shape[1:], strict=True))
    assert np.allclose(region[0], whole[0][box], atol=1e-3)
    assert (region[0] > threshold).sum() == (whole[0] > threshold).sum() > 0
    assert (region.numel() == whole.numel()) == (threshold < -1000)


def test_only_the_region_is_interpolated_unless_the_grid_is_sheared(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the whole grid was computed")

    monkeypatch.setattr(resample, "whole_grid", refuse)
    voxels = body((40, 30, 25))
    turned = Rotation.from_euler("xyz", (0, 10, 0), degrees=True).as_matrix() @ np.diag([0.8, 0.8, 2.5])
    for linear in (np.diag([-0.8, 0.8, 2.5]), turned):
        image = nib.Nifti1Image(voxels, from_matvec(linear, (1, 2, 3)))
        assert region_above([image], (1.5, 1.5, 1.5), [-175])[0].numel() > 0
    turned[0, 1] += 0.05
    with pytest.raises(AssertionError, match="whole grid"):
        region_above([nib.Nifti1Image(voxels, from_matvec(turned, (1, 2, 3)))], (1.5, 1.5, 1.5), [-175])


@pytest.mark.parametrize("which", ["image", "label"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("filling", [0, 255])
def test_a_damaged_file_is_reported(tmp_path, which, part, filling):
    voxels = body((30, 26, 17))
    case = write(tmp_path, nib.Nifti1Image(voxels, np.diag([0.7, 0.7, 2.5, 1])), organs(voxels))
    path = getattr(case, which)
    overwrite(path, int(part * path.stat().st_size), np.full(64, filling, np.uint8))
    assert any(str(path) in error for error in prepare_into(case, SETTINGS, tmp_path / "entry").errors)


def test_compressed_in_several_members(tmp_path):
    case = write(tmp_path, nib.Nifti1Image(body((30, 26, 17)), np.diag([0.7, 0.7, 2.5, 1])))
    content = gzip.decompress(case.image.read_bytes())
    case.image.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert_same(case)


def test_nifti_2(tmp_path):
    assert_same(write(tmp_path, nib.Nifti2Image(body((30, 26, 17)), np.diag([-0.7, 0.7, 2.5, 1]))))


def test_a_label_as_stored_and_the_grid_of_its_file(tmp_path):
    path = tmp_path / "label.nii.gz"
    values = np.arange(24).reshape(2, 3, 4, 1) % 5
    affine = np.array([[-2.0, 0, 0, 5], [0, 0, 3, 6], [0, 4, 0, 7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)
    label = nifti.read_label(path, path, 5)
    assert label.voxels.dtype == np.uint8
    assert np.array_equal(label.voxels, values[..., 0])
    assert np.array_equal(label.affine, affine)
    shape, own = nifti.file_grid(path)
    assert shape == (2, 3, 4)
    assert np.array_equal(own, affine)
    with pytest.raises(ValueError, match=r"label\.nii\.gz: expected whole label values from 0 to 3"):
        nifti.read_label(path, path, 4)
