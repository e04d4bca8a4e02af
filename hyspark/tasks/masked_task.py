"""Masked pre-training as a task of the loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyspark.config.nnunet import plan_state
from hyspark.config.pretrain import PretrainConfig
from hyspark.data.batches.crops import crop_maps
from hyspark.data.batches.loader import Batch, Shard
from hyspark.data.batches.volumes import PretrainBatches, ValidationCrops
from hyspark.data.intensity import to_fractions
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.evaluation.linear_probe import Probe
from hyspark.figures.panels import reconstruction_panel, save_figure
from hyspark.models.defaults import grid_of
from hyspark.models.masked_autoencoder import reconstruct
from hyspark.models.masking.mask import draw_visible, visible_at
from hyspark.models.masking.reconstructed import draw_reconstructed
from hyspark.tasks import pretrain_common as common
from hyspark.training.loop import Task
from hyspark.training.metrics_log import RunLog
from hyspark.training.precision import autocast
from hyspark.training.run import Run


@dataclass
class MaskedTask(Task):
    """Pre-training by reconstructing hidden patches. Attributes are those of `pretrain_common.PretrainingTask`."""

    config: PretrainConfig
    shard: Shard
    training: Sequence[StoredVolume]
    validation: Sequence[StoredVolume]
    probe: Probe | None = None
    best: float = math.inf

    @property
    def batches(self) -> PretrainBatches:
        """Crops with the seeds of their masks."""
        c = self.config
        crops = (c.crop_shape, c.crops_per_volume, c.flip_prob, c.seed, common.slice_sampling(c))
        return PretrainBatches(self.training, self.shard, *crops)

    def random_batch(self, num_crops: int) -> Batch:
        """Make a batch of crops of noise."""
        volumes = torch.rand(num_crops, self.config.num_image_channels, *self.config.crop_shape)
        return {"volumes": volumes, "mask_seeds": range(num_crops), "cases": ["noise"] * num_crops}

    def inputs(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return volumes (b, channels, *size) on the device, and visible (b, 1, *grid) on the CPU, in network axes.

        What follows from the mask is computed on the CPU, so that nothing waits for CUDA.
        """
        volumes, visible, _ = self.masked_inputs(run, batch)
        return volumes, visible

    def masked_inputs(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor, list[torch.Generator]]:
        """Return what `inputs` does, and the generators of the samples after the draw of their masks."""
        generators = [torch.Generator().manual_seed(seed) for seed in batch["mask_seeds"]]
        volumes = common.to_network_input(batch["volumes"], self.config, run.processes.device)
        grid = grid_of(volumes.shape[2:], run.network.encoder.patch)
        return volumes, draw_visible(grid, self.config.mask_ratio, generators), generators

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Return the error on the hidden patches, or on the reconstructed ones among them."""
        volumes, visible, generators = self.masked_inputs(run, batch)
        fraction = self.config.reconstruct_fraction
        reconstructed = draw_reconstructed(visible, fraction, generators) if fraction < 1 else None
        loss: Tensor = run.model(volumes, visible, reconstructed).loss
        return loss

    def schedule(self, run: Run, step: int) -> dict[str, float]:
        """Return learning rate and weight decay of a step."""
        return common.pretraining_schedule(self.config, run, step)

    def before_training(self, run: Run, log: RunLog | None) -> None:
        """Probe the initial weights."""
        common.probe_initial_weights(self, run, log)

    def validate(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Validate on fixed crops and masks."""
        common.validate_pretraining(self, run, log, step, epoch)

    def validation_batches(self, volumes: Sequence[StoredVolume]) -> ValidationCrops:
        """Return the same crops and masks in every epoch."""
        c = self.config
        seed = common.VALIDATION_SEED
        return ValidationCrops(volumes, c.crop_shape, c.crops_per_volume, seed, common.slice_sampling(c))

    def validation_output(self, output: Any) -> float:
        """Return the loss."""
        loss: float = output.loss.item()
        return loss

    def validation_metrics(self, outputs: Sequence[float]) -> dict[str, float]:
        """Average the loss."""
        return {"val_loss": math.fsum(outputs) / len(outputs)}

    def draw_pictures(self, run: Run, log: RunLog, step: int, epoch: int) -> None:
        """Draw reconstructions of held-out volumes, or of training volumes if none are held out."""
        shown = self.validation or self.training
        crops = self.validation_batches(shown)
        for index in range(min(common.NUM_PICTURES, len(shown))):
            name, maps = shown[index].name, crop_maps(shown[index], common.slice_sampling(self.config))
            volumes, visible = (x[:1] for x in self.inputs(run, crops[index]))
            with autocast(run.processes, self.config.precision):
                output = run.network(volumes, visible)
            visible_voxels = common.to_volume(visible_at(visible, volumes.shape[2:])[0, 0].cpu(), self.config)
            arrays = (common.to_volume(x[0].cpu(), self.config) for x in (volumes, reconstruct(volumes, output)))
            images, results = (to_fractions(x.clone(), maps).numpy() for x in arrays)
            for channel, number in enumerate(self.config.image_channels):
                title = f"{name}, channel {number}" if channel else name
                options: dict[str, Any] = {"title": f"{title}, epoch {epoch}", "spacing": self.config.spacing}
                image, mask, result = images[channel], visible_voxels.numpy(), results[channel]
                if sampling := common.slice_sampling(self.config):
                    image, mask, result = (np.expand_dims(x, sampling.axis) for x in (image, mask, result))
                    options["slices"] = [self.config.slices]
                figure = reconstruction_panel(image, mask, result.clip(0, 1), **options)
                stem = f"epoch_{epoch:04d}_{name}" + (f"_channel{number}" if channel else "")
                save_figure(figure, self.config.run_folder / "pictures" / f"{stem}.png")
                log.board.add_figure(f"reconstruction/{title}", figure, step, close=False)

    def extra_state(self) -> dict[str, Any]:
        """Return the lowest validation loss, and nnU-Net's plan if there is one."""
        return {"best": self.best} | plan_state(self.config)

    def export(self, run: Run) -> None:
        """Export the encoder."""
        common.export_encoder(self.config, run)
