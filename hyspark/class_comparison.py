"""Classification runs from several starts compared, as comparison.py does it for segmentation.

AUC, accuracy and F1 come with intervals over images and seeds, for which each is computed anew in every resample, and
differences are between pairs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.class_metrics import METRICS, resampled
from hyspark.class_scores import Classified, read_cases, read_summary
from hyspark.comparison import Place, budget, by_name, steps_and_seconds, tabulate
from hyspark.statistics import NUM_RESAMPLES, estimate

MOST_DRAWS = 10_000_000
"""Images in all resamples together."""
LEAST_RESAMPLES = 1000


@dataclass(frozen=True)
class ClassifiedRun:
    """A finished run: its scored images, how they were scored, steps and seconds of training."""

    scored: Classified
    protocol: Mapping[str, Any]
    steps: int
    seconds: float


def read_classified(scores: Path, metrics: Path, images_per_step: int) -> ClassifiedRun:
    """A run from its scores' folder (cases.csv, summary.json) and its metrics.jsonl.

    Raises FileNotFoundError where a file is missing; ValueError, naming the file, where it is of another kind.
    """
    protocol = read_summary(scores)["protocol"]
    return ClassifiedRun(read_cases(scores / "cases.csv"), protocol, *steps_and_seconds(metrics, images_per_step))


def compare_classified(
    runs: Mapping[Place, ClassifiedRun], planned: Sequence[Place], starts: Mapping[str, str]
) -> dict[str, Any]:
    """All numbers of a comparison, as `comparison.compare` has them.

    Raises ValueError where runs were not scored on the same images.
    """
    names: tuple[str, ...] = ()
    for place, run in runs.items():
        names = names or run.scored.names
        if run.scored.names != names:
            raise ValueError(f"{place.start}, seed {place.seed}: scored on other images than the runs before it")
    return tabulate(runs, planned, starts, describe, differ, images=list(names))


def describe(runs: Mapping[int, ClassifiedRun]) -> dict[str, Any]:
    """Of one start and number of labels: each metric's mean with interval, and by seed; steps and minutes of a run."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        num = num_images(runs.values())
        whole = measures(runs.values(), metric, np.ones((1, num)))[0]
        mean = estimate(partial(measures, list(runs.values()), metric), len(runs), num, num_resamples=resamples(num))
        found[metric] = asdict(mean) | {"by_seed": by_name(map(str, runs), whole)}
    return found | budget(runs)


def differ(own: Mapping[int, ClassifiedRun], other: Mapping[int, ClassifiedRun]) -> dict[str, Any]:
    """One start minus another, by seed, on the same images: each metric with its interval."""
    both = [seed for seed in own if seed in other]
    sides = [[side[seed] for seed in both] for side in (own, other)]

    def difference(metric: str, weights: np.ndarray) -> np.ndarray:
        a, b = (measures(side, metric, weights) for side in sides)
        return a - b

    num = num_images(sides[0])
    options = {"num_resamples": resamples(num)}
    return {metric: asdict(estimate(partial(difference, metric), len(both), num, **options)) for metric in METRICS}


def measures(runs: Iterable[ClassifiedRun], metric: str, weights: np.ndarray) -> np.ndarray:
    """A metric of each run in each resample of the images, (resamples, runs)."""
    columns = [resampled(metric, run.scored.truth, run.scored.probabilities, weights) for run in runs]
    return np.stack(columns, 1) if columns else np.empty((len(weights), 0))


def resamples(num: int) -> int:
    """How many resamples: fewer of many images, which take memory and time."""
    return min(NUM_RESAMPLES, max(LEAST_RESAMPLES, MOST_DRAWS // max(1, num)))


def num_images(runs: Iterable[ClassifiedRun]) -> int:
    """Images that each run was scored on."""
    return next((len(run.scored.names) for run in runs), 0)
