"""Regions: boxes in mm against nibabel's arithmetic on the file's own voxels, labels, files of boxes."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.embedding.regions import (
    WorldBox,
    box_region,
    foreground_box,
    label_regions,
    read_boxes,
    volume_region,
)
from tests.evaluation.embedding.small import body, write_volume

HEADING = "case,region,x_min,x_max,y_min,y_max,z_min,z_max\n"
AFFINES = {
    "flipped": np.array([[-2.0, 0, 0, 60], [0, 3, 0, -40], [0, 0, -5, 100], [0, 0, 0, 1]]),
    "turned axes": np.array([[0, 0, 5.0, -30], [-2.0, 0, 0, 45], [0, 3, 0, 7], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_a_box_is_where_nibabel_says(name, tmp_path):
    """At the file's own spacing a voxel of the prepared grid is one of the file, so the voxels must be the same."""
    affine = AFFINES[name]
    hu = body((24, 20, 16))
    path = write_volume(tmp_path / "a.nii.gz", hu, affine)
    spacing = tuple(np.abs(nib.as_closest_canonical(nib.load(path)).affine[:3, :3]).max(0))
    prepared = prepare_case(Case("a", "", path), PrepareSettings(spacing=spacing), is_whole=True)
    world = apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, hu.shape), indexing="ij"), -1))
    low = np.quantile(world.reshape(-1, 3), 0.3, axis=0) + 0.1
    high = np.quantile(world.reshape(-1, 3), 0.7, axis=0) + 0.3
    inside = ((world >= low) & (world < high)).all(-1)
    expected = np.sort((hu[inside].clip(-175, 250) + 175) / 425)
    region = box_region(WorldBox("b", low, high), prepared["image"].shape[1:], prepared["affine"])
    box = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
    found = prepared["image"][0][box][region.mask]
    np.testing.assert_allclose(np.sort(found), expected, atol=1e-6)
    middle = [(world[inside].min(0) + world[inside].max(0)) / 2]
    np.testing.assert_allclose([region.centre(prepared["affine"])], middle, atol=1e-6)


def test_a_box_in_a_rotated_volume_is_no_box_of_its_voxels():
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ np.diag([2.0, 2, 4])
    affine = nib.affines.from_matvec(turn, [10, -5, 0])
    box = WorldBox("b", np.array([0.0, 5, 8]), np.array([30.0, 40, 33]))
    shape = (30, 28, 20)
    world = apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    expected = ((world >= box.low) & (world < box.high)).all(-1)
    region = box_region(box, shape, affine)
    found = np.zeros(shape, bool)
    found[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))] = region.mask
    assert np.array_equal(found, expected)
    assert not region.mask.all()


def test_a_box_smaller_than_a_voxel_is_its_voxel_and_one_outside_is_refused():
    affine = np.diag([4.0, 4, 4, 1])
    region = box_region(WorldBox("b", np.array([9.0, 9, 9]), np.array([10.0, 10, 10])), (8, 8, 8), affine)
    assert region.start == (2, 2, 2)
    assert region.mask.shape == (1, 1, 1)
    cut = box_region(WorldBox("b", np.array([-50.0, 0, 0]), np.array([9.0, 9, 9])), (8, 8, 8), affine)
    assert (cut.start, cut.stop) == ((0, 0, 0), (3, 3, 3))
    with pytest.raises(ValueError, match=r"the box 100\.\.110 x 0\.\.9 x 0\.\.9 mm lies outside"):
        box_region(WorldBox("b", np.array([100.0, 0, 0]), np.array([110.0, 9, 9])), (8, 8, 8), affine)


def test_labels_are_regions():
    label = np.zeros((9, 8, 7), np.uint8)
    label[1:4, 2:3, 3:6] = 2
    label[7, 7, 6] = 2
    label[5, 5, 5] = 5
    two, five = label_regions(label)
    assert (two.name, five.name) == ("label_2", "label_5")
    assert (two.start, two.stop, two.mask.sum()) == ((1, 2, 3), (8, 8, 7), 10)
    assert (five.start, five.mask.tolist()) == ((5, 5, 5), [[[True]]])


def test_the_region_of_a_volume_is_its_foreground():
    image = np.zeros((2, 9, 9, 9), np.float32)
    image[0, 2, 3, 4], image[1, 5, 3, 4] = 0.5, 0.1
    assert foreground_box(image) == ([2, 3, 4], [6, 4, 5])
    assert volume_region(image).mask.shape == (4, 1, 1)
    with pytest.raises(ValueError, match="no voxel lies above the lowest value"):
        volume_region(image * 0)


def test_boxes_are_read_by_case(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text(HEADING + "a,left,0,1,-2,2,3,4.5\nb,,0,1,0,1,0,1\na,,0,1,0,1,0,1\n")
    boxes = read_boxes(path)
    assert [box.name for box in boxes["a"]] == ["left", "box_1"]
    assert [box.name for box in boxes["b"]] == ["box_0"]
    assert (boxes["a"][0].low.tolist(), boxes["a"][0].high.tolist()) == ([0, -2, 3], [1, 2, 4.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,x_min,x_max\n", "missing: y_min, y_max, z_min, z_max"),
        (HEADING + "a,,0,1,0,1,0,\n", "line 2: expected six numbers in mm, got 0, 1, 0, 1, 0, "),
        (HEADING + "a,,0,1,0,1,0\n", "line 2: expected six numbers in mm"),
        (HEADING + "a,,0,1,0,1,2,2\n", "line 2: expected each minimum below its maximum"),
        (HEADING + "a,,0,1,0,1,0,inf\n", "line 2: expected each minimum below its maximum"),
        (HEADING + "a,x,0,1,0,1,0,1\na,x,0,1,0,1,0,1\n", "line 3: two boxes of a are named x"),
    ],
)
def test_faulty_boxes_are_refused_by_line(text, message, tmp_path):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_boxes(tmp_path / "boxes.csv")
