"""The HTML page of a run, from its metrics, pictures and Dice; nothing here trains."""

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyspark.evaluation.protocol import protocol_text
from hyspark.evaluation.segmentation.scores import score_rows
from hyspark.figures.curves import CURVES, Curve, curves_figure
from hyspark.figures.panels import figure_png
from hyspark.reports.html import cards, data_url, figure_html, page, table
from hyspark.training.metrics_log import read_metrics
from hyspark.utils.atomic import write_whole


def dice_table(columns: Mapping[str, Mapping[str, float]], difference: bool = False) -> str:
    """Dice per organ (rows) and run (columns) as aligned text, the mean last, "-" where there is no value.

    Each mean is over the values its column shows. difference: with two columns, add the first minus the second.
    Raises ValueError when there is no column.
    """
    rows = dice_rows(columns, difference)
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
    scores: Mapping[str, Path] | None = None,
    sections: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write `run_folder`/report.html and return its path: one file that needs no script and no other file.

    It shows `summary` as cards at the top, `dice` (run -> organ -> Dice) as in `dice_table`, `scores` (heading ->
    folder of scores: table, protocol, pictures), `sections` (heading -> parts that are HTML), curves from
    metrics.jsonl, the pictures of the last three epochs and the first (pictures/epoch_0010_NAME.png) and those named
    otherwise, `config` (may be nested) and `environment`. Metrics and pictures may be missing.
    Raises FileNotFoundError when there is no such folder, ValueError when metrics.jsonl is damaged.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise FileNotFoundError(f"expected the folder of a run, got {run_folder}, which is not a folder")
    body = [cards(summary)]
    if dice:
        body += ["<h2>Dice</h2>", table(dice_rows(dice, difference=False), "numbers", header=True)]
    for heading, folder in (scores or {}).items():
        body += [f"<h2>{escape(heading)}</h2>", *scores_html(folder)]
    for heading, parts in (sections or {}).items():
        body += [f"<h2>{escape(heading)}</h2>", *parts]
    body += ["<h2>Curves</h2>", curves_html(run_folder / "metrics.jsonl")]
    body += ["<h2>Pictures</h2>", *pictures_html(run_folder / "pictures")]
    for name, mapping in (("Configuration", config), ("Environment", environment)):
        rows = [[key, str(value)] for key, value in flat(mapping).items()]
        body += [f"<h2>{name}</h2>", table(rows, "text")]
    path = run_folder / "report.html"
    write_whole(path, page(title, body).encode())
    return path


def environment() -> dict[str, str]:
    """What this process runs on: versions of Python and the libraries that matter, platform, CPU and GPU."""
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


def dice_rows(columns: Mapping[str, Mapping[str, float]], difference: bool) -> list[list[str]]:
    """The cells of `dice_table`, the header first."""
    if not columns:
        raise ValueError("expected the Dice of at least one run, got none; pass {run: {organ: Dice}}")
    organs = list(dict.fromkeys(organ for column in columns.values() for organ in column))
    values = np.array([[column.get(organ, math.nan) for organ in organs] for column in columns.values()])
    header, formats = ["organ", *columns], ["{:.3f}"] * len(columns)
    if difference and len(columns) == 2:
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


def scores_html(folder: Path) -> list[str]:
    """Table, protocol and pictures of a folder of scores."""
    summary = json.loads((folder / "summary.json").read_text())
    parts = [table(score_rows(summary), "numbers", header=True)]
    parts.append(f'<p class="note">{escape(protocol_text(summary["protocol"]))}</p>')
    pictures = [figure_html(path) for path in sorted(folder.glob("*.png"))]
    if pictures:
        parts.append(f"<details><summary>Best, median and worst case</summary>{''.join(pictures)}</details>")
    return parts


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    one: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            one |= flat(value, f"{prefix}{key}.")
        else:
            one[f"{prefix}{key}"] = value
    return one


def measured_curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Of each metric that is drawn and was measured, steps and values; the Dice of an organ is "dice.ORGAN", that of
    the probe "probe.ORGAN".
    """
    entries = [flat(line) for line in metrics]
    drawn = {key for keys in CURVES.values() for key in keys}
    keys = dict.fromkeys(
        key for entry in entries for key in entry if key in drawn or key.startswith(("dice.", "probe."))
    )
    curves = {key: series(entries, key) for key in keys}
    return {key: curve for key, curve in curves.items() if curve[0].size}


def series(entries: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Steps and values of one key; where a resumed run repeated a step, its last value."""
    found = {entry["step"]: entry[key] for entry in entries if entry.get(key) is not None}
    steps = np.array(sorted(found), dtype=float)
    values = np.array([found[step] for step in sorted(found)], dtype=float)
    return steps, np.where(np.isfinite(values), values, np.nan)


def curves_html(path: Path) -> str:
    """The curves of metrics.jsonl, light or dark as the page is."""
    curves = measured_curves(read_metrics(path) if path.exists() else [])
    light, dark = (curves_figure(curves, dark=dark) for dark in (False, True))
    if light is None or dark is None:
        return '<p class="note">No metrics yet: metrics.jsonl is missing or empty.</p>'
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{data_url(figure_png(dark))}">'
    image = f'<img alt="training curves" src="{data_url(figure_png(light))}">'
    return f'<div class="box"><picture>{source}{image}</picture></div>'


def pictures_html(folder: Path) -> list[str]:
    """The pictures of the last three epochs and the first, and those of no epoch."""
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
        figures = "".join(figure_html(path) for path in paths)
        state = "" if parts else " open"  # the latest epoch is shown, the others at a click
        parts.append(f"<details{state}><summary>{heading}</summary>{figures}</details>")
    if len(shown) < len(numbers):
        count = f"{len(shown)} of {len(numbers)} epochs"
        parts.append(f'<p class="note">{count}; the rest is in the folder pictures.</p>')
    return parts
