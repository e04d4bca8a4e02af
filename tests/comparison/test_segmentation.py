"""Finished runs become numbers: read from their files, paired by seed and case, nothing made up for what is missing."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hyspark.comparison.segmentation import ScoredRun, compare, read_run
from hyspark.comparison.table import Place, name_of
from hyspark.utils.atomic import to_json

HEADER = "case,organ,dice,hd95_mm,nsd,truth_voxels,predicted_voxels\n"
STARTS = {"scratch": "none", "own": "own.pth"}
CASES, ORGANS = [f"case{i}" for i in range(6)], ["liver", "spleen"]


def write_run(folder, rows, metrics="", protocol=None):
    (folder / "scores").mkdir(parents=True)
    (folder / "scores" / "cases.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))
    (folder / "scores" / "summary.json").write_text(json.dumps({"protocol": protocol or {"grid": "the label's own"}}))
    (folder / "metrics.jsonl").write_text(metrics)
    return folder / "scores", folder / "metrics.jsonl"


def scored(dice, missed=0.0, protocol=None, **metrics):
    """A run from Dice (cases, organs); other metrics likewise, or one number for all."""
    tables = {"dice": dice, "nsd": dice, "hd95_mm": 5.0, "missed": missed} | metrics
    scores = {}
    for name, values in tables.items():
        full = np.broadcast_to(values, (len(CASES), len(ORGANS)))
        scores[name] = {
            (c, o): float(full[i, j])
            for i, c in enumerate(CASES)
            for j, o in enumerate(ORGANS)
            if full[i, j] == full[i, j]
        }
    return ScoredRun(scores, protocol or {}, 10, 60.0)


def test_runs_scored_on_other_cases_are_not_compared():
    usual = scored(random_dice(0))
    other = replace(usual, scores=usual.scores | {"missed": {("case9", "liver"): 0.0}})
    with pytest.raises(
        ValueError, match="own_5_seed0 was scored on other cases than the runs before it: case9; not on"
    ):
        compare({Place("scratch", 5, 0): scored(random_dice(1)), Place("own", 5, 0): other}, [], STARTS)


def test_cases_that_were_left_out_of_training_are_counted():
    places = [Place(start, 5, seed) for seed in (0, 1) for start in STARTS]
    runs = {place: scored(random_dice(0), protocol={"training_cases": 5 - place.seed}) for place in places}
    numbers = compare(runs, places, STARTS)
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
    run = read_run(*paths, crops_per_step=8)
    assert run.scores["dice"] == {("a", "liver"): 0.5, ("a", "spleen"): 0.0, ("b", "spleen"): 0.75}
    assert run.scores["hd95_mm"] == {("a", "liver"): 3.5, ("b", "spleen"): 2.0}
    assert run.scores["missed"] == {("a", "liver"): 0.0, ("a", "spleen"): 1.0, ("b", "spleen"): 0.0}
    assert run.protocol == {"grid": "label"}
    assert (run.steps, run.seconds) == (2, 8 / 2 + 8 / 4)


@pytest.mark.parametrize("row", ["a,liver,good,1,1,5,5", "a,liver,0.5", "a,liver,0.5,1,1,many,5"])
def test_damaged_scores_name_their_file(tmp_path, row):
    with pytest.raises(ValueError, match=r"cases\.csv: expected case, organ"):
        read_run(*write_run(tmp_path, [row]), crops_per_step=1)


def test_means_ranges_and_differences():
    dice = {seed: random_dice(seed) for seed in (0, 1)}
    dice[0][:4, 1] = np.nan
    runs = {Place("scratch", 5, s): scored(d) for s, d in dice.items()}
    runs |= {Place("own", 5, s): scored(d + 0.0625, missed=0.5, hd95_mm=3.0) for s, d in dice.items()}
    numbers = compare(runs, list(runs), STARTS)
    expected = [np.mean([d[:, 0].mean(), d[~np.isnan(d[:, 1]), 1].mean()]) for d in dice.values()]
    scratch, own = (cell(numbers, start, 5) for start in STARTS)
    np.testing.assert_allclose(list(scratch["dice"]["by_seed"].values()), expected)
    assert scratch["dice"]["mean"] == pytest.approx(np.mean(expected))
    assert scratch["dice"]["low"] < scratch["dice"]["mean"] < scratch["dice"]["high"]
    assert scratch["dice"]["by_organ"]["liver"] == pytest.approx(np.mean([d[:, 0].mean() for d in dice.values()]))
    for name in ("mean", "low", "high"):
        assert own["difference"]["dice"][name] == pytest.approx(0.0625)
        assert own["difference"]["dice"]["by_organ"]["spleen"][name] == pytest.approx(0.0625)
        assert own["difference"]["hd95_mm"][name] == pytest.approx(-2)
        assert own["difference"]["missed"][name] == pytest.approx(0.5)
    assert "difference" not in scratch
    assert (own["seeds"], own["pairs"], own["left_out"]) == ([0, 1], [0, 1], [])
    assert (own["steps"], own["minutes"]) == ([10], [1.0, 1.0])
    assert (numbers["baseline"], numbers["organs"], numbers["missing"]) == ("scratch", ORGANS, [])


def test_an_incomplete_pair_is_named_and_left_out_of_the_difference_only():
    planned = [Place(start, 5, seed) for seed in (0, 1) for start in STARTS]
    runs = {Place("scratch", 5, 0): scored(0.25), Place("own", 5, 0): scored(0.5), Place("own", 5, 1): scored(1.0)}
    numbers = compare(runs, planned, STARTS)
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
    runs = {Place("scratch", 5, 0): scored(0.5, hd95_mm=other), Place("own", 5, 0): scored(0.5, hd95_mm=own)}
    numbers = compare(runs, list(runs), STARTS)
    assert cell(numbers, "own", 5)["hd95_mm"]["mean"] == 11.5
    assert cell(numbers, "own", 5)["difference"]["hd95_mm"]["mean"] == -1


def test_nothing_finished_is_all_unknown():
    planned = [Place(start, n, 0) for n in (5, 10) for start in STARTS]
    numbers = compare({}, planned, STARTS)
    assert [c["start"] for c in numbers["cells"]] == ["scratch", "own"] * 2
    assert all(math.isnan(c["dice"]["mean"]) for c in numbers["cells"])
    assert numbers["missing"] == [name_of(place) for place in planned]
    assert to_json(numbers)["cells"][1]["difference"]["dice"]["mean"] is None
    json.dumps(to_json(numbers), allow_nan=False)


def test_protocols_that_differ_are_both_told():
    runs = {
        Place("scratch", 5, 0): scored(0.5, protocol={"grid": "label", "overlap": 0.5}),
        Place("own", 5, 0): scored(0.5, protocol={"grid": "label", "overlap": 0.25}),
    }
    assert compare(runs, list(runs), STARTS)["protocol"] == {"grid": ["label"], "overlap": [0.5, 0.25]}
