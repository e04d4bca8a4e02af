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
        # Folders whose names begin those of their files and folders: ACDC, CT-RATE, BraTS, SegTHOR
        (
            [f"training/patient{i:03d}/patient{i:03d}_{x}.nii.gz" for i in (1, 2) for x in ("4d", "frame01")],
            [0, 0, 2, 2],
        ),
        ([f"train/train_{i}/train_{i}_{s}/train_{i}_{s}_1.nii.gz" for i in (1, 2) for s in "ab"], [0, 0, 2, 2]),
        ([f"B_{i:03d}/B_{i:03d}_{x}.nii.gz" for i in (1, 2, 3) for x in ("t1ce", "flair")], [0, 0, 2, 2, 4, 4]),
        ([f"p{i}/p{i}_{s}/ct.nii.gz" for i in (1, 2) for s in "ab"], [0, 0, 2, 2]),
        ([f"{i}/{i}_{1000 + 2 * i + k}.nii.gz" for i in (1, 2) for k in (0, 1)], [0, 0, 2, 2]),
        ([f"{t}/x_{i}/x_{i}.nii.gz" for t, i in (("train", 1), ("train", 2), ("test", 3))], [0, 1, 2]),
        # ... that are of groups: too many files of one form
        ([f"{m}_train/{m}_train_{i}.nii.gz" for m in ("ct", "mr") for i in range(3)], list(range(6))),
        ([f"site{s}/site{s}_{i:03d}.nii.gz" for s in (1, 2) for i in range(3)], list(range(6))),
        # Several files of a patient, and dates as TCIA writes them
        ([f"PETCT_{i}/03-23-2003-x/{m}.nii.gz" for i in (1, 2) for m in ("CT", "CTres", "PET")], [0, 0, 0, 3, 3, 3]),
        ([f"A-{i}/01-0{k}-2000-NA/3000-x/ct.nii.gz" for i in (1, 2) for k in (1, 2)], [0, 0, 2, 2]),
        ([f"P-{i}/week-00{k}-1/ct.nii.gz" for i in (1, 2) for k in (1, 2)], [0, 0, 2, 2]),
        # Beginnings that number cases, alone or of several data sets
        ([f"covid19_scan_{i}.nii.gz" for i in range(4)], list(range(4))),
        ([f"3D_scan_{i}.nii.gz" for i in range(4)], list(range(4))),
        ([f"study1_visit_{i:03d}.nii.gz" for i in range(4)], list(range(4))),
        ([f"Dataset1__case_{x}.nii.gz" for x in "abcd"], list(range(4))),
        ([f"MSD{s}__liver_{i}.nii.gz" for s in ("03", "07") for i in range(6)], list(range(12))),
        ([f"Dataset2_left_{i:03d}.nii.gz" for i in range(4)], list(range(4))),
        ([f"p{i}__{k}.nii.gz" for i in (1, 2) for k in range(3)], [0, 0, 0, 3, 3, 3]),
    ],
)
def test_subjects_by_folders_and_names(paths, groups):
    found = subjects_of_paths(*paths)
    assert [found.index(subject) for subject in found] == [groups.index(group) for group in groups]


MARKERS = (
    ["art", "ven", "pv", "nc", "arterial", "venous", "portal", "delayed", "NCCT", "CECT", "insp", "exp", "prone"]
    + ["pre", "post", "mid", "preRT", "post_op", "baseline", "followup", "follow-up", "BL", "FU1", "fu", "left", "R"]
    + [
        "tp1",
        "TP02",
        "timepoint2",
        "time-point_1",
        "time1",
        "v1",
        "V01",
        "study2",
        "exam1",
        "acq1",
        "phase0",
        "phase50",
    ]
    + ["frame01", "week012", "day100", "month6", "MR1", "CT2", "B30f", "Br40", "I70f", "2019-01-01", "20200301"]
    + ["01-31-2020", "scan2", "t1", "visit1", "ses-01", "run-1"]
)


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("form", ["p01_{}", "LUNG_001-{}", "OAS1_0001_{}_ct"])
def test_a_marker_of_a_scan_behind_a_number_ends_the_subject(form, marker):
    assert marker in ("R", "t1") or subject_of(form.format(marker)) == form.split("{")[0][:-1]
    assert subject_of(f"p01_{marker}") == "p01"


@pytest.mark.parametrize(
    "name", ["case_0017", "site1_t2_01", "site1_v2_001", "liver_1", "p1_arteries", "p1_left2", "ct_pre"]
)
def test_other_words_end_no_subject(name):
    assert subject_of(name) == name


def drawn_faults(names, pattern=""):
    sides = split_by_subject(cases_of(names), seed=0, val_fraction=0.3, subject_regex=pattern)
    return split_faults(*sides, pattern)


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ([f"{100000 + i}_{k:05d}" for i in range(9) for k in (1, 2)], r"^\d+|.+"),
        ([f"{100 + i}_{1000 + 2 * i + k}" for i in range(9) for k in (0, 1)], r"^\d+|.+"),
        ([f"BraTS-GLI-{i:05d}-{k:03d}" for i in range(9) for k in (0, 1)], r"^BraTS-GLI-\d+|.+"),
        ([f"train_{i}_{s}_{k}" for i in range(9) for s in "ab" for k in (1, 2)], r"^train_\d+|.+"),
        ([f"p{i}{s}" for i in range(9) for s in "ab"], r"^p\d+|.+"),
        ([f"P{i:03d}V{s}" for i in range(9) for s in "12"], r"^P\d+|.+"),
        ([f"p{i}_{s}_ct" for i in range(9) for s in "12"], r"^p\d+|.+"),
        ([f"site{s}_p{i}.{v}" for s in (1, 2) for i in range(9) for v in "12"], r"^site\d+_p\d+|.+"),
        ([f"{g}{i}_{v}" for g in ("a", "b+") for i in range(9) for v in "12"], r"^(?:[^-_./ ]+|a\d+)|.+"),
    ],
)
def test_names_that_differ_in_their_last_part_alone_are_reported(names, pattern):
    (fault,) = drawn_faults(names)
    assert fault.startswith("perhaps one subject in training and in validation: ")
    assert f"set subject_regex to '{pattern}'" in fault
    assert drawn_faults(names, pattern) == []


@pytest.mark.parametrize(
    "form",
    ["case_{:04d}", "ct_scan_{:04d}", "volume-{}", "liver_{}", "FLARE22_Tr_{:04d}", "s{:04d}", "img{:04d}", "{}", "A{}"]
    + ["LUNG1-{:03d}", "covid19_scan_{}", "MSD03__liver_{}", "1.3.6.1.4.{}", "LIDC-IDRI-{:04d}", "TCGA-02-{:04d}"]
    + ["volume-covid19-A-{:04d}_ct", "s{:04d}-ct", "case_{:05d}-imaging", "p{}_visit1"],
)
def test_plain_numbered_names_are_not_reported(form):
    assert drawn_faults([form.format(i) for i in range(40)]) == []


def test_names_of_several_sites_are_not_reported():
    for names in (
        [f"site{s}_{i:03d}" for s in range(5) for i in range(20)],
        [f"FLARE22_{s}_{i:04d}" for s in ("Tr", "Ts") for i in range(20)],
        [f"TCGA-{s}-{i:04d}" for s in ("02", "06", "B0") for i in range(10)],
    ):
        assert drawn_faults(names) == []


def test_subjects_of_earlier_versions_keep_their_names_and_so_their_rank():
    names = ["sub-01_ct", "sub-02_ct", "p3_visit1", "p3_visit2", "case_0-imaging"]
    images = [Path(f"/data/{name}.nii.gz") for name in names]
    assert subjects_of(names, images) == ["sub-01_ct", "sub-02_ct", "p3", "p3", "case_0-imaging"]


def test_a_subject_on_both_sides_of_a_split_is_reported():
    training = cases_of([f"p{i}_visit1" for i in range(12)])
    (fault,) = split_faults(training, cases_of(["p3_visit2"]))
    assert fault == "subjects in training and in validation: p3"
