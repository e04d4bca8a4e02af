"""Splitting cases by subject and by file; the files of the cases need not exist."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.splits import split_by_file, split_by_subject
from hyspark.data.datasets.subjects import subject_of

NAMES = st.text(string.ascii_letters + string.digits + "_-. éß", min_size=1, max_size=12).filter(
    lambda name: not name.startswith(".") and ".nii" not in name
)
# Few subjects, many visits: what a split could tear.
CASE_NAMES = st.lists(
    st.builds(
        lambda subject, ending: f"p{subject}{ending}",
        st.integers(0, 12),
        st.sampled_from(["", "__a", "_visit1", "_Visit2", "_ses-02_ct", "_t0", "_scan3_series1"]),
    ),
    unique=True,
    min_size=1,
)
fast = settings(deadline=None, max_examples=40)


def cases_of(names, dataset="Dataset001_A", root="/x", labelled=False):
    folder = Path(root) / dataset
    return [
        Case(n, dataset, folder / f"imagesTr/{n}_0000.nii.gz", folder / f"{n}.nii.gz" if labelled else None)
        for n in names
    ]


def names(cases):
    return [case.name for case in cases]


def write_json(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("okbp_001", "okbp_001"),
        ("sub-01_ses-02_ct", "sub-01"),
        ("P7__ct_2", "P7"),
        ("P7_Visit2", "P7"),
        ("p7_SESSION_1_scan2", "p7"),
        ("p7_scan2", "p7"),
        ("p7_series-3", "p7"),
        ("p7_t12", "p7"),
        ("p7_thorax", "p7_thorax"),
        ("__only", "__only"),
        ("ct_scan_0017", "ct_scan_0017"),
        ("prostate_t2_001", "prostate_t2_001"),
        ("BraTS_t1_0001", "BraTS_t1_0001"),
        ("BraTS2021_t1_0001", "BraTS2021_t1_0001"),
        ("case__0017", "case__0017"),
        ("anna_visit2", "anna"),
        ("anna__2", "anna"),
        ("p01_ses-20200131", "p01"),
        ("p01-visit1-ct", "p01"),
        ("p01_t1", "p01"),
        ("study1_sub-03_ses-1_T1w", "study1_sub-03"),
        ("", ""),
    ],
)
def test_subject_of(name, subject):
    assert subject_of(name) == subject


@fast
@given(CASE_NAMES, st.integers(0, 99), st.floats(0, 0.99), st.randoms())
def test_split_by_subject_is_a_stable_partition_that_tears_no_subject(found, seed, val_fraction, rng):
    cases = cases_of(found)
    training, validation = split_by_subject(cases, seed=seed, val_fraction=val_fraction)
    assert sorted(names(training) + names(validation)) == sorted(found)
    sides = [{subject_of(case.name) for case in side} for side in (training, validation)]
    assert not sides[0] & sides[1]
    assert sides[0]
    assert bool(sides[1]) == (val_fraction > 0 and len(sides[0] | sides[1]) > 1)

    shuffled = cases_of(found, root="/elsewhere/deep", labelled=True)
    rng.shuffle(shuffled)
    again = split_by_subject(shuffled, seed=seed, val_fraction=val_fraction)
    assert [set(names(side)) for side in again] == [set(names(training)), set(names(validation))]


def test_split_by_subject_takes_the_fraction_and_depends_on_the_seed():
    cases = cases_of([f"case{i:03}" for i in range(50)])
    sides = [split_by_subject(cases, seed=seed, val_fraction=0.2) for seed in (0, 1)]
    assert [len(validation) for _, validation in sides] == [10, 10]
    assert sides[0] != sides[1]
    # Frozen: a list made today must come out the same with any later version.
    assert names(split_by_subject(cases[:5], seed=0, val_fraction=0.4)[1]) == ["case001", "case003"]
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="val_fraction"):
            split_by_subject(cases, seed=0, val_fraction=wrong)


def test_split_by_file_takes_the_first_fold_of_nnunet(tmp_path):
    folds = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    path = write_json(tmp_path / "splits_final.json", folds)
    training, validation = split_by_file(cases_of("ab"), path, labels=False)
    assert (names(training), names(validation)) == (["a"], ["b"])


def test_split_by_file_with_labels_leaves_out_those_that_are_named_unlabelled(tmp_path):
    path = write_json(tmp_path / "s.json", {"train": ["a"], "val": ["c"], "unlabelled": ["u", "v"]})
    training, validation = split_by_file(cases_of("acu", labelled=True) + cases_of("v"), path, labels=True)
    assert (names(training), names(validation)) == (["a"], ["c"])


@pytest.mark.parametrize("bare", ["a", "c"])
def test_split_by_file_with_labels_misses_the_label_of_a_named_case(tmp_path, bare):
    path = write_json(tmp_path / "s.json", {"train": ["a", "b"], "val": ["c", "d"]})
    cases = cases_of(sorted(set("abcd") - {bare}), labelled=True) + cases_of(bare)
    with pytest.raises(ValueError, match=rf"s\.json: .*without a label file: {bare}; add the labels"):
        split_by_file(cases, path, labels=True)
    assert len(split_by_file(cases, path, labels=False)[0]) == 2


@fast
@given(st.dictionaries(NAMES, st.sampled_from(["train", "validation", "unlabelled", None]), min_size=1))
def test_split_by_file_puts_every_named_case_where_it_says(tmp_path_factory, sides):
    content = {key: [n for n in sides if sides[n] == key] for key in ("train", "validation", "unlabelled")}
    path = write_json(tmp_path_factory.mktemp("split") / "splits.json", content)
    training, validation = split_by_file(cases_of(sides), path, labels=False)
    assert names(training) == [n for n in sides if sides[n] in ("train", "unlabelled")]
    assert names(validation) == content["validation"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["a", "b"], "val": ["b"]}, "in training and in validation: b"),
        ({"train": ["a"], "val": ["b"], "unlabelled": ["b"]}, "in training and in validation: b"),
        ({"train": ["a"], "val": ["ghost"]}, "no image.*ghost"),
        ({"train": ["a"]}, "expected.*got.*train"),
        ({"train": ["a"], "val": [], "validation": []}, "expected"),
        ({"train": ["a"], "val": ["b"], "unlabeled": ["c"]}, "expected.*unlabeled"),
        ({"train": "a", "val": []}, '"train": expected a list of case names'),
        ([], "expected.*list"),
        ("{", "not valid JSON"),
    ],
)
def test_split_by_file_refuses(tmp_path, content, message):
    path = write_json(tmp_path / "mine.json", content)
    with pytest.raises(ValueError, match=rf"mine\.json.*{message}"):
        split_by_file(cases_of("abc"), path, labels=False)


def test_split_by_file_refuses_a_name_of_two_data_sets_and_an_absent_file(tmp_path):
    path = write_json(tmp_path / "s.json", {"train": ["a"], "val": []})
    with pytest.raises(ValueError, match="more than one data set: a"):
        split_by_file(cases_of("a") + cases_of("a", "Dataset002_B"), path, labels=False)
    with pytest.raises(FileNotFoundError, match="absent"):
        split_by_file(cases_of("a"), tmp_path / "absent", labels=False)
