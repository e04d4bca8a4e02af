"""Fine-tuning runs from several starts compared: their scores and times, and what differs with how much certainty.

Everything that a report says is in the one dictionary that `compare` returns; see `hyspark.comparison.bootstrap` for
the intervals. Distances are in mm, Dice and NSD shares of 1.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyspark.comparison.bootstrap import interval, organ_means, paired_difference, seed_means, weighted_mean
from hyspark.comparison.report import write_benefit
from hyspark.comparison.table import Kind, Place, budget, by_name, name_of, steps_and_seconds, tabulate
from hyspark.config.segmentation import SegmentationConfig, check_decoder
from hyspark.data.datasets.cases import cases_digest
from hyspark.data.preprocessing.prepare import files_exist
from hyspark.evaluation.segmentation.evaluate import find_labelled
from hyspark.evaluation.segmentation.test_cases import prepare_held_out
from hyspark.tasks.segmentation import initialise_segmentation
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import load_volume_weights
from hyspark.training.labelled_cases import find_labelled_cases, label_fault
from hyspark.training.run_volumes import prepare_run_volumes
from hyspark.utils.digests import text_digest
from hyspark.utils.text import listing

METRICS = ("dice", "nsd", "hd95_mm")
MISSED = "missed"  # share of (case, organ) pairs with an organ of which nothing was found


@dataclass(frozen=True)
class ScoredRun:
    """A finished run. scores: of each metric, by (case, organ), as far as they are defined. seconds: of its training
    steps.
    """

    scores: Mapping[str, Mapping[tuple[str, str], float]]
    protocol: Mapping[str, Any]
    steps: int
    seconds: float


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


def scores_folder(config: SegmentationConfig) -> Path:
    """Of the cases in test_dir where there is one, else of the validation cases."""
    return config.run_folder / ("scores_test" if config.test_dir else "scores")


def num_training(config: SegmentationConfig) -> int:
    """Labelled training cases."""
    return len(find_labelled_cases(config)[0])


def digest(config: SegmentationConfig) -> str:
    """Of the names and files of all cases to train on, to validate on and to score further, in 12 digits."""
    training, validation, _ = find_labelled_cases(replace(config, num_labelled=0, label_fraction=1.0))
    further = find_labelled(Path(config.test_dir), "all").cases if config.test_dir else []
    parts = [cases_digest([c for c in part if files_exist(c)]) for part in (training, validation, further)]
    return text_digest(parts)


def check_data(configs: Sequence[SegmentationConfig], starts: Mapping[str, str]) -> None:
    """Look at the data and load each start once, and prepare the volumes, which runs side by side would all make.

    Raises ValueError or FileNotFoundError for data or weights that do not fit.
    """
    check_decoder(configs[0])
    largest = {config.seed: config for config in sorted(configs, key=lambda config: config.num_labelled)}
    found = [(config, *find_labelled_cases(config)) for config in largest.values()]
    config, _, _, names = found[0]
    for name, weights in starts.items():
        if weights != "none":
            network = initialise_segmentation(config, len(names))
            print(f"start {name}: {weights}\n{load_volume_weights(network, weights, config)}")
    here = Processes(torch.device("cpu"))
    for config, training, validation, _ in found:
        prepare_run_volumes(config, here, Path(config.data), training, validation, partial(label_fault, names=names))
    prepare_held_out(config, here, names)


def report(
    out: Path,
    finished: Mapping[Place, SegmentationConfig],
    planned: Sequence[Place],
    starts: Mapping[str, str],
    more: Mapping[str, Any],
) -> None:
    """Dice, surfaces and missed organs against the number of labelled cases."""
    scored = {
        place: read_run(scores_folder(c), c.run_folder / "metrics.jsonl", c.batch_size * c.crops_per_volume)
        for place, c in finished.items()
    }
    write_benefit(out, compare(scored, planned, starts) | dict(more))


KIND = Kind("finetune", scores_folder, num_training, digest, check_data, report)
