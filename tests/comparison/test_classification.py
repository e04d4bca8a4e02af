"""Classification runs compared: means, paired intervals by resampling images and seeds, and the report on them."""

import json
import math
import re

import numpy as np
import pytest

from hyspark.comparison.classification import ClassificationRuns
from hyspark.comparison.report import benefit_page, write_benefit
from hyspark.comparison.table import RunKey, ScoredRun, compare_runs, read_run
from hyspark.evaluation.classification.metrics import CLASSIFICATION_METRICS, classification_scores
from hyspark.evaluation.classification.scores import Classified, write_classification_scores
from hyspark.evaluation.score_table import ScoreTable
from hyspark.utils.atomic import to_json

KIND = ClassificationRuns()
WEIGHTS = {"scratch": "none", "own": "own.pth"}
NAMES = tuple(f"{label}/{i}.png" for label in "ab" for i in range(20))
TRUTH = np.repeat([0, 1], 20)


def a_run(seed, gain=0.0, names=NAMES):
    """Scores of which the positive ones are higher by .5 and the gain, in noise that the seed gives."""
    noise = np.random.default_rng(seed).normal(0, 1, 40)
    second = 1 / (1 + np.exp(-(noise + (0.5 + gain) * (2 * TRUTH - 1))))
    values = {"truth": np.eye(2)[TRUTH], "probability": np.stack([1 - second, second], 1)}
    return ScoredRun(ScoreTable(names, ("a", "b"), values), {"weights": "best"}, 10, 60.0)


def compare(runs, planned):
    return compare_runs(KIND, runs, planned, WEIGHTS)


@pytest.fixture(scope="module")
def numbers():
    planned = [RunKey(start, count, seed) for seed in (0, 1) for count in (10, 40) for start in WEIGHTS]
    runs = {p: a_run(p.seed + p.num_labelled, 2.0 * (p.weights == "own")) for p in planned}
    del runs[RunKey("own", 40, 1)]
    found = compare(runs, planned)
    return found | {"scored_on": "validation", "recipe": {"epochs": 4}, "digests": {"own": "ab" * 32}}


def cell(numbers, start, count):
    (found,) = [c for c in numbers["cells"] if (c["start"], c["num_labelled"]) == (start, count)]
    return found


def test_means_are_those_of_the_runs(numbers):
    for start, gain in (("scratch", 0.0), ("own", 2.0)):
        expected = [classification_scores(TRUTH, a_run(seed + 10, gain).table.values["probability"]) for seed in (0, 1)]
        for metric in CLASSIFICATION_METRICS:
            values = [scores[metric] for scores in expected]
            found = cell(numbers, start, 10)[metric]
            assert list(found["by_seed"].values()) == pytest.approx(values)
            assert found["mean"] == pytest.approx(np.mean(values))
            assert found["low"] <= found["mean"] <= found["high"]
    difference = cell(numbers, "own", 10)["difference"]["auc"]
    means = [cell(numbers, start, 10)["auc"]["mean"] for start in WEIGHTS]
    assert difference["mean"] == pytest.approx(means[1] - means[0])
    assert difference["low"] > 0
    assert cell(numbers, "own", 10)["steps"] == [10]


def test_what_is_missing_is_left_out_of_pairs(numbers):
    own = cell(numbers, "own", 40)
    assert (own["seeds"], own["pairs"], own["left_out"]) == ([0], [0], [1])
    assert (numbers["planned"], numbers["finished"], numbers["missing"]) == (8, 7, ["own_40_seed1"])
    alone = [cell(numbers, start, 40)["auc"]["by_seed"]["0"] for start in WEIGHTS]
    assert own["difference"]["auc"]["mean"] == pytest.approx(alone[1] - alone[0])


def test_the_same_run_on_both_sides_differs_by_nothing():
    runs = {RunKey(start, 10, seed): a_run(seed) for start in WEIGHTS for seed in (0, 1)}
    for metric, found in cell(compare(runs, list(runs)), "own", 10)["difference"].items():
        assert (found["mean"], found["low"], found["high"]) == (0, 0, 0), metric


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Images drawn one by one, the AUC by its definition."""
    run = a_run(3)
    found = cell(compare({RunKey("scratch", 10, 0): run}, [RunKey("scratch", 10, 0)]), "scratch", 10)
    rng, score = np.random.default_rng(5), run.table.values["probability"][:, 1]
    drawn = []
    for _ in range(4000):
        chosen = rng.integers(40, size=40)
        positive, negative = (score[chosen][TRUTH[chosen] == c] for c in (1, 0))
        drawn.append((positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found["auc"]["low"], found["auc"]["high"]) == pytest.approx((low, high), abs=0.01)


def test_other_images_are_no_pair():
    runs = {RunKey("scratch", 10, 0): a_run(0), RunKey("own", 10, 0): a_run(0, names=("c/0.png", *NAMES[1:]))}
    with pytest.raises(ValueError, match="own_10_seed0 was scored on other images than the runs before it"):
        compare(runs, list(runs))


def test_nothing_finished_is_all_unknown(tmp_path):
    planned = [RunKey(start, 10, 0) for start in WEIGHTS]
    numbers = compare({}, planned)
    assert all(math.isnan(c["auc"]["mean"]) for c in numbers["cells"])
    assert numbers["missing"] == [key.folder for key in planned]
    json.dumps(to_json(numbers), allow_nan=False)
    write_benefit(tmp_path, KIND, numbers | {"scored_on": "test", "recipe": {}, "digests": {}})
    assert "nan" not in (tmp_path / "benefit.md").read_text()


def test_a_run_is_read_from_its_files(tmp_path):
    write_classification_scores(tmp_path / "scores", Classified.from_table(a_run(0).table), {"weights": "best"})
    lines = [{"step": 0, "samples_per_second": 2.0}, {"step": 1, "samples_per_second": 4.0}, {"step": 1, "auc": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path / "scores", tmp_path / "metrics.jsonl", 8)
    assert run.table.cases == NAMES
    for metric, values in a_run(0).table.values.items():
        assert np.array_equal(run.table.values[metric], values)
    assert (run.steps, run.seconds) == (2, 8 / 2 + 8 / 4)
    assert run.protocol == {"weights": "best", "num_images": 40}


def test_the_report(numbers, tmp_path):
    text = benefit_page(KIND, numbers)
    assert "7 of 8 runs are finished, scored on 40 validation images. Not finished: own_40_seed1." in text
    assert "all values are optimistic" in text
    for title in ("AUC", "Accuracy", "Macro F1"):
        table = re.search(rf"## {title}, %\n\n(\|.*?\n)\n", text, re.DOTALL)
        assert table, title
        header, _, few, _ = [[c.strip() for c in row.strip("|").split("|")] for row in table[1].splitlines()]
        assert header == ["labelled images", "scratch", "own", "own minus scratch, points", "runs"]
        assert few[0] == "10"
        assert few[3].startswith("**+")
    assert "own with 40 labelled images: seed 1." in text
    assert "- own: own.pth (sha256 abababababab)" in text
    assert "optimistic" not in benefit_page(KIND, numbers | {"scored_on": "test"})
    write_benefit(tmp_path, KIND, numbers)
    assert {path.name for path in tmp_path.iterdir()} == {"benefit.md", "benefit.json", "benefit.png"}
