import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss

from hyspark.cli.main import main
from hyspark.config.recipes import write_yaml
from hyspark.data.datasets import build as datasets_build
from hyspark.data.datasets import datalist_json
from hyspark.evaluation.protocol import read_summary
from hyspark.evaluation.segmentation import segmenter
from hyspark.evaluation.segmentation.inference import load_network
from hyspark.evaluation.segmentation.test_cases import prepare_held_out
from hyspark.evaluation.validations import read_validations
from hyspark.tasks.pretrain import run_pretraining
from hyspark.tasks.segmentation import initialise_segmentation, run_segmentation
from hyspark.tasks.segmentation_task import split_crops
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import load_volume_weights
from hyspark.training.labelled_cases import find_labelled_cases
from hyspark.training.losses import DiceAndCrossEntropy
from hyspark.training.run_folder import checkpoint_file, encoder_file

ORGANS = ["liver", "spleen", "right_kidney", "left_kidney", "aorta", "spine", "right_lung", "left_lung"]


def metrics(config):
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.curves
def test_from_pretraining_to_a_table(pretraining, finetuning, capsys):
    run_pretraining(replace(pretraining, epochs=1))
    config = replace(finetuning, weights=str(encoder_file(pretraining)), epochs=2, val_every=1)
    folder = run_segmentation(config)
    for name in ("config.yaml", "metrics.jsonl", "best.pth", "last.pth", "report.html", "pictures"):
        assert (folder / name).exists(), name
    for name in ("cases.csv", "summary.json", "table.md"):
        assert (folder / "scores" / name).is_file(), name
    # The one validation case is the best, the median and the worst.
    assert len(list((folder / "scores").glob("*.png"))) == 1
    summary = json.loads((folder / "scores" / "summary.json").read_text())
    assert summary["protocol"]["weights"] == "last.pth after 2 steps"
    scores = read_validations(folder)
    assert {name: row["dice"] for name, row in summary["organs"].items()} == pytest.approx(scores.last)
    assert list(scores.best) == list(scores.last) == ORGANS
    assert [m["epoch"] for m in metrics(config) if "dice_mean" in m] == [0, 1]
    scratch = replace(finetuning, out=str(folder.parent / "scratch"), epochs=1, val_every=1)
    run_segmentation(scratch)
    first = [next(m["loss"] for m in metrics(c)) for c in (config, scratch)]
    assert first[0] != first[1]
    main(["compare", str(folder), str(scratch.run_folder)])
    table = capsys.readouterr().out
    assert all(organ in table for organ in ORGANS)
    assert "scratch" in table


def test_the_decoder_of_pre_training_comes_along(pretraining, finetuning, tmp_path):
    """With turns and stretches, interrupted and continued, and read back for prediction."""
    run_pretraining(replace(pretraining, epochs=1))
    source = checkpoint_file(pretraining)
    light = replace(
        finetuning,
        decoder="light",
        decoder_width=16,
        affine_prob=0.7,
        weights=str(source),
        lr=1e-9,
        weight_decay=0,
        epochs=2,
    )
    whole, parts = (replace(light, out=str(tmp_path / name)) for name in ("whole", "parts"))
    run_segmentation(whole)
    run_segmentation(replace(parts, max_steps=1))
    run_segmentation(parts)
    a, b = ([m["loss"] for m in metrics(c) if "loss" in m] for c in (whole, parts))
    assert a == b
    network, config, names, _ = load_network(whole.run_folder)
    assert (config.decoder, names[1:]) == ("light", ORGANS)
    before = torch.load(source, weights_only=True)["model"]["decoder.levels.0.up.weight"]
    torch.testing.assert_close(network.decoder.levels[0].up.weight, before, rtol=0, atol=1e-6)


def test_an_interrupted_run_continues_as_if_nothing_had_happened(finetuning, tmp_path):
    whole = replace(finetuning, out=str(tmp_path / "whole"), epochs=3, val_every=3)
    parts = replace(whole, out=str(tmp_path / "parts"))
    run_segmentation(whole)
    run_segmentation(replace(parts, max_steps=1))
    run_segmentation(replace(parts, dataloader_workers=1))
    a, b = ([m["loss"] for m in metrics(c) if "loss" in m] for c in (whole, parts))
    assert a == b
    x, y = (torch.load(c.run_folder / "last.pth", weights_only=True)["model"] for c in (whole, parts))
    assert all(torch.equal(x[key], y[key]) for key in x)


def test_the_organs_are_learnt(finetuning):
    config = replace(finetuning, epochs=61, max_steps=60, val_every=61, lr=1e-2, warmup_epochs=2, flip_prob=(0.0,) * 3)
    config = replace(config, crop_size=(16,))
    run_segmentation(config)
    values = [m["loss"] for m in metrics(config) if "loss" in m]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


def test_the_background_counts_less_where_the_settings_say_so():
    scores, labels = torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4, dtype=torch.int64)
    labels[0, 0, 0, 0, 0] = 2  # 63 voxels of background, one of an organ
    # All classes are equally likely everywhere, so each Dice is 2 * (voxels / 3) / (64 / 9 + voxels).
    dice = [1 - 2 * (n / 3) / (64 / 9 + n) for n in (63, 0, 1)]
    for weight in (1.0, 0.2):
        loss = DiceAndCrossEntropy(3, weight)
        expected = (weight * dice[0] + dice[1] + dice[2]) / 3 + math.log(3)
        value = loss(scores, labels, float(loss.weight_sum(labels)))
        assert value.item() == pytest.approx(expected, rel=1e-5), weight
    wrong = scores.clone()
    wrong[:, 0] = -5.0  # the background's voxels are all wrong, the organ's is half right
    a, b = (torch.nn.functional.cross_entropy(wrong, torch.full((1, 4, 4, 4), c)).item() for c in (0, 2))
    for weight in (1.0, 0.2):
        loss = DiceAndCrossEntropy(3, weight)
        cross_entropy = loss(wrong, labels, float(loss.weight_sum(labels))) - loss.dice(wrong, labels)
        assert cross_entropy.item() == pytest.approx((weight * 63 * a + b) / (weight * 63 + 1), rel=1e-5)


def test_the_loss_is_that_of_monai():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 1, 4, 4, 4))
    for weight in (1.0, 0.2):
        own = DiceAndCrossEntropy(3, weight)
        options = {"squared_pred": True, "smooth_nr": 0.0, "smooth_dr": 1e-6, "weight": torch.tensor([weight, 1, 1])}
        expected = DiceCELoss(to_onehot_y=True, softmax=True, **options)(scores, labels)
        torch.testing.assert_close(own(scores, labels, float(own.weight_sum(labels))), expected)


def test_a_label_value_that_is_no_class_stops_before_the_first_step(finetuning, tmp_path):
    listed = datasets_build.build_datalist(finetuning.data, labels=True, splits="auto")
    datalist_json.write_datalist(replace(listed, labels={"background": 0, "liver": 1}), tmp_path / "list.json")
    with pytest.raises(ValueError, match="holds the value 8, but the classes go from 0 to 1"):
        run_segmentation(replace(finetuning, json_list=str(tmp_path / "list.json")))
    assert not (finetuning.run_folder / "metrics.jsonl").exists()


def test_wrong_weights_stop_before_the_first_step(finetuning, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"something.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"x\.pth"):
        run_segmentation(replace(finetuning, weights=str(path)))
    assert not (finetuning.run_folder / "metrics.jsonl").exists()


def weights_of(config, name="last.pth"):
    return torch.load(config.run_folder / name, weights_only=True)["model"]


@pytest.mark.parametrize("weight", [1.0, 0.2])
def test_passes_of_a_step_add_up_to_the_step(finetuning, tmp_path, weight):
    small = {"crop_size": (16,), "crops_per_volume": 2, "max_steps": 2, "val_every": 4}
    config = replace(finetuning, **small, background_weight=weight)
    whole = replace(config, out=str(tmp_path / "whole"))
    split = replace(config, out=str(tmp_path / "split"), accumulate=4)
    run_segmentation(whole)
    run_segmentation(split)
    a, b = ([m for m in metrics(c) if "loss" in m] for c in (whole, split))
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in a] == pytest.approx([m[name] for m in b], rel=1e-3), name
        assert a[0][name] == pytest.approx(b[0][name], rel=1e-5), name


def test_parts_of_a_batch():
    batch = {"image": torch.arange(4.0).view(4, 1), "label": torch.arange(4).view(4, 1), "cases": list("abcd")}
    parts = split_crops(batch, 2)
    assert [p["cases"] for p in parts] == [["a", "b"], ["c", "d"]]
    assert torch.equal(torch.cat([p["image"] for p in parts]), batch["image"])
    assert split_crops(batch, 1)[0]["cases"] == batch["cases"]
    with pytest.raises(ValueError, match="accumulate=3 does not divide the 4 crops"):
        split_crops(batch, 3)


def test_a_frozen_encoder_stays_and_the_decoder_learns(finetuning):
    config = replace(finetuning, freeze_epochs=2, epochs=5, val_every=5, max_steps=4, crop_size=(16,))
    start = {k: v.clone() for k, v in initialise_segmentation(config, 1 + len(ORGANS)).state_dict().items()}
    run_segmentation(replace(config, max_steps=2))
    frozen = weights_of(config)
    moved = {key.split(".")[0] for key in start if not torch.equal(start[key], frozen[key])}
    assert moved == {"decoder"}
    run_segmentation(config)  # goes on, with the encoder
    thawed = weights_of(config)
    assert {key.split(".")[0] for key in start if not torch.equal(frozen[key], thawed[key])} >= {"embeddings", "mae"}


def test_lower_layers_learn_more_slowly(finetuning):
    start = initialise_segmentation(finetuning, 1 + len(ORGANS)).state_dict()
    config = replace(finetuning, layer_decay=0.5, max_steps=1, warmup_epochs=0, crop_size=(16,))
    run_segmentation(config)
    moved = {key: (value - start[key]).abs().max().item() for key, value in weights_of(config).items()}
    # The first step of AdamW moves a weight by the learning rate, whatever its gradient.
    assert moved["decoder.out.conv.weight"] == pytest.approx(1e-3, rel=0.05)
    assert moved["mae.blocks.0.attn.qkv.weight"] == pytest.approx(1e-3 / 2, rel=0.05)
    assert moved["embeddings.stem.weight"] == pytest.approx(1e-3 / 64, rel=0.05)


def test_a_pretrained_encoder_has_a_rate_of_its_own(finetuning, tmp_path):
    start = initialise_segmentation(finetuning, 1 + len(ORGANS)).state_dict()
    torch.save(start, tmp_path / "start.pth")
    first_step = replace(finetuning, max_steps=1, warmup_epochs=0, crop_size=(16,))
    config = replace(first_step, encoder_lr_ratio=0.5, pretrained_lr_ratio=0.2)
    starts = {
        "scratch": config,
        "pretrained": replace(config, weights=str(tmp_path / "start.pth"), out=str(tmp_path / "run")),
    }
    moved = {}
    for name, run in starts.items():
        run_segmentation(run)
        moved[name] = {key: (value - start[key]).abs().max().item() for key, value in weights_of(run).items()}
    # The first step of AdamW moves a weight by the learning rate, whatever its gradient.
    assert moved["scratch"]["mae.blocks.0.attn.qkv.weight"] == pytest.approx(1e-3 / 2, rel=0.05)
    assert moved["pretrained"]["mae.blocks.0.attn.qkv.weight"] == pytest.approx(1e-3 / 10, rel=0.05)
    assert moved["pretrained"]["decoder.out.conv.weight"] == pytest.approx(1e-3, rel=0.05)


def test_weights_that_have_seen_other_volumes_are_pointed_out(finetuning, tmp_path, caplog):
    config = replace(finetuning, spacing=(4.0, 4.0, 3.0))
    model = initialise_segmentation(config, 9)
    made = {"spacing": [4.0, 4.0, 3.0], "hu_min": config.hu_min, "hu_max": config.hu_max}
    torch.save({"model": model.state_dict(), "config": made}, tmp_path / "a.pth")
    load_volume_weights(model, tmp_path / "a.pth", config)
    assert not caplog.records
    torch.save({"model": model.state_dict(), "config": {"spacing": 4, "hu_max": "?"}}, tmp_path / "b.pth")
    load_volume_weights(model, tmp_path / "b.pth", replace(config, spacing=(4.0, 4.0, 4.0)))
    assert not caplog.records
    load_volume_weights(model, tmp_path / "a.pth", replace(config, spacing=(2.0, 2.0, 3.0), hu_max=400.0))
    assert [record.getMessage().split(" was ")[1] for record in caplog.records] == [
        "made with spacing 4.0 4.0 3.0, this run has 2.0 2.0 3.0",
        "made with hu_max 250.0, this run has 400.0",
    ]


def test_weights_of_another_order_of_axes_are_pointed_out(finetuning, tmp_path, caplog):
    """As those that nnU-Net trained on arrays z, y, x."""
    model = initialise_segmentation(finetuning, 9)
    made = {"spacing": list(finetuning.spacing), "axis_order": [2, 1, 0]}
    torch.save({"model": model.state_dict(), "config": made}, tmp_path / "a.pth")
    load_volume_weights(model, tmp_path / "a.pth", finetuning)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "made with arrays of axes z y x, this run has x y z: its kernels lie along other axes"
    )
    for order in ([], [0, 1, 2], "?", [0, 0, 1]):
        torch.save({"model": model.state_dict(), "config": made | {"axis_order": order}}, tmp_path / "a.pth")
        load_volume_weights(model, tmp_path / "a.pth", finetuning)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("setting", ["decoder_width", "decoder_min_width"])
def test_settings_of_the_other_decoder_are_refused_in_a_new_run(finetuning, setting, monkeypatch):
    """In an old one, which had them for nothing, they change nothing."""
    config = replace(finetuning, **{setting: 32})
    with pytest.raises(ValueError, match=f"{setting}=32 needs decoder=light, but decoder is released"):
        run_segmentation(config)
    with monkeypatch.context() as before:
        before.setattr("hyspark.tasks.segmentation.check_decoder", lambda config: None)
        run_segmentation(replace(config, epochs=1, max_steps=1))
    run_segmentation(replace(config, epochs=1))
    assert getattr(load_network(config.run_folder).config, setting) == 32


def test_without_an_organ_in_validation_there_is_no_dice(finetuning, tmp_path, caplog):
    folder = shutil.copytree(finetuning.data, tmp_path / "Dataset902_Empty")
    config = replace(finetuning, data=str(folder), epochs=1)
    (case,) = find_labelled_cases(config)[1]
    image = nibabel.load(case.label)
    nibabel.save(nibabel.Nifti1Image(np.zeros_like(image.dataobj), image.affine), case.label)
    run_segmentation(config)
    assert "no Dice, since no label of the 1 validation cases has an organ" in caplog.text
    assert "dice_mean" not in (config.run_folder / "metrics.jsonl").read_text()
    assert load_network(config.run_folder).names[1:] == ORGANS


def test_epochs_of_a_set_length(finetuning):
    config = replace(finetuning, steps_per_epoch=3, epochs=3, val_every=3, max_steps=6, num_labelled=1, crop_size=(16,))
    run_segmentation(config)
    assert [m["epoch"] for m in metrics(config) if "loss" in m] == [0, 0, 0, 1, 1, 1]


def test_further_cases_are_scored_once_by_the_last_weights(finetuning, tmp_path, caplog):
    config = replace(finetuning, epochs=2, test_dir=finetuning.data)
    run_segmentation(config)
    path = config.run_folder / "scores_test" / "summary.json"
    summary = json.loads(path.read_text())
    assert summary["protocol"]["num_cases"] == 3
    assert summary["protocol"]["weights"] == "last.pth after 2 steps"
    before = path.stat().st_mtime_ns
    run_segmentation(config)  # nothing to do
    assert path.stat().st_mtime_ns == before
    path.unlink()
    run_segmentation(config)  # the scores alone
    assert json.loads(path.read_text()) == summary
    assert summary["protocol"]["scored_cases_trained_on"] == summary["protocol"]["training_cases"] == 2
    assert "2 of 3 were trained on" in caplog.text
    settings = config.run_folder / "config.yaml"
    written = settings.read_text()
    run_segmentation(replace(config, max_steps=1))  # has been done, and more
    assert settings.read_text() == written
    own = config.run_folder / "scores"
    scores = (own / "cases.csv").read_text()
    shutil.rmtree(own)
    run_segmentation(config)
    assert (own / "cases.csv").read_text() == scores
    assert read_summary(own)["protocol"]["scored_cases_trained_on"] == 0
    others = tmp_path / "Dataset901_Others"  # as many cases
    shutil.copytree(finetuning.data, others)
    label = sorted((others / "labelsTr").iterdir())[0]
    nibabel.save(nibabel.Nifti1Image(np.zeros_like(nibabel.load(label).dataobj), nibabel.load(label).affine), label)
    run_segmentation(replace(config, test_dir=str(others)))
    assert read_summary(path.parent)["protocol"]["data_digest"] != summary["protocol"]["data_digest"]
    assert str(others) in (config.run_folder / "config.yaml").read_text()
    with pytest.raises(FileNotFoundError):
        run_segmentation(replace(config, test_dir=str(tmp_path / "none"), out=str(tmp_path / "other")))


def fail_at(monkeypatch, *numbers):
    """Let the n-th segmentations of a run fail, counted from 1."""
    calls = []
    right = segmenter.VolumeSegmenter.segment

    def segment(self, *args):
        calls.append(args)
        if len(calls) in numbers:
            raise MemoryError("Unable to allocate 9 GiB")
        return right(self, *args)

    monkeypatch.setattr(segmenter.VolumeSegmenter, "segment", segment)


def test_a_case_that_is_not_scored_ends_no_training(finetuning, monkeypatch, caplog, capsys, tmp_path):
    """In a validation between, in the last one and among the further cases; the same command then scores it."""
    data = Path(finetuning.data)
    words = [f"--{name}={value}" for name, value in (("data", data), ("out", tmp_path / "run"), ("test_dir", data))]
    recipe = tmp_path / "recipe.yaml"
    write_yaml(replace(finetuning, epochs=2, val_every=1), recipe)
    fail_at(monkeypatch, 1, 2, 4)
    with pytest.raises(SystemExit) as exit_:
        main(["finetune", "--config", str(recipe), *words])
    assert exit_.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not scored")]
    reason = "out of memory (Unable to allocate 9 GiB); free memory, then do this case again"
    assert [line.partition(": ")[2].partition(": ")[2] for line in lines] == [reason, reason]
    assert lines[0].startswith("not scored: scores/")
    assert lines[1].startswith("not scored: scores_test/")
    assert caplog.text.count("1 of 1 cases were not scored") == 2
    assert "1 of 3 cases were not scored" in caplog.text
    run = tmp_path / "run"
    assert len(read_summary(run / "scores_test")["failed"]) == 1
    assert read_summary(run / "scores_test")["protocol"]["num_cases"] == 2
    assert "Unable to allocate" in (run / "report.html").read_text()
    main(["finetune", "--config", str(recipe), *words])
    assert "failed" not in read_summary(run / "scores")
    assert read_summary(run / "scores_test")["protocol"]["num_cases"] == 3


def test_an_unreadable_further_case_stops_the_run_or_is_excluded(finetuning, tmp_path):
    folder = shutil.copytree(finetuning.data, tmp_path / "Dataset903_Test")
    image = sorted((folder / "imagesTr").iterdir())[0]
    image.write_bytes(b"no volume")
    config = replace(finetuning, test_dir=str(folder), store_dir=str(tmp_path / "store"))
    processes = Processes(torch.device("cpu"))
    names = ["background", *ORGANS]
    with pytest.raises(ValueError, match=r"1 of 3 volumes are unusable; .* --on_bad_case skip"):
        prepare_held_out(config, processes, names)
    held_out = prepare_held_out(replace(config, on_bad_case="skip"), processes, names)
    assert (len(held_out.cases), len(held_out.volumes), len(held_out.failures)) == (2, 2, 1)


def test_a_left_right_pair_that_is_no_class_is_found_at_once(finetuning):
    with pytest.raises(ValueError, match="'left_kidny', which is no class; did you mean left_kidney"):
        run_segmentation(replace(finetuning, left_right=("left_kidny=right_kidney",), dry_run=True))
