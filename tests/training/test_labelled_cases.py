from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets import build, cases, datalist_json
from hyspark.data.datasets.cases import Case
from hyspark.training.labelled_cases import (
    class_names,
    draw_labelled_subset,
    find_labelled_cases,
    left_right_pairs,
    unpaired_sides,
)

ORGANS = ["liver", "spleen", "right_kidney", "left_kidney", "aorta", "spine", "right_lung", "left_lung"]
CASES = [Case(f"case_{i:02d}", "D", Path(f"case_{i:02d}.nii.gz")) for i in range(30)]


def test_a_decathlon_list_and_the_folders_give_the_same_cases(finetuning, tmp_path):
    folder = finetuning.data
    listed = build.build_datalist(
        folder, labels=True, splits="auto", val_fraction=finetuning.val_fraction, seed=finetuning.seed
    )
    path = tmp_path / "list.json"
    datalist_json.write_datalist(listed, path)
    by_list = find_labelled_cases(replace(finetuning, json_list=str(path)))
    by_folder = find_labelled_cases(finetuning)
    names = [[c.name for part in found[:2] for c in part] for found in (by_list, by_folder)]
    assert names[0] == names[1]
    assert by_list[2] == by_folder[2] == ["background", *ORGANS]


def test_all_seeds_are_validated_on_the_same_cases(finetuning, tmp_path):
    """Or a comparison over seeds would mix cases; the list of a data set without splits included."""
    listed = build.build_datalist(finetuning.data, labels=True)
    datalist_json.write_datalist(
        cases.Datalist(listed.training + listed.validation, (), listed.labels), tmp_path / "list.json"
    )
    for config in (finetuning, replace(finetuning, json_list=str(tmp_path / "list.json"))):
        parts = [find_labelled_cases(replace(config, seed=seed))[1] for seed in range(8)]
        assert all([c.name for c in part] == [c.name for c in parts[0]] for part in parts)


def test_class_names_and_counts(finetuning):
    assert class_names(finetuning, {"background": 0, "a": 1, "b": 3}) == ["background", "a", "class_2", "b"]
    assert len(class_names(finetuning, None)) == 14
    assert len(class_names(replace(finetuning, out_channels=3), None)) == 3
    with pytest.raises(ValueError, match="labels go from 0 to 1"):
        class_names(replace(finetuning, out_channels=14), {"background": 0, "a": 1})


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_fewer_labelled_cases_are_among_more(seed):
    chosen = [draw_labelled_subset(CASES, SegmentationConfig(num_labelled=n, seed=seed)) for n in range(1, 31)]
    assert [len(c) for c in chosen] == list(range(1, 31))
    assert all(set(few) < set(more) for few, more in pairwise(chosen))
    assert all([c.name for c in few] == sorted(c.name for c in few) for few in chosen)


def test_the_choice_depends_on_the_seed_and_not_on_the_order():
    config = SegmentationConfig(num_labelled=5)
    first = {c.name for c in draw_labelled_subset(CASES, config)}
    assert first == {c.name for c in draw_labelled_subset(CASES[::-1], config)}
    assert first != {c.name for c in draw_labelled_subset(CASES, replace(config, seed=1))}


def test_a_share_of_the_cases():
    assert len(draw_labelled_subset(CASES, SegmentationConfig(label_fraction=0.1))) == 3
    assert len(draw_labelled_subset(CASES, SegmentationConfig(label_fraction=0.001))) == 1
    assert draw_labelled_subset(CASES, SegmentationConfig()) == CASES
    a, b = (
        draw_labelled_subset(CASES, c)
        for c in (SegmentationConfig(label_fraction=0.1), SegmentationConfig(num_labelled=3))
    )
    assert a == b
    with pytest.raises(ValueError, match=r"num_labelled: expected at most the 30 labelled training cases, got 31"):
        draw_labelled_subset(CASES, SegmentationConfig(num_labelled=31))


def test_pairs_of_left_and_right_classes():
    names = ["background", "liver", "left kidney", "right kidney"]
    assert left_right_pairs(SegmentationConfig(left_right=("right kidney = left kidney",)), names) == ((3, 2),)
    assert left_right_pairs(SegmentationConfig(left_right=("2=3",)), names) == ((2, 3),)
    assert left_right_pairs(SegmentationConfig(), names) == ()
    with pytest.raises(ValueError, match=r"'left kidny', which is no class; did you mean left kidney"):
        left_right_pairs(SegmentationConfig(left_right=("left kidny=right kidney",)), names)
    with pytest.raises(ValueError, match="twice, or the background"):
        left_right_pairs(SegmentationConfig(left_right=("2=3", "1=2")), names)
    with pytest.raises(ValueError, match="twice, or the background"):
        left_right_pairs(SegmentationConfig(left_right=("0=3",)), names)
    assert unpaired_sides(names) == ["left kidney", "right kidney"]
    assert unpaired_sides([*names, "left lung", "right lung"], [(3, 2)]) == ["left lung", "right lung"]


def test_a_data_list_that_is_missing_is_named_with_the_command_that_writes_it(tmp_path):
    config = SegmentationConfig(data=str(tmp_path), json_list="labelled.json")
    with pytest.raises(FileNotFoundError, match=r"json_list: .*/labelled.json, and no labelled.json; .* --labels"):
        find_labelled_cases(config)
