"""Curves of a run's metrics."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyspark.figures.panels import DPI, class_colours

Curve = tuple[np.ndarray, np.ndarray]  # steps, values
MAX_POINTS = 2000  # of a curve; more are not visible

CURVES = {
    "Loss": ["loss", "val_loss"],
    "Probe Dice": ["probe_dice"],
    "Learning rate": ["lr", "wd"],
    "Gradient norm": ["grad_norm"],
    "Samples per second": ["samples_per_second"],
    "Dice": ["dice_mean"],
    "Classification": ["auc", "accuracy", "f1"],
}
ORGANS = {"Dice": "dice.", "Probe Dice": "probe."}  # panels that also show organs: prefix of the metrics' names


def curves_figure(curves: Mapping[str, Curve], *, dark: bool) -> Figure | None:
    """Draw the metrics of a run over the step, one panel per group; return None if no known metric was measured.

    Args:
        curves: steps and values of each metric; an organ's Dice is named "dice.ORGAN", or "probe.ORGAN" of the probe.
        dark: whether the page is dark.
    """
    panels = []
    for title, keys in CURVES.items():
        organs = [key for key in curves if title in ORGANS and key.startswith(ORGANS[title])]
        shown = {key: curves[key] for key in [*keys, *organs] if key in curves}
        if shown:
            panels.append((title, shown))
    if not panels:
        return None
    paper, ink = ("#1b1f26", "#c9d0da") if dark else ("#ffffff", "#3a4250")
    num_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10.5, 2.5 * num_rows), dpi=DPI, facecolor=paper, layout="constrained")
    rows = figure.subfigures(num_rows, 1, squeeze=False)[:, 0]  # so that a legend narrows its own row only
    for index, row in enumerate(rows):
        here = panels[2 * index : 2 * index + 2]
        row.set_facecolor(paper)
        for axes, (title, shown) in zip(row.subplots(1, len(here), squeeze=False)[0], here, strict=True):
            draw_curves(axes, title, shown, ink)
    return figure


def draw_curves(axes: Axes, title: str, curves: Mapping[str, Curve], ink: str) -> None:
    """Draw the curves of one panel, text and grid in the colour `ink`; several curves get a legend."""
    colours = class_colours(len(curves) + 1)[1:, :3]
    sides = [axes]
    for (key, (steps, values)), colour in zip(curves.items(), colours, strict=True):
        every = slice(None, None, math.ceil(len(steps) / MAX_POINTS))
        dot = "." if len(steps) == 1 else None
        if key == "val_loss":
            axes.plot(steps, values, "o", ms=4, mew=0, color=colour, label="validation", zorder=3)
        elif key in ("dice_mean", "probe_dice"):
            axes.plot(steps, values, ".-", lw=2.2, color=ink, label="mean", zorder=3)
        elif title == "Classification":
            axes.plot(steps, values, ".-", lw=1.4, color=colour, label=key)
        elif title in ORGANS:
            axes.plot(steps, values, ".-", lw=0.9, ms=3, color=colour, label=key.removeprefix(ORGANS[title]))
        elif key == "lr":
            axes.plot(steps, values, marker=dot, color=colour, label="learning rate (left)")
        elif key == "wd":
            sides.append(axes.twinx())
            sides[1].plot(steps, values, "--", marker=dot, color=colour, label="weight decay (right)")
        else:
            axes.plot(steps[every], values[every], lw=0.7, marker=dot, color=colour, alpha=0.35)
            axes.plot(steps[every], smooth(values)[every], lw=1.6, color=colour, label="smoothed")
    axes.set_title(title, fontsize=9, color=ink, loc="left", weight="bold")
    axes.set_xlabel("step", fontsize=8, color=ink)
    axes.grid(color=ink, alpha=0.15, lw=0.6)
    for side in sides:
        side.set_facecolor("none")
        side.tick_params(colors=ink, labelsize=7.5)
        side.yaxis.set_major_formatter("{x:g}")
        side.spines[:].set_visible(False)
    if len(curves) > 1:
        lines = [line for side in sides for line in side.get_legend_handles_labels()[0]]
        axes.legend(
            handles=lines,
            # Dice has many names: beside the axes; the others go above, opposite the title
            loc="upper left" if title in ORGANS else "lower right",
            bbox_to_anchor=(1, 1) if title in ORGANS else (1, 0.98),
            ncols=1 + len(curves) // 12 if title in ORGANS else 2,
            fontsize=7,
            labelcolor=ink,
            frameon=False,
        )


def smooth(values: np.ndarray) -> np.ndarray:
    """Compute the centred running mean over a fortieth of a curve, ignoring NaN."""
    window = np.ones(len(values) // 40 * 2 + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(float), window, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
