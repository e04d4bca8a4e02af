"""Fine-tuning runs from several starts compared: their scores and times, and what differs with how much certainty.

Everything that a report says is in the one dictionary that `compare` returns; see `hyspark.statistics` for the
intervals. Distances are in mm, Dice and NSD shares of 1.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from hyspark.data.files import listing
from hyspark.report import read_metrics
from hyspark.statistics import interval, organ_means, paired_difference, seed_means, weighted_mean

METRICS = ("dice", "nsd", "hd95_mm")
SCORE_FILES = ("cases.csv", "summary.json")
DATA_DIGEST = "data_digest"  # in a protocol: `cases_digest` of what was scored
TRAINED_ON = "training_cases"  # in a protocol: their number, without those that could not be used
MISSED = "missed"  # share of (case, organ) pairs with an organ of which nothing was found


class Place(NamedTuple):
    """Which run of a comparison."""

    start: str
    num_labelled: int
    seed: int


@dataclass(frozen=True)
class ScoredRun:
    """A finished run. scores: of each metric, by (case, organ), as far as they are defined. seconds: of its training
    steps.
    """

    scores: Mapping[str, Mapping[tuple[str, str], float]]
    protocol: Mapping[str, Any]
    steps: int
    seconds: float


class AnyRun(Protocol):
    """What comparisons ask of finished runs of all kinds."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """How it was scored."""

    @property
    def steps(self) -> int:
        """Of training."""

    @property
    def seconds(self) -> float:
        """Of its training steps."""


RunT = TypeVar("RunT", bound=AnyRun)


def read_run(scores: Path, metrics: Path, crops_per_step: int) -> ScoredRun:
    """A run from its scores' folder (cases.csv, summary.json) and its metrics.jsonl. An organ that the truth of a case
    does not hold has no scores there.

    Raises FileNotFoundError where a file is missing; ValueError, naming the file, where a column or number is wrong.
    """
    found: dict[str, dict[tuple[str, str], float]] = {name: {} for name in (*METRICS, MISSED)}
    path = scores / "cases.csv"
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                key = (row["case"], row["organ"])
                if not int(row["truth_voxels"]):
                    continue
                for name in METRICS:
                    if row[name]:
                        found[name][key] = float(row[name])
                found[MISSED][key] = float(int(row["predicted_voxels"]) == 0)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: expected case, organ, truth_voxels, predicted_voxels and {', '.join(METRICS)} in each "
                    f"line, but {dict(row)} is not that ({error}); remove the run's folder to have it made again"
                ) from error
    protocol = json.loads((scores / "summary.json").read_text())["protocol"]
    return ScoredRun(found, protocol, *steps_and_seconds(metrics, crops_per_step))


def steps_and_seconds(metrics: Path, samples_per_step: int) -> tuple[int, float]:
    """Steps of a run and the seconds that they took, from its metrics.jsonl."""
    speeds = [line["samples_per_second"] for line in read_metrics(metrics) if line.get("samples_per_second")]
    return len(speeds), sum(samples_per_step / speed for speed in speeds)


def compare(runs: Mapping[Place, ScoredRun], planned: Sequence[Place], starts: Mapping[str, str]) -> dict[str, Any]:
    """All numbers of a comparison.

    runs: the finished ones of those `planned`. starts: name -> weights; the first is what the others are compared
    with. A mean is over the seeds that are finished; a difference over those that are finished on both sides, and what
    that leaves out is named. Raises ValueError where runs were not scored on the same cases.
    """
    scored_on: list[str] = []
    for place, run in runs.items():
        own = sorted({case for case, _ in run.scores[MISSED]})
        scored_on = scored_on or own
        if own != scored_on:
            raise ValueError(
                f"{name_of(place)} was scored on other cases than the runs before it: {listing(own)}; not on "
                f"{listing(scored_on)}. Remove the folder of the run that is wrong, and it is made again"
            )
    keys = dict.fromkeys(key for run in runs.values() for key in run.scores["dice"])
    cases, organs = (list(dict.fromkeys(key[i] for key in keys)) for i in (0, 1))
    cells = partial(describe, cases=cases, organs=organs), partial(differ, cases=cases, organs=organs)
    return tabulate(runs, planned, starts, *cells, cases=cases, organs=organs)


def tabulate(
    runs: Mapping[Place, RunT],
    planned: Sequence[Place],
    starts: Mapping[str, str],
    describe: Callable[[Mapping[int, RunT]], dict[str, Any]],
    differ: Callable[[Mapping[int, RunT], Mapping[int, RunT]], dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """What comparisons of all kinds have in common: a cell for each start and number of labels, and what is missing.

    describe: of the runs of a cell, by seed. differ: of such runs and those of the first start. more: goes along.
    """
    baseline = next(iter(starts))
    names = [Place(*place) for place in planned]
    counts, seeds = (sorted({getattr(place, field) for place in names}) for field in ("num_labelled", "seed"))
    cells = []
    for count in counts:
        for start in starts:
            own, other = ({s: runs[p] for s in seeds if (p := Place(n, count, s)) in runs} for n in (start, baseline))
            cell = {"start": start, "num_labelled": count, "seeds": list(own)} | describe(own)
            if start != baseline:
                cell["difference"] = differ(own, other)
                cell["pairs"] = [s for s in own if s in other]
                cell["left_out"] = [s for s in seeds if (s in own) != (s in other)]
            cells.append(cell)
    return {
        "baseline": baseline,
        "starts": dict(starts),
        "num_labelled": counts,
        "seeds": seeds,
        **more,
        "planned": len(names),
        "finished": len(runs),
        "missing": [name_of(place) for place in names if place not in runs],
        "protocol": merged({k: v for k, v in run.protocol.items() if k != TRAINED_ON} for run in runs.values()),
        "cells": cells,
    }


def describe(runs: Mapping[int, ScoredRun], cases: Sequence[str], organs: Sequence[str]) -> dict[str, Any]:
    """Of one start and count: each metric's mean with interval, by seed and by organ; steps and minutes of a run."""
    found: dict[str, Any] = {}
    for metric in (*METRICS, MISSED):
        scores = stacked(runs.values(), metric, cases, organs)
        organ_scores = weighted_mean(organ_means(scores).T, np.ones(len(runs)))
        found[metric] = asdict(interval(scores)) | {
            "by_seed": by_name(map(str, runs), seed_means(scores)),
            "by_organ": by_name(organs, organ_scores),
        }
    return found | budget(runs)


def budget(runs: Mapping[int, AnyRun]) -> dict[str, Any]:
    """Steps and minutes of runs, and how many cases they were trained on, as far as their scores say."""
    minutes = [round(run.seconds / 60, 2) for run in runs.values()]
    numbers = {run.protocol[TRAINED_ON] for run in runs.values() if TRAINED_ON in run.protocol}
    return {"steps": sorted({run.steps for run in runs.values()}), "minutes": minutes, TRAINED_ON: sorted(numbers)}


def differ(
    own: Mapping[int, ScoredRun], other: Mapping[int, ScoredRun], cases: Sequence[str], organs: Sequence[str]
) -> dict[str, Any]:
    """One start minus another, by seed and case: each metric with its interval; of Dice, each organ too."""
    both = [seed for seed in own if seed in other]
    found: dict[str, Any] = {}
    for metric in (*METRICS, MISSED):
        a, b = (stacked([side[seed] for seed in both], metric, cases, organs) for side in (own, other))
        found[metric] = asdict(paired_difference(a, b))
        if metric == "dice":
            each = [paired_difference(a[:, :, [i]], b[:, :, [i]]) for i in range(len(organs))]
            found[metric]["by_organ"] = {organ: asdict(e) for organ, e in zip(organs, each, strict=True)}
    return found


def stacked(runs: Iterable[ScoredRun], metric: str, cases: Sequence[str], organs: Sequence[str]) -> np.ndarray:
    """Scores (runs, cases, organs), NaN where there is none."""
    rows = [[[run.scores[metric].get((c, o), math.nan) for o in organs] for c in cases] for run in runs]
    return np.array(rows, dtype=float).reshape(len(rows), len(cases), len(organs))


def by_name(names: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """Names and plain numbers."""
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def merged(protocols: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Of each line of the protocols, the values that occur: one, unless runs were scored differently."""
    found: dict[str, list[Any]] = {}
    for protocol in protocols:
        for key, value in protocol.items():
            values = found.setdefault(key, [])
            if value not in values:
                values.append(value)
    return found


def name_of(place: Place) -> str:
    """The name of a run's folder."""
    return f"{place.start}_{place.num_labelled}_seed{place.seed}"
