from itertools import permutations

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from scipy.ndimage import map_coordinates

from hyspark.config.classification import ClassificationConfig
from hyspark.config.recipes import as_plain
from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.settings import PrepareSettings
from hyspark.data.synthetic.phantom import make_phantom
from hyspark.evaluation.segmentation.inference import hybird_from_config, load_network
from hyspark.evaluation.segmentation.label_grids import largest_components
from hyspark.evaluation.segmentation.windows import Windows
from hyspark.training import checkpoint
from tests.evaluation.segmentation.whole import to_grid, whole_scores

CPU = torch.device("cpu")


def smooth_scores(shape, num_classes=4):
    """Class scores that vary slowly, so that few voxels are near a tie."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(1, num_classes, 4, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]


def grid(spacing, axes=(0, 1, 2), signs=(1, 1, 1), origin=(0, 0, 0)):
    """Affine of a grid whose axis i runs along the world's axis `axes[i]`, forwards or backwards."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for i, (axis, sign, edge) in enumerate(zip(axes, signs, spacing, strict=True)):
        affine[axis, i] = sign * edge
    affine[:3, 3] = origin
    return affine


def expected(scores, affine, shape, reference):
    """What SciPy's general interpolation gives, voxel by voxel; and how sure the likeliest class is."""
    where = np.linalg.solve(affine, reference) @ np.vstack(
        [np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1), np.ones((1, np.prod(shape)))]
    )
    there = np.stack([map_coordinates(s, where[:3], order=1, mode="nearest", output=float) for s in scores.numpy()])
    size = np.array(scores.shape[1:])[:, None]
    inside = ((where[:3] >= -0.5 - 1e-6) & (where[:3] <= size - 0.5 + 1e-6)).all(0)
    ranked = np.sort(there, axis=0)
    labels = np.where(inside, there.argmax(0), 0)
    return labels.reshape(shape), (ranked[-1] - ranked[-2] > 1e-4).reshape(shape)


def test_the_same_grid_gives_the_likeliest_class():
    scores = torch.randn(5, 7, 6, 9)
    affine = grid((1.5, 0.7, 3.0), signs=(-1, 1, 1), origin=(12.3, -4.5, 700.1))
    labels = to_grid(scores, affine, (7, 6, 9), affine)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, scores.argmax(0).numpy())


@pytest.mark.parametrize("axes", list(permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_flipped_and_permuted_grids_at_another_spacing(axes, signs):
    scores = smooth_scores((9, 11, 13))
    affine = grid((1.5, 1.5, 1.5), origin=(3, 5, 7))
    origin = [(-2.0 if sign > 0 else 21.0) for sign in np.array(signs)[np.argsort(axes)]]
    reference, shape = grid((0.7, 0.9, 2.1), axes, signs, origin), (30, 25, 12)
    labels = to_grid(scores, affine, shape, reference)
    wanted, sure = expected(scores, affine, shape, reference)
    assert len(np.unique(labels)) == 4
    assert np.array_equal(labels[sure], wanted[sure])


def test_linear_interpolation_is_monais():
    scores = smooth_scores((9, 8, 7))
    affine, reference = grid((2, 2, 3)), grid((0.8, 0.8, 1.0), signs=(-1, -1, 1), origin=(15, 13, 1))
    resample = SpatialResample(mode="bilinear", padding_mode="border", dtype="float64")
    moving = MetaTensor(scores, affine=torch.from_numpy(affine))
    there = resample(moving, dst_affine=torch.from_numpy(reference), spatial_size=(18, 16, 17))
    top = there.topk(2, dim=0).values
    sure = (top[0] - top[1] > 1e-4).numpy()
    labels = to_grid(scores, affine, (18, 16, 17), reference)
    assert sure.mean() > 0.9
    assert np.array_equal(labels[sure], there.argmax(0).numpy()[sure])


def test_a_voxel_reaches_half_a_voxel_around_its_centre():
    scores = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 4, 4, 4)
    affine = grid((2.0, 2.0, 2.0), origin=(10, 10, 10))
    reference = grid((0.5, 2.0, 2.0), origin=(5, 10, 10))  # centres on 5, 5.5, ...; the region is 9 to 17
    labels = to_grid(scores, affine, (40, 4, 4), reference)
    assert np.array_equal(np.flatnonzero(labels[:, 0, 0]), np.arange(8, 25))
    assert labels[8:25].all()


def test_a_reference_elsewhere_is_background():
    affine = grid((1, 1, 1))
    assert not to_grid(torch.ones(1, 3, 3, 3), affine, (4, 4, 4), grid((1, 1, 1), origin=(9, 0, 0))).any()


def test_a_sheared_reference_gets_the_same_by_the_long_way():
    scores = smooth_scores((9, 11, 13))
    affine = grid((1.5, 1.5, 1.5), origin=(3, 5, 7))
    reference = grid((0.9, 0.9, 2.1), origin=(2, 4, 6))
    reference[1, 2] = 0.4
    labels = to_grid(scores, affine, (15, 18, 9), reference)
    wanted, sure = expected(scores, affine, (15, 18, 9), reference)
    assert len(np.unique(labels)) == 4
    assert np.array_equal(labels[sure], wanted[sure])


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
def test_what_was_prepared_returns_to_its_file(tmp_path, orientation):
    spacing = (6.0, 5.0, 4.0)
    phantom = make_phantom(3, spacing=spacing, orientation=orientation)
    case = Case("x", "D", tmp_path / "x_0000.nii.gz", tmp_path / "x.nii.gz")
    nibabel.save(nibabel.Nifti1Image(phantom.image, phantom.affine), case.image)
    nibabel.save(nibabel.Nifti1Image(phantom.label, phantom.affine), case.label)
    prepared = prepare_case(case, PrepareSettings(spacing=spacing))
    num_classes = int(phantom.label.max()) + 1
    scores = torch.nn.functional.one_hot(torch.from_numpy(prepared["label"]).long(), num_classes).permute(3, 0, 1, 2)
    back = to_grid(scores.float(), prepared["affine"], phantom.label.shape, phantom.affine)
    assert np.array_equal(back, phantom.label)


class Brightness(torch.nn.Module):
    """Class 1 where a voxel is bright: a network whose right answer is known."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], dim=1)


class Sides(torch.nn.Module):
    """Class 1 in the first half of a window's first axis, class 2 in the other: right only in whole windows."""

    def forward(self, x):
        side = torch.linspace(-1, 1, x.shape[2])[None, None, :, None, None].expand_as(x)
        return torch.cat([torch.zeros_like(x), -side, side + 0.1], dim=1)


@pytest.mark.parametrize("flips", [(), (0, 1, 2)])
def test_windows_cover_the_whole_volume(flips):
    image = torch.rand(40, 33, 20)
    scores = whole_scores(Brightness(), image, Windows((32, 32, 16), 0.5, 3, flips), CPU)
    assert scores.shape == (2, 40, 33, 20)
    assert torch.allclose(scores[1], image - 0.5, atol=1e-5)


def test_scores_are_averaged_over_flips_and_sides_change_places():
    image, size = torch.rand(16, 16, 16), (16, 16, 16)
    (plain, flipped, swapped) = (
        whole_scores(Sides(), image, Windows(size, **extra), CPU)
        for extra in ({}, {"flips": (0,)}, {"flips": (0,), "swaps": ((1, 2),)})
    )
    assert torch.allclose(flipped, (plain + plain.flip(1)) / 2, atol=1e-6)
    assert torch.allclose(swapped, (plain + plain.flip(1)[[0, 2, 1]]) / 2, atol=1e-6)
    assert not torch.allclose(flipped, swapped, atol=1e-3)


def test_sides_change_places_in_flips_of_the_first_axis_alone():
    image, size = torch.rand(16, 16, 16), (16, 16, 16)
    plain = whole_scores(Sides(), image, Windows(size), CPU)
    other = whole_scores(Sides(), image, Windows(size, flips=(1, 2), swaps=((1, 2),)), CPU)
    assert torch.allclose(other, plain, atol=1e-6)


def test_the_largest_part_of_each_class_is_kept():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[0:3, 0:3, 0:3] = 1
    labels[3, 3, 3] = 1  # touches with a corner
    labels[6, 6, 6] = 1
    labels[6, 6, 7] = 2
    labels[0, 0, 5:8] = 2
    kept = largest_components(labels, 4)
    wanted = labels.copy()
    wanted[6, 6, 6:8] = 0
    assert np.array_equal(kept, wanted)
    assert labels[6, 6, 6] == 1


def test_of_parts_of_one_size_the_first_is_kept():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 0, 0:2] = labels[5, 5, 4:6] = 1
    kept = largest_components(labels, 3)
    assert np.argwhere(kept).tolist() == [[0, 0, 0], [0, 0, 1]]


def test_a_network_comes_back_from_its_file(finetuning, tmp_path):
    names = ["background", "liver", "spleen"]
    model = hybird_from_config(finetuning, 3)
    contents = {"model": model.state_dict(), "config": as_plain(finetuning), "classes": names}
    checkpoint.save(contents, tmp_path / "best.pth")
    volumes = torch.rand(1, 1, 32, 32, 32)
    for path in (tmp_path, tmp_path / "best.pth"):
        loaded, config, classes, _ = load_network(path)
        assert config == finetuning
        assert classes == names
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(volumes), model.eval()(volumes))


def test_files_that_are_no_fine_tuned_network(finetuning, tmp_path):
    model = hybird_from_config(finetuning, 3)
    with pytest.raises(FileNotFoundError, match=r"holds no best\.pth"):
        load_network(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_network(tmp_path / "none.pth")
    path = tmp_path / "encoder.pth"
    torch.save({key: value for key, value in model.state_dict().items() if not key.startswith("decoder.")}, path)
    with pytest.raises(
        ValueError, match="expected a fine-tuned network for segmentation, got weights without settings"
    ):
        load_network(path)
    torch.save({"model": model.state_dict(), "config": as_plain(finetuning), "optimizer": {}}, path)
    with pytest.raises(ValueError, match="a state to continue training from"):
        load_network(path)
    whole = {"model": model.state_dict(), "config": as_plain(finetuning), "classes": ["background", "liver"]}
    torch.save(whole, path)
    with pytest.raises(ValueError, match="its weights do not fit the network"):
        load_network(path)
    torch.save(whole | {"config": as_plain(ClassificationConfig()), "weights": "best"}, path)
    with pytest.raises(ValueError, match="for segmentation, got classification"):
        load_network(path)
    torch.save(whole | {"config": as_plain(finetuning) | {"colour": 3}}, path)
    with pytest.raises(ValueError, match=r"encoder\.pth: unknown key 'colour'"):
        load_network(path)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="a text, no weights"):
        load_network(path)
