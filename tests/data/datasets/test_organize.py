"""Bringing loose files into nnU-Net's layout; files are empty where only their names matter."""

import os
from pathlib import Path

import pytest

from hyspark.data.datasets.data_folder import find_cases
from hyspark.data.datasets.organize import organize_by_names


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_organize_links_flat_and_nested_files(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out/Dataset100_Mine"
    touch(source / "a b.nii.gz", source / "deep/c_0000.nii", source / "notes.txt", source / ".hidden.nii.gz")
    assert organize_by_names(source, target) == 2
    made = sorted((target / "imagesTr").iterdir())
    assert [file.name for file in made] == ["a-b_0000.nii.gz", "c_0000.nii"]
    assert [file.readlink() for file in made] == [source / "a b.nii.gz", source / "deep/c_0000.nii"]
    assert [case.name for case in find_cases(tmp_path / "out").cases] == ["a-b", "c"]


@pytest.mark.parametrize("copy", [False, True])
def test_organize_again_changes_nothing_also_inside_the_source(tmp_path, copy):
    target = tmp_path / "Dataset100_Mine"
    (tmp_path / "a.nii.gz").write_bytes(b"voxels")
    for _ in range(2):
        assert organize_by_names(tmp_path, target, copy=copy) == 1
        made = target / "imagesTr/a_0000.nii.gz"
        assert made.read_bytes() == b"voxels"
        assert made.is_symlink() != copy
        assert os.listdir(target / "imagesTr") == ["a_0000.nii.gz"]
    touch(tmp_path / "b.nii.gz")
    assert organize_by_names(tmp_path, target, copy=copy) == 2


def test_organize_links_to_the_file_behind_a_link(tmp_path):
    touch(tmp_path / "store/blob.nii.gz")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.nii.gz").symlink_to("../store/blob.nii.gz")
    organize_by_names(tmp_path / "in", tmp_path / "Dataset100_Mine")
    made = tmp_path / "Dataset100_Mine/imagesTr/a_0000.nii.gz"
    assert made.readlink() == tmp_path / "store/blob.nii.gz"


def test_organize_turns_links_into_copies_when_asked(tmp_path):
    target = tmp_path / "Dataset100_Mine"
    (tmp_path / "a.nii.gz").write_bytes(b"voxels")
    organize_by_names(tmp_path, target)
    organize_by_names(tmp_path, target, copy=True)
    assert not (target / "imagesTr/a_0000.nii.gz").is_symlink()


@pytest.mark.parametrize("second", ["two/a.nii.gz", "two/a.nii", "a_0000.nii.gz", "two/a_0000.nii"])
def test_organize_refuses_names_that_meet_and_writes_nothing(tmp_path, second):
    source, target = tmp_path / "in", tmp_path / "Dataset100_Mine"
    touch(source / "a.nii.gz", source / "b.nii.gz", source / second)
    with pytest.raises(ValueError, match="rename") as caught:
        organize_by_names(source, target)
    assert str(source / "a.nii.gz") in str(caught.value)
    assert str(source / second) in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("obstacle", ["b_0000.nii.gz", "b_0000.nii"])
def test_organize_refuses_another_file_in_the_way(tmp_path, obstacle, copy):
    source, images = tmp_path / "in", tmp_path / "Dataset100_Mine/imagesTr"
    source.mkdir()
    (source / "a.nii.gz").write_bytes(b"voxels")
    (source / "b.nii.gz").write_bytes(b"voxels")
    images.mkdir(parents=True)
    (images / obstacle).write_bytes(b"others")
    for file in (source / "b.nii.gz", images / obstacle):  # same size and time: only the content tells
        os.utime(file, (0, 0))
    with pytest.raises(ValueError, match=obstacle):
        organize_by_names(source, images.parent, copy=copy)
    assert (images / obstacle).read_bytes() == b"others"
    assert os.listdir(images) == [obstacle]


def test_organize_checks_its_folders(tmp_path):
    touch(tmp_path / "in/a.nii.gz", tmp_path / "empty/readme.txt")
    for name in ("Dataset1_A", "Dataset001", "Mine", "Dataset001_A-B"):
        with pytest.raises(ValueError, match=name):
            organize_by_names(tmp_path / "in", tmp_path / name)
    for source in ("empty", "absent"):
        with pytest.raises(FileNotFoundError, match=source):
            organize_by_names(tmp_path / source, tmp_path / "Dataset001_A")
    assert not (tmp_path / "Dataset001_A").exists()


def test_organize_takes_images_alone_and_says_what_it_does_not_use(tmp_path, caplog):
    source, target = tmp_path / "in", tmp_path / "Dataset100_Mine"
    touch(source / "a.nii.gz", source / "a_seg.nii.gz", source / "b_0000.nii.gz", source / "b_0001.nii.gz")
    touch(source / "c.nii.gz", source / "labels/x.nii.gz", source / "d.mha")
    with caplog.at_level("INFO"):
        assert organize_by_names(source, target) == 3
    assert sorted(file.name for file in (target / "imagesTr").iterdir()) == [
        *("a_0000.nii.gz", "b_0000.nii.gz", "c_0000.nii.gz"),
    ]
    assert all(name in caplog.text for name in ("a_seg.nii.gz", "b_0001.nii.gz", "labels/x.nii.gz", "d.mha"))
