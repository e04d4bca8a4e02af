"""A figure of the images that a classifier was most confidently wrong about."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from hyspark.figures.panels import BACKGROUND, DPI, TEXT

COLUMNS, MOST, EDGE = 6, 18, 1.7
"""Of the picture of mistakes: images in a row, in all, and their edge in inches."""


class MistakenImages(Protocol):
    """Classified images: what the figure asks of them. mistakes: indices, the most confident first."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def truth(self) -> np.ndarray: ...
    @property
    def probabilities(self) -> np.ndarray: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def mistakes(self) -> list[int]: ...


def mistakes_figure(scored: MistakenImages, images: Sequence[Tensor]) -> Figure | None:
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
