"""Fine-tuning for segmentation: finding labelled data, building the network, and what a step, a review and a
checkpoint are.

Source of the recipe: UNETR's BTCV example (Project-MONAI/research-contributions), the usual stand-in for the paper's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hyspark.config.recipes import as_plain, write_yaml
from hyspark.config.segmentation import SegmentationConfig, check_decoder
from hyspark.data.batches.augmentation import AffineRange
from hyspark.data.batches.loader import Batch, Shard
from hyspark.data.batches.volumes import FinetuneBatches
from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.readers.nifti import read_label
from hyspark.data.seeds import seed_at
from hyspark.evaluation.segmentation.evaluate import (
    Segmented,
    Source,
    are_cases_scored,
    case_panel,
    score_cases,
    segment_case,
)
from hyspark.evaluation.segmentation.inference import hybird_from_config, windows_from_config
from hyspark.evaluation.segmentation.metrics import dice
from hyspark.evaluation.segmentation.scores import mean_dice, mean_of
from hyspark.evaluation.segmentation.test_cases import prepare_held_out, score_held_out
from hyspark.evaluation.validations import read_validations
from hyspark.figures.panels import save_figure
from hyspark.models.compile import compile_blocks
from hyspark.models.segmentation import Hybird
from hyspark.reports import run_page
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import load_start
from hyspark.training.labelled_cases import find_cases, label_fault, left_right_pairs, one_sided
from hyspark.training.loop import Run, start_run, train
from hyspark.training.losses import DiceAndCrossEntropy
from hyspark.training.metrics_log import RunLog
from hyspark.training.precision import with_precision
from hyspark.training.replay import repeat, stopped_run
from hyspark.training.run_folder import begun, last_file, saved_state, settings_text, steps_per_epoch
from hyspark.training.run_volumes import data_text, left_out_text, usable
from hyspark.utils.digests import content_digest
from hyspark.utils.log import LOG

SCORES = {"Validation cases, last weights": "scores", "Further cases, last weights": "scores_test"}
"""Folders of scores in a run, by what the report calls them."""


def finetune(config: SegmentationConfig) -> Path:
    """Fine-tune as the settings say, or continue; returns the run folder.

    Raises ValueError or FileNotFoundError for settings, weights and data that do not fit, OSError for a full disk,
    FloatingPointError where the loss is not finite, AskedToStop (a SystemExit) after SIGTERM or SIGUSR1.
    """
    processes = distributed.find_processes("cpu" if config.replay else config.device)
    stopped = None
    if config.replay:
        config, stopped = stopped_run(config, processes)
    config = with_precision(config, processes)
    share = Shard(config.batch_size, processes.rank, processes.world_size)
    training, validation, names = find_cases(config)
    data = data_text(training, validation)
    swaps = left_right_pairs(config, names)
    model = build(config, len(names))
    LOG.info("%s", describe(config, processes, model, len(training), len(validation), names))
    if config.flip_prob[0] and (unpaired := one_sided(names, swaps)):
        LOG.warning(
            "crops are flipped left to right, and these classes say left or right: %s; name the pairs in left_right, "
            "or set the first of flip_prob to 0",
            ", ".join(unpaired),
        )
    if config.dry_run:
        start(config, model)
        return config.run_folder
    with begun(config, processes, model, last_file(config)) as asked:
        state = stopped or start(config, model)
        where = (config, processes, Path(config.data), training, validation, state)
        found = usable(*where, fault=partial(label_fault, names=names))
        held_out = prepare_held_out(config, processes, names)
        criterion = DiceAndCrossEntropy(len(names), config.background_weight).to(processes.device)
        best = state["best"] if state else -1.0
        data_of = (found.training, found.validation, found.validation_cases)
        trained_on = [content_digest(case.image) for case in found.training_cases]
        task = Finetuning(config, share, *data_of, names, criterion, best, trained_on)
        steps = steps_per_epoch(config, len(found.training))
        encoder_share = optim.encoder_share(config)
        run = start_run(
            config,
            data,
            processes,
            model,
            steps,
            config.epochs,
            state,
            left_out=found.left_out,
            make_optimizer=partial(optim.adamw, layer_decay=config.layer_decay, encoder_share=encoder_share),
            freezes=config.freeze_epochs > 0,
        )
        if stopped:
            LOG.info("%s", repeat(run, task, stopped["stopped_by"]))
            return config.run_folder
        if run.first_step < run.last_step or not run.is_reviewed:
            train(run, task, asked)
        else:
            LOG.info("nothing to train: %s has done %d steps", config.run_folder, run.first_step)
            if processes.is_main and run.first_step <= run.last_step:  # no fewer steps than it has done
                write_yaml(config, config.run_folder / "config.yaml")
        run.model.eval()
        if not are_cases_scored(config.run_folder / "scores", config, names, task.cases, processes, task.source(run)):
            task.score(run)
        score_held_out(run.network, config, names, held_out, processes, last_weights(config, run), trained_on)
    if processes.is_main:
        if dice_of := best_and_last(config.run_folder):
            LOG.info("%s", run_page.dice_table(dice_of))
        LOG.info("report   %s", task.write_report(run))
        LOG.info("scores   %s", config.run_folder / "scores")
    return config.run_folder


def start(config: SegmentationConfig, model: Hybird) -> dict[str, Any] | None:
    """The state that a run continues from; where there is none, the pre-trained weights are loaded."""
    state = saved_state(config, last_file(config))
    if not state:
        check_decoder(config)
    if not state and config.weights != "none":
        LOG.info("weights of %s\n%s", config.weights, load_start(model, config.weights, config))
    return state


def best_and_last(run_folder: Path) -> dict[str, dict[str, float]]:
    """Read the Dice per organ of the best and of the last validation; empty if no label held an organ."""
    found = read_validations(run_folder)
    return {"best": found.best, "last": found.last} if found else {}


def last_weights(config: SegmentationConfig, run: Run) -> str:
    """What a protocol calls the weights that a run ends with."""
    return f"{last_file(config).name} after {max(run.first_step, run.last_step)} steps"


def describe(
    config: SegmentationConfig,
    processes: Processes,
    model: Hybird,
    num_training: int,
    num_validation: int,
    names: Sequence[str],
) -> str:
    """The run in a few lines, for the terminal."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    steps = steps_per_epoch(config, num_training)
    return settings_text(
        config,
        processes,
        data=f"{num_training} training and {num_validation} validation cases from {config.data}",
        classes=", ".join(names),
        model=f"hybird, {millions:.1f} M parameters, crops of {' x '.join(map(str, config.crop_shape))}",
        steps=f"{config.epochs} epochs of {steps}, {config.batch_size * config.crops_per_volume} crops each",
    )


def build(config: SegmentationConfig, num_classes: int) -> Hybird:
    """The network with its seeded fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(config.seed, "weights"))
        network = hybird_from_config(config, num_classes)
    if config.compile == "blocks" and not config.replay:
        compile_blocks(network)
    return network


def split_crops(batch: Batch, num: int) -> list[Batch]:
    """A batch in `num` parts of equally many crops; raises ValueError where it does not divide."""
    crops = len(batch["cases"])
    if crops % num:
        raise ValueError(
            f"accumulate={num} does not divide the {crops} crops of a step in each process into equal parts"
        )
    size = crops // num
    return [{name: values[i : i + size] for name, values in batch.items()} for i in range(0, crops, size)]


@dataclass
class Finetuning:
    """The task for the loop. cases: the validation cases, with their labels' files. best: best mean Dice so far.
    trained_on: of `Source`.
    """

    config: SegmentationConfig
    share: Shard
    training: Sequence[StoredVolume]
    validation: Sequence[StoredVolume]
    cases: Sequence[Case]
    names: Sequence[str]
    criterion: DiceAndCrossEntropy
    best: float
    trained_on: Sequence[str]

    @property
    def batches(self) -> FinetuneBatches:
        """Augmented crops with their labels."""
        c = self.config
        drawing = (c.flip_prob, c.rot90_prob, c.intensity_prob, c.labelled_prob)
        swaps = left_right_pairs(c, self.names)
        affine = AffineRange(c.affine_prob, c.affine_degrees, c.affine_scale)
        where = (self.training, self.share, c.crop_shape, c.crops_per_volume)
        return FinetuneBatches(*where, *drawing, c.seed, swaps, affine)

    def begin(self, run: Run, step: int) -> None:
        """Leave the encoder out of the first epochs, where the settings say so."""
        learns = step >= self.config.freeze_epochs * run.steps_per_epoch
        run.network.set_encoder_trainable(learns)

    def parts(self, run: Run, batch: Batch) -> list[Batch]:
        """Equal numbers of crops, each part with the weight of a part's voxels, as a mean over all processes."""
        parts = split_crops(batch, self.config.accumulate)
        own = self.criterion.weight_of(batch["label"]) / len(parts)
        weight_sum = distributed.mean_over(own.to(run.processes.device), run.processes)
        return [part | {"weight_sum": weight_sum} for part in parts]

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Dice and cross entropy, in fp32."""
        images, labels = (batch[k].to(run.processes.device, non_blocking=True) for k in ("image", "label"))
        loss: Tensor = self.criterion(run.model(images).float(), labels, batch["weight_sum"])
        return loss

    def rates(self, run: Run, step: int) -> dict[str, float]:
        """Linear warm-up, then a cosine or constant."""
        return optim.finetuning_rates(self.config, step, run.steps_per_epoch, run.total_steps)

    def is_due(self, run: Run, done: int) -> bool:
        """At the end of every val_every-th epoch."""
        return done % (run.steps_per_epoch * self.config.val_every) == 0

    def review(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Validate, at the end of the run with all scores; keep the weights where they are the best so far; write the
        Dice, a picture and the page.
        """
        is_last = step + 1 == run.last_step
        by_case, first = self.score(run) if is_last else self.validate(run)
        organs = mean_dice(list(by_case.values()), self.names[1:])
        mean = mean_of(list(organs.values()))
        held = {name: value for name, value in organs.items() if not math.isnan(value)}
        is_best = not mean <= self.best  # without any organ none is better, and the newest are kept
        self.best = max(self.best, mean)
        if log is None:
            return
        if held:
            log.write(step, epoch, dice_mean=mean, dice=held)
            told = " (best)" if is_best else ""
            LOG.info("epoch %d: mean Dice %.4f on %d cases%s", epoch, mean, len(by_case), told)
        else:
            LOG.warning(
                "epoch %d: no Dice, since no label of the %d validation cases has an organ", epoch, len(by_case)
            )
        if is_best:
            weights = {
                "model": run.network.state_dict(),
                "config": as_plain(self.config),
                "classes": list(self.names),
                "trained_on": list(self.trained_on),
            }
            checkpoint.save(weights, self.config.run_folder / "best.pth")
        if first is not None:
            self.draw_picture(log, step, epoch, first)
        self.write_report(run)

    def score(self, run: Run) -> tuple[dict[str, list[float]], None]:
        """All scores of the validation cases, written to the folder `scores`; returns what `validate` does, but no
        label map.
        """
        c = self.config
        where = (c, self.names, self.validation, self.cases, c.run_folder / "scores", run.processes)
        _, table = score_cases(run.network, *where, self.source(run))
        return dict(zip(table.cases, table.values["dice"].tolist(), strict=True)), None

    def source(self, run: Run) -> Source:
        """What the scores of the validation cases are of."""
        return Source(last_weights(self.config, run), f"validation cases of {self.config.data}", self.trained_on)

    def segment(self, run: Run, index: int) -> Segmented:
        """Label maps of a validation case."""
        c = self.config
        windows = windows_from_config(c, self.names, c.infer_overlap)
        volume, case = self.validation[index], self.cases[index]
        return segment_case(run.network, volume, case, windows, run.processes, c.precision)

    def validate(self, run: Run) -> tuple[dict[str, list[float]], np.ndarray | None]:
        """Dice per class of each validation case, on the label's own grid; on the main process also the label map of
        the first on the prepared grid.
        """
        processes = run.processes
        mine = range(processes.rank, len(self.validation), processes.world_size)
        rows: list[tuple[int, list[float]]] = []
        first = None
        for i in tqdm(mine, desc="validate", unit="case", leave=False, disable=not processes.is_main):
            label = self.cases[i].label
            assert label is not None
            found = self.segment(run, i)
            first = found.prepared if i == 0 else first
            rows.append((i, dice(found.on_file, read_label(label, len(self.names)), len(self.names))))
        return {self.cases[i].name: values for i, values in sorted(distributed.gather(rows, processes))}, first

    def draw_picture(self, log: RunLog, step: int, epoch: int, prediction: np.ndarray) -> None:
        """The first validation case: image, truth, prediction, uint8 (h, w, d) on the prepared grid."""
        volume = self.validation[0]
        figure = case_panel(volume, prediction, self.names, self.config.spacing, f"{volume.name}, epoch {epoch}")
        save_figure(figure, self.config.run_folder / "pictures" / f"epoch_{epoch:04d}_{volume.name}.png")
        log.board.add_figure(f"segmentation/{volume.name}", figure, step, close=False)

    @property
    def state_file(self) -> Path:
        """Last, beside best.pth."""
        return last_file(self.config)

    def notes(self) -> dict[str, float]:
        """The best Dice."""
        return {"best": self.best}

    def export(self, run: Run) -> None:
        """The best weights are kept by the review, and no others."""

    def write_report(self, run: Run) -> Path:
        """The run's HTML page."""
        c = self.config
        return run_page.write_report(
            c.run_folder,
            title=f"HySparK fine-tuning: {c.run_folder.name}",
            config=as_plain(c),
            environment=run_page.environment(),
            summary={
                "start": "from scratch" if c.weights == "none" else f"weights of {c.weights}",
                "training cases": str(len(self.training)),
                "validation cases": str(len(self.validation)),
                "left out": left_out_text(run.left_out),
                "scored on": "the label's own grid, mean over cases that hold the organ, background excluded",
                "device": run.processes.text(c.precision),
            },
            dice=best_and_last(c.run_folder),
            scores={
                heading: c.run_folder / name
                for heading, name in SCORES.items()
                if (c.run_folder / name / "summary.json").is_file()
            },
        )
