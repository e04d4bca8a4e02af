"""The benefit report: the numbers of a comparison as Markdown, picture and JSON."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyspark.comparison.figure import benefit_figure
from hyspark.comparison.kind import RunKind
from hyspark.evaluation.protocol import TRAINED_ON
from hyspark.figures.panels import save_figure
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.tables import markdown_table


def write_benefit(out: Path, kind: RunKind, numbers: Mapping[str, Any]) -> Path:
    """Write benefit.json, benefit.png and benefit.md.

    Args:
        out: Folder to write to.
        kind: Kind of the runs.
        numbers: The numbers of `compare_runs`; "scored_on" (test or validation); "recipe", the settings of all runs;
            "digests" of the files of weights, by name.

    Returns:
        The path of benefit.md.
    """
    write_json(out / "benefit.json", numbers)
    metric, title = next(iter(kind.shown.items()))
    save_figure(benefit_figure(numbers, metric, title, kind.samples), out / "benefit.png")
    write_whole(out / "benefit.md", benefit_page(kind, numbers).encode())
    return out / "benefit.md"


def benefit_page(kind: RunKind, numbers: Mapping[str, Any]) -> str:
    """Write the report in Markdown; the arguments are those of `write_benefit`."""
    missing = f" Not finished: {', '.join(numbers['missing'])}." if numbers["missing"] else ""
    drawn = f"{next(iter(kind.shown.values()))} against the number of labelled {kind.samples}"
    parts = [
        "# Does pre-training pay?",
        f"{numbers['finished']} of {numbers['planned']} runs are finished, scored on {len(numbers[kind.samples])} "
        f"{numbers['scored_on']} {kind.samples}.{missing}",
        kind.scored_weights[numbers["scored_on"]],
        f"![{drawn}, and differences to the baseline](benefit.png)",
    ]
    for metric, title in kind.shown.items():
        parts += [
            f"## {title[0].upper()}{title[1:]}, %",
            markdown_table(comparison_rows(numbers, metric, kind.samples)),
        ]
    parts += [
        *unpaired_seeds(numbers, kind.samples),
        *fewer_labels(numbers, kind.samples),
        *encoder_rates(numbers),
        kind.reading,
        *kind.sections(numbers),
        *budgets_and_protocol(numbers, kind.samples),
    ]
    return "\n\n".join(parts) + "\n"


def comparison_rows(numbers: Mapping[str, Any], metric: str, samples: str) -> list[list[str]]:
    """Format a row for each number of labels: a metric by initial weights, differences, number of finished runs."""
    names, baseline = list(numbers["starts"]), numbers["baseline"]
    rows = [[f"labelled {samples}", *names, *(f"{name} minus {baseline}, points" for name in names[1:]), "runs"]]
    for count in numbers["num_labelled"]:
        cells = [cell_of(numbers, name, count) for name in names]
        done = sum(len(cell["seeds"]) for cell in cells)
        row = [str(count), *(with_range(cell[metric]) for cell in cells)]
        row += [with_interval(cell["difference"][metric]) for cell in cells[1:]]
        rows.append([*row, f"{done} of {len(names) * len(numbers['seeds'])}"])
    return rows


def unpaired_seeds(numbers: Mapping[str, Any], samples: str) -> list[str]:
    """Note the seeds that a difference excludes."""
    lines = []
    for cell in numbers["cells"]:
        if cell.get("left_out"):
            seeds = ", ".join(map(str, cell["left_out"]))
            lines.append(f"{cell['start']} with {cell['num_labelled']} labelled {samples}: seed {seeds}")
    note = "Excluded from differences, because one side of the pair is not finished (means use all finished runs): "
    return [note + "; ".join(lines) + "."] if lines else []


def fewer_labels(numbers: Mapping[str, Any], samples: str) -> list[str]:
    """Note where runs were trained on fewer samples than planned."""
    lines = []
    for cell in numbers["cells"]:
        if fewer := [num for num in cell[TRAINED_ON] if num != cell["num_labelled"]]:
            lines.append(f"{cell['start']} with {cell['num_labelled']} on {' or '.join(map(str, fewer))}")
    note = f"Trained on fewer {samples} than the first column says, since unreadable ones were excluded"
    return [f"{note}: {'; '.join(lines)}."] if lines else []


def encoder_rates(numbers: Mapping[str, Any]) -> list[str]:
    """Note that pre-trained encoders have a learning rate of their own."""
    ratio = numbers["recipe"].get("pretrained_lr_ratio", 1)
    note = f"A pre-trained encoder has {ratio:g} times the learning rate of one from scratch (pretrained_lr_ratio)."
    return [] if ratio == 1 else [note]


def budgets_and_protocol(numbers: Mapping[str, Any], samples: str) -> list[str]:
    """Write the sections on budgets, protocol, initial weights and recipe."""
    parts = ["## Budgets and times", markdown_table(budget_rows(numbers, samples))]
    parts += ["Minutes are those of the training steps; preparing data, validation and scoring come on top."]
    if len({tuple(cell["steps"]) for cell in numbers["cells"] if cell["steps"]}) > 1:
        parts += [
            f"The budget is not the same in all rows: more labelled {samples} make longer epochs. With one number of "
            "labels all initial weights have the same; for the same with all numbers, set --steps_per_epoch."
        ]
    parts += ["## Protocol", bullets({k: "; ".join(map(str, v)) for k, v in numbers["protocol"].items()})]
    parts += ["Initial weights:", bullets({name: weights_text(numbers, name) for name in numbers["starts"]})]
    return [*parts, "Settings of all runs that are not the defaults:", bullets(numbers["recipe"])]


def budget_rows(numbers: Mapping[str, Any], samples: str) -> list[list[str]]:
    """Format a row for each cell: steps and minutes."""
    rows = [[f"labelled {samples}", "initial weights", "steps a run", "minutes a run"]]
    for cell in numbers["cells"]:
        steps = " or ".join(map(str, cell["steps"])) or "-"
        minutes = ", ".join(f"{m:.1f}" for m in cell["minutes"]) or "-"
        rows.append([str(cell["num_labelled"]), cell["start"], steps, minutes])
    return rows


def cell_of(numbers: Mapping[str, Any], weights: str, count: int) -> Mapping[str, Any]:
    """Find the cell of initial weights and a number of labels."""
    return next(cell for cell in numbers["cells"] if (cell["start"], cell["num_labelled"]) == (weights, count))


def with_range(metric: Mapping[str, Any]) -> str:
    """Write the mean of a metric and its range over seeds, in %."""
    seeds = [100 * value for value in metric["by_seed"].values()]
    spread = f" ({number(min(seeds))} to {number(max(seeds))})" if len(seeds) > 1 else ""
    return number(100 * metric["mean"]) + spread


def with_interval(estimate: Mapping[str, float], scale: float = 100) -> str:
    """Write a difference and its interval, multiplied by `scale`, in bold if the interval excludes 0."""
    mean, low, high = (scale * estimate[name] for name in ("mean", "low", "high"))
    if not math.isfinite(mean):
        return "-"
    if not math.isfinite(low):
        return f"{mean:+.1f} [one case]"
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def number(value: float) -> str:
    """Write a number with one decimal; "-" if it is undefined."""
    return f"{value:.1f}" if math.isfinite(value) else "-"


def weights_text(numbers: Mapping[str, Any], name: str) -> str:
    """Write the file of initial weights and its digest."""
    digest = numbers["digests"].get(name)
    return f"{numbers['starts'][name]} (sha256 {digest[:12]})" if digest else "from scratch"


def bullets(lines: Mapping[str, Any]) -> str:
    """Write names and values as a list."""
    return "\n".join(f"- {key}: {value}" for key, value in lines.items()) or "- none"
