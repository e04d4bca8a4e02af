"""The plan that --dry_run prints: every promised number is there, follows from what was measured, and warns in time."""

import logging
import multiprocessing
import re
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import nn

from hyspark.config.shared import EncoderSettings
from hyspark.data.batches.loader import Shard
from hyspark.data.preprocessing import store_size
from hyspark.data.preprocessing.prepare import prepare_missing
from hyspark.models.spark import build_spark
from hyspark.planning import plan, trial_steps
from hyspark.planning.trial_steps import Trial
from hyspark.tasks.masked_task import MaskedTask
from hyspark.tasks.pretrain import find_pretraining_cases, initialise_pretraining, run_pretraining
from hyspark.training.distributed import Processes
from hyspark.utils import text as utils_text
from hyspark.utils.free_memory import is_out_of_memory

GB = 10**9
CPU = Processes(torch.device("cpu"))
TRIALS = [Trial(1, 0.5, 3 * GB), Trial(2, 0.75, 4 * GB)]
FLOPS = plan.Flops({"encoder": 2 * GB, "densify": GB, "decoder": 7 * GB}, {"packed": 2 * GB, "masked": 8 * GB}, 21 * GB)


@pytest.fixture
def store(tmp_path):
    return store_size.StoreSize(
        tmp_path, prepared=2, prepared_bytes=3000, missing=4, missing_bytes=6 * GB, bytes_per_voxel=1.25,
        is_assumed=False, unreadable=0, free=7 * GB,
    )  # fmt: skip


def text(config, store, trials=TRIALS, free=100 * GB, processes=CPU):
    steps = {"steps_per_epoch": 3, "steps_left": 300}
    return plan.format_plan(config, processes, initialise_pretraining(config), FLOPS, trials, free, store, **steps)


def try_in(config, free, most=4, process=trial_steps.run_trials):
    task = MaskedTask(config, Shard(config.batch_size), [], [])
    return list(process(config, CPU, partial(initialise_pretraining, config), task, task.random_batch, most, free))


# The text


def test_every_promised_number_is_there(pretraining, store):
    plan = text(pretraining, store)
    weights = sum(p.numel() for p in initialise_pretraining(pretraining).parameters())
    assert f"{utils_text.format_count(weights)} parameters: encoder" in plan
    for pattern in (
        r"per step of 4 crops in a process: 10 G forward \(encoder 2 G, densify 1 G, decoder 7 G\)",
        r"21 G backward",
        r"packed 2 G, masked 8 G, 4.0 times as many",
        r"in each process: weights .*, gradients .*, optimizer .* \(computed\)",
        r"6 GB at the peak of 4 crops: 1 GB per crop and 2 GB for the rest \(estimated from steps of 1 and 2 crops\)",
        r"100 GB free for each process: about 98 crops would fit, this run has 4",
        r"1.2 s per step of 4 crops in a process \(extrapolated from steps of 1 and 2 crops, at the current load .*\)",
        r"3.8 s per epoch of 3 steps",
        r"6.2 min for the run, 300 steps",
        r"2 of 6 volumes prepared in .*, 3 kB",
        r"the other 4 take about 6 GB, by their headers and 1.2 bytes per voxel \(as in .*\); 7 GB free",
    ):
        assert re.search(pattern, plan), f"{pattern}\n{plan}"
    assert "WARNING" not in plan


def test_a_size_that_was_tried_is_not_extrapolated(pretraining, store):
    plan = text(pretraining, store, [*TRIALS, Trial(4, 1.5, 6 * GB)])
    assert "1.5 s per step of 4 crops in a process (measured, at" in plan


def test_crops_count_per_process(pretraining, store):
    plan = text(pretraining, store, processes=replace(CPU, world_size=2))
    assert "0.75 s per step of 2 crops in a process (measured by one of 2 processes alone, at" in plan
    assert "this run has 2" in plan


@pytest.mark.parametrize(
    ("settings", "trials", "free", "advice"),
    [
        (
            {"batch_size": 3},
            TRIALS,
            7 * GB,
            "6 crops in a process do not fit the memory; try --batch_size 2 or --precision bf16",
        ),
        ({"precision": "bf16"}, TRIALS, 3 * GB, "4 crops in a process .* try --batch_size 1 --crops_per_volume 1$"),
        ({"decoder_width": 64}, TRIALS[:1], 3 * GB, "4 crops .*--crops_per_volume 1 or .* or --decoder_width 32$"),
        ({}, [], GB, "not even one crop fits the memory; try --precision bf16 or a smaller --crop_size"),
        ({}, TRIALS, GB, "not even one crop"),
    ],
)
def test_warns_where_the_memory_is_too_small(pretraining, store, settings, trials, free, advice):
    plan = text(replace(pretraining, **settings), store, trials, free)
    assert re.search(f"WARNING  {advice}", plan, flags=re.MULTILINE), plan


def test_advises_a_width_that_the_decoder_of_the_network_can_halve(pretraining):
    config = replace(pretraining, **asdict(EncoderSettings()), model="spark/timm/resnet10t", decoder_width=96)
    config = replace(config, slices="axial", crop_size=(64,))
    advice = plan.memory_advice(config, CPU, initialise_pretraining(config), most=4, crops=8)
    assert advice.endswith("--decoder_width 32")


def test_a_network_whose_copies_compute_with_its_weights_has_no_count(pretraining):
    twin = nn.Sequential(nn.Conv3d(1, 4, 2, 2), nn.Conv3d(4, 4, 2, 2))
    options = {"in_channels": 1, "axes": 3, "decoder_width": 16}
    model = build_spark(twin, (32, 32, 32), **options)
    assert plan.count_flops(pretraining, model, 4).forward["encoder"] > 0
    model.encoder.run = lambda _, x: twin(x)
    assert plan.count_flops(pretraining, model, 4) is None


def test_says_what_is_not_known(pretraining, store):
    plan = text(pretraining, store, [replace(t, peak=None) for t in TRIALS], None)
    assert "free memory is unknown" in plan
    assert "at the peak" not in plan
    assert "time     unknown" in text(pretraining, store, [], GB)


def test_warns_where_the_disk_is_too_small(pretraining, store):
    assert "WARNING  the prepared volumes do not fit the disk" in text(pretraining, replace(store, free=5 * GB))
    assert "WARNING  3 of the sampled files have no" in text(pretraining, replace(store, unreadable=3))


def test_memory_that_does_not_grow_is_no_limit(pretraining, store):
    plan = text(pretraining, store, [replace(t, peak=GB) for t in TRIALS])
    assert "any number of crops would fit" in plan


def test_time_is_extrapolated_with_care():
    assert plan.seconds_per_step(TRIALS, 2) == 0.75
    assert plan.seconds_per_step(TRIALS, 6) == pytest.approx(1.75)
    assert plan.seconds_per_step(TRIALS[:1], 6) == pytest.approx(3)
    assert plan.seconds_per_step([Trial(1, 1.0, None), Trial(2, 5.0, None)], 6) == pytest.approx(15)
    assert plan.seconds_per_step([Trial(1, 1.0, None), Trial(2, 0.9, None)], 6) == pytest.approx(0.9)


def test_flops_are_those_of_the_run(pretraining):
    model = initialise_pretraining(pretraining)
    flops = plan.count_flops(pretraining, model, 4)
    assert model.encoder.compute == "packed"
    assert flops.forward.keys() == {"encoder", "densify", "decoder"}
    assert flops.encoder["packed"] == flops.forward["encoder"] < flops.encoder["masked"] / 3
    assert 1.9 < flops.backward / sum(flops.forward.values()) < 2.6
    fewer = plan.count_flops(replace(pretraining, reconstruct_fraction=0.5), model, 4)
    assert fewer.forward["encoder"] == flops.forward["encoder"]
    assert fewer.forward["decoder"] < 0.8 * flops.forward["decoder"]


# The store


def test_what_is_missing_is_estimated_by_what_is_prepared(pretraining, tmp_path):
    cases, _ = find_pretraining_cases(pretraining)
    before = store_size.estimate_store_size(pretraining, cases, tmp_path / "store" / "deep")
    assert (before.prepared, before.prepared_bytes, before.missing, before.is_assumed) == (0, 0, len(cases), True)
    assert before.free > 0
    prepare_missing(cases[:3], pretraining, tmp_path, num_workers=1, progress=False)
    after = store_size.estimate_store_size(pretraining, cases, tmp_path)
    assert (after.prepared, after.missing, after.is_assumed) == (3, len(cases) - 3, False)
    estimate = after.prepared_bytes + after.missing_bytes
    prepare_missing(cases, pretraining, tmp_path, num_workers=1, progress=False)
    done = store_size.estimate_store_size(pretraining, cases, tmp_path)
    assert (done.missing, done.missing_bytes) == (0, 0)
    assert done.prepared_bytes == pytest.approx(estimate, rel=0.25)


def test_a_sample_of_the_headers_stands_for_all(pretraining, tmp_path, monkeypatch):
    cases, _ = find_pretraining_cases(pretraining)
    whole = store_size.estimate_store_size(pretraining, cases, tmp_path)
    monkeypatch.setattr(store_size, "MAX_HEADERS", 3)
    assert store_size.estimate_store_size(pretraining, cases, tmp_path).missing_bytes == pytest.approx(
        whole.missing_bytes, rel=0.5
    )
    assert len(store_size.sample_evenly(range(7))) == 3


def test_files_without_a_header_are_counted(pretraining, tmp_path):
    cases, _ = find_pretraining_cases(pretraining)
    (tmp_path / "a.nii.gz").write_text("")
    found = store_size.estimate_store_size(
        pretraining, [*cases, replace(cases[0], image=tmp_path / "a.nii.gz")], tmp_path
    )
    assert found.unreadable == 1


# Trial steps


def test_trials_grow_up_to_the_size_of_the_run(pretraining):
    assert [trial_steps.crop_counts(most) for most in (1, 2, 3, 4, 12)] == [
        [1, 2],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 8, 12],
    ]
    found = try_in(pretraining, free=None, process=trial_steps.iterate_trials)
    assert [t.crops for t in found] == [1, 2, 4]
    assert all(t.seconds > 0 for t in found)


def test_trials_of_many_crops_need_time_and_memory():
    assert trial_steps.is_cheap(TRIALS, 4, 100 * GB)
    assert not trial_steps.is_cheap(TRIALS, 4, 7 * GB)
    assert not trial_steps.is_cheap(TRIALS, 32, 100 * GB)
    assert trial_steps.is_cheap(TRIALS, 4, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits the memory of a process so")
def test_memory_that_runs_out_ends_the_trials_without_an_error(pretraining):
    assert len(try_in(pretraining, free=10 * 2**20)) < 2


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("DefaultCPUAllocator: can't allocate memory", True),
        ("std::bad_alloc", True),
        ("could not create a primitive", True),
        ("could not create a primitive descriptor for a convolution", False),
    ],
)
def test_errors_of_torch_without_a_class_are_told_by_their_text(message, is_memory):
    assert is_out_of_memory(RuntimeError(message)) == is_memory


def test_another_error_is_not_taken_for_missing_memory(pretraining):
    def broken():
        raise RuntimeError("wrong shape")

    task = MaskedTask(pretraining, Shard(2), [], [])
    args = (pretraining, CPU, broken, task, task.random_batch)
    with pytest.raises(RuntimeError, match="wrong shape"):
        list(trial_steps.iterate_trials(*args, 1, None))


# The command


@pytest.mark.spawn
def test_a_dry_run_prints_the_plan_and_writes_nothing(pretraining, tmp_path, phantoms, caplog):
    before, others = sorted(phantoms.rglob("*")), set(multiprocessing.active_children())  # of tests before this one
    config = replace(pretraining, dry_run=True, max_steps=5, store_dir=str(tmp_path / "store"))
    with caplog.at_level(logging.INFO, "hyspark"):
        run_pretraining(config)
    for word in (
        "network ",
        "FLOPs ",
        "memory ",
        "time ",
        "store ",
        "5 steps;",
        "free for each process",
        "(measured, at",
    ):
        assert word in caplog.text
    assert not set(multiprocessing.active_children()) - others
    assert not config.run_folder.exists()
    assert not (tmp_path / "store").exists()
    assert sorted(phantoms.rglob("*")) == before


def test_other_processes_than_the_main_one_print_and_measure_nothing(pretraining, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("hyspark.tasks.pretrain.format_plan", None)
    run_pretraining(replace(pretraining, dry_run=True))


@pytest.mark.gpu
def test_the_plan_on_cuda(pretraining, caplog):
    with caplog.at_level(logging.INFO, "hyspark"):
        run_pretraining(replace(pretraining, dry_run=True, device="cuda", precision="bf16"))
    assert re.search(r"at the peak of 4 crops: [\d.]+ [kMG]B per crop", caplog.text)
    assert "(measured, at" in caplog.text
