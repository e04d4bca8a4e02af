"""Batch t is a function of (seed, t): not of the number of workers or processes, nor of where a run starts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from hyspark.data.batches.loader import Batch, Shard, make_loader
from hyspark.data.batches.volumes import FinetuneBatches, PretrainBatches, ValidationCrops
from hyspark.data.preprocessing.store import StoredVolume, write_entry

SIZE = (16, 16, 16)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> list[StoredVolume]:
    """Three volumes, one of them smaller than the crop."""
    rng = np.random.default_rng(0)
    made = []
    for number, shape in enumerate([(30, 28, 40), (20, 40, 18), (12, 10, 30)]):
        folder = tmp_path_factory.mktemp("store") / f"entry{number}"
        image, label = rng.random(shape, np.float32), rng.integers(0, 3, shape, np.uint8)
        write_entry(folder, image=image, label=label, affine=np.eye(4), source="a.nii.gz")
        made.append(StoredVolume(folder, f"case{number}"))
    return made


def pretrain_batches(volumes: Sequence[StoredVolume], share: Shard, seed: int = 0) -> PretrainBatches:
    return PretrainBatches(volumes, share, SIZE, 2, (0.5, 0.5, 0.5), seed)


def finetune_batches(volumes: Sequence[StoredVolume], share: Shard, seed: int = 0) -> FinetuneBatches:
    return FinetuneBatches(volumes, share, SIZE, 2, (0.5, 0.5, 0.5), 0.5, 0.5, 0.5, seed)


def load(dataset, items: Sequence[int], num_workers: int = 0) -> list[Batch]:
    return list(make_loader(dataset, items, num_workers, pin_memory=False))


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


def all_same(a: Sequence[Batch], b: Sequence[Batch]) -> bool:
    return len(a) == len(b) > 0 and all(same(x, y) for x, y in zip(a, b, strict=True))


BOTH = pytest.mark.parametrize("batches", [pretrain_batches, finetune_batches])


@BOTH
def test_batches_do_not_depend_on_the_number_of_workers(volumes, batches):
    dataset = batches(volumes, Shard(2))
    assert all_same(load(dataset, range(5)), load(dataset, range(5), num_workers=2))


@BOTH
def test_batches_do_not_depend_on_the_start(volumes, batches):
    dataset = batches(volumes, Shard(2))
    assert all_same(load(dataset, range(6))[3:], load(dataset, range(3, 6)))


@BOTH
@pytest.mark.parametrize("world_size", [2, 4])
def test_shares_make_up_the_batch_of_one_process(volumes, batches, world_size):
    for step in range(3):
        one = batches(volumes, Shard(4))[step]
        parts = [batches(volumes, Shard(4, rank, world_size))[step] for rank in range(world_size)]
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, torch.cat([part[key] for part in parts]))
            else:
                assert value == [x for part in parts for x in part[key]]


@BOTH
def test_batches_differ_by_step_and_seed(volumes, batches):
    one = batches(volumes, Shard(2))
    other = batches(volumes, Shard(2), seed=1)
    key = "volumes" if batches is pretrain_batches else "image"
    assert same(one[0], one[0])
    assert not torch.equal(one[0][key], one[3][key])
    assert not torch.equal(one[0][key], other[0][key])


@BOTH
def test_batches_do_not_touch_the_global_random_state(volumes, batches):
    torch.manual_seed(0)
    np.random.seed(0)
    first = batches(volumes, Shard(2))[0]
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert same(first, batches(volumes, Shard(2))[0])
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])


def test_pretraining_batch_is_as_described(volumes):
    batch = pretrain_batches(volumes, Shard(3))[0]
    assert batch["volumes"].shape == (6, 1, *SIZE)
    assert batch["volumes"].dtype == torch.float32
    assert 0 <= batch["volumes"].min() < batch["volumes"].max() <= 1
    assert len(set(batch["mask_seeds"])) == 6
    assert len({crop.numpy().tobytes() for crop in batch["volumes"]}) == 6
    assert sorted(batch["cases"]) == ["case0", "case0", "case1", "case1", "case2", "case2"]


def test_finetuning_batch_is_as_described(volumes):
    batch = finetune_batches(volumes, Shard(3))[0]
    assert batch["image"].shape == batch["label"].shape == (6, 1, *SIZE)
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    assert type(batch["image"]) is torch.Tensor
    assert set(batch["label"].unique().tolist()) == {0, 1, 2}
    assert sorted(batch["cases"]) == ["case0", "case0", "case1", "case1", "case2", "case2"]


def test_crops_need_not_be_cubes(volumes):
    dataset = replace(finetune_batches(volumes, Shard(2)), crop_size=(16, 16, 32))
    assert dataset[0]["image"].shape == (4, 1, 16, 16, 32)
    longer = replace(pretrain_batches(volumes, Shard(2)), crop_size=(32, 16, 48))
    assert longer[0]["volumes"].shape == (4, 1, 32, 16, 48)


def test_every_volume_comes_once_in_a_pass(volumes):
    dataset = pretrain_batches(volumes, Shard(1))
    cases = [dataset[step]["cases"][0] for step in range(9)]
    assert all(len(set(cases[i : i + 3])) == 3 for i in (0, 3, 6))


@BOTH
def test_fewer_volumes_than_the_batch(volumes, batches):
    batch = batches(volumes[:1], Shard(4))[0]
    assert batch["cases"] == ["case0"] * 8
    key = "volumes" if batches is pretrain_batches else "image"
    assert len({crop.numpy().tobytes() for crop in batch[key]}) == 8  # one volume, but crops of its own each time


@pytest.mark.parametrize(("bs", "world_size", "advice"), [(5, 2, 4), (1, 2, 2), (7, 4, 4)])
def test_a_batch_that_processes_cannot_divide_is_refused(bs, world_size, advice):
    with pytest.raises(ValueError, match=f"multiple of the {world_size} processes, .* got {bs}; use {advice}"):
        Shard(bs, 0, world_size)
    assert [list(Shard(advice, rank, world_size).slots) for rank in range(world_size)] == [
        list(range(rank * advice // world_size, (rank + 1) * advice // world_size)) for rank in range(world_size)
    ]


def test_validation_crops_are_fixed(volumes):
    dataset = ValidationCrops(volumes, SIZE, 2, seed=0)
    first = load(dataset, range(3))
    assert all_same(first, load(dataset, range(3), num_workers=2))
    assert all_same(first[1::2], load(ValidationCrops(volumes, SIZE, 2, seed=0), range(1, 3, 2)))
    assert [batch["cases"] for batch in first] == [["case0"] * 2, ["case1"] * 2, ["case2"] * 2]
    assert len(dataset) == 3
    assert first[0]["volumes"].shape == (2, 1, *SIZE)
    assert len({seed for batch in first for seed in batch["mask_seeds"]}) == 6
    assert not same(first[0], ValidationCrops(volumes, SIZE, 2, seed=1)[0])


def test_validation_crops_are_not_flipped(volumes, tmp_path):
    image = np.broadcast_to(np.linspace(0.1, 1, 40, dtype=np.float32)[:, None, None], (40, 20, 20))
    write_entry(tmp_path / "e", image=image, label=None, affine=np.eye(4), source="a")
    crops = ValidationCrops([StoredVolume(tmp_path / "e", "ramp")], SIZE, 20, seed=0)[0]["volumes"]
    assert (crops.diff(dim=2) > 0).all()


def test_number_of_workers(volumes):
    dataset = pretrain_batches(volumes, Shard(2))
    assert make_loader(dataset, range(1), 8, False).num_workers == 1
    assert make_loader(dataset, range(100), 0, False).num_workers == 0
    assert 1 <= make_loader(dataset, range(100), -1, False).num_workers <= 8
    assert load(dataset, range(0), num_workers=2) == []
