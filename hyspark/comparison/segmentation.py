"""Segmentation runs compared: Dice, surfaces and missed organs, with intervals over cases and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch

from hyspark.comparison.kind import RunKind
from hyspark.comparison.report import cell_of, number, with_interval
from hyspark.comparison.table import by_name
from hyspark.config.segmentation import SegmentationConfig, check_decoder
from hyspark.data.datasets.cases import cases_digest
from hyspark.data.preprocessing.prepare import files_exist
from hyspark.evaluation.bootstrap import interval, organ_means, paired_difference, seed_means, weighted_mean
from hyspark.evaluation.score_table import ScoreTable
from hyspark.evaluation.segmentation.labelled_data import find_labelled
from hyspark.evaluation.segmentation.metrics import ORGAN_METRICS
from hyspark.evaluation.segmentation.test_cases import prepare_held_out
from hyspark.tasks.segmentation import initialise_segmentation
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import load_volume_weights
from hyspark.training.labelled_cases import find_labelled_cases, label_fault
from hyspark.training.run_volumes import prepare_run_volumes
from hyspark.utils.digests import text_digest
from hyspark.utils.tables import markdown_table

MISSED = "missed"
"""Metric: 1 where the truth holds an organ of which no voxel is predicted, else 0."""
READING = """\
Dice is the mean over organs (background excluded) of the mean over the cases that hold the organ, then the mean over
seeds; in parentheses its range over seeds. A difference is over pairs: the same seed ({same}) and the same scored
case on both sides. In brackets is its 95 % bootstrap interval, seeds and cases resampled with pairs kept; bold where
it excludes 0. With few seeds it is too narrow where seeds differ more than cases do (three seeds: it may hold the
true value in three of four repeats only), and with one seed it holds for that seed alone. Intervals of organs are not
corrected for their number. HD95 has no value where no voxel of an organ was predicted, so it flatters weights that
miss organs: read it with the fraction of missed organs."""


def reading_text(same: str) -> str:
    """Write how to read the tables.

    Args:
        same: What the runs of a seed share.
    """
    return fill(READING.format(same=same), 120)


class SegmentationRuns(RunKind):
    """Runs of `hyspark finetune`."""

    verb = "finetune"
    samples = "cases"
    metrics = (*ORGAN_METRICS, MISSED)
    shown = {"dice": "Dice"}  # noqa: RUF012
    scored_weights = dict.fromkeys(
        ("test", "validation"), "Scored are the last weights of each run, which no scored case has chosen."
    )
    reading = reading_text("so the same labelled cases, batches and random initialisation")

    def scores_folder(self, config: SegmentationConfig) -> Path:
        return config.run_folder / ("scores_test" if config.test_dir else "scores")

    def samples_per_step(self, config: SegmentationConfig) -> int:
        return config.batch_size * config.crops_per_volume

    def num_training(self, config: SegmentationConfig) -> int:
        return len(find_labelled_cases(config)[0])

    def data_digest(self, config: SegmentationConfig) -> str:
        training, validation, _ = find_labelled_cases(replace(config, num_labelled=0, label_fraction=1.0))
        test = (
            find_labelled(Path(config.test_dir), "all", channels=config.image_channels).cases if config.test_dir else []
        )
        return text_digest(
            cases_digest([case for case in cases if files_exist(case)]) for cases in (training, validation, test)
        )

    def check_data(self, configs: Sequence[SegmentationConfig], initial_weights: Mapping[str, str]) -> None:
        """Check data and weights, and prepare the volumes, which runs side by side would all prepare."""
        check_decoder(configs[0])
        largest = {config.seed: config for config in sorted(configs, key=lambda config: config.num_labelled)}
        found = [(config, *find_labelled_cases(config)) for config in largest.values()]
        config, _, _, names = found[0]
        for name, weights in initial_weights.items():
            if weights != "none":
                network = initialise_segmentation(config, len(names))
                print(f"initial weights {name}: {weights}\n{load_volume_weights(network, weights, config)}")
        processes = Processes(torch.device("cpu"))
        for config, training, validation, _ in found:
            prepare_run_volumes(
                config, processes, Path(config.data), training, validation, partial(label_fault, names=names)
            )
        prepare_held_out(config, processes, names)

    def comparable(self, table: ScoreTable) -> ScoreTable:
        """Keep the scores of organs that the truth holds, and say which organs were missed.

        Cases without any organ and organs without any case are dropped. Organs are in the order in which cases hold
        them.
        """
        held = table.values["truth_voxels"] > 0
        values = {metric: np.where(held, table.values[metric], np.nan) for metric in ORGAN_METRICS}
        values[MISSED] = np.where(held, table.values["predicted_voxels"] == 0, np.nan)
        cases = [table.cases[i] for i in np.flatnonzero(held.any(1))]
        first = held.argmax(0)
        order = sorted(np.flatnonzero(held.any(0)), key=lambda organ: (first[organ], organ))
        return ScoreTable(table.cases, table.targets, values).take(cases, [table.targets[organ] for organ in order])

    def names(self, cases: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
        return {"cases": cases, "organs": targets}

    def mean(self, tables: Sequence[ScoreTable], metric: str, targets: Sequence[str]) -> dict[str, Any]:
        scores = stack_scores(tables, metric, len(targets))
        organs = weighted_mean(organ_means(scores).T, np.ones(len(tables)))
        return asdict(interval(scores)) | {"by_seed": seed_means(scores), "by_organ": by_name(targets, organs)}

    def difference(
        self, own: Sequence[ScoreTable], baseline: Sequence[ScoreTable], metric: str, targets: Sequence[str]
    ) -> dict[str, Any]:
        a, b = (stack_scores(side, metric, len(targets)) for side in (own, baseline))
        found: dict[str, Any] = asdict(paired_difference(a, b))
        if metric == "dice":
            organs = [paired_difference(a[:, :, [i]], b[:, :, [i]]) for i in range(len(targets))]
            found["by_organ"] = {organ: asdict(each) for organ, each in zip(targets, organs, strict=True)}
        return found

    def sections(self, numbers: Mapping[str, Any]) -> list[str]:
        parts = ["## Organs"]
        for count in numbers["num_labelled"]:
            parts += [f"Dice, %, with {count} labelled cases:", markdown_table(organ_rows(numbers, count))]
        return [*parts, "## Surfaces, and missed organs", markdown_table(surface_rows(numbers))]


def stack_scores(tables: Sequence[ScoreTable], metric: str, num_targets: int) -> np.ndarray:
    """Stack a metric of runs on the same cases, (runs, cases, organs); NaN where there is no score."""
    return np.stack([table.values[metric] for table in tables]) if tables else np.empty((0, 0, num_targets))


def organ_rows(numbers: Mapping[str, Any], count: int) -> list[list[str]]:
    """Format a row for each organ: the Dice of all initial weights, and their differences to the baseline."""
    names = list(numbers["starts"])
    cells = [cell_of(numbers, name, count) for name in names]
    rows = [["organ", *names, *(f"{name} minus {numbers['baseline']}, points" for name in names[1:])]]
    for organ in numbers["organs"]:
        row = [organ, *(number(100 * cell["dice"]["by_organ"][organ]) for cell in cells)]
        rows.append([*row, *(with_interval(cell["difference"]["dice"]["by_organ"][organ]) for cell in cells[1:])])
    return rows


def surface_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """Format a row for each cell: NSD and HD95 with their differences to the baseline, and missed organs."""
    minus = f"minus {numbers['baseline']}"
    heading = ["labelled cases", "initial weights", "NSD, %", f"{minus}, points", "HD95, mm", f"{minus}, mm"]
    rows = [[*heading, "missed, %"]]
    for cell in numbers["cells"]:
        row = [str(cell["num_labelled"]), cell["start"]]
        for metric, scale in (("nsd", 100), ("hd95_mm", 1)):
            difference = with_interval(cell["difference"][metric], scale) if "difference" in cell else ""
            row += [number(scale * cell[metric]["mean"]), difference]
        rows.append([*row, number(100 * cell[MISSED]["mean"])])
    return rows
