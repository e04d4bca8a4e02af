"""Finding, writing and reading lists of cases; files are empty, for only their names matter."""

import json
import os
import random
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import load_decathlon_datalist

from hyspark.data.datasets import build, cases, data_folder, datalist_json, file_names
from hyspark.data.datasets import cases as datasets_cases

CLASSES = {"background": 0, "spleen": 1, "liver": 2}
NAMES = st.text(string.ascii_letters + string.digits + "_-. éß", min_size=1, max_size=12).filter(
    lambda name: not name.startswith(".") and ".nii" not in name
)
fast = settings(deadline=None, max_examples=40)


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def dataset(folder, images=(), labels=None, classes=None, splits=None) -> Path:
    touch(*(folder / "imagesTr" / f"{name}_0000.nii.gz" for name in images))
    if labels is not None:
        (folder / "labelsTr").mkdir(parents=True, exist_ok=True)
        touch(*(folder / "labelsTr" / f"{name}.nii.gz" for name in labels))
    if classes is not None:
        content = {"channel_names": {"0": "CT"}, "labels": classes, "numTraining": 1}
        (folder / "dataset.json").write_text(json.dumps(content))
    if splits is not None:
        (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def cases_of(names):
    return tuple(cases.Case(n, "Dataset001_A", Path(f"/x/Dataset001_A/imagesTr/{n}_0000.nii.gz")) for n in names)


def scan_cases(path, labels=False, channels=(0,)):
    found = data_folder.find_cases(path, labels=labels, channels=channels)
    return data_folder.labelled_of(found) if labels else found.cases


def names(cases):
    return [case.name for case in cases]


def write_json(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- scan


def test_scan_finds_every_data_set_below_sorted_and_only_the_channel(tmp_path):
    dataset(tmp_path / "deep/er/Dataset002_B", ["b", "a"])
    first = dataset(tmp_path / "Dataset001_Z", ["z"])
    touch(first / "imagesTr/y_0000.nii", first / "imagesTr/z_0001.nii.gz", first / "imagesTr/z.nii.gz")
    touch(first / "imagesTr/._z_0000.nii.gz", first / "imagesTs/test_0000.nii.gz", first / "z.txt")
    touch(tmp_path / ".trash/Dataset003_C/imagesTr/old_0000.nii.gz", tmp_path / "Other/imagesTr/o_0000.nii.gz")
    found = scan_cases(tmp_path)
    assert [(c.dataset, c.name) for c in found] == [
        ("Dataset001_Z", "y"),
        ("Dataset001_Z", "z"),
        ("Dataset002_B", "a"),
        ("Dataset002_B", "b"),
    ]
    assert found[0].image == first / "imagesTr/y_0000.nii"
    assert all(case.label is None for case in found)
    assert names(scan_cases(tmp_path, channels=(1,))) == ["z"]


def test_scan_accepts_a_data_set_folder_itself_also_relative(tmp_path, monkeypatch):
    folder = dataset(tmp_path / "Dataset001_A", ["a"])
    assert names(scan_cases(folder)) == ["a"]
    monkeypatch.chdir(folder)
    assert scan_cases(Path(".")) == scan_cases(folder)


def test_scan_pairs_labels_and_leaves_out_what_has_none(tmp_path):
    folder = dataset(tmp_path / "Dataset001_A", ["a", "b", "c"], labels=["a"])
    touch(folder / "labelsTr/c.nii")
    dataset(tmp_path / "Dataset002_B", ["d"])
    found = scan_cases(tmp_path, labels=True)
    assert [(c.name, c.label) for c in found] == [
        ("a", folder / "labelsTr/a.nii.gz"),
        ("c", folder / "labelsTr/c.nii"),
    ]
    assert names(scan_cases(tmp_path)) == ["a", "b", "c", "d"]


def test_scan_pairs_btcv_names(tmp_path):
    folder = tmp_path / "Dataset013_BTCV"
    touch(folder / "imagesTr/img0001.nii.gz", folder / "imagesTr/img0002.nii.gz")
    touch(folder / "labelsTr/label0001.nii.gz", folder / "labelsTr/label0002.nii.gz")
    found = scan_cases(tmp_path, labels=True)
    assert names(found) == ["img0001", "img0002"]
    assert [case.label.name for case in found] == ["label0001.nii.gz", "label0002.nii.gz"]
    assert names(scan_cases(tmp_path)) == ["img0001", "img0002"]
    touch(folder / "imagesTr/other_0000.nii.gz", folder / "imagesTr/other_0001.nii.gz")
    assert names(scan_cases(tmp_path, channels=(1,))) == ["other"]
    datalist_json.write_datalist(build.build_datalist(tmp_path), tmp_path / "dataset.json")
    assert names(datalist_json.read_datalist(tmp_path / "dataset.json").training) == ["img0001", "img0002", "other"]


def test_scan_names_a_label_without_image(tmp_path):
    dataset(tmp_path / "Dataset001_A", ["a"], labels=["a", "lost"])
    with pytest.raises(ValueError, match=r"Dataset001_A.*lost\.nii\.gz"):
        scan_cases(tmp_path, labels=True)
    assert names(scan_cases(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    "files",
    [
        ("imagesTr/x_0000.nii", "imagesTr/x_0000.nii.gz"),
        ("imagesTr/img0001.nii.gz", "imagesTr/img0001_0000.nii.gz"),
        ("labelsTr/ok.nii", "labelsTr/ok.nii.gz"),
    ],
)
def test_scan_refuses_two_files_for_one_case_and_names_both(tmp_path, files):
    folder = dataset(tmp_path / "Dataset001_A", ["ok"])
    touch(*(folder / file for file in files))
    with pytest.raises(ValueError, match="expected one file for the case") as caught:
        scan_cases(tmp_path, labels=True)
    assert all(str(folder / file) in str(caught.value) for file in files)


def test_scan_refuses_two_data_sets_of_one_name(tmp_path):
    dataset(tmp_path / "one/Dataset001_A", ["a"])
    dataset(tmp_path / "two/Dataset001_A", ["b"])
    with pytest.raises(ValueError, match=r"one.Dataset001_A.*two.Dataset001_A"):
        scan_cases(tmp_path)


def test_scan_says_where_it_looked_and_what_it_expects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"imagesTr/CASE_0000\.nii\.gz") as caught:
        scan_cases(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="absent"):
        scan_cases(tmp_path / "absent")
    dataset(tmp_path / "Dataset001_A", ["a"])
    with pytest.raises(FileNotFoundError, match="Dataset001_A"):
        scan_cases(tmp_path, channels=(7,))
    with pytest.raises(FileNotFoundError, match="1 images but no label"):
        scan_cases(tmp_path, labels=True)


def test_scan_follows_links_once_and_reports_broken_ones(tmp_path):
    real = dataset(tmp_path / "disk/Dataset009_R", ["r"])
    data = tmp_path / "data"
    touch(data / "Dataset001_A/imagesTr/a_0000.nii.gz", tmp_path / "source.nii.gz")
    (data / "Dataset001_A/imagesTr/link_0000.nii.gz").symlink_to(tmp_path / "source.nii.gz")
    (data / "Dataset009_R").symlink_to(real)
    (data / "another").symlink_to(data / "Dataset001_A")
    (data / "loop").symlink_to(data)
    found = scan_cases(data)
    assert names(found) == ["a", "link", "r"]
    assert found[1].image == data / "Dataset001_A/imagesTr/link_0000.nii.gz"
    (tmp_path / "source.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="link_0000"):
        build.build_datalist(data)
    assert names(scan_cases(data)) == ["a", "link", "r"]  # runs report it with what is unreadable


# --- build, read_folder, counts


def test_build_without_split_trains_on_all(tmp_path):
    dataset(tmp_path / "Dataset001_A", ["a", "b"], labels=["a"], classes=CLASSES)
    dataset(tmp_path / "Dataset002_B", ["a"])
    plain = build.build_datalist(tmp_path)
    assert (len(plain.training), plain.validation, plain.labels, plain.excluded) == (3, (), None, ())
    labelled = build.build_datalist(tmp_path, labels=True)
    assert (names(labelled.training), labelled.labels) == (["a"], CLASSES)
    assert build.count_cases(labelled) == {
        "Dataset001_A": {"training": 1, "validation": 0, "labelled": 1, "excluded": 1},
        "Dataset002_B": {"training": 0, "validation": 0, "labelled": 0, "excluded": 1},
    }


@pytest.mark.parametrize("validation_key", ["validation", "val"])
def test_build_applies_a_splits_file_labelled_and_unlabelled(tmp_path, validation_key):
    content = {"train": ["a", "b"], validation_key: ["c"], "unlabelled": ["u"], "test": ["elsewhere"]}
    data = dataset(tmp_path / "Dataset001_A", ["a", "b", "c", "u", "x"], labels=["a", "b", "c", "x"], splits=content)
    plain = build.build_datalist(data, splits=str(data / "splits.json"))
    assert (names(plain.training), names(plain.validation)) == (["a", "b", "u"], ["c"])
    assert names(plain.excluded) == ["x"]
    labelled = build.build_datalist(data, labels=True, splits=str(data / "splits.json"))
    assert (names(labelled.training), names(labelled.validation)) == (["a", "b"], ["c"])
    assert names(labelled.excluded) == ["u", "x"]
    row = {"training": 2, "validation": 1, "labelled": 3, "excluded": 2}
    assert build.count_cases(labelled) == {"Dataset001_A": row}


def test_build_auto_splits_each_data_set_its_own_way(tmp_path):
    dataset(tmp_path / "Dataset001_A", ["a", "b", "c"], splits={"train": ["a"], "validation": ["b"]})
    visits = [f"p{i}_visit{j}" for i in range(10) for j in range(2)]
    dataset(tmp_path / "Dataset002_B", visits)
    made = build.build_datalist(tmp_path, splits="auto", val_fraction=0.3, seed=5)
    assert build.count_cases(made) == {
        "Dataset001_A": {"training": 1, "validation": 1, "labelled": 0, "excluded": 1},
        "Dataset002_B": {"training": 14, "validation": 6, "labelled": 0, "excluded": 0},
    }
    assert made == build.build_datalist(tmp_path, splits="auto", val_fraction=0.3, seed=5)
    assert made != build.build_datalist(tmp_path, splits="auto", val_fraction=0.3, seed=6)


def test_build_auto_splits_labelled_cases_only(tmp_path):
    found = [f"c{i:02}" for i in range(30)]
    dataset(tmp_path / "Dataset001_A", found, labels=found[:10])
    made = build.build_datalist(tmp_path, labels=True, splits="auto", val_fraction=0.2)
    expected = {"training": 8, "validation": 2, "labelled": 10, "excluded": 20}
    assert build.count_cases(made) == {"Dataset001_A": expected}


def test_build_refuses_class_names_that_differ_and_a_split_without_training(tmp_path):
    dataset(tmp_path / "Dataset001_A", ["a"], labels=["a"], classes=CLASSES)
    dataset(tmp_path / "Dataset002_B", ["b"], labels=["b"], classes={"background": 0, "spleen": 2})
    with pytest.raises(ValueError, match=r"Dataset001_A.*Dataset002_B.*one list per data set"):
        build.build_datalist(tmp_path, labels=True)
    assert len(build.build_datalist(tmp_path).training) == 2
    splits = write_json(tmp_path / "s.json", {"train": [], "val": ["a"]})
    with pytest.raises(ValueError, match="expected at least one training case, got a split without any"):
        build.build_datalist(tmp_path, splits=str(splits))


def test_read_folder_takes_labelled_cases_of_a_folder_of_any_name(tmp_path):
    found = [f"c{i}" for i in range(10)]
    folder = dataset(tmp_path / "BTCV", found, labels=found[:5], classes=CLASSES)
    made = build.read_folder(folder, seed=0, val_fraction=0.4)
    assert build.count_cases(made)["BTCV"] == {"training": 3, "validation": 2, "labelled": 5, "excluded": 5}
    assert made.labels == CLASSES
    (folder / "splits.json").write_text(json.dumps({"train": ["c0"], "val": ["c1"], "unlabelled": ["c7"]}))
    made = build.read_folder(folder, seed=0, val_fraction=0.4)
    assert (names(made.training), names(made.validation)) == (["c0"], ["c1"])
    assert build.read_folder(tmp_path, seed=0, val_fraction=0.4) == made
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="imagesTr"):
        build.read_folder(tmp_path / "empty", seed=0, val_fraction=0.4)
    with pytest.raises(FileNotFoundError, match="no label"):
        build.read_folder(dataset(tmp_path / "bare", ["a"]), seed=0, val_fraction=0.4)


# --- write and read


def test_write_unlabelled_gives_exactly_the_released_form(tmp_path):
    dataset(tmp_path / "Dataset501_OpenKBP", ["okbp_001"])
    datalist_json.write_datalist(build.build_datalist(tmp_path), tmp_path / "dataset.json")
    text = (tmp_path / "dataset.json").read_text()
    expected = {"training": [{"image": "./Dataset501_OpenKBP/imagesTr/okbp_001_0000.nii.gz"}]}
    assert json.loads(text) == expected
    assert text.endswith("]\n}\n")
    assert text.count("\n") > 4


def test_write_labelled_with_validation_and_classes(tmp_path):
    folds = {"train": ["a"], "val": ["b"]}
    dataset(tmp_path / "Dataset001_A", ["a", "b"], labels=["a", "b"], classes=CLASSES, splits=folds)
    datalist_json.write_datalist(build.build_datalist(tmp_path, labels=True, splits="auto"), tmp_path / "list.json")
    entry = {
        name: {
            "image": f"./Dataset001_A/imagesTr/{name}_0000.nii.gz",
            "label": f"./Dataset001_A/labelsTr/{name}.nii.gz",
        }
        for name in "ab"
    }
    written = json.loads((tmp_path / "list.json").read_text())
    assert written == {"training": [entry["a"]], "validation": [entry["b"]], "labels": CLASSES}


@pytest.mark.parametrize("labels", [False, True])
def test_monai_loads_what_is_written(tmp_path, labels):
    folder = dataset(tmp_path / "Dataset001_A", ["a", "b"], labels=["a", "b"])
    datalist_json.write_datalist(build.build_datalist(tmp_path, labels=labels), tmp_path / "dataset.json")
    loaded = load_decathlon_datalist(tmp_path / "dataset.json", is_segmentation=labels, data_list_key="training")
    expected = [{"image": str(folder / f"imagesTr/{n}_0000.nii.gz")} for n in "ab"]
    if labels:
        expected = [e | {"label": str(folder / f"labelsTr/{n}.nii.gz")} for e, n in zip(expected, "ab", strict=True)]
    assert loaded == expected


def test_write_reaches_data_outside_its_folder(tmp_path, monkeypatch):
    dataset(tmp_path / "data/Dataset001_A", ["a"])
    made = build.build_datalist(tmp_path / "data")
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path / "lists")
    datalist_json.write_datalist(made, Path("one.json"))
    written = json.loads(Path("one.json").read_text())
    assert written["training"] == [{"image": "../data/Dataset001_A/imagesTr/a_0000.nii.gz"}]
    assert datalist_json.read_datalist(Path("one.json")) == made


def test_write_again_gives_the_same_bytes_and_leaves_nothing_behind(tmp_path):
    dataset(tmp_path / "Dataset001_A", list("hgfedcba"))
    path = tmp_path / "dataset.json"
    datalist_json.write_datalist(build.build_datalist(tmp_path, splits="auto", seed=3), path)
    first = path.read_bytes()
    datalist_json.write_datalist(build.build_datalist(tmp_path, splits="auto", seed=3), path)
    assert path.read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == ["Dataset001_A", "dataset.json"]


@pytest.mark.parametrize(
    "content",
    [
        {"channel_names": {"0": "CT"}, "labels": CLASSES, "numTraining": 2},
        {"training": ["./a.nii.gz"]},
        {"training": [{"image": "./a.nii.gz"}], "numTraining": 1, "modality": {"0": "CT"}},
        [{"image": "./a.nii.gz"}],
        "not json",
    ],
)
def test_write_keeps_a_file_that_is_not_its_own(tmp_path, content):
    data = dataset(tmp_path / "Dataset001_A", ["a"])
    path = write_json(data / "dataset.json", content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"dataset\.json.*choose another output"):
        datalist_json.write_datalist(cases.Datalist(cases_of("a")), path)
    assert path.read_bytes() == before


def test_write_says_when_it_cannot(tmp_path):
    for path in (tmp_path, tmp_path / "absent/list.json"):
        with pytest.raises(ValueError, match="choose another output"):
            datalist_json.write_datalist(cases.Datalist(cases_of("a")), path)
    touch(tmp_path / "file")
    with pytest.raises(ValueError, match="not writable"):
        datalist_json.write_datalist(cases.Datalist(cases_of("a")), tmp_path / "file/list.json")


def test_a_failed_write_keeps_the_old_list(tmp_path, monkeypatch):
    path = tmp_path / "list.json"
    datalist_json.write_datalist(cases.Datalist(cases_of("a")), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left"):
        datalist_json.write_datalist(cases.Datalist(cases_of("ab")), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["list.json"]


@fast
@given(
    st.dictionaries(NAMES, st.tuples(st.booleans(), st.booleans()), min_size=1),
    st.none() | st.lists(NAMES, unique=True, min_size=1),
    st.sampled_from(["0000", "0003"]),
    st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, found, classes, channel, below):
    root = tmp_path_factory.mktemp("trip")
    folder = root / "Dataset007_H" if below else root / "data/Dataset007_H"
    cases = {}
    for name, (labelled, _) in found.items():
        image = folder / "imagesTr" / f"{name}_{channel}.nii.gz"
        label = folder / "labelsTr" / f"{name}.nii" if labelled else None
        touch(image, *([label] if label else []))
        cases[name] = datasets_cases.Case(name, folder.name, image, label)
    keep = [case for name, case in cases.items() if found[name][1]]
    rest = [case for case in cases.values() if case not in keep]
    labels = None if classes is None else {name: value for value, name in enumerate(classes)}
    made = datasets_cases.Datalist(tuple(rest or keep), tuple(keep if rest else ()), labels)
    path = root / "dataset.json" if below else root / "list.json"
    datalist_json.write_datalist(made, path)
    assert datalist_json.read_datalist(path) == made


def test_files_of_one_name_in_several_folders_are_several_cases(tmp_path):
    for folder in ("case_1", "case_2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "imaging.nii.gz").touch()
    entries = [{"image": f"{folder}/imaging.nii.gz"} for folder in ("case_1", "case_2")]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    assert [c.name for c in datalist_json.read_datalist(tmp_path / "list.json").training] == [
        "case_1-imaging",
        "case_2-imaging",
    ]


def test_cases_of_one_name_are_told_apart_by_as_many_folders_as_it_takes():
    images = [
        Path(f"/data/{folder}/imagesTr/case_001.nii.gz") for folder in ("a/Dataset001", "b/Dataset001", "b/Dataset002")
    ]
    images += [Path(f"/data/b/Dataset002/{name}.nii.gz") for name in ("imagesTr/case_002", "imagesTs/case_001")]
    images += [Path("/top/x.nii.gz"), Path("/far/top/x.nii.gz")]
    assert list(file_names.case_names(images).values()) == [
        *("a-Dataset001-imagesTr-case_001", "b-Dataset001-imagesTr-case_001", "Dataset002-imagesTr-case_001"),
        *("case_002", "imagesTs-case_001", "top-x", "far-top-x"),
    ]


@fast
@given(st.lists(NAMES, unique=True, min_size=1, max_size=8), st.randoms())
def test_scan_gives_back_the_names_in_order_whatever_was_made_first(tmp_path_factory, found, rng):
    root = tmp_path_factory.mktemp("scan")
    shuffled = random.Random(rng.random()).sample(found, len(found))
    dataset(root / "Dataset001_A", shuffled, labels=shuffled)
    assert names(scan_cases(root, labels=True)) == sorted(found)


def test_read_understands_decathlon_variants(tmp_path):
    touch(*(tmp_path / f"imagesTr/spleen_{i:04}.nii.gz" for i in (1, 2)), tmp_path / "ct/lung.nii")
    touch(tmp_path / "labelsTr/spleen_0001.nii.gz")
    content = {
        "name": "Spleen",
        "numTraining": 3,
        "test": ["./imagesTs/absent.nii.gz"],
        "labels": {"1": "spleen", "0": "background"},
        "training": [
            {"image": "imagesTr/spleen_0001.nii.gz", "label": "./labelsTr/spleen_0001.nii.gz", "fold": 0},
            "./imagesTr/spleen_0002.nii.gz",
            {"image": str(tmp_path / "ct/lung.nii")},
        ],
    }
    made = datalist_json.read_datalist(write_json(tmp_path / "d.json", content))
    found = [*made.validation, *made.training]  # MONAI validates on the fold
    assert [(c.name, c.dataset) for c in found] == [
        ("spleen_0001", tmp_path.name),
        ("spleen_0002", tmp_path.name),
        ("lung", "ct"),
    ]
    assert [case.label for case in found] == [tmp_path / "labelsTr/spleen_0001.nii.gz", None, None]
    assert len(made.validation) == 1
    assert list(made.labels.items()) == [("background", 0), ("spleen", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([], "expected.*training"),
        ({"validation": []}, "expected.*training"),
        ({"training": []}, "at least one image"),
        ({"training": ["a.nii"], "validation": {}}, '"validation": expected a list'),
        ({"training": ["a.nii", {"label": "a.nii"}]}, r"training\[1\]"),
        ({"training": ["a.nii", 7]}, r"training\[1\].*7"),
        ({"training": [{"image": "a.nii", "label": 1}]}, r"training\[0\]"),
        ({"training": ["a.nii"], "validation": [""]}, r"validation\[0\]"),
        ({"training": ["a.nii"], "validation": ["./x/../a.nii"]}, r"a\.nii is listed 2 times"),
        ({"training": ["a.nii"], "labels": {"whole": [1, 2]}}, "regions"),
        ({"training": ["a.nii"], "labels": {"background": 0, "x": 0}}, "expected one name and one value per class"),
        ({"training": ["a.nii"], "labels": {"0": "x", "1": "x"}}, "expected one name and one value per class"),
        ({"training": ["a.nii"], "labels": {"background": "zero"}}, "labels.*expected class values as in"),
        ({"training": ["a.nii"], "labels": ["background"]}, "labels.*expected class values as in"),
    ],
)
def test_read_refuses(tmp_path, content, message):
    touch(tmp_path / "a.nii", tmp_path / "b.nii")
    path = write_json(tmp_path / "mine.json", content)
    with pytest.raises(ValueError, match=rf"mine\.json.*{message}"):
        datalist_json.read_datalist(path)


def test_read_requires_labels_only_on_request(tmp_path):
    touch(tmp_path / "a.nii", tmp_path / "b.nii", tmp_path / "la.nii")
    content = {"training": [{"image": "a.nii", "label": "la.nii"}], "validation": [{"image": "b.nii"}]}
    path = write_json(tmp_path / "d.json", content)
    assert len(datalist_json.read_datalist(path).validation) == 1
    with pytest.raises(ValueError, match=r"validation\[0\].*label"):
        datalist_json.read_datalist(path, require_labels=True)


def test_read_lists_missing_files_and_their_number(tmp_path):
    touch(tmp_path / "here.nii")
    content = {"training": ["here.nii", *(f"gone{i:02}.nii" for i in range(12))]}
    with pytest.raises(FileNotFoundError, match=r"12 of 13.*gone00.*gone09") as caught:
        datalist_json.read_datalist(write_json(tmp_path / "d.json", content))
    assert "gone10" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="absent"):
        datalist_json.read_datalist(tmp_path / "absent.json")


# --- real data


@pytest.mark.skipif(not os.environ.get("HYSPARK_REAL_DATA"), reason="HYSPARK_REAL_DATA is not set")
def test_real_data(tmp_path):
    data = Path(os.environ["HYSPARK_REAL_DATA"])
    plain = build.count_cases(build.build_datalist(data))
    assert plain["Dataset501_OpenKBP"]["training"] == 203
    assert plain["Dataset502_BodyCT"]["training"] == 12
    with pytest.raises(ValueError, match="different class names"):  # one list has one set of classes
        build.build_datalist(data, labels=True, splits="auto")
    labelled = build.build_datalist(data / "Dataset501_OpenKBP", labels=True, splits="auto")
    expected = {"training": 94, "validation": 16, "labelled": 110, "excluded": 93}
    assert build.count_cases(labelled)["Dataset501_OpenKBP"] == expected
    assert build.read_folder(data / "Dataset501_OpenKBP", seed=0, val_fraction=0.2) == labelled
    assert labelled.labels is not None
    assert len(labelled.labels) == 6
    datalist_json.write_datalist(labelled, tmp_path / "list.json")
    assert datalist_json.read_datalist(tmp_path / "list.json", require_labels=True) == labelled
    unlabelled = build.build_datalist(data / "Dataset501_OpenKBP", splits="auto")
    assert (len(unlabelled.training), len(unlabelled.validation)) == (187, 16)
