"""Validation scores of a fine-tuning run, from its metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hyspark.evaluation.classification.metrics import CLASSIFICATION_METRICS
from hyspark.evaluation.network_kind import NetworkKind
from hyspark.training.metrics_log import read_metrics

CRITERIA: dict[NetworkKind, str] = {"segmentation": "dice_mean", "classification": "accuracy"}
"""Metric by which a run keeps its best weights."""


class Validations(NamedTuple):
    """Scores of the best and of the last validation: Dice by organ, or metrics of classification by title."""

    kind: NetworkKind
    best: dict[str, float]
    last: dict[str, float]


def read_validations(run_folder: Path) -> Validations | None:
    """Read the scores of the best and of the last validation of a run; None if there is no validation with scores."""
    path = run_folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    for kind, criterion in CRITERIA.items():
        if found := [line for line in lines if criterion in line]:
            best = max(found, key=lambda line: line[criterion])  # the first of equals, as the run keeps its weights
            return Validations(kind, *(validation_scores(line, kind) for line in (best, found[-1])))
    return None


def validation_scores(line: Mapping[str, Any], kind: NetworkKind) -> dict[str, float]:
    """Return the scores in a line of metrics.jsonl, by their titles."""
    if kind == "segmentation":
        return dict(line["dice"])
    return {title: line[key] for key, title in CLASSIFICATION_METRICS.items() if key in line}
