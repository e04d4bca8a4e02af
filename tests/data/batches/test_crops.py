"""Crops and augmentation are functions of (seed, position), stay in place, and keep image and label together."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import SpatialPad

from hyspark.data.batches.augmentation import AffineRange, augmentation
from hyspark.data.batches.crops import SliceSampling, crop_start, image_crop, labelled_crop
from hyspark.data.preprocessing.store import StoredVolume, write_entry
from hyspark.data.seeds import STREAMS, rng_at, seed_at, volume_at

NO_FLIPS = (0.0, 0.0, 0.0)


def make(folder: Path, image: np.ndarray, label: np.ndarray | None = None) -> StoredVolume:
    image = image.astype(np.float32)
    write_entry(folder, image=image, label=label, affine=np.eye(4), source="a.nii.gz")
    return StoredVolume(folder, folder.name)


def striped(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An image that is a function of its label: image = (label + 1) / 20."""
    label = np.random.default_rng(0).integers(0, 14, shape, np.uint8)
    return (label + np.float32(1)) / 20, label


def aligned(sample: dict) -> bool:
    """Whether a crop of `striped` still has its label, with (0, 0) outside the volume."""
    image, label = np.asarray(sample["image"]), np.asarray(sample["label"])
    return bool((label == np.maximum(np.rint(image * 20) - 1, 0)).all()) and bool((label > 0).any())


# Randomness as a function of (seed, position)


def test_seeds_are_functions_of_their_arguments():
    assert seed_at(3, "crop", 1, 2) == seed_at(3, "crop", 1, 2)
    assert 0 <= seed_at(0, "order") < 2**63
    assert np.array_equal(rng_at(3, "crop", 1, 2).random(5), rng_at(3, "crop", 1, 2).random(5))


def test_seeds_differ_by_seed_stream_and_position():
    uses = [
        (seed, stream, *position) for seed in range(3) for stream in STREAMS for position in product(range(4), repeat=3)
    ]
    uses += [(seed, stream) for seed in range(3) for stream in STREAMS]
    assert len({seed_at(*use) for use in uses}) == len(uses)


def test_streams_are_independent():
    draws = np.stack([[rng_at(0, stream, t).random() for t in range(400)] for stream in STREAMS])
    correlation = np.corrcoef(draws) - np.eye(len(STREAMS))
    assert np.abs(correlation).max() < 0.2
    assert np.abs(draws.mean(axis=1) - 0.5).max() < 0.07


@pytest.mark.parametrize("num", [1, 2, 7])
def test_every_pass_is_a_permutation_of_its_own(num):
    passes = [[volume_at(n * num + i, num, seed=5) for i in range(num)] for n in range(12)]
    assert all(sorted(one) == list(range(num)) for one in passes)
    assert len({tuple(one) for one in passes}) > (1 if num > 1 else 0)
    assert passes[0] == [volume_at(i, num, seed=5) for i in range(num)]


def test_the_order_depends_on_the_seed():
    orders = {tuple(volume_at(i, 20, seed) for i in range(20)) for seed in range(5)}
    assert len(orders) == 5


# Where a crop lies


@given(
    axes=st.lists(
        st.tuples(st.integers(1, 200), st.integers(1, 100), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=4
    )
)
def test_crops_stay_inside_and_hold_their_centre(axes):
    shape, size = [n for n, _, _ in axes], [s for _, s, _ in axes]
    centre = [int(n * u) for n, _, u in axes]
    for start, c, n, s in zip(crop_start(centre, shape, size), centre, shape, size, strict=True):
        assert start <= c < start + s
        if n >= s:
            assert 0 <= start <= n - s
            assert start == c - s // 2 or start in (0, n - s)
        else:
            assert start <= 0
            assert start + s >= n


@pytest.mark.parametrize("shape", [(9, 50, 6), (16, 31, 15), (1, 33, 17), (40, 32, 12)])
def test_small_volumes_lie_where_spatial_pad_puts_them(tmp_path, shape):
    size = (16, 32, 16)
    image = np.random.default_rng(0).random(shape, np.float32)
    centre = [n // 3 for n in shape]
    start = crop_start(centre, shape, size)
    padded = SpatialPad(size)(torch.from_numpy(image)[None]).numpy()[0]
    box = tuple(slice(max(0, a), max(0, a) + s) for a, s in zip(start, size, strict=True))
    read = make(tmp_path / "e", image).read("image", start, size)
    assert np.allclose(read, padded[box], atol=1e-4)


# Crops of an image alone


def test_image_crops_are_functions_of_the_generator(tmp_path):
    image = np.random.default_rng(0).random((40, 36, 30), np.float32)
    volume = make(tmp_path / "e", image)
    crops = [[image_crop(volume, (16, 16, 16), (0.5,) * 3, rng_at(0, "crop", t)) for t in range(4)] for _ in range(2)]
    assert np.array_equal(*crops)
    assert not np.array_equal(crops[0][0], crops[0][1])
    assert crops[0][0].shape == (1, 16, 16, 16)
    assert crops[0][0].dtype == np.float32


def test_image_crops_are_boxes_around_foreground(tmp_path):
    image = np.zeros((60, 60, 60))
    image[20:25, 40:45, 30:33] = np.random.default_rng(0).uniform(0.1, 1, (5, 5, 3))
    volume = make(tmp_path / "e", image)
    centres = set()
    for t in range(60):
        crop = image_crop(volume, (16, 16, 16), NO_FLIPS, rng_at(0, "crop", t))[0]
        assert crop[8, 8, 8] > 0
        centres.add(tuple(np.argwhere(np.isclose(image, crop[8, 8, 8], atol=1e-4))[0]))
        i, j, k = np.argwhere(np.isclose(image, crop[8, 8, 8], atol=1e-4))[0]
        assert np.allclose(crop, image[i - 8 : i + 8, j - 8 : j + 8, k - 8 : k + 8], atol=1e-4)
    assert len(centres) > 30


@pytest.mark.parametrize("flip_prob", [(0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (0.2, 0.5, 0.8)])
def test_flips_come_as_often_as_asked_for_on_their_axis(tmp_path, flip_prob):
    image = np.random.default_rng(0).uniform(0.1, 1, (6, 5, 4)).astype(np.float32)
    volume = make(tmp_path / "e", image)
    size, num = (8, 8, 8), 150
    plain = volume.read("image", crop_start((0, 0, 0), image.shape, size), size)
    flipped = {axes: np.flip(plain, axes) for axes in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))}
    counts: Counter[int] = Counter()
    for t in range(num):
        crop = image_crop(volume, size, flip_prob, rng_at(0, "crop", t))[0]
        (axes,) = (a for a, f in flipped.items() if np.array_equal(crop, f))
        counts.update(axes)
    for axis, p in enumerate(flip_prob):
        if p in (0, 1):
            assert counts[axis] == p * num
        else:
            assert abs(counts[axis] / num - p) < 4 * (p * (1 - p) / num) ** 0.5


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("stride", [1, 4])
def test_slices_are_those_of_the_volume(tmp_path, axis, stride):
    """Across each axis, at multiples of the stride, at the start that a crop would have in the slice."""
    image = np.random.default_rng(0).uniform(0.1, 1, (40, 36, 30)).astype(np.float32)
    volume = make(tmp_path / "e", image)
    stored = volume.read("image", (0, 0, 0), image.shape)
    found = set()
    for t in range(40):
        drawn = image_crop(volume, (16, 24), NO_FLIPS, rng_at(0, "crop", t), slices=SliceSampling(axis, stride))
        assert drawn.shape == (1, 16, 24)
        starts = np.argwhere(stored == drawn[0, 0, 0])
        (start,) = [p for p in starts if p[axis] % stride == 0 and fits(stored, p, drawn[0], axis)]
        found.add(int(start[axis]))
    assert len(found) > (20 if stride == 1 else 5)


def fits(stored, start, drawn, axis):
    """Whether the slice lies in the volume at this voxel."""
    size = np.insert(drawn.shape, axis, 1)
    box = stored[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
    return box.shape == tuple(size) and np.array_equal(box.squeeze(axis), drawn)


def test_slices_are_flipped_as_their_volume_is(tmp_path):
    image = np.random.default_rng(0).uniform(0.1, 1, (24, 20, 12)).astype(np.float32)
    volume = make(tmp_path / "e", image)
    rngs = [rng_at(0, "crop", 3) for _ in range(2)]
    plain = image_crop(volume, (24, 20), NO_FLIPS, rngs[0], slices=SliceSampling(2))
    flipped = image_crop(volume, (24, 20), (1.0, 0.0, 1.0), rngs[1], slices=SliceSampling(2))
    assert np.array_equal(flipped, plain[:, ::-1])


def test_slices_may_be_scaled_by_their_own_range(tmp_path):
    image = np.random.default_rng(0).uniform(0.2, 0.7, (20, 20, 20)).astype(np.float32)
    volume = make(tmp_path / "e", image)
    plain, own = (
        image_crop(volume, (16, 16), NO_FLIPS, rng_at(0, "crop", 0), slices=SliceSampling(2, own_range=own))
        for own in (False, True)
    )
    assert (own.min(), own.max()) == (0, 1)
    np.testing.assert_allclose(own, (plain - plain.min()) / np.ptp(plain), atol=1e-6)
    flat = make(tmp_path / "flat", np.full((20, 20, 20), 0.5))
    assert (
        image_crop(flat, (16, 16), NO_FLIPS, rng_at(0, "crop", 0), slices=SliceSampling(2, own_range=True)) == 0
    ).all()


# Crops with a label


@pytest.mark.parametrize("prob", [0.0, 0.5, 0.8, 1.0])
def test_so_many_labelled_crops_are_centred_on_a_label(tmp_path, prob):
    image, label = np.zeros((60, 60, 60)), np.zeros((60, 60, 60), np.uint8)
    image[15:45, 15:45, 15:45] = 0.5
    label[20:23, 30:33, 40:42] = 3
    volume = make(tmp_path / "e", image, label)
    num = 200
    crops = [labelled_crop(volume, (16, 16, 16), prob, rng_at(0, "crop", t)) for t in range(num)]
    assert all(crop["image"][0, 8, 8, 8] > 0 for crop in crops)
    on_label = sum(int(crop["label"][0, 8, 8, 8]) == 3 for crop in crops)
    assert on_label == prob * num if prob in (0, 1) else abs(on_label / num - prob) < 0.12


def test_labelled_crops_are_reproducible_and_aligned(tmp_path):
    volume = make(tmp_path / "e", *striped((40, 20, 12)))
    for t in range(20):
        one, two = (labelled_crop(volume, (16, 32, 16), 0.5, rng_at(0, "crop", t)) for _ in range(2))
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["label"], two["label"])
        assert one["image"].shape == one["label"].shape == (1, 16, 32, 16)
        assert (one["image"].dtype, one["label"].dtype) == (torch.float32, torch.int64)
        assert aligned(one)


@pytest.mark.parametrize("value", [0, 1])
def test_a_volume_all_or_nothing_labelled_still_gives_crops(tmp_path, value):
    ones = np.ones((20, 20, 20))
    volume = make(tmp_path / "e", ones, np.full(ones.shape, value, np.uint8))
    for t in range(10):
        crop = labelled_crop(volume, (16, 16, 16), 0.5, rng_at(0, "crop", t))
        assert (crop["label"] == value).all()


# Augmentation


def sample_of(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    image, label = striped(shape)
    return {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label.astype(np.int64))[None]}


def augmented(augment, sample: dict[str, torch.Tensor], seed: int) -> dict[str, np.ndarray]:
    out = augment.set_random_state(seed)(dict(sample))
    return {key: np.asarray(out[key])[0] for key in ("image", "label")}


def test_augmentation_is_a_function_of_the_seed():
    sample = sample_of((8, 8, 8))
    one, two = augmentation((0.5,) * 3, 0.5, 0.5), augmentation((0.5,) * 3, 0.5, 0.5)
    first = [augmented(one, sample, seed) for seed in range(30)]
    second = [augmented(two, sample, seed) for seed in reversed(range(30))][::-1]
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a["image"], b["image"])
        assert np.array_equal(a["label"], b["label"])
    assert len({a["label"].tobytes() for a in first}) > 8
    assert len({a["image"].tobytes() for a in first}) > 20


def test_augmentation_keeps_image_and_label_together():
    sample = sample_of((8, 8, 6))
    augment = augmentation((0.5,) * 3, 0.5, 0.0)
    moved = 0
    for seed in range(40):
        out = augmented(augment, sample, seed)
        assert aligned(out)
        moved += not np.array_equal(out["label"], sample["label"][0])
    assert moved > 25


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_augmentation_flips_the_axis_it_is_told_to(axis, p):
    sample = sample_of((8, 8, 8))
    plain = sample["label"][0].numpy()
    flip_prob = [0.0, 0.0, 0.0]
    flip_prob[axis] = p
    augment = augmentation(flip_prob, 0.0, 0.0)
    outs = [augmented(augment, sample, seed)["label"] for seed in range(100)]
    num = sum(np.array_equal(out, np.flip(plain, axis)) for out in outs)
    assert num + sum(np.array_equal(out, plain) for out in outs) == 100
    assert num == 100 * p if p in (0, 1) else 10 < num < 50


def test_quarter_turns_are_in_the_axial_plane():
    sample = sample_of((8, 8, 8))
    plain = sample["label"][0].numpy()
    augment = augmentation(NO_FLIPS, 1.0, 0.0)
    turns = Counter()
    for seed in range(60):
        out = augmented(augment, sample, seed)["label"]
        (k,) = (k for k in range(4) if np.array_equal(out, np.rot90(plain, k, (0, 1))))
        turns[k] += 1
    assert turns[0] == 0
    assert all(turns[k] > 8 for k in (1, 2, 3))


def rod_of(size: int) -> dict[str, torch.Tensor]:
    """A bar along the first axis through the middle of a cube, as bright as it is labelled."""
    bar = torch.zeros(1, size, size, size)
    bar[:, size // 4 : -size // 4, size // 2 - 4 : size // 2 + 4, size // 2 - 4 : size // 2 + 4] = 1
    return {"image": bar, "label": bar.long()}


@pytest.mark.parametrize(("degrees", "scale"), [(20.0, 0.0), (0.0, 0.2)])
def test_turns_and_stretches_stay_in_their_range_and_keep_image_and_label_together(degrees, scale):
    sample = rod_of(40)
    still = np.argwhere(sample["label"][0].numpy())[:, 0].std()
    augment = augmentation(NO_FLIPS, 0.0, 0.0, affine=AffineRange(1.0, degrees, scale))
    angles, lengths = [], []
    for seed in range(40):
        out = augmented(augment, sample, seed)
        assert out["image"].dtype == np.float32
        assert set(np.unique(out["label"])) == {0, 1}
        assert ((out["image"] > 0.5) == (out["label"] == 1)).mean() > 0.995
        where = np.argwhere(out["label"])
        assert np.abs(where.mean(0) - 19.5).max() < 1
        _, spread, directions = np.linalg.svd(where - where.mean(0), full_matrices=False)
        angles.append(np.degrees(np.arccos(abs(directions[0, 0]))))
        lengths.append(spread[0] / np.sqrt(len(where)) / still)
    if degrees:
        assert 10 < max(angles) < 20 * 2**0.5 + 1  # about two axes across the bar
        assert 0.97 < min(lengths) <= max(lengths) < 1.03
    else:
        assert max(angles) < 1
        assert 0.75 < min(lengths) < 0.93  # to a voxel at each end of the 20
        assert 1.07 < max(lengths) < 1.28


def test_what_comes_from_beyond_the_crop_is_air_and_background():
    full = {"image": torch.ones(1, 24, 24, 24), "label": torch.ones(1, 24, 24, 24, dtype=torch.int64)}
    augment = augmentation(NO_FLIPS, 0.0, 0.0, affine=AffineRange(1.0, 15.0, 0.2))
    outs = [augmented(augment, full, seed) for seed in range(20)]
    assert any((out["label"] == 0).mean() > 0.05 for out in outs)
    assert all((out["image"][out["label"] == 0] < 0.6).all() for out in outs)


def test_turns_and_stretches_come_as_often_as_told():
    sample = rod_of(24)
    augment = augmentation(NO_FLIPS, 0.0, 0.0, affine=AffineRange(0.3, 15.0, 0.2))
    same = sum(np.array_equal(augmented(augment, sample, seed)["label"], sample["label"][0]) for seed in range(100))
    assert 50 < same < 90


def test_intensities_change_by_a_tenth_and_labels_do_not():
    sample = sample_of((8, 8, 8))
    image = sample["image"][0].numpy()
    outs = [augmented(augmentation(NO_FLIPS, 0.0, 1.0), sample, seed) for seed in range(30)]
    assert all(np.array_equal(out["label"], sample["label"][0]) for out in outs)
    for out in outs:
        scale, shift = np.polyfit(image.ravel(), out["image"].ravel(), 1)
        assert 0.9 - 1e-4 <= scale <= 1.1 + 1e-4
        assert abs(shift) <= 0.1 + 1e-4
        assert not np.allclose(out["image"], image)
    unchanged = augmented(augmentation(NO_FLIPS, 0.0, 0.0), sample, 0)["image"]
    assert np.array_equal(unchanged, image)


def test_a_left_right_flip_swaps_the_sides():
    """Organ 1 lies left, organ 2 right, organ 3 in the middle; each voxel of the image tells its position."""
    label = torch.zeros(1, 6, 4, 4, dtype=torch.int64)
    label[:, 0], label[:, 5], label[:, 2] = 1, 2, 3
    sample = {"image": torch.arange(96.0).view(1, 6, 4, 4) / 96, "label": label}
    mirrored = augmented(augmentation((1.0, 0.0, 0.0), 0.0, 0.0, ((1, 2),)), sample, 0)
    assert np.array_equal(mirrored["image"], sample["image"][0].numpy()[::-1])
    assert (mirrored["label"][0] == 1).all()  # still on the left, though its voxels were the right one's
    assert (mirrored["label"][5] == 2).all()
    assert (mirrored["label"][3] == 3).all()
    kept = augmented(augmentation((0.0, 0.0, 0.0), 0.0, 0.0, ((1, 2),)), sample, 0)
    assert np.array_equal(kept["label"], label[0].numpy())


def test_a_left_right_flip_comes_as_often_as_it_is_told_to():
    sample = sample_of((8, 8, 8))
    augment = augmentation((0.3, 0.0, 0.0), 0.0, 0.0, ((1, 2),))
    image = sample["image"][0].numpy()
    flips = sum(not np.array_equal(augmented(augment, sample, seed)["image"], image) for seed in range(300))
    assert 60 < flips < 120
