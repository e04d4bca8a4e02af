"""What a step, a review and a checkpoint of masked pre-training are; what other pre-training shares of it.

Source of the recipe: Tang et al., "HySparK", MICCAI 2024, and its public release.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import as_plain
from hyspark.data.batches.crops import SliceSampling
from hyspark.data.batches.loader import Batch, Shard, make_loader
from hyspark.data.batches.volumes import PretrainBatches, ValidationCrops
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.evaluation.linear_probe import Probe, take_probe
from hyspark.figures.panels import reconstruction_panel, save_figure
from hyspark.models.masked_autoencoder import reconstruct
from hyspark.models.masking.mask import draw_visible, grid_of, visible_at
from hyspark.reports import run_page
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.loop import Run
from hyspark.training.metrics_log import RunLog
from hyspark.training.precision import autocast
from hyspark.training.run_volumes import left_out_text
from hyspark.utils.log import LOG

START_FACTOR, END_FACTOR = 0.005, 0.001
"""Learning rate at the first and the last step, as shares of the peak."""
TITLES = {"val_loss": "validation loss", "projection_std": "spread of projections"}
"""What numbers of a validation are called in the log."""
NUM_PICTURES = 3
VALIDATION_SEED = 0
"""Crops and masks of held-out volumes do not depend on the seed of a run, so that runs can be compared."""


def file_name(config: PretrainConfig) -> str:
    """The model's name as the beginning of a file's: spark/timm/resnet50 -> spark_timm_resnet50."""
    return re.sub(r"\W+", "_", config.model)


def encoder_file(config: PretrainConfig) -> Path:
    """Encoder weights alone, in the released format."""
    return config.run_folder / f"{file_name(config)}_1kpretrained_timm_style.pth"


def best_file(config: PretrainConfig) -> Path:
    """Encoder weights of the lowest validation loss, in the released format."""
    return config.run_folder / f"{file_name(config)}_best_timm_style.pth"


def training_file(config: PretrainConfig) -> Path:
    """Everything: encoder, decoder, optimizer, step. The run continues from it."""
    return config.run_folder / f"{file_name(config)}_withdecoder_1kpretrained_hyspark_style.pth"


def num_parameters(model: torch.nn.Module) -> str:
    """Trained numbers of a model, in millions."""
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f} M"


def planes_of(config: PretrainConfig) -> SliceSampling | None:
    """The planes that the settings ask for."""
    if config.slices == "none":
        return None
    axis = ("sagittal", "coronal", "axial").index(config.slices)
    return SliceSampling(axis, config.slice_stride, config.slice_scaling == "minmax")


@dataclass
class Pretraining:
    """The task for the loop. probe: None where there is none, and on other processes than the main one. best: lowest
    validation loss so far.
    """

    config: PretrainConfig
    share: Shard
    training: Sequence[StoredVolume]
    validation: Sequence[StoredVolume]
    probe: Probe | None = None
    best: float = math.inf

    @property
    def batches(self) -> Dataset[Batch]:
        """Crops with the seeds of their masks."""
        c = self.config
        how = (c.crop_shape, c.crops_per_volume, c.flip_prob, c.seed, planes_of(c))
        return PretrainBatches(self.training, self.share, *how)

    def begin(self, run: Run, step: int) -> None:
        """Nothing changes between steps but the rates."""

    def parts(self, run: Run, batch: Batch) -> list[Batch]:
        """The batch in one pass."""
        return [batch]

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Of the network's own; of masked pre-training the error on the hidden patches."""
        loss: Tensor = run.model(*self.inputs(run, batch)).loss
        return loss

    def inputs(self, run: Run, batch: Batch) -> tuple[Any, ...]:
        """Volumes (b, channels, *size) on the device, and visible (b, 1, *grid) on the CPU: what follows from the mask
        is worked out there, so that CUDA need not be waited for.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in batch["mask_seeds"]]
        grid = grid_of(self.config.crop_shape, run.network.encoder.patch)
        return self.on_device(run, batch["volumes"]), draw_visible(grid, self.config.mask_ratio, generators)

    def on_device(self, run: Run, images: Tensor) -> Tensor:
        """(b, 1, *size) -> (b, channels, *size)."""
        images = images.to(run.processes.device, non_blocking=True)
        return images.expand(-1, self.config.in_channels, *(-1,) * (images.ndim - 2))

    def random_batch(self, crops: int) -> Batch:
        """A batch of so many crops of noise."""
        volumes = torch.rand(crops, 1, *self.config.crop_shape)
        return {"volumes": volumes, "mask_seeds": range(crops), "cases": ["noise"] * crops}

    def rates(self, run: Run, step: int) -> dict[str, float]:
        """Warm-up and cosine of the learning rate, cosine of the weight decay."""
        config, total = self.config, run.total_steps
        warmup = min(config.warmup_epochs * run.steps_per_epoch, total - 1)
        factors = {"start_factor": START_FACTOR, "end_factor": END_FACTOR}
        lr = optim.learning_rate(step, peak=config.lr, warmup=warmup, total=total, **factors)
        return {
            "lr": lr,
            "wd": optim.weight_decay(step, start=config.weight_decay, end=config.weight_decay_end, total=total),
        }

    def is_due(self, run: Run, done: int) -> bool:
        """At the end of every epoch."""
        return done % run.steps_per_epoch == 0

    def review(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Validation loss; the probe, and pictures with the report, where they are due."""
        found = self.validate(run)
        if log is None:
            return
        if found:
            log.write(step, epoch, **found)
            is_best = found["val_loss"] < self.best
            text = ", ".join(f"{TITLES[name]} {value:.4f}" for name, value in found.items())
            LOG.info("epoch %d: %s after %d steps%s", epoch, text, step + 1, " (best)" if is_best else "")
            if is_best:
                self.best = found["val_loss"]
                checkpoint.save(run.network.encoder.weights(), best_file(self.config))
        is_last = step + 1 == run.last_step
        if self.probe and (epoch % self.config.probe_every == 0 or is_last):
            take_probe(run.network.encoder, self.probe, log, step, epoch)
        every = self.config.picture_every
        if (every and epoch % every == 0) or is_last:
            self.draw_pictures(run, log, step, epoch)
            self.write_report(run)

    def validate(self, run: Run) -> dict[str, float]:
        """`val_loss` on fixed crops of the held-out volumes, and what else tells how it goes; nothing where there are
        none.
        """
        if not self.validation:
            return {}
        processes = run.processes
        crops = self.fixed(self.validation)
        mine = range(processes.rank, len(crops), processes.world_size)
        outputs = []
        for batch in make_loader(crops, mine, num_workers=0, pin_memory=False):
            with autocast(processes, self.config.precision):
                outputs.append(self.kept(run.network(*self.inputs(run, batch))))
        return self.summary(distributed.gather(outputs, processes))

    def kept(self, output: Any) -> Any:
        """What the summary needs of the network's output for one batch."""
        return output.loss.item()

    def summary(self, kept: Sequence[Any]) -> dict[str, float]:
        """Numbers of a validation, named as in TITLES, from what was kept of all batches."""
        return {"val_loss": math.fsum(kept) / len(kept)}

    def probe_fresh(self, run: Run, log: RunLog | None) -> None:
        """The probe of the weights that the first step finds: what later ones are to be compared with."""
        if self.probe and log and run.first_step == 0:
            take_probe(run.network.encoder, self.probe, log, step=-1, epoch=0)

    def fixed(self, volumes: Sequence[StoredVolume]) -> Any:
        """The same crops and masks in every epoch."""
        c = self.config
        return ValidationCrops(volumes, c.crop_shape, c.crops_per_volume, VALIDATION_SEED, planes_of(c))

    def draw_pictures(self, run: Run, log: RunLog, step: int, epoch: int) -> None:
        """Reconstructions of the first held-out volumes (of training volumes where none are held out): PNG and
        TensorBoard.
        """
        shown = self.validation or self.training
        crops = self.fixed(shown)
        for index in range(min(NUM_PICTURES, len(shown))):
            name = shown[index].name
            volumes, visible = (x[:1] for x in self.inputs(run, crops[index]))
            with autocast(run.processes, self.config.precision):
                output = run.network(volumes, visible)
            seen = visible_at(visible, volumes.shape[2:])
            image, mask, result = (x[0, 0].cpu().numpy() for x in (volumes, seen, reconstruct(volumes, output)))
            title = f"{name}, epoch {epoch}"
            shown_planes: dict[str, Any] = {}
            if planes := planes_of(self.config):
                image, mask, result = (np.expand_dims(x, planes.axis) for x in (image, mask, result))
                shown_planes["slices"] = [self.config.slices]
            figure = reconstruction_panel(
                image, mask, result.clip(0, 1), title=title, spacing=self.config.spacing, **shown_planes
            )
            save_figure(figure, self.config.run_folder / "pictures" / f"epoch_{epoch:04d}_{name}.png")
            log.board.add_figure(f"reconstruction/{name}", figure, step, close=False)

    @property
    def state_file(self) -> Path:
        """Of the release."""
        return training_file(self.config)

    def notes(self) -> dict[str, float]:
        """The lowest validation loss."""
        return {"best": self.best}

    def export(self, run: Run) -> None:
        """The encoder's file of the release."""
        checkpoint.save(run.network.encoder.weights(), encoder_file(self.config))

    def write_report(self, run: Run) -> Path:
        """The run's HTML page."""
        return run_page.write_report(
            self.config.run_folder,
            title=f"HySparK pre-training: {self.config.exp_name}",
            config=as_plain(self.config),
            environment=run_page.environment(),
            summary={
                "training volumes": str(len(self.training)),
                "validation volumes": str(len(self.validation)),
                "left out": left_out_text(run.left_out),
                "parameters": num_parameters(run.network),
                "device": run.processes.text(self.config.precision),
            },
        )
