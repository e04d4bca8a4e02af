"""Each kind of training on MR of two channels, from the folder of data to predictions, in tiny networks."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from hyspark.cli.main import main
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import as_plain, shown_settings
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.batches.loader import Shard
from hyspark.evaluation.segmentation.evaluate import evaluate_segmentation
from hyspark.evaluation.segmentation.inference import load_network
from hyspark.evaluation.segmentation.labelled_data import find_labelled
from hyspark.evaluation.segmentation.predict import predict_segmentation
from hyspark.evaluation.segmentation.scoring_protocol import Scoring
from hyspark.models.weights.export import export_weights
from hyspark.planning.plan import count_flops
from hyspark.tasks.masked_task import MaskedTask
from hyspark.tasks.pretrain import initialise_pretraining, run_pretraining
from hyspark.tasks.segmentation import initialise_segmentation, run_segmentation
from hyspark.training.initial_weights import load_volume_weights
from tests.conftest import SMALL
from tests.data.quality.small_data import CASES, NAMES, write_mr
from tests.tasks.kinds import OTHERS, PRETRAININGS

SIZE = (32, 16, 16)
TWO: dict[str, Any] = {"intensity": ("mr",), "image_channels": (0, 1), "spacing": (3.0, 3.0, 3.0), "crop_size": SIZE}
BATCH: dict[str, Any] = {"batch_size": 2, "crops_per_volume": 2, "epochs": 1, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mr(tmp_path_factory.mktemp("mr") / "Dataset001_Small")


@pytest.fixture
def pretraining_two(data: Path, tmp_path: Path) -> PretrainConfig:
    own = {"data": str(data), "out": str(tmp_path / "run"), "store_dir": str(data.parent / "store"), "max_steps": 1}
    return PretrainConfig(**SMALL | TWO | BATCH | own | {"decoder_width": 16})


@pytest.fixture(scope="module")
def finetuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SegmentationConfig:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    own = {"data": str(data), "out": str(folder), "store_dir": str(data.parent / "store"), "lr": 1e-3, "val_every": 1}
    config = SegmentationConfig(**SMALL | TWO | BATCH | own | {"rot90_prob": 0.0, "intensity_prob": 1.0})
    run_segmentation(config)
    return config


def settings_of(kind: str) -> dict[str, Any]:
    """Small settings of a method, whose input has the two channels of the images."""
    known = {name: value for name, value in PRETRAININGS[kind].items() if name != "in_channels"}
    return {"crop_size": SIZE} | known


@pytest.mark.parametrize("kind", ["packed", "masked", "packed, 2D", "spark timm", "spark segresnet", "moco", "swav"])
def test_each_method_pretrains_on_two_channels(pretraining_two, kind):
    config = replace(pretraining_two, **settings_of(kind))
    assert config.in_channels == 2
    run_pretraining(config)
    stored = torch.load(next(config.run_folder.glob("*_timm_style.pth")), weights_only=True)
    stem = next(value for value in stored.values() if value.ndim >= 4)
    assert stem.shape[1] == 2
    pictures = sorted(path.name for path in (config.run_folder / "pictures").iterdir())
    if config.method in ("moco", "swav"):
        assert pictures == ["views.png"]
    else:
        assert any("_channel1" in name for name in pictures)


def test_slices_in_their_own_range(pretraining_two):
    run_pretraining(replace(pretraining_two, **settings_of("moco"), slice_scaling="minmax"))


def test_one_channel_of_mr_is_repeated_for_a_network_of_photographs(pretraining_two):
    run_pretraining(replace(pretraining_two, **PRETRAININGS["moco"], image_channels=(1,)))


def test_a_plan_and_a_probe_of_two_channels(pretraining_two, caplog):
    caplog.set_level(logging.INFO)
    model = initialise_pretraining(pretraining_two)
    assert count_flops(pretraining_two, model, 2).backward > 0
    batch = MaskedTask(pretraining_two, Shard(1), [], []).random_batch(2)
    assert batch["volumes"].shape == (2, 2, *SIZE)
    probed = replace(pretraining_two, probe_data=pretraining_two.data, probe_cases=2)
    run_pretraining(probed)
    assert "probe Dice" in caplog.text


def test_predictions_are_what_is_scored(finetuned, data, tmp_path):
    """The labels of `predict`, from files and through the store, have the Dice of `evaluate`."""
    scoring = Scoring(memory=1e-6)
    summary = evaluate_segmentation(
        finetuned.run_folder, data, tmp_path / "scores", scoring=scoring, device="cpu", store_dir=finetuned.store_dir
    )
    assert summary["protocol"]["intensity"] == ["mr"]
    assert summary["protocol"]["image_channels"] == [0, 1]
    assert "hu_window" not in summary["protocol"]
    made = predict_segmentation(finetuned.run_folder, [data / "imagesTr"], tmp_path / "out", num_workers=1)
    assert made.failures == {}
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"{case}.nii.gz" for case in CASES]
    rows = (tmp_path / "scores" / "cases.csv").read_text().splitlines()
    header = rows[0].split(",")
    for row in rows[1:]:
        values = dict(zip(header, row.split(","), strict=True))
        truth, found = (
            nib.load(folder / f"{values['case']}.nii.gz").get_fdata() == NAMES[values["organ"]]
            for folder in (data / "labelsTr", tmp_path / "out")
        )
        dice = 2 * (truth & found).sum() / (truth.sum() + found.sum())
        assert float(values["dice"]) == pytest.approx(dice, abs=2e-3)


def test_the_second_channel_matters(finetuned, data, tmp_path):
    network = load_network(finetuned.run_folder).network
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(1, 2, 32, 16, 16, generator=generator)
    other = one.clone()
    other[:, 1] = 0
    with torch.no_grad():
        assert not torch.allclose(network(one), network(other))


def test_files_are_named_by_their_first_or_any_channel(finetuned, data, tmp_path):
    images = data / "imagesTr"
    for number, given in enumerate([["p01_0000"], ["p01_0001"], ["p01_0000", "p01_0001"]]):
        words = [str(images / f"{name}.nii.gz") for name in given]
        main(["predict", str(finetuned.run_folder), *words, "--out", str(tmp_path / str(number)), "--device", "cpu"])
    contents = {(tmp_path / str(number) / "p01.nii.gz").read_bytes() for number in range(3)}
    assert len(contents) == 1


def test_a_case_without_a_channel_is_named(finetuned, data, tmp_path, capsys):
    alone = tmp_path / "alone_0000.nii.gz"
    alone.write_bytes((data / "imagesTr" / "p01_0000.nii.gz").read_bytes())
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(finetuned.run_folder), str(alone), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert exit_.value.code == 1
    text = capsys.readouterr().err
    assert f"{tmp_path}/alone_0001.nii.gz: no such file" in text
    assert "image_channels" in text


def test_a_list_of_channels_is_written_and_read(data, finetuned, tmp_path, capsys):
    path = tmp_path / "list.json"
    main(["datalist", "--data", str(data), "--labels", "--channel", "0", "1", "--out", str(path)])
    entry = json.loads(path.read_text())["training"][0]
    assert [Path(file).name for file in entry["image"]] == ["p01_0000.nii.gz", "p01_0001.nii.gz"]
    folder = find_labelled(data, channels=(0, 1)).cases
    assert [case.images for case in find_labelled(path, channels=(0, 1)).cases] == [case.images for case in folder]
    assert [case.images for case in find_labelled(path).cases] == [(case.image,) for case in folder]
    run = replace(finetuned, data=str(path), out=str(tmp_path / "run"))
    run_segmentation(run)
    assert (tmp_path / "run" / "best.pth").is_file()
    with pytest.raises(SystemExit):
        main(["datalist", "--data", str(data), "--channel", "first", "--out", str(path)])
    assert "--channel: expected numbers" in capsys.readouterr().err


def test_weights_are_held_against_their_use(finetuned, tmp_path, caplog):
    run = finetuned.run_folder / "best.pth"
    export_weights(run, tmp_path / "encoder.safetensors")
    one = replace(finetuned, image_channels=(0,), in_channels=1, intensity=("ct",))
    for path in (run, tmp_path / "encoder.safetensors"):
        caplog.clear()
        load_volume_weights(initialise_segmentation(finetuned, len(NAMES)), path, finetuned)
        assert not caplog.records
        load_volume_weights(initialise_segmentation(one, len(NAMES)), path, one)
        assert [record.getMessage().split(" was ")[1] for record in caplog.records] == [
            "made with intensity mr, this run has ct",
            "made with image_channels 0 1, this run has 0",
        ]


def test_weights_without_intensities_are_of_ct(finetuned, tmp_path, caplog):
    old = {name: value for name, value in as_plain(finetuned).items() if name in ("spacing", "hu_min", "hu_max")}
    model = initialise_segmentation(finetuned, len(NAMES))
    torch.save({"model": model.state_dict(), "config": old}, tmp_path / "old.pth")
    load_volume_weights(model, tmp_path / "old.pth", finetuned)
    assert "made with intensity ct, this run has mr" in caplog.text
    caplog.clear()
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    load_volume_weights(model, tmp_path / "plain.pth", finetuned)
    assert "does not say for which intensity" in caplog.text


def test_weights_in_the_released_format_have_the_settings_of_their_run(pretraining_two, finetuned, caplog):
    run_pretraining(pretraining_two)
    encoder = next(pretraining_two.run_folder.glob("*_1kpretrained_timm_style.pth"))
    caplog.clear()
    load_volume_weights(initialise_pretraining(pretraining_two), encoder, pretraining_two)
    assert not caplog.records
    load_volume_weights(initialise_segmentation(finetuned, 3), encoder, replace(finetuned, intensity=("none",)))
    assert "made with intensity mr, this run has none" in caplog.text


def test_the_page_of_a_run_on_mr_says_nothing_of_hounsfield_units(finetuned):
    page = (finetuned.run_folder / "report.html").read_text()
    assert not re.search(r"\bHU\b|Hounsfield", re.sub("base64,[^\"')]+", "", page))
    assert "hu_min" not in page
    assert "hu_min" in shown_settings(replace(finetuned, intensity=("ct",)))


@pytest.mark.parametrize(
    ("config_class", "given", "message"),
    [
        (PretrainConfig, {"in_channels": 3}, "in_channels: expected 2, the number of image_channels, got 3"),
        (PretrainConfig, {"model": "spark/timm/test_resnet", "in_channels": 3, **OTHERS}, "in_channels: expected 2"),
        (SegmentationConfig, {"in_channels": 4}, "in_channels: expected 2"),
    ],
)
def test_another_number_of_input_channels_is_refused(config_class, given, message):
    with pytest.raises(ValueError, match=message):
        config_class(image_channels=(0, 1), **given)


def test_mr_under_the_settings_of_ct_gets_advice_that_works(data, tmp_path, capsys):
    folder = write_mr(tmp_path / "Dataset001_Small", channels=(0,))
    words = ["--data", str(folder), "--out", str(tmp_path / "run"), "--prepare_workers", "1", "--device", "cpu"]
    small = ["--encoder_widths", *["6", "6", "12", "12", "24"], "--encoder_depths", *"11111", "--expansions", *"22222"]
    small += ["--vit_depth", "1", "--crop_size", "32", "16", "16", "--spacing", "3", "3", "3", "--decoder_width", "16"]
    small += ["--max_steps", "1", "--batch_size", "2", "--dataloader_workers", "0", "--warmup_epochs", "0"]
    with pytest.raises(SystemExit) as exit_:
        main(["pretrain", *words, *small])
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert 'names it "T1"' in text
    assert "train with --intensity mr" in text
    main(["pretrain", *words, *small, "--intensity", "mr"])
    assert np.isfinite(json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"])
