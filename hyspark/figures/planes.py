"""Pictures of views that are compared."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from hyspark.figures.panels import BACKGROUND, TEXT

EDGE = 1.6
"""Inches of a picture in a grid."""


def views_panel(views: Sequence[np.ndarray], names: Sequence[str]) -> Figure:
    """Views (columns) of several images (rows), in the window 0..1.

    views: float (b, h, w), or (b, h, w, d), of which the middle plane is shown; the i-th sample of all is of one image.
    names: of the images.
    """
    rows, columns = len(views[0]), len(views)
    figure = Figure(figsize=(EDGE * columns, EDGE * rows + 0.3), facecolor=BACKGROUND, layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for column, samples in enumerate(views):
        for row, sample in enumerate(samples):
            plane = sample if sample.ndim == 2 else sample[..., sample.shape[-1] // 2]
            axes = grid[row, column]
            axes.imshow(np.flipud(plane.T), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
            if column == 0:
                title = axes.set_title(names[row], color=TEXT, size=7, loc="left")
                title.set_parse_math(False)
    return figure
