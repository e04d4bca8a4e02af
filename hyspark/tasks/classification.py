"""Fine-tuning for the classification of images outside of its steps: images, the network, and the end of a run.

Source of the recipe that the settings default to: Wolf et al., Scientific Reports 13, 20260 (2023).
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from hyspark.config.classification import ClassificationConfig
from hyspark.data.batches.loader import Shard
from hyspark.evaluation.classification.evaluate import SCORE_FOLDERS, score_best, scored_subsets
from hyspark.evaluation.classification.inference import (
    classifier_from_config,
)
from hyspark.models.classifier import layer_indices
from hyspark.models.network_faults import UnsupportedNetworkError, check_runs
from hyspark.models.weights.load import LoadReport, load_pretrained
from hyspark.tasks.classification_task import ClassificationTask
from hyspark.tasks.launch import Experiment, launch
from hyspark.training import distributed, optim
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import initialise
from hyspark.training.labelled_images import read_images
from hyspark.training.run import Run, make_run
from hyspark.training.run_folder import steps_per_epoch
from hyspark.utils.log import LOG


def run_classification(config: ClassificationConfig) -> Path:
    """Fine-tune a classifier as the settings say, or continue; see `launch`."""
    return launch(config, ClassificationExperiment)


class ClassificationExperiment(Experiment[ClassificationTask]):
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
        c = self.config
        return None if c.weights == "none" else load_pretrained(self.model, c.weights, c.weights_key)

    def set_up(self, state: dict[str, Any] | None) -> tuple[Run, ClassificationTask]:
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

    def finish(self, run: Run, task: ClassificationTask, has_trained: bool) -> None:
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
    """Build the network with random weights from the seed.

    Raises:
        UnsupportedNetworkError: The network does not run on images of this size.
    """
    network = initialise(partial(classifier_from_config, config, num_classes), config.seed)
    try:
        check_runs(network, torch.zeros(1, config.in_channels, config.crop_size, config.crop_size))
    except UnsupportedNetworkError as error:
        raise UnsupportedNetworkError(f"{config.model}: {error}; set --crop_size to the size of its images") from error
    return network


def make_optimizer(
    config: ClassificationConfig, model: nn.Module, *, spare_tokens: bool = True
) -> torch.optim.Optimizer:
    """Make AdamW, or Adam with weight decay in the gradient of all weights; groups are by layer."""
    spare_tokens = spare_tokens and config.optimizer == "adamw"  # the groups of Adam are as they always were
    network = distributed.unwrap(model)
    ratio = optim.finetuning_encoder_lr_ratio(config)
    groups = optim.parameter_groups(
        network, config.layer_decay, ratio, layer_indices(network), spare_tokens=spare_tokens
    )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.Adam([group | {"decays": True} for group in groups], fused=True)
