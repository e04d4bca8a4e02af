"""The verbs as Python functions: the same code and results as the command line, paths and tables back."""

import csv
import multiprocessing
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import hyspark
from hyspark.cli import main
from hyspark.config.recipes import write_yaml
from hyspark.config.segmentation import SegmentationConfig
from hyspark.tasks import api


def settings_of(config, **changes):
    return asdict(config) | changes


def test_pretraining_returns_paths_and_a_table(pretraining):
    run = hyspark.pretrain(**settings_of(pretraining, max_steps=2, out=Path(pretraining.out)))
    assert run.folder == pretraining.run_folder
    assert run.weights.is_file()
    assert run.report.is_file()
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert len(losses) == 2
    assert run.scores == []
    again = hyspark.pretrain(**settings_of(pretraining, max_steps=3))
    assert [line["loss"] for line in again.metrics if "loss" in line][:2] == losses


def test_a_recipe_and_settings_over_it(pretraining, tmp_path):
    write_yaml(pretraining, tmp_path / "recipe.yaml")
    run = hyspark.pretrain(tmp_path / "recipe.yaml", out=tmp_path / "other", ep=1, max_steps=1)
    assert run.folder == tmp_path / "other"
    assert "epochs: 1" in (run.folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match="settings: unknown key 'epoch'; did you mean epochs"):
        hyspark.pretrain(tmp_path / "recipe.yaml", epoch=1)
    with pytest.raises(ValueError, match="settings: lr should be float, but it is 'fast'"):
        hyspark.pretrain(lr="fast")


def test_segmentation_from_training_to_label_maps(finetuning, phantoms, tmp_path, capsys):
    run = hyspark.finetune(**settings_of(finetuning, epochs=1, val_every=1))
    assert run.weights == finetuning.run_folder / "best.pth"
    data = phantoms / "Dataset900_PhantomLabelled"
    options = {"device": "cpu", "prepare_workers": 1}
    scored = hyspark.evaluate(run.folder, data, tmp_path / "scores", store_dir=finetuning.store_dir, **options)
    assert scored.summary["protocol"]["num_cases"] == 3
    dice = {
        row["target"]: row["value"] for row in scored.table if row["metric"] == "dice" and row["case"].endswith("1")
    }
    assert set(dice) == set(scored.summary["organs"])
    (validation_case,) = {row["case"] for row in run.scores}
    assert repr([row for row in scored.table if row["case"] == validation_case]) == repr(run.scores)  # NaN too
    words = ["evaluate", str(run.folder), str(data), "--out", str(tmp_path / "same"), "--device", "cpu"]
    main.main([*words, "--store_dir", finetuning.store_dir, "--prepare_workers", "1"])
    assert "Dice" in capsys.readouterr().out
    assert (tmp_path / "same" / "cases.csv").read_text() == (tmp_path / "scores" / "cases.csv").read_text()
    volume = next((data / "imagesTr").glob("*.nii.gz"))
    made = hyspark.predict(run.weights, volume, tmp_path / "labels", overlap=0.0, **options)
    assert [path.name for path in made.files] == [volume.name.replace("_0000", "")]
    assert all(path.is_file() for path in made.files)
    assert made.failures == {}
    (tmp_path / "broken.nii.gz").write_bytes(b"broken")
    made = hyspark.predict(run.folder, [volume, tmp_path / "broken.nii.gz"], tmp_path / "more", **options)
    assert len(made.files) == 1
    assert list(made.failures) == ["broken"]


def test_classification_from_training_to_predictions(classifying, image_data, tmp_path, capsys):
    run = hyspark.finetune(task="classification", **settings_of(classifying, epochs=1))
    scored = hyspark.evaluate(run.folder, image_data / "test", tmp_path / "scores", device="cpu")
    assert set(scored.summary["metrics"]) == {"auc", "accuracy", "f1"}
    assert {(row["target"], row["metric"]) for row in scored.table} == {
        (name, metric) for name in ("dark", "light") for metric in ("truth", "probability")
    }
    main.main(
        ["evaluate", str(run.weights), str(image_data / "test"), "--out", str(tmp_path / "same"), "--device", "cpu"]
    )
    assert "AUC" in capsys.readouterr().out
    assert (tmp_path / "same" / "cases.csv").read_text() == (tmp_path / "scores" / "cases.csv").read_text()
    loose = shutil.copytree(image_data / "test" / "dark", tmp_path / "loose")
    made = hyspark.predict(run.folder, loose, tmp_path / "out", device="cpu")
    (path,) = made.files
    with path.open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [f"{i:02d}.png" for i in range(3)]
    main.main(["predict", str(run.folder), str(loose), "--out", str(tmp_path / "cli"), "--device", "cpu"])
    assert (tmp_path / "cli" / "predictions.csv").read_text() == path.read_text()


def test_options_of_segmentation_are_refused_for_a_classifier(classifying, image_data, tmp_path, capsys):
    run = hyspark.finetune(task="classification", **settings_of(classifying, max_steps=1))
    message = "overlap: an option of segmentation, but the network is a classifier"
    with pytest.raises(ValueError, match=message):
        hyspark.predict(run.folder, image_data / "test", tmp_path / "out", overlap=0.5)
    with pytest.raises(SystemExit) as exit_:
        main.main(["predict", str(run.folder), str(image_data), "--out", str(tmp_path / "o"), "--overlap", "0.5"])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"unknown option 'overlapp'; .* did you mean overlap"):
        hyspark.evaluate(run.folder, image_data / "test", tmp_path / "out", overlapp=0.5)
    with pytest.raises(ValueError, match="one folder of images, got 2 paths"):
        hyspark.predict(run.folder, [image_data, image_data], tmp_path / "out")


def test_a_task_that_does_not_exist():
    with pytest.raises(ValueError, match="task: expected segmentation or classification, got 'detection'"):
        hyspark.finetune(task="detection")


def test_public_names():
    assert set(hyspark.__all__) <= set(dir(hyspark))
    assert {"hyspark", "spark", "moco", "byol", "swav"} == set(hyspark.list_methods())
    assert "timm/resnet50" in hyspark.list_backbones("resnet*")
    assert hyspark.pretrain is api.pretrain


def test_label_maps_beside_their_volumes(finetuning, phantoms, tmp_path):
    """The label maps are no inputs of the same call."""
    run = hyspark.finetune(**settings_of(finetuning, epochs=1, val_every=1))
    volume = next((phantoms / "Dataset900_PhantomLabelled" / "imagesTr").glob("*.nii.gz"))
    (tmp_path / "scans").mkdir()
    shutil.copy(volume, tmp_path / "scans")
    options = {"overlap": 0.0, "device": "cpu", "prepare_workers": 1}
    made = hyspark.predict(run.folder, tmp_path / "scans", tmp_path / "scans", **options)
    assert made.files == [tmp_path / "scans" / volume.name.replace("_0000", "")]
    assert made.files[0].is_file()


def test_settings_of_one_axis_change_those_of_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("crop_size: 32\n")
    assert api.merge_settings(SegmentationConfig, tmp_path / "recipe.yaml", {"roi_z": 48}) == {
        "crop_size": (32, 32, 48)
    }


def test_numbers_of_numpy_are_settings():
    values = {"epochs": np.int64(3), "lr": np.float32(0.5), "crop_size": np.array([32, 32, 48])}
    assert api.merge_settings(SegmentationConfig, None, values) == {"epochs": 3, "lr": 0.5, "crop_size": (32, 32, 48)}


def test_what_is_asked_wrongly_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="inputs: expected one path or more, got none"):
        hyspark.predict(tmp_path, [], tmp_path)
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, not 'cpux'"):
        hyspark.evaluate(tmp_path, tmp_path, tmp_path, device="cpux")


def test_a_script_without_a_guard_is_told_what_to_add(monkeypatch, tmp_path):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    for call in (hyspark.pretrain, hyspark.finetune):
        with pytest.raises(RuntimeError, match="put its calls of hyspark below the line `if __name__"):
            call(out=tmp_path)
