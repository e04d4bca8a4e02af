"""What a run's page shows of classified images: metrics, confusion, protocol, and the most confident mistakes."""

from html import escape
from pathlib import Path

from hyspark.evaluation.classification.metrics import METRICS
from hyspark.evaluation.classification.scores import read_summary
from hyspark.evaluation.protocol import protocol_text
from hyspark.reports.html import figure_html, table


def score_parts(folder: Path) -> list[str]:
    """The folder of scores as parts of a page."""
    summary = read_summary(folder)
    shown = [[title, "-" if (v := summary["metrics"][key]) is None else f"{v:.3f}"] for key, title in METRICS.items()]
    classes = summary["classes"]
    counts = [[f"true {name}", *map(str, row)] for name, row in zip(classes, summary["confusion"], strict=True)]
    parts = [
        table([["metric", "value"], *shown], "numbers", header=True),
        table([["images", *(f"taken for {name}" for name in classes)], *counts], "numbers", header=True),
        f'<p class="note">{escape(protocol_text(summary["protocol"]))}</p>',
    ]
    if (folder / "mistakes.png").is_file():
        parts.append(
            f"<details><summary>Most confident mistakes</summary>{figure_html(folder / 'mistakes.png')}</details>"
        )
    return parts
