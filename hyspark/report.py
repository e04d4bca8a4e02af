"""Pictures and the HTML page of a run, from arrays and files alone; nothing here trains or needs a network.

Volumes are (h, w, d) in RAS: axis 0 grows to the patient's right, axis 1 to the front, axis 2 to the head.
Pictures follow the radiological convention: the patient's right on the viewer's left, front up (axial), head
up (coronal, sagittal). Figures are plain `matplotlib.figure.Figure` objects; making one touches no global
state.
"""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Name -> the volume's axes that run (across, up) the picture; the third axis is the one that is cut.
PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
EDGES = {"axial": "RL", "coronal": "RL", "sagittal": "AP"}  # what lies at a picture's left and right edge

DPI = 110
COLUMN, GAP, LEFT, TOP = 288, 4, 26, 58  # pixels; 288 = 3 x 96, so that a 96-voxel crop is enlarged exactly
BACKGROUND, TEXT = "#14171c", "#e6e9ee"
HIDDEN = "#4a6484"  # hidden patches: a blue that no grey-scale picture contains
MAX_ERROR = 0.5
Curve = tuple[np.ndarray, np.ndarray]  # steps, values
MAX_POINTS = 2000  # of a curve; more cannot be seen

CURVES = {
    "Loss": ["loss", "val_loss"],
    "Learning rate": ["lr", "wd"],
    "Gradient norm": ["grad_norm"],
    "Samples per second": ["samples_per_second"],
    "Dice": ["dice_mean"],
}
STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--text:#1d2330;--soft:#5d6675;--line:#dfe3e8}
@media(prefers-color-scheme:dark){:root{--page:#101216;--card:#1b1f26;--text:#e3e7ed;--soft:#98a2b0;--line:#323843}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:76rem;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:0 0 1rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .6rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.7rem}
.cards div,.box{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.cards dt,figcaption,.note{color:var(--soft);font-size:.86rem}dl,dd{margin:0}
.cards dd{font-size:1.2rem;font-weight:600;overflow-wrap:anywhere}
.box{overflow-x:auto}img{display:block;max-width:100%;height:auto;border-radius:.4rem}
figure{margin:0 0 1rem}
details{margin:0 0 .6rem}summary{cursor:pointer;font-weight:600;margin:0 0 .4rem}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top}
tr+tr>*{border-top:1px solid var(--line)}.text td{font-family:ui-monospace,monospace;overflow-wrap:anywhere}
.numbers :is(td,th):not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
.numbers tr:last-child td{font-weight:600}
"""


def reconstruction_panel(
    volume: np.ndarray,
    visible: np.ndarray,
    reconstruction: np.ndarray,
    *,
    title: str,
    spacing: tuple[float, float, float] = (1, 1, 1),
) -> Figure:
    """Three centre planes (rows) of: input, masked input, reconstruction, absolute error.

    `volume`, `reconstruction`: float (h, w, d), shown in the fixed window 0..1. `visible`: bool (h, w, d),
    True where the encoder saw the voxel: there the third column repeats the input and the error is zero.
    `spacing`: mm per voxel. Raises ValueError when the three shapes differ or are not 3D.
    """
    _check_shapes(volume=volume, visible=visible, reconstruction=reconstruction)
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
    figure, grid = _plane_grid(list(columns), volume.shape, spacing, title=title, right=48)
    for (plane, column), axes in grid.items():
        is_error = column == "absolute error"
        image = axes.imshow(
            display_plane(columns[column], plane, centre),
            cmap=colormaps["inferno"] if is_error else grey,
            vmin=0,
            vmax=MAX_ERROR if is_error else 1,
            aspect=_aspect(plane, spacing),
            interpolation="nearest",
        )
    box, pixel = grid["axial", "absolute error"].get_position(), 1 / (figure.get_figwidth() * DPI)
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
    """Three planes (rows) through the centre of mass of the true labels: input, truth, prediction; a legend.

    `volume`: float (h, w, d), shown in the window 0..1. `truth`, `prediction`: labels (h, w, d); label i is
    named `class_names[i]`; label 0 is the background, which is not painted. `spacing`: mm per voxel.
    Raises ValueError when the three shapes differ or are not 3D, or when a label has no name.
    """
    _check_shapes(volume=volume, truth=truth, prediction=prediction)
    largest = int(max(truth.max(), prediction.max()))
    if largest >= len(class_names):
        raise ValueError(
            f"label {largest} has no name: expected one in class_names for every label from 0 (background), "
            f"got {len(class_names)} names; pass the missing ones"
        )
    labelled = np.nonzero(truth > 0)
    centre = [int(at.mean()) if at.size else n // 2 for at, n in zip(labelled, truth.shape, strict=True)]
    names, colours = list(class_names[1:]), _class_colours(len(class_names))
    per_row = max(1, 3 * COLUMN // (36 + 7 * max(map(len, names), default=0)))
    footer = 14 + 19 * math.ceil(len(names) / per_row)
    columns = ["input", "truth", "prediction"]
    figure, grid = _plane_grid(columns, volume.shape, spacing, title=title, bottom=footer)
    for (plane, column), axes in grid.items():
        aspect = _aspect(plane, spacing)
        axes.imshow(display_plane(volume, plane, centre), cmap="gray", vmin=0, vmax=1, aspect=aspect)
        if column != "input":
            labels = display_plane(truth if column == "truth" else prediction, plane, centre).astype(int)
            axes.imshow(colours[labels.clip(min=0)], aspect=aspect, interpolation="nearest")
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


def display_plane(volume: np.ndarray, plane: str, at: Sequence[int]) -> np.ndarray:
    """One plane of an RAS volume (h, w, d) through the voxel `at`, as displayed: row 0 is the top."""
    (cut,) = {0, 1, 2} - set(PLANES[plane])
    return np.take(volume, at[cut], axis=cut).T[::-1, ::-1]


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG; makes the folders, and a reader never meets half a file."""
    _write_whole(Path(path), _png(figure))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl file; a last line torn by an interruption is left out.

    Raises FileNotFoundError when there is no file, ValueError when any other line is not a JSON object.
    """
    lines = [line for line in Path(path).read_bytes().splitlines() if line.strip()]
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError(f"a {type(entry).__name__}")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}: expected one JSON object a line, got {line[:80]!r} as entry {number} ({error}); "
                "remove that line"
            ) from error
        metrics.append(entry)
    return metrics


def dice_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Dice per organ (rows) and run (columns) as aligned text, the mean last, "-" where there is no value.

    Each mean is over the values its column shows. Two columns get a third: the first minus the second.
    Raises ValueError when there is no column.
    """
    rows = _dice_rows(columns)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    )


def write_report(
    run_folder: Path,
    *,
    title: str,
    config: Mapping[str, Any],
    environment: Mapping[str, str],
    summary: Mapping[str, str],
    dice: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write `run_folder`/report.html and return its path: one file that needs no script and no other file.

    It shows `summary` as cards at the top, `dice` (run -> organ -> Dice) as in `dice_table`, curves from
    metrics.jsonl, the pictures of the last three epochs and the first (pictures/epoch_0010_NAME.png) and
    those named otherwise, `config` (may be nested) and `environment`. Metrics and pictures may be missing.
    Raises FileNotFoundError when there is no such folder, ValueError when metrics.jsonl is damaged.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise FileNotFoundError(f"expected the folder of a run, got {run_folder}, which is not a folder")
    cards = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in summary.items())
    body = [f"<h1>{_text(title)}</h1>", f'<dl class="cards">{cards}</dl>']
    if dice:
        body += ["<h2>Dice</h2>", _table(_dice_rows(dice), "numbers", header=True)]
    body += ["<h2>Curves</h2>", _curves_html(run_folder / "metrics.jsonl")]
    body += ["<h2>Pictures</h2>", *_pictures_html(run_folder / "pictures")]
    for name, mapping in (("Configuration", config), ("Environment", environment)):
        rows = [[key, str(value)] for key, value in _flat(mapping).items()]
        body += [f"<h2>{name}</h2>", _table(rows, "text")]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n"
    )
    page += "\n".join(body) + "\n</body></html>\n"
    path = run_folder / "report.html"
    _write_whole(path, page.encode())
    return path


def environment() -> dict[str, str]:
    """What this process runs on: versions of Python and the libraries that matter, platform, CPU and GPU."""
    import torch  # here, so that pictures can be made without waiting for it

    found = {"python": platform.python_version()}
    for package in ("torch", "monai", "timm", "numpy", "hyspark"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["platform"] = platform.platform()
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = match[1] if match else platform.processor() or platform.machine()
    found["cpu"] = f"{os.cpu_count()} x {cpu}"
    found["gpu"] = "none"
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return found


def _check_shapes(**volumes: np.ndarray) -> None:
    shapes = {name: tuple(volume.shape) for name, volume in volumes.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 3 for shape in shapes.values()):
        raise ValueError(f"expected one shape (h, w, d) for all, got {shapes}; drop batch and channel axes")


def _plane_grid(
    columns: Sequence[str],
    shape: Sequence[int],
    spacing: Sequence[float],
    *,
    title: str,
    right: int = 8,
    bottom: int = 8,
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A figure with one frameless axes per (plane, column), each as high as its plane needs.

    Laid out in whole pixels. Very flat and very tall planes get a readable height and are letter-boxed.
    """
    heights = {}
    for plane, (across, up) in PLANES.items():
        ratio = shape[up] * spacing[up] / (shape[across] * spacing[across])
        heights[plane] = round(min(max(COLUMN * ratio, 60), 2.5 * COLUMN))
    width = LEFT + len(columns) * (COLUMN + GAP) - GAP + right
    height = TOP + sum(heights.values()) + GAP * (len(PLANES) - 1) + bottom
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


def _aspect(plane: str, spacing: Sequence[float]) -> float:
    across, up = PLANES[plane]
    return spacing[up] / spacing[across]


def _class_colours(num_classes: int) -> np.ndarray:
    """RGBA (num_classes, 4): transparent background, then tab10 and tab20's light half without greys."""
    table = colormaps["tab20"](np.arange(20))
    table = np.concatenate([table[0::2], table[1::2]])
    table = table[np.ptp(table[:, :3], axis=1) > 0.1]
    colours = np.concatenate([np.zeros((1, 4)), table[np.arange(num_classes - 1) % len(table)]])
    colours[1:, 3] = 0.6
    return colours


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _dice_rows(columns: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    if not columns:
        raise ValueError("expected the Dice of at least one run, got none; pass {run: {organ: Dice}}")
    organs = list(dict.fromkeys(organ for column in columns.values() for organ in column))
    values = np.array([[column.get(organ, math.nan) for organ in organs] for column in columns.values()])
    header, formats = ["organ", *columns], ["{:.3f}"] * len(columns)
    if len(columns) == 2:
        values = np.concatenate([values, values[:1] - values[1:]])
        header, formats = [*header, "difference"], [*formats, "{:+.3f}"]
    counts = np.isfinite(values).sum(axis=1)
    sums = np.nansum(values, axis=1)
    means = np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0)
    rows = [header]
    for name, row in zip([*organs, "mean"], [*values.T, means], strict=True):
        rounded = np.round(row, 3) + 0.0  # + 0.0 turns a rounded -0.0 into 0.0
        cells = [f.format(v) if math.isfinite(v) else "-" for f, v in zip(formats, rounded, strict=True)]
        rows.append([name, *cells])
    return rows


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Steps and values of one key; where a resumed run repeated a step, its last value."""
    found = {entry["step"]: entry[key] for entry in entries if entry.get(key) is not None}
    steps = np.array(sorted(found), dtype=float)
    values = np.array([found[step] for step in sorted(found)], dtype=float)
    return steps, np.where(np.isfinite(values), values, np.nan)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a fortieth of the curve, leaving out NaN."""
    window = np.ones(len(values) // 40 * 2 + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(float), window, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _curves_figure(metrics: Sequence[Mapping[str, Any]], *, dark: bool) -> Figure | None:
    """Loss, learning rate, gradient norm, speed and Dice over the step; None when none was measured."""
    entries = [_flat(line) for line in metrics]
    organs = list(dict.fromkeys(key for entry in entries for key in entry if key.startswith("dice.")))
    panels = []
    for title, keys in CURVES.items():
        curves = {key: _series(entries, key) for key in (keys + organs if title == "Dice" else keys)}
        curves = {key: curve for key, curve in curves.items() if curve[0].size}
        if curves:
            panels.append((title, curves))
    if not panels:
        return None
    paper, ink = ("#1b1f26", "#c9d0da") if dark else ("#ffffff", "#3a4250")
    num_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10.5, 2.5 * num_rows), dpi=DPI, facecolor=paper, layout="constrained")
    rows = figure.subfigures(num_rows, 1, squeeze=False)[:, 0]  # so that a legend narrows its own row only
    for index, row in enumerate(rows):
        here = panels[2 * index : 2 * index + 2]
        row.set_facecolor(paper)
        for axes, (title, curves) in zip(row.subplots(1, len(here), squeeze=False)[0], here, strict=True):
            _draw_curves(axes, title, curves, ink)
    return figure


def _draw_curves(axes: Axes, title: str, curves: Mapping[str, Curve], ink: str) -> None:
    colours = _class_colours(len(curves) + 1)[1:, :3]
    sides = [axes]
    for (key, (steps, values)), colour in zip(curves.items(), colours, strict=True):
        every = slice(None, None, math.ceil(len(steps) / MAX_POINTS))
        dot = "." if len(steps) == 1 else None
        if key == "val_loss":
            axes.plot(steps, values, "o", ms=4, mew=0, color=colour, label="validation", zorder=3)
        elif key == "dice_mean":
            axes.plot(steps, values, ".-", lw=2.2, color=ink, label="mean", zorder=3)
        elif key.startswith("dice."):
            axes.plot(steps, values, ".-", lw=0.9, ms=3, color=colour, label=key.removeprefix("dice."))
        elif key == "lr":
            axes.plot(steps, values, marker=dot, color=colour, label="learning rate (left)")
        elif key == "wd":
            sides.append(axes.twinx())
            sides[1].plot(steps, values, "--", marker=dot, color=colour, label="weight decay (right)")
        else:
            axes.plot(steps[every], values[every], lw=0.7, marker=dot, color=colour, alpha=0.35)
            axes.plot(steps[every], _smooth(values)[every], lw=1.6, color=colour, label="smoothed")
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
            loc="upper left" if title == "Dice" else "lower right",
            bbox_to_anchor=(1, 1) if title == "Dice" else (1, 0.98),
            ncols=1 + len(curves) // 12 if title == "Dice" else 2,
            fontsize=7,
            labelcolor=ink,
            frameon=False,
        )


def _curves_html(path: Path) -> str:
    metrics = read_metrics(path) if path.exists() else []
    light, dark = (_curves_figure(metrics, dark=dark) for dark in (False, True))
    if light is None or dark is None:
        return '<p class="note">No metrics yet: metrics.jsonl is missing or empty.</p>'
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{_data_url(_png(dark))}">'
    image = f'<img alt="training curves" src="{_data_url(_png(light))}">'
    return f'<div class="box"><picture>{source}{image}</picture></div>'


def _pictures_html(folder: Path) -> list[str]:
    epochs: dict[int, list[Path]] = {}
    others = []
    for path in sorted(folder.glob("*.png")):
        match = re.match(r"epoch_(\d+)(_|$)", path.stem)
        if match:
            epochs.setdefault(int(match[1]), []).append(path)
        else:
            others.append(path)
    if not epochs and not others:
        return ['<p class="note">No pictures yet: the folder pictures is missing or empty.</p>']
    numbers = sorted(epochs, reverse=True)
    shown = numbers[:3] + numbers[3:][-1:]
    groups = [(f"Epoch {number}", epochs[number]) for number in shown]
    if others:
        groups.append(("Other", others))
    parts: list[str] = []
    for heading, paths in groups:
        figures = "".join(
            f'<figure><img alt="{_text(path.stem)}" src="{_data_url(path.read_bytes())}">'
            f"<figcaption>{_text(path.stem)}</figcaption></figure>"
            for path in paths
        )
        state = "" if parts else " open"  # the latest epoch is shown, the others at a click
        parts.append(f"<details{state}><summary>{heading}</summary>{figures}</details>")
    if len(shown) < len(numbers):
        count = f"{len(shown)} of {len(numbers)} epochs"
        parts.append(f'<p class="note">{count}; the rest is in the folder pictures.</p>')
    return parts


def _table(rows: Sequence[Sequence[str]], kind: str, *, header: bool = False) -> str:
    lines = []
    for index, row in enumerate(rows):
        tag = "th" if header and index == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) + "</tr>")
    return f'<div class="box"><table class="{kind}">{"".join(lines)}</table></div>'


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _text(value: object) -> str:
    return html.escape(str(value))
