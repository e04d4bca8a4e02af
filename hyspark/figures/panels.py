"""Pictures of volumes: arrays in, `matplotlib.figure.Figure` out; nothing here trains.

Volumes are (h, w, d) in RAS: axis 0 grows to the patient's right, axis 1 to the front, axis 2 to the head. Pictures
follow the radiological convention: the patient's right on the viewer's left, front up (axial), head up (coronal,
sagittal). Making a figure touches no global state, neither pyplot nor torch is needed.
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

# Name -> the volume's axes that run (across, up) the picture; the third axis is the one that is cut.
PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
EDGES = {"axial": "RL", "coronal": "RL", "sagittal": "AP"}  # what lies at a picture's left and right edge

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
    planes: Sequence[str] = tuple(PLANES),
) -> Figure:
    """Centre planes (rows) of: input, masked input, reconstruction, absolute error.

    `volume`, `reconstruction`: float (h, w, d), shown in the fixed window 0..1. `visible`: bool (h, w, d),
    True where the encoder saw the voxel: there the third column repeats the input and the error is zero.
    `spacing`: mm per voxel. `planes`: those to show. Raises ValueError when the three shapes differ or are not 3D.
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
    figure, grid = plane_grid(list(columns), volume.shape, spacing, title=title, right=48, planes=planes)
    for (plane, column), axes in grid.items():
        is_error = column == "absolute error"
        image = axes.imshow(
            display_plane(columns[column], plane, centre),
            cmap=colormaps["inferno"] if is_error else grey,
            vmin=0,
            vmax=MAX_ERROR if is_error else 1,
            aspect=pixel_aspect(plane, spacing),
            interpolation="nearest",
        )
    box, pixel = grid[planes[0], "absolute error"].get_position(), 1 / (figure.get_figwidth() * DPI)
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
    """Three planes (rows) through the centre of mass of the true labels: input, truth, prediction with the outlines of
    the truth; a legend.

    `volume`: float (h, w, d), shown in the window 0..1. `truth`, `prediction`: labels (h, w, d); label i is
    named `class_names[i]`; label 0 is the background, which is not painted. `spacing`: mm per voxel.
    Raises ValueError when the three shapes differ or are not 3D, or when a label has no name.
    """
    check_shapes(volume=volume, truth=truth, prediction=prediction)
    largest = int(max(truth.max(), prediction.max()))
    if largest >= len(class_names):
        raise ValueError(
            f"label {largest} has no name: expected one in class_names for every label from 0 (background), "
            f"got {len(class_names)} names; pass the missing ones"
        )
    labelled = np.nonzero(truth > 0)
    centre = [int(at.mean()) if at.size else n // 2 for at, n in zip(labelled, truth.shape, strict=True)]
    names, colours = list(class_names[1:]), class_colours(len(class_names))
    per_row = max(1, 3 * COLUMN // (36 + 7 * max(map(len, names), default=0)))
    footer = 14 + 19 * math.ceil(len(names) / per_row)
    columns = ["input", "truth", "prediction"]
    figure, grid = plane_grid(columns, volume.shape, spacing, title=title, bottom=footer)
    for (plane, column), axes in grid.items():
        aspect = pixel_aspect(plane, spacing)
        axes.imshow(display_plane(volume, plane, centre), cmap="gray", vmin=0, vmax=1, aspect=aspect)
        if column != "input":
            labels = display_plane(truth if column == "truth" else prediction, plane, centre).astype(int)
            axes.imshow(colours[labels.clip(min=0)], aspect=aspect, interpolation="nearest")
        if column == "prediction":
            outline(axes, display_plane(truth, plane, centre), colours)
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
    """Draw the borders of the labels of one plane as displayed, each in the opaque colour of its class."""
    axes.autoscale(False)
    for value in np.unique(labels[labels > 0]):
        edge = np.pad(labels == value, 1).astype(float)  # so that an organ at the picture's edge is closed
        rows, columns = (np.arange(size) - 1 for size in edge.shape)
        axes.contour(columns, rows, edge, levels=[0.5], colors=[colours[int(value), :3]], linewidths=0.9)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG; makes the folders, and a reader never meets half a file."""
    write_whole(Path(path), png(figure))


def png(figure: Figure) -> bytes:
    """The PNG file of a figure."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def display_plane(volume: np.ndarray, plane: str, at: Sequence[int]) -> np.ndarray:
    """One plane of an RAS volume (h, w, d) through the voxel `at`, as displayed: row 0 is the top."""
    (cut,) = {0, 1, 2} - set(PLANES[plane])
    return np.take(volume, at[cut], axis=cut).T[::-1, ::-1]


def check_shapes(**volumes: np.ndarray) -> None:
    """ValueError unless all volumes have one shape (h, w, d)."""
    shapes = {name: tuple(volume.shape) for name, volume in volumes.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 3 for shape in shapes.values()):
        raise ValueError(f"expected one shape (h, w, d) for all, got {shapes}; drop batch and channel axes")


def plane_grid(
    columns: Sequence[str],
    shape: Sequence[int],
    spacing: Sequence[float],
    *,
    title: str,
    right: int = 8,
    bottom: int = 8,
    planes: Sequence[str] = tuple(PLANES),
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A figure with one frameless axes per (plane, column), each as high as its plane needs.

    Laid out in whole pixels. Very flat and very tall planes get a readable height and are letter-boxed.
    """
    heights = {}
    for plane in planes:
        across, up = PLANES[plane]
        ratio = shape[up] * spacing[up] / (shape[across] * spacing[across])
        heights[plane] = round(min(max(COLUMN * ratio, 60), 2.5 * COLUMN))
    width = LEFT + len(columns) * (COLUMN + GAP) - GAP + right
    height = TOP + sum(heights.values()) + GAP * (len(planes) - 1) + bottom
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
    heading = figure.text(LEFT / width, 1 - 19 / height, title, color=TEXT, size=10, weight="bold", va="center")
    heading.set_parse_math(False)  # a "$" in the name of a case is a dollar sign
    grid = {}
    top = height - TOP
    for plane, plane_height in heights.items():
        middle = (top - plane_height / 2) / height
        figure.text(13 / width, middle, plane, color=TEXT, size=8, rotation=90, ha="center", va="center")
        for index, column in enumerate(columns):
            left = LEFT + index * (COLUMN + GAP)
            box = (left / width, (top - plane_height) / height, COLUMN / width, plane_height / height)
            axes = grid[plane, column] = figure.add_axes(box, label=f"{plane} {column}")
            axes.set_axis_off()
        for x, letter in zip((0.03, 0.97), EDGES[plane], strict=True):
            first = grid[plane, columns[0]]
            first.text(x, 0.5, letter, transform=first.transAxes, color=TEXT, size=7, ha="center", va="center")
        top -= plane_height + GAP
    for index, column in enumerate(columns):
        centre = LEFT + index * (COLUMN + GAP) + COLUMN / 2
        figure.text(centre / width, 1 - 46 / height, column, color=TEXT, size=8.5, ha="center", va="center")
    return figure, grid


def pixel_aspect(plane: str, spacing: Sequence[float]) -> float:
    """Height of a pixel of this plane over its width."""
    across, up = PLANES[plane]
    return spacing[up] / spacing[across]


def class_colours(num_classes: int) -> np.ndarray:
    """RGBA (num_classes, 4): transparent background, then tab10 and tab20's light half without greys."""
    table = colormaps["tab20"](np.arange(20))
    table = np.concatenate([table[0::2], table[1::2]])
    table = table[np.ptp(table[:, :3], axis=1) > 0.1]
    colours = np.concatenate([np.zeros((1, 4)), table[np.arange(num_classes - 1) % len(table)]])
    colours[1:, 3] = 0.6
    return colours
