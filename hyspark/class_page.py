"""What a run's page shows of classified images: metrics, confusion, protocol, and the most confident mistakes."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from hyspark.class_metrics import METRICS
from hyspark.class_scores import Classified, read_summary
from hyspark.figures import BACKGROUND, DPI, TEXT
from hyspark.report import figure_html, protocol_text, table

COLUMNS, MOST, EDGE = 6, 18, 1.7
"""Of the picture of mistakes: images in a row, in all, and their edge in inches."""


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


def mistakes_figure(scored: Classified, images: Sequence[Tensor]) -> Figure | None:
    """The most confident mistakes with their true and their predicted class; None where there is none.

    images: uint8 (c, h, w), in the order of `scored`.
    """
    shown = scored.mistakes[:MOST]
    if not shown:
        return None
    rows, columns = math.ceil(len(shown) / COLUMNS), min(COLUMNS, len(shown))
    figure = Figure(figsize=(EDGE * columns, (EDGE + 0.5) * rows), dpi=DPI, facecolor=BACKGROUND, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, shown, strict=False):
        image = images[index].permute(1, 2, 0).numpy()
        axes.imshow(image[:, :, 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
        predicted = int(scored.probabilities[index].argmax())
        title = axes.set_title(
            f"{Path(scored.names[index]).name}\n{scored.classes[scored.truth[index]]}, taken for "
            f"{scored.classes[predicted]} ({scored.probabilities[index].max():.0%})",
            color=TEXT,
            fontsize=5.5,
        )
        title.set_parse_math(False)
    return figure
