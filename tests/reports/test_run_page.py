"""The report: what the HTML and the tables contain, and files that are damaged or missing."""

import json
import re
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from hyspark.evaluation.classification.scores import Classified, write_classification_scores
from hyspark.evaluation.score_table import ScoreTable
from hyspark.figures import curves, panels
from hyspark.figures import curves as figures_curves
from hyspark.reports import run_page
from hyspark.training import metrics_log

pytestmark = pytest.mark.curves


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
    return run_page.write_report(folder, **(arguments | changes)).read_text()


def test_a_torn_last_line_is_left_out_and_a_torn_middle_line_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert [line["step"] for line in metrics_log.read_metrics(path)] == [0, 1]
    path.write_text('{"step": 0}\n{"step": 1, "l\n{"step": 2}\n')
    with pytest.raises(ValueError, match="entry 2"):
        metrics_log.read_metrics(path)
    path.write_text("")
    assert metrics_log.read_metrics(path) == []
    with pytest.raises(FileNotFoundError):
        metrics_log.read_metrics(tmp_path / "absent.jsonl")


def test_a_repeated_step_counts_once_with_its_last_value():
    entries = [
        {"step": 0, "loss": 3.0},
        {"step": 1, "loss": 2.0},
        {"step": 1, "loss": 1.0},
        {"step": 1, "val_loss": 9},
    ]
    steps, values = run_page.measured_curves(entries)["loss"]
    assert steps.tolist() == [0, 1]
    assert values.tolist() == [3.0, 1.0]


def test_dice_table_of_two_runs():
    table = run_page.dice_table(
        {
            "pre-trained": {"liver": 0.95, "spleen": 0.9, "aorta": float("nan")},
            "scratch": {"liver": 0.9, "spleen": 0.90004, "aorta": 0.5},
        },
        difference=True,
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
    assert run_page.dice_table({"best": {"liver": 0.5}, "last": {"liver": 0.25}}).endswith("\nmean   0.500  0.250")
    assert run_page.dice_table({"run": {"liver": 0.5}}) == "organ    run\nliver  0.500\nmean   0.500"
    assert run_page.dice_table({"run": {"liver": float("nan")}}).endswith("\nmean     -")
    with pytest.raises(ValueError, match="at least one run"):
        run_page.dice_table({})


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
    volume = np.random.default_rng(0).uniform(0.1, 0.9, (4, 4, 4))
    figure = panels.reconstruction_panel(volume, volume > 0.5, volume, title="t")
    for name in names:
        panels.save_figure(figure, folder / "pictures" / f"{name}.png")


def test_report_is_one_self_contained_file(run_folder):
    add_pictures(run_folder, ["epoch_0001_caseA"])
    text = write(run_folder, config={"data": {"url": "https://example.org/a"}}, dice={"run": {"liver": 0.5}})
    page = _Page(text)
    assert len(page.addresses) == 3  # the picture, and the curves for light and dark pages
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "url(" not in text
    assert "@import" not in text
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
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 10


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


def test_report_without_metrics_says_so_and_has_no_pictures(tmp_path):
    text = write(tmp_path)
    assert "No metrics yet" in text
    assert "<h2>Pictures</h2>" not in text
    assert _Page(text).addresses == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No metrics yet" in write(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        write(tmp_path / "absent")


def curve_titles(metrics, dark):
    figure = curves.curves_figure(run_page.measured_curves(metrics), dark=dark)
    return None if figure is None else [axes.get_title(loc="left") for axes in figure.axes]


def test_curves_show_what_was_measured_and_nothing_else(run_folder):
    titles = curve_titles(metrics_log.read_metrics(run_folder / "metrics.jsonl"), dark=True)
    measured = ["Loss", "Learning rate", "Gradient norm", "Samples per second", "Dice"]
    assert sorted(filter(None, titles)) == sorted(measured)  # the axis of the weight decay has no title
    assert len(titles) == 6
    assert curve_titles([{"step": 0, "epoch": 0, "loss": float("inf")}], dark=False) == ["Loss"]
    assert curve_titles([{"step": 0, "epoch": 0}], dark=False) is None


def test_the_probe_stands_beside_the_loss_with_its_organs_and_its_start():
    lines = [{"step": s, "epoch": 0, "probe_dice": 0.4, "probe": {"liver": 0.3, "aorta": 0.5}} for s in (-1, 4)]
    curves = run_page.measured_curves([*lines, {"step": 0, "epoch": 0, "loss": 1.0, "lr": 0.1}])
    assert curves["probe_dice"][0].tolist() == [-1, 4]
    figure = figures_curves.curves_figure(curves, dark=False)
    loss, probe, rate = figure.axes
    assert [axes.get_title(loc="left") for axes in (loss, probe, rate)] == ["Loss", "Probe Dice", "Learning rate"]
    assert [text.get_text() for text in probe.get_legend().get_texts()] == ["mean", "liver", "aorta"]
    assert [line.get_label() for line in loss.lines + rate.lines if line.get_label() in ("liver", "aorta")] == []


def test_the_page_shows_scores_with_their_protocol_and_pictures(run_folder):
    row = {"dice": 0.9, "hd95_mm": 3.21, "nsd": 0.75}
    counts = {"num_cases": 4, "num_missed": 1, "num_absent": 2, "num_absent_predicted": 0}
    nothing = dict.fromkeys(row)
    summary = {
        "protocol": {"scored_on": "the label's own grid"},
        "organs": {"<liver>": row | counts, "aorta": nothing | counts},
        "mean": row,
    }
    scores = run_folder / "scores"
    scores.mkdir()
    (scores / "summary.json").write_text(json.dumps(summary))
    panels.save_figure(panels.Figure(figsize=(1, 1)), scores / "best_caseA.png")
    text = write(run_folder, scores={"Scores of validation cases": scores})
    assert "<h2>Scores of validation cases</h2>" in text
    assert (
        "<td>&lt;liver&gt;</td><td>0.900</td><td>3.2</td><td>0.750</td><td>4</td><td>1</td><td>2</td><td>0</td>" in text
    )
    assert "<td>aorta</td><td>-</td><td>-</td><td>-</td>" in text
    assert "scored on: the label&#39;s own grid" in text
    assert 'alt="best_caseA"' in text


def test_the_page_shows_scores_of_classified_images(run_folder):
    scores = run_folder / "scores"
    table = ScoreTable(
        ("a/0.png", "b/1.png", "b/2.png"),
        ("a", "<b>"),
        {
            "truth": np.array([[1.0, 0], [0, 1], [0, 1]]),
            "probability": np.array([[0.1, 0.9], [0.9, 0.1], [2 / 3, 1 / 3]]),
        },
    )
    write_classification_scores(scores, Classified.from_table(table), {"weights": "<w>"})
    text = write(run_folder, scores={"Validation images": scores})
    assert "weights: &lt;w&gt;; num images: 3" in text
    assert "<td>accuracy</td><td>0.000</td>" in text
    assert "<td>true &lt;b&gt;</td><td>2</td><td>0</td>" in text
    assert "mistakes" not in text
    panels.save_figure(panels.Figure(figsize=(1, 1)), scores / "mistakes.png")
    assert "Most confident mistakes" in write(run_folder, scores={"Validation images": scores})


def test_environment_names_the_versions():
    found = run_page.environment()
    assert found["numpy"] == np.__version__
    assert {"python", "torch", "monai", "timm", "hyspark", "platform", "cpu", "gpu"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_the_commit_of_the_code_is_recorded(tmp_path):
    """Of a checkout, with changes named; of a folder that is none, no guess."""
    assert run_page.code_version(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.py").write_text("1")
    for words in (["init", "-q"], ["add", "a.py"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    commit = run_page.code_version(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "a.py").write_text("2")
    assert run_page.code_version(tmp_path) == f"{commit}, with 1 changed files"
    (tmp_path / ".git" / "HEAD").write_text("torn")
    assert run_page.code_version(tmp_path) == "unknown"
    assert "commit" in run_page.environment()


def test_a_long_run_costs_a_page_no_more(monkeypatch):
    """Neighbours are averaged; a repeated step counts once, with its last value."""
    monkeypatch.setattr(run_page, "MAX_MEASURED", 4)
    lines = [{"step": i, "loss": float(i)} for i in range(10)]
    steps, values = run_page.measured_curves([{"step": 9, "loss": 100.0}, *lines])["loss"]
    assert (steps.tolist(), values.tolist()) == ([2, 5, 8, 9], [1, 4, 7, 9])
    steps, values = run_page.measured_curves([*lines[:3], {"step": 1, "loss": float("nan")}])["loss"]
    assert steps.tolist() == [0, 1, 2]
    assert np.isnan(values).tolist() == [False, True, False]


def test_metrics_are_read_and_cut_line_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n\n{"step": 1, "loss": 2}\n{"step": 2, "lo')
    lines = metrics_log.iterate_metrics(path)
    assert next(lines)["step"] == 0
    metrics_log.drop_lines(path, first_step=1, is_validated=True)
    assert path.read_text() == '{"step": 0, "loss": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
