"""Figures of volumes: arrays in, `matplotlib.figure.Figure` out.

Volumes are `(h, w, d)` in RAS: axis 0 grows to the patient's right, axis 1 to the front, axis 2 to the head. Figures
follow the radiological convention:

- the patient's right is on the viewer's left;
- the front is up in axial slices, the head in coronal and sagittal ones.

Making a figure touches no global state; neither pyplot nor torch is needed.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hyspark.utils.atomic import write_whole

SLICE_AXES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
"""The volume's axes that run across and up a slice of this name; the third axis is the one that is cut."""
SIDE_LETTERS = {"axial": "RL", "coronal": "RL", "sagittal": "AP"}
"""The patient's side at the left and at the right edge of a displayed slice."""

DPI = 110
COLUMN, GAP, LEFT, TOP = 288, 4, 26, 58  # pixels; 288 = 3 x 96, so that a 96-voxel crop is enlarged exactly
BACKGROUND, TEXT = "#14171c", "#e6e9ee"
HIDDEN = "#4a6484"  # hidden patches: a blue that no grey-scale picture contains
MAX_ERROR = 0.5


def reconstruction_panel(
    volume: np.ndarray,
    visible: np.ndarray,
    reconstruction: np.ndarray,
    *,
    title: str,
    spacing: tuple[float, float, float] = (1, 1, 1),
    slices: Sequence[str] = tuple(SLICE_AXES),
) -> Figure:
    """Draw the centre slices (rows) of input, masked input, reconstruction and absolute error (columns).

    At visible voxels the reconstruction repeats the input and the error is zero.

    Args:
        volume: float `(h, w, d)`, shown in the fixed window 0..1.
        visible: bool `(h, w, d)`, True where the encoder saw the voxel.
        reconstruction: float `(h, w, d)`, shown in the same window.
        title: heading of the figure.
        spacing: mm per voxel.
        slices: orientations to show.

    Raises:
        ValueError: if the three shapes differ or are not 3D.
    """
    check_shapes(volume=volume, visible=visible, reconstruction=reconstruction)
    seen = visible.astype(bool)
    completed = np.where(seen, volume, reconstruction)
    columns = {
        "input": volume,
        "masked": np.where(seen, volume, np.nan),
        "reconstruction": completed,
        "absolute error": np.abs(completed - volume),
    }
    centre = [size // 2 for size in volume.shape]
    grey = colormaps["gray"].with_extremes(bad=HIDDEN)
    figure, grid = slice_grid(list(columns), volume.shape, spacing, title=title, right=48, slices=slices)
    for (name, column), axes in grid.items():
        is_error = column == "absolute error"
        image = axes.imshow(
            display_slice(columns[column], name, centre),
            cmap=colormaps["inferno"] if is_error else grey,
            vmin=0,
            vmax=MAX_ERROR if is_error else 1,
            aspect=pixel_aspect(name, spacing),
            interpolation="nearest",
        )
    box, pixel = grid[slices[0], "absolute error"].get_position(), 1 / (figure.get_figwidth() * DPI)
    bar = figure.add_axes((box.x1 + 8 * pixel, box.y0, 9 * pixel, box.height), label="scale")
    figure.colorbar(image, cax=bar, ticks=[0, MAX_ERROR / 2, MAX_ERROR])  # the last image drawn is an error
    bar.tick_params(colors=TEXT, labelsize=6.5, length=2, pad=2)
    return figure


def segmentation_panel(
    volume: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    class_names: Sequence[str],
    *,
    title: str,
    spacing: tuple[float, float, float] = (1, 1, 1),
) -> Figure:
    """Draw three slices (rows) of input, true labels, and prediction with the outlines of the truth (columns).

    The slices go through the centre of mass of the true labels. A legend names the classes.

    Args:
        volume: float `(h, w, d)`, shown in the window 0..1.
        truth: labels `(h, w, d)`; 0 is the background, which is not painted.
        prediction: labels `(h, w, d)`.
        class_names: name of each label, from 0.
        title: heading of the figure.
        spacing: mm per voxel.

    Raises:
        ValueError: if the three shapes differ or are not 3D, or if a label has no name.
    """
    check_shapes(volume=volume, truth=truth, prediction=prediction)
    largest = int(max(truth.max(), prediction.max()))
    if largest >= len(class_names):
        raise ValueError(
            f"class_names: expected a name for every label from 0 (background) to {largest}, "
            f"got {len(class_names)} names; add the missing ones"
        )
    labelled = np.nonzero(truth > 0)
    centre = [int(at.mean()) if at.size else n // 2 for at, n in zip(labelled, truth.shape, strict=True)]
    names, colours = list(class_names[1:]), class_colours(len(class_names))
    per_row = max(1, 3 * COLUMN // (36 + 7 * max(map(len, names), default=0)))
    footer = 14 + 19 * math.ceil(len(names) / per_row)
    columns = ["input", "truth", "prediction"]
    figure, grid = slice_grid(columns, volume.shape, spacing, title=title, bottom=footer)
    for (name, column), axes in grid.items():
        aspect = pixel_aspect(name, spacing)
        axes.imshow(display_slice(volume, name, centre), cmap="gray", vmin=0, vmax=1, aspect=aspect)
        if column != "input":
            labels = display_slice(truth if column == "truth" else prediction, name, centre).astype(int)
            axes.imshow(colours[labels.clip(min=0)], aspect=aspect, interpolation="nearest")
        if column == "prediction":
            outline(axes, display_slice(truth, name, centre), colours)
    figure.legend(
        [Patch(facecolor=tuple(colour[:3])) for colour in colours[1:]],
        names,
        loc="lower center",
        ncols=per_row,
        fontsize=8,
        labelcolor=TEXT,
        frameon=False,
        handlelength=1,
        borderaxespad=0.2,
        columnspacing=1.2,
    )
    return figure


def outline(axes: Axes, labels: np.ndarray, colours: np.ndarray) -> None:
    """Draw the borders of the labels of a displayed slice, each in the opaque colour of its class."""
    axes.autoscale(False)
    for value in np.unique(labels[labels > 0]):
        edge = np.pad(labels == value, 1).astype(float)  # closes an organ at the border of the slice
        rows, columns = (np.arange(size) - 1 for size in edge.shape)
        axes.contour(columns, rows, edge, levels=[0.5], colors=[colours[int(value), :3]], linewidths=0.9)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically; make its folders."""
    write_whole(Path(path), figure_png(figure))


def figure_png(figure: Figure) -> bytes:
    """Encode a figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def display_slice(volume: np.ndarray, name: str, at: Sequence[int]) -> np.ndarray:
    """Cut a slice of an RAS volume `(h, w, d)` through the voxel `at`, as displayed: row 0 is the top."""
    (cut,) = {0, 1, 2} - set(SLICE_AXES[name])
    return np.take(volume, at[cut], axis=cut).T[::-1, ::-1]


def check_shapes(**volumes: np.ndarray) -> None:
    """Raise ValueError unless all volumes have one shape `(h, w, d)`."""
    shapes = {name: tuple(volume.shape) for name, volume in volumes.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 3 for shape in shapes.values()):
        raise ValueError(f"expected one shape (h, w, d) for all, got {shapes}; drop batch and channel axes")


def slice_grid(
    columns: Sequence[str],
    shape: Sequence[int],
    spacing: Sequence[float],
    *,
    title: str,
    right: int = 8,
    bottom: int = 8,
    slices: Sequence[str] = tuple(SLICE_AXES),
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Make a figure with one frameless axes per (slice, column), each as high as its slice needs.

    The layout is in whole pixels. Very flat and very tall slices get a readable height and are letter-boxed.
    """
    heights = {}
    for name in slices:
        across, up = SLICE_AXES[name]
        ratio = shape[up] * spacing[up] / (shape[across] * spacing[across])
        heights[name] = round(min(max(COLUMN * ratio, 60), 2.5 * COLUMN))
    width = LEFT + len(columns) * (COLUMN + GAP) - GAP + right
    height = TOP + sum(heights.values()) + GAP * (len(slices) - 1) + bottom
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
    heading = figure.text(LEFT / width, 1 - 19 / height, title, color=TEXT, size=10, weight="bold", va="center")
    heading.set_parse_math(False)  # a "$" in the name of a case is a dollar sign
    grid = {}
    top = height - TOP
    for name, slice_height in heights.items():
        middle = (top - slice_height / 2) / height
        figure.text(13 / width, middle, name, color=TEXT, size=8, rotation=90, ha="center", va="center")
        for index, column in enumerate(columns):
            left = LEFT + index * (COLUMN + GAP)
            box = (left / width, (top - slice_height) / height, COLUMN / width, slice_height / height)
            axes = grid[name, column] = figure.add_axes(box, label=f"{name} {column}")
            axes.set_axis_off()
        for x, letter in zip((0.03, 0.97), SIDE_LETTERS[name], strict=True):
            first = grid[name, columns[0]]
            first.text(x, 0.5, letter, transform=first.transAxes, color=TEXT, size=7, ha="center", va="center")
        top -= slice_height + GAP
    for index, column in enumerate(columns):
        centre = LEFT + index * (COLUMN + GAP) + COLUMN / 2
        figure.text(centre / width, 1 - 46 / height, column, color=TEXT, size=8.5, ha="center", va="center")
    return figure, grid


def pixel_aspect(name: str, spacing: Sequence[float]) -> float:
    """Return the height of a pixel of a slice over its width."""
    across, up = SLICE_AXES[name]
    return spacing[up] / spacing[across]


def class_colours(num_classes: int) -> np.ndarray:
    """Return RGBA `(num_classes, 4)`: transparent background, then tab10 and the light half of tab20, without greys."""
    table = colormaps["tab20"](np.arange(20))
    table = np.concatenate([table[0::2], table[1::2]])
    table = table[np.ptp(table[:, :3], axis=1) > 0.1]
    colours = np.concatenate([np.zeros((1, 4)), table[np.arange(num_classes - 1) % len(table)]])
    colours[1:, 3] = 0.6
    return colours
