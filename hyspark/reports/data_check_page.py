"""The report on a data set that was checked: text for the terminal, JSON, one HTML page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

from hyspark.data.preprocessing.estimate import PreparationEstimate
from hyspark.data.quality.examine import HISTOGRAM, Examined
from hyspark.data.quality.findings import FINDING_KINDS, SEVERITIES, Finding
from hyspark.figures.panels import DPI, figure_png
from hyspark.reports.html import cards, data_url, page, table
from hyspark.utils.atomic import write_json, write_whole

MOST_FILES = 5
"""Files of one kind of fault that the terminal names; the JSON and the page name all."""
MOST_THUMBNAILS = 120
"""Cases that are shown, those with findings first."""


def by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Findings by their kind, errors first, in the order of FINDING_KINDS."""
    found: dict[str, list[Finding]] = {}
    order = list(FINDING_KINDS)
    for finding in sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), order.index(f.kind))):
        found.setdefault(finding.kind, []).append(finding)
    return found


def all_findings(examined: Sequence[Examined], others: Sequence[Finding]) -> list[Finding]:
    """Those of the cases and those of the data set."""
    return [*(finding for seen in examined for finding in seen.findings), *others]


def counts_text(findings: Sequence[Finding]) -> str:
    """How many of each severity."""
    return ", ".join(f"{sum(f.severity == s for f in findings)} {s}s" for s in SEVERITIES)


def facts(
    examined: Sequence[Examined], estimate: PreparationEstimate | None, spacing: Sequence[float]
) -> dict[str, str]:
    """What the data set is, in a few lines."""
    read = [seen for seen in examined if seen.shape and seen.spacing]
    lines = {
        "cases": f"{len(examined)}, {sum(seen.case.label is not None for seen in examined)} of them labelled",
        "usable": f"{sum(not seen.is_broken for seen in examined)}",
    }
    if read:
        lines["voxels"] = ranges([seen.shape for seen in read], "{:.0f}")
        lines["spacing, mm"] = ranges([seen.spacing for seen in read], "{:.2f}")
    if estimate:
        lines["store"] = f"about {size(estimate.store_bytes)} at {' x '.join(f'{edge:g}' for edge in spacing)} mm"
        lines["preparation"] = f"about {duration(estimate.seconds)} on one core, {size(estimate.memory)} a process"
    return lines


def ranges(values: Sequence[Any], form: str) -> str:
    """Median and range of each axis."""
    axes = np.array(values, dtype=float)
    middle, low, high = np.nanmedian(axes, axis=0), np.nanmin(axes, axis=0), np.nanmax(axes, axis=0)
    text = [" x ".join(form.format(v) for v in row) for row in (middle, low, high)]
    return text[0] if text[1] == text[2] else f"{text[0]} (median; {text[1]} to {text[2]})"


def size(num_bytes: float) -> str:
    """Bytes for people."""
    power = min(4, int(math.log(max(num_bytes, 1), 1000)))
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def text(examined: Sequence[Examined], others: Sequence[Finding], lines: Mapping[str, str]) -> str:
    """The report for the terminal."""
    findings = all_findings(examined, others)
    rows = [f"{name:12s} {value}" for name, value in lines.items()]
    rows.append(f"{'findings':12s} {counts_text(findings)}")
    for kind, found in by_kind(findings).items():
        known = FINDING_KINDS[kind]
        rows.append(f"\n{known.severity}: {kind} ({len(found)}); expected {known.expected}: {known.advice}")
        rows += [f"  {finding.file}: {finding.found}" for finding in found[:MOST_FILES]]
        if len(found) > MOST_FILES:
            rows.append(f"  and {len(found) - MOST_FILES} more")
    return "\n".join(rows)


def write(
    out: Path,
    title: str,
    examined: Sequence[Examined],
    others: Sequence[Finding],
    lines: Mapping[str, str],
    estimate: PreparationEstimate | None,
) -> Path:
    """Write check.json and check.html into a folder; returns the page."""
    findings = all_findings(examined, others)
    write_json(
        out / "check.json",
        {
            "data": title,
            "findings": [
                asdict(f)
                | {
                    "severity": f.severity,
                    "expected": FINDING_KINDS[f.kind].expected,
                    "advice": FINDING_KINDS[f.kind].advice,
                }
                for f in findings
            ],
            "cases": [case_numbers(seen) for seen in examined],
            "estimate": asdict(estimate) if estimate else None,
        },
    )
    body = [cards({**lines, "findings": counts_text(findings)}), "<h2>Findings</h2>", *findings_html(findings)]
    body += ["<h2>Spacing, size and values</h2>", histograms_html(examined)]
    body += ["<h2>Cases</h2>", *thumbnails_html(examined)]
    write_whole(out / "check.html", page(f"Data check: {title}", body).encode("utf-8", "surrogateescape"))
    return out / "check.html"


def case_numbers(seen: Examined) -> dict[str, Any]:
    """A case in plain values."""
    return {
        "name": seen.case.name,
        "dataset": seen.case.dataset,
        "image": str(seen.case.image),
        "label": str(seen.case.label) if seen.case.label else None,
        "shape": list(seen.shape) if seen.shape else None,
        "spacing_mm": list(seen.spacing) if seen.spacing else None,
        "low": seen.low,
        "high": seen.high,
        "label_voxels": {f"{value:g}": num for value, num in seen.label_voxels.items()},
        "is_broken": seen.is_broken,
    }


def findings_html(findings: Sequence[Finding]) -> list[str]:
    """A table for each kind."""
    if not findings:
        return ['<p class="note">None.</p>']
    parts = []
    for kind, found in by_kind(findings).items():
        heading = f"{FINDING_KINDS[kind].severity}: {kind} ({len(found)})"
        parts.append(
            f"<details{' open' if FINDING_KINDS[kind].severity == 'error' else ''}><summary>{escape(heading)}</summary>"
        )
        parts.append(
            f'<p class="note">expected {escape(FINDING_KINDS[kind].expected)}: {escape(FINDING_KINDS[kind].advice)}</p>'
        )
        parts.append(table([[finding.file, finding.found] for finding in found], "text") + "</details>")
    return parts


def histograms_html(examined: Sequence[Examined]) -> str:
    """Spacing and size of the cases by axis, HU of all voxels."""
    read = [seen for seen in examined if seen.shape and seen.spacing]
    if not read:
        return '<p class="note">No case could be read.</p>'
    figure = Figure(figsize=(10.5, 2.8), dpi=DPI, facecolor="white", layout="constrained")
    spacing, shape, values = figure.subplots(1, 3)
    for axes, rows, title in (
        (spacing, [seen.spacing for seen in read], "spacing, mm"),
        (shape, [seen.shape for seen in read], "voxels on an axis"),
    ):
        columns = np.nan_to_num(np.array(rows, dtype=float))
        axes.hist(list(columns.T), bins=20, label=["first axis", "second", "third"])
        axes.set(title=title, ylabel="cases")
        axes.legend(fontsize=7)
    shares = [seen.counts / seen.counts.sum() for seen in read if seen.counts is not None]
    if shares:
        values.stairs(np.mean(shares, axis=0), HISTOGRAM, fill=True)
        values.set(title="HU, mean over cases", ylabel="share of voxels", yscale="log")
    return f'<div class="box"><img alt="histograms" src="{data_url(figure_png(figure))}"></div>'


def thumbnails_html(examined: Sequence[Examined]) -> list[str]:
    """The middle coronal slice of the cases, those with findings first."""
    shown = sorted((seen for seen in examined if seen.thumbnail is not None), key=lambda seen: not seen.findings)
    parts = ['<p class="note">Middle coronal slice, -400 to 400 HU, the patient\'s right on the left.</p>']
    parts.append('<div style="display:flex;flex-wrap:wrap;gap:.7rem">')
    for seen in shown[:MOST_THUMBNAILS]:
        assert seen.thumbnail is not None
        buffer = BytesIO()
        matplotlib.image.imsave(buffer, seen.thumbnail, cmap="gray", vmin=0, vmax=255, format="png")
        source = data_url(buffer.getvalue())
        kinds = ", ".join(finding.kind for finding in seen.findings)
        caption = escape(seen.case.name) + (f"<br><b>{escape(kinds)}</b>" if kinds else "")
        parts.append(f'<figure><img alt="" src="{source}"><figcaption>{caption}</figcaption></figure>')
    parts.append("</div>")
    if len(shown) > MOST_THUMBNAILS:
        parts.append(f'<p class="note">{MOST_THUMBNAILS} of {len(shown)} cases.</p>')
    return parts
