"""What a network sees of a volume equals an independent computation, for each intensity, from the file to a crop."""

import hashlib
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hyspark.data.batches.crops import SliceSampling, crop_maps, image_crop
from hyspark.data.batches.loader import Shard
from hyspark.data.batches.views import ViewRecipe
from hyspark.data.batches.volumes import NO_FLIPS, FinetuneBatches, PretrainBatches, ValidationCrops
from hyspark.data.datasets.cases import Case
from hyspark.data.intensity import check_intensity, to_fractions, to_input
from hyspark.data.preprocessing.prepare import prepare_case, prepare_missing, stored_volumes
from hyspark.data.preprocessing.store import StoredVolume, case_folder
from hyspark.data.quality.examine import examine
from hyspark.data.settings import PrepareSettings

MM = (1.0, 1.0, 1.0)
SHAPE = (30, 26, 22)
MR = PrepareSettings(spacing=MM, intensity=("mr",))
NONE = PrepareSettings(spacing=MM, intensity=("none",))
CT = PrepareSettings(spacing=MM)
ZSCORE = PrepareSettings(spacing=MM, intensity=("ct-zscore",), input_mean=(80.0,), input_std=(120.0,))


def head(seed: int = 0, shift: int = 0) -> np.ndarray:
    """A bright ellipsoid with a brighter core in noise of air, as MR; int16."""
    rng = np.random.default_rng(seed)
    x, y, z = (np.indices(SHAPE) - np.array(SHAPE).reshape(3, 1, 1, 1) / 2) / np.array([11, 9, 8]).reshape(3, 1, 1, 1)
    radius = np.sqrt((x - shift / 11) ** 2 + y**2 + z**2)
    values = np.where(radius < 0.5, 900, np.where(radius < 1, 400, 0)) + rng.normal(0, 30, SHAPE) * (radius < 1)
    return (values + np.abs(rng.normal(0, 8, SHAPE))).astype(np.int16)


def body(seed: int = 0) -> np.ndarray:
    """The same shape in HU."""
    return (head(seed).astype(np.int32) * 3 // 2 - 700).clip(-1000, 400).astype(np.int16)


def save_case(folder: Path, *channels: np.ndarray, label: np.ndarray | None = None) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"a_{number:04d}.nii.gz" for number in range(len(channels))]
    for file, voxels in zip(files, channels, strict=True):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
    of_label = None
    if label is not None:
        nib.save(nib.Nifti1Image(label, np.eye(4)), of_label := folder / "a.nii.gz")
    return Case("a", "D", files[0], of_label, others=tuple(files[1:]))


def store(case: Case, settings: PrepareSettings, folder: Path) -> StoredVolume:
    assert prepare_missing([case], settings, folder, 1, progress=False) == {}
    return stored_volumes([case], settings, folder)[0]


def seen_by_network(volume: StoredVolume) -> np.ndarray:
    return to_input(volume.read_whole(), volume.maps)


def z_scores(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The z-scores of MR as the settings describe them, and the foreground."""
    t2, t98 = np.percentile(voxels, 2), np.percentile(voxels, 98)
    foreground = voxels > t2 + (t98 - t2) / 10
    low, high = np.percentile(voxels[foreground], 0.5), np.percentile(voxels[foreground], 99.5)
    clipped = np.clip(voxels.astype(float), low, high)
    return (clipped - clipped[foreground].mean()) / clipped[foreground].std(), foreground


def bounds(foreground: np.ndarray) -> tuple[slice, ...]:
    where = np.nonzero(foreground)
    return tuple(slice(w.min(), w.max() + 1) for w in where)


def test_mr_is_the_z_score_of_its_clipped_foreground(tmp_path):
    expected, foreground = z_scores(head())
    box = bounds(foreground)
    assert foreground[box].size < foreground.size / 2
    volume = store(save_case(tmp_path, head()), MR, tmp_path / "store")
    found = seen_by_network(volume)[0]
    assert np.allclose(found, expected[box], atol=3e-4)
    assert found.min() == pytest.approx(expected.min(), abs=1e-5)
    drawn = {volume.draw_voxel("foreground", np.random.default_rng(i)) for i in range(300)}
    assert all(foreground[box][voxel] for voxel in drawn)
    counts = np.load(volume.folder / "counts.npy")
    assert counts[0].sum() == foreground.sum()


def test_zscores_of_an_image_are_those_within_its_border_of_zeros(tmp_path):
    values = head().astype(np.int16) + 5
    values[:4], values[:, -3:], values[..., :2] = 0, 0, 0
    inner = values[4:, :-3, 2:].astype(np.float64)
    expected = (inner - inner.mean()) / inner.std()
    volume = store(
        save_case(tmp_path / "data", values), PrepareSettings(spacing=MM, intensity=("zscore",)), tmp_path / "s"
    )
    assert volume.entry.shape == inner.shape
    found = to_input(volume.read_channels([0, 0, 0], inner.shape), volume.maps)[0]
    np.testing.assert_allclose(found, expected, atol=1.1 * (expected.max() - expected.min()) / 65535)


def test_mr_that_is_resampled_has_the_range_of_its_file(tmp_path):
    settings = PrepareSettings(spacing=(2.0, 2.0, 2.0), intensity=("mr",))
    prepared = prepare_case(save_case(tmp_path, head()), settings)
    native = head()
    values = native[::2, ::2, ::2].astype(float)  # where the grid's voxels lie
    expected, _ = z_scores(native)
    lowest = expected.min()
    found = to_input(prepared["image"].copy(), prepared["maps"])[0]
    assert found.min() == pytest.approx(lowest, abs=1e-5)
    t2, t98 = np.percentile(native, (2, 98))
    box = bounds(values > t2 + 0.1 * (t98 - t2))
    assert np.allclose(found, expected[::2, ::2, ::2][box], atol=3e-4)


def test_z_scores_of_ct_are_read_from_the_voxels_of_ct(tmp_path):
    case = save_case(tmp_path, body())
    plain = store(case, CT, tmp_path / "store")
    volume = stored_volumes([case], ZSCORE, tmp_path / "store")[0]
    assert volume.folder == plain.folder
    hu = np.clip(body(), -175, 250).astype(float)
    assert np.allclose(seen_by_network(volume)[0], ((hu - 80) / 120)[bounds(body() > -175)], atol=1e-4)
    assert np.array_equal(plain.read_whole(), volume.read_whole())
    prepared = prepare_case(case, ZSCORE)
    assert np.allclose(to_input(prepared["image"], prepared["maps"]), seen_by_network(volume), atol=1e-4)


def test_values_as_they_are(tmp_path):
    voxels = head() + np.int16(1000)
    volume = store(save_case(tmp_path, voxels), NONE, tmp_path / "store")
    found = seen_by_network(volume)[0]
    assert np.abs(found - voxels[bounds(voxels > voxels.min())]).max() < 1e-3  # but for rounding
    floats = np.random.default_rng(0).gamma(2, 3.0, SHAPE).astype(np.float32)
    other = store(save_case(tmp_path / "f", floats), NONE, tmp_path / "store")
    assert np.abs(seen_by_network(other)[0] - floats).max() <= np.ptp(floats) / 65535


def test_an_entry_of_ct_is_what_it_always_was(tmp_path):
    case = save_case(tmp_path, body())
    stat = case.image.stat()
    key = {"format": 5, "spacing": [1.0, 1.0, 1.0], "hu_min": -175.0, "hu_max": 250.0}
    key["image"] = [str(case.image.resolve()), stat.st_size, stat.st_mtime_ns]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    volume = store(case, CT, tmp_path / "store")
    assert volume.folder.name == name
    entry = json.loads((volume.folder / "entry.json").read_text())
    assert list(entry) == ["shape", "affine", "source", "max_label", "steps", "sizes", "checksums"]
    assert sorted(os.listdir(volume.folder)) == ["counts.npy", "entry.json", "image.b2nd"]
    assert volume.maps == [None]


def test_other_settings_are_other_entries(tmp_path):
    case, two = save_case(tmp_path, body()), save_case(tmp_path / "two", body(), head())
    wider = PrepareSettings(spacing=MM, intensity=("mr",), hu_max=300.0)
    both = PrepareSettings(spacing=MM, intensity=("mr",), image_channels=(0, 1))
    mixed = PrepareSettings(spacing=MM, intensity=("ct", "mr"), image_channels=(0, 1))
    folders = [case_folder(tmp_path, settings, one) for one in (case, two) for settings in (CT, MR, NONE, both, mixed)]
    assert len(set(folders)) == len(folders)
    assert case_folder(tmp_path, wider, case) == case_folder(tmp_path, MR, case)  # no channel reads the window
    assert case_folder(tmp_path, ZSCORE, case) == case_folder(tmp_path, CT, case)


def test_channels_have_their_own_intensities_and_one_foreground(tmp_path):
    settings = PrepareSettings(spacing=MM, intensity=("ct", "mr"), image_channels=(0, 1))
    shifted = head(1, shift=4)
    case = save_case(tmp_path, body(), shifted, label=(head() > 800).astype(np.uint8))
    volume = store(case, settings, tmp_path / "store")
    z, foreground = z_scores(shifted)
    union = (body() > -175) | foreground
    box = bounds(union)
    found = seen_by_network(volume)
    assert found.shape == (2, *union[box].shape)
    assert np.allclose(found[0], ((np.clip(body(), -175, 250) + 175) / 425)[box], atol=1e-4)
    assert np.allclose(found[1], z[box], atol=3e-4)
    assert np.load(volume.folder / "counts.npy")[0].sum() == union.sum()
    drawn = [volume.draw_voxel("unlabelled", np.random.default_rng(i)) for i in range(100)]
    assert all(union[box][voxel] for voxel in drawn)
    assert any(not foreground[box][voxel] for voxel in drawn)


@pytest.mark.parametrize("settings", [MR, NONE, ZSCORE], ids=["mr", "none", "ct-zscore"])
def test_beyond_the_volume_lies_its_lowest_value(tmp_path, settings):
    voxels = body() if settings is ZSCORE else head() - np.int16(50)
    volume = store(save_case(tmp_path, voxels, label=(head() > 800).astype(np.uint8)), settings, tmp_path / "store")
    size = (48, 48, 48)
    lowest = seen_by_network(volume).min()
    crops = PretrainBatches([volume], Shard(1), size, 1, NO_FLIPS, 0)[0]["volumes"]
    held_out = ValidationCrops([volume], size, 1, seed=0)[0]["volumes"]
    finetuning = FinetuneBatches([volume], Shard(1), size, 1, NO_FLIPS, 0.0, 0.0, 0.5, 0)[0]["image"]
    assert crops.shape == held_out.shape == finetuning.shape == (1, 1, *size)
    for crop in (crops, held_out, finetuning):
        assert crop[0, 0, 0, 0, 0] == pytest.approx(lowest, abs=1e-6) == crop.min()
    assert crops.max() == pytest.approx(seen_by_network(volume).max(), abs=1e-6)


def test_augmentation_is_that_of_fractions(tmp_path):
    """A crop of z-scores is the z-score of the crop of CT, whatever is drawn."""
    case = save_case(tmp_path, body(), label=(head() > 800).astype(np.uint8))
    plain = store(case, CT, tmp_path / "store")
    scored = stored_volumes([case], ZSCORE, tmp_path / "store")[0]
    drawing = (Shard(1), (16, 16, 16), 4, (0.5,) * 3, 0.5, 1.0, 0.5, 0)
    one, other = (FinetuneBatches([volume], *drawing)[0]["image"] for volume in (plain, scored))
    assert np.allclose(other, (one * 425 - 175 - 80) / 120, atol=1e-4)
    recipe = ViewRecipe((16, 16, 16), 0.6, 1, (0.5,) * 3)
    views, z_views = (recipe.draw(volume, np.random.default_rng(0)) for volume in (plain, scored))
    for view, z_view in zip(views, z_views, strict=True):
        assert np.allclose(z_view, (view * 425 - 175 - 80) / 120, atol=1e-4)
        assert np.allclose(to_fractions(z_view, scored.maps), view, atol=1e-5)


def test_a_slice_in_its_own_range_is_not_mapped_again(tmp_path):
    volume = store(save_case(tmp_path, head(), head(1)), PrepareSettings(
        spacing=MM, intensity=("mr",), image_channels=(0, 1)), tmp_path / "store")  # fmt: skip
    slices = SliceSampling(2, own_range=True)
    crop = image_crop(volume, (16, 16), NO_FLIPS, np.random.default_rng(0), slices=slices)
    assert crop.min(axis=(1, 2)).tolist() == [0, 0]
    assert crop.max(axis=(1, 2)).tolist() == [1, 1]
    assert list(crop_maps(volume, slices)) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"intensity": ("MR",)}, r"intensity: expected ct, ct-zscore, mr, zscore, none, got 'MR'"),
        ({"intensity": ()}, "intensity: expected ct"),
        ({"intensity": ("mr", "ct")}, r"intensity: expected one value, or one for each of the 1 image_channels, got 2"),
        ({"image_channels": ()}, "image_channels: expected different numbers"),
        ({"image_channels": (0, 0)}, "image_channels: expected different numbers"),
        ({"image_channels": (-1,)}, "image_channels: expected different numbers"),
        ({"intensity": ("ct-zscore",)}, r"plans\.json.*foreground_intensity_properties_per_channel"),
        ({"intensity": ("ct-zscore",), "input_mean": (1.0,)}, "expected input_mean and input_std"),
        (
            {"intensity": ("ct-zscore",), "input_mean": (1.0,), "input_std": (0.0,)},
            "input_std: expected numbers above 0",
        ),
        ({"intensity": ("mr",), "input_mean": (1.0,)}, "read by intensity ct-zscore alone"),
        ({"intensity": ("mr",), "hu_min": 0.0}, "hu_min and hu_max: read by the intensities ct and ct-zscore alone"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_intensity(PrepareSettings(**given))


def test_a_case_of_mr_is_examined_in_its_own_range(tmp_path):
    seen = examine(save_case(tmp_path, head()), MR, None)
    assert not seen.is_broken
    assert seen.counts is not None
    assert seen.counts[0] > SHAPE[0] * SHAPE[1] * SHAPE[2] / 2  # the background
    assert seen.thumbnail is not None
    assert seen.thumbnail.max() == 255
    assert len(np.unique(seen.thumbnail)) > 20
