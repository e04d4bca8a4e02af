"""Steps, validation and report of fine-tuning for the classification of images."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from hyspark.config.classification import ClassificationConfig
from hyspark.config.recipes import as_plain
from hyspark.data.batches.images import Augmentation, ImageBatches
from hyspark.data.batches.loader import Batch, Shard
from hyspark.data.seeds import seed_at
from hyspark.evaluation.classification.evaluate import HEADINGS, SCORE_FOLDERS, scored_subsets
from hyspark.evaluation.classification.inference import (
    class_probabilities,
    scaling_from_config,
)
from hyspark.evaluation.classification.metrics import classification_scores
from hyspark.evaluation.classification.scores import metrics_text
from hyspark.evaluation.each_case import warn_of_failures
from hyspark.models.classifier import set_backbone_trainable
from hyspark.reports import run_page
from hyspark.training import checkpoint, optim
from hyspark.training.labelled_images import LabelledImages
from hyspark.training.loop import Task
from hyspark.training.metrics_log import RunLog
from hyspark.training.run import Run
from hyspark.training.run_volumes import format_excluded
from hyspark.utils.log import LOG


@contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of torch and numpy, for dropout and mixing in the block, and restore them after it."""
    before = np.random.get_state()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)


@dataclass
class ClassificationTask(Task):
    """Fine-tuning for the classification of images.

    Attributes:
        shard: This process's shard of a batch.
        images: Images by part.
        best: Best validation accuracy so far.
        best_after: Steps done then.
        average: Moving average of the weights, if any.
        step: Current step.
    """

    config: ClassificationConfig
    shard: Shard
    images: LabelledImages
    best: float
    best_after: int
    average: ModelEmaV3 | None
    step: int = field(default=0, init=False)

    @property
    def batches(self) -> ImageBatches:
        """Augmented images with their labels."""
        c = self.config
        augmentation = Augmentation(c.crop_scale, c.flip_prob, c.rotate_degrees, c.jitter)
        training = self.images.parts["train"]
        return ImageBatches(training, self.shard, c.crop_size, augmentation, scaling_from_config(c), c.seed)

    def before_step(self, run: Run, step: int) -> None:
        """Freeze the backbone in the first epochs, if the settings say so."""
        self.step = step
        if self.config.freeze_epochs:
            set_backbone_trainable(run.network, step >= self.config.freeze_epochs * run.steps_per_epoch)
            run.follow_trainable()

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Return the cross entropy, in fp32; dropout and mixing depend on seed, step and process alone."""
        c = self.config
        images, labels = (batch[k].to(run.processes.device, non_blocking=True) for k in ("image", "label"))
        smoothing = c.label_smoothing
        with seeded_generators(seed_at(c.seed, "step", self.step, run.processes.rank), run.processes.device):
            if c.mixup or c.cutmix:
                classes = len(self.images.classes)
                mix = Mixup(c.mixup, c.cutmix, label_smoothing=smoothing, num_classes=classes)
                images, labels = mix(images, labels)
                smoothing = 0.0  # it is in the mixed labels
            return nn.functional.cross_entropy(run.model(images).float(), labels, label_smoothing=smoothing)

    def schedule(self, run: Run, step: int) -> dict[str, float]:
        """Return learning rate and weight decay of a step."""
        return optim.finetuning_schedule(self.config, step, run.steps_per_epoch, run.total_steps)

    def validate(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Score the validation images; save the weights if their accuracy is the best so far, of equals the earlier."""
        network = self.average.module if self.average else run.network
        every = self.images.parts["val"]
        images, probabilities, failures = class_probabilities(network, every, self.config, run.processes)
        if run.processes.is_main:
            warn_of_failures(failures, len(every), "scored")
        if not len(images):
            return
        scores = classification_scores(np.array(images.labels), probabilities)
        is_best = scores["accuracy"] > self.best
        if is_best:
            self.best, self.best_after = scores["accuracy"], step + 1
        if log is None:
            return
        of_truth = probabilities[np.arange(len(images)), list(images.labels)]
        val_loss = float(-np.log(np.maximum(of_truth, np.finfo(float).tiny)).mean())
        log.write(step, epoch, val_loss=val_loss, **{k: v for k, v in scores.items() if not math.isnan(v)})
        LOG.info("epoch %d: %s%s", epoch, metrics_text(scores), " (best)" if is_best else "")
        if is_best:
            weights = {
                "model": network.state_dict(),
                "config": as_plain(self.config),
                "weights": f"best.pth{', moving average' if self.average else ''} after {step + 1} steps",
                "classes": list(self.images.classes),
            }
            checkpoint.save(weights, self.config.run_folder / "best.pth")

    def extra_state(self) -> dict[str, Any]:
        """Return the best accuracy, and the moving average of the weights."""
        average = {"average": self.average.module.state_dict()} if self.average else {}
        return {"best": self.best, "best_after": self.best_after} | average

    def write_report(self, run: Run) -> Path:
        """Write the run's HTML page."""
        c = self.config
        folders = {HEADINGS[part]: c.run_folder / SCORE_FOLDERS[part] for part in scored_subsets(self.images.parts)}
        numbers = {f"{name} images": str(len(part)) for name, part in self.images.parts.items()}
        return run_page.write_report(
            c.run_folder,
            title=f"Classification of images: {c.run_folder.name}",
            config=as_plain(c),
            environment=run_page.environment(),
            summary={
                "initial weights": "random" if c.weights == "none" else c.weights,
                "network": c.model,
                **numbers,
                "excluded": format_excluded(run.excluded),
                "best validation accuracy": f"{self.best:.3f} after {self.best_after} steps",
                "device": run.processes.describe(c.precision),
            },
            scores=folders,
        )
