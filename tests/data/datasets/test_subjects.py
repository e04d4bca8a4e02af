"""Subjects of many cases, patterns of subjects, and splits that are reported."""

import logging
from pathlib import Path

import pytest

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.file_names import case_names
from hyspark.data.datasets.splits import split_by_subject
from hyspark.data.datasets.subjects import check_pattern, split_faults, subject_of, subjects_of, warn_of_split


def cases_of(names):
    return [Case(name, "Dataset001_A", Path(f"/x/{name}_0000.nii.gz")) for name in names]


@pytest.mark.parametrize(
    "form", ["ct_scan_{:04d}", "prostate_t2_{:03d}", "BraTS_t1_{:04d}", "case__{:04d}", "CT-{:03d}"]
)
def test_numbered_cases_are_subjects_of_their_own(form):
    cases = cases_of([form.format(i) for i in range(100)])
    training, validation = split_by_subject(cases, seed=0, val_fraction=0.2)
    assert (len(training), len(validation)) == (80, 20)
    assert split_faults(training, validation) == []


def test_a_pattern_names_the_subject():
    cases = cases_of([f"site{s}_{p:02d}_{v}" for s in (1, 2) for p in range(5) for v in range(2)])
    pattern = r"site\d_(\d\d)"
    training, validation = split_by_subject(cases, seed=0, val_fraction=0.4, subject_regex=pattern)
    sides = [{subject_of(case.name, pattern) for case in side} for side in (training, validation)]
    assert sides[0] | sides[1] == {f"{p:02d}" for p in range(5)}
    assert not sides[0] & sides[1]
    assert subject_of("site1_03_1", r"site\d_\d\d") == "site1_03"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "expected a regular expression, got '\\('"), (r"p\d", r"matches no part of 1 of 2 case names, such as 'x'")],
)
def test_a_pattern_that_does_not_serve_is_refused(pattern, message):
    with pytest.raises(ValueError, match=f"^subject_regex: .*{message}"):
        check_pattern(pattern, ["p1", "x"])


def test_doubtful_splits_are_reported(caplog):
    visits = cases_of([f"p1_visit{i}" for i in range(6)])
    others = cases_of([f"q{i}" for i in range(9)])
    with caplog.at_level(logging.WARNING):
        warn_of_split(visits, others)
    assert "6 of 15 cases count as one subject, 'p1'" in caplog.text
    assert "subject_regex" in caplog.text
    assert split_faults(others, []) == ["all 9 cases are for training, none for validation"]
    assert split_faults(others[:8], others[8:]) == []
    assert split_faults([], []) == []


def subjects_of_paths(*paths):
    images = [Path("/data") / path for path in paths]
    return subjects_of(list(case_names(images).values()), images)


@pytest.mark.parametrize(
    ("paths", "groups"),
    [
        # One folder per patient, with one scan, several, or visits
        (["case_0/imaging.nii.gz", "case_1/imaging.nii.gz", "case_2/imaging.nii.gz"], [0, 1, 2]),
        (["p1/ct_1.nii.gz", "p1/ct_2.nii.gz", "p2/ct_1.nii.gz", "p2/ct_2.nii.gz", "p3/ct_1.nii.gz"], [0, 0, 1, 1, 2]),
        (["p1/visit1/ct.nii.gz", "p1/visit2/ct.nii.gz", "p2/visit1/ct.nii.gz"], [0, 0, 1]),
        (["p1/20200131/ct.nii.gz", "p1/2021-01-31/ct.nii.gz", "p2/20200131/ct.nii.gz"], [0, 0, 1]),
        (["site1/p1/images/ct.nii", "site1/p2/images/ct.nii", "site2/p1/images/ct.nii"], [0, 1, 2]),
        # Folders that are no patients: of sites, of data sets
        ([f"site{s}/c{i}.nii.gz" for s in (1, 2) for i in range(3)], [0, 1, 2, 3, 4, 5]),
        ([f"Dataset00{s}/imagesTr/c{i}_0000.nii.gz" for s in (1, 2) for i in range(2)], [0, 1, 2, 3]),
        # BIDS, by names and by folders
        (["sub-01_ct.nii.gz", "sub-01_acq-late_ct.nii.gz", "sub-02_ct.nii.gz"], [0, 0, 1]),
        (["sub-01/ses-1/anat/a.nii.gz", "sub-01/ses-2/anat/b.nii.gz", "sub-02/ses-1/anat/c.nii.gz"], [0, 0, 1]),
        # Names alone
        (["p1_visit1.nii.gz", "p1_visit2.nii.gz", "p2_scan1.nii.gz", "p2_t2.nii.gz", "p3__1.nii.gz"], [0, 0, 1, 1, 2]),
        (["ct.nii.gz"], [0]),
    ],
)
def test_subjects_by_folders_and_names(paths, groups):
    found = subjects_of_paths(*paths)
    assert [found.index(subject) for subject in found] == [groups.index(group) for group in groups]


def test_subjects_of_earlier_versions_keep_their_names_and_so_their_rank():
    names = ["sub-01_ct", "sub-02_ct", "p3_visit1", "p3_visit2", "case_0-imaging"]
    images = [Path(f"/data/{name}.nii.gz") for name in names]
    assert subjects_of(names, images) == ["sub-01_ct", "sub-02_ct", "p3", "p3", "case_0-imaging"]


def test_a_subject_on_both_sides_of_a_split_is_reported():
    training = cases_of([f"p{i}_visit1" for i in range(12)])
    (fault,) = split_faults(training, cases_of(["p3_visit2"]))
    assert fault == "subjects in training and in validation: p3"
