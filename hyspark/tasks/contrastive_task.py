"""Pre-training by comparing views, MoCo v2, BYOL and SwAV, as a task of the loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyspark.config.nnunet import plan_state
from hyspark.config.pretrain import PretrainConfig
from hyspark.data.batches.crops import crop_maps
from hyspark.data.batches.loader import Batch, Shard
from hyspark.data.batches.views import ValidationViews, ViewBatches, ViewRecipe
from hyspark.data.intensity import to_fractions
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.evaluation.linear_probe import Probe
from hyspark.figures.panels import save_figure
from hyspark.figures.slices import views_panel
from hyspark.tasks import pretrain_common as common
from hyspark.training.loop import Task
from hyspark.training.metrics_log import RunLog
from hyspark.training.run import Run


@dataclass
class ContrastiveTask(Task):
    """Pre-training by comparing two large views of each crop, and small ones if the settings ask for them.

    Attributes are those of `pretrain_common.PretrainingTask`.
    """

    config: PretrainConfig
    shard: Shard
    training: Sequence[StoredVolume]
    validation: Sequence[StoredVolume]
    probe: Probe | None = None
    best: float = math.inf

    @property
    def recipe(self) -> ViewRecipe:
        """How views are made."""
        c = self.config
        return ViewRecipe(c.crop_shape, c.view_scale, c.local_views, c.flip_prob, common.slice_sampling(c))

    @property
    def batches(self) -> ViewBatches:
        """Views of crops."""
        return ViewBatches(self.training, self.shard, self.recipe, self.config.crops_per_volume, self.config.seed)

    def random_batch(self, num_crops: int) -> Batch:
        """Make a batch of views of crops of noise."""
        recipe = self.recipe
        sizes = [recipe.size] * 2 + [recipe.small_size] * recipe.num_small
        return {
            "views": [torch.rand(num_crops, self.config.num_image_channels, *size) for size in sizes],
            "cases": ["noise"] * num_crops,
        }

    def inputs(self, run: Run, batch: Batch) -> tuple[list[Tensor]]:
        """Return the views (b, channels, *size), on the device."""
        return ([common.to_network_input(view, self.config, run.processes.device) for view in batch["views"]],)

    def before_step(self, run: Run, step: int) -> None:
        """Update the momentum encoder, with a momentum that follows a cosine from the settings' value to 1."""
        progress = step / max(1, run.total_steps - 1)
        run.network.prepare_step(1 - (1 - self.config.momentum) * (math.cos(math.pi * progress) + 1) / 2)

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Return the loss of the method."""
        loss: Tensor = run.model(*self.inputs(run, batch)).loss
        return loss

    def schedule(self, run: Run, step: int) -> dict[str, float]:
        """Return learning rate and weight decay of a step."""
        return common.pretraining_schedule(self.config, run, step)

    def before_training(self, run: Run, log: RunLog | None) -> None:
        """Probe the initial weights."""
        common.probe_initial_weights(self, run, log)

    def validate(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Validate on fixed views."""
        common.validate_pretraining(self, run, log, step, epoch)

    def validation_batches(self, volumes: Sequence[StoredVolume]) -> ValidationViews:
        """Return the same views in every epoch, of as many volumes at a time as in a step."""
        c = self.config
        seed = common.VALIDATION_SEED
        return ValidationViews(volumes, self.recipe, c.crops_per_volume, seed, together=c.batch_size)

    def validation_output(self, output: Any) -> tuple[float, Tensor]:
        """Return the loss and the projections."""
        return output.loss.item(), output.projections.cpu()

    def validation_metrics(self, outputs: Sequence[tuple[float, Tensor]]) -> dict[str, float]:
        """Average the loss, and measure the spread of projections over images.

        The spread is the deviation times the root of the number of features: 1 if projections spread evenly over the
        sphere, 0 if the network has collapsed. A single image has none.
        """
        losses, projections = zip(*outputs, strict=True)
        together = torch.cat(projections)
        metrics = {"val_loss": math.fsum(losses) / len(losses)}
        if len(together) > 1:
            metrics["projection_std"] = float(together.std(0, unbiased=False).mean() * together.shape[1] ** 0.5)
        return metrics

    def draw_pictures(self, run: Run, log: RunLog, step: int, epoch: int) -> None:
        """Draw the views of held-out volumes, or of training volumes if none are held out; once, as they are fixed."""
        path = self.config.run_folder / "pictures" / "views.png"
        if path.is_file():
            return
        shown = (self.validation or self.training)[: common.NUM_PICTURES]
        batch = self.validation_batches(shown)[0]
        every = self.config.crops_per_volume
        first_views = [view[::every] for view in batch["views"]]
        for i in range(len(first_views[0])):
            maps = crop_maps(shown[i], self.recipe.slices)
            for view in first_views:
                to_fractions(view[i], maps)
        figure = views_panel([view[:, 0].numpy() for view in first_views], batch["cases"][::every])
        save_figure(figure, path)
        log.board.add_figure("views", figure, step, close=False)

    def extra_state(self) -> dict[str, Any]:
        """Return the lowest validation loss, and nnU-Net's plan if there is one."""
        return {"best": self.best} | plan_state(self.config)

    def export(self, run: Run) -> None:
        """Export the encoder."""
        common.export_encoder(self.config, run)
