"""A figure of a classifier's most confident mistakes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from hyspark.figures.panels import BACKGROUND, DPI, TEXT

IMAGES_PER_ROW, MAX_IMAGES, IMAGE_INCHES = 6, 18, 1.7
"""Images in a row and in all, and their edge."""


class MistakenImages(Protocol):
    """Classified images, as far as the figure reads them.

    Attributes:
        names: names of the images.
        truth: class indices, int `(n,)`.
        probabilities: predicted probabilities `(n, classes)`.
        classes: names of the classes.
        mistakes: indices of wrongly classified images, the most confident first.
    """

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
    """Draw the most confident mistakes with true and predicted class; return None if there is no mistake.

    Args:
        scored: the classified images.
        images: uint8 `(c, h, w)` each, in the order of `scored`.
    """
    shown = scored.mistakes[:MAX_IMAGES]
    if not shown:
        return None
    rows, columns = math.ceil(len(shown) / IMAGES_PER_ROW), min(IMAGES_PER_ROW, len(shown))
    size = (IMAGE_INCHES * columns, (IMAGE_INCHES + 0.5) * rows)
    figure = Figure(figsize=size, dpi=DPI, facecolor=BACKGROUND, layout="constrained")
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
