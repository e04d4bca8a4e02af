"""nnU-Net's label "ignore": in neither loss, crops nor scores."""

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch

from hyspark.data.datasets.build import read_folder
from hyspark.data.datasets.cases import UNANNOTATED, class_values, ignored_value
from hyspark.data.datasets.datalist_json import read_datalist, write_datalist
from hyspark.data.preprocessing.prepare import prepare_missing, stored_volumes
from hyspark.data.quality.check import check_dataset
from hyspark.data.quality.faults import label_faults
from hyspark.data.readers.nifti import read_label
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.metrics import dice, score_case
from hyspark.training.labelled_cases import label_fault
from hyspark.training.losses import DiceAndCrossEntropy

LABELS = {"background": 0, "ball": 1, "ignore": 2}
SETTINGS = PrepareSettings(spacing=(2.0, 2.0, 2.0))


@pytest.fixture
def folder(tmp_path):
    """Two cases with a ball and a plate of ignored voxels."""
    rng = np.random.default_rng(0)
    data = tmp_path / "Dataset001_Ball"
    label = np.zeros((20, 18, 17), np.uint8)
    label[4:8, 4:8, 4:8] = 1
    label[:, :, 12:] = 2
    for part in ("imagesTr", "labelsTr"):
        (data / part).mkdir(parents=True)
    for name in ("a", "b"):
        voxels = rng.normal(40, 60, label.shape).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), data / "imagesTr" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, np.diag([2.0, 2, 2, 1])), data / "labelsTr" / f"{name}.nii.gz")
    (data / "dataset.json").write_text(json.dumps({"labels": LABELS, "channel_names": {"0": "CT"}}))
    return data


def test_ignore_is_no_class():
    assert class_values(LABELS, "list") == {"background": 0, "ball": 1}
    assert class_values({"0": "background", "1": "ball", "2": "ignore"}, "list") == {"background": 0, "ball": 1}
    assert ignored_value(LABELS, "list") == ignored_value({"0": "background", "2": "ignore"}, "list") == 2
    assert ignored_value({"background": 0}, "list") is None
    with pytest.raises(ValueError, match='"ignore": expected a value from 1 to 255, got 0'):
        ignored_value({"ignore": 0}, "list")


def test_regions_are_refused_by_name():
    with pytest.raises(ValueError, match=r"got regions .* for whole tumour; give each value a name of its own"):
        class_values({"background": 0, "whole tumour": [1, 2], "core": [2]} | {"core": 2}, "list")


def test_cases_carry_the_ignored_value_through_a_list(folder, tmp_path):
    datalist = read_folder(folder, seed=0, val_fraction=0.5)
    assert datalist.labels == {"background": 0, "ball": 1}
    write_datalist(datalist, tmp_path / "list.json")
    again = read_datalist(tmp_path / "list.json", require_labels=True)
    assert {case.ignore for case in (*again.training, *again.validation)} == {2}
    assert again.labels == datalist.labels


@pytest.mark.parametrize("target", ["folder", "list"])
def test_check_counts_the_ignored_value_as_declared(folder, tmp_path, target):
    write_datalist(read_folder(folder, seed=0, val_fraction=0.5), tmp_path / "list.json")
    examined, found = check_dataset(
        folder if target == "folder" else tmp_path / "list.json", hu_min=-175, num_workers=1, progress=False
    )
    kinds = {f.kind for seen in examined for f in seen.findings} | {f.kind for f in found.findings}
    assert not kinds & {"undeclared class", "unused class", "unreadable list"}, kinds


def test_prepared_labels_mark_ignored_voxels(folder, tmp_path):
    case = read_folder(folder, seed=0, val_fraction=0.5).training[0]
    assert not prepare_missing([case], SETTINGS, tmp_path / "store", 1, False)
    (volume,) = stored_volumes([case], SETTINGS, tmp_path / "store")
    label = volume.read("label", (0, 0, 0), volume.entry.shape)
    assert set(np.unique(label)) == {0, 1, UNANNOTATED}
    assert volume.entry.max_label == 1
    assert label_fault(volume, ["background", "ball"]) == ""
    rng = np.random.default_rng(0)
    assert all(label[volume.draw_voxel("labelled", rng)] == 1 for _ in range(50))
    assert volume.folder not in {
        v.folder for v in stored_volumes([type(case)(case.name, "", case.image, case.label)], SETTINGS, tmp_path)
    }
    assert set(np.unique(read_label(case.label, case.image, 2, 2).voxels)) == {0, 1, UNANNOTATED}
    with pytest.raises(ValueError, match="label values from 0 to 1"):
        read_label(case.label, case.image, 2)


@pytest.mark.parametrize("weight", [1.0, 0.2])
def test_the_loss_does_not_see_ignored_voxels(weight):
    torch.manual_seed(0)
    scores = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (1, 1, 4, 4, 4))
    labels[..., 2:] = UNANNOTATED
    loss = DiceAndCrossEntropy(3, weight, has_ignored=True)
    value = loss(scores, labels, float(loss.weight_sum(labels)))
    value.backward()
    assert (scores.grad[..., 2:] == 0).all()
    assert (scores.grad[..., :2] != 0).all()
    alone = loss(scores[..., :2], labels[..., :2], float(loss.weight_sum(labels[..., :2])))
    torch.testing.assert_close(value, alone)
    usual = DiceAndCrossEntropy(3, weight)
    torch.testing.assert_close(value, usual(scores[..., :2], labels[..., :2], float(usual.weight_sum(labels[..., :2]))))


def test_a_crop_of_ignored_voxels_alone_has_a_finite_loss():
    scores = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    labels = torch.full((1, 1, 4, 4, 4), UNANNOTATED)
    loss = DiceAndCrossEntropy(3, has_ignored=True)
    value = loss(scores, labels, float(loss.weight_sum(labels)))
    value.backward()
    assert math.isfinite(value.item())
    assert (scores.grad == 0).all()


def test_scores_do_not_see_ignored_voxels():
    rng = np.random.default_rng(0)
    prediction, truth = (rng.integers(0, 3, (12, 10, 8)).astype(np.uint8) for _ in range(2))
    expected_prediction, expected = prediction.copy(), truth.copy()
    truth[:, :, 5:] = UNANNOTATED
    expected_prediction[:, :, 5:] = expected[:, :, 5:] = 0
    assert dice(prediction, truth, 3) == dice(expected_prediction, expected, 3)
    assert score_case(prediction, truth, 3, (1, 1, 1), 1.0) == score_case(
        expected_prediction, expected, 3, (1, 1, 1), 1.0
    )


def test_255_without_a_name_is_no_class_and_the_fault_says_how_to_declare_it():
    """Programs write 255 for what is not annotated; it is not taken for that silently."""
    declared = frozenset((0, 1))
    (fault,) = label_faults({0.0: 5, 1.0: 3, 255.0: 2}, declared, None)
    assert fault[0] == "undeclared class"
    assert fault[1].endswith('declare "ignore": 255 among the labels of dataset.json')
    assert not [*label_faults({0.0: 5, 1.0: 3, 255.0: 2}, declared, 255)]
    ((_, text),) = label_faults({0.0: 5, 9.0: 2}, declared, None)
    assert "ignore" not in text
