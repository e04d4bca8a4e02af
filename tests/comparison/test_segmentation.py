"""Finished runs become numbers: read from their files, paired by seed and case, nothing made up for what is missing."""

import json
import math

import numpy as np
import pytest

from hyspark.comparison.segmentation import SegmentationRuns
from hyspark.comparison.table import RunKey, ScoredRun, compare_runs, read_run
from hyspark.evaluation.score_table import ScoreTable
from hyspark.utils.atomic import to_json

HEADER = "case,organ,dice,hd95_mm,nsd,truth_voxels,predicted_voxels\n"
KIND = SegmentationRuns()
WEIGHTS = {"scratch": "none", "own": "own.pth"}
CASES, ORGANS = [f"case{i}" for i in range(6)], ["liver", "spleen"]


def write_run(folder, rows, metrics="", protocol=None):
    (folder / "scores").mkdir(parents=True)
    (folder / "scores" / "cases.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))
    (folder / "scores" / "summary.json").write_text(json.dumps({"protocol": protocol or {"grid": "the label's own"}}))
    (folder / "metrics.jsonl").write_text(metrics)
    return folder / "scores", folder / "metrics.jsonl"


def scored(dice, missed=0.0, protocol=None, cases=CASES, **metrics):
    """A run from Dice (cases, organs); other metrics likewise, or one number for all. All cases hold both organs."""
    found = {"dice": dice, "nsd": dice, "hd95_mm": 5.0} | metrics
    voxels = {"truth_voxels": np.where(np.isnan(dice), 0, 100.0), "predicted_voxels": 1.0 - np.asarray(missed)}
    values = {name: np.broadcast_to(v, (len(cases), len(ORGANS))) for name, v in (found | voxels).items()}
    return ScoredRun(ScoreTable(tuple(cases), tuple(ORGANS), values), protocol or {}, 10, 60.0)


def compare(runs, planned):
    return compare_runs(KIND, runs, planned, WEIGHTS)


def test_runs_scored_on_other_cases_are_not_compared():
    other = scored(random_dice(0), cases=["case9", *CASES[1:]])
    with pytest.raises(
        ValueError,
        match="own_5_seed0 was scored on other cases than the runs before it: case1",
    ):
        compare({RunKey("scratch", 5, 0): scored(random_dice(1)), RunKey("own", 5, 0): other}, [])


def test_cases_that_were_left_out_of_training_are_counted():
    places = [RunKey(start, 5, seed) for seed in (0, 1) for start in WEIGHTS]
    runs = {place: scored(random_dice(0), protocol={"training_cases": 5 - place.seed}) for place in places}
    numbers = compare(runs, places)
    assert cell(numbers, "own", 5)["training_cases"] == [4, 5]
    assert "training_cases" not in numbers["protocol"]


def random_dice(seed):
    return np.random.default_rng(seed).uniform(0.3, 0.8, (len(CASES), len(ORGANS)))


def cell(numbers, start, count):
    (found,) = [c for c in numbers["cells"] if (c["start"], c["num_labelled"]) == (start, count)]
    return found


def test_a_run_is_read_from_its_files(tmp_path):
    metrics = [{"step": 0, "loss": 1.0, "samples_per_second": 2.0}, {"step": 1, "loss": 1.0, "samples_per_second": 4.0}]
    metrics.append({"step": 1, "dice_mean": 0.5})
    rows = ["a,liver,0.5,3.5,0.25,100,90", "a,spleen,0.0,,0.0,50,0", "b,liver,0.0,,,0,7", "b,spleen,0.75,2.0,1.0,50,49"]
    paths = write_run(tmp_path, rows, "".join(json.dumps(m) + "\n" for m in metrics), {"grid": "label"})
    run = read_run(*paths, samples_per_step=8)
    table = KIND.comparable(run.table)
    assert (table.cases, table.targets) == (("a", "b"), ("liver", "spleen"))
    nan = math.nan
    for metric, values in {
        "dice": [[0.5, 0], [nan, 0.75]],
        "hd95_mm": [[3.5, nan], [nan, 2]],
        "nsd": [[0.25, 0], [nan, 1]],
        "missed": [[0, 1], [nan, 0]],
    }.items():
        assert np.array_equal(table.values[metric], values, equal_nan=True), metric
    assert run.protocol == {"grid": "label"}
    assert (run.steps, run.seconds) == (2, 8 / 2 + 8 / 4)


def test_means_ranges_and_differences():
    dice = {seed: random_dice(seed) for seed in (0, 1)}
    dice[0][:4, 1] = np.nan
    runs = {RunKey("scratch", 5, s): scored(d) for s, d in dice.items()}
    runs |= {RunKey("own", 5, s): scored(d + 0.0625, missed=1.0, hd95_mm=3.0) for s, d in dice.items()}
    numbers = compare(runs, list(runs))
    expected = [np.mean([d[:, 0].mean(), d[~np.isnan(d[:, 1]), 1].mean()]) for d in dice.values()]
    scratch, own = (cell(numbers, start, 5) for start in WEIGHTS)
    np.testing.assert_allclose(list(scratch["dice"]["by_seed"].values()), expected)
    assert scratch["dice"]["mean"] == pytest.approx(np.mean(expected))
    assert scratch["dice"]["low"] < scratch["dice"]["mean"] < scratch["dice"]["high"]
    assert scratch["dice"]["by_organ"]["liver"] == pytest.approx(np.mean([d[:, 0].mean() for d in dice.values()]))
    for name in ("mean", "low", "high"):
        assert own["difference"]["dice"][name] == pytest.approx(0.0625)
        assert own["difference"]["dice"]["by_organ"]["spleen"][name] == pytest.approx(0.0625)
        assert own["difference"]["hd95_mm"][name] == pytest.approx(-2)
        assert own["difference"]["missed"][name] == pytest.approx(1)
    assert "difference" not in scratch
    assert (own["seeds"], own["pairs"], own["left_out"]) == ([0, 1], [0, 1], [])
    assert (own["steps"], own["minutes"]) == ([10], [1.0, 1.0])
    assert (numbers["baseline"], numbers["organs"], numbers["missing"]) == ("scratch", ORGANS, [])


def test_an_incomplete_pair_is_named_and_left_out_of_the_difference_only():
    planned = [RunKey(start, 5, seed) for seed in (0, 1) for start in WEIGHTS]
    runs = {RunKey("scratch", 5, 0): scored(0.25), RunKey("own", 5, 0): scored(0.5), RunKey("own", 5, 1): scored(1.0)}
    numbers = compare(runs, planned)
    own = cell(numbers, "own", 5)
    assert own["dice"]["mean"] == 0.75
    assert own["difference"]["dice"]["mean"] == 0.25
    assert (own["seeds"], own["pairs"], own["left_out"]) == ([0, 1], [0], [1])
    assert (numbers["planned"], numbers["finished"], numbers["missing"]) == (4, 3, ["scratch_5_seed1"])


def test_hd95_is_compared_where_both_found_the_organ():
    """The baseline finds one organ at 4 mm; the other start finds both, one of them badly."""
    own = np.full((len(CASES), 2), 3.0)
    own[:, 1] = 20.0
    other = np.full((len(CASES), 2), 4.0)
    other[:, 1] = np.nan
    runs = {RunKey("scratch", 5, 0): scored(0.5, hd95_mm=other), RunKey("own", 5, 0): scored(0.5, hd95_mm=own)}
    numbers = compare(runs, list(runs))
    assert cell(numbers, "own", 5)["hd95_mm"]["mean"] == 11.5
    assert cell(numbers, "own", 5)["difference"]["hd95_mm"]["mean"] == -1


def test_nothing_finished_is_all_unknown():
    planned = [RunKey(start, n, 0) for n in (5, 10) for start in WEIGHTS]
    numbers = compare({}, planned)
    assert [c["start"] for c in numbers["cells"]] == ["scratch", "own"] * 2
    assert all(math.isnan(c["dice"]["mean"]) for c in numbers["cells"])
    assert numbers["missing"] == [key.folder for key in planned]
    assert to_json(numbers)["cells"][1]["difference"]["dice"]["mean"] is None
    json.dumps(to_json(numbers), allow_nan=False)


def test_protocols_that_differ_are_both_told():
    runs = {
        RunKey("scratch", 5, 0): scored(0.5, protocol={"grid": "label", "overlap": 0.5}),
        RunKey("own", 5, 0): scored(0.5, protocol={"grid": "label", "overlap": 0.25}),
    }
    assert compare(runs, list(runs))["protocol"] == {"grid": ["label"], "overlap": [0.5, 0.25]}
