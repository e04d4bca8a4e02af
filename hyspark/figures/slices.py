"""Figures of 2D slices: views of images that are compared."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from hyspark.figures.panels import BACKGROUND, TEXT

VIEW_INCHES = 1.6
"""Edge of a view in the grid."""


def views_panel(views: Sequence[np.ndarray], names: Sequence[str]) -> Figure:
    """Draw the views (columns) of several images (rows), in the window 0..1.

    Args:
        views: float `(b, h, w)` or `(b, h, w, d)` each; of volumes, the middle slice is shown. Sample i of every view
            is of image i.
        names: names of the images.
    """
    rows, columns = len(views[0]), len(views)
    figure = Figure(
        figsize=(VIEW_INCHES * columns, VIEW_INCHES * rows + 0.3), facecolor=BACKGROUND, layout="compressed"
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for column, samples in enumerate(views):
        for row, sample in enumerate(samples):
            shown = sample if sample.ndim == 2 else sample[..., sample.shape[-1] // 2]
            axes = grid[row, column]
            axes.imshow(np.flipud(shown.T), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
            if column == 0:
                title = axes.set_title(names[row], color=TEXT, size=7, loc="left")
                title.set_parse_math(False)
    return figure
