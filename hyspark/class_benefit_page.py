"""The benefit report on classification: the numbers of `class_comparison.compare_classified` as Markdown, picture and
JSON.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyspark.atomic import write_json, write_whole
from hyspark.benefit_page import benefit_figure, common, fewer_labels, left_out, metric_rows, rates, table
from hyspark.class_metrics import METRICS
from hyspark.figures import save_figure

CLASSIFICATION_READING = """\
With two classes the AUC is that of the second in sorted order, with more the mean over each against the rest; F1 is the
mean over classes. Means are over seeds; in parentheses their range. A difference is over pairs: the same seed (so the
same training images, batches and fresh weights) and the same scored images on both sides. In brackets is its 95 %
bootstrap interval: seeds and images are drawn anew with pairs kept, and the metric is computed anew on what was drawn;
bold where it leaves out 0. With few seeds it is too narrow where seeds differ more than images do, and with one seed it
holds for that seed alone. Images are taken to be independent: where several are of one patient, it is too narrow."""


def write_class_benefit(out: Path, numbers: Mapping[str, Any]) -> Path:
    """Write benefit.json, benefit.png and benefit.md into `out`; returns the last. Numbers: of `compare_classified`,
    with "scored_on", and what the runs share as "recipe" and their weights' digests as "digests".
    """
    write_json(out / "benefit.json", numbers)
    save_figure(benefit_figure(numbers, "auc", "AUC", "images"), out / "benefit.png")
    write_whole(out / "benefit.md", classification_page(numbers).encode())
    return out / "benefit.md"


def classification_page(numbers: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    missing = numbers["missing"]
    parts = [
        "# Does pre-training pay?",
        f"{numbers['finished']} of {numbers['planned']} runs are finished, scored on {len(numbers['images'])} "
        f"{numbers['scored_on']} images." + (f" Not finished: {', '.join(missing)}." if missing else ""),
    ]
    if numbers["scored_on"] == "validation":
        parts += ["These images chose the weights of each run, too, so that all values are optimistic."]
    parts += ["![AUC against the number of labelled images, and differences to the baseline](benefit.png)"]
    for metric, title in METRICS.items():
        parts += [f"## {title[0].upper()}{title[1:]}, %", table(metric_rows(numbers, metric, "images"))]
    parts += [*left_out(numbers, "images"), *fewer_labels(numbers, "images"), *rates(numbers)]
    return "\n\n".join([*parts, CLASSIFICATION_READING, *common(numbers, "images")]) + "\n"
