"""The figure of the benefit report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyspark.figures.panels import DPI

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: for all eyes
MARKERS = "osD^vPX"


def benefit_figure(numbers: Mapping[str, Any], metric: str, title: str, samples: str) -> Figure:
    """Draw a metric against the number of labels, beside it the differences to the baseline.

    Args:
        numbers: The numbers of a comparison.
        metric: The metric.
        title: Its title.
        samples: What is scored, in the plural.
    """
    names, counts = list(numbers["starts"]), numbers["num_labelled"]
    figure = Figure(figsize=(10.5, 4.4), dpi=DPI, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, name in enumerate(names):
        cells = [cell for cell in numbers["cells"] if cell["start"] == name]
        shift = 1.025 ** (index - (len(names) - 1) / 2)  # bars beside, not upon, each other
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        draw_line(left, cells, [cell[metric] for cell in cells], shift, name, style)
        for cell in cells:
            values = 100 * np.array(list(cell[metric]["by_seed"].values()))
            x = np.full(len(values), cell["num_labelled"] * shift * 0.985)  # to the left of the bar
            left.plot(x, values, ls="none", ms=4.5, mew=0, alpha=0.4, **style)
        if index:
            draw_line(right, cells, [cell["difference"][metric] for cell in cells], shift, name, style)
    right.axhline(0, color=COLOURS[0], lw=1)
    left.set_title(f"{title}, %", loc="left", fontsize=10, weight="bold")
    right.set_title(f"{title} minus that of {numbers['baseline']}, points", loc="left", fontsize=10, weight="bold")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"labelled {samples}; bars: 95 % interval over {samples} and seeds", fontsize=8.5)
        axes.grid(alpha=0.2, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    legend = left.legend(frameon=False, fontsize=8.5, loc="lower right")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def draw_line(
    axes: Axes,
    cells: Sequence[Mapping[str, Any]],
    estimates: Sequence[Mapping[str, float]],
    shift: float,
    label: str,
    style: Mapping[str, Any],
) -> None:
    """Draw the defined means of cells with their intervals, in points."""
    known = [(c["num_labelled"] * shift, e) for c, e in zip(cells, estimates, strict=True) if math.isfinite(e["mean"])]
    x = [position for position, _ in known]
    mean, low, high = (100 * np.array([e[name] for _, e in known]) for name in ("mean", "low", "high"))
    bars = np.maximum([mean - low, high - mean], 0)  # by rounding, the mean of equal values may lie beside them
    axes.errorbar(x, mean, yerr=bars, label=label, lw=1.8, ms=6, capsize=3, elinewidth=1, **style)
