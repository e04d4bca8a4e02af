import csv
import json
import math

import pytest

from hyspark.evaluation.segmentation.metrics import OrganScores
from hyspark.evaluation.segmentation.scores import best_median_worst, read_summary, write_folder

NAN = math.nan
ABSENT = OrganScores(NAN, NAN, NAN, 0, 0)
CASES = {
    "a": [OrganScores(0.9, 2.0, 0.8, 100, 90), OrganScores(0.5, 4.0, 0.4, 10, 20), ABSENT],
    "b": [OrganScores(0.7, 4.0, 0.6, 100, 80), OrganScores(0.0, NAN, 0.0, 10, 0), ABSENT],
    "c": [OrganScores(0.2, 9.0, 0.1, 100, 70), OrganScores(NAN, NAN, NAN, 0, 7), ABSENT],
}
ORGANS = ["liver", "spleen", "gall|bladder"]


def test_means_are_over_organs_of_the_cases_that_hold_them(tmp_path):
    summary = write_folder(tmp_path, CASES, ORGANS, {"weights": "best.pth", "spacing_mm": [1, 1, 2]})
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
    write_folder(tmp_path, CASES, ORGANS, {})
    with (tmp_path / "cases.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", "organ", "dice", "hd95_mm", "nsd", "truth_voxels", "predicted_voxels"]
    assert rows[1] == ["a", "liver", "0.9", "2.0", "0.8", "100", "90"]
    assert rows[5] == ["b", "spleen", "0.0", "", "0.0", "10", "0"]
    assert rows[8] == ["c", "spleen", "", "", "", "0", "7"]
    assert len(rows) == 1 + 3 * 3


def test_the_table_names_the_protocol(tmp_path):
    write_folder(tmp_path, CASES, ORGANS, {"weights": "best.pth", "nsd_tolerance_mm": 2.0})
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


def test_the_cases_to_look_at():
    assert best_median_worst(CASES) == {"best": "a", "median": "b", "worst": "c"}
    assert best_median_worst({"a": CASES["a"]}) == {"best": "a"}
    assert best_median_worst({name: CASES[name] for name in "ca"}) == {"best": "a", "worst": "c"}
    assert best_median_worst({"a": [ABSENT]}) == {}
