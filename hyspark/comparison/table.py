"""What is common to comparisons of any kind of run: places, means, budgets, names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from hyspark.evaluation.protocol import TRAINED_ON
from hyspark.training.metrics_log import read_metrics


class Place(NamedTuple):
    """Which run of a comparison."""

    start: str
    num_labelled: int
    seed: int


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


def steps_and_seconds(metrics: Path, samples_per_step: int) -> tuple[int, float]:
    """Steps of a run and the seconds that they took, from its metrics.jsonl."""
    speeds = [line["samples_per_second"] for line in read_metrics(metrics) if line.get("samples_per_second")]
    return len(speeds), sum(samples_per_step / speed for speed in speeds)


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


def budget(runs: Mapping[int, AnyRun]) -> dict[str, Any]:
    """Steps and minutes of runs, and how many cases they were trained on, as far as their scores say."""
    minutes = [round(run.seconds / 60, 2) for run in runs.values()]
    numbers = {run.protocol[TRAINED_ON] for run in runs.values() if TRAINED_ON in run.protocol}
    return {"steps": sorted({run.steps for run in runs.values()}), "minutes": minutes, TRAINED_ON: sorted(numbers)}


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


@dataclass(frozen=True)
class Kind:
    """A kind of fine-tuning. Settings are of the task's own class.

    verb: of the command that makes a run. scores: settings -> the folder of a run's scores. num_training: settings ->
    how many training cases there are. digest: settings -> digest of all data that runs with any number of labels and
    any seed train on or are scored on. check_data: look at the data and load each start once, before the first of the
    runs with these settings; raises ValueError or FileNotFoundError for data or weights that do not fit. report: into a
    folder, of the finished runs' settings by place, all places planned, starts, and what goes along with the numbers.
    """

    verb: str
    scores: Callable[[Any], Path]
    num_training: Callable[[Any], int]
    digest: Callable[[Any], str]
    check_data: Callable[[Sequence[Any], Mapping[str, str]], None]
    report: Callable[[Path, Mapping[Place, Any], Sequence[Place], Mapping[str, str], Mapping[str, Any]], None]
