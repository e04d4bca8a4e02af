"""The HTML page of a run, from its metrics, pictures and Dice; nothing here trains."""

import base64
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

from hyspark.atomic import write_whole
from hyspark.figures import CURVES, Curve, curves_figure, png

SCORES = {"dice": ("Dice", "{:.3f}"), "hd95_mm": ("HD95 (mm)", "{:.1f}"), "nsd": ("NSD", "{:.3f}")}
COUNTS = {
    "num_cases": "cases",
    "num_missed": "missed",
    "num_absent": "absent",
    "num_absent_predicted": "absent, yet predicted",
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


def cards(summary: Mapping[str, str]) -> str:
    """A few figures with their names, side by side."""
    boxes = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in summary.items())
    return f'<dl class="cards">{boxes}</dl>'


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML page of parts that are HTML already; `title` is not."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
    )
    return head + "\n".join(body) + "\n</body></html>\n"


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


def score_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table of a scores' summary (summary.json): a heading, a row per organ, the mean; "-" where there
    is no value.
    """

    def scores(row: Mapping[str, float | None]) -> list[str]:
        return ["-" if row[key] is None else form.format(row[key]) for key, (_, form) in SCORES.items()]

    organs = [[organ, *scores(row), *(str(row[key]) for key in COUNTS)] for organ, row in summary["organs"].items()]
    heading = ["organ", *(title for title, _ in SCORES.values()), *COUNTS.values()]
    return [heading, *organs, ["mean", *scores(summary["mean"]), *("" for _ in COUNTS)]]


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """How scores were measured, in one line."""
    return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in protocol.items())


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
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{data_url(png(dark))}">'
    image = f'<img alt="training curves" src="{data_url(png(light))}">'
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


def figure_html(path: Path) -> str:
    """A picture with its name below."""
    name = escape(path.stem)
    return f'<figure><img alt="{name}" src="{data_url(path.read_bytes())}"><figcaption>{name}</figcaption></figure>'


def table(rows: Sequence[Sequence[str]], kind: str, *, header: bool = False) -> str:
    """An HTML table of the style `kind`; with `header`, its first row is one."""
    lines = []
    for index, row in enumerate(rows):
        tag = "th" if header and index == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f'<div class="box"><table class="{kind}">{"".join(lines)}</table></div>'


def data_url(content: bytes) -> str:
    """A PNG as an address that holds all of it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
