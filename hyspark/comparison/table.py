"""The numbers of a comparison: finished runs read, paired, and summed up in a cell per initial weights and budget.

benefit.json holds them. In its keys, "starts" are initial weights, and "left_out" are seeds without a pair.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hyspark.comparison.kind import RunKind
from hyspark.evaluation.protocol import TRAINED_ON, read_summary
from hyspark.evaluation.score_table import ScoreTable, read_score_table
from hyspark.training.metrics_log import iterate_metrics
from hyspark.utils.text import listing


class RunKey(NamedTuple):
    """Key of a run in a comparison.

    Attributes:
        weights: Name of the initial weights.
        num_labelled: Number of labelled training samples.
        seed: Seed of the run.
    """

    weights: str
    num_labelled: int
    seed: int

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.weights}_{self.num_labelled}_seed{self.seed}"


@dataclass(frozen=True)
class ScoredRun:
    """A finished run.

    Attributes:
        table: Its scores.
        protocol: How they were measured.
        steps: Steps of training.
        seconds: Duration of these steps.
    """

    table: ScoreTable
    protocol: Mapping[str, Any]
    steps: int
    seconds: float


def read_run(scores: Path, metrics: Path, samples_per_step: int) -> ScoredRun:
    """Read a run from its folder of scores and its metrics.jsonl.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged; the message names it.
    """
    steps, seconds = 0, 0.0
    for line in iterate_metrics(metrics):
        if speed := line.get("samples_per_second"):
            steps, seconds = steps + 1, seconds + samples_per_step / speed
        elif "epoch_steps" in line:  # nnU-Net's, whose lines are epochs
            steps, seconds = steps + line["epoch_steps"], seconds + line["epoch_seconds"]
    return ScoredRun(read_score_table(scores / "cases.csv"), read_summary(scores)["protocol"], steps, seconds)


def compare_runs(
    kind: RunKind, runs: Mapping[RunKey, ScoredRun], planned: Sequence[RunKey], initial_weights: Mapping[str, str]
) -> dict[str, Any]:
    """Compute all numbers of a comparison.

    A mean is over the finished seeds. A difference is over the seeds that are finished on both sides.

    Args:
        kind: Kind of the runs.
        runs: The finished runs.
        planned: Keys of all runs.
        initial_weights: By name, the file of weights, or "none". The first is the baseline of differences.

    Returns:
        The content of benefit.json.

    Raises:
        ValueError: Runs were not scored on the same samples.
    """
    baseline = next(iter(initial_weights))
    runs, cases, targets = with_same_samples(kind, runs)
    counts, seeds = (sorted({getattr(key, field) for key in planned}) for field in ("num_labelled", "seed"))
    cells = []
    for count in counts:
        for name in initial_weights:
            own, other = (
                {seed: runs[key] for seed in seeds if (key := RunKey(side, count, seed)) in runs}
                for side in (name, baseline)
            )
            cell = {"start": name, "num_labelled": count, "seeds": list(own)} | describe_runs(kind, own, targets)
            if name != baseline:
                pairs = [seed for seed in own if seed in other]
                ours, theirs = ([side[seed].table for seed in pairs] for side in (own, other))
                cell["difference"] = {m: kind.difference(ours, theirs, m, targets) for m in kind.metrics}
                cell["pairs"] = pairs
                cell["left_out"] = [seed for seed in seeds if (seed in own) != (seed in other)]
            cells.append(cell)
    return {
        "baseline": baseline,
        "starts": dict(initial_weights),
        "num_labelled": counts,
        "seeds": seeds,
        **kind.names(cases, targets),
        "planned": len(planned),
        "finished": len(runs),
        "missing": [key.folder for key in planned if key not in runs],
        "protocol": merge_protocols(run.protocol for run in runs.values()),
        "cells": cells,
    }


def with_same_samples(
    kind: RunKind, runs: Mapping[RunKey, ScoredRun]
) -> tuple[dict[RunKey, ScoredRun], list[str], list[str]]:
    """Bring the tables of runs to the same cases and targets; returns these, too.

    Raises:
        ValueError: Runs were not scored on the same samples.
    """
    tables = {key: kind.comparable(run.table) for key, run in runs.items()}
    cases = list(next(iter(tables.values())).cases) if tables else []
    targets = list(dict.fromkeys(name for table in tables.values() for name in table.targets))
    for key, table in tables.items():
        if sorted(table.cases) != sorted(cases):
            raise ValueError(
                f"{key.folder} was scored on other {kind.samples} than the runs before it: {listing(table.cases)}; not "
                f"on {listing(cases)}. Remove the folder of the wrong run to have it made again"
            )
    return {key: replace(run, table=tables[key].take(cases, targets)) for key, run in runs.items()}, cases, targets


def describe_runs(kind: RunKind, runs: Mapping[int, ScoredRun], targets: Sequence[str]) -> dict[str, Any]:
    """Sum up the runs of a cell, by seed: each metric, steps, minutes, numbers of training samples."""
    found: dict[str, Any] = {}
    for metric in kind.metrics:
        mean = kind.mean([run.table for run in runs.values()], metric, targets)
        found[metric] = mean | {"by_seed": by_name(map(str, runs), mean["by_seed"])}
    return found | {
        "steps": sorted({run.steps for run in runs.values()}),
        "minutes": [round(run.seconds / 60, 2) for run in runs.values()],
        TRAINED_ON: sorted({run.protocol[TRAINED_ON] for run in runs.values() if TRAINED_ON in run.protocol}),
    }


def by_name(names: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """Map names to plain numbers."""
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def merge_protocols(protocols: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Collect the values of each key, but for TRAINED_ON: one, unless runs were scored differently."""
    found: dict[str, list[Any]] = {}
    for key, value in (item for protocol in protocols for item in protocol.items()):
        if key != TRAINED_ON and value not in found.setdefault(key, []):
            found[key].append(value)
    return found
