"""Fine-tuning for the classification of images: data, network, and what a step, a review and a checkpoint are.

Source of the recipe that the settings default to: Wolf et al., Scientific Reports 13, 20260 (2023).
"""

import math
from collections.abc import Iterator, Mapping
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
from hyspark.models.weights.load import load_pretrained
from hyspark.reports import run_page
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.distributed import Processes
from hyspark.training.labelled_images import Images, read_images
from hyspark.training.loop import Run, start_run, train
from hyspark.training.metrics_log import RunLog
from hyspark.training.precision import with_precision
from hyspark.training.replay import repeat, stopped_run
from hyspark.training.run_folder import begun, last_file, saved_state, settings_text, steps_per_epoch
from hyspark.training.run_volumes import left_out_text
from hyspark.utils.log import LOG


def finetune_classify(config: ClassificationConfig) -> Path:
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
    if (config.mixup or config.cutmix) and len(share.slots) % 2:
        raise ValueError(f"mixup and cutmix mix pairs, but each process has {len(share.slots)} images of a batch")
    images = read_images(config)
    model = build(config, len(images.classes))
    LOG.info("%s", describe(config, processes, model, images))
    if config.dry_run:
        start(config, model, images)
        return config.run_folder
    with begun(config, processes, model, last_file(config)) as asked:
        state = stopped or start(config, model, images)
        steps = steps_per_epoch(config, len(images.parts["train"]))
        run = start_run(
            config,
            images.text,
            processes,
            model,
            steps,
            config.epochs,
            state,
            left_out=images.left_out,
            make_optimizer=partial(make_optimizer, config),
            freezes=config.freeze_epochs > 0,
        )
        task = Classifying(config, share, images, *best_of(state), make_average(run, config, state))
        task.follow(run)
        if stopped:
            LOG.info("%s", repeat(run, task, stopped["stopped_by"]))
            return config.run_folder
        if run.first_step < run.last_step or not run.is_reviewed:
            train(run, task, asked)
        else:
            LOG.info("nothing to do: %s has done %d steps", config.run_folder, run.first_step)
        score_best(config, images, processes)
    if processes.is_main:
        LOG.info("report   %s", task.write_report(run))
        LOG.info(
            "scores   %s",
            ", ".join(str(config.run_folder / SCORE_FOLDERS[part]) for part in scored_subsets(images.parts)),
        )
    return config.run_folder


def build(config: ClassificationConfig, num_classes: int) -> nn.Module:
    """The network with its seeded fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(config.seed, "weights"))
        return classifier_from_config(config, num_classes)


def start(config: ClassificationConfig, model: nn.Module, images: Images) -> dict[str, Any] | None:
    """The state that a run continues from; where there is none, the pre-trained weights are loaded.

    Raises ValueError where the run was begun on other images, and what loading weights raises.
    """
    state = saved_state(config, last_file(config))
    if state and (state["data"], state["left_out"]) != (images.text, images.left_out):
        raise ValueError(
            "the run was begun on other images; name another run folder, or use the same to continue it:\n"
            f"  data: was {state['data']}, is {images.text}\n"
            f"  left out: was {left_out_text(state['left_out'])}, is {left_out_text(images.left_out)}"
        )
    if not state and config.weights != "none":
        LOG.info("weights of %s\n%s", config.weights, load_pretrained(model, config.weights))
    return state


def describe(config: ClassificationConfig, processes: Processes, model: nn.Module, images: Images) -> str:
    """The run in a few lines, for the terminal."""
    sizes = ", ".join(f"{len(part)} {name}" for name, part in images.parts.items())
    megabytes = sum(image.numel() for part in images.parts.values() for image in part.images) / 1e6
    steps = steps_per_epoch(config, len(images.parts["train"]))
    return settings_text(
        config,
        processes,
        data=f"{sizes} images from {config.data}, {megabytes:.0f} MB in memory",
        classes=", ".join(images.classes),
        model=f"{config.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
        steps=f"{config.epochs} epochs of {steps}, {config.batch_size} images each",
    )


def make_optimizer(config: ClassificationConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam with weight decay in the gradient of all weights, or AdamW, over groups by layer."""
    network = distributed.bare(model)
    groups = optim.parameter_groups(network, config.layer_decay, optim.encoder_share(config), layer_indices(network))
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.Adam([group | {"decays": True} for group in groups], fused=True)


def make_average(run: Run, config: ClassificationConfig, state: Mapping[str, Any] | None) -> ModelEmaV3 | None:
    """The moving average of the weights where the settings ask for one, as the state has it where there is one."""
    if not config.ema_decay:
        return None
    average = ModelEmaV3(run.network, decay=config.ema_decay, use_warmup=True)
    if state:
        average.module.load_state_dict(state["average"])
    return average


def best_of(state: Mapping[str, Any] | None) -> tuple[float, int]:
    """The best accuracy so far and the steps done then."""
    return (state["best"], state["best_after"]) if state else (-1.0, 0)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The generators of torch and numpy, which dropout and mixing draw from, seeded inside and as before after it."""
    before = np.random.get_state()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)


@dataclass
class Classifying:
    """The task for the loop. best, best_after: best validation accuracy so far, and steps done then. average: of the
    weights, where there is one.
    """

    config: ClassificationConfig
    share: Shard
    images: Images
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
        return ImageBatches(training, self.share, c.crop_size, augmentation, scaling_from_config(c), c.seed)

    def follow(self, run: Run) -> None:
        """Have the average follow the weights, from the optimizer's next step on."""
        if average := self.average:
            run.optimizer.register_step_post_hook(lambda *_: average.update(run.network, self.step + 1))

    def begin(self, run: Run, step: int) -> None:
        """Leave the backbone out of the first epochs, where the settings say so."""
        self.step = step
        if self.config.freeze_epochs:
            set_backbone_trainable(run.network, step >= self.config.freeze_epochs * run.steps_per_epoch)

    def parts(self, run: Run, batch: Batch) -> list[Batch]:
        """All at once."""
        return [batch]

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Cross entropy, in fp32. What dropout and mixing draw is a function of seed, step and process."""
        c = self.config
        images, labels = (batch[k].to(run.processes.device, non_blocking=True) for k in ("image", "label"))
        smoothing = c.label_smoothing
        with seeded(seed_at(c.seed, "step", self.step, run.processes.rank), run.processes.device):
            if c.mixup or c.cutmix:
                classes = len(self.images.classes)
                mix = Mixup(c.mixup, c.cutmix, label_smoothing=smoothing, num_classes=classes)
                images, labels = mix(images, labels)
                smoothing = 0.0  # it is in the mixed labels
            return nn.functional.cross_entropy(run.model(images).float(), labels, label_smoothing=smoothing)

    def rates(self, run: Run, step: int) -> dict[str, float]:
        """Linear warm-up, then constant or a cosine."""
        return optim.finetuning_rates(self.config, step, run.steps_per_epoch, run.total_steps)

    def is_due(self, run: Run, done: int) -> bool:
        """At the end of every val_every-th epoch."""
        return done % (run.steps_per_epoch * self.config.val_every) == 0

    def review(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Validate; keep the weights where their accuracy is the best so far, the earlier ones of equals."""
        network = self.average.module if self.average else run.network
        images = self.images.parts["val"]
        values = class_probabilities(network, images, self.config, run.processes)
        scores = classification_scores(np.array(images.labels), values)
        is_best = scores["accuracy"] > self.best
        if is_best:
            self.best, self.best_after = scores["accuracy"], step + 1
        if log is None:
            return
        of_truth = values[np.arange(len(images)), list(images.labels)]
        val_loss = float(-np.log(np.maximum(of_truth, np.finfo(float).tiny)).mean())
        log.write(step, epoch, val_loss=val_loss, **{k: v for k, v in scores.items() if not math.isnan(v)})
        LOG.info("epoch %d: %s%s", epoch, metrics_text(scores), " (best)" if is_best else "")
        if is_best:
            what = f"best.pth{', moving average' if self.average else ''} after {step + 1} steps"
            contents = {"model": network.state_dict(), "config": as_plain(self.config), "weights": what}
            classes = list(self.images.classes)
            checkpoint.save(contents | {"classes": classes}, self.config.run_folder / "best.pth")

    @property
    def state_file(self) -> Path:
        """Last, beside best.pth."""
        return last_file(self.config)

    def notes(self) -> dict[str, Any]:
        """The best accuracy, and the average of the weights."""
        average = {"average": self.average.module.state_dict()} if self.average else {}
        return {"best": self.best, "best_after": self.best_after} | average

    def export(self, run: Run) -> None:
        """The best weights are kept by the review, and no others."""

    def write_report(self, run: Run) -> Path:
        """The run's HTML page."""
        c = self.config
        folders = {HEADINGS[part]: c.run_folder / SCORE_FOLDERS[part] for part in scored_subsets(self.images.parts)}
        numbers = {f"{name} images": str(len(part)) for name, part in self.images.parts.items()}
        return run_page.write_report(
            c.run_folder,
            title=f"Classification of images: {c.run_folder.name}",
            config=as_plain(c),
            environment=run_page.environment(),
            summary={
                "start": "from scratch" if c.weights == "none" else f"weights of {c.weights}",
                "network": c.model,
                **numbers,
                "left out": left_out_text(run.left_out),
                "best validation accuracy": f"{self.best:.3f} after {self.best_after} steps",
                "device": run.processes.text(c.precision),
            },
            scores=folders,
        )
