"""Layouts and files that other programs write: lists of nnU-Net v1, splits_final.json, byte order marks."""

import json

import nibabel as nib
import numpy as np
import pytest

from hyspark.data.datasets.build import read_folder
from hyspark.data.datasets.datalist_json import read_datalist
from hyspark.data.quality.check import find_dataset
from hyspark.utils.paths import load_json, nifti_files, nifti_stem


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
    assert [nifti_stem(file) for file in nifti_files(tmp_path)] == ["A", "b", "c"]
