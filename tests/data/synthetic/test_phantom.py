"""The phantom is a plausible, reproducible CT, and its files are a valid nnU-Net dataset."""

import itertools
import json
from functools import lru_cache

import nibabel as nib
import numpy as np
import pytest

from hyspark.data.synthetic.anatomy import LABELS
from hyspark.data.synthetic.phantom import Phantom, make_phantom, write_phantoms

COARSE = (5.0, 5.0, 5.0)
ORGANS = {name: number for name, number in LABELS.items() if number}
MIN_VOLUME_ML = {
    "liver": 500,
    "spleen": 50,
    "right_kidney": 40,
    "left_kidney": 40,
    "aorta": 80,
    "spine": 250,
    "right_lung": 700,
    "left_lung": 700,
}
MEAN_HU = {
    "liver": (50, 130),
    "spleen": (50, 150),
    "right_kidney": (60, 190),
    "left_kidney": (60, 190),
    "aorta": (60, 260),
    "spine": (170, 350),
    "right_lung": (-900, -650),
    "left_lung": (-900, -650),
}
AXIS_CODES = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]


@lru_cache(maxsize=32)
def phantom(seed: int, spacing: tuple[float, float, float] = (3.0, 3.0, 3.0)) -> Phantom:
    return make_phantom(seed, spacing=spacing)


def volume_ml(case: Phantom, name: str) -> float:
    return float((case.label == LABELS[name]).sum() * abs(np.linalg.det(case.affine[:3, :3])) / 1000)


def centre_mm(case: Phantom, mask: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(case.affine, np.argwhere(mask).mean(axis=0))


def canonical(case: Phantom) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image = nib.as_closest_canonical(nib.Nifti1Image(case.image, case.affine))
    label = nib.as_closest_canonical(nib.Nifti1Image(case.label, case.affine))
    assert np.array_equal(image.affine, label.affine)
    return np.asarray(image.dataobj), np.asarray(label.dataobj), image.affine


def test_one_seed_is_one_case():
    first, second = (make_phantom(3, spacing=COARSE) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.label, second.label)
    assert np.array_equal(first.affine, second.affine)


def test_seeds_are_different_bodies():
    volumes = np.array([[volume_ml(phantom(seed), name) for name in ORGANS] for seed in range(10)])
    variation = volumes.std(axis=0) / volumes.mean(axis=0)
    assert (variation > 0.04).all(), dict(zip(ORGANS, variation, strict=True))
    assert len({phantom(seed).image.shape for seed in range(10)}) > 5


@pytest.mark.parametrize("seed", range(10))
def test_every_organ_is_there_with_plausible_volume_and_density(seed):
    case = phantom(seed)
    assert case.image.dtype == np.int16
    assert case.label.dtype == np.uint8
    assert case.affine.dtype == np.float64
    assert case.image.shape == case.label.shape
    assert set(np.unique(case.label)) == set(LABELS.values())
    assert case.image.min() >= -1024
    assert case.image.max() <= 3071
    for name, number in ORGANS.items():
        assert volume_ml(case, name) > MIN_VOLUME_ML[name], name
        low, high = MEAN_HU[name]
        assert low < case.image[case.label == number].mean() < high, name


@pytest.mark.parametrize("seed", range(4))
def test_air_surrounds_the_body(seed):
    image = phantom(seed).image
    margins = [image[:2], image[-2:], image[:, :1], image[:, -1:]]
    for margin in margins:
        assert abs(margin.mean() + 1000) < 10
    assert (image < -900).mean() < 0.65


def test_soft_tissue_is_noisy_but_not_too_noisy():
    for seed in range(4):
        case = phantom(seed)
        assert 6 < case.image[case.label == LABELS["spleen"]].std() < 40


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("orientation", ["RAS", "LPS"])
def test_right_is_right_and_up_is_up(seed, orientation):
    case = make_phantom(seed, spacing=COARSE, orientation=orientation)
    centre = {name: centre_mm(case, case.label == number) for name, number in ORGANS.items()}
    body = centre_mm(case, case.image > -300)
    right, front, up = 0, 1, 2
    assert centre["liver"][right] > body[right] + 20
    assert centre["spleen"][right] < body[right] - 40
    for organ in ("kidney", "lung"):
        assert centre[f"right_{organ}"][right] > body[right] + 20
        assert centre[f"left_{organ}"][right] < body[right] - 20
    assert centre["aorta"][right] < centre["spine"][right]
    assert centre["aorta"][front] > centre["spine"][front] + 15
    assert body[front] > centre["spine"][front] + 15
    assert centre["right_lung"][up] > centre["liver"][up] + 50 > centre["right_kidney"][up] + 50


@pytest.mark.parametrize("orientation", AXIS_CODES)
def test_orientation_changes_only_the_storage(orientation):
    small = {"spacing": (5.0, 6.0, 7.0), "extent_scale": 0.4}
    stored = make_phantom(1, orientation=orientation, **small)
    assert "".join(nib.aff2axcodes(stored.affine)) == orientation
    for ours, expected in zip(canonical(stored), canonical(make_phantom(1, **small)), strict=True):
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spacing", [(4.0, 4.0, 4.0), (2.5, 3.5, 5.0)])
def test_another_spacing_is_the_same_body(seed, spacing):
    fine, coarse = phantom(seed), phantom(seed, spacing)
    assert np.allclose(nib.affines.voxel_sizes(coarse.affine), spacing)
    for name, number in ORGANS.items():
        assert volume_ml(coarse, name) == pytest.approx(volume_ml(fine, name), rel=0.12), name
        shift = centre_mm(fine, fine.label == number) - centre_mm(coarse, coarse.label == number)
        assert np.abs(shift).max() < 2, name
        densities = [c.image[c.label == number].mean() for c in (fine, coarse)]
        assert densities[0] == pytest.approx(densities[1], rel=0.1), name


def test_a_small_scale_is_a_small_volume_with_every_organ():
    whole, half = phantom(2), make_phantom(2, extent_scale=0.5)
    assert np.allclose(np.divide(whole.image.shape, half.image.shape), 2, atol=0.1)
    assert set(np.unique(half.label)) == set(LABELS.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"orientation": "RAR"}, "orientation"),
        ({"orientation": "RA"}, "orientation"),
        ({"orientation": "XYZ"}, "orientation"),
        ({"spacing": (3.0, 0.0, 3.0)}, "spacing"),
        ({"spacing": (3.0, 3.0)}, "spacing"),
        ({"extent_scale": 0.0}, "extent_scale"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(0, **wrong)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    arguments = {"num_labelled": 2, "num_unlabelled": 3, "spacings": [(6.0, 6.0, 6.0), (5.0, 5.0, 8.0)]}
    write_phantoms(folder, progress=False, **arguments)
    return folder, arguments


def test_files_follow_the_nnunet_layout(written):
    folder, _ = written
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "Dataset900_PhantomLabelled/dataset.json",
        "Dataset900_PhantomLabelled/imagesTr/phantom_000_0000.nii.gz",
        "Dataset900_PhantomLabelled/imagesTr/phantom_001_0000.nii.gz",
        "Dataset900_PhantomLabelled/labelsTr/phantom_000.nii.gz",
        "Dataset900_PhantomLabelled/labelsTr/phantom_001.nii.gz",
        "Dataset901_PhantomUnlabelled/imagesTr/trunk_000_0000.nii.gz",
        "Dataset901_PhantomUnlabelled/imagesTr/trunk_001_0000.nii.gz",
        "Dataset901_PhantomUnlabelled/imagesTr/trunk_002_0000.nii.gz",
    ]
    description = json.loads((folder / "Dataset900_PhantomLabelled" / "dataset.json").read_text())
    assert description == {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }


def test_written_volumes_can_be_read_and_differ_in_geometry(written):
    folder, _ = written
    images = [nib.load(p) for p in sorted(folder.rglob("*_0000.nii.gz"))]
    for image in images:
        assert image.get_data_dtype() == np.int16
        assert image.header["sform_code"] > 0
        assert image.header["qform_code"] > 0
        assert np.allclose(image.get_sform(), image.get_qform(), atol=1e-3)
    assert len({nib.aff2axcodes(image.affine) for image in images}) >= 4
    assert len({tuple(np.round(nib.affines.voxel_sizes(nib.as_closest_canonical(i).affine), 3)) for i in images}) == 2
    labelled = folder / "Dataset900_PhantomLabelled"
    for number in range(2):
        image = nib.load(labelled / "imagesTr" / f"phantom_{number:03d}_0000.nii.gz")
        label = nib.load(labelled / "labelsTr" / f"phantom_{number:03d}.nii.gz")
        assert label.get_data_dtype() == np.uint8
        assert label.shape == image.shape
        assert np.array_equal(label.affine, image.affine)
        assert set(np.unique(label.dataobj)) == set(LABELS.values())


def test_no_body_occurs_twice(written):
    # The volume is centred on the body, which lies elsewhere in the scanner for every seed.
    folder, _ = written
    images = [nib.load(p) for p in folder.rglob("*_0000.nii.gz")]
    middles = [nib.affines.apply_affine(i.affine, (np.array(i.shape) - 1) / 2) for i in images]
    for first, second in itertools.combinations(middles, 2):
        assert np.abs(first - second).max() > 0.1


def test_writing_again_gives_the_same_bytes_and_another_seed_does_not(written, tmp_path):
    folder, arguments = written
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}
    write_phantoms(tmp_path / "again", progress=False, **arguments)
    write_phantoms(tmp_path / "other", progress=False, seed=1, **arguments)
    for path, content in before.items():
        assert (tmp_path / "again" / path).read_bytes() == content, path
        if path.suffix == ".gz":
            assert (tmp_path / "other" / path).read_bytes() != content, path


def test_a_count_of_zero_skips_its_dataset(tmp_path):
    write_phantoms(tmp_path, num_labelled=0, num_unlabelled=1, spacings=[(8.0, 8.0, 8.0)], progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["Dataset901_PhantomUnlabelled"]


def test_cases_of_another_run_are_not_mixed_in(written):
    folder, arguments = written
    with pytest.raises(ValueError, match="phantom_001"):
        write_phantoms(folder, progress=False, **{**arguments, "num_labelled": 1})


@pytest.mark.parametrize("wrong", [{"num_labelled": -1}, {"spacings": []}, {"seed": -1}])
def test_wrong_counts_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="expected at least 0, and at least one spacing"):
        write_phantoms(tmp_path, **{"num_labelled": 1, "num_unlabelled": 1, "progress": False, **wrong})
