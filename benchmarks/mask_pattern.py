"""Why masking needs more than zeros in the input: which positions a network works on, layer by layer.

    python benchmarks/mask_pattern.py docs/explanation/mask_pattern.png

Convolutions of ones in place of trained ones, so that a position is not zero where it has seen anything.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from hyspark.figures.panels import BACKGROUND, TEXT, save_figure
from hyspark.figures.slices import VIEW_INCHES
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import draw_visible, visible_at

PATCH, GRID, FRACTION = 16, (6, 6), 0.6
LAYERS = (0, 2, 4, 8, 12)


def patterns(x: Tensor, most: int) -> list[Tensor]:
    """Where a map (1, 1, h, w) is not zero: as it is, and after each of `most` convolutions."""
    found = [x != 0]
    for _ in range(most):
        x = (F.conv2d(x, torch.ones(1, 1, 3, 3), padding=1) != 0).float()
        found.append(x != 0)
    return found


def mask_figure(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Positions at work in the layers (columns) of a network, for several ways of masking (rows): bool (h, w), with
    their fraction below.
    """
    size = (VIEW_INCHES * len(titles), (VIEW_INCHES + 0.25) * len(rows))
    figure = Figure(figsize=size, facecolor=BACKGROUND, layout="compressed")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (name, patterns) in enumerate(rows.items()):
        for column, (title, pattern) in enumerate(zip(titles, patterns, strict=True)):
            axes = grid[row, column]
            axes.imshow(pattern, cmap="gray", vmin=0, vmax=1.2, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{pattern.mean():.0%} at work", color=TEXT, size=7)
            if row == 0:
                axes.set_title(title, color=TEXT, size=8)
            if column == 0:
                axes.set_ylabel(name, color=TEXT, size=8)
    return figure


if __name__ == "__main__":
    visible = draw_visible(GRID, FRACTION, [torch.Generator().manual_seed(3)])
    image = visible_at(visible, tuple(PATCH * n for n in GRID)).float()
    ordinary = patterns(image, max(LAYERS))
    with hidden(visible):
        kept = patterns(image, max(LAYERS))
    rows = {"zeros in the input alone": ordinary, "hidden in every layer": kept}
    chosen = {name: [found[n][0, 0].numpy() for n in LAYERS] for name, found in rows.items()}
    titles = ["input" if n == 0 else f"after {n} convolutions" for n in LAYERS]
    save_figure(mask_figure(chosen, titles), Path(sys.argv[1]))
