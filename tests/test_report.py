"""Pictures and report: what is shown where, what the HTML contains, and files that are damaged or missing."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from hyspark import report

SHAPE = (32, 48, 64)
ROWS = ("axial", "coronal", "sagittal")


def image_of(figure, label, index=0):
    """What the axes called `label` show: the array as drawn, row 0 at the top."""
    (axes,) = [axes for axes in figure.axes if axes.get_label() == label]
    return axes.images[index].get_array()


def random_volume(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).uniform(0.1, 0.9, shape)


@pytest.fixture
def run_folder(tmp_path):
    steps = [
        {"step": s, "epoch": s // 10, "loss": 1 / (s + 1), "lr": 1e-4, "wd": 0.04, "grad_norm": 1.0,
         "samples_per_second": 6.0, "data_wait": 0.01}
        for s in range(30)
    ]  # fmt: skip
    validation = [
        {"step": 9, "epoch": 0, "val_loss": 0.9},
        {"step": 9, "epoch": 0, "dice_mean": 0.4, "dice": {"liver": 0.5, "spleen": float("nan")}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps + validation)) + "\n")
    return tmp_path


def write(folder, **changes):
    arguments = {
        "title": "A run",
        "config": {"lr": 1e-4},
        "environment": {"python": "3"},
        "summary": {"loss": "1"},
    }
    return report.write_report(folder, **(arguments | changes)).read_text()


def test_marker_at_the_patients_right_front_and_head_appears_where_radiologists_look():
    volume = np.zeros(SHAPE)
    volume[-4:, :, :] = 0.3  # right
    volume[:, -4:, :] = 0.6  # front
    volume[:, :, -4:] = 0.9  # head
    figure = report.reconstruction_panel(volume, np.ones(SHAPE, bool), volume, title="t")
    axial, coronal, sagittal = (image_of(figure, f"{plane} input") for plane in ROWS)
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
    for plane in ROWS:
        (axes,) = [axes for axes in figure.axes if axes.get_label() == f"{plane} input"]
        assert axes.images[0].origin == "upper"


def test_reconstruction_columns_show_the_input_where_visible_and_the_network_where_hidden():
    volume, reconstruction = random_volume(0), random_volume(1)
    visible = np.random.default_rng(2).random(SHAPE) < 0.4
    figure = report.reconstruction_panel(volume, visible, reconstruction, title="t")
    for plane in ROWS:
        columns = ("input", "masked", "reconstruction", "absolute error")
        shown, masked, completed, error = (image_of(figure, f"{plane} {column}") for column in columns)
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
    figure = report.reconstruction_panel(volume, np.zeros(SHAPE, bool), volume, title="t")
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
    figure = report.reconstruction_panel(
        volume, np.ones((20, 20, 10), bool), volume, title="t", spacing=(1.0, 2.0, 6.0)
    )
    width, height = figure.get_size_inches()
    expected = {"axial": 40 / 20, "coronal": 60 / 20, "sagittal": 60 / 40}
    for axes in figure.axes:
        plane = axes.get_label().split(" ")[0]
        if plane in expected and axes.images:
            axes.apply_aspect()
            box = axes.get_position()
            assert box.height * height / (box.width * width) == pytest.approx(expected[plane], rel=0.02)


def test_panels_refuse_shapes_that_do_not_match():
    volume = random_volume()
    with pytest.raises(ValueError, match="visible"):
        report.reconstruction_panel(volume, np.ones((2, 3, 4), bool), volume, title="t")
    with pytest.raises(ValueError, match="batch and channel"):
        report.segmentation_panel(volume[None], volume[None], volume[None], ["background"], title="t")


def test_segmentation_shows_truth_and_prediction_through_the_centre_of_mass():
    truth, prediction = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    truth[20:25, 30:35, 50:55] = 2
    prediction[20:25, 30:35, 52] = 1
    names = ["background", "liver", "spleen"]
    figure = report.segmentation_panel(random_volume(), truth, prediction, names, title="t", spacing=(1, 1, 2))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names[1:]
    liver, spleen = (patch.get_facecolor()[:3] for patch in legend.get_patches())
    for column, labels, colour in (("truth", truth, spleen), ("prediction", prediction, liver)):
        painted = image_of(figure, f"axial {column}", 1)
        inside = (labels[:, :, 52] > 0).T[::-1, ::-1]
        assert inside.sum() == 25
        np.testing.assert_array_equal(painted[..., 3] > 0, inside)
        np.testing.assert_allclose(painted[inside][:, :3], np.tile(colour, (25, 1)))


def test_segmentation_without_any_label_shows_the_centre():
    volume = random_volume()
    empty = np.zeros(SHAPE, int)
    figure = report.segmentation_panel(volume, empty, empty, ["background"], title="t", spacing=(1, 1, 1))
    np.testing.assert_array_equal(image_of(figure, "axial input"), volume[:, :, 32].T[::-1, ::-1])


def test_segmentation_names_the_label_that_has_no_name():
    truth = np.zeros(SHAPE, int)
    with pytest.raises(ValueError, match="label 3 has no name"):
        report.segmentation_panel(
            random_volume(), truth, truth + 3, ["background", "liver"], title="t", spacing=(1, 1, 1)
        )


def test_neighbouring_classes_differ_in_colour():
    colours = report._class_colours(19)[1:, :3]
    assert len(np.unique(colours, axis=0)) == 18


def test_saved_figure_is_a_png_with_the_hidden_colour_and_no_leftovers(tmp_path):
    volume = random_volume()
    figure = report.reconstruction_panel(volume, np.zeros(SHAPE, bool), volume, title="case $1 of_2")
    path = tmp_path / "new" / "folder" / "picture.png"
    report.save_figure(figure, path)
    report.save_figure(figure, path)
    pixels = imread(path)
    assert pixels.shape[1] == round(figure.get_size_inches()[0] * 110)
    is_hidden = np.isclose(pixels[..., :3], to_rgba(report.HIDDEN)[:3], atol=0.01).all(axis=-1)
    assert 0.1 < is_hidden.mean() < 0.5
    assert [entry.name for entry in path.parent.iterdir()] == ["picture.png"]


def test_a_torn_last_line_is_left_out_and_a_torn_middle_line_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert [line["step"] for line in report.read_metrics(path)] == [0, 1]
    path.write_text('{"step": 0}\n{"step": 1, "l\n{"step": 2}\n')
    with pytest.raises(ValueError, match="entry 2"):
        report.read_metrics(path)
    path.write_text("")
    assert report.read_metrics(path) == []
    with pytest.raises(FileNotFoundError):
        report.read_metrics(tmp_path / "absent.jsonl")


def test_a_repeated_step_counts_once_with_its_last_value():
    entries = [
        {"step": 0, "loss": 3.0},
        {"step": 1, "loss": 2.0},
        {"step": 1, "loss": 1.0},
        {"step": 1, "val_loss": 9},
    ]
    steps, values = report._series(entries, "loss")
    assert steps.tolist() == [0, 1]
    assert values.tolist() == [3.0, 1.0]


def test_smoothing_keeps_a_constant_and_bridges_missing_values():
    values = np.full(200, 0.7)
    values[50] = np.nan
    np.testing.assert_allclose(report._smooth(values), 0.7)
    noisy = np.random.default_rng(0).normal(size=400)
    assert report._smooth(noisy).std() < 0.5 * noisy.std()


def test_dice_table_of_two_runs():
    table = report.dice_table(
        {
            "pre-trained": {"liver": 0.95, "spleen": 0.9, "aorta": float("nan")},
            "scratch": {"liver": 0.9, "spleen": 0.90004, "aorta": 0.5},
        }
    )
    assert table == "\n".join(
        [
            "organ   pre-trained  scratch  difference",
            "liver         0.950    0.900      +0.050",
            "spleen        0.900    0.900      +0.000",
            "aorta             -    0.500           -",
            "mean          0.925    0.767      +0.025",
        ]
    )


def test_dice_table_of_one_run_has_no_difference_and_of_none_is_an_error():
    assert report.dice_table({"run": {"liver": 0.5}}) == "organ    run\nliver  0.500\nmean   0.500"
    assert report.dice_table({"run": {"liver": float("nan")}}).endswith("\nmean     -")
    with pytest.raises(ValueError, match="at least one run"):
        report.dice_table({})


class _Page(HTMLParser):
    """Collects tags, and every address the page would load or follow."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "srcset", "href")]


def add_pictures(folder, names):
    volume = random_volume(shape=(4, 4, 4))
    figure = report.reconstruction_panel(volume, volume > 0.5, volume, title="t")
    for name in names:
        report.save_figure(figure, folder / "pictures" / f"{name}.png")


def test_report_is_one_self_contained_file(run_folder):
    add_pictures(run_folder, ["epoch_0001_caseA"])
    text = write(run_folder, config={"data": {"url": "https://example.org/a"}}, dice={"run": {"liver": 0.5}})
    page = _Page(text)
    assert len(page.addresses) == 3  # the picture, and the curves for light and dark pages
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "url(" not in report.STYLE
    assert "@import" not in report.STYLE
    assert "data.url" in text
    assert sorted(entry.name for entry in run_folder.iterdir()) == [
        "metrics.jsonl",
        "pictures",
        "report.html",
    ]


def test_report_escapes_everything_it_is_given(run_folder):
    evil = "<script>alert('x')</script>"
    add_pictures(run_folder, ["epoch_0001_a<b>&'", "<i>"])
    text = write(
        run_folder, title=evil, config={evil: evil}, environment={evil: evil}, summary={evil: evil},
        dice={evil: {evil: 0.5}},
    )  # fmt: skip
    page = _Page(text)
    assert "script" not in page.tags
    assert not {"b", "i"} & set(page.tags)
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 10


def test_report_shows_the_last_three_epochs_and_the_first(run_folder):
    names = [f"epoch_{epoch:04d}_case{case}" for epoch in (1, 5, 10, 50, 10000) for case in "AB"]
    add_pictures(run_folder, [*names, "final"])
    text = write(run_folder)
    assert re.findall(r"<summary>(.*?)</summary>", text) == [
        "Epoch 10000",
        "Epoch 50",
        "Epoch 10",
        "Epoch 1",
        "Other",
    ]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert captions[:2] == ["epoch_10000_caseA", "epoch_10000_caseB"]
    assert captions[-1] == "final"
    assert len(captions) == 9
    assert "4 of 5 epochs" in text


def test_report_without_metrics_and_pictures_says_so(tmp_path):
    text = write(tmp_path)
    assert "No metrics yet" in text
    assert "No pictures yet" in text
    assert _Page(text).addresses == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No metrics yet" in write(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        write(tmp_path / "absent")


def test_curves_show_what_was_measured_and_nothing_else(run_folder):
    metrics = report.read_metrics(run_folder / "metrics.jsonl")
    titles = [axes.get_title(loc="left") for axes in report._curves_figure(metrics, dark=True).axes]
    measured = ["Loss", "Learning rate", "Gradient norm", "Samples per second", "Dice"]
    assert sorted(filter(None, titles)) == sorted(measured)  # the axis of the weight decay has no title
    assert len(titles) == 6
    only_loss = report._curves_figure([{"step": 0, "epoch": 0, "loss": float("inf")}], dark=False)
    assert [axes.get_title(loc="left") for axes in only_loss.axes] == ["Loss"]
    assert report._curves_figure([{"step": 0, "epoch": 0}], dark=False) is None


def test_the_module_alone_needs_neither_pyplot_nor_torch(tmp_path):
    code = (
        "import importlib.util, pathlib, sys\n"
        "spec = importlib.util.spec_from_file_location('report', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "figure = module._curves_figure([{'step': 0, 'loss': 1.0}], dark=True)\n"
        "module.save_figure(figure, pathlib.Path(sys.argv[2]))\n"
        "print(sorted({'matplotlib.pyplot', 'torch', 'monai'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, report.__file__, str(tmp_path / "curve.png")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_environment_names_the_versions():
    found = report.environment()
    assert found["numpy"] == np.__version__
    assert {"python", "torch", "monai", "timm", "hyspark", "platform", "cpu", "gpu"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())
