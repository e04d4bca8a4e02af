"""The study for one GPU at toy size: its data folder, its budget, a study that is stopped twice and continues."""

import importlib
import json
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hyspark.comparison import benefit
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import read_yaml
from hyspark.config.segmentation import SegmentationConfig
from hyspark.config.shared import EncoderSettings
from hyspark.data.datasets import build as datasets_build
from hyspark.data.datasets import datalist_json
from hyspark.data.readers.nifti import read_nifti
from hyspark.data.settings import PrepareSettings
from hyspark.data.synthetic.phantom import write_phantoms
from hyspark.tasks.masked_task import MaskedTask
from hyspark.tasks.pretrain import initialise_pretraining
from hyspark.tasks.segmentation import run_segmentation

FOLDER = Path(__file__).parents[2] / "benchmarks"
LABELLED, UNLABELLED = "Dataset900_PhantomLabelled", "Dataset901_PhantomUnlabelled"
SPACING = ["--spacing", "9", "9", "9"]


@pytest.fixture
def study(monkeypatch) -> ModuleType:
    """The command."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("TQDM_MININTERVAL", "10")
    return importlib.import_module("gpu_study")


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """5 labelled phantoms, two of them to validate on, and 2 without labels."""
    folder = tmp_path_factory.mktemp("source")
    write_phantoms(
        folder, num_labelled=5, num_unlabelled=2, spacings=((8.0, 8.0, 8.0), (9.0, 9.0, 7.0)), progress=False
    )
    names = [f"phantom_{i:03d}" for i in range(5)]
    (folder / LABELLED / "splits.json").write_text(json.dumps({"train": names[:3], "validation": names[3:]}))
    return folder


def prepare(study, source, out, *more):
    study.main(["prepare", "--data", str(source), "--out", str(out), "--labelled", LABELLED, "--unlabelled", UNLABELLED]
               + [*SPACING, *more])  # fmt: skip


# Data folder


def test_a_data_folder_keeps_validation_cases_out_of_pretraining(study, source, tmp_path, capsys):
    prepare(study, source, tmp_path / "data")
    assert "7 volumes" in capsys.readouterr().out
    listed = datalist_json.read_datalist(tmp_path / "data" / "dataset.json")
    names = [sorted(case.name for case in part) for part in (listed.training, listed.validation)]
    assert names == [["phantom_000", "phantom_001", "phantom_002", "trunk_000", "trunk_001"],
                     ["phantom_003", "phantom_004"]]  # fmt: skip
    again = datasets_build.read_folder(tmp_path / "data" / LABELLED, seed=0, val_fraction=0.2)
    assert [case.name for case in again.validation] == names[1]


def test_an_image_is_what_a_network_sees_of_it_and_a_label_is_the_same_file(study, source, tmp_path):
    prepare(study, source, tmp_path / "data")
    window = PrepareSettings()
    for old in sorted((source / LABELLED / "imagesTr").iterdir()):
        was, now = read_nifti(old), read_nifti(tmp_path / "data" / LABELLED / "imagesTr" / old.name)
        hu, seen = np.asanyarray(was.dataobj).astype(float), np.asanyarray(now.dataobj)
        assert np.abs(seen.clip(window.hu_min, window.hu_max) - hu.clip(window.hu_min, window.hu_max)).max() <= 1
        assert seen[hu <= window.hu_min].max() <= window.hu_min
        np.testing.assert_allclose(now.affine, was.affine)
        label = f"labelsTr/{old.name.replace('_0000', '')}"
        assert (tmp_path / "data" / LABELLED / label).read_bytes() == (source / LABELLED / label).read_bytes()


def test_a_finer_image_without_label_comes_at_the_spacing_of_the_study(study, source, tmp_path):
    prepare(study, source, tmp_path / "data")
    image = nib.load(tmp_path / "data" / UNLABELLED / "imagesTr" / "trunk_000_0000.nii.gz")
    assert image.header.get_zooms() == pytest.approx((9, 9, 9))


def test_a_smaller_folder_excludes_unlabelled_cases_only(study, source, tmp_path, capsys):
    prepare(study, source, tmp_path / "all")
    files = sorted((tmp_path / "all").rglob("*Tr/*"))
    labelled = sum(file.stat().st_size for file in files if LABELLED in str(file))
    prepare(study, source, tmp_path / "few", "--max_mb", str((labelled + 1) / 1e6))
    assert "0 without labels, 2 more excluded by --max_mb" in capsys.readouterr().out
    assert not list((tmp_path / "few" / UNLABELLED).rglob("*.nii.gz"))
    with pytest.raises(SystemExit) as stop:
        prepare(study, source, tmp_path / "none", "--max_mb", str((labelled - 1) / 1e6))
    assert stop.value.code == 2
    assert "--max_mb" in capsys.readouterr().err


def test_other_folders_are_not_overwritten(study, source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare(study, source, source)
    assert "got one of other files" in capsys.readouterr().err
    assert len(list(source.rglob("*.nii.gz"))) == 12
    with pytest.raises(SystemExit) as stop:
        study.main(["run", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert stop.value.code == 2
    assert "prepare" in capsys.readouterr().err


# Budget


def test_a_budget_ends_before_its_time_is_over(study):
    budget = module("study_time").Budget(begun=100.0, seconds=360.0)
    assert budget.deadline == 445
    assert (budget.left(400.0), budget.left(500.0)) == (45, 0)
    assert (budget.left_of_first_half(180.0), budget.left_of_first_half(300.0)) == (100, 0)
    assert module("study_time").Budget(0.0, 60.0).deadline == 57


@pytest.mark.parametrize(
    ("seconds", "step", "steps", "epochs", "warmup"),
    [(160.0, 0.1, 50, 24, 1), (600.0, 0.1, 50, 90, 4), (160.0, 10.0, 50, 1, 0), (0.0, 0.1, 50, 1, 0)],
)
def test_epochs_fit_the_time(study, seconds, step, steps, epochs, warmup):
    budget = module("study_time")
    assert budget.epochs_that_fit(seconds, step, steps) == epochs
    assert budget.warmup_of(epochs) == warmup


def test_seeds_fill_the_jobs(study):
    assert [module("study_time").seeds_at_once(jobs, 4) for jobs in (1, 4, 8, 11)] == [1, 1, 2, 2]


def test_at_the_end_of_the_time_a_listener_gets_sigterm_and_others_an_error(study):
    budget, heard = module("study_time"), []
    with pytest.raises(budget.OutOfTimeError), budget.time_limit(1000):
        signal.raise_signal(signal.SIGALRM)
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with budget.time_limit(1000):
            signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


# Study


def test_the_recipes_share_a_network_whose_weights_stay_below_16_mb():
    pre = PretrainConfig(**read_yaml(FOLDER.parent / "configs/pretrain_gpu_study.yaml", PretrainConfig))
    fine = SegmentationConfig(**read_yaml(FOLDER.parent / "configs/finetune_gpu_study.yaml", SegmentationConfig))
    shared = [*(field.name for field in fields(EncoderSettings)), *(field.name for field in fields(PrepareSettings))]
    for name in (*shared, "decoder_width", "precision"):
        assert getattr(pre, name) == getattr(fine, name)
    assert 15e6 < 2 * sum(p.numel() for p in initialise_pretraining(pre).parameters()) < 16e6
    assert max(16 * mm for mm in pre.spacing) <= 40


def test_without_cuda_one_line_says_what_to_do(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        study.main(["run", "--data", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --device cuda: expected a CUDA device, got none; --device cpu runs the study at toy size"
    ]


def test_a_stopped_study_continues_to_its_end(study, source, tmp_path, monkeypatch):
    prepare(study, source, tmp_path / "data")
    data, out, results = tmp_path / "moved", tmp_path / "out", tmp_path / "out" / "results"
    (tmp_path / "data").rename(data)
    stages, done = module("study_stages"), []
    monkeypatch.setattr(stages, "epochs_that_fit", lambda *given: 2)  # what fits is tested above
    monkeypatch.chdir(tmp_path)
    argv = ["run", "--data", "moved", "--out", "out", "--minutes", "60", "--device", "cpu", "--jobs", "1"]
    argv += ["--num_labelled", "1", "--max_seeds", "1"]

    def in_this_process(jobs, num_at_once, after_each):
        for job in jobs:
            run_segmentation(SegmentationConfig(**read_yaml(job.command[-1], SegmentationConfig)))
            done.append(job.name)
            after_each()
            if len(done) == 1:
                signal.raise_signal(signal.SIGALRM)
        return []

    def account():
        return json.loads((results / "study.json").read_text())

    monkeypatch.setattr(benefit, "run_jobs", in_this_process)
    with monkeypatch.context() as patched:
        patched.setattr(
            MaskedTask, "before_step", lambda task, run, step: step == 1 and signal.raise_signal(signal.SIGALRM)
        )
        with pytest.raises(SystemExit) as stop:
            study.main(argv)
    assert stop.value.code == 75
    assert (account()["pretraining"]["steps"], account()["pretraining"]["total_steps"]) == (2, 6)
    assert account()["pretraining"]["weights_mb"] is None

    study.main(argv)
    assert done == ["scratch_1_seed0"]
    assert account()["pretraining"]["steps"] == 6
    assert account()["fine_tuning"]["finished"] == 1
    assert [call["ended"] for call in account()["calls"]] == ["out of time", "out of time"]

    kept = tmp_path / "kept"  # another place: nothing but the results travels
    shutil.copytree(results, kept)
    shutil.rmtree(out)
    shutil.copytree(kept, results)
    study.main(argv)
    assert done == ["scratch_1_seed0", "pretrained_1_seed0"]
    assert account()["calls"][-1]["ended"] == "complete"
    assert account()["is_toy"]
    assert account()["data"]["patch_mm"] == [144, 144, 144]
    rows = {row["start"]: row for row in account()["fine_tuning"]["rows"]}
    assert set(rows) == {"scratch", "pretrained"}
    assert all(row["seeds"] == [0] and 0 <= row["dice"] <= 1 for row in rows.values())
    assert "| 1 | pretrained | 1 |" in (results / "study.md").read_text()
    weights = load_file(results / "weights.safetensors")
    assert {value.dtype for value in weights.values() if value.dtype.kind == "f"} == {np.dtype(np.float16)}
    assert sum(value.size for value in weights.values()) >= account()["pretraining"]["num_parameters"] / 2
    assert {file.name for file in results.iterdir()} == {
        *("study.json", "study.md", "benefit.md", "benefit.json", "benefit.png"),
        *("weights.safetensors", "pretraining.jsonl", "runs.zip"),
    }
