"""Pre-training by comparing views, MoCo v2, BYOL and SwAV, as a task for the loop: what differs from masking."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hyspark.data.batches.loader import Batch
from hyspark.data.batches.views import ValidationViews, ViewBatches, ViewRecipe
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.figures.panels import save_figure
from hyspark.figures.slices import views_panel
from hyspark.tasks.masked import NUM_PICTURES, VALIDATION_SEED, Pretraining, planes_of
from hyspark.training.loop import Run
from hyspark.training.metrics_log import RunLog


class ViewPretraining(Pretraining):
    """The task: two large views of each crop, and small ones where the settings ask for them."""

    @property
    def recipe(self) -> ViewRecipe:
        """How views are made."""
        c = self.config
        return ViewRecipe(c.crop_shape, c.view_scale, c.local_views, c.flip_prob, planes_of(c))

    @property
    def batches(self) -> Dataset[Batch]:
        """Views of crops."""
        return ViewBatches(self.training, self.share, self.recipe, self.config.crops_per_volume, self.config.seed)

    def begin(self, run: Run, step: int) -> None:
        """Let what follows the network follow it: by a cosine from the settings' momentum to 1 at the last step."""
        share = step / max(1, run.total_steps - 1)
        run.network.prepare_step(1 - (1 - self.config.momentum) * (math.cos(math.pi * share) + 1) / 2)

    def inputs(self, run: Run, batch: Batch) -> tuple[Any, ...]:
        """The views (b, channels, *size), on the device."""
        return ([self.on_device(run, view) for view in batch["views"]],)

    def random_batch(self, crops: int) -> Batch:
        """Views of so many crops of noise."""
        recipe = self.recipe
        sizes = [recipe.size] * 2 + [recipe.small_size] * recipe.num_small
        return {"views": [torch.rand(crops, 1, *size) for size in sizes], "cases": ["noise"] * crops}

    def kept(self, output: Any) -> tuple[float, Tensor]:
        """The loss and the projections."""
        return output.loss.item(), output.projections.cpu()

    def summary(self, kept: Sequence[Any]) -> dict[str, float]:
        """The loss; and the deviation of projections over images, times the root of their features: 1 where they spread
        evenly over the sphere, 0 where the network has collapsed; left out where there is one image.
        """
        losses, projections = zip(*kept, strict=True)
        together = torch.cat(projections)
        numbers = {"val_loss": math.fsum(losses) / len(losses)}
        if len(together) > 1:
            numbers["projection_std"] = float(together.std(0, unbiased=False).mean() * together.shape[1] ** 0.5)
        return numbers

    def fixed(self, volumes: Sequence[StoredVolume]) -> ValidationViews:
        """The same views in every epoch, of as many volumes at a time as there are in a step."""
        c = self.config
        return ValidationViews(volumes, self.recipe, c.crops_per_volume, VALIDATION_SEED, together=c.batch_size)

    def draw_pictures(self, run: Run, log: RunLog, step: int, epoch: int) -> None:
        """Views of the first held-out volumes (of training volumes where none are held out), which do not change."""
        path = self.config.run_folder / "pictures" / "views.png"
        if path.is_file():
            return
        batch = self.fixed((self.validation or self.training)[:NUM_PICTURES])[0]
        every = self.config.crops_per_volume
        figure = views_panel([view[::every, 0].numpy() for view in batch["views"]], batch["cases"][::every])
        save_figure(figure, path)
        log.board.add_figure("views", figure, step, close=False)
