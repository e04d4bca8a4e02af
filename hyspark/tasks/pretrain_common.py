"""What masked and contrastive pre-training share: schedule, validation, files, report.

Source of the recipe: Tang et al., "HySparK", MICCAI 2024, and its public release.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hyspark.config.nnunet import plan_state
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import as_plain, shown_settings
from hyspark.data.batches.crops import SliceSampling
from hyspark.data.batches.loader import Batch, make_loader
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.evaluation.linear_probe import Probe, take_probe
from hyspark.models.axis_order import inverse_order, permute_axes
from hyspark.models.weights.export import MADE_WITH
from hyspark.reports import run_page
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.loop import Task
from hyspark.training.metrics_log import RunLog
from hyspark.training.precision import autocast
from hyspark.training.run import Run
from hyspark.training.run_folder import best_encoder_file, encoder_file
from hyspark.training.run_volumes import format_excluded
from hyspark.utils.log import LOG

START_FACTOR, END_FACTOR = 0.005, 0.001
"""Learning rate at the first and the last step, as fractions of the peak."""
METRIC_TITLES = {"val_loss": "validation loss", "projection_std": "spread of projections"}
"""Titles of the numbers of a validation in the log."""
NUM_PICTURES = 3
VALIDATION_SEED = 0
"""Seed of crops, views and masks of held-out volumes. It is that of no run, so that runs can be compared."""


class PretrainingTask(Task, Protocol):
    """A task of the loop as the functions below need it.

    Attributes:
        training: Volumes to train on.
        validation: Held-out volumes.
        probe: Linear probe; None without one, and on other processes than the main one.
        best: Lowest validation loss so far.
    """

    config: PretrainConfig
    training: Sequence[StoredVolume]
    validation: Sequence[StoredVolume]
    probe: Probe | None
    best: float

    def random_batch(self, num_crops: int) -> Batch:
        """Make a batch of crops of noise."""

    def inputs(self, run: Run, batch: Batch) -> tuple[Any, ...]:
        """Return what the network takes, from a batch."""

    def validation_batches(self, volumes: Sequence[StoredVolume]) -> Dataset[Batch]:
        """Return batches of volumes that are the same in every epoch."""

    def validation_output(self, output: Any) -> Any:
        """Return what `validation_metrics` needs of the network's output for a batch."""

    def validation_metrics(self, outputs: Sequence[Any]) -> dict[str, float]:
        """Compute metrics, named as in METRIC_TITLES, from the outputs of all batches."""

    def draw_pictures(self, run: Run, log: RunLog, step: int, epoch: int) -> None:
        """Draw pictures of the first held-out volumes, or of training volumes if none are held out."""


def slice_sampling(config: PretrainConfig) -> SliceSampling | None:
    """Return which 2D slices of a volume are crops; None for crops in 3D."""
    if config.slices == "none":
        return None
    axis = ("sagittal", "coronal", "axial").index(config.slices)
    return SliceSampling(axis, config.slice_stride, config.slice_scaling == "minmax")


def format_num_parameters(model: torch.nn.Module) -> str:
    """Format the number of trained parameters in millions."""
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f} M"


def to_network_input(images: Tensor, config: PretrainConfig, device: torch.device) -> Tensor:
    """Move images to the device, in the channels and axes of the network.

    Args:
        images: (b, c, *size), axes x, y, z.
        config: Settings. With one channel, it is repeated.
        device: The device.

    Returns:
        (b, in_channels, *size), axes in `axis_order`.
    """
    images = images.to(device, non_blocking=True)
    images = images.expand(-1, config.in_channels, *(-1,) * (images.ndim - 2))
    return permute_axes(images, config.axis_order).contiguous() if config.axis_order else images


def to_volume(values: Tensor, config: PretrainConfig) -> Tensor:
    """Permute values (..., *size) from the axes of the network to x, y, z."""
    return permute_axes(values, inverse_order(config.axis_order))


def pretraining_schedule(config: PretrainConfig, run: Run, step: int) -> dict[str, float]:
    """Compute learning rate `lr` (warm-up, then a cosine) and weight decay `wd` (a cosine) of a step."""
    total = run.total_steps
    warmup = min(config.warmup_epochs * run.steps_per_epoch, total - 1)
    factors = {"start_factor": START_FACTOR, "end_factor": END_FACTOR}
    lr = optim.learning_rate(step, peak=config.lr, warmup=warmup, total=total, **factors)
    wd = optim.weight_decay(step, start=config.weight_decay, end=config.weight_decay_end, total=total)
    return {"lr": lr, "wd": wd}


def probe_initial_weights(task: PretrainingTask, run: Run, log: RunLog | None) -> None:
    """Probe the weights before the first step of a run, as the reference for later probes."""
    if task.probe and log and run.first_step == 0:
        take_probe(run.network.encoder, task.probe, log, step=-1, epoch=0)


def validate_pretraining(task: PretrainingTask, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
    """Log the validation loss and export the best encoder; probe and draw pictures with the report when due."""
    metrics = compute_validation_metrics(task, run)
    if log is None:
        return
    config = task.config
    if metrics:
        log.write(step, epoch, **metrics)
        is_best = metrics["val_loss"] < task.best
        text = ", ".join(f"{METRIC_TITLES[name]} {value:.4f}" for name, value in metrics.items())
        LOG.info("epoch %d: %s after %d steps%s", epoch, text, step + 1, " (best)" if is_best else "")
        if is_best:
            task.best = metrics["val_loss"]
            checkpoint.save(encoder_content(config, run), best_encoder_file(config))
    is_last = step + 1 == run.last_step
    if task.probe and (epoch % config.probe_every == 0 or is_last):
        take_probe(run.network.encoder, task.probe, log, step, epoch)
    if (config.picture_every and epoch % config.picture_every == 0) or is_last:
        task.draw_pictures(run, log, step, epoch)
        write_pretraining_report(task, run)


def compute_validation_metrics(task: PretrainingTask, run: Run) -> dict[str, float]:
    """Compute metrics on fixed batches of the held-out volumes; empty without such volumes."""
    if not task.validation:
        return {}
    processes = run.processes
    batches = task.validation_batches(task.validation)
    own = range(processes.rank, len(batches), processes.world_size)  # type: ignore[arg-type]
    outputs = []
    for batch in make_loader(batches, own, num_workers=0, pin_memory=False):
        with autocast(processes, task.config.precision):
            outputs.append(task.validation_output(run.network(*task.inputs(run, batch))))
    return task.validation_metrics(distributed.gather_lists(outputs, processes))


def encoder_content(config: PretrainConfig, run: Run) -> dict[str, Any]:
    """Return the content of a file of the encoder's weights: the weights, or with a plan of nnU-Net also this plan.

    nnU-Net compares shapes alone, so such a file says what it was made with.
    """
    weights: dict[str, Any] = run.network.encoder.weights()
    if not (plan := plan_state(config)):
        return weights
    settings = as_plain(config)
    return {
        "model": weights,
        "config": {n: settings[n] for n in MADE_WITH if n in settings} | {"method": config.method},
    } | plan


def export_encoder(config: PretrainConfig, run: Run) -> None:
    """Export the encoder's weights in the published format."""
    checkpoint.save(encoder_content(config, run), encoder_file(config))


def write_pretraining_report(task: PretrainingTask, run: Run) -> Path:
    """Write the run's HTML page."""
    config = task.config
    return run_page.write_report(
        config.run_folder,
        title=f"HySparK pre-training: {config.exp_name}",
        config=shown_settings(config),
        environment=run_page.environment(),
        summary={
            "training volumes": str(len(task.training)),
            "validation volumes": str(len(task.validation)),
            "excluded": format_excluded(run.excluded),
            "parameters": format_num_parameters(run.network),
            "device": run.processes.describe(config.precision),
        },
    )
