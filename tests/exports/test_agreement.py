"""An export is compared with its run: on which image, and what a difference does."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine

from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.description import describe_network, read_description
from hyspark.evaluation.segmentation.inference import load_network
from hyspark.exports import deploy
from hyspark.exports.agreement import compare_labels, compare_scores
from hyspark.exports.check_image import make_check_image
from hyspark.exports.torchscript_export import write_torchscript
from tests.exports.tiny_runs import NAMES, write_ct, write_labelled, write_run


def test_dice_is_of_the_organs_that_either_holds():
    one = np.array([0, 1, 1, 1, 0, 0])
    agreement = compare_labels(one, np.array([0, 1, 1, 0, 3, 0]), ["background", "a", "b", "c"])
    assert agreement.dice == {"a": 0.8, "c": 0.0}
    assert (agreement.different, agreement.total) == (2, 6)
    assert "neither holds an organ" in compare_labels(0 * one, 0 * one, NAMES).text()
    with pytest.raises(ValueError, match=r"expected one shape, got \(6,\) and \(5,\)"):
        compare_labels(one, one[:5], NAMES)


def test_scores_differ_by_rounding_alone():
    def run(crops):
        return crops * 3

    assert "at most" in compare_scores(run, lambda crops: crops * 3.0001, [(2, 1, 4, 4, 4)], "net.pt")
    for other in (lambda crops: crops * 3.1, lambda crops: crops * np.nan):
        with pytest.raises(ValueError, match=r"net.pt: expected the class scores of the run.*nothing is written"):
            compare_scores(run, other, [(2, 1, 4, 4, 4)], "net.pt")


def test_a_file_with_other_scores_does_not_appear(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")

    def write_other(network, *rest):
        with torch.no_grad():
            network = load_network(run).network
            network.decoder.out.conv.bias[1] += 5
        write_torchscript(network, *rest)

    monkeypatch.setattr(deploy, "write_torchscript", write_other)
    with pytest.raises(ValueError, match="expected the class scores of the run"):
        deploy.export_torchscript(run, tmp_path / "net.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_with_other_settings_does_not_appear(tmp_path, monkeypatch):
    """Its scores of crops are those of the run."""
    run, image = write_run(tmp_path / "run"), write_ct(tmp_path / "images")

    def describe_other(config, names, trained_on):
        return describe_network(replace(config, hu_max=400.0), names, trained_on)

    monkeypatch.setattr(deploy, "describe_network", describe_other)
    with pytest.raises(ValueError, match="expected the label map of `hyspark predict`"):
        deploy.export_torchscript(run, tmp_path / "net.pt", str(image))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run"]


def test_a_region_of_a_validation_case_lies_where_it_was(tmp_path):
    """By the world coordinates of both images, for axes in any order."""
    data = write_labelled(tmp_path / "Dataset001_Two")
    run = write_run(tmp_path / "run", data=str(data), val_fraction=0.5, crop_size=(16, 16, 16), spacing=(3.0, 4.0, 5.0))
    found = make_check_image(load_network(run).config, "", tmp_path / "check")
    assert found.text.startswith("a region of the validation case case")
    (path,) = found.folder.iterdir()
    region = nib.load(path)
    whole = nib.load(data / "imagesTr" / f"{found.text.split()[-1]}_0000.nii.gz")
    assert np.prod(region.shape) < np.prod(whole.shape)
    indices = np.argwhere(np.ones(region.shape, bool))
    at = apply_affine(np.linalg.inv(whole.affine) @ region.affine, indices)
    assert np.allclose(at, at.round(), atol=1e-4)
    values = np.asanyarray(whole.dataobj)[tuple(at.round().astype(int).T)]
    assert np.array_equal(values, np.asanyarray(region.dataobj).ravel())
    labels = np.asanyarray(nib.load(data / "labelsTr" / f"{found.text.split()[-1]}.nii.gz").dataobj)
    assert labels[tuple(at.round().astype(int).T)].any()


def test_a_named_image_takes_its_channels_along(tmp_path):
    config = load_network(write_run(tmp_path / "run", image_channels=(0, 2))).config
    image = write_ct(tmp_path / "images", (0, 2))
    found = make_check_image(config, str(image), tmp_path / "check")
    assert sorted(path.name for path in found.folder.iterdir()) == ["check_0000.nii.gz", "check_0002.nii.gz"]
    (tmp_path / "images" / "ct_0002.nii.gz").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="ct_0002"):
        make_check_image(config, str(image), tmp_path / "other")


def test_a_description_from_a_later_version_is_refused(tmp_path):
    trained = load_network(write_run(tmp_path / "run"))
    known = json.loads(describe_network(trained.config, trained.names, trained.trained_on))
    read = read_description(json.dumps(known), tmp_path)
    for name in (*PrepareSettings.__dataclass_fields__, "crop_size", "infer_overlap", "left_right", "flip_prob"):
        assert getattr(read.config, name) == getattr(trained.config, name), name
    for changed, message in (
        ({"format": 2}, "written by hyspark"),
        ({"task": "classification"}, "another program or task"),
        ({"settings": {"spacing": "x"}}, "spacing"),
    ):
        with pytest.raises(ValueError, match=message):
            read_description(json.dumps(known | changed), tmp_path)
    for text in ("no JSON", "[]", "{}"):
        with pytest.raises(ValueError, match=r"expected the settings that `hyspark export` writes"):
            read_description(text, tmp_path)
