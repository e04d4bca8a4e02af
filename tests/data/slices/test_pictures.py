"""Slices as images: which way up, how large, how bright."""

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform

from hyspark.data.readers.volumes import Volume, read_volume
from hyspark.data.settings import PictureSettings
from hyspark.data.slices.pictures import slice_picture, slice_pictures, why_skewed

PLAIN = PictureSettings()


def one(values, spacing=(1.0, 1.0), **settings):
    return slice_picture(np.array(values, dtype=np.int16), spacing, PictureSettings(**settings))


@pytest.mark.parametrize("stored", ["RAS", "LPS", "SAR", "IPL"])
@pytest.mark.parametrize(("axis", "number"), [("sagittal", 5), ("coronal", 6), ("axial", 7)])
def test_right_front_and_head_lie_where_radiologists_expect_them(tmp_path, stored, axis, number):
    """Bright: the voxel furthest to the patient's right, front and head. Dim: its neighbours along each axis."""
    hu = np.zeros((6, 7, 8), np.int16)
    hu[5, 6, 7] = 200
    hu[4, 6, 7], hu[5, 5, 7], hu[5, 6, 6] = 20, 40, 60
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(stored))
    nibabel.save(nibabel.Nifti1Image(hu, np.eye(4)).as_reoriented(turn), tmp_path / "a.nii")
    shown = dict(slice_pictures(*read_volume(Volume("a", "a", tmp_path / "a.nii")), PictureSettings(axis=axis)))
    lone = [at for at, picture in shown.items() if picture is not None]
    assert lone == [number - 1, number]
    right, down = {"sagittal": (40, 60), "coronal": (20, 60), "axial": (20, 40)}[axis]
    expected = np.zeros({"sagittal": (8, 7), "coronal": (8, 6), "axial": (7, 6)}[axis])
    expected[0, 0], expected[0, 1], expected[1, 0] = 200, right, down
    assert np.array_equal(shown[number], np.rint(expected * 255 / 200))


def test_an_oblique_volume_keeps_its_closest_axes():
    cos, sin = np.cos(0.3), np.sin(0.3)
    affine = np.array([[cos, -sin, 0, 5], [sin, cos, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1.0]])
    assert why_skewed(affine, "coronal") == ""
    (_, shown), *_ = slice_pictures(np.arange(24).reshape(2, 3, 4), affine, PLAIN)
    assert shown.shape == (3, 2)
    assert shown[0, 0] == 255


def test_a_tilted_gantry_skews_slices_across_the_acquired_ones():
    tilted = np.eye(4)
    tilted[1, 2], tilted[2, 2] = np.tan(np.deg2rad(12)), 1
    assert "by 12.0 degrees" in why_skewed(tilted, "sagittal")
    assert why_skewed(tilted, "axial") == ""
    assert why_skewed(tilted, "coronal") == ""


def test_minmax_reaches_from_black_to_white_in_each_picture():
    assert one([[-1000, 0], [500, 1000]]).tolist() == [[0, 128], [191, 255]]
    volume = np.arange(4, dtype=np.int16).reshape(2, 1, 2) * np.array([1, 1000], np.int16)
    assert [(shown.min(), shown.max()) for _, shown in slice_pictures(volume, np.eye(4), PLAIN)] == [(0, 255)] * 2


def test_a_window_clips():
    window = {"scaling": "window", "hu_min": -100.0, "hu_max": 155.0}
    assert one([[-3024, -100, -99], [0, 155, 3000]], **window).tolist() == [[0, 0, 1], [100, 255, 255]]
    assert one([[-1000, -500]], **window) is None


def test_a_bound_takes_padding_out_of_minmax():
    padded = [[-3024, -1024, 0, 1024]]
    assert one(padded).tolist() == [[0, 126, 190, 255]]
    assert one(padded, hu_min=-1024.0).tolist() == [[0, 0, 128, 255]]


def test_pixels_become_square():
    ramp = np.repeat(np.arange(4)[:, None], 6, 1)
    shown = one(ramp, spacing=(3.0, 1.0))
    assert shown.shape == (12, 6)
    assert (np.diff(shown[:, 0].astype(int)) >= 0).all()
    assert len(np.unique(shown)) > 8  # linear between rows, not repeated ones
    assert one(ramp, spacing=(1.0, 2.0)).shape == (4, 12)


def test_size_is_the_short_side_in_any_resolution():
    values = np.arange(200).reshape(10, 20)
    assert one(values, size=5).shape == (5, 10)
    assert one(values, spacing=(4.0, 1.0), size=5).shape == (10, 5)
    assert one(values, size=40).shape == (40, 80)


def test_shrinking_averages():
    values = np.zeros((32, 32), np.int16)
    values[:, 16:] = np.indices((32, 16)).sum(0) % 2 * 200
    shown = one(values, size=8, scaling="window", hu_min=0.0, hu_max=200.0)
    assert shown[2:6, 6].tolist() == pytest.approx([128] * 4, abs=3)


def test_blank_slices_and_stride():
    volume = np.zeros((2, 2, 7), np.int16)
    volume[0, 0, 3:] = 5
    assert [(at, shown is None) for at, shown in slice_pictures(volume, np.eye(4), PictureSettings(stride=3))] == [
        (0, True),
        (3, False),
        (6, False),
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"axis": "oblique"}, "axis: expected one of sagittal, coronal, axial"),
        ({"scaling": "zscore"}, "scaling: expected one of minmax, window"),
        ({"stride": 0}, "stride"),
        ({"size": -1}, "size"),
        ({"scaling": "window", "hu_min": 0.0}, "scaling window: expected hu_min and hu_max"),
        ({"scaling": "window", "hu_min": 5.0, "hu_max": 5.0}, "expected hu_min below hu_max"),
    ],
)
def test_settings_that_make_no_picture(settings, named):
    with pytest.raises(ValueError, match=named):
        PictureSettings(**settings)
