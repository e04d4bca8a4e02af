"""A run of a comparison by nnU-Net: prepared data, cases, logs and scores; nnU-Net itself is in tests/interop."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from hyspark.config.nnunet_training import NnunetTrainingConfig
from hyspark.config.recipes import write_yaml
from hyspark.evaluation.protocol import read_summary
from hyspark.evaluation.score_table import read_score_table
from hyspark.tasks import nnunet_training
from hyspark.training import distributed
from hyspark.training.labelled_cases import find_run_cases
from hyspark.training.metrics_log import read_metrics
from hyspark.training.nnunet_run import plan_run
from hyspark.utils import locks
from tests.nnunet_stand_in import PLANS

CASES = ("phantom_000", "phantom_001", "phantom_002")


@pytest.fixture
def prepared(phantoms, tmp_path):
    """The folder of prepared data, as nnU-Net lays it out."""
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset042_Small"
    (folder / "smallPlans_3d_fullres").mkdir(parents=True)
    (folder / "smallPlans.json").write_text(json.dumps(PLANS))
    for case in CASES:
        (folder / "smallPlans_3d_fullres" / f"{case}.b2nd").write_bytes(case.encode())
    source = phantoms / "Dataset900_PhantomLabelled"
    shutil.copy(source / "dataset.json", folder)
    shutil.copytree(source / "labelsTr", folder / "gt_segmentations")
    (folder / "dataset_fingerprint.json").write_text("{}")
    return folder


@pytest.fixture
def config(phantoms, prepared, tmp_path):
    return NnunetTrainingConfig(
        data=str(phantoms / "Dataset900_PhantomLabelled"),
        plans=str(prepared / "smallPlans.json"),
        out=str(tmp_path / "run"),
        num_labelled=1,
    )


def split_of(config):
    found = nnunet_training.find_prepared(config)
    cases = nnunet_training.find_cases_of_fold(config, found)
    return [case.name for case in cases.training], [case.name for case in cases.validation]


# Plan and prepared data


def test_the_configuration_stands_behind_the_plan(config, prepared):
    (prepared / "smallPlans_3d_lowres").mkdir()
    found = nnunet_training.find_prepared(replace(config, plans=f"{config.plans}:3d_lowres"))
    assert (found.configuration, found.arrays.name) == ("3d_lowres", "smallPlans_3d_lowres")
    assert nnunet_training.find_prepared(config).arrays.name == "smallPlans_3d_fullres"


def test_a_folder_of_arrays_may_have_a_name_of_its_own(config, prepared):
    content = json.loads((prepared / "smallPlans.json").read_text())
    content["configurations"]["3d_fullres"]["data_identifier"] = "shared_arrays"
    (prepared / "smallPlans.json").write_text(json.dumps(content))
    (prepared / "smallPlans_3d_fullres").rename(prepared / "shared_arrays")
    assert nnunet_training.find_prepared(config).array("phantom_001") == prepared / "shared_arrays" / "phantom_001.b2nd"


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        ("", "--plans: expected nnUNet_preprocessed/DATASET/PLANS.json"),
        ("{}/other.json", "other.json: no such file; run nnUNetv2_plan_and_preprocess"),
        ("{}/dataset.json", r"expected a plans.json of nnU-Net v2 \(configurations\), got another JSON"),
        ("{}/smallPlans.json:3d_low", "no configuration '3d_low'; it has .*did you mean 3d_lowres"),
        ("{}/smallPlans.json:3d_cascade_fullres", "labels of 3d_lowres; name 3d_fullres or 3d_lowres"),
        ("{}/smallPlans.json:3d_lowres", "run nnUNetv2_preprocess -d 42 -plans_name smallPlans -c 3d_lowres"),
    ],
)
def test_what_is_no_plan_with_its_data_is_named(config, prepared, plans, expected):
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        nnunet_training.find_prepared(replace(config, plans=plans.format(prepared)))


def test_cases_that_are_not_prepared_are_named(config, prepared):
    (prepared / "smallPlans_3d_fullres" / "phantom_001.b2nd").unlink()
    (prepared / "smallPlans_3d_fullres" / "phantom_001_seg.b2nd").touch()  # a label map is no image
    found, everything = nnunet_training.find_prepared(config), replace(config, num_labelled=0)
    cases = nnunet_training.find_cases_of_fold(everything, found)
    with pytest.raises(FileNotFoundError, match="no prepared case for phantom_001; run nnUNetv2_preprocess -d 42"):
        nnunet_training.check_prepared(found, cases)


def test_other_classes_than_those_of_the_labels_are_named(config, prepared):
    content = json.loads((prepared / "dataset.json").read_text())
    content["labels"] |= {"liver": content["labels"]["spleen"], "spleen": content["labels"]["liver"]}
    (prepared / "dataset.json").write_text(json.dumps(content))
    found = nnunet_training.find_prepared(config)
    with pytest.raises(ValueError, match="expected the classes of the labelled data, background, liver, spleen"):
        nnunet_training.check_prepared(found, nnunet_training.find_cases_of_fold(config, found))


def test_label_maps_that_could_not_be_scored_are_refused_before_the_training(config, prepared):
    content = json.loads((prepared / "dataset.json").read_text())
    (prepared / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nrrd"}))
    found = nnunet_training.find_prepared(config)
    with pytest.raises(ValueError, match=r"dataset\.json: expected file_ending \.nii\.gz or \.nii, .* got \.nrrd"):
        nnunet_training.check_prepared(found, nnunet_training.find_cases_of_fold(config, found))


# Cases


@pytest.mark.parametrize("splits", [None, [{"train": CASES[:2], "val": CASES[2:]}]])
def test_cases_have_all_channels_of_the_plan(config, prepared, tmp_path, splits):
    data = Path(shutil.copytree(config.data, tmp_path / "Dataset042_Small"))
    for file in sorted((data / "imagesTr").iterdir()):
        shutil.copy(file, data / "imagesTr" / file.name.replace("_0000", "_0001"))
    content = json.loads((prepared / "smallPlans.json").read_text())
    content["configurations"]["3d_fullres"]["normalization_schemes"] *= 2
    (prepared / "smallPlans.json").write_text(json.dumps(content))
    if splits:
        (prepared / "splits_final.json").write_text(json.dumps(splits))
    given = replace(config, data=str(data))
    found = nnunet_training.find_cases_of_fold(given, nnunet_training.find_prepared(given))
    assert [len(case.images) for case in (*found.training, *found.validation)] == [2, 2]
    assert found.notes == []


def test_without_splits_of_nnunet_the_split_is_that_of_finetune(config):
    training, validation, _ = find_run_cases(config)[:3]
    assert split_of(config) == ([case.name for case in training], [case.name for case in validation])
    assert len(training) == len(validation) == 1


def test_a_fold_of_nnunets_splits_is_the_split(config, prepared):
    folds = [{"train": [a, b], "val": [c]} for a, b, c in (CASES, CASES[1:] + CASES[:1], CASES[2:] + CASES[:2])]
    (prepared / "splits_final.json").write_text(json.dumps(folds))
    for fold, one in enumerate(folds):
        assert split_of(replace(config, fold=fold, num_labelled=0)) == (sorted(one["train"]), one["val"])
        few = [split_of(replace(config, fold=fold, seed=seed))[0] for seed in range(6)]
        assert {len(names) for names in few} == {1}
        assert {names[0] for names in few} == set(one["train"])
    with pytest.raises(ValueError, match=r"fold: expected a fold of .*splits_final\.json, got 3; it has folds 0 to 2"):
        split_of(replace(config, fold=3))


def test_the_folder_of_a_run_holds_its_split_and_links_to_the_rest(config, prepared):
    found = nnunet_training.find_prepared(config)
    cases = nnunet_training.find_cases_of_fold(config, found)
    for _ in range(2):  # a continued run makes it again
        root = nnunet_training.link_data(config, found, cases)
    own = root / "Dataset042_Small"
    assert json.loads((own / "splits_final.json").read_text()) == [
        {"train": [case.name for case in cases.training], "val": [case.name for case in cases.validation]}
    ]
    assert (own / "smallPlans_3d_fullres" / "phantom_000.b2nd").read_bytes() == b"phantom_000"
    for name in ("smallPlans_3d_fullres", "dataset.json", "gt_segmentations", "dataset_fingerprint.json"):
        assert (own / name).resolve() == prepared / name
    assert not (prepared / "splits_final.json").exists()


def test_the_plan_of_a_run_has_no_next_stage_whose_data_validation_would_read(config, prepared):
    content = json.loads((prepared / "smallPlans.json").read_text())
    content["configurations"]["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
    (prepared / "smallPlans.json").write_text(json.dumps(content))
    (prepared / "smallPlans_3d_lowres").mkdir()
    given = replace(config, plans=f"{config.plans}:3d_lowres")
    found = nnunet_training.find_prepared(given)
    root = nnunet_training.link_data(given, found, nnunet_training.find_cases_of_fold(given, found))
    assert json.loads((root / "Dataset042_Small" / "smallPlans.json").read_text()) == json.loads(json.dumps(PLANS))
    assert json.loads((prepared / "smallPlans.json").read_text()) == content


# Environment


def test_the_recipe_of_a_run_reaches_the_trainer(config, tmp_path, monkeypatch):
    of_nnunet = [f"nnUNet_{name}" for name in ("raw", "preprocessed", "results", "extTrainer", "n_proc_DA")]
    for name in ("HYSPARK_WEIGHTS", "HYSPARK_RECIPE", *of_nnunet):
        monkeypatch.setenv(name, "of the user")
    given = replace(config, seed=3, weights="own.pth", lr=0.25, epochs=2, dataloader_workers=0)
    (tmp_path / "run" / "nnunet").mkdir(parents=True)
    nnunet_training.set_environment(given, tmp_path / "prepared")
    assert "HYSPARK_WEIGHTS" not in os.environ
    raw, preprocessed, results, trainers, workers = (os.environ[name] for name in of_nnunet)
    assert (raw, preprocessed) == (str(Path(config.data).parent), str(tmp_path / "prepared"))
    assert (results, workers) == (str(tmp_path / "run" / "nnunet" / "results"), "0")
    assert (Path(trainers) / "nnUNetTrainer_HySparK.py").is_file()
    plans = {**json.loads(json.dumps(PLANS)), "continue_training": False}
    run = plan_run(plans, "3d_fullres", os.environ).config
    assert (run.seed, run.weights, run.lr, run.epochs, run.steps_per_epoch) == (3, "own.pth", 0.25, 2, 250)
    monkeypatch.setenv(of_nnunet[3], "theirs")
    nnunet_training.set_environment(replace(given, trainer="nnUNetTrainer"), tmp_path / "prepared")
    assert os.environ[of_nnunet[3]] == "theirs"  # where a trainer of the user may be


def test_without_nnunet_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"--engine nnunet needs nnunetv2: .*nnunet"):
        nnunet_training.import_runner()


# Log and scores


def test_a_line_of_metrics_an_epoch_and_a_continued_training_drops_what_it_repeats(tmp_path):
    def make(epoch):
        trainer = SimpleNamespace(num_iterations_per_epoch=5, current_epoch=epoch, seen=[])
        trainer.on_epoch_start = lambda: None
        trainer.on_train_epoch_end = trainer.seen.append

        def end():
            trainer.current_epoch += 1

        trainer.on_epoch_end = end
        return trainer

    def train(trainer, epochs):
        nnunet_training.log_epochs(trainer, tmp_path / "metrics.jsonl")
        for _ in range(epochs):
            trainer.on_epoch_start()
            trainer.on_train_epoch_end([{"loss": np.float32(1)}, {"loss": np.float32(2)}])
            trainer.on_epoch_end()
        return trainer

    assert len(train(make(0), 3).seen) == 3  # nnU-Net's own method is called
    train(make(2), 2)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["epoch"], line["loss"]) for line in lines] == [
        (4, 0, 1.5),
        (9, 1, 1.5),
        (14, 2, 1.5),
        (19, 3, 1.5),
    ]
    assert all(line["epoch_steps"] == 5 and 0 <= line["epoch_seconds"] < 5 for line in lines)


def test_the_newest_checkpoint_is_nnunets(config, tmp_path):
    assert nnunet_training.newest_checkpoint(config) is None
    folder = nnunet_training.results_folder(config, nnunet_training.find_prepared(config))
    folder.mkdir(parents=True)
    for name in ("checkpoint_best.pth", "checkpoint_latest.pth", "checkpoint_final.pth"):
        torch.save({"network_weights": torch.zeros(99)}, folder / name)
        assert nnunet_training.newest_checkpoint(config) == folder / name
    content = (folder / "checkpoint_final.pth").read_bytes()
    (folder / "checkpoint_final.pth").write_bytes(content[:-9])  # as of a process that was killed while it wrote
    assert nnunet_training.newest_checkpoint(config) == folder / "checkpoint_latest.pth"


class StandInTrainer:
    """What is called of nnU-Net's trainers, one epoch of one step; in `calls`."""

    num_iterations_per_epoch, current_epoch = 1, 0

    def __init__(self):
        self.calls = []
        self.on_epoch_start = self.on_train_epoch_end = self.on_epoch_end = None

    def load_checkpoint(self, file):
        self.calls.append(f"load {Path(file).name}")

    def run_training(self):
        self.calls.append("train")

    def perform_actual_validation(self, save_probabilities):
        self.calls.append("predict")


def train_by_stand_in(config, monkeypatch):
    trainer = StandInTrainer()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for name in ("seed_generators", "score_label_maps"):
        monkeypatch.setattr(nnunet_training, name, lambda *words: {})
    runner = SimpleNamespace(get_trainer_from_args=lambda *words: trainer)
    monkeypatch.setattr(nnunet_training, "import_runner", lambda: runner)
    nnunet_training.train_and_score(replace(config, device="cpu"))
    return trainer.calls


def test_a_run_continues_where_it_was_killed(config, monkeypatch):
    folder = nnunet_training.results_folder(config, nnunet_training.find_prepared(config))
    folder.mkdir(parents=True)
    (folder.parent / "plans.json").write_text("{}")  # with the settings of an attempt that has saved nothing
    assert train_by_stand_in(config, monkeypatch) == ["train", "predict"]
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    torch.save({}, folder / "checkpoint_latest.pth")
    (folder / "checkpoint_final.pth").write_bytes(b"PK")
    assert train_by_stand_in(config, monkeypatch) == ["load checkpoint_latest.pth", "train", "predict"]
    torch.save({}, folder / "checkpoint_final.pth")
    assert train_by_stand_in(config, monkeypatch) == ["load checkpoint_final.pth", "predict"]


def test_two_processes_do_not_train_in_one_folder(config, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LOCK_TIMEOUT", 0)
    monkeypatch.setattr(nnunet_training, "train_and_score", pytest.fail)
    write_yaml(config, tmp_path / "config.yaml")
    with locks.lock_folder(Path(config.out), "run folder"), pytest.raises(ValueError, match="another process"):
        nnunet_training.train_from_recipe(str(tmp_path / "config.yaml"))


def test_a_subject_on_both_sides_of_the_split_is_named_in_the_log(config, prepared, monkeypatch, caplog):
    (prepared / "splits_final.json").write_text(json.dumps([{"train": CASES[:2], "val": CASES[2:]}]))
    train_by_stand_in(replace(config, subject_regex="(phantom)"), monkeypatch)
    assert "split: " in caplog.text


def test_label_maps_of_nnunet_are_scored_on_the_grid_of_the_labels(config, monkeypatch):
    monkeypatch.setattr(nnunet_training, "version", lambda name: "2.8.1")
    found = nnunet_training.find_prepared(config)
    cases = nnunet_training.find_cases_of_fold(config, found)
    (case,) = cases.validation
    image = nib.load(case.label)
    truth = np.asarray(image.dataobj)
    liver = cases.names.index("liver")
    drawn = np.where(truth == liver, 0, truth)
    drawn[np.unravel_index(np.flatnonzero(truth == liver)[::2], truth.shape)] = liver
    folder = nnunet_training.results_folder(config, found) / "validation"
    folder.mkdir(parents=True)
    nib.save(nib.Nifti1Image(drawn.astype(np.uint8), image.affine), folder / f"{case.name}.nii.gz")
    summary = nnunet_training.score_label_maps(config, found, cases, distributed.find_processes("cpu"))
    table = read_score_table(Path(config.out) / "scores" / "cases.csv")
    half, whole = (np.sum(labels == liver) for labels in (drawn, truth))
    dice = dict(zip(table.targets, table.values["dice"][0], strict=True))
    assert dice["liver"] == pytest.approx(2 * half / (half + whole))
    assert dice["spleen"] == 1
    assert summary["protocol"]["engine"] == "nnU-Net 2.8.1"
    assert summary["protocol"]["training_cases"] == 1


def test_a_case_without_a_label_map_is_named_in_the_scores(config, monkeypatch):
    monkeypatch.setattr(nnunet_training, "version", lambda name: "2.8.1")
    found = nnunet_training.find_prepared(config)
    cases = nnunet_training.find_cases_of_fold(config, found)
    nnunet_training.score_label_maps(config, found, cases, distributed.find_processes("cpu"))
    failed = read_summary(Path(config.out) / "scores")["failed"]
    assert re.search("no such file|No such file", failed[cases.validation[0].name])
