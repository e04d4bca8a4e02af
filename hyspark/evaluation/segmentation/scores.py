"""A folder of segmentation scores.

It holds cases.csv (see score_table.py), summary.json (means, with the protocol that they were measured by) and
table.md.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.evaluation.protocol import FAILED, protocol_text
from hyspark.evaluation.score_table import ORGAN_COLUMNS, ScoreTable
from hyspark.evaluation.segmentation.metrics import ORGAN_METRICS, OrganScores
from hyspark.utils.atomic import to_json, write_json, write_whole
from hyspark.utils.tables import aligned_table, markdown_table

MEAN = "over organs of the mean over the cases that hold the organ"
PICTURED = ("best", "worst", "median")
"""Cases whose pictures are in a folder of scores; their files' names begin with these words."""
CASE_COUNTS = {
    "num_cases": "cases",
    "num_missed": "missed",
    "num_absent": "absent",
    "num_absent_predicted": "absent, yet predicted",
}
"""Numbers of cases of an organ: by key, the heading in tables."""


def organ_score_table(cases: Mapping[str, Sequence[OrganScores]], organs: Sequence[str]) -> ScoreTable:
    """Build the table of scores.

    Args:
        cases: By name, the scores of a case's organs.
        organs: Names of the organs, in this order.
    """
    values = {
        metric: np.array([[getattr(row, metric) for row in rows] for rows in cases.values()], dtype=float)
        for metric in ORGAN_COLUMNS[2:]
    }
    shape = len(cases), len(organs)
    return ScoreTable(tuple(cases), tuple(organs), {metric: array.reshape(shape) for metric, array in values.items()})


def write_segmentation_scores(
    folder: Path, table: ScoreTable, protocol: Mapping[str, Any], failures: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write cases.csv, summary.json and table.md; returns the summary (see `summarise_organs`)."""
    summary = summarise_organs(table, protocol, failures)
    write_whole(folder / "cases.csv", organ_csv(table).encode("utf-8", "surrogateescape"))
    write_json(folder / "summary.json", summary)
    write_whole(folder / "table.md", summary_markdown(summary).encode("utf-8", "surrogateescape"))
    return summary


def summarise_organs(
    table: ScoreTable, protocol: Mapping[str, Any], failures: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Sum up a table of scores as the content of summary.json; None in it is an undefined value.

    Args:
        table: The scores.
        protocol: How they were measured, in plain values.
        failures: Reasons of the cases that were not scored.

    Returns:
        "protocol", with the number of cases and the meaning of the mean; "organs", by name (see `summarise_organ`);
        "mean", by metric; and, if there are any, the failures (`FAILED`).
    """
    protocol = {**protocol, "mean": MEAN, "background": "excluded", "num_cases": len(table.cases)}
    organs = {organ: summarise_organ(table, i) for i, organ in enumerate(table.targets)}
    mean = {metric: mean_of([row[metric] for row in organs.values()]) for metric in ORGAN_METRICS}
    failed = {FAILED: dict(failures)} if failures else {}
    summary: dict[str, Any] = to_json({"protocol": protocol, "organs": organs, "mean": mean, **failed})
    return summary


def summarise_organ(table: ScoreTable, index: int) -> dict[str, float]:
    """Sum up one organ over the cases.

    Returns:
        Mean of each metric over the cases where it is defined, and numbers of cases. num_cases: they hold the organ.
        num_missed: of these, no voxel of it is predicted. num_absent: they do not hold it. num_absent_predicted: of
        these, voxels of it are predicted.
    """
    values = {metric: array[:, index] for metric, array in table.values.items()}
    is_held, is_predicted = values["truth_voxels"] > 0, values["predicted_voxels"] > 0
    numbers = (is_held, is_held & ~is_predicted, ~is_held, ~is_held & is_predicted)
    means = {metric: mean_of(values[metric][is_held]) for metric in ORGAN_METRICS}
    return means | {key: int(found.sum()) for key, found in zip(CASE_COUNTS, numbers, strict=True)}


def mean_of(values: Sequence[float] | np.ndarray) -> float:
    """Average the values that are not NaN; NaN if there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def organ_csv(table: ScoreTable) -> str:
    """Write a line per case and organ; a cell is empty where the score is undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ORGAN_COLUMNS)
    for i, case in enumerate(table.cases):
        for j, organ in enumerate(table.targets):
            values = {metric: float(table.values[metric][i, j]) for metric in ORGAN_COLUMNS[2:]}
            cells = [v if metric in ORGAN_METRICS else int(v) for metric, v in values.items()]
            writer.writerow([case, organ, *("" if math.isnan(cell) else cell for cell in cells)])
    return text.getvalue()


def summary_text(summary: Mapping[str, Any]) -> str:
    """Write the table of a summary as aligned text, with the protocol below it."""
    return f"{aligned_table(summary_rows(summary))}\n\n{protocol_text(summary['protocol'])}"


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """Write the table of a summary in Markdown, with the protocol below it."""
    *rows, mean = summary_rows(summary)
    table = markdown_table([*rows, [f"**{cell}**" if cell else "" for cell in mean]])
    failed = "".join(f"- not scored: {name}: {reason}\n" for name, reason in summary.get(FAILED, {}).items())
    return f"{table}\n\nProtocol: {protocol_text(summary['protocol'])}.\n{failed and chr(10) + failed}"


def summary_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Format a summary as rows: a heading, a row per organ, the mean; "-" where there is no value."""

    def scores(row: Mapping[str, float | None]) -> list[str]:
        return ["-" if row[key] is None else form.format(row[key]) for key, (_, form) in ORGAN_METRICS.items()]

    organs = [[name, *scores(row), *(str(row[key]) for key in CASE_COUNTS)] for name, row in summary["organs"].items()]
    heading = ["organ", *(title for title, _ in ORGAN_METRICS.values()), *CASE_COUNTS.values()]
    return [heading, *organs, ["mean", *scores(summary["mean"]), *("" for _ in CASE_COUNTS)]]


def best_median_worst(table: ScoreTable) -> dict[str, str]:
    """Find the cases of the best, the median and the worst mean Dice; fewer of them if there are fewer cases."""
    means = {case: mean_of(row) for case, row in zip(table.cases, table.values["dice"], strict=True)}
    ranked = sorted((name for name in means if not math.isnan(means[name])), key=lambda name: -means[name])
    positions = (0, len(ranked) - 1, (len(ranked) - 1) // 2)
    chosen: dict[str, str] = {}
    for title, position in zip(PICTURED, positions, strict=True):
        if ranked and ranked[position] not in chosen.values():
            chosen[title] = ranked[position]
    return chosen


def mean_dice(rows: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Average the Dice of each class over the cases that hold it; NaN if none does.

    Args:
        rows: For each case, the Dice of each class.
        names: Names of the classes, background excluded.
    """
    values = np.asarray(rows, dtype=np.float64).reshape(-1, len(names))
    held = ~np.isnan(values)
    sums, nums = np.where(held, values, 0).sum(0), held.sum(0)
    return {name: float(s / n) if n else float("nan") for name, s, n in zip(names, sums, nums, strict=True)}
