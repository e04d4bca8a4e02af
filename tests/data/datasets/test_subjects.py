"""Subjects of many cases, patterns of subjects, and splits that are reported."""

import logging
from pathlib import Path

import pytest

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.splits import split_by_subject
from hyspark.data.datasets.subjects import check_pattern, split_faults, subject_of, warn_of_split


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
