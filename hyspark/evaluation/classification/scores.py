"""A folder of classification scores.

It holds cases.csv (see score_table.py), summary.json (protocol, metrics, confusion matrix) and mistakes.png.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.evaluation.classification.metrics import CLASSIFICATION_METRICS, classification_scores, confusion_matrix
from hyspark.evaluation.protocol import FAILED
from hyspark.evaluation.score_table import IMAGE_COLUMNS, PROBABILITY_OF, ScoreTable
from hyspark.utils.atomic import to_json, write_json, write_whole


@dataclass(frozen=True)
class Classified:
    """n classified images.

    Attributes:
        names: Names of the images.
        truth: Their true class numbers (n,).
        probabilities: (n, classes).
        classes: Names of the classes.
    """

    names: tuple[str, ...]
    truth: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def from_table(cls, table: ScoreTable) -> "Classified":
        """Read the images of a table of scores."""
        return cls(table.cases, table.values["truth"].argmax(1), table.values["probability"], table.targets)

    @property
    def mistakes(self) -> list[int]:
        """Indices of wrongly classified images, the most confident first."""
        wrong = np.flatnonzero(self.probabilities.argmax(1) != self.truth)
        return [int(i) for i in wrong[np.argsort(-self.probabilities[wrong].max(1), kind="stable")]]


def write_classification_scores(
    folder: Path, scored: Classified, protocol: Mapping[str, Any], failures: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write cases.csv and summary.json.

    Args:
        folder: The folder.
        scored: The classified images.
        protocol: How they were scored.
        failures: Reasons of the images that were not scored, by name.

    Returns:
        The summary, see `classification_summary`.
    """
    write_probabilities(folder / "cases.csv", scored, IMAGE_COLUMNS[1], scored.truth)
    summary = classification_summary(scored, protocol, failures)
    write_json(folder / "summary.json", summary)
    return summary


def classification_summary(
    scored: Classified, protocol: Mapping[str, Any], failures: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Sum up classified images; the arguments are those of `write_classification_scores`.

    Returns:
        The content of summary.json: "protocol" with the number of images, "metrics" (None if undefined), "classes",
        "confusion"; and, if there are any, the failures (`FAILED`).
    """
    summary: dict[str, Any] = to_json(
        {
            "protocol": {**protocol, "num_images": len(scored.names)},
            "metrics": classification_scores(scored.truth, scored.probabilities),
            "classes": list(scored.classes),
            "confusion": confusion_matrix(scored.truth, scored.probabilities),
            **({FAILED: dict(failures)} if failures else {}),
        }
    )
    return summary


def write_probabilities(path: Path, images: Classified, column: str, labels: Sequence[int] | np.ndarray) -> None:
    """Write a line for each image: its file, a class, and the probability of each class in full precision.

    Names that are not UTF-8 keep their bytes.

    Args:
        path: The CSV file.
        images: The images.
        column: Heading of the class.
        labels: Class number of each image in that column.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([IMAGE_COLUMNS[0], column, *(f"{PROBABILITY_OF}{name}" for name in images.classes)])
    for name, label, row in zip(images.names, labels, images.probabilities, strict=True):
        writer.writerow([name, images.classes[label], *(repr(float(p)) for p in row)])
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def metrics_text(metrics: Mapping[str, float | None]) -> str:
    """Write the metrics in one line; "-" where a value is undefined."""
    defined = {key: value for key, value in metrics.items() if value is not None and not math.isnan(value)}
    titles = CLASSIFICATION_METRICS.items()
    return ", ".join(f"{title} {defined[key]:.4f}" if key in defined else f"{title} -" for key, title in titles)


def class_metric_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Format the metrics of a summary as rows, a heading first; "-" where a value is undefined."""
    metrics = summary["metrics"]
    cells = [[title, "-" if metrics[k] is None else f"{metrics[k]:.3f}"] for k, title in CLASSIFICATION_METRICS.items()]
    return [["metric", "value"], *cells]


def confusion_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Format the confusion matrix of a summary as rows, a heading first."""
    classes = summary["classes"]
    counts = [[f"true {name}", *map(str, row)] for name, row in zip(classes, summary["confusion"], strict=True)]
    return [["images", *(f"predicted {name}" for name in classes)], *counts]
