"""Scores of a network for its model card: those of its run's best validation, and those of `hyspark evaluate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hyspark.evaluation.network_kind import fine_tuned_file
from hyspark.evaluation.protocol import read_summary
from hyspark.evaluation.segmentation.metrics import ORGAN_METRICS
from hyspark.evaluation.segmentation.scores import summary_rows
from hyspark.evaluation.validations import read_validations
from hyspark.utils.tables import Rows
from hyspark.utils.text import count_of


class MeasuredScores(NamedTuple):
    """Scores of a network, without names of cases and paths.

    Attributes:
        cases: What was scored, in words.
        kind: The same as one word.
        mean: Mean of each metric over the organs, by the key of the metric.
        table: Scores of each organ, with a heading.
        note: How to read them, a sentence.
    """

    cases: str
    kind: str
    mean: Mapping[str, float]
    table: Rows
    note: str


def run_scores(run_folder: Path) -> MeasuredScores | None:
    """Read the Dice of the best validation of a fine-tuning run, which the weights are of; None if it has none."""
    found = read_validations(run_folder)
    if found is None or found.kind != "segmentation" or not found.best:
        return None
    scored = run_folder / "scores"
    protocol = read_summary(scored)["protocol"] if (scored / "summary.json").is_file() else {}
    number = f"{count_of(protocol['num_cases'], 'validation case')}" if "num_cases" in protocol else "validation cases"
    return MeasuredScores(
        f"{number} of the fine-tuning",
        "validation",
        {"dice": sum(found.best.values()) / len(found.best)},
        [["organ", "Dice"], *([organ, f"{dice:.3f}"] for organ, dice in found.best.items())],
        "These cases chose the weights, so new cases may score lower.",
    )


def read_scores(folders: Sequence[Path], weights: Path) -> list[MeasuredScores]:
    """Read folders of scores that `hyspark evaluate` wrote for a network.

    Args:
        folders: The folders.
        weights: The network's file or folder.

    Raises:
        FileNotFoundError: A folder holds no scores.
        ValueError: The scores are of another network, or of a classifier.
    """
    return [evaluation_scores(folder, weights) for folder in folders]


def evaluation_scores(folder: Path, weights: Path) -> MeasuredScores:
    """Read a folder of scores, see `read_scores`."""
    summary: dict[str, Any] = read_summary(folder)
    if "organs" not in summary:
        raise ValueError(f"{folder}: expected scores of a segmentation network, got those of a classifier")
    protocol = summary["protocol"]
    of = Path(str(protocol.get("weights")))
    file = fine_tuned_file(weights).resolve()
    if file not in ((of / "best.pth").resolve(), of.resolve(), (of / file.name).resolve()):
        raise ValueError(
            f"{folder}: expected scores of {weights}, got those of {of}; make them by: hyspark evaluate {weights} DATA "
            f"--out {folder}"
        )
    seen = protocol.get("scored_cases_trained_on", "unknown")
    note = {
        0: "The network was trained on none of them.",
        "unknown": "Whether the network was trained on some of them is unknown.",
    }.get(seen, f"The network was trained on {seen} of them.")
    mean = {metric: summary["mean"][metric] for metric in ORGAN_METRICS if summary["mean"].get(metric) is not None}
    cases = count_of(protocol["num_cases"], "labelled case")
    return MeasuredScores(cases, "evaluation", mean, summary_rows(summary), note)
