"""The comparison by nnU-Net: settings, checks and times; nnU-Net itself is in tests/interop."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hyspark.cli import main
from hyspark.comparison import benefit, nnunet
from hyspark.comparison.table import read_run
from hyspark.config.nnunet_training import NnunetTrainingConfig
from hyspark.config.recipes import read_yaml, write_yaml
from hyspark.models.segmentation import build_hybird
from hyspark.tasks import nnunet_training
from tests.conftest import SMALL
from tests.tasks.test_nnunet_training import config, prepared  # noqa: F401

NETWORK = {name: SMALL[name] for name in SMALL if name.startswith(("encoder", "expansions", "vit", "num_heads"))}


@pytest.fixture
def base(config):  # noqa: F811
    """What all runs share."""
    return replace(config, **NETWORK, out=NnunetTrainingConfig.out, num_labelled=0, epochs=2, warmup_epochs=1)


def test_the_plan_decides_and_what_is_not_read_is_said(base, capsys):
    given = replace(base, spacing=(3.0, 3.0, 3.0), crop_size=(32,), lr=0.5, max_steps=3)
    found = nnunet.NnunetRuns().settings(given)
    assert capsys.readouterr().out == (
        "not read, since nnU-Net, its trainer and its plan decide: crop_size, max_steps, spacing\n"
    )
    assert found == replace(base, lr=0.5)
    theirs = nnunet.NnunetRuns().settings(replace(given, trainer="nnUNetTrainer"))
    assert "lr" in capsys.readouterr().out
    assert (theirs.lr, theirs.plans, theirs.data) == (NnunetTrainingConfig.lr, base.plans, base.data)
    with pytest.raises(ValueError, match="test_dir: with --engine nnunet"):
        nnunet.NnunetRuns().settings(replace(base, test_dir="more"))


def test_a_dry_run_is_refused_and_trains_nothing(base, tmp_path):
    with pytest.raises(ValueError, match="dry_run: set for each run of a comparison by --plan"):
        benefit.run_comparison(replace(base, dry_run=True), tmp_path / "out", {"scratch": "none"}, [1], [0])
    assert not (tmp_path / "out").exists()


def test_an_unknown_trainer_is_named_before_the_first_run(base, monkeypatch):
    def find(name):
        raise RuntimeError(f"Could not find requested nnunet trainer {name}")

    module = SimpleNamespace(recursive_find_trainer_class_by_name=find)
    monkeypatch.setitem(sys.modules, "nnunetv2.utilities.find_objects", module)
    monkeypatch.setattr(nnunet, "import_runner", lambda: None)
    with pytest.raises(ValueError, match="trainer: nnU-Net finds no nnUNetTrainer_Mine: Could not find"):
        nnunet.NnunetRuns().check_data([replace(base, trainer="nnUNetTrainer_Mine")], {"scratch": "none"})


def test_a_run_is_a_process_that_reads_its_settings(base, tmp_path):
    (run,) = benefit.plan_runs(base, tmp_path, {"scratch": "none"}, [1], [4], 1)
    job = benefit.job_of(run)
    recipe = tmp_path / "runs" / "scratch_1_seed4" / "config.yaml"
    assert job.command == [sys.executable, "-c", nnunet.PROGRAM, "--config", str(recipe)]
    done = subprocess.run([*job.command[:-1], "nowhere.yaml"], check=False, capture_output=True, text=True)
    assert "no recipe at nowhere.yaml" in done.stderr
    read = NnunetTrainingConfig(**read_yaml(recipe, NnunetTrainingConfig))
    assert read == run.config
    assert (read.seed, read.num_labelled, read.trainer) == (4, 1, "nnUNetTrainer_HySparK")


def test_checkpoints_of_nnunet_are_not_continued_with_other_settings(base, tmp_path):
    (run,) = benefit.plan_runs(base, tmp_path, {"scratch": "none"}, [1], [0], 1)
    write_yaml(replace(run.config, lr=0.5), run.config.run_folder / "config.yaml")
    benefit.check_folders([run])  # nothing has been trained
    results = nnunet_training.results_folder(run.config, nnunet_training.find_prepared(run.config))
    results.mkdir(parents=True)
    torch.save({}, results / "checkpoint_best.pth")
    with pytest.raises(ValueError, match=r"holds a run with other settings.*\n  lr: was 0\.5"):
        benefit.check_folders([run])


def test_fractions_are_of_the_training_cases_of_nnunets_fold(base, prepared):  # noqa: F811
    names = ["phantom_000", "phantom_001", "phantom_002"]
    (prepared / "splits_final.json").write_text(json.dumps([{"train": names[:2], "val": names[2:]}]))
    assert benefit.labelled_numbers(base, (), (0.5, 1.0)) == [1, 2]


def test_the_digest_is_of_cases_plan_split_and_prepared_arrays(base, prepared):  # noqa: F811
    kind, digests = nnunet.NnunetRuns(), []
    digests.append(kind.data_digest(base))
    assert kind.data_digest(replace(base, num_labelled=1, seed=5)) == digests[0]
    (prepared / "smallPlans_3d_fullres" / "phantom_001.b2nd").write_bytes(b"prepared again")
    digests.append(kind.data_digest(base))
    plans = json.loads((prepared / "smallPlans.json").read_text())
    plans["configurations"]["3d_fullres"]["batch_size"] = 7
    (prepared / "smallPlans.json").write_text(json.dumps(plans))
    digests.append(kind.data_digest(base))
    folds = [{"train": ["phantom_002"], "val": ["phantom_000"]}]
    (prepared / "splits_final.json").write_text(json.dumps(folds))
    digests.append(kind.data_digest(base))
    assert len(set(digests)) == 4


def test_weights_are_held_against_plan_and_network_before_the_first_run(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nnunet, "import_runner", lambda: None)
    network = build_hybird(1, 9, 32, **{name.removeprefix("encoder_"): value for name, value in NETWORK.items()})
    torch.save({"model": network.state_dict(), "config": {"spacing": [9.0] * 3}}, tmp_path / "own.pth")
    runs = benefit.plan_runs(base, tmp_path, {"own": str(tmp_path / "own.pth")}, [1], [0], 1)
    kind = nnunet.NnunetRuns()
    kind.check_data([run.config for run in runs], {"scratch": "none", "own": str(tmp_path / "own.pth")})
    shown = capsys.readouterr().out
    assert f"own: initial weights {tmp_path / 'own.pth'}" in shown
    assert "own.pth was made with spacing 9.0 9.0 9.0, this run has 7.0 8.0 9.0" in shown
    assert "pre-train for this plan with" in shown
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kind.check_data([run.config for run in runs], {"scratch": str(tmp_path / "nowhere.pth")})
    with pytest.raises(ValueError, match="num_labelled: expected at most the 2 labelled training cases, got 5"):
        kind.check_data([replace(runs[0].config, num_labelled=5)], {"scratch": "none"})


def test_steps_and_times_are_those_of_nnunets_epochs(tmp_path):
    (tmp_path / "scores").mkdir()
    header = "case,organ,dice,hd95_mm,nsd,truth_voxels,predicted_voxels"
    (tmp_path / "scores" / "cases.csv").write_text(f"{header}\na,liver,0.5,1.0,0.5,10,10\n")
    (tmp_path / "scores" / "summary.json").write_text('{"protocol": {}}')
    lines = [{"step": 249, "loss": 1.0, "epoch_steps": 250, "epoch_seconds": 30.5}] * 2
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = read_run(tmp_path / "scores", tmp_path / "metrics.jsonl", 1)
    assert (run.steps, run.seconds) == (500, 61.0)


def test_nnunet_trains_no_classifiers(capsys):
    words = ["--engine", "nnunet", "--task", "classify", "--out", "out", "--initial_weights", "a=none"]
    with pytest.raises(SystemExit):
        main.main(["benefit", *words, "--num_labelled", "1"])
    assert "nnU-Net trains networks for segmentation; drop --task classify" in capsys.readouterr().err


def test_plan_and_trainer_belong_to_the_engine(capsys):
    with pytest.raises(SystemExit):
        main.main(
            ["benefit", "--plans", "p.json", "--out", "out", "--initial_weights", "a=none", "--num_labelled", "1"]
        )
    assert "--plans" in capsys.readouterr().err
