import csv
import json
import math

import numpy as np
import pytest

from hyspark.evaluation.protocol import read_summary
from hyspark.evaluation.score_table import read_score_table
from hyspark.evaluation.segmentation.metrics import OrganScores
from hyspark.evaluation.segmentation.scores import (
    best_median_worst,
    mean_dice,
    organ_score_table,
    write_segmentation_scores,
)

NAN = math.nan
ABSENT = OrganScores(NAN, NAN, NAN, 0, 0)
CASES = {
    "a": [OrganScores(0.9, 2.0, 0.8, 100, 90), OrganScores(0.5, 4.0, 0.4, 10, 20), ABSENT],
    "b": [OrganScores(0.7, 4.0, 0.6, 100, 80), OrganScores(0.0, NAN, 0.0, 10, 0), ABSENT],
    "c": [OrganScores(0.2, 9.0, 0.1, 100, 70), OrganScores(NAN, NAN, NAN, 0, 7), ABSENT],
}
ORGANS = ["liver", "spleen", "gall|bladder"]
TABLE = organ_score_table(CASES, ORGANS)


def test_means_are_over_organs_of_the_cases_that_hold_them(tmp_path):
    summary = write_segmentation_scores(tmp_path, TABLE, {"weights": "best.pth", "spacing_mm": [1, 1, 2]})
    assert summary == read_summary(tmp_path) == json.loads((tmp_path / "summary.json").read_text())
    liver, spleen, bladder = (summary["organs"][organ] for organ in ORGANS)
    assert liver["dice"] == pytest.approx(0.6)
    assert liver["hd95_mm"] == pytest.approx(5)
    assert liver["nsd"] == pytest.approx(0.5)
    assert (spleen["dice"], spleen["hd95_mm"], spleen["nsd"]) == pytest.approx((0.25, 4, 0.2))
    assert [spleen[k] for k in ("num_cases", "num_missed", "num_absent", "num_absent_predicted")] == [2, 1, 1, 1]
    assert (bladder["dice"], bladder["hd95_mm"], bladder["nsd"], bladder["num_absent"]) == (None, None, None, 3)
    assert summary["mean"]["dice"] == pytest.approx((0.6 + 0.25) / 2)
    assert summary["mean"]["hd95_mm"] == pytest.approx((5 + 4) / 2)
    assert summary["protocol"]["num_cases"] == 3
    assert summary["protocol"]["weights"] == "best.pth"


def test_a_row_per_case_and_organ(tmp_path):
    write_segmentation_scores(tmp_path, TABLE, {})
    with (tmp_path / "cases.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", "organ", "dice", "hd95_mm", "nsd", "truth_voxels", "predicted_voxels"]
    assert rows[1] == ["a", "liver", "0.9", "2.0", "0.8", "100", "90"]
    assert rows[5] == ["b", "spleen", "0.0", "", "0.0", "10", "0"]
    assert rows[8] == ["c", "spleen", "", "", "", "0", "7"]
    assert len(rows) == 1 + 3 * 3


def test_the_table_names_the_protocol(tmp_path):
    write_segmentation_scores(tmp_path, TABLE, {"weights": "best.pth", "nsd_tolerance_mm": 2.0})
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| organ | Dice | HD95 (mm) | NSD |")
    assert lines[2] == "| liver | 0.600 | 5.0 | 0.500 | 3 | 0 | 0 | 0 |"
    assert lines[3] == "| spleen | 0.250 | 4.0 | 0.200 | 2 | 1 | 1 | 1 |"
    assert lines[4] == "| gall\\|bladder | - | - | - | 0 | 0 | 3 | 0 |"
    assert lines[5].startswith("| **mean** | **0.425** | **4.5** | **0.350** |")
    assert "nsd tolerance mm: 2.0" in lines[7]
    assert "mean: over organs" in lines[7]


def test_scores_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no scores \(summary\.json\)"):
        read_summary(tmp_path)


def test_the_table_is_read_back_from_its_file(tmp_path):
    write_segmentation_scores(tmp_path, TABLE, {})
    read = read_score_table(tmp_path / "cases.csv")
    assert (read.cases, read.targets, list(read.values)) == (TABLE.cases, TABLE.targets, list(TABLE.values))
    for metric, values in TABLE.values.items():
        assert np.array_equal(read.values[metric], values, equal_nan=True)


def test_a_selection_of_a_table_has_its_order_and_no_scores_of_unknown_names():
    taken = TABLE.take(["c", "a", "new"], ["spleen", "aorta"])
    assert (taken.cases, taken.targets) == (("c", "a", "new"), ("spleen", "aorta"))
    assert np.array_equal(taken.values["dice"], [[NAN, NAN], [0.5, NAN], [NAN, NAN]], equal_nan=True)


@pytest.mark.parametrize("row", ["a,liver,good,1,1,5,5", "a,liver,0.5", "a,liver,0.5,1,1,many,5"])
def test_damaged_scores_name_their_file(tmp_path, row):
    (tmp_path / "cases.csv").write_text(f"case,organ,dice,hd95_mm,nsd,truth_voxels,predicted_voxels\n{row}\n")
    with pytest.raises(ValueError, match=r"cases\.csv: expected case, organ"):
        read_score_table(tmp_path / "cases.csv")


def test_the_cases_to_look_at():
    def chosen(cases):
        return best_median_worst(organ_score_table(cases, ORGANS[: len(next(iter(cases.values())))]))

    assert chosen(CASES) == {"best": "a", "median": "b", "worst": "c"}
    assert chosen({"a": CASES["a"]}) == {"best": "a"}
    assert chosen({name: CASES[name] for name in "ca"}) == {"best": "a", "worst": "c"}
    assert chosen({"a": [ABSENT]}) == {}


def test_mean_dice_excludes_cases_without_the_organ():
    means = mean_dice([[0.5, NAN, NAN], [0.7, 0.2, NAN]], ["liver", "spleen", "aorta"])
    assert means["liver"] == pytest.approx(0.6)
    assert means["spleen"] == pytest.approx(0.2)
    assert math.isnan(means["aorta"])
