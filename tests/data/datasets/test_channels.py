"""The files of channels are found in each layout, and one that is missing is named, never replaced."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.data_folder import find_cases
from hyspark.data.datasets.datalist_json import read_datalist, read_list, write_datalist
from hyspark.data.datasets.inputs import read_inputs
from hyspark.data.datasets.organize import organize_by_names
from hyspark.data.intensity import to_input
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.preprocessing.store import case_folder
from hyspark.data.quality.case_files import read_case
from hyspark.data.settings import PrepareSettings

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


VALUES = np.arange(2 * 4 * 5 * 6, dtype=np.int16).reshape(2, 4, 5, 6)


def decathlon(folder: Path, shape: tuple[int, ...] = (4, 5, 6, 2), **declared: object) -> Path:
    """A data set of the decathlon, whose two channels lie in one file of four axes."""
    for name in ("a", "b"):
        for part, voxels in (("imagesTr", np.moveaxis(VALUES, 0, -1).reshape(shape)), ("labelsTr", VALUES[0] % 2)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / part / f"{name}.nii.gz")
    entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "ab"]
    (folder / "dataset.json").write_text(json.dumps({"training": entries} | declared))
    return folder


@pytest.mark.parametrize("reader", ["list", "entry of one file", "folder", "loose", "inputs", "file"])
@pytest.mark.parametrize("shape", [(4, 5, 6, 2), (4, 5, 6, 1, 2)])
@pytest.mark.parametrize("channels", [(0, 1), (1, 0), (1,)])
def test_volumes_of_one_file_are_channels(tmp_path, reader, shape, channels):
    folder = decathlon(tmp_path / "Task01_A", shape)
    images = folder / "imagesTr"
    if reader == "entry of one file":
        (folder / "dataset.json").write_text(json.dumps({"training": [{"image": ["./imagesTr/a.nii.gz"]}]}))
    if reader in ("list", "entry of one file"):
        cases = read_list(folder / "dataset.json", channels=channels).training
    elif reader in ("inputs", "file"):
        cases = read_inputs([images if reader == "inputs" else images / "a.nii.gz"], channels).cases
    else:
        images = images if reader == "folder" else images.rename(folder / "scans")
        cases = find_cases(folder if reader == "folder" else images, channels=channels).cases
    assert cases[0].name == "a"
    assert cases[0].images == (images / "a.nii.gz",) * len(channels)
    settings = PrepareSettings(spacing=(1, 1, 1), intensity=("none",), image_channels=channels)
    prepared = prepare_case(replace(cases[0], label=None), settings)
    expected = VALUES[list(channels)]
    corner = [round(value) for value in prepared["affine"][:3, 3]]  # of the crop to foreground
    box = tuple(slice(a, a + n) for a, n in zip(corner, prepared["image"].shape[1:], strict=True))
    assert np.abs(to_input(prepared["image"], prepared["maps"]) - expected[(slice(None), *box)]).max() < 1e-3


def test_volumes_of_one_file_are_kept_apart_in_the_store(tmp_path):
    case = read_list(decathlon(tmp_path) / "dataset.json", channels=(0, 1)).training[0]
    folders = {
        case_folder(tmp_path, PrepareSettings(intensity=("mr",), image_channels=channels), case)
        for channels in ((0, 1), (1, 0), (0, 2))
    }
    assert len(folders) == 3


@pytest.mark.parametrize(
    ("declared", "channels", "kind", "found"),
    [
        ({}, (0,), "not 3D", "--image_channels 0 1"),  # perhaps points in time
        ({"modality": {"0": "T2", "1": "ADC"}}, (0,), "another channel", "2 channels in one file"),
        ({}, (0, 2), "missing channel", "2 channels in one file, without channel 2"),
    ],
)
def test_volumes_of_one_file_that_are_not_read_are_named(tmp_path, declared, channels, kind, found):
    case = read_list(decathlon(tmp_path, **declared) / "dataset.json", channels=channels).training[0]
    settings = PrepareSettings(spacing=(1, 1, 1), intensity=("none",), image_channels=channels)
    finding = next(finding for finding in read_case(case, settings).findings if finding.kind == kind)
    assert found in str(finding)


@pytest.mark.parametrize("names", [("a_0000", "a_0001"), ("t1", "dwi")])
def test_a_channel_of_several_volumes_is_refused(tmp_path, names):
    """Such as the b-values of diffusion beside T1."""
    for name, voxels in zip(names, (VALUES[0], np.moveaxis(VALUES, 0, -1)), strict=True):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
    files = [f"{name}.nii.gz" for name in names]
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": files}]}))
    case = read_list(tmp_path / "list.json", channels=(0, 1)).training[0]
    settings = PrepareSettings(spacing=(1, 1, 1), intensity=("none",), image_channels=(0, 1))
    assert [(f.kind, Path(f.file).name) for f in read_case(case, settings).errors] == [("not 3D", files[1])]


def test_digits_may_number_cases_of_several_volumes(tmp_path):
    folder = decathlon(tmp_path / "Task01_A")
    (folder / "dataset.json").unlink()
    for part in ("imagesTr", "labelsTr"):
        for number, name in enumerate("ab", 3):
            (folder / part / f"{name}.nii.gz").rename(folder / part / f"case_{number:04d}.nii.gz")
    cases = find_cases(folder, channels=(0, 1)).cases
    assert stems(cases) == {f"case_{number:04d}": [f"case_{number:04d}"] * 2 for number in (3, 4)}
    settings = PrepareSettings(spacing=(1, 1, 1), intensity=("none",), image_channels=(0, 1))
    assert read_case(replace(cases[0], label=None), settings).errors == []


def test_files_of_several_volumes_are_listed_once_and_not_linked(tmp_path):
    folder = decathlon(tmp_path / "Task01_A")
    listed = read_datalist(folder / "dataset.json", channels=(0, 1))
    write_datalist(listed, tmp_path / "own.json")
    assert json.loads((tmp_path / "own.json").read_text())["training"][0]["image"] == "./Task01_A/imagesTr/a.nii.gz"
    assert read_datalist(tmp_path / "own.json", channels=(0, 1)) == listed
    loose = (folder / "imagesTr").rename(tmp_path / "scans")
    with pytest.raises(ValueError, match=r"2 files that hold several; .*: --data .*scans --image_channels 0 1"):
        organize_by_names(loose, tmp_path / "Dataset001_A", channels=(0, 1))


def test_a_file_of_one_volume_is_no_second_channel(tmp_path):
    folder = touch(tmp_path / "Dataset001_A" / "imagesTr", ["a", "b"]).parent
    assert [case.others[0].name for case in find_cases(folder, channels=(0, 1)).cases] == [
        "a_0001.nii.gz",
        "b_0001.nii.gz",
    ]
