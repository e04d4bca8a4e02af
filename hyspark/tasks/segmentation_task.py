"""Fine-tuning for segmentation as a task of the loop: crops, loss, validation, report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from hyspark.config.recipes import as_plain, shown_settings
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.batches.augmentation import AffineRange
from hyspark.data.batches.loader import Batch, Shard
from hyspark.data.batches.volumes import FinetuneBatches
from hyspark.data.readers.nifti import read_label
from hyspark.evaluation.each_case import warn_of_failures, work_on_each
from hyspark.evaluation.protocol import unscored_cases
from hyspark.evaluation.segmentation.evaluate import (
    Source,
    case_panel,
    score_cases,
    segment_stored,
)
from hyspark.evaluation.segmentation.inference import windows_from_config
from hyspark.evaluation.segmentation.metrics import dice
from hyspark.evaluation.segmentation.scores import mean_dice, mean_of
from hyspark.evaluation.segmentation.segmenter import VolumeSegmenter
from hyspark.evaluation.validations import read_validations
from hyspark.figures.panels import save_figure
from hyspark.reports import run_page
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.labelled_cases import left_right_pairs
from hyspark.training.loop import Task
from hyspark.training.losses import DiceAndCrossEntropy
from hyspark.training.metrics_log import RunLog
from hyspark.training.run import Run
from hyspark.training.run_folder import checkpoint_file
from hyspark.training.run_volumes import RunVolumes, format_excluded
from hyspark.utils.log import LOG

SCORE_HEADINGS = {"Validation cases, last weights": "scores", "Further cases, last weights": "scores_test"}
"""Headings of the report with their folders of scores in a run."""


@dataclass
class SegmentationTask(Task):
    """Fine-tuning for segmentation.

    Attributes:
        shard: This process's shard of a batch.
        volumes: Training and validation volumes with their cases.
        names: Class names by label value.
        criterion: Loss.
        best: Best mean Dice so far.
        trained_on: Digests of the training images, see `Source`.
        has_scored: Whether all scores of the validation cases were written; a case that failed is not tried again.
    """

    config: SegmentationConfig
    shard: Shard
    volumes: RunVolumes
    names: Sequence[str]
    criterion: DiceAndCrossEntropy
    best: float
    trained_on: Sequence[str]
    has_scored: bool = field(default=False, init=False)

    @property
    def batches(self) -> FinetuneBatches:
        """Augmented crops with their labels."""
        c = self.config
        drawing = (c.flip_prob, c.rot90_prob, c.intensity_prob, c.labelled_prob)
        swaps = left_right_pairs(c, self.names)
        affine = AffineRange(c.affine_prob, c.affine_degrees, c.affine_scale)
        crops = (self.volumes.training, self.shard, c.crop_shape, c.crops_per_volume)
        return FinetuneBatches(*crops, *drawing, c.seed, swaps, affine)

    def before_step(self, run: Run, step: int) -> None:
        """Freeze the encoder in the first epochs, if the settings say so."""
        learns = step >= self.config.freeze_epochs * run.steps_per_epoch
        run.network.set_encoder_trainable(learns)
        run.follow_trainable()

    def micro_batches(self, run: Run, batch: Batch) -> list[Batch]:
        """Split a batch; each micro-batch gets the mean weight of a micro-batch's voxels over all processes."""
        micro_batches = split_crops(batch, self.config.accumulate)
        own = self.criterion.weight_sum(batch["label"]) / len(micro_batches)
        weight_sum = distributed.mean_over_processes(own.to(run.processes.device), run.processes)
        return [micro_batch | {"weight_sum": weight_sum} for micro_batch in micro_batches]

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Return Dice and cross entropy, in fp32."""
        images, labels = (batch[k].to(run.processes.device, non_blocking=True) for k in ("image", "label"))
        loss: Tensor = self.criterion(run.model(images).float(), labels, batch["weight_sum"])
        return loss

    def schedule(self, run: Run, step: int) -> dict[str, float]:
        """Return learning rate and weight decay of a step."""
        return optim.finetuning_schedule(self.config, step, run.steps_per_epoch, run.total_steps)

    def validate(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Compute the Dice of the validation cases, at the end of the run all scores; save the best weights."""
        picture = None
        if step + 1 == run.last_step:
            dice_by_case = self.write_validation_scores(run)
        else:
            dice_by_case, picture = self.validation_dice(run)
        organs = mean_dice(list(dice_by_case.values()), self.names[1:])
        mean = mean_of(list(organs.values()))
        is_best = bool(dice_by_case) and not mean <= self.best  # NaN, of labels without organ, keeps the newest weights
        self.best = max(self.best, mean)
        if log is None:
            return
        if held := {name: value for name, value in organs.items() if not math.isnan(value)}:
            log.write(step, epoch, dice_mean=mean, dice=held)
            suffix = " (best)" if is_best else ""
            LOG.info("epoch %d: mean Dice %.4f on %d cases%s", epoch, mean, len(dice_by_case), suffix)
        elif dice_by_case:
            LOG.warning(
                "epoch %d: no Dice, since no label of the %d validation cases has an organ", epoch, len(dice_by_case)
            )
        else:
            LOG.warning("epoch %d: no Dice, since no validation case was scored", epoch)
        if is_best:
            weights = {
                "model": run.network.state_dict(),
                "config": as_plain(self.config),
                "classes": list(self.names),
                "trained_on": list(self.trained_on),
            }
            checkpoint.save(weights, self.config.run_folder / "best.pth")
        if picture is not None:
            self.draw_picture(log, step, epoch, picture)
        self.write_report(run)

    def write_validation_scores(self, run: Run) -> dict[str, list[float]]:
        """Write all scores of the validation cases to the folder `scores`; return the Dice per class by case."""
        volumes = self.volumes
        cases = (self.names, volumes.validation, volumes.validation_cases)
        out = self.config.run_folder / "scores"
        _, table, failures = score_cases(run.network, self.config, *cases, out, run.processes, self.source(run))
        if run.processes.is_main:
            warn_of_failures(failures, len(volumes.validation_cases), "scored")
        self.has_scored = True
        return dict(zip(table.cases, table.values["dice"].tolist(), strict=True))

    def source(self, run: Run) -> Source:
        """Return weights and data of the scores of the validation cases."""
        weights = describe_last_weights(self.config, run)
        return Source(weights, f"validation cases of {self.config.data}", self.trained_on)

    def validation_dice(self, run: Run) -> tuple[dict[str, list[float]], np.ndarray | None]:
        """Segment the validation cases.

        Returns:
            Dice per class by case, on the label's own grid; and on the main process the label map of the first case on
            the prepared grid, uint8 (h, w, d).
        """
        c, processes, cases = self.config, run.processes, self.volumes.validation_cases
        windows = windows_from_config(c, self.names, c.infer_overlap)
        segmenter = VolumeSegmenter(run.network, len(self.names), windows, processes, c.precision, c.run_folder)
        pictures: list[np.ndarray] = []

        def score(index: int) -> list[float]:
            label = cases[index].label
            assert label is not None
            segmented = segment_stored(segmenter, self.volumes.validation[index], cases[index])
            if index == 0:
                pictures.append(segmented.prepared)
            truth = read_label(label, cases[index].image, len(self.names), cases[index].ignore)
            return dice(segmented.on_file, truth.voxels, len(self.names))

        names = [case.name for case in cases]
        done, failures = work_on_each(names, score, processes, "validate", keep_bar=False)
        if processes.is_main:
            warn_of_failures(failures, len(cases), "scored")
        return {names[i]: values for i, values in done.items()}, next(iter(pictures), None)

    def draw_picture(self, log: RunLog, step: int, epoch: int, prediction: np.ndarray) -> None:
        """Draw image, truth and prediction, uint8 (h, w, d) on the prepared grid, of the first validation case."""
        volume = self.volumes.validation[0]
        figure = case_panel(volume, prediction, self.names, self.config.spacing, f"{volume.name}, epoch {epoch}")
        save_figure(figure, self.config.run_folder / "pictures" / f"epoch_{epoch:04d}_{volume.name}.png")
        log.board.add_figure(f"segmentation/{volume.name}", figure, step, close=False)

    def extra_state(self) -> dict[str, float]:
        """Return the best Dice."""
        return {"best": self.best}

    def write_report(self, run: Run) -> Path:
        """Write the run's HTML page."""
        c = self.config
        return run_page.write_report(
            c.run_folder,
            title=f"HySparK fine-tuning: {c.run_folder.name}",
            config=shown_settings(c),
            environment=run_page.environment(),
            summary={
                "initial weights": "random" if c.weights == "none" else c.weights,
                "training cases": str(len(self.volumes.training)),
                "validation cases": str(len(self.volumes.validation)),
                "excluded": format_excluded(run.excluded),
                "scored on": "the label's own grid, mean over cases that hold the organ, background excluded",
                "device": run.processes.describe(c.precision),
                **{f"not scored ({name})": reason for name, reason in unscored_cases(c.run_folder).items()},
            },
            dice=best_and_last(c.run_folder),
            scores={
                heading: c.run_folder / name
                for heading, name in SCORE_HEADINGS.items()
                if (c.run_folder / name / "summary.json").is_file()
            },
        )


def split_crops(batch: Batch, num: int) -> list[Batch]:
    """Split a batch into micro-batches of equally many crops.

    Raises:
        ValueError: The number of crops is no multiple of theirs.
    """
    crops = len(batch["cases"])
    if crops % num:
        raise ValueError(
            f"accumulate={num} does not divide the {crops} crops of a step in each process into equal parts"
        )
    size = crops // num
    return [{name: values[i : i + size] for name, values in batch.items()} for i in range(0, crops, size)]


def describe_last_weights(config: SegmentationConfig, run: Run) -> str:
    """Describe the weights that a run ends with, for a protocol."""
    return f"{checkpoint_file(config).name} after {max(run.first_step, run.last_step)} steps"


def best_and_last(run_folder: Path) -> dict[str, dict[str, float]]:
    """Read the Dice per organ of the best and of the last validation; empty if no label held an organ."""
    found = read_validations(run_folder)
    return {"best": found.best, "last": found.last} if found else {}
