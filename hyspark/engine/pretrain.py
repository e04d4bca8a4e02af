"""Masked pre-training: finding the data, building the network, and what a step, a review and a checkpoint are.

Source of the recipe: Tang et al., "HySparK", MICCAI 2024, and its public release.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyspark import report
from hyspark.config import PretrainConfig
from hyspark.data import datalist
from hyspark.data.cases import Case
from hyspark.data.crops import Planes, seed_at
from hyspark.data.loading import Batch, PretrainBatches, Share, ValidationCrops, make_loader
from hyspark.data.splits import split_by_subject
from hyspark.data.store import StoredVolume
from hyspark.engine import checkpoint, distributed, optim
from hyspark.engine.distributed import LOG, Processes
from hyspark.engine.loop import Run, start_run, train
from hyspark.engine.planner import count_flops, crops_per_process, plan_text
from hyspark.engine.prepared import data_text, left_out_text, store_folder, usable
from hyspark.engine.probe import Probe, find_probe_cases, make_probe, take_probe
from hyspark.engine.replay import repeat, stopped_run
from hyspark.engine.run import RunLog, begun, saved_state, settings_text
from hyspark.engine.storage import survey
from hyspark.engine.trial import try_steps
from hyspark.figures import reconstruction_panel, save_figure
from hyspark.models.masking import draw_visible, grid_of, visible_at
from hyspark.models.pretraining import HySparK, build_hyspark, reconstruct
from hyspark.models.pyramid import build_spark
from hyspark.models.weights import load_pretrained
from hyspark.models.zoo import build_backbone
from hyspark.recipes import as_plain

START_FACTOR, END_FACTOR = 0.005, 0.001
"""Learning rate at the first and the last step, as shares of the peak."""
NUM_PICTURES = 3
VALIDATION_SEED = 0
"""Held-out volumes, their crops and masks do not depend on the seed of a run, so that runs can be compared."""


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


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train as the settings say, or continue; returns the run folder.

    Raises ValueError or FileNotFoundError for settings and data that do not fit, OSError for a full disk,
    FloatingPointError where the loss is not finite, AskedToStop (a SystemExit) after SIGTERM or SIGUSR1.
    """
    processes = distributed.find_processes("cpu" if config.replay else config.device)
    stopped = None
    if config.replay:
        config, stopped = stopped_run(config, processes)
    share = Share(config.bs, processes.rank, processes.world_size)
    cases = find_cases(config)
    probe_cases = find_probe_cases(Path(config.probe_data), config.probe_cases) if config.probe_data else None
    data = data_text(*cases)
    model = build(config)
    LOG.info("%s", describe(config, processes, model, *cases))
    if config.dry_run:
        state = start(config, model)
        if processes.is_main:
            LOG.info("%s", plan(config, processes, model, *cases, first_step=state["step"] if state else 0))
        return config.run_folder
    with begun(config, processes, model, training_file(config)) as asked:
        state = stopped or start(config, model)
        found = usable(config, processes, Path(config.data_path), *cases, state)
        probe = make_probe(config, processes, probe_cases) if probe_cases else None
        best = state["best"] if state else math.inf
        task = Pretraining(config, share, found.training, found.validation, probe, best)
        steps = steps_per_epoch(config, found.training)
        run = start_run(config, data, processes, model, steps, config.ep, state, left_out=found.left_out)
        if stopped:
            LOG.info("%s", repeat(run, task, stopped["stopped_by"]))
            return config.run_folder
        if run.first_step >= run.last_step and run.is_reviewed:
            LOG.info("nothing to do: %s has done %d steps", config.run_folder, run.first_step)
            return config.run_folder
        train(run, task, asked, before=partial(task.probe_fresh, run))
    if processes.is_main:
        LOG.info("encoder  %s", encoder_file(config))
        LOG.info("report   %s", task.write_report(run))
        LOG.info("pictures %s", config.run_folder / "pictures")
    return config.run_folder


def start(config: PretrainConfig, model: HySparK) -> dict[str, Any] | None:
    """The state that a run continues from; where there is none, the weights that the settings name are loaded."""
    state = saved_state(config, training_file(config), config.resume_from)
    if not state and config.init_weight:
        LOG.info("weights of %s\n%s", config.init_weight, load_pretrained(model, config.init_weight))
    return state


def find_cases(config: PretrainConfig) -> tuple[list[Case], list[Case]]:
    """Training and validation cases; where the list names no validation part, the same share of the volumes is
    always held out.
    """
    path = Path(config.data_path)
    path = path if path.suffix == ".json" else path / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"no data list at {path}; make it by: python generate_js.py --data_path {path.parent}")
    listed = datalist.read(path, require_files=False)
    training, validation = list(listed.training), list(listed.validation)
    if not validation:
        training, validation = split_by_subject(training, val_fraction=config.val_fraction, seed=VALIDATION_SEED)
    return training, validation


def steps_per_epoch(config: PretrainConfig, training: Sequence[Case | StoredVolume]) -> int:
    """Steps in which every volume comes at least once."""
    return math.ceil(len(training) / config.bs)


def describe(
    config: PretrainConfig,
    processes: Processes,
    model: HySparK,
    training: Sequence[Case],
    validation: Sequence[Case],
) -> str:
    """The run in a few lines, for the terminal."""
    steps = steps_per_epoch(config, training)
    probe = f"{config.probe_cases} labelled volumes of {config.probe_data}, epochs between probes: {config.probe_every}"
    return settings_text(
        config,
        processes,
        data=f"{len(training)} training and {len(validation)} validation volumes from {config.data_path}",
        model=f"{config.model}, {num_parameters(model)} parameters, crops of {' x '.join(map(str, config.crop_size))}",
        steps=f"{config.ep} epochs of {steps}, {config.bs * config.crops_per_volume} crops each",
        probe=probe if config.probe_data else "none",
    )


def num_parameters(model: torch.nn.Module) -> str:
    """Trained numbers of a model, in millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"


def plan(
    config: PretrainConfig,
    processes: Processes,
    model: HySparK,
    training: Sequence[Case],
    validation: Sequence[Case],
    first_step: int,
) -> str:
    """What the run will cost, for the terminal; takes trial steps, writes nothing."""
    free = distributed.free_memory(processes)
    task = Pretraining(config, Share(config.bs, processes.rank, processes.world_size), [], [])
    make, make_batch = partial(build, config), partial(random_batch, config.crop_size)
    crops = crops_per_process(config, processes)
    trials = try_steps(config, processes, make, task, make_batch, crops, free)
    flops = count_flops(config, model, crops)
    storage = survey(config, [*training, *validation], store_folder(config, Path(config.data_path)))
    per_epoch = steps_per_epoch(config, training)
    left = min(config.ep * per_epoch, config.max_steps or math.inf) - first_step
    steps = {"steps_per_epoch": per_epoch, "steps_left": max(0, int(left))}
    return plan_text(config, processes, model, flops, trials, free, storage, **steps)


def planes_of(config: PretrainConfig) -> Planes | None:
    """The planes that the settings ask for."""
    if config.slices == "none":
        return None
    axis = ("sagittal", "coronal", "axial").index(config.slices)
    return Planes(axis, config.slice_stride, config.slice_scaling == "minmax")


def random_batch(size: Sequence[int], crops: int) -> Batch:
    """A batch of so many crops of noise."""
    return {"volumes": torch.rand(crops, 1, *size), "mask_seeds": range(crops), "cases": ["noise"] * crops}


def build(config: PretrainConfig) -> HySparK:
    """The network with its seeded fresh weights; raises ValueError where its settings do not fit together."""
    axes = len(config.crop_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(config.seed, "weights"))
        if config.model != "hyspark":
            backbone = build_backbone(config.model.removeprefix("spark/"), config.channels, axes)
            return build_spark(
                backbone.network,
                config.crop_size,
                config.mask,
                in_channels=config.channels,
                decoder_width=config.decoder_width,
                run=backbone.run,
            )
        return build_hyspark(
            config.crop_size,
            config.mask,
            config.compute,
            hide=config.hide,
            widths=config.encoder_widths,
            depths=config.encoder_depths,
            expansions=config.expansions,
            vit_depth=config.vit_depth,
            num_heads=config.num_heads,
            decoder_width=config.decoder_width,
            axes=axes,
        )


@dataclass
class Pretraining:
    """The task for the loop. probe: None where there is none, and on other processes than the main one. best: lowest
    validation loss so far.
    """

    config: PretrainConfig
    share: Share
    training: Sequence[StoredVolume]
    validation: Sequence[StoredVolume]
    probe: Probe | None = None
    best: float = math.inf

    @property
    def batches(self) -> PretrainBatches:
        """Crops with the seeds of their masks."""
        c = self.config
        how = (c.crop_size, c.crops_per_volume, c.flip_prob, c.seed, planes_of(c))
        return PretrainBatches(self.training, self.share, *how)

    def begin(self, run: Run, step: int) -> None:
        """Nothing changes between steps but the rates."""

    def parts(self, batch: Batch) -> list[Batch]:
        """The batch in one pass."""
        return [batch]

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Reconstruction loss on the hidden patches."""
        loss: Tensor = run.model(*self.inputs(run, batch)).loss
        return loss

    def inputs(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Volumes (b, 1, *size) on the device, and visible (b, 1, *grid) on the CPU: what follows from the mask is
        worked out there, so that CUDA need not be waited for.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in batch["mask_seeds"]]
        grid = grid_of(self.config.crop_size, run.network.encoder.patch)
        volumes = batch["volumes"].to(run.processes.device, non_blocking=True)
        shape = (-1, self.config.channels, *(-1,) * (volumes.ndim - 2))
        return volumes.expand(shape), draw_visible(grid, self.config.mask, generators)

    def rates(self, run: Run, step: int) -> dict[str, float]:
        """Warm-up and cosine of the learning rate, cosine of the weight decay."""
        config, total = self.config, run.total_steps
        warmup = min(config.wp_ep * run.steps_per_epoch, total - 1)
        factors = {"start_factor": START_FACTOR, "end_factor": END_FACTOR}
        lr = optim.learning_rate(step, peak=config.base_lr, warmup=warmup, total=total, **factors)
        return {"lr": lr, "wd": optim.weight_decay(step, start=config.wd, end=config.wde, total=total)}

    def is_due(self, run: Run, done: int) -> bool:
        """At the end of every epoch."""
        return done % run.steps_per_epoch == 0

    def review(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Validation loss; the probe, and pictures with the report, where they are due."""
        val_loss = self.validate(run)
        if log is None:
            return
        if val_loss is not None:
            log.write(step, epoch, val_loss=val_loss)
            is_best = val_loss < self.best
            best = " (best)" if is_best else ""
            LOG.info("epoch %d: validation loss %.4f after %d steps%s", epoch, val_loss, step + 1, best)
            if is_best:
                self.best = val_loss
                checkpoint.save(run.network.encoder.weights(), best_file(self.config))
        is_last = step + 1 == run.last_step
        if self.probe and (epoch % self.config.probe_every == 0 or is_last):
            take_probe(run.network.encoder, self.probe, log, step, epoch)
        every = self.config.picture_every
        if (every and epoch % every == 0) or is_last:
            self.draw_pictures(run, log, step, epoch)
            self.write_report(run)

    def validate(self, run: Run) -> float | None:
        """Mean loss on the fixed crops and masks of the held-out volumes; None where there are none."""
        if not self.validation:
            return None
        processes = run.processes
        losses: list[float] = []
        for batch in make_loader(
            self.fixed_crops(self.validation),
            range(processes.rank, len(self.validation), processes.world_size),
            num_workers=0,
            pin_memory=False,
        ):
            volumes, visible = self.inputs(run, batch)
            with distributed.autocast(processes, self.config.precision):
                losses.append(run.network(volumes, visible).loss.item())
        everyone = distributed.gather(losses, processes)
        return math.fsum(everyone) / len(everyone)

    def probe_fresh(self, run: Run, log: RunLog | None) -> None:
        """The probe of the weights that the first step finds: what later ones are to be compared with."""
        if self.probe and log and run.first_step == 0:
            take_probe(run.network.encoder, self.probe, log, step=-1, epoch=0)

    def fixed_crops(self, volumes: Sequence[StoredVolume]) -> ValidationCrops:
        """The same crops and masks in every epoch."""
        c = self.config
        return ValidationCrops(volumes, c.crop_size, c.crops_per_volume, VALIDATION_SEED, planes_of(c))

    def draw_pictures(self, run: Run, log: RunLog, step: int, epoch: int) -> None:
        """Reconstructions of the first held-out volumes (of training volumes where none are held out): PNG and
        TensorBoard.
        """
        shown = self.validation or self.training
        crops = self.fixed_crops(shown)
        for index in range(min(NUM_PICTURES, len(shown))):
            name = shown[index].name
            volumes, visible = (x[:1] for x in self.inputs(run, crops[index]))
            with distributed.autocast(run.processes, self.config.precision):
                output = run.network(volumes, visible)
            seen = visible_at(visible, volumes.shape[2:])
            image, mask, result = (x[0, 0].cpu().numpy() for x in (volumes, seen, reconstruct(volumes, output)))
            title = f"{name}, epoch {epoch}"
            shown_planes: dict[str, Any] = {}
            if planes := planes_of(self.config):
                image, mask, result = (np.expand_dims(x, planes.axis) for x in (image, mask, result))
                shown_planes["planes"] = [self.config.slices]
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
        return report.write_report(
            self.config.run_folder,
            title=f"HySparK pre-training: {self.config.exp_name}",
            config=as_plain(self.config),
            environment=report.environment(),
            summary={
                "training volumes": str(len(self.training)),
                "validation volumes": str(len(self.validation)),
                "left out": left_out_text(run.left_out),
                "parameters": num_parameters(run.network),
                "device": run.processes.text(self.config.precision),
            },
        )
