import math

import nibabel
import numpy as np
import pytest
import torch

from hyspark.data.cases import Case
from hyspark.data.phantom import LABELS, make_phantom
from hyspark.data.prepare import prepare_all
from hyspark.data.settings import PrepareSettings
from hyspark.engine.evaluate import Scores, dice, load_label, mean_dice, read_scores, segment, to_grid, write_scores


def save_phantom(folder, orientation, spacing):
    phantom = make_phantom(3, spacing=spacing, orientation=orientation)
    image, label = folder / "x_0000.nii.gz", folder / "x.nii.gz"
    nibabel.save(nibabel.Nifti1Image(phantom.image, phantom.affine), image)
    nibabel.save(nibabel.Nifti1Image(phantom.label, phantom.affine), label)
    return Case("x", "Dataset001_X", image, label)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
def test_a_prediction_returns_to_the_grid_of_its_input(tmp_path, orientation):
    spacing = (6.0, 5.0, 4.0)
    case = save_phantom(tmp_path, orientation, spacing)
    (volume,) = prepare_all([case], PrepareSettings(spacing=spacing), tmp_path / "store", 1, progress=False)
    prepared = torch.from_numpy(volume.read("label", (0, 0, 0), volume.entry.shape))
    truth = load_label(case.label)
    back = to_grid(prepared, volume.entry.affine, truth)
    assert back.shape == truth.shape
    assert torch.equal(back, torch.as_tensor(truth).to(torch.uint8))


def test_a_prediction_at_another_spacing_returns_to_about_the_same_organs(tmp_path):
    case = save_phantom(tmp_path, "LAS", (5.0, 5.0, 5.0))
    (volume,) = prepare_all([case], PrepareSettings(spacing=(3.0, 3.0, 4.0)), tmp_path / "store", 1, progress=False)
    prepared = torch.from_numpy(volume.read("label", (0, 0, 0), volume.entry.shape))
    truth = load_label(case.label)
    values = dice(to_grid(prepared, volume.entry.affine, truth), truth, len(LABELS))
    assert min(values) > 0.85


def test_dice_is_twice_the_overlap_over_the_sum():
    truth = torch.zeros(1, 4, 4, 4)
    truth[0, :2] = 1
    prediction = torch.zeros(1, 4, 4, 4)
    prediction[0, 1:3] = 1
    prediction[0, 3] = 2
    values = dice(prediction, truth, 4)
    assert values[0] == pytest.approx(2 * 16 / (32 + 32))
    assert math.isnan(values[1])
    assert math.isnan(values[2])


def test_mean_dice_leaves_out_cases_without_the_organ():
    nan = float("nan")
    means = mean_dice([[0.5, nan, nan], [0.7, 0.2, nan]], ["liver", "spleen", "aorta"])
    assert means["liver"] == pytest.approx(0.6)
    assert means["spleen"] == pytest.approx(0.2)
    assert math.isnan(means["aorta"])


class Brightness(torch.nn.Module):
    """Class 1 where a voxel is bright: a network whose right answer is known."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], dim=1)


def test_windows_cover_the_whole_volume(tmp_path):
    case = save_phantom(tmp_path, "RAS", (6.0, 6.0, 6.0))
    (volume,) = prepare_all([case], PrepareSettings(spacing=(6.0, 6.0, 6.0)), tmp_path / "store", 1, progress=False)
    image = volume.read("image", (0, 0, 0), volume.entry.shape)
    labels = segment(Brightness(), volume, torch.device("cpu"), (32, 32, 16), 0.5, 2)
    sure = np.abs(image - 0.5) > 1e-4
    assert np.array_equal(labels.numpy()[sure], (image > 0.5)[sure])


def test_scores_of_best_and_last_live_side_by_side(tmp_path):
    write_scores(tmp_path, best=Scores(3, 0.5, {"liver": 0.5}, {"x": [0.5]}))
    write_scores(tmp_path, last=Scores(9, 0.4, {"liver": 0.4}, {"x": [0.4]}))
    assert read_scores(tmp_path) == {"best": {"liver": 0.5}, "last": {"liver": 0.4}}
    with pytest.raises(FileNotFoundError, match=r"dice\.json"):
        read_scores(tmp_path / "other")
