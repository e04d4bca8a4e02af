"""Fine-tuning for the classification of images: data and network of a run, and its task of the loop.

Source of the recipe that the settings default to: Wolf et al., Scientific Reports 13, 20260 (2023).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
from hyspark.evaluation.classification.evaluate import HEADINGS, SCORE_FOLDERS, score_best, scored_subsets
from hyspark.evaluation.classification.inference import (
    class_probabilities,
    classifier_from_config,
    scaling_from_config,
)
from hyspark.evaluation.classification.metrics import classification_scores
from hyspark.evaluation.classification.scores import metrics_text
from hyspark.models.classifier import layer_indices, set_backbone_trainable
from hyspark.models.weights.load import LoadReport, load_pretrained
from hyspark.reports import run_page
from hyspark.tasks.launch import Experiment, launch
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import initialise
from hyspark.training.labelled_images import LabelledImages, read_images
from hyspark.training.loop import Task
from hyspark.training.metrics_log import RunLog
from hyspark.training.run import Run, make_run
from hyspark.training.run_folder import steps_per_epoch
from hyspark.training.run_volumes import format_excluded
from hyspark.utils.log import LOG


def run_classification(config: ClassificationConfig) -> Path:
    """Fine-tune a classifier as the settings say, or continue; see `launch`."""
    return launch(config, ClassificationExperiment)


class ClassificationExperiment(Experiment["ClassificationTask"]):
    """Fine-tuning for the classification of images."""

    def __init__(self, config: ClassificationConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.shard = Shard(config.batch_size, processes.rank, processes.world_size)
        num_own = len(self.shard.slots)
        if (config.mixup or config.cutmix) and num_own % 2:
            raise ValueError(f"mixup and cutmix mix pairs, but each process has {num_own} images of a batch")
        self.images = read_images(config)
        self.data = self.images.describe()
        self.model = initialise_classifier(config, len(self.images.classes))

    def describe(self) -> dict[str, str]:
        """Describe images, classes, network and steps."""
        c, parts = self.config, self.images.parts
        sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        megabytes = sum(image.numel() for part in parts.values() for image in part.images) / 1e6
        return {
            "data": f"{sizes} images from {c.data}, {megabytes:.0f} MB in memory",
            "classes": ", ".join(self.images.classes),
            "model": f"{c.model}, {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters",
            "steps": f"{c.epochs} epochs of {steps_per_epoch(c, len(parts['train']))}, {c.batch_size} images each",
        }

    def load_weights(self) -> LoadReport | None:
        """Load pre-trained weights."""
        return None if self.config.weights == "none" else load_pretrained(self.model, self.config.weights)

    def set_up(self, state: dict[str, Any] | None) -> tuple[Run, "ClassificationTask"]:
        """Make run and task, with the moving average of the weights if the settings ask for one."""
        config = self.config
        run = make_run(
            config,
            self.data,
            self.processes,
            self.model,
            steps_per_epoch(config, len(self.images.parts["train"])),
            state,
            excluded=self.images.excluded,
            val_every=config.val_every,
            make_optimizer=partial(make_optimizer, config),
            freezes=config.freeze_epochs > 0,
        )
        average = None
        if config.ema_decay:
            average = ModelEmaV3(run.network, decay=config.ema_decay, use_warmup=True)
            if state:
                average.module.load_state_dict(state["average"])
        best, best_after = (state["best"], state["best_after"]) if state else (-1.0, 0)
        task = ClassificationTask(config, self.shard, self.images, best, best_after, average)
        if average:
            run.optimizer.register_step_post_hook(lambda *_: average.update(run.network, task.step + 1))
        return run, task

    def finish(self, run: Run, task: "ClassificationTask", has_trained: bool) -> None:
        """Score the best weights, unless that is done; write the report."""
        score_best(self.config, self.images, self.processes)
        if self.processes.is_main:
            folder = self.config.run_folder
            LOG.info("report   %s", task.write_report(run))
            LOG.info(
                "scores   %s",
                ", ".join(str(folder / SCORE_FOLDERS[part]) for part in scored_subsets(self.images.parts)),
            )


def initialise_classifier(config: ClassificationConfig, num_classes: int) -> nn.Module:
    """Build the network with random weights from the seed."""
    return initialise(partial(classifier_from_config, config, num_classes), config.seed)


def make_optimizer(config: ClassificationConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make AdamW, or Adam with weight decay in the gradient of all weights; groups are by layer."""
    network = distributed.unwrap(model)
    ratio = optim.finetuning_encoder_lr_ratio(config)
    groups = optim.parameter_groups(network, config.layer_decay, ratio, layer_indices(network))
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.Adam([group | {"decays": True} for group in groups], fused=True)


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
        images = self.images.parts["val"]
        probabilities = class_probabilities(network, images, self.config, run.processes)
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
