"""The scores of a set of classified images as a folder: cases.csv (file, truth, probability of each class) and
summary.json (protocol, metrics, confusion). Reports and comparisons rest on these.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.evaluation.classification.metrics import METRICS, class_scores, confusion
from hyspark.utils.atomic import to_json, write_json, write_whole

PREFIX = "probability of "


@dataclass(frozen=True)
class Classified:
    """Images with their true class numbers (n,) and probabilities (n, classes)."""

    names: tuple[str, ...]
    truth: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]

    @property
    def mistakes(self) -> list[int]:
        """Indices of wrongly classified images, the most confident first."""
        wrong = np.flatnonzero(self.probabilities.argmax(1) != self.truth)
        return [int(i) for i in wrong[np.argsort(-self.probabilities[wrong].max(1), kind="stable")]]


def write_folder(folder: Path, scored: Classified, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Write cases.csv, then summary.json; returns what the latter holds: {"protocol": ..., "metrics": {...}, "classes":
    ..., "confusion": ...}, None where a metric is not defined.
    """
    metrics = class_scores(scored.truth, scored.probabilities)
    summary: dict[str, Any] = to_json(
        {
            "protocol": {**protocol, "num_images": len(scored.names)},
            "metrics": metrics,
            "classes": list(scored.classes),
            "confusion": confusion(scored.truth, scored.probabilities),
        }
    )
    truth = [scored.classes[label] for label in scored.truth]
    write_table(folder / "cases.csv", scored.names, {"truth": truth}, scored.classes, scored.probabilities)
    write_json(folder / "summary.json", summary)
    return summary


def write_table(
    path: Path,
    names: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    classes: Sequence[str],
    probabilities: np.ndarray,
) -> None:
    """Write a row for each image: its file, further columns, and the probability of each class in full precision. Names
    that are no UTF-8 keep their bytes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *columns, *(f"{PREFIX}{name}" for name in classes)])
    for index, name in enumerate(names):
        own = [values[index] for values in columns.values()]
        writer.writerow([name, *own, *(repr(float(p)) for p in probabilities[index])])
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_cases(path: Path) -> Classified:
    """What a cases.csv holds.

    Raises FileNotFoundError where there is none; ValueError, naming the file, where it is of another kind.
    """
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    classes = tuple(name.removeprefix(PREFIX) for name in header[2:])
    try:
        if header[:2] != ["file", "truth"] or not rows:
            raise ValueError(f"its header is {header} and it has {len(rows)} lines")
        truth = np.array([classes.index(row[1]) for row in rows])
        probabilities = np.array([[float(cell) for cell in row[2:]] for row in rows]).reshape(len(rows), len(classes))
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: expected file, truth and the probability of each class in each line ({error}); remove the run's "
            "folder to have it made again"
        ) from error
    return Classified(tuple(row[0] for row in rows), truth, probabilities, classes)


def read_summary(folder: Path) -> dict[str, Any]:
    """What summary.json of a folder of scores holds."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def metrics_text(metrics: Mapping[str, float | None]) -> str:
    """The metrics in one line."""
    known = {key: value for key, value in metrics.items() if value is not None and not math.isnan(value)}
    return ", ".join(f"{title} {known[key]:.4f}" if key in known else f"{title} -" for key, title in METRICS.items())
