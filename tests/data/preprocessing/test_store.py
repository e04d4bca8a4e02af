"""The store gives any box of a volume back, draws voxels of a kind evenly, and holds whole entries only."""

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from hyspark.data.intensity import stored_steps
from hyspark.data.preprocessing.entry_files import is_complete
from hyspark.data.preprocessing.store import (
    MAX_OPEN,
    StoredVolume,
    cell_counts,
    entry_folder,
    open_array,
    write_entry,
)
from hyspark.data.settings import PrepareSettings

AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])
SHAPES = ((70, 33, 65), (5, 7, 3), (64, 64, 1), (1, 17, 40), (32, 64, 32), (64, 64, 64))


def make(folder: Path, image: np.ndarray, label: np.ndarray | None = None) -> StoredVolume:
    write_entry(folder, image=image.astype(np.float32), label=label, affine=AFFINE, source="a.nii.gz")
    return StoredVolume(folder, folder.name)


def sparse(rng: np.random.Generator, shape: tuple[int, ...], num: int) -> np.ndarray:
    """True at `num` random voxels."""
    return (rng.permutation(np.prod(shape)) < num).reshape(shape)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Per shape: the volume and the arrays it was made from."""
    rng = np.random.default_rng(0)
    made = {}
    for shape in SHAPES:
        image, label = rng.random(shape, np.float32), rng.integers(0, 14, shape, np.uint8)
        made[shape] = make(tmp_path_factory.mktemp("store") / "entry", image, label), image, label
    return made


@given(data=st.data(), shape=st.sampled_from(SHAPES))
@settings(max_examples=150, deadline=None)
def test_any_box_is_a_slice_of_the_zero_padded_volume(stored, data, shape):
    volume, image, label = stored[shape]
    start = [data.draw(st.integers(-50, n + 20)) for n in shape]
    size = [data.draw(st.integers(1, 48)) for _ in shape]
    inside = np.ix_(*(np.arange(s, s + e) for s, e in zip(start, size, strict=True)))  # indices may lie outside
    valid = np.ones(size, bool)
    for index, n in zip(inside, shape, strict=True):
        valid &= (index >= 0) & (index < n)
    clipped = tuple(np.clip(index, 0, n - 1) for index, n in zip(inside, shape, strict=True))
    for array, expected, error in (("image", image, 1e-5), ("label", label, 0)):
        box = volume.read(array, start, size)
        assert box.shape == tuple(size)
        assert box.dtype == expected.dtype
        assert np.abs(box - np.where(valid, expected[clipped], 0)).max() <= error


@pytest.mark.parametrize("start", [(-40, 0, 0), (70, 0, 0), (200, 40, -200), (0, -8, 0), (0, 0, 65)])
def test_a_box_outside_the_volume_is_zero(stored, start):
    for array in ("image", "label"):
        box = stored[SHAPES[0]][0].read(array, start, (8, 8, 8))
        assert box.shape == (8, 8, 8)
        assert not box.any()


def test_zero_and_one_are_exact(tmp_path):
    image = np.random.default_rng(0).choice([0.0, 1.0, 0.3], (20, 20, 20))
    read = make(tmp_path / "e", image).read("image", (0, 0, 0), (20, 20, 20))
    assert np.array_equal(read == 0, image == 0)
    assert np.array_equal(read == 1, image == 1)
    assert read.dtype == np.float32


def test_boxes_can_be_written_to(stored):
    volume, image, _ = stored[SHAPES[0]]
    box = volume.read("image", (0, 0, 0), (8, 8, 8))
    box[:] = 7
    assert np.allclose(volume.read("image", (0, 0, 0), (8, 8, 8)), image[:8, :8, :8], atol=1e-4)


def test_entry_describes_the_volume(stored):
    entry = stored[SHAPES[0]][0].entry
    assert entry.shape == SHAPES[0]
    assert np.array_equal(entry.affine, AFFINE)
    assert entry.source == "a.nii.gz"


@pytest.mark.parametrize("shape", [(40, 35, 33), (65, 1, 31), (32, 64, 32)])
@pytest.mark.parametrize("kind", ["foreground", "labelled", "unlabelled"])
def test_voxels_of_a_kind_are_drawn_evenly(tmp_path, shape, kind):
    rng = np.random.default_rng(1)
    image = sparse(rng, shape, 60) * 0.5
    label = (sparse(rng, shape, 50) | (sparse(rng, shape, np.prod(shape) // 2) & (image > 0))).astype(np.uint8)
    wanted = {"foreground": image > 0, "labelled": label > 0, "unlabelled": (image > 0) & (label == 0)}[kind]
    volume = make(tmp_path / "e", image, label)
    num_kind, num_draws = np.count_nonzero(wanted), 2000
    assert num_kind > 15
    drawn = np.zeros(shape, int)
    for _ in range(num_draws):
        drawn[volume.draw_voxel(kind, rng)] += 1
    assert not drawn[~wanted].any()
    assert (drawn[wanted] > 0).all()
    mean = num_draws / num_kind
    assert np.sum((drawn[wanted] - mean) ** 2 / mean) < chi2.ppf(1 - 1e-4, num_kind - 1)


def test_kinds_without_a_label(tmp_path):
    image = sparse(np.random.default_rng(0), (10, 10, 10), 5)
    volume = make(tmp_path / "e", image)
    rng = np.random.default_rng(0)
    assert volume.draw_voxel("labelled", rng) is None
    assert image[volume.draw_voxel("unlabelled", rng)]
    assert image[volume.draw_voxel("foreground", rng)]


def test_none_where_there_is_no_voxel_of_the_kind(tmp_path):
    rng = np.random.default_rng(0)
    ones = np.ones((9, 9, 9))
    assert make(tmp_path / "full", ones, ones.astype(np.uint8)).draw_voxel("unlabelled", rng) is None
    assert make(tmp_path / "bare", ones, 0 * ones.astype(np.uint8)).draw_voxel("labelled", rng) is None
    assert make(tmp_path / "air", 0 * ones).draw_voxel("foreground", rng) is None


def test_the_draw_depends_on_the_generator_alone(stored):
    volume = stored[SHAPES[0]][0]
    draws = [[volume.draw_voxel("labelled", np.random.default_rng(seed)) for seed in range(5)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (32, 32, 32), (33, 65, 31), (100, 3, 64)])
def test_cell_counts_at_odd_shapes(shape):
    where = np.random.default_rng(0).random(shape) < 0.3
    counts = cell_counts(where)
    assert counts.shape == tuple(-(-n // 32) for n in shape)
    for cell in np.ndindex(counts.shape):
        assert counts[cell] == np.count_nonzero(where[tuple(slice(32 * c, 32 * c + 32) for c in cell)])


def test_a_failing_write_leaves_nothing(tmp_path):
    ones = np.ones((8, 8, 8), np.float32)
    with pytest.raises(ValueError, match="broadcast"):
        write_entry(tmp_path / "e", image=ones, label=np.ones((8, 8, 5), np.uint8), affine=AFFINE, source="a")
    assert not is_complete(tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_writing_an_existing_entry_again_keeps_it(tmp_path):
    image = np.random.default_rng(0).random((8, 8, 8))
    make(tmp_path / "e", image)
    volume = make(tmp_path / "e", image)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    assert np.allclose(volume.read("image", (0, 0, 0), (8, 8, 8)), image, atol=1e-4)


def test_an_entry_in_the_way_that_is_not_whole_is_an_error(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "stray").write_text("")
    with pytest.raises(OSError, match="not empty"):
        make(tmp_path / "e", np.ones((8, 8, 8)))
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_entry_is_readable_json(stored):
    loaded = json.loads((stored[SHAPES[1]][0].folder / "entry.json").read_text())
    assert loaded["shape"] == list(SHAPES[1])


def test_folder_name_is_stable_and_depends_on_files_and_settings(tmp_path):
    image, label = tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"
    image.write_text("image")
    label.write_text("label")
    folders = [
        entry_folder(tmp_path, PrepareSettings(), image, None),
        entry_folder(tmp_path, PrepareSettings(), image, label),
        entry_folder(tmp_path, PrepareSettings(), label, None),
        entry_folder(tmp_path, PrepareSettings(hu_max=200.0), image, None),
    ]
    assert len(set(folders)) == 4
    assert entry_folder(tmp_path, PrepareSettings(), tmp_path / "." / "image.nii.gz", None) == folders[0]
    image.write_text("another")
    assert entry_folder(tmp_path, PrepareSettings(), image, None) != folders[0]


def test_a_stored_volume_pickles_small(stored):
    volume, image, _ = stored[SHAPES[0]]
    volume.draw_voxel("foreground", np.random.default_rng(0))
    data = pickle.dumps(volume)
    assert len(data) < 2000
    assert np.allclose(pickle.loads(data).read("image", (1, 2, 3), (4, 5, 6)), image[1:5, 2:7, 3:9], atol=1e-4)


def test_reading_a_crop_does_not_make_the_volume(tmp_path):
    volume = make(tmp_path / "e", np.random.default_rng(0).random((160, 160, 160)))
    assert volume.entry.shape == (160, 160, 160)
    tracemalloc.start()
    try:
        volume.read("image", (60, 60, 60), (32, 32, 32))
        volume.draw_voxel("foreground", np.random.default_rng(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 160**3 / 8  # bytes; the volume has 16 times as many


@pytest.mark.parametrize(("low", "high"), [(-175.0, 250.0), (-1000.0, 1000.0), (0.0, 512.0), (-174.5, 250.3), (0, 1e5)])
def test_steps_are_a_power_of_two_per_hu_and_fit_16_bits(low, high):
    steps = stored_steps(PrepareSettings(hu_min=low, hu_max=high))
    assert 32767 <= steps <= 65535
    power = np.log2(steps / (high - low))
    assert power == pytest.approx(round(power), abs=1e-4)
    assert stored_steps(PrepareSettings()) == 425 * 128


@pytest.mark.parametrize("steps", [54400, 32768, 40001])
def test_steps_decide_the_error_and_keep_zero_and_one(tmp_path, steps):
    image = np.random.default_rng(0).random((20, 20, 20), np.float32)
    image[0], image[1] = 0, 1
    write_entry(tmp_path / "e", image=image, label=None, affine=AFFINE, source="a.nii.gz", steps=steps)
    volume = StoredVolume(tmp_path / "e", "e")
    read = volume.read("image", (0, 0, 0), (20, 20, 20))
    assert 0.4 / steps < np.abs(read - image).max() < 0.51 / steps
    assert not read[0].any()
    assert (read[1] == 1).all()


def test_few_arrays_stay_open(tmp_path):
    for number in range(MAX_OPEN + 4):
        make(tmp_path / f"{number}", np.ones((8, 8, 8))).read("image", (0, 0, 0), (2, 2, 2))
    assert open_array.cache_info().currsize == MAX_OPEN
