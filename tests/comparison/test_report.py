"""The report says what the numbers say, says how much of it is there, and keeps other people's figures apart."""

import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from hyspark.comparison.figure import benefit_figure
from hyspark.comparison.report import benefit_page, write_benefit
from hyspark.comparison.segmentation import SegmentationRuns
from hyspark.comparison.table import RunKey, ScoredRun, compare_runs
from hyspark.evaluation.score_table import ScoreTable

KIND = SegmentationRuns()
WEIGHTS = {"scratch": "none", "own": "ckpt/own.pth", "other": "o.safetensors"}
GAIN = {"scratch": 0.0, "own": 0.125, "other": 0.0}
HD95 = {"scratch": 7.0, "own": 5.0, "other": 7.0}


def a_run(weights, count, seed):
    """Dice that grows with the labels; `own` is .125 better, `other` better or worse by the case."""
    random = np.random.default_rng([count, seed])
    dice = 0.3 + 0.1 * np.log10(count) + random.uniform(0, 0.1, (8, 2)) + GAIN[weights]
    if weights == "other":
        dice = dice + np.where(np.arange(16) % 4 < 2, 0.05, -0.05).reshape(8, 2)
    predicted = np.full((8, 2), 90.0)
    if weights == "scratch":
        predicted[0, 1] = 0
    values = {"dice": dice, "nsd": dice, "hd95_mm": np.full((8, 2), HD95[weights])}
    values |= {"truth_voxels": np.full((8, 2), 100.0), "predicted_voxels": predicted}
    table = ScoreTable(tuple(f"case{i}" for i in range(8)), ("liver", "spleen"), values)
    return ScoredRun(table, {"grid": "the label's own"}, 20, 90.0)


def page(numbers):
    return benefit_page(KIND, numbers)


@pytest.fixture(scope="module")
def numbers():
    planned = [RunKey(start, count, seed) for seed in (0, 1) for count in (5, 50) for start in WEIGHTS]
    runs = {place: a_run(*place) for place in planned if place != RunKey("scratch", 50, 1)}
    found = compare_runs(KIND, runs, planned, WEIGHTS)
    return found | {"scored_on": "test", "recipe": {"epochs": 4}, "digests": {"own": "ab" * 32, "other": "cd" * 32}}


def rows_of(text, heading):
    """The cells of the first table below a heading."""
    table = re.search(r"(\|.*?\n)\n", text.split(f"## {heading}")[1], re.DOTALL)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_shows_means_ranges_differences_and_how_many_runs(numbers):
    text = page(numbers)
    header, _, few, many = rows_of(text, "Dice, %")
    assert header == [
        *("labelled cases", "scratch", "own", "other"),
        *("own minus scratch, points", "other minus scratch, points", "runs"),
    ]
    assert few[0] == "5"
    assert re.fullmatch(r"4\d\.\d \(4\d\.\d to 4\d\.\d\)", few[1])
    assert few[4] == "**+12.5 [+12.5, +12.5]**"
    assert re.fullmatch(r"[+-]0\.0 \[-\d\.\d, \+\d\.\d\]", few[5])
    assert few[6] == "6 of 6"
    assert many[6] == "5 of 6"
    assert "(" not in many[1]  # one seed has no range
    assert "11 of 12 runs are finished, scored on 8 test cases. Not finished: scratch_50_seed1." in text
    assert "own with 50 labelled cases: seed 1; other with 50 labelled cases: seed 1." in text


def test_organs_surfaces_budgets_and_protocol(numbers):
    text = page(numbers)
    assert rows_of(text, "Organs")[2][0] == "liver"
    assert "Dice, %, with 50 labelled cases:" in text
    header, _, scratch, own, other, *_ = rows_of(text, "Surfaces, and missed organs")
    assert header[3:6] == ["minus scratch, points", "HD95, mm", "minus scratch, mm"]
    assert scratch[3:] == ["", "7.0", "", "6.2"]
    assert own[3:] == ["**+12.5 [+12.5, +12.5]**", "5.0", "**-2.0 [-2.0, -2.0]**", "0.0"]
    assert other[5] == "+0.0 [+0.0, +0.0]"
    assert rows_of(text, "Budgets and times")[2] == ["5", "scratch", "20", "1.5, 1.5"]
    assert "- grid: the label's own" in text
    assert "- scratch: from scratch" in text
    assert "- own: ckpt/own.pth (sha256 abababababab)" in text
    assert "- epochs: 4" in text


def test_fewer_labels_and_rates_of_their_own_stand_beside_the_table(numbers):
    assert "Trained on fewer" not in page(numbers)
    cells = [cell | {"training_cases": [4, 5] if cell["num_labelled"] == 5 else []} for cell in numbers["cells"]]
    more = {"cells": cells, "recipe": {"pretrained_lr_ratio": 0.17}}
    text = page(numbers | more).split("## Organs")[0]
    assert "excluded: scratch with 5 on 4; own with 5 on 4; other with 5 on 4." in text
    assert "has 0.17 times the learning rate of one from scratch" in text


def test_budgets_that_differ_are_pointed_out(numbers):
    assert "not the same in all rows" not in page(numbers)
    cells = [cell | {"steps": [2 * cell["num_labelled"]]} for cell in numbers["cells"]]
    assert "not the same in all rows" in page(numbers | {"cells": cells})


def test_without_any_run_there_is_still_a_page(tmp_path):
    empty = compare_runs(KIND, {}, [RunKey(start, 5, 0) for start in WEIGHTS], WEIGHTS)
    write_benefit(tmp_path, KIND, empty | {"scored_on": "validation", "recipe": {}, "digests": {}})
    text = (tmp_path / "benefit.md").read_text()
    assert rows_of(text, "Dice, %")[2] == ["5", "-", "-", "-", "-", "-", "0 of 3"]
    assert "nan" not in text


def test_three_files_that_agree(numbers, tmp_path):
    assert write_benefit(tmp_path, KIND, numbers) == tmp_path / "benefit.md"
    loaded = json.loads((tmp_path / "benefit.json").read_text())
    assert loaded["cells"][1]["difference"]["dice"]["mean"] == pytest.approx(0.125)
    assert imread(tmp_path / "benefit.png").shape[:2] == (484, 1155)
    assert (tmp_path / "benefit.md").read_text() == page(numbers)
    assert {path.name for path in tmp_path.iterdir()} == {"benefit.md", "benefit.json", "benefit.png"}


def test_the_picture_shows_lines_seeds_and_differences(numbers):
    figure = benefit_figure(numbers, "dice", "Dice", "cases")
    left, right = figure.axes
    assert left.get_xscale() == right.get_xscale() == "log"
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(WEIGHTS)
    own = next(c for c in left.containers if c.get_label() == "own")
    means = [c["dice"]["mean"] for c in numbers["cells"] if c["start"] == "own"]
    np.testing.assert_allclose(own.lines[0].get_ydata(), np.multiply(100, means))
    assert [c.get_label() for c in right.containers] == ["own", "other"]
    np.testing.assert_allclose(right.containers[0].lines[0].get_ydata(), 12.5)
    dots = [line for line in left.lines if line.get_alpha() == 0.4]
    assert sorted(len(line.get_xdata()) for line in dots) == [1, 2, 2, 2, 2, 2]
    colours = {c.lines[0].get_color() for c in left.containers}
    assert len(colours) == len(WEIGHTS)
