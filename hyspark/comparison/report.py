"""The benefit report: the numbers of a comparison, of segmentation or classification, as Markdown, picture and JSON."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyspark.evaluation.classification.metrics import METRICS
from hyspark.figures.panels import DPI, save_figure
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.tables import table

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: for all eyes
MARKERS = "osD^vPX"

PUBLISHED = (
    (
        "Official HySparK weights, fine-tuned by others, at 1 / 10 / 100 % of the labels",
        "AMOS 34.5 / 64.3 / 85.6; FLARE22 37.5 / 73.6 / 82.4; BTCV 35.8 / 51.5 / -; SegTHOR 58.8 / 84.0 / 88.7",
        "MedGMAE, submission to ICLR 2026, table 1 (https://openreview.net/forum?id=Z2XIRLv535)",
    ),
    (
        "In the same table, BTCV at 1 / 10 / 100 % of the labels",
        "MAE 62.0 / 75.0 / -; VoCo 73.2 / 77.9 / 83.9",
        "the same",
    ),
    (
        "BTCV in the protocol of VoCo's authors",
        "from scratch 82.79; SwinUNETR-SSL 82.58; SuPreM 85.32; VoCo 86.64",
        "https://github.com/Luffy03/Large-Scale-Medical, Downstream/monai/BTCV",
    ),
    (
        "SparK in 3D (S3D, CVPR 2025), mean of 11 data sets",
        "from scratch 70.40; pre-trained 72.37",
        "arXiv 2410.23132",
    ),
)
"""What, Dice in %, source."""

READING = """\
Dice is the mean over organs (background excluded) of the mean over the cases that hold the organ, then the mean over
seeds; in parentheses its range over seeds. A difference is over pairs: the same seed (so the same labelled cases,
batches and fresh weights) and the same scored case on both sides. In brackets is its 95 % bootstrap interval, seeds
and cases resampled with pairs kept; bold where it leaves out 0. With few seeds it is too narrow where seeds differ more
than cases do (three seeds: it may hold the true value in three of four repeats only), and with one seed it holds for
that seed alone. Intervals of organs are not corrected for there being many. HD95 has no value where nothing of an organ
was found, so it flatters a start that misses organs: read it with the share that was missed."""


def write_benefit(out: Path, numbers: Mapping[str, Any]) -> Path:
    """Write benefit.json, benefit.png and benefit.md into `out`; returns the last. Numbers: of `compare`, with what the
    runs share as "recipe" and their weights' digests as "digests".
    """
    published = [dict(zip(("what", "dice_percent", "source"), row, strict=True)) for row in PUBLISHED]
    content = dict(numbers) | {"published_elsewhere_not_comparable": published}
    write_json(out / "benefit.json", content)
    save_figure(benefit_figure(numbers), out / "benefit.png")
    write_whole(out / "benefit.md", page(numbers).encode())
    return out / "benefit.md"


def page(numbers: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    missing = numbers["missing"]
    state = f"{numbers['finished']} of {numbers['planned']} runs are finished"
    parts = [
        "# Does pre-training pay?",
        f"{state}, scored on {len(numbers['cases'])} {numbers['scored_on']} cases."
        + (f" Not finished: {', '.join(missing)}." if missing else ""),
        "![Dice against the number of labelled cases, and differences to the baseline](benefit.png)",
        "## Dice, %",
        table(metric_rows(numbers)),
        *left_out(numbers),
        *fewer_labels(numbers),
        *rates(numbers),
        READING,
        "## Organs",
    ]
    for count in numbers["num_labelled"]:
        parts += [f"Dice, %, with {count} labelled cases:", table(organ_rows(numbers, count))]
    parts += ["## Surfaces, and organs not found", table(surface_rows(numbers))]
    parts += common(numbers)
    parts += [
        "## Published elsewhere: not comparable",
        "Other data, splits, networks, budgets and ways to score: quoted to know the field, not to be compared with "
        "the figures above.",
        table([["what", "Dice, %", "source"], *map(list, PUBLISHED)]),
    ]
    return "\n\n".join(parts) + "\n"


def common(numbers: Mapping[str, Any], samples: str = "cases") -> list[str]:
    """What reports on all kinds of tasks end with: budgets, protocol, starts, recipe."""
    parts = ["## Budgets and times", table(budget_rows(numbers, samples))]
    parts += ["Minutes are those of the training steps; preparing data, validation and scoring come on top."]
    if len({tuple(cell["steps"]) for cell in numbers["cells"] if cell["steps"]}) > 1:
        parts += [
            f"The budget is not the same in all rows: more labelled {samples} make longer epochs. With one number of "
            "labels all starts have the same; for the same with all numbers, set --steps_per_epoch."
        ]
    parts += ["## Protocol", bullets({k: "; ".join(map(str, v)) for k, v in numbers["protocol"].items()})]
    parts += ["Starts:", bullets({k: start_text(numbers, k) for k in numbers["starts"]})]
    return [*parts, "Recipe of all runs, where it is not the default:", bullets(numbers["recipe"])]


def metric_rows(numbers: Mapping[str, Any], metric: str = "dice", samples: str = "cases") -> list[list[str]]:
    """A row for each number of labels: each start, its difference to the baseline, and how many runs that rests on."""
    starts, baseline = list(numbers["starts"]), numbers["baseline"]
    rows = [[f"labelled {samples}", *starts, *(f"{name} minus {baseline}, points" for name in starts[1:]), "runs"]]
    for count in numbers["num_labelled"]:
        cells = [cell_of(numbers, start, count) for start in starts]
        done = sum(len(cell["seeds"]) for cell in cells)
        row = [str(count), *(with_range(cell[metric]) for cell in cells)]
        row += [with_interval(cell["difference"][metric]) for cell in cells[1:]]
        rows.append([*row, f"{done} of {len(starts) * len(numbers['seeds'])}"])
    return rows


def organ_rows(numbers: Mapping[str, Any], count: int) -> list[list[str]]:
    """A row for each organ: each start, and its difference to the baseline."""
    starts = list(numbers["starts"])
    cells = [cell_of(numbers, start, count) for start in starts]
    rows = [["organ", *starts, *(f"{name} minus {numbers['baseline']}, points" for name in starts[1:])]]
    for organ in numbers["organs"]:
        row = [organ, *(number(100 * cell["dice"]["by_organ"][organ]) for cell in cells)]
        rows.append([*row, *(with_interval(cell["difference"]["dice"]["by_organ"][organ]) for cell in cells[1:])])
    return rows


def surface_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """NSD and HD95 of each start and number of labels with their differences to the baseline, and missed organs."""
    minus = f"minus {numbers['baseline']}"
    rows = [["labelled cases", "start", "NSD, %", f"{minus}, points", "HD95, mm", f"{minus}, mm", "not found, %"]]
    for cell in numbers["cells"]:
        row = [str(cell["num_labelled"]), cell["start"]]
        for metric, scale in (("nsd", 100), ("hd95_mm", 1)):
            difference = with_interval(cell["difference"][metric], scale) if "difference" in cell else ""
            row += [number(scale * cell[metric]["mean"]), difference]
        rows.append([*row, number(100 * cell["missed"]["mean"])])
    return rows


def budget_rows(numbers: Mapping[str, Any], samples: str = "cases") -> list[list[str]]:
    """Steps and minutes of each start and number of labels."""
    rows = [[f"labelled {samples}", "start", "steps a run", "minutes a run"]]
    for cell in numbers["cells"]:
        steps = " or ".join(map(str, cell["steps"])) or "-"
        minutes = ", ".join(f"{m:.1f}" for m in cell["minutes"]) or "-"
        rows.append([str(cell["num_labelled"]), cell["start"], steps, minutes])
    return rows


def left_out(numbers: Mapping[str, Any], samples: str = "cases") -> list[str]:
    """Which pairs a difference could not use."""
    lines = []
    for cell in numbers["cells"]:
        if cell.get("left_out"):
            seeds = ", ".join(map(str, cell["left_out"]))
            lines.append(f"{cell['start']} with {cell['num_labelled']} labelled {samples}: seed {seeds}")
    note = "Left out of differences, because one side of the pair is not finished (means use what is there): "
    return [note + "; ".join(lines) + "."] if lines else []


def fewer_labels(numbers: Mapping[str, Any], samples: str = "cases") -> list[str]:
    """Where runs were trained on fewer samples than the table's first column says."""
    lines = []
    for cell in numbers["cells"]:
        if fewer := [num for num in cell["training_cases"] if num != cell["num_labelled"]]:
            lines.append(f"{cell['start']} with {cell['num_labelled']} on {' or '.join(map(str, fewer))}")
    note = f"Trained on fewer {samples} than the first column says, since some could not be used and were left out"
    return [f"{note}: {'; '.join(lines)}."] if lines else []


def rates(numbers: Mapping[str, Any]) -> list[str]:
    """Where the encoders of the starts learn at different rates."""
    share = numbers["recipe"].get("pretrained_lr_ratio", 1)
    note = f"A pre-trained encoder learns at {share:g} times the rate of one from scratch (pretrained_lr_share)."
    return [] if share == 1 else [note]


def benefit_figure(
    numbers: Mapping[str, Any], metric: str = "dice", title: str = "Dice", samples: str = "cases"
) -> Figure:
    """A metric against the number of labels, a line per start; beside it the differences to the baseline."""
    starts = list(numbers["starts"])
    figure = Figure(figsize=(10.5, 4.4), dpi=DPI, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, start in enumerate(starts):
        cells = [cell_of(numbers, start, count) for count in numbers["num_labelled"]]
        shift = 1.025 ** (index - (len(starts) - 1) / 2)  # bars beside, not upon, each other
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        draw_line(left, cells, [cell[metric] for cell in cells], shift, start, style)
        for cell in cells:
            values = 100 * np.array(list(cell[metric]["by_seed"].values()))
            x = np.full(len(values), cell["num_labelled"] * shift * 0.985)  # to the left of the bar
            left.plot(x, values, ls="none", ms=4.5, mew=0, alpha=0.4, **style)
        if index:
            draw_line(right, cells, [cell["difference"][metric] for cell in cells], shift, start, style)
    right.axhline(0, color=COLOURS[0], lw=1)
    left.set_title(f"{title}, %", loc="left", fontsize=10, weight="bold")
    right.set_title(f"{title} minus that of {numbers['baseline']}, points", loc="left", fontsize=10, weight="bold")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(numbers["num_labelled"], [str(count) for count in numbers["num_labelled"]])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"labelled {samples}; bars: 95 % interval over {samples} and seeds", fontsize=8.5)
        axes.grid(alpha=0.2, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    legend = left.legend(frameon=False, fontsize=8.5, loc="lower right")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def draw_line(
    axes: Axes,
    cells: Sequence[Mapping[str, Any]],
    estimates: Sequence[Mapping[str, float]],
    shift: float,
    label: str,
    style: Mapping[str, Any],
) -> None:
    """Means and intervals, as far as there are any, in points."""
    known = [(c["num_labelled"] * shift, e) for c, e in zip(cells, estimates, strict=True) if math.isfinite(e["mean"])]
    x = [position for position, _ in known]
    mean, low, high = (100 * np.array([e[name] for _, e in known]) for name in ("mean", "low", "high"))
    bars = np.maximum([mean - low, high - mean], 0)  # rounding may put the mean of equal values beside them
    axes.errorbar(x, mean, yerr=bars, label=label, lw=1.8, ms=6, capsize=3, elinewidth=1, **style)


def cell_of(numbers: Mapping[str, Any], start: str, count: int) -> Mapping[str, Any]:
    """The cell of a start and a number of labels."""
    return next(c for c in numbers["cells"] if (c["start"], c["num_labelled"]) == (start, count))


def with_range(dice: Mapping[str, Any]) -> str:
    """Mean and range over seeds, in %."""
    seeds = [100 * value for value in dice["by_seed"].values()]
    spread = f" ({number(min(seeds))} to {number(max(seeds))})" if len(seeds) > 1 else ""
    return number(100 * dice["mean"]) + spread


def with_interval(estimate: Mapping[str, float], scale: float = 100) -> str:
    """A difference and its interval, as they are times `scale` (shares as points), bold where that leaves out 0."""
    mean, low, high = (scale * estimate[name] for name in ("mean", "low", "high"))
    if not math.isfinite(mean):
        return "-"
    if not math.isfinite(low):
        return f"{mean:+.1f} [one case]"
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def number(value: float) -> str:
    """One decimal, or a dash for none."""
    return f"{value:.1f}" if math.isfinite(value) else "-"


def start_text(numbers: Mapping[str, Any], start: str) -> str:
    """The weights of a start, and the digest of their file."""
    digest = numbers["digests"].get(start)
    weights = numbers["starts"][start]
    return f"{weights} (sha256 {digest[:12]})" if digest else "from scratch"


def bullets(lines: Mapping[str, Any]) -> str:
    """A list of names and values."""
    return "\n".join(f"- {key}: {value}" for key, value in lines.items()) or "- none"


CLASSIFICATION_READING = """\
With two classes the AUC is that of the second in sorted order, with more the mean over each against the rest; F1 is the
mean over classes. Means are over seeds; in parentheses their range. A difference is over pairs: the same seed (so the
same training images, batches and fresh weights) and the same scored images on both sides. In brackets is its 95 %
bootstrap interval: seeds and images are drawn anew with pairs kept, and the metric is computed anew on what was drawn;
bold where it leaves out 0. With few seeds it is too narrow where seeds differ more than images do, and with one seed it
holds for that seed alone. Images are taken to be independent: where several are of one patient, it is too narrow."""


def write_class_benefit(out: Path, numbers: Mapping[str, Any]) -> Path:
    """Write benefit.json, benefit.png and benefit.md into `out`; returns the last. Numbers: of `compare_classified`,
    with "scored_on", and what the runs share as "recipe" and their weights' digests as "digests".
    """
    write_json(out / "benefit.json", numbers)
    save_figure(benefit_figure(numbers, "auc", "AUC", "images"), out / "benefit.png")
    write_whole(out / "benefit.md", classification_page(numbers).encode())
    return out / "benefit.md"


def classification_page(numbers: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    missing = numbers["missing"]
    parts = [
        "# Does pre-training pay?",
        f"{numbers['finished']} of {numbers['planned']} runs are finished, scored on {len(numbers['images'])} "
        f"{numbers['scored_on']} images." + (f" Not finished: {', '.join(missing)}." if missing else ""),
    ]
    if numbers["scored_on"] == "validation":
        parts += ["These images chose the weights of each run, too, so that all values are optimistic."]
    parts += ["![AUC against the number of labelled images, and differences to the baseline](benefit.png)"]
    for metric, title in METRICS.items():
        parts += [f"## {title[0].upper()}{title[1:]}, %", table(metric_rows(numbers, metric, "images"))]
    parts += [*left_out(numbers, "images"), *fewer_labels(numbers, "images"), *rates(numbers)]
    return "\n\n".join([*parts, CLASSIFICATION_READING, *common(numbers, "images")]) + "\n"
