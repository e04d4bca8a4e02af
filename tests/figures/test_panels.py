"""Pictures: what is shown where, in which colour and shape, and how a figure becomes a file."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from hyspark.figures import curves, panels

SHAPE = (32, 48, 64)
ROWS = ("axial", "coronal", "sagittal")


def image_of(figure, label, index=0):
    """What the axes called `label` show: the array as drawn, row 0 at the top."""
    (axes,) = [axes for axes in figure.axes if axes.get_label() == label]
    return axes.images[index].get_array()


def random_volume(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).uniform(0.1, 0.9, shape)


def test_marker_at_the_patients_right_front_and_head_appears_where_radiologists_look():
    volume = np.zeros(SHAPE)
    volume[-4:, :, :] = 0.3  # right
    volume[:, -4:, :] = 0.6  # front
    volume[:, :, -4:] = 0.9  # head
    figure = panels.reconstruction_panel(volume, np.ones(SHAPE, bool), volume, title="t")
    axial, coronal, sagittal = (image_of(figure, f"{row} input") for row in ROWS)
    assert axial.shape == (48, 32)
    assert coronal.shape == (64, 32)
    assert sagittal.shape == (64, 48)
    assert (axial[4:, :4] == 0.3).all()  # right on the viewer's left
    assert (axial[:4] == 0.6).all()  # front on top
    assert axial[4:, 4:].max() == 0
    assert (coronal[:4] == 0.9).all()  # head on top
    assert (coronal[4:, :4] == 0.3).all()
    assert (sagittal[:4] == 0.9).all()
    assert (sagittal[4:, :4] == 0.6).all()  # front on the viewer's left
    for row in ROWS:
        (axes,) = [axes for axes in figure.axes if axes.get_label() == f"{row} input"]
        assert axes.images[0].origin == "upper"


def test_reconstruction_columns_show_the_input_where_visible_and_the_network_where_hidden():
    volume, reconstruction = random_volume(0), random_volume(1)
    visible = np.random.default_rng(2).random(SHAPE) < 0.4
    figure = panels.reconstruction_panel(volume, visible, reconstruction, title="t")
    for row in ROWS:
        columns = ("input", "masked", "reconstruction", "absolute error")
        shown, masked, completed, error = (image_of(figure, f"{row} {column}") for column in columns)
        hidden = np.ma.getmaskarray(masked)
        assert hidden.any()
        assert not hidden.all()
        np.testing.assert_array_equal(masked[~hidden], shown[~hidden])
        np.testing.assert_array_equal(completed[~hidden], shown[~hidden])
        assert (error[~hidden] == 0).all()
        assert (completed[hidden] != shown[hidden]).all()
        np.testing.assert_allclose(error[hidden], np.abs(completed - shown)[hidden])
    axial = np.ma.getmaskarray(image_of(figure, "axial masked"))
    np.testing.assert_array_equal(axial, ~visible[:, :, 32].T[::-1, ::-1])


def test_hidden_patches_have_a_colour_of_their_own_and_windows_are_fixed():
    volume = random_volume() * 0.2
    figure = panels.reconstruction_panel(volume, np.zeros(SHAPE, bool), volume, title="t")
    images = {axes.get_label(): axes.images[0] for axes in figure.axes if axes.images}
    assert images["axial input"].get_clim() == (0, 1)
    assert images["axial reconstruction"].get_clim() == (0, 1)
    assert images["axial absolute error"].get_clim() == (0, 0.5)
    masked = images["axial masked"]
    colours = np.unique(masked.cmap(masked.norm(masked.get_array())).reshape(-1, 4), axis=0)
    assert len(colours) == 1
    red, _, blue, _ = colours[0]
    assert abs(red - blue) > 0.1  # not a grey


def test_pixels_keep_the_shape_of_the_voxels():
    volume = random_volume(shape=(20, 20, 10))
    figure = panels.reconstruction_panel(
        volume, np.ones((20, 20, 10), bool), volume, title="t", spacing=(1.0, 2.0, 6.0)
    )
    width, height = figure.get_size_inches()
    expected = {"axial": 40 / 20, "coronal": 60 / 20, "sagittal": 60 / 40}
    for axes in figure.axes:
        row = axes.get_label().split(" ")[0]
        if row in expected and axes.images:
            axes.apply_aspect()
            box = axes.get_position()
            assert box.height * height / (box.width * width) == pytest.approx(expected[row], rel=0.02)


def test_panels_refuse_shapes_that_do_not_match():
    volume = random_volume()
    with pytest.raises(ValueError, match="visible"):
        panels.reconstruction_panel(volume, np.ones((2, 3, 4), bool), volume, title="t")
    with pytest.raises(ValueError, match="batch and channel"):
        panels.segmentation_panel(volume[None], volume[None], volume[None], ["background"], title="t")


def test_segmentation_shows_truth_and_prediction_through_the_centre_of_mass():
    truth, prediction = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    truth[20:25, 30:35, 50:55] = 2
    prediction[20:25, 30:35, 52] = 1
    names = ["background", "liver", "spleen"]
    figure = panels.segmentation_panel(random_volume(), truth, prediction, names, title="t", spacing=(1, 1, 2))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names[1:]
    liver, spleen = (patch.get_facecolor()[:3] for patch in legend.get_patches())
    for column, labels, colour in (("truth", truth, spleen), ("prediction", prediction, liver)):
        painted = image_of(figure, f"axial {column}", 1)
        inside = (labels[:, :, 52] > 0).T[::-1, ::-1]
        assert inside.sum() == 25
        np.testing.assert_array_equal(painted[..., 3] > 0, inside)
        np.testing.assert_allclose(painted[inside][:, :3], np.tile(colour, (25, 1)))


def test_the_prediction_has_the_outlines_of_the_truth():
    truth = np.zeros((12, 10, 8), int)
    truth[0:4, 3:7, 2:6] = 1
    figure = panels.segmentation_panel(
        np.zeros(truth.shape), truth, np.zeros_like(truth), ["background", "liver"], title="t", spacing=(1, 1, 1)
    )
    axes = {axes.get_label(): axes for axes in figure.axes}
    assert not axes["axial truth"].collections
    (lines,) = axes["axial prediction"].collections
    points = np.concatenate([path.vertices for path in lines.get_paths()])
    # as displayed, both axes are reversed: columns 8 to 11 of 12, rows 3 to 6 of 10, to half a voxel around them
    np.testing.assert_allclose(points.min(0), [7.5, 2.5])
    np.testing.assert_allclose(points.max(0), [11.5, 6.5])
    assert axes["axial prediction"].get_xlim() == axes["axial truth"].get_xlim() == (-0.5, 11.5)


def test_segmentation_without_any_label_shows_the_centre():
    volume = random_volume()
    empty = np.zeros(SHAPE, int)
    figure = panels.segmentation_panel(volume, empty, empty, ["background"], title="t", spacing=(1, 1, 1))
    np.testing.assert_array_equal(image_of(figure, "axial input"), volume[:, :, 32].T[::-1, ::-1])


def test_segmentation_names_the_label_that_has_no_name():
    truth = np.zeros(SHAPE, int)
    with pytest.raises(ValueError, match=r"expected a name for every label from 0 .background. to 3, got 2 names"):
        panels.segmentation_panel(
            random_volume(), truth, truth + 3, ["background", "liver"], title="t", spacing=(1, 1, 1)
        )


def test_neighbouring_classes_differ_in_colour():
    colours = panels.class_colours(19)[1:, :3]
    assert len(np.unique(colours, axis=0)) == 18


def test_saved_figure_is_a_png_with_the_hidden_colour_and_no_leftovers(tmp_path):
    volume = random_volume()
    figure = panels.reconstruction_panel(volume, np.zeros(SHAPE, bool), volume, title="case $1 of_2")
    path = tmp_path / "new" / "folder" / "picture.png"
    panels.save_figure(figure, path)
    panels.save_figure(figure, path)
    pixels = imread(path)
    assert pixels.shape[1] == round(figure.get_size_inches()[0] * 110)
    is_hidden = np.isclose(pixels[..., :3], to_rgba(panels.HIDDEN)[:3], atol=0.01).all(axis=-1)
    assert 0.1 < is_hidden.mean() < 0.5
    assert [entry.name for entry in path.parent.iterdir()] == ["picture.png"]


def test_smoothing_keeps_a_constant_and_bridges_missing_values():
    values = np.full(200, 0.7)
    values[50] = np.nan
    np.testing.assert_allclose(curves.smooth(values), 0.7)
    noisy = np.random.default_rng(0).normal(size=400)
    assert curves.smooth(noisy).std() < 0.5 * noisy.std()


def test_no_curve_is_no_figure():
    assert curves.curves_figure({"epoch": (np.arange(3.0), np.arange(3.0))}, dark=False) is None


def test_drawing_needs_neither_pyplot_nor_torch(tmp_path):
    code = (
        "import pathlib, sys\n"
        "import numpy as np\n"
        "from hyspark.figures.curves import curves_figure\n"
        "from hyspark.figures.panels import save_figure\n"
        "save_figure(curves_figure({'loss': (np.zeros(1), np.ones(1))}, dark=True), pathlib.Path(sys.argv[1]))\n"
        "print(sorted({'matplotlib.pyplot', 'torch'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "curve.png")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
