import csv
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform

from hyspark.cli.main import main
from hyspark.config.recipes import as_plain
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets import build, cases, datalist_json
from hyspark.data.preprocessing.prepare import prepare_missing, stored_volumes
from hyspark.evaluation.segmentation import evaluate
from hyspark.evaluation.segmentation.evaluate import (
    are_cases_scored,
    evaluate_segmentation,
    score_cases,
)
from hyspark.evaluation.segmentation.inference import TrainedNetwork, hybird_from_config
from hyspark.evaluation.segmentation.labelled_data import check_classes, find_labelled
from hyspark.evaluation.segmentation.scoring_protocol import Scoring, Source
from hyspark.tasks import api
from hyspark.training import checkpoint, precision
from hyspark.training.distributed import find_processes
from hyspark.utils.digests import content_digest

TINY = {"encoder_widths": (6, 6, 12, 12, 24), "encoder_depths": (1,) * 5, "expansions": (2,) * 5, "vit_depth": 1}


# Scoring


class Levels(torch.nn.Module):
    """The class whose level the voxel's brightness is nearest to: right wherever `write_case` wrote the image."""

    def forward(self, x):
        return torch.cat([-((x - (hu + 175) / 425).abs()) for hu in (-50, 80, 200)], dim=1)


def write_case(folder, name, orientation="RAS", missing=0, truth_shift=0):
    """A box of body (-50 HU) with two organs (80 and 200 HU), voxels of 2 x 2 x 3 mm."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    label = np.zeros((24, 22, 20), np.uint8)
    label[6:14, 6:14, 6:14] = 1
    label[16:20, 8:12, 4:16] = 2
    image = np.full(label.shape, -1000, np.int16)
    image[2:22, 2:20, 2:18] = -50
    image[label == 1], image[label == 2] = 80, 200
    if missing:
        image[label == missing] = -50
    label = np.roll(label, truth_shift, 0)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    for part, array in (("imagesTr", image), ("labelsTr", label)):
        turned = nibabel.Nifti1Image(array, affine).as_reoriented(
            ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
        )
        ending = "_0000.nii.gz" if part == "imagesTr" else ".nii.gz"
        nibabel.save(turned, folder / part / f"{name}{ending}")


@pytest.fixture
def labelled(tmp_path):
    """A data set of three cases in three orientations."""
    folder = tmp_path / "Dataset001_Boxes"
    write_case(folder, "good", "LPS")
    write_case(folder, "shifted", "RAS", truth_shift=1)
    write_case(folder, "missed", "SAL", missing=2)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "aorta": 2}}))
    return folder


NAMES = ["background", "liver", "aorta"]
BOXES = SegmentationConfig(spacing=(2.0, 2.0, 3.0), crop_size=(16,), device="cpu", prepare_workers=1)


def scored(folder, out, config=BOXES, trained_on=(), **options):
    cases, _, text = find_labelled(folder)
    store = folder.parent / "store"
    assert not prepare_missing(cases, config, store, 1, progress=False)
    volumes = stored_volumes(cases, config, store)
    processes = find_processes("cpu")
    source = Source("levels", text, trained_on)
    return score_cases(Levels(), config, NAMES, volumes, cases, out, processes, source, **options)[0]


@pytest.mark.curves
def test_scores_of_a_network_that_is_right_but_for_known_faults(labelled, tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "best_of_other_weights.png").touch()
    summary = scored(labelled, tmp_path / "scores", scoring=Scoring(tolerance=2.1))
    assert (tmp_path / "scores" / "table.md").is_file()
    with (tmp_path / "scores" / "cases.csv").open() as file:
        rows = {(row["case"], row["organ"]): row for row in csv.DictReader(file)}
    for organ in ("liver", "aorta"):
        assert [rows["good", organ][k] for k in ("dice", "hd95_mm", "nsd")] == ["1.0", "0.0", "1.0"]
    assert float(rows["shifted", "liver"]["dice"]) == pytest.approx(7 / 8)
    assert float(rows["shifted", "liver"]["hd95_mm"]) == pytest.approx(2)
    assert float(rows["shifted", "aorta"]["nsd"]) == pytest.approx(1)
    assert [rows["missed", "aorta"][k] for k in ("dice", "hd95_mm", "nsd")] == ["0.0", "", "0.0"]
    assert summary["organs"]["aorta"]["num_missed"] == 1
    assert summary["organs"]["aorta"]["dice"] == pytest.approx((1 + 0.75 + 0) / 3)
    assert summary["protocol"]["num_cases"] == 3
    assert summary["protocol"]["window_size"] == [16, 16, 16]
    assert summary["protocol"]["nsd_tolerance_mm"] == 2.1
    pictures = sorted(path.name for path in (tmp_path / "scores").glob("*.png"))
    assert pictures == ["best_good.png", "median_shifted.png", "worst_missed.png"]


def test_cases_that_were_trained_on_are_told(labelled, tmp_path, caplog):
    """By what their images hold: one of another name, compressed anew, with labels of its own is the same case."""
    cases, _, text = find_labelled(labelled)
    known = [content_digest(case.image) for case in cases[:2]]
    assert scored(labelled, tmp_path / "unknown")["protocol"]["scored_cases_trained_on"] == "unknown"
    assert not caplog.records
    copy = tmp_path / "copy" / labelled.name
    shutil.copytree(labelled, copy)
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (copy / folder / f"{cases[0].name}{ending}").rename(copy / folder / f"renamed{ending}")
    image = copy / "imagesTr" / "renamed_0000.nii.gz"
    image.write_bytes(gzip.compress(gzip.decompress(image.read_bytes()), 1))
    label = nibabel.load(copy / "labelsTr" / "renamed.nii.gz")
    empty = nibabel.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine)
    nibabel.save(empty, copy / "labelsTr" / "renamed.nii.gz")
    protocol = scored(copy, tmp_path / "known", trained_on=known)["protocol"]
    assert (protocol["training_cases"], protocol["scored_cases_trained_on"]) == (2, 2)
    assert "2 of 3 were trained on (missed, renamed)" in caplog.text
    assert scored(copy, tmp_path / "new", trained_on=["other"])["protocol"]["scored_cases_trained_on"] == 0
    assert text == f"all labelled cases of {labelled}"


def test_scores_are_those_of_these_weights_and_files(labelled, tmp_path, monkeypatch):
    scored(labelled, tmp_path / "scores")
    cases, _, text = find_labelled(labelled)

    def known(source, cases=cases, config=BOXES):
        return are_cases_scored(tmp_path / "scores", config, NAMES, cases, find_processes("cpu"), source)

    source = Source("levels", text, [])
    assert known(source)
    assert not known(replace(source, weights="others"))
    assert known(replace(source, data="the same, by another path"))
    with monkeypatch.context() as another_machine:
        another_machine.setattr(precision, "inference_precision", lambda processes, config: "bf16")
        assert known(source)
    assert not known(source, cases[:2])
    assert not known(source, config=replace(BOXES, infer_overlap=0.25))
    path = labelled / "labelsTr" / "good.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.roll(np.asarray(image.dataobj), 1, 0), image.affine), path)
    assert not known(source)
    scored(labelled, tmp_path / "scores")
    assert known(source)
    (tmp_path / "scores" / "cases.csv").unlink()
    assert not known(source)


def test_flips_change_nothing_for_a_network_that_does_not_look_around(labelled, tmp_path):
    plain = scored(labelled, tmp_path / "plain")
    flipped = scored(labelled, tmp_path / "flipped", scoring=Scoring(flips=(0, 2), overlap=0.25))
    assert plain["organs"] == flipped["organs"]
    assert (flipped["protocol"]["flips"], flipped["protocol"]["overlap"]) == ([0, 2], 0.25)


def test_flips_of_sides_need_their_pairs(labelled, tmp_path):
    sided = ["background", "left kidney", "right kidney"]
    with pytest.raises(ValueError, match="omit axis 0"):
        Scoring(flips=(0,)).windows(BOXES, sided)
    pairs = replace(BOXES, left_right=("left kidney=right kidney",))
    assert Scoring(flips=(0,)).windows(pairs, sided).swaps == ((1, 2),)
    with pytest.raises(ValueError, match=r"mix up left lung, right lung, since .* omit axis 0"):
        Scoring(flips=(0,)).windows(replace(pairs, flip_prob=(0, 0, 0)), [*sided, "left lung", "right lung"])
    assert Scoring(flips=(1, 2)).windows(BOXES, sided).flips == (1, 2)
    with pytest.raises(ValueError, match="flips: expected axes"):
        Scoring(flips=(3,)).windows(BOXES, NAMES)
    with pytest.raises(ValueError, match="overlap must be"):
        Scoring(overlap=1.0).windows(BOXES, NAMES)


@pytest.fixture
def weights(tmp_path):
    """best.pth of an untrained network for the boxes."""
    config = replace(BOXES, **TINY)
    contents = {"model": hybird_from_config(config, 3).state_dict(), "config": as_plain(config), "classes": NAMES}
    checkpoint.save(contents, tmp_path / "run" / "best.pth")
    return tmp_path / "run"


def test_a_folder_and_a_list_of_unseen_cases(labelled, weights, tmp_path):
    options = {"device": "cpu", "store_dir": str(tmp_path / "store"), "prepare_workers": 1}
    by_folder = evaluate_segmentation(weights, labelled, tmp_path / "folder", **options)
    assert by_folder["protocol"]["num_cases"] == 3
    listed = build.build_datalist(labelled, labels=True)
    parts = cases.Datalist(listed.training[:2], listed.training[2:], listed.labels)
    datalist_json.write_datalist(parts, tmp_path / "list.json")
    by_list = evaluate_segmentation(
        weights / "best.pth", tmp_path / "list.json", tmp_path / "list", part="all", **options
    )
    assert by_list["organs"] == by_folder["organs"]
    for part, text in (("validation", "validation"), ("", "validation"), ("training", "training")):
        found = evaluate_segmentation(weights, tmp_path / "list.json", tmp_path / "one", part=part, **options)[
            "protocol"
        ]
        assert found["num_cases"] == (1 if text == "validation" else 2)
        assert found["data"] == f"{text} cases of {tmp_path / 'list.json'}"
    datalist_json.write_datalist(cases.Datalist(listed.training, (), listed.labels), tmp_path / "all.json")
    assert find_labelled(tmp_path / "all.json").text == f"all cases of {tmp_path / 'all.json'}"
    assert list((tmp_path / "one").glob("best_*.png"))


def test_data_that_do_not_fit_the_network(labelled, weights, tmp_path):
    with pytest.raises(ValueError, match="--part validation: expected a decathlon JSON, got the folder"):
        find_labelled(labelled, "validation")
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such file; expected a decathlon JSON"):
        find_labelled(tmp_path / "gone.json", "validation")
    content = {"labels": {"background": 0, "aorta": 1, "liver": 2}}
    (labelled / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the value 1 is 'aorta' there, but 'liver' for the network"):
        evaluate_segmentation(weights, labelled, tmp_path / "out", device="cpu")
    (labelled / "dataset.json").unlink()
    write_case(labelled, "more")
    path = labelled / "labelsTr" / "more.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full((24, 22, 20), 3, np.uint8), np.diag([2, 2, 3, 1])), path)
    options = {"device": "cpu", "store_dir": str(tmp_path / "s"), "prepare_workers": 1}
    (reason,) = evaluate_segmentation(weights, labelled, tmp_path / "out", **options)["failed"].values()
    assert "more_0000.nii.gz: its label holds the value 3, but the classes go from 0 to 2" in reason
    for case in ("good", "shifted", "missed"):
        (labelled / "imagesTr" / f"{case}_0000.nii.gz").unlink()
        (labelled / "labelsTr" / f"{case}.nii.gz").unlink()
    with pytest.raises(ValueError, match="1 of 1 volumes are unusable"):
        evaluate_segmentation(weights, labelled, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


# One case never ends the scoring of many


class Failing(Levels):
    """Raises an error in the second case."""

    calls = 0

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        Failing.calls += 1
        if Failing.calls == 2:
            raise self.error
        return super().forward(x)


@pytest.fixture
def failing(monkeypatch):
    """Scores with a network that fails in the second of three cases; each case is one pass."""
    config = replace(BOXES, crop_size=(32,))
    monkeypatch.setattr(Failing, "calls", 0)

    def network(error):
        loaded = TrainedNetwork(Failing(error), config, NAMES, [])
        monkeypatch.setattr(evaluate.inference, "load_network", lambda path: loaded)
        monkeypatch.setattr(api, "kind_of_network", lambda path: "segmentation")

    return network


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("Unable to allocate 9 GiB"), "out of memory (Unable to allocate 9 GiB)"),
        (ValueError("a fault\nin two lines"), "a fault"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_a_case_that_fails_is_named_and_the_others_are_scored(failing, labelled, tmp_path, capsys, error, reason):
    failing(error)
    words = [str(labelled), "--out", str(tmp_path / "scores"), "--store_dir", str(tmp_path / "s"), "--device=cpu"]
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", "any", *words, "--prepare_workers=1"])
    assert exit_.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not scored" in line]
    assert line.startswith(f"not scored: missed: {reason}")
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert list(summary["failed"]) == ["missed"]
    assert summary["protocol"]["num_cases"] == 2
    assert summary["organs"]["liver"]["num_cases"] == 2
    assert "- not scored: missed: " in (tmp_path / "scores" / "table.md").read_text()
    whole = scored(labelled, tmp_path / "whole", replace(BOXES, crop_size=(32,)))
    assert "failed" not in whole
    lines = (tmp_path / "whole" / "cases.csv").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("missed")]
    assert (tmp_path / "scores" / "cases.csv").read_text().splitlines() == kept


def test_an_unreadable_case_is_named_and_the_others_are_scored(weights, labelled, tmp_path):
    (labelled / "imagesTr" / "good_0000.nii.gz").write_bytes(b"no volume")
    options = {"device": "cpu", "store_dir": str(tmp_path / "s"), "prepare_workers": 1}
    found = api.evaluate(weights, labelled, tmp_path / "out", **options)
    assert list(found.failures) == ["good"]
    assert "good_0000.nii.gz: " in found.failures["good"]
    assert {row["case"] for row in found.table} == {"missed", "shifted"}


def test_without_any_scored_case_nothing_passes_for_scores(failing, labelled, tmp_path):
    failing(MemoryError())
    for name in ("good", "shifted"):
        (labelled / "imagesTr" / f"{name}_0000.nii.gz").unlink()
        (labelled / "labelsTr" / f"{name}.nii.gz").unlink()
    Failing.calls = 1
    with pytest.raises(ValueError, match=r"no case was scored:\n  missed: out of memory"):
        evaluate_segmentation(tmp_path, labelled, tmp_path / "out", device="cpu", store_dir=str(tmp_path / "s"))


def test_scores_without_a_case_are_measured_again(failing, labelled, tmp_path):
    cases, _, text = find_labelled(labelled)
    config = replace(BOXES, crop_size=(32,))
    source = Source("levels", text, [])
    store = tmp_path / "store"
    prepare_missing(cases, config, store, 1, progress=False)
    given = (
        config,
        NAMES,
        stored_volumes(cases, config, store),
        cases,
        tmp_path / "out",
        find_processes("cpu"),
        source,
    )
    score_cases(Failing(MemoryError()), *given)
    assert not are_cases_scored(tmp_path / "out", config, NAMES, cases, find_processes("cpu"), source)
    score_cases(Levels(), *given)
    assert are_cases_scored(tmp_path / "out", config, NAMES, cases, find_processes("cpu"), source)


def test_a_picture_that_fails_costs_no_scores(labelled, tmp_path, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no font")

    monkeypatch.setattr(evaluate, "segmentation_panel", fails)
    assert scored(labelled, tmp_path / "scores")["protocol"]["num_cases"] == 3
    assert "best_good.png: no picture (no font)" in caplog.text


def test_only_pictured_label_maps_leave_their_process(labelled, tmp_path, monkeypatch):
    write_case(labelled, "fourth")
    sent = []

    def gathered(values, processes):
        sent.append(values)
        return values

    monkeypatch.setattr(evaluate, "gather_lists", gathered)
    scored(labelled, tmp_path / "scores")
    assert [len(values) for values in sent] == [3]


def test_class_names_are_compared_by_what_they_say():
    check_classes(["background", "Left Kidney", "class_2"], {"background": 0, "left_kidney": 1, "liver": 2}, Path("x"))
    with pytest.raises(ValueError, match="the value 3 is 'spleen' there, but 'none'"):
        check_classes(["background", "liver", "aorta"], {"spleen": 3}, Path("x"))


def test_the_fold_of_the_network_is_that_of_a_list_with_folds_alone(labelled, tmp_path):
    images = sorted((labelled / "imagesTr").iterdir())
    labels = sorted((labelled / "labelsTr").iterdir())
    entries = [{"image": str(i), "label": str(t)} for i, t in zip(images, labels, strict=True)]
    lists = {
        "plain": {"training": entries},
        "parts": {"training": entries[:2], "validation": entries[2:]},
        "folds": {"training": [{**entry, "fold": n} for n, entry in enumerate(entries)]},
    }
    for name, content in lists.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = {name: find_labelled(tmp_path / f"{name}.json", fold=1).cases for name in lists}
    assert {name: len(cases) for name, cases in found.items()} == {"plain": 3, "parts": 1, "folds": 1}
    assert found["folds"][0].image == images[1]
    with pytest.raises(ValueError, match="validated on fold 7, but the folds of this list are 0, 1, 2; use --part all"):
        find_labelled(tmp_path / "folds.json", fold=7)
    assert len(find_labelled(tmp_path / "folds.json", "all").cases) == 3
