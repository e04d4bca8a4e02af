import json
from dataclasses import replace

import pytest
import torch

from hyspark.cli import main
from hyspark.data import datalist
from hyspark.engine.evaluate import read_scores
from hyspark.engine.finetune import class_names, finetune
from hyspark.engine.pretrain import encoder_file, pretrain

ORGANS = ["liver", "spleen", "right_kidney", "left_kidney", "aorta", "spine", "right_lung", "left_lung"]


def metrics(config):
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


def test_from_pretraining_to_a_table(pretraining, finetuning, capsys):
    pretrain(replace(pretraining, ep=1))
    config = replace(finetuning, pretrained=str(encoder_file(pretraining)))
    folder = finetune(config)
    for name in ("config.yaml", "metrics.jsonl", "best.pth", "last.pth", "dice.json", "report.html", "pictures"):
        assert (folder / name).exists(), name
    scores = read_scores(folder)
    assert list(scores["best"]) == list(scores["last"]) == ORGANS
    assert [m["epoch"] for m in metrics(config) if "dice_mean" in m] == [1, 3]
    scratch = replace(finetuning, logdir=str(folder.parent / "scratch"))
    finetune(scratch)
    first = [next(m["loss"] for m in metrics(c)) for c in (config, scratch)]
    assert first[0] != first[1]
    main(["compare", str(folder), str(scratch.run_folder)])
    table = capsys.readouterr().out
    assert all(organ in table for organ in ORGANS)
    assert "scratch" in table


def test_an_interrupted_run_continues_as_if_nothing_had_happened(finetuning, tmp_path):
    whole = replace(finetuning, logdir=str(tmp_path / "whole"))
    parts = replace(finetuning, logdir=str(tmp_path / "parts"))
    finetune(whole)
    finetune(replace(parts, max_steps=1))
    finetune(replace(parts, dataloader_workers=1))
    a, b = ([m["loss"] for m in metrics(c) if "loss" in m] for c in (whole, parts))
    assert a == b
    x, y = (torch.load(c.run_folder / "last.pth", weights_only=True)["model"] for c in (whole, parts))
    assert all(torch.equal(x[key], y[key]) for key in x)


def test_the_organs_are_learnt(finetuning):
    config = replace(finetuning, max_epochs=60, val_every=60, optim_lr=5e-3, warmup_epochs=2, flip_prob=(0.0, 0.0, 0.0))
    finetune(config)
    values = [m["loss"] for m in metrics(config) if "loss" in m]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


def test_a_decathlon_list_and_the_folders_give_the_same_cases(finetuning, tmp_path):
    from hyspark.engine.finetune import find_cases

    folder = finetuning.data_dir
    listed = datalist.build(
        folder, labels=True, splits="auto", val_fraction=finetuning.val_fraction, seed=finetuning.seed
    )
    path = tmp_path / "list.json"
    datalist.write(listed, path)
    by_list = find_cases(replace(finetuning, json_list=str(path)))
    by_folder = find_cases(finetuning)
    names = [[c.name for part in found[:2] for c in part] for found in (by_list, by_folder)]
    assert names[0] == names[1]
    assert by_list[2] == by_folder[2] == ["background", *ORGANS]


def test_class_names_and_counts(finetuning):
    assert class_names(finetuning, {"background": 0, "a": 1, "b": 3}) == ["background", "a", "class_2", "b"]
    assert len(class_names(finetuning, None)) == 14
    assert len(class_names(replace(finetuning, out_channels=3), None)) == 3
    with pytest.raises(ValueError, match="labels go from 0 to 1"):
        class_names(replace(finetuning, out_channels=14), {"background": 0, "a": 1})


def test_a_label_value_that_is_no_class_stops_before_the_first_step(finetuning, tmp_path):
    listed = datalist.build(finetuning.data_dir, labels=True, splits="auto")
    datalist.write(replace(listed, labels={"background": 0, "liver": 1}), tmp_path / "list.json")
    with pytest.raises(ValueError, match="holds the value 8, but the classes go from 0 to 1"):
        finetune(replace(finetuning, json_list=str(tmp_path / "list.json")))
    assert not (finetuning.run_folder / "metrics.jsonl").exists()


def test_wrong_weights_stop_before_the_first_step(finetuning, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"something.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"x\.pth"):
        finetune(replace(finetuning, pretrained=str(path)))
    assert not (finetuning.run_folder / "metrics.jsonl").exists()
