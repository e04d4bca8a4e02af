"""Class scores by slabs are MONAI's to the bit, in whatever memory; label maps from them are those of whole scores."""

import errno
import os
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from scipy.ndimage import affine_transform

from hyspark.evaluation.segmentation import windows as sliding
from hyspark.evaluation.segmentation.inference import hybird_from_config
from hyspark.evaluation.segmentation.label_grids import Grid, label_dtype, label_maps
from hyspark.evaluation.segmentation.slab_storage import SlabStorage
from hyspark.evaluation.segmentation.slab_stream import BrokenStreamError, SlabStream
from hyspark.evaluation.segmentation.windows import Windows
from tests.evaluation.segmentation.test_predict import CONFIG
from tests.evaluation.segmentation.whole import CPU, to_grid, whole_scores

# MONAI before 1.6 under torch 2.8
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional:UserWarning")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return hybird_from_config(CONFIG, 3).eval()


def monais_scores(model, image, windows):
    with torch.no_grad():
        return sliding_window_inference(
            image[None, None], windows.size, windows.per_pass, model, overlap=windows.overlap, mode="gaussian"
        )[0]


@pytest.mark.parametrize("budget", [0, 60_000, 10**9])
@pytest.mark.parametrize(("shape", "overlap"), [((37, 20, 16), 0.5), ((35, 11, 18), 0.0), ((9, 16, 30), 0.7)])
def test_scores_are_monais_to_the_bit(network, shape, overlap, budget):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    windows = Windows((16, 16, 16), overlap, 3)
    assert torch.equal(whole_scores(network, image, windows, budget=budget), monais_scores(network, image, windows))


@pytest.mark.parametrize("budget", [0, 60_000])
@pytest.mark.parametrize("flips", [(0,), (0, 2)])
def test_flips_are_averaged_in_any_memory(network, flips, budget):
    image = torch.rand((37, 18, 16), generator=torch.Generator().manual_seed(1))
    windows = Windows((16, 16, 16), 0.5, 4, flips, ((1, 2),))
    subsets = [(), *((axis,) for axis in flips), *([flips] if len(flips) > 1 else [])]
    total = torch.zeros(3, *image.shape)
    for axes in subsets:
        back = monais_scores(network, image.flip(axes), windows).flip([1 + axis for axis in axes])
        total += back[[0, 2, 1]] if 0 in axes else back
    assert torch.equal(whole_scores(network, image, windows, budget=budget), total / len(subsets))


def test_of_a_large_volume_few_rows_are_held(monkeypatch, tmp_path):
    """Slabs are passed on while the windows of the next ones are computed."""
    storage = SlabStorage(10**9, tmp_path)
    made = []
    monkeypatch.setattr(storage, "zeros", lambda shape, zeros=storage.zeros: made.append(storage.used) or zeros(shape))
    image, windows = torch.rand(160, 8, 8), Windows((16, 8, 8), 0.5, 1)
    for _ in sliding.class_score_slabs(lambda x: torch.cat([x, -x], 1), image[None], windows, CPU, storage):
        pass
    assert max(made) <= 4 * 2 * 16 * 8 * 8
    assert len(made) > 10


def test_a_pass_that_memory_does_not_suffice_for_is_divided():
    sizes = []

    def little(crops):
        sizes.append(len(crops))
        if len(crops) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.cat([crops, 1 - crops], dim=1)

    image = torch.rand(40, 16, 16)
    scores = whole_scores(little, image, Windows((16, 16, 16), 0.5, 4))
    assert torch.allclose(scores[0], image, atol=1e-6)
    assert sizes[:5] == [4, 2, 1, 1, 2]

    def none(crops):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        whole_scores(none, image, Windows((16, 16, 16), 0.5, 4))


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="class scores hold NaN"):
        whole_scores(lambda crops: crops / 0 * 0, torch.rand(20, 16, 16), Windows((16, 16, 16)))


def slanted_by_scipy(scores, affine, shape, reference):
    """Label map on a slanted grid, of whole scores by SciPy's affine_transform."""
    to_scores = np.linalg.solve(affine, reference)
    options = {"matrix": to_scores[:3, :3], "offset": to_scores[:3, 3], "output_shape": shape}
    resampled = [
        affine_transform(score, **options, output=np.float32, order=1, mode="nearest") for score in scores.numpy()
    ]
    inside = affine_transform(np.ones(scores.shape[1:], np.uint8), **options, order=0, mode="grid-constant")
    return np.argmax(resampled, axis=0) * inside


@pytest.mark.parametrize("shape", [(13, 11, 9), (1, 8, 7)])
@pytest.mark.parametrize(("row", "column"), [(0, 2), (1, 2), (2, 0)])
@pytest.mark.parametrize("turn", [0, 20, 45])
def test_slanted_grids_are_scipys_to_the_bit(shape, row, column, turn):
    scores = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    reference = np.diag([0.7, 0.9, 1.9, 1.0])
    reference[row, column] += 0.4
    reference[:3, 3] = -2, -3, 1
    reference = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ reference
    wanted = slanted_by_scipy(scores, affine, (25, 17, 10), reference)
    for rows in (1, 4, 99):
        assert np.array_equal(to_grid(scores, affine, (25, 17, 10), reference, rows), wanted)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_slabs_of_any_size_give_one_label_map(axes):
    scores = torch.randn(5, 13, 11, 9, generator=torch.Generator().manual_seed(0))
    affine, reference = np.diag([1.5, 1.5, 2.0, 1.0]), np.eye(4)
    reference[:3] = reference[:3][list(axes)]
    reference[:3, :3] *= [0.7, -0.9, 1.1]
    reference[:3, 3] = 2, 3, 4
    whole = to_grid(scores, affine, (30, 30, 30), reference, rows=99)
    assert len(np.unique(whole)) == 5
    for rows in (1, 3):
        assert np.array_equal(to_grid(scores, affine, (30, 30, 30), reference, rows), whole)


@pytest.mark.parametrize(("num", "dtype"), [(256, np.uint8), (257, np.uint16), (300, np.uint16)])
def test_many_classes_keep_their_values(num, dtype):
    truth = np.random.default_rng(0).integers(0, num, (6, 5, 4))
    truth[0, 0, 0] = num - 1
    scores = torch.nn.functional.one_hot(torch.from_numpy(truth), num).permute(3, 0, 1, 2).float()
    maps = label_maps([(0, scores)], Grid(truth.shape, np.eye(4)), Grid(truth.shape, np.eye(4)))
    for labels in maps:
        assert labels.dtype == dtype == label_dtype(num)
        assert np.array_equal(labels, truth)


# The temporary file


def test_slabs_beyond_the_budget_lie_in_a_file_without_a_name(tmp_path):
    with SlabStorage(80, tmp_path / "new") as storage:
        first, second, third = (storage.zeros((1, 20)) for _ in range(3))
        assert [slab.slot for slab in (first, second, third)] == [None, 0, 1]
        for i, slab in enumerate((first, second, third)):
            slab.open().add_(i + 1)
        assert [slab.open().unique().tolist() for slab in (first, second, third)] == [[1], [2], [3]]
        second.release()
        assert storage.zeros((1, 10)).slot == 0
        assert storage.zeros((2, 5)).slot == 2
        assert list((tmp_path / "new").iterdir()) == []
    assert storage.file.closed


def test_a_file_that_the_disk_has_no_room_for(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with SlabStorage(0, tmp_path) as storage, pytest.raises(OSError, match=r"no room for .* --memory"):
        storage.zeros((4, 4))


def test_without_fallocate_the_file_is_written(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with tempfile.TemporaryDirectory() as folder, SlabStorage(0, Path(folder)) as storage:
        slab = storage.zeros((3, 4))
        slab.open().add_(2)
        assert slab.open().sum() == 24
        assert os.fstat(storage.file.fileno()).st_size == storage.slot_bytes


# From thread to thread


def test_a_stream_ends_with_its_sender():
    numbered = [(i, torch.zeros(1)) for i in range(2)]
    stream = SlabStream()
    stream.send(numbered)
    assert [i for i, _ in stream] == [0, 1]

    def broken():
        yield numbered[0]
        raise MemoryError

    stream = SlabStream()
    with pytest.raises(MemoryError):
        stream.send(broken())
    received = iter(stream)
    assert next(received)[0] == 0
    with pytest.raises(BrokenStreamError):
        next(received)


def test_a_sender_does_not_wait_for_a_receiver_that_failed():
    stream = SlabStream(limit=1)
    stream.close()
    stream.send((i, torch.zeros(1)) for i in range(5))
    assert not stream.is_complete
    assert not stream.waiting


def test_every_combination_is_covered():
    """Windows cover each voxel, whatever size, overlap and shape."""
    for shape, size, overlap in product([(5, 9, 16), (31, 8, 8)], [(8, 8, 8), (6, 7, 9)], [0, 0.3, 0.9]):
        image = torch.rand(shape)
        scores = whole_scores(lambda x: torch.cat([x, -x], 1), image, Windows(size, overlap, 2), budget=500)
        assert torch.allclose(scores[0], image, atol=1e-5)
