"""The scores of a set of cases as a folder: cases.csv (one row per case and organ), summary.json (means, with the
protocol that they were measured by), table.md. Which cases are the best, the median and the worst, for pictures.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.evaluation.protocol import protocol_text
from hyspark.evaluation.segmentation.metrics import METRICS, OrganScores
from hyspark.utils.atomic import to_json, write_json, write_whole

Cases = Mapping[str, Sequence[OrganScores]]
"""Name of a case -> scores of its organs, in the order of the classes, without background."""
COLUMNS = ("case", "organ", *METRICS, "truth_voxels", "predicted_voxels")
MEAN = "over organs of the mean over the cases that hold the organ"


def summarise(cases: Cases, organs: Sequence[str], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json holds: {"protocol": ..., "organs": {name: see `summary_of`}, "mean": {metric: ...}}; None where
    a value is undefined.

    protocol: how the scores were measured, in plain values; the number of cases and the meaning of the mean are added.
    """
    protocol = {**protocol, "mean": MEAN, "background": "excluded", "num_cases": len(cases)}
    by_organ = {organ: summary_of([rows[i] for rows in cases.values()]) for i, organ in enumerate(organs)}
    mean = {metric: mean_of([row[metric] for row in by_organ.values()]) for metric in METRICS}
    summary: dict[str, Any] = to_json({"protocol": protocol, "organs": by_organ, "mean": mean})
    return summary


def write_folder(folder: Path, cases: Cases, organs: Sequence[str], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Write cases.csv, summary.json and table.md; returns the summary (see `summarise`)."""
    summary = summarise(cases, organs, protocol)
    write_whole(folder / "cases.csv", csv_text(cases, organs).encode())
    write_json(folder / "summary.json", summary)
    write_whole(folder / "table.md", markdown(summary).encode())
    return summary


def summary_of(rows: Sequence[OrganScores]) -> dict[str, float]:
    """One organ over cases: means over those where a score is defined (NaN: none), and counts.

    num_cases: cases that hold the organ; num_missed: of these, without a voxel of it predicted; num_absent: cases
    without it; num_absent_predicted: of these, with voxels of it predicted all the same.
    """
    present = [row for row in rows if row.truth_voxels]
    absent = [row for row in rows if not row.truth_voxels]
    means = {metric: mean_of([getattr(row, metric) for row in present]) for metric in METRICS}
    return means | {
        "num_cases": len(present),
        "num_missed": sum(not row.predicted_voxels for row in present),
        "num_absent": len(absent),
        "num_absent_predicted": sum(row.predicted_voxels > 0 for row in absent),
    }


def mean_of(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN where there is none."""
    held = [value for value in values if not math.isnan(value)]
    return float(np.mean(held)) if held else math.nan


def csv_text(cases: Cases, organs: Sequence[str]) -> str:
    """One row per case and organ; a field is empty where the score is undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, rows in cases.items():
        for organ, row in zip(organs, rows, strict=True):
            values = asdict(row).values()
            writer.writerow([name, organ, *("" if isinstance(v, float) and math.isnan(v) else v for v in values)])
    return text.getvalue()


def text_table(summary: Mapping[str, Any]) -> str:
    """The table of a summary as aligned text, with the protocol below it."""
    rows = score_rows(summary)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(["  ".join(row).rstrip() for row in cells]) + f"\n\n{protocol_text(summary['protocol'])}"


def markdown(summary: Mapping[str, Any]) -> str:
    """The table of a summary, and the protocol below it."""
    heading, *rows = [[cell.replace("|", "\\|") for cell in row] for row in score_rows(summary)]
    rows[-1] = [f"**{cell}**" if cell else "" for cell in rows[-1]]
    ruler = [":--", *("--:" for _ in heading[1:])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heading, ruler, *rows])
    return f"{table}\n\nProtocol: {protocol_text(summary['protocol'])}.\n"


def read_summary(folder: Path) -> dict[str, Any]:
    """What summary.json of a scores folder holds; raises FileNotFoundError where there is none."""
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no scores (summary.json); were its cases scored?")
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


PICTURED = ("best", "worst", "median")
"""Cases that a folder of scores shows, by the title that their pictures' file names begin with."""


def best_median_worst(cases: Cases) -> dict[str, str]:
    """Which case is the best, the median and the worst by mean Dice; fewer where there are fewer cases with a score."""
    means = {name: mean_of([row.dice for row in rows]) for name, rows in cases.items()}
    ranked = sorted((name for name in means if not math.isnan(means[name])), key=lambda name: -means[name])
    places = (0, len(ranked) - 1, (len(ranked) - 1) // 2)
    chosen: dict[str, str] = {}
    for title, place in zip(PICTURED, places, strict=True):
        if ranked and ranked[place] not in chosen.values():
            chosen[title] = ranked[place]
    return chosen


SCORES = {"dice": ("Dice", "{:.3f}"), "hd95_mm": ("HD95 (mm)", "{:.1f}"), "nsd": ("NSD", "{:.3f}")}
COUNTS = {
    "num_cases": "cases",
    "num_missed": "missed",
    "num_absent": "absent",
    "num_absent_predicted": "absent, yet predicted",
}


def score_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table of a scores' summary (summary.json): a heading, a row per organ, the mean; "-" where there
    is no value.
    """

    def scores(row: Mapping[str, float | None]) -> list[str]:
        return ["-" if row[key] is None else form.format(row[key]) for key, (_, form) in SCORES.items()]

    organs = [[organ, *scores(row), *(str(row[key]) for key in COUNTS)] for organ, row in summary["organs"].items()]
    heading = ["organ", *(title for title, _ in SCORES.values()), *COUNTS.values()]
    return [heading, *organs, ["mean", *scores(summary["mean"]), *("" for _ in COUNTS)]]


@dataclass(frozen=True)
class Scores:
    """Dice after a step: mean over organs, mean over cases of each organ, and each case's values in the organs'
    order.
    """

    step: int
    mean: float
    organs: dict[str, float]
    cases: dict[str, list[float]]


def write_scores(folder: Path, **entries: Scores) -> None:
    """Put entries ("best", "last") into dice.json of a run folder."""
    path = folder / "dice.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known |= {name: asdict(scores) for name, scores in entries.items()}
    write_whole(path, (json.dumps(known, indent=1) + "\n").encode())


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Dice per organ of the best and of the last weights of a run.

    Raises FileNotFoundError where the folder holds no scores yet.
    """
    loaded = load_scores(folder)
    return {name: loaded[name]["organs"] for name in ("best", "last")}


def read_cases(folder: Path) -> list[str]:
    """Names of the cases that a run was validated on, sorted; raises as `read_scores`."""
    return sorted(load_scores(folder)["best"]["cases"])


def load_scores(folder: Path) -> dict[str, Any]:
    """What dice.json of a run folder holds; raises as `read_scores`."""
    path = folder / "dice.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no scores (dice.json); is it a fine-tuning run that was validated?")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
