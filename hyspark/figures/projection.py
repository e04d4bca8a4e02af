"""Vectors in two dimensions, coloured by class."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from hyspark.figures.panels import DPI, class_colours

PAIR = ("#0072B2", "#D55E00")
"""Colours of two classes, of Okabe and Ito: for all eyes."""


def projection_figure(points: np.ndarray, truth: np.ndarray, classes: Sequence[str], title: str, axes: str) -> Figure:
    """Draw vectors as points.

    Args:
        points: (n, 2).
        truth: Class numbers (n,).
        classes: Names of the classes.
        title: Title, the column of the classes.
        axes: Name of the axes, which get a number.
    """
    figure = Figure(figsize=(6, 5), dpi=DPI, facecolor="white", layout="constrained")
    panel = figure.subplots()
    colours = PAIR if len(classes) == 2 else [tuple(colour) for colour in class_colours(len(classes) + 1)[1:, :3]]
    for number, (name, colour) in enumerate(zip(classes, colours, strict=True)):
        own = points[truth == number]
        panel.scatter(own[:, 0], own[:, 1], s=16, color=colour, alpha=0.75, linewidths=0, label=f"{name} ({len(own)})")
    panel.set_xlabel(f"{axes} 1", fontsize=8.5)
    panel.set_ylabel(f"{axes} 2", fontsize=8.5)
    panel.set_title(title, loc="left", fontsize=10, weight="bold").set_parse_math(False)
    panel.grid(alpha=0.2, lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    for text in panel.legend(frameon=False, fontsize=8.5, loc="best").get_texts():
        text.set_parse_math(False)
    return figure
