"""Layouts and files that other programs write: lists of nnU-Net v1, splits_final.json, byte order marks."""

import json
import pickle
import shlex
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hyspark.cli.main import main
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.build import build_datalist, read_folder
from hyspark.data.datasets.data_folder import find_cases
from hyspark.data.datasets.datalist_json import is_datalist, read_datalist
from hyspark.data.datasets.splits import CONVERT_SPLITS
from hyspark.data.quality.check import find_dataset
from hyspark.data.quality.examine import examine
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.labelled_data import find_labelled
from hyspark.training.labelled_cases import find_run_cases
from hyspark.utils.paths import load_json


def write_cases(folder, names, image="{}_0000.nii.gz"):
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in names:
        for path in (folder / "imagesTr" / image.format(name), folder / "labelsTr" / f"{name}.nii.gz"):
            nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)


def test_a_list_of_nnunet_v1_names_images_without_their_channel(tmp_path):
    write_cases(tmp_path, "ab")
    entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "ab"]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"numTraining": 2, "modality": {"0": "CT"}, "training": entries, "test": []}))
    images = [tmp_path / "imagesTr" / f"{name}_0000.nii.gz" for name in "ab"]
    assert [case.image for case in read_datalist(path, require_labels=True).training] == images
    assert [case.image for case in find_dataset(path).cases] == images


def test_the_first_fold_of_splits_final_is_used(tmp_path):
    write_cases(tmp_path, "abcd")
    folds = [{"train": ["b", "c", "d"], "val": ["a"]}, {"train": ["a", "c", "d"], "val": ["b"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    found = read_folder(tmp_path, seed=0, val_fraction=0.5)
    assert [case.name for case in found.validation] == ["a"]
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a"], "validation": ["d"]}))
    assert [case.name for case in read_folder(tmp_path, seed=0, val_fraction=0.5).validation] == ["d"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_json_with_a_byte_order_mark_is_read(tmp_path, encoding):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "list.json").write_bytes((mark + '{"name": "Mül"}').encode(encoding))
    assert load_json(tmp_path / "list.json") == {"name": "Mül"}


def test_endings_in_capitals_are_nifti(tmp_path):
    for name in ("A.NII.GZ", "b.Nii", "c.nii.gz", "d.nrrd"):
        (tmp_path / name).touch()
    assert [case.name for case in find_cases(tmp_path).cases] == ["A", "b", "c"]


def test_a_fold_is_chosen_of_splits_final_and_of_a_list(tmp_path):
    write_cases(tmp_path, "abcd")
    folds = [{"train": ["b", "c", "d"], "val": ["a"]}, {"train": ["a", "c", "d"], "val": ["b"]}]
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps(folds))
    assert [case.name for case in find_run_cases(SegmentationConfig(data=str(tmp_path), fold=1)).validation] == ["b"]
    assert [case.name for case in build_datalist(tmp_path, splits=str(splits), fold=1).validation] == ["b"]
    with pytest.raises(ValueError, match=r"fold: expected a fold of .*splits_final.json, got 2; it has folds 0 to 1"):
        find_run_cases(SegmentationConfig(data=str(tmp_path), fold=2))
    pairs = [{"image": f"imagesTr/{n}_0000.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "abcd"]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [pair | {"fold": i % 2} for i, pair in enumerate(pairs)]}))
    config = SegmentationConfig(data=str(tmp_path), json_list="list.json")
    for fold, expected in enumerate((["a", "c"], ["b", "d"])):
        run = find_run_cases(replace(config, fold=fold))
        assert [case.name for case in run.validation] == expected
        assert [case.name for case in find_labelled(path, "", fold).cases] == expected
    with pytest.raises(ValueError, match=r"list.json: fold: expected a fold of this list, got 2; its folds are 0, 1"):
        find_run_cases(replace(config, fold=2))
    (tmp_path / "dataset.json").write_text(json.dumps({"training": pairs}))  # the splits file beside it counts
    assert [case.name for case in find_run_cases(SegmentationConfig(data=str(tmp_path), fold=1)).validation] == ["b"]


@pytest.mark.parametrize("value", ["fold0", 1.5, True])
def test_folds_that_are_no_numbers_are_refused(tmp_path, value):
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": "a.nii.gz", "fold": value}]}))
    with pytest.raises(ValueError, match=r'list\.json: "fold": expected whole numbers, got'):
        read_datalist(path, require_files=False)


def test_a_fold_without_folds_is_refused(tmp_path):
    write_cases(tmp_path, "abcd")
    with pytest.raises(ValueError, match=r"fold: expected a fold of .*, got 3; it has no folds; drop --fold"):
        find_run_cases(SegmentationConfig(data=str(tmp_path), fold=3))
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": ["imagesTr/a_0000.nii.gz"], "validation": ["imagesTr/b_0000.nii.gz"]}))
    with pytest.raises(ValueError, match='fold: expected 0, got 3, but the list has a part "validation"'):
        read_datalist(path, fold=3)


def test_names_and_splits_that_fail_a_run_are_found_by_check(tmp_path):
    write_cases(tmp_path, "ab")
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["ghost"]}]))
    errors = [f for f in find_dataset(tmp_path).findings if f.severity == "error"]
    assert [Path(f.file).name for f in errors] == ["splits_final.json"]
    with pytest.raises(ValueError, match="no image has these names: ghost"):
        find_run_cases(SegmentationConfig(data=str(tmp_path)))


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_missing_files_are_found_by_a_dry_run(tmp_path, verb, capsys):
    write_cases(tmp_path, "abc")
    pairs = [{"image": f"imagesTr/{n}_0000.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "abc"]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": pairs, "labels": {"background": 0, "x": 1}}))
    (tmp_path / "imagesTr/a_0000.nii.gz").unlink()
    (tmp_path / "labelsTr/b.nii.gz").unlink()
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--dry_run", "--device", "cpu"])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path}/imagesTr/a_0000.nii.gz: missing" in printed
    assert f"{tmp_path}/labelsTr/b.nii.gz: missing" in printed
    missing = [f.file for case in find_dataset(tmp_path).cases for f in examine(case, PrepareSettings(), None).findings]
    assert {f"{tmp_path}/imagesTr/a_0000.nii.gz", f"{tmp_path}/labelsTr/b.nii.gz"} <= set(missing)


def entry(name, **keys):
    return {"image": f"imagesTr/{name}_0000.nii.gz", "label": f"labelsTr/{name}.nii.gz", **keys}


@pytest.mark.parametrize(
    "content",
    [
        *({"training": [entry(n) for n in "abc"], key: [entry("d")]} for key in ("val", "valid", "validating")),
        {"train": [entry(n) for n in "abc"], "val": [entry("d")]},
        *(
            {"training": [entry(n, **{key: "train"}) for n in "abc"] + [entry("d", **{key: value})]}
            for key, value in (("split", "val"), ("set", "Validation"), ("subset", "valid"), ("fold", "val"))
        ),
        {"training": [entry(n) for n in "abc"] + [entry("d", split="val")]},
        {"training": [entry(n, set=7, split="x", fold=int(n != "d")) for n in "abcd"]},
    ],
)
def test_the_validation_part_of_a_list_is_used_whatever_names_it(tmp_path, content):
    write_cases(tmp_path, "abcd")
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    assert is_datalist(path)
    for config in (SegmentationConfig(data=str(tmp_path)), SegmentationConfig(data=str(path))):
        run = find_run_cases(config)
        assert [[case.name for case in side] for side in run[:2]] == [["a", "b", "c"], ["d"]]
    assert [case.name for case in find_labelled(path).cases] == ["d"]
    assert [f for f in find_dataset(path).findings if f.severity == "error"] == []


def test_entries_of_other_parts_are_named(tmp_path):
    write_cases(tmp_path, "abcdef")
    content = {
        "training": [entry("a"), entry("b"), {"image": "imagesTr/e_0000.nii.gz", "split": "test"}],
        "validation": [entry("c")],
        "holdout": [entry("d")],
        "test": ["./imagesTs/x.nii.gz"],
        "unlabelled": [{"image": ["f_0000.nii.gz", "f_0001.nii.gz"]}],
        "modality": ["CT"],
        "tags": {"image": 1},
    }
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    listed = read_datalist(path, require_labels=True)
    assert [len(side) for side in (listed.training, listed.validation)] == [2, 1]
    text = "\n".join(listed.unused)
    for line in (
        f'1 file not used, listed as "holdout": {tmp_path}/imagesTr/d_0000',
        f'2 files not used, listed as "test": {tmp_path}/imagesTr/e_0000.nii.gz, {tmp_path}/imagesTs/x.nii.gz',
        f'2 files not used, listed as "unlabelled": {tmp_path}/f_0000',
    ):
        assert line in text
    assert len(listed.unused) == 3


@pytest.mark.parametrize("as_list", [False, True])
def test_cases_in_no_part_of_a_splits_file_are_named(tmp_path, as_list):
    write_cases(tmp_path, "abcdef")
    folds = [{"train": ["a"], "val": ["b"]}, {"train": ["c", "a"], "val": ["b"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    if as_list:
        (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry(n) for n in "abcdef"]}))
    run = find_run_cases(SegmentationConfig(data=str(tmp_path)))
    assert [len(side) for side in run[:2]] == [1, 1]
    (note,) = run.notes
    assert "4 files not used, in no part of fold 0 of splits_final.json: " in note
    assert "imagesTr/c_0000.nii.gz" in note
    run = find_run_cases(SegmentationConfig(data=str(tmp_path), fold=1))
    assert any("3 files not used, in no part of fold 1 of splits_final.json" in note for note in run.notes)
    sides = {"training": ["a", "c"], "valid": ["b"], "test": ["d"], "unlabelled": ["e"]}
    (tmp_path / "splits.json").write_text(json.dumps(sides))
    notes = "\n".join(find_run_cases(SegmentationConfig(data=str(tmp_path))).notes)
    for text in (
        'listed as "test" in splits.json',
        'listed as "unlabelled" in splits.json',
        "in no part of splits.json",
    ):
        assert f"1 file not used, {text}" in notes
    if not as_list:
        assert any("in no part of" in line for line in build_datalist(tmp_path, splits="auto").unused)
        assert any(
            "in no part of" in line for line in build_datalist(tmp_path, splits=str(tmp_path / "splits.json")).unused
        )


@pytest.mark.parametrize("as_list", [False, True])
def test_a_pickled_splits_file_is_named_and_converted_by_the_command(tmp_path, as_list):
    write_cases(tmp_path, "abcd")
    folds = [OrderedDict(train=np.array(["a", "b", "c"]), val=np.array(["d"]))]
    (tmp_path / "splits_final.pkl").write_bytes(pickle.dumps(folds))
    if as_list:
        (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry(n) for n in "abcd"]}))
    config = SegmentationConfig(data=str(tmp_path))
    (note,) = [note for note in find_run_cases(config).notes if "pickle" in note]
    assert note.startswith(f"{tmp_path}/splits_final.pkl: a pickle, which is not read; validation cases are drawn anew")
    assert note.endswith(CONVERT_SPLITS)
    (finding,) = [finding for finding in find_dataset(tmp_path).findings if finding.kind == "pickled splits"]
    assert CONVERT_SPLITS in finding.found
    if not as_list:
        with pytest.raises(ValueError, match=r"it has no folds; drop --fold\n.*a pickle, which is not read"):
            find_run_cases(replace(config, fold=1))
    subprocess.run([sys.executable, *shlex.split(CONVERT_SPLITS)[1:]], cwd=tmp_path, check=True)
    run = find_run_cases(config)
    assert [case.name for case in run.validation] == ["d"]
    assert not any("pickle" in note for note in run.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r'expected \{"labels": .*, got a list'),
        ("{", "not valid JSON"),
        ('{"labels": {"a": 0}, "labels": {"b": 0}}', 'the key "labels" is set twice'),
    ],
)
def test_a_dataset_json_that_is_none_is_named_once(tmp_path, text, message):
    write_cases(tmp_path, "ab")
    path = tmp_path / "dataset.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        find_run_cases(SegmentationConfig(data=str(tmp_path)))
    assert str(raised.value).startswith(str(path))
    (finding,) = [finding for finding in find_dataset(tmp_path).findings if finding.severity != "note"]
    assert finding.file == str(path)
    assert str(path) not in finding.found
    assert not any(finding.kind == "no class names" for finding in find_dataset(tmp_path).findings)


def test_a_key_with_one_value_may_come_twice(tmp_path):
    (tmp_path / "x.json").write_text('{"name": "a", "name": "a"}')
    assert load_json(tmp_path / "x.json") == {"name": "a"}
