"""The table of scores of segmentation and classification, and the reader of its file, cases.csv.

A score is the value of a metric for a case and a target:
- segmentation: targets are organs; metrics are Dice, HD95, surface Dice, and voxels of truth and prediction
- classification: targets are classes; metrics are the probability, and the truth, 1 for the true class and else 0

cases.csv is laid out for people:
- segmentation: a line per case and organ, a column per metric
- classification: a line per image, with its true class and a column per class
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hyspark.evaluation.segmentation.metrics import ORGAN_METRICS, VOXEL_COUNTS

ORGAN_COLUMNS = ("case", "organ", *ORGAN_METRICS, *VOXEL_COUNTS)
"""Heading of cases.csv of segmentation."""
IMAGE_COLUMNS = ("file", "truth")
"""Heading of cases.csv of classification, followed by a column per class."""
PROBABILITY_OF = "probability of "
"""Begin of the heading of a class's column."""


@dataclass(frozen=True)
class ScoreTable:
    """Scores of n cases and m targets.

    Attributes:
        cases: Names of the cases.
        targets: Names of the targets.
        values: By metric, float64 (n, m); NaN where there is no score.
    """

    cases: tuple[str, ...]
    targets: tuple[str, ...]
    values: Mapping[str, np.ndarray]

    def take(self, cases: Sequence[str], targets: Sequence[str]) -> "ScoreTable":
        """Select cases and targets, in this order; unknown ones have no scores."""
        chosen = []
        for own, wanted in ((self.cases, cases), (self.targets, targets)):
            index = {name: i for i, name in enumerate(own)}
            chosen.append([index.get(name, len(own)) for name in wanted])
        padded = {name: np.pad(v, ((0, 1), (0, 1)), constant_values=np.nan) for name, v in self.values.items()}
        return ScoreTable(tuple(cases), tuple(targets), {name: v[np.ix_(*chosen)] for name, v in padded.items()})

    def rows(self) -> list[dict[str, str | float]]:
        """Return a row per score, with the keys case, target, metric and value; NaN where undefined."""
        return [
            {"case": case, "target": target, "metric": metric, "value": float(values[i, j])}
            for i, case in enumerate(self.cases)
            for j, target in enumerate(self.targets)
            for metric, values in self.values.items()
        ]


def read_score_table(path: Path) -> ScoreTable:
    """Read a cases.csv, of segmentation or classification. Names that are not UTF-8 keep their bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a cell is no number; the message names the file.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    of_images = header[:2] == list(IMAGE_COLUMNS)
    try:
        if not lines:
            raise ValueError("no scores")
        return image_table(header, lines) if of_images else organ_table(header, lines)
    except (ValueError, IndexError) as error:
        expected = "file, truth and the probability of each class" if of_images else ", ".join(ORGAN_COLUMNS)
        raise ValueError(
            f"{path}: expected {expected} in each line, got {len(lines)} lines below {','.join(header)} ({error}); "
            "remove the run's folder to have it made again"
        ) from error


def organ_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> ScoreTable:
    """Build the table of a cases.csv of segmentation; an empty cell is an undefined score."""
    indices = [header.index(column) for column in ORGAN_COLUMNS]
    rows = [[line[i] for i in indices] for line in lines]
    cases, organs = ({name: i for i, name in enumerate(dict.fromkeys(row[k] for row in rows))} for k in (0, 1))
    values = {metric: np.full((len(cases), len(organs)), np.nan) for metric in ORGAN_COLUMNS[2:]}
    for case, organ, *cells in rows:
        for metric, cell in zip(values, cells, strict=True):
            values[metric][cases[case], organs[organ]] = float(cell or "nan")
    return ScoreTable(tuple(cases), tuple(organs), values)


def image_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> ScoreTable:
    """Build the table of a cases.csv of classification."""
    classes = [column.removeprefix(PROBABILITY_OF) for column in header[2:]]
    truth = np.array([[classes.index(line[1]) == i for i in range(len(classes))] for line in lines], float)
    probabilities = np.array([[float(cell) for cell in line[2:]] for line in lines])
    values = {"truth": truth, "probability": probabilities.reshape(len(lines), len(classes))}
    return ScoreTable(tuple(line[0] for line in lines), tuple(classes), values)
