"""The files of channels are found in each layout, and one that is missing is named, never replaced."""

import json
from pathlib import Path

import pytest

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.data_folder import find_cases
from hyspark.data.datasets.datalist_json import read_datalist, read_list
from hyspark.data.datasets.inputs import read_inputs

ALL = ["a_0000", "a_0001", "a_0002", "b_0000", "b_0001", "b_0002"]


def touch(folder: Path, names: list[str], ending: str = ".nii.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}{ending}").touch()
    return folder


def stems(cases: list[Case]) -> dict[str, list[str]]:
    return {case.name: [path.name.split(".")[0] for path in case.images] for case in cases}


@pytest.mark.parametrize("layout", ["nnunet", "listed", "loose", "inputs", "files"])
@pytest.mark.parametrize("channels", [(0, 1), (2, 0), (1,)])
def test_channels_are_found_in_their_order(tmp_path, layout, channels):
    expected = {name: [f"{name}_{channel:04d}" for channel in channels] for name in "ab"}
    folder = tmp_path / "Dataset001_A"
    images = touch(folder / ("images" if layout == "loose" else "imagesTr"), ALL)
    if layout == "listed":
        listed = {name: {"images": [f"./imagesTr/{name}_{i:04d}.nii.gz" for i in range(3)]} for name in "ab"}
        (folder / "dataset.json").write_text(json.dumps({"dataset": listed}))
    if layout == "inputs":
        found = read_inputs([images], channels)
    elif layout == "files":
        found = read_inputs([images / f"{name}_{channels[-1]:04d}.nii.gz" for name in "ab"], channels)
    else:
        found = find_cases(folder, channels=channels)
    assert stems(found.cases) == expected
    if layout != "files":
        unused = sorted(path.name[:6] for files in found.unused.values() for path in files)
        assert unused == [name for name in ALL if int(name[-1]) not in channels]


@pytest.mark.parametrize(
    ("entry", "channels", "expected"),
    [
        (["a_0000.nii.gz", "a_0001.nii.gz"], (0, 1), ["a_0000", "a_0001"]),
        (["a_0001.nii.gz", "a_0000.nii.gz"], (0, 1), ["a_0000", "a_0001"]),  # names decide
        (["a_0000.nii.gz", "a_0001.nii.gz"], (1,), ["a_0001"]),
        (["t1.nii.gz", "flair.nii.gz"], (1, 0), ["flair", "t1"]),  # the index decides
        (["t1.nii.gz", "flair.nii.gz"], (0,), ["t1"]),
        (["c_0000.nii.gz", "d_0000.nii.gz"], (0, 1), ["c_0000", "d_0000"]),
        ("a_0000.nii.gz", (0, 1), ["a_0000", "a_0001"]),
        ("a.nii.gz", (0, 2), ["a_0000", "a_0002"]),  # as in lists of nnU-Net v1
        ("a_0001.nii.gz", (0,), ["a_0001"]),  # as it was
        ("a_0000.nii.gz", (0, 5), ["a_0000", "a_0005"]),  # missing, which runs report
        (["a_0000.nii.gz", "a_0001.nii.gz"], (0, 2), None),
        (["t1.nii.gz"], (0, 1), None),
    ],
)
def test_entries_of_a_list(tmp_path, entry, channels, expected):
    touch(tmp_path, ALL)
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": entry}]}))
    listed = read_list(path, channels=channels)
    if expected is None:
        assert "image_channels" in listed.findings[0].found
        with pytest.raises(ValueError, match=r"training\[0\]: expected channels 0, [12] \(image_channels\)"):
            read_datalist(path, channels=channels)
        return
    assert list(stems(listed.training).values()) == [expected]
    named = [name.split(".")[0] for name in entry] if isinstance(entry, list) else []
    passed = {file.name.split(".")[0] for files in listed.unused.values() for file in files}
    assert passed >= {name for name in named if name not in expected}


def test_a_file_that_is_missing_keeps_its_name(tmp_path):
    touch(tmp_path / "imagesTr", ["a_0000", "a_0001", "b_0001", "c_0000"])
    cases = find_cases(tmp_path, channels=(0, 1)).cases
    assert stems(cases) == {name: [f"{name}_0000", f"{name}_0001"] for name in "abc"}
    missing = {path.name for case in cases for path in case.images if not path.exists()}
    assert missing == {"b_0000.nii.gz", "c_0001.nii.gz"}


def test_endings_may_differ(tmp_path):
    touch(tmp_path / "imagesTr", ["a_0000"])
    touch(tmp_path / "imagesTr", ["a_0001"], ".nii")
    for given in (tmp_path, None):
        found = (
            find_cases(given, channels=(0, 1)) if given else read_inputs([tmp_path / "imagesTr/a_0000.nii.gz"], (0, 1))
        )
        assert [path.name for path in found.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii"]


def test_listed_images_without_a_channel_have_its_name(tmp_path):
    touch(tmp_path / "imagesTr", ["a_0000"])
    (tmp_path / "dataset.json").write_text(json.dumps({"dataset": {"a": {"images": ["./imagesTr/a_0000.nii.gz"]}}}))
    assert stems(find_cases(tmp_path, channels=(0, 1)).cases) == {"a": ["a_0000", "a_0001"]}
