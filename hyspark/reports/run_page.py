"""The HTML page of a run, from its metrics, pictures and scores; nothing here trains."""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyspark.evaluation.classification.scores import class_metric_rows, confusion_rows
from hyspark.evaluation.protocol import protocol_text, read_summary
from hyspark.evaluation.segmentation.scores import summary_rows
from hyspark.figures.curves import CURVES, Curve, curves_figure
from hyspark.figures.panels import figure_png
from hyspark.reports.html import render_page
from hyspark.training.metrics_log import iterate_metrics
from hyspark.utils.atomic import write_whole
from hyspark.utils.tables import aligned_table
from hyspark.utils.version import VERSION

MAX_MEASURED = 50_000
"""Points of a curve of which each is drawn or smoothed; neighbours of longer ones are averaged."""


def write_report(
    run_folder: Path,
    *,
    title: str,
    config: Mapping[str, Any],
    environment: Mapping[str, str],
    summary: Mapping[str, str],
    dice: Mapping[str, Mapping[str, float]] | None = None,
    scores: Mapping[str, Path] | None = None,
) -> Path:
    """Write `run_folder`/report.html, one file that needs no script and no other file.

    It shows the curves of metrics.jsonl and the pictures, too; both may be missing.

    Args:
        run_folder: Folder of the run.
        title: Title of the page.
        config: Settings of the run, may be nested.
        environment: Versions and hardware.
        summary: Facts at the top of the page.
        dice: Dice by column and organ, as in `dice_table`.
        scores: Folders of scores by heading; tables, protocol and pictures are shown.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: metrics.jsonl is damaged.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise FileNotFoundError(f"{run_folder}: expected the folder of a run, got no folder")
    page = render_page(
        "run.html",
        title=title,
        cards=dict(summary),
        dice_rows=dice_rows(dice, difference=False) if dice else [],
        scores=[score_section(heading, folder) for heading, folder in (scores or {}).items()],
        curves=drawn_curves(run_folder / "metrics.jsonl"),
        pictures=shown_pictures(run_folder / "pictures"),
        config=[[key, str(value)] for key, value in flat(config).items()],
        environment=[[key, str(value)] for key, value in flat(environment).items()],
    )
    path = run_folder / "report.html"
    write_whole(path, page)
    return path


def environment() -> dict[str, str]:
    """Describe what this process runs on: versions of Python and libraries, platform, CPU and GPU."""
    found = {"python": platform.python_version()}
    for package in ("torch", "monai", "timm", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["hyspark"] = VERSION
    found["commit"] = code_version(Path(__file__).parents[2])
    found["platform"] = platform.platform()
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = match[1] if match else platform.processor() or platform.machine()
    found["cpu"] = f"{os.cpu_count()} x {cpu}"
    found["gpu"] = "none"
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return found


def code_version(folder: Path) -> str:
    """Name the git commit of this package: of a checkout, or of what pip installed from a repository.

    Args:
        folder: Folder that holds the package.

    Returns:
        The commit, with a note on changed files; "unknown" for other installations.
    """
    if (folder / ".git").exists():
        git = ["git", "-C", str(folder), "-c", f"safe.directory={folder}"]
        try:
            commit, changed = (
                subprocess.run([*git, *words], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
            )
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        return f"{commit}, with {len(changed.splitlines())} changed files" if changed else commit
    try:
        origin = json.loads(importlib.metadata.distribution("hyspark").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "unknown"
    return str(origin.get("vcs_info", {}).get("commit_id", "unknown"))


def dice_table(columns: Mapping[str, Mapping[str, float]], difference: bool = False) -> str:
    """Write Dice per organ as aligned text.

    Args:
        columns: By column, Dice by organ.
        difference: Whether two columns get a third, the first minus the second.

    Returns:
        A line per organ and one for the mean of each column's values; "-" where there is no value.

    Raises:
        ValueError: There is no column.
    """
    return aligned_table(dice_rows(columns, difference))


def dice_rows(columns: Mapping[str, Mapping[str, float]], difference: bool) -> list[list[str]]:
    """Format the cells of `dice_table`, the header first."""
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


def score_section(heading: str, folder: Path) -> dict[str, Any]:
    """Collect what the page shows of a folder of scores, of segmentation or classification."""
    summary = read_summary(folder)
    is_segmentation = "organs" in summary
    return {
        "heading": heading,
        "tables": [summary_rows(summary)] if is_segmentation else [class_metric_rows(summary), confusion_rows(summary)],
        "protocol": protocol_text(summary["protocol"]),
        "pictures": sorted(folder.glob("*.png")),
        "pictures_title": "Best, median and worst case" if is_segmentation else "Most confident mistakes",
    }


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    one: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            one |= flat(value, f"{prefix}{key}.")
        else:
            one[f"{prefix}{key}"] = value
    return one


def measured_curves(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Collect the steps and values of each metric that is drawn and was measured, at most MAX_MEASURED of each.

    The Dice of an organ is named "dice.ORGAN", that of the probe "probe.ORGAN".
    """
    drawn = {key for keys in CURVES.values() for key in keys}
    found: dict[str, tuple[array[float], array[float]]] = {}
    for line in metrics:
        entry = flat(line)
        for key, value in entry.items():
            if key in drawn or key.startswith(("dice.", "probe.")):
                steps, values = found.setdefault(key, (array("d"), array("d")))
                if value is not None:
                    steps.append(entry["step"])
                    values.append(value)
    return {key: thinned(*last_of_each_step(*both)) for key, both in found.items() if both[0]}


def last_of_each_step(steps: Sequence[float], values: Sequence[float]) -> Curve:
    """Sort by step; of a step that a resumed run repeated, keep the last value. Infinite values become NaN."""
    order = np.argsort(steps, kind="stable")
    by_step, of_step = np.array(steps)[order], np.array(values)[order]
    last = np.append(by_step[1:] != by_step[:-1], True)
    return by_step[last], np.where(np.isfinite(of_step[last]), of_step[last], np.nan)


def thinned(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Replace neighbours of a long curve by their means, so that a page costs the same after any number of steps."""
    size = math.ceil(len(steps) / MAX_MEASURED)
    if size == 1:
        return steps, values
    bounds = np.arange(0, len(steps), size)
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), bounds)
    sums = np.add.reduceat(np.where(known, values, 0.0), bounds)
    means = np.divide(sums, counts, out=np.full(len(bounds), np.nan), where=counts > 0)
    return np.maximum.reduceat(steps, bounds), means


def drawn_curves(path: Path) -> dict[str, bytes] | None:
    """Draw the curves of metrics.jsonl as PNG for light and for dark pages; None if nothing was measured."""
    curves = measured_curves(iterate_metrics(path) if path.exists() else [])
    light, dark = (curves_figure(curves, dark=dark) for dark in (False, True))
    return None if light is None or dark is None else {"light": figure_png(light), "dark": figure_png(dark)}


def shown_pictures(folder: Path) -> dict[str, Any]:
    """Choose the pictures of the last three epochs and the first, and those of no epoch, in groups with a heading."""
    epochs: dict[int, list[Path]] = {}
    others = []
    for path in sorted(folder.glob("*.png")):
        match = re.match(r"epoch_(\d+)(_|$)", path.stem)
        if match:
            epochs.setdefault(int(match[1]), []).append(path)
        else:
            others.append(path)
    numbers = sorted(epochs, reverse=True)
    shown = numbers[:3] + numbers[3:][-1:]
    groups = [(f"Epoch {number}", epochs[number]) for number in shown] + ([("Other", others)] if others else [])
    return {"groups": groups, "num_shown": len(shown), "num_epochs": len(numbers)}
