"""The report on a checked data set: text for the terminal, JSON, one HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

from hyspark.data.preprocessing.estimate import PreparationEstimate
from hyspark.data.quality.examine import FRACTIONS, HISTOGRAM, Examined
from hyspark.data.quality.findings import FINDING_KINDS, SEVERITIES, Finding
from hyspark.figures.panels import DPI, figure_png
from hyspark.reports.html import render_page
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.text import format_bytes, format_duration

MAX_FILES = 5
"""Files of one kind of fault that the terminal lists; the JSON and the page list all."""


def by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Group findings by their kind, errors first, in the order of FINDING_KINDS."""
    found: dict[str, list[Finding]] = {}
    order = list(FINDING_KINDS)
    for finding in sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), order.index(f.kind))):
        found.setdefault(finding.kind, []).append(finding)
    return found


def all_findings(examined: Sequence[Examined], others: Sequence[Finding]) -> list[Finding]:
    """List the findings of the cases and the others, which are of the data set, each once."""
    return list(dict.fromkeys([*(finding for seen in examined for finding in seen.findings), *others]))


def counts_text(findings: Sequence[Finding]) -> str:
    """Count the findings of each severity, in words."""
    return ", ".join(f"{sum(f.severity == s for f in findings)} {s}s" for s in SEVERITIES)


def data_set_facts(
    examined: Sequence[Examined], estimate: PreparationEstimate | None, spacing: Sequence[float]
) -> dict[str, str]:
    """Sum up the data set in a few named facts.

    Args:
        examined: The cases.
        estimate: Cost of preparation.
        spacing: Prepared spacing in mm.
    """
    read = [seen for seen in examined if seen.shape and seen.spacing]
    lines = {
        "cases": f"{len(examined)}, {sum(seen.case.label is not None for seen in examined)} of them labelled",
        "usable": f"{sum(not seen.is_broken for seen in examined)}",
    }
    if read:
        lines["voxels"] = ranges([seen.shape for seen in read], "{:.0f}")
        lines["spacing, mm"] = ranges([seen.spacing for seen in read], "{:.2f}")
    if estimate:
        lines["store"] = (
            f"about {format_bytes(estimate.store_bytes)} at {' x '.join(f'{edge:g}' for edge in spacing)} mm"
        )
        memory = f", {format_bytes(estimate.memory)} a process" if estimate.memory else ""
        lines["preparation"] = f"about {format_duration(estimate.seconds)} on one core{memory}"
    return lines


def ranges(values: Sequence[Any], form: str) -> str:
    """Write the median and the range of each axis."""
    axes = np.array(values, dtype=float)
    middle, low, high = np.nanmedian(axes, axis=0), np.nanmin(axes, axis=0), np.nanmax(axes, axis=0)
    text = [" x ".join(form.format(v) for v in row) for row in (middle, low, high)]
    return text[0] if text[1] == text[2] else f"{text[0]} (median; {text[1]} to {text[2]})"


def data_check_text(examined: Sequence[Examined], others: Sequence[Finding], lines: Mapping[str, str]) -> str:
    """Write the report for the terminal.

    Args:
        examined: The cases.
        others: Findings of the data set.
        lines: Facts of `data_set_facts`.
    """
    findings = all_findings(examined, others)
    rows = [f"{name:12s} {value}" for name, value in lines.items()]
    rows.append(f"{'findings':12s} {counts_text(findings)}")
    for kind, found in by_kind(findings).items():
        known = FINDING_KINDS[kind]
        rows.append(f"\n{known.severity}: {kind} ({len(found)}); expected {known.expected}: {known.advice}")
        rows += [f"  {finding.file}: {finding.found}" for finding in found[:MAX_FILES]]
        if len(found) > MAX_FILES:
            rows.append(f"  and {len(found) - MAX_FILES} more")
    return "\n".join(rows)


def write_data_check(
    out: Path,
    title: str,
    examined: Sequence[Examined],
    others: Sequence[Finding],
    lines: Mapping[str, str],
    estimate: PreparationEstimate | None,
) -> Path:
    """Write check.json and check.html.

    Args:
        out: Folder to write to.
        title: The data, in words.
        examined: The cases.
        others: Findings of the data set.
        lines: Facts of `data_set_facts`.
        estimate: Cost of preparation.

    Returns:
        The path of check.html.
    """
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
    with_picture = sorted((seen for seen in examined if seen.thumbnail is not None), key=lambda seen: not seen.findings)
    page = render_page(
        "data_check.html",
        title=f"Data check: {title}",
        cards={**lines, "findings": counts_text(findings)},
        findings=[finding_table(kind, found) for kind, found in by_kind(findings).items()],
        histograms=drawn_histograms(examined),
        greys="-400 to 400 HU" if all(seen.is_ct for seen in examined) else "lowest to highest value of each case",
        thumbnails=[shown_thumbnail(seen) for seen in with_picture],
        num_cases=len(examined),
    )
    write_whole(out / "check.html", page)
    return out / "check.html"


def finding_table(kind: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Collect what the page shows of a kind of findings."""
    rows = [[finding.file, finding.found] for finding in findings]
    known = FINDING_KINDS[kind]
    return {"name": kind, "rows": rows, "severity": known.severity, "expected": known.expected, "advice": known.advice}


def case_numbers(seen: Examined) -> dict[str, Any]:
    """Describe a case in plain values."""
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


def drawn_histograms(examined: Sequence[Examined]) -> bytes | None:
    """Draw spacing and size of the cases by axis, and the values of all voxels, as PNG; None if no case was read."""
    read = [seen for seen in examined if seen.shape and seen.spacing]
    if not read:
        return None
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
    fractions = [seen.counts / seen.counts.sum() for seen in read if seen.counts is not None]
    if fractions:
        values.stairs(np.mean(fractions, axis=0), HISTOGRAM if read[0].is_ct else FRACTIONS, fill=True)
        title = "HU" if read[0].is_ct else "value, lowest to highest of each case"
        values.set(title=f"{title}, mean over cases", ylabel="fraction of voxels", yscale="log")
    return figure_png(figure)


def shown_thumbnail(seen: Examined) -> dict[str, Any]:
    """Return a case's name, its thumbnail as PNG, and the kinds of its findings."""
    buffer = BytesIO()
    assert seen.thumbnail is not None
    matplotlib.image.imsave(buffer, seen.thumbnail, cmap="gray", vmin=0, vmax=255, format="png")
    kinds = ", ".join(finding.kind for finding in seen.findings)
    return {"name": seen.case.name, "png": buffer.getvalue(), "findings": kinds}
