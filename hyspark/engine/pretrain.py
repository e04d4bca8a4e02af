"""Masked pre-training: the wiring, then one loop that reads top to bottom.

Source of the recipe: Tang et al., "HySparK", MICCAI 2024, and its public release.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from hyspark import report
from hyspark.config import PretrainConfig, as_plain
from hyspark.data import datalist
from hyspark.data.crops import rng_at, seed_at
from hyspark.data.loading import Batch, PretrainBatches, Share, ValidationCrops, make_loader
from hyspark.data.store import StoredVolume
from hyspark.engine import checkpoint, distributed, optim
from hyspark.engine.distributed import LOG, Processes
from hyspark.engine.run import RunLog, check_settings, prepared
from hyspark.models.masking import draw_visible, grid_of, visible_at
from hyspark.models.pretraining import HySparK, build_hyspark, reconstruct
from hyspark.models.weights import load_pretrained

START_FACTOR, END_FACTOR = 0.005, 0.001
"""Learning rate at the first and the last step, as shares of the peak."""
NUM_PICTURES = 3


@dataclass
class Training:
    """What the loop works with. `model` is the network as trained (wrapped where there are several processes)."""

    config: PretrainConfig
    processes: Processes
    training: list[StoredVolume]
    validation: list[StoredVolume]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    first_step: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.ep * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Where this call stops."""
        return min(self.total_steps, self.config.max_steps or self.total_steps)

    @property
    def network(self) -> HySparK:
        """The bare network."""
        net: HySparK = distributed.bare(self.model)
        return net


def encoder_file(config: PretrainConfig) -> Path:
    """Encoder weights alone, in the released format."""
    return config.run_folder / f"{config.model}_1kpretrained_timm_style.pth"


def training_file(config: PretrainConfig) -> Path:
    """Everything: encoder, decoder, optimizer, step. The run continues from it."""
    return config.run_folder / f"{config.model}_withdecoder_1kpretrained_hyspark_style.pth"


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train as the settings say, or continue; returns the run folder.

    Raises ValueError or FileNotFoundError for settings and data that do not fit, FloatingPointError where the loss
    is not finite.
    """
    processes = distributed.find_processes(config.device)
    check_settings(config)
    share = Share(config.bs, processes.rank, processes.world_size)
    cases = find_cases(config)
    LOG.info("%s", describe(config, processes, cases))
    if config.dry_run:
        return config.run_folder
    training, validation = prepared(config, processes, Path(config.data_path), cases)
    distributed.connect(processes)
    try:
        run = wire(config, processes, training, validation)
        if run.first_step >= run.last_step:
            LOG.info("nothing to do: %s has all %d steps", config.run_folder, run.last_step)
            return config.run_folder
        train(run, share)
    finally:
        distributed.disconnect(processes)
    return config.run_folder


def find_cases(config: PretrainConfig) -> tuple[list[datalist.Case], list[datalist.Case]]:
    """Training and validation cases; where the list names no validation part, a seeded share of the volumes is held
    out.
    """
    path = Path(config.data_path)
    listed = datalist.read(path if path.suffix == ".json" else path / "dataset.json")
    training, validation = list(listed.training), list(listed.validation)
    if not validation and len(training) > 1:
        num = max(1, round(config.val_fraction * len(training)))
        order = rng_at(config.seed, "order").permutation(len(training))
        validation = [training[i] for i in sorted(order[:num])]
        training = [training[i] for i in sorted(order[num:])]
    return training, validation


def describe(
    config: PretrainConfig,
    processes: Processes,
    cases: tuple[Sequence[datalist.Case], Sequence[datalist.Case]],
) -> str:
    """The run in a few lines, for the terminal."""
    training, validation = cases
    num_parameters = sum(p.numel() for p in build(config).parameters())
    steps = steps_per_epoch(len(training), config.bs)
    settings = "\n".join(f"  {k}: {v}" for k, v in as_plain(config).items())
    return (
        f"{settings}\n"
        f"data     {len(training)} training and {len(validation)} validation volumes from {config.data_path}\n"
        f"model    {config.model}, {num_parameters / 1e6:.1f} M parameters, "
        f"crops of {' x '.join(map(str, config.crop_size))}\n"
        f"steps    {config.ep} epochs of {steps}, {config.bs * config.crops_per_volume} crops each\n"
        f"device   {processes.device}, {processes.world_size} process(es), {config.precision}\n"
        f"run      {config.run_folder}"
    )


def steps_per_epoch(num_volumes: int, bs: int) -> int:
    """Steps in which every volume comes at least once."""
    return math.ceil(num_volumes / bs)


def build(config: PretrainConfig) -> HySparK:
    """The network with its seeded fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(config.seed, "weights"))
        return build_hyspark(
            config.crop_size,
            config.mask,
            config.compute,
            widths=config.encoder_widths,
            depths=config.encoder_depths,
            expansions=config.expansions,
            vit_depth=config.vit_depth,
            num_heads=config.num_heads,
            decoder_width=config.decoder_width,
        )


def wire(
    config: PretrainConfig, processes: Processes, training: list[StoredVolume], validation: list[StoredVolume]
) -> Training:
    """Model, optimizer and the state they continue from."""
    model = build(config)
    own = training_file(config)
    source = own if own.is_file() else Path(config.resume_from) if config.resume_from else None
    state = checkpoint.read_training_state(source) if source else None
    if state:
        model.load_state_dict(state["model"])
    elif config.init_weight:
        LOG.info("weights of %s\n%s", config.init_weight, load_pretrained(model, config.init_weight))
    wrapped = distributed.share_gradients(model, processes)
    optimizer = torch.optim.AdamW(optim.parameter_groups(wrapped), lr=config.base_lr)
    scaler = distributed.loss_scaler(processes, config.precision)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        LOG.info("continuing %s at step %d", source, state["step"])
    first_step = state["step"] if state else 0
    steps = steps_per_epoch(len(training), config.bs)
    return Training(config, processes, training, validation, wrapped, optimizer, scaler, steps, first_step)


def train(run: Training, share: Share) -> None:
    """The loop: batch, forward, backward, update, log; at the end of an epoch validate, draw, save."""
    config, processes = run.config, run.processes
    log = RunLog(config, run.first_step) if processes.is_main else None
    dataset = PretrainBatches(
        run.training, share, config.crop_size, config.crops_per_volume, config.flip_prob, config.seed
    )
    steps = range(run.first_step, run.last_step)
    loader = make_loader(dataset, steps, config.dataloader_workers, processes.device.type != "cpu")
    bar = tqdm(
        total=run.last_step,
        initial=run.first_step,
        desc="pretrain",
        unit="step",
        disable=not processes.is_main,
        dynamic_ncols=True,
    )
    clock = time.perf_counter()
    batches = iter(loader)
    run.model.train()
    for step in steps:
        batch = next(batches)
        waited = time.perf_counter() - clock
        epoch = step // run.steps_per_epoch
        lr, wd = rates(run, step)
        optim.set_rates(run.optimizer, lr, wd)
        loss, grad_norm = update(run, batch, step)
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        speed = len(batch["cases"]) * processes.world_size / seconds
        if log:
            numbers = {"loss": loss, "lr": lr, "wd": wd, "grad_norm": grad_norm}
            log.write(
                step,
                epoch,
                **numbers,
                samples_per_second=round(speed, 3),
                data_wait=round(waited / seconds, 4),
            )
            bar.set_postfix(loss=f"{loss:.4f}", crops_per_s=f"{speed:.1f}", epoch=epoch)
            bar.update()
        done = step + 1
        ends_epoch = done % run.steps_per_epoch == 0 or done == run.last_step
        if ends_epoch:
            finish_epoch(run, log, step, epoch)
        if ends_epoch or (config.save_every and done % config.save_every == 0):
            save(run, done)
        if ends_epoch:
            clock = time.perf_counter()  # validation and pictures are not part of a step
    bar.close()
    if log:
        log.close()
        page = write_report(run)
        LOG.info(
            "encoder  %s\nreport   %s\npictures %s",
            encoder_file(config),
            page,
            config.run_folder / "pictures",
        )


def rates(run: Training, step: int) -> tuple[float, float]:
    """Learning rate and weight decay of a step."""
    config, total = run.config, run.total_steps
    warmup = min(config.wp_ep * run.steps_per_epoch, total - 1)
    lr = optim.learning_rate(
        step,
        peak=config.base_lr,
        warmup=warmup,
        total=total,
        start_factor=START_FACTOR,
        end_factor=END_FACTOR,
    )
    return lr, optim.weight_decay(step, start=config.wd, end=config.wde, total=total)


def inputs(run: Training, batch: Batch) -> tuple[Tensor, Tensor]:
    """Volumes (b, 1, *size) and visible (b, 1, *grid) on the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in batch["mask_seeds"]]
    visible = draw_visible(grid_of(run.config.crop_size), run.config.mask, generators)
    device = run.processes.device
    return batch["volumes"].to(device, non_blocking=True), visible.to(device, non_blocking=True)


def update(run: Training, batch: Batch, step: int) -> tuple[float, float]:
    """One step of the optimizer; returns the loss over the global batch and the gradient's norm before clipping.

    Raises FloatingPointError, before the weights are touched, where one of the two is not finite.
    """
    volumes, visible = inputs(run, batch)
    with distributed.autocast(run.processes, run.config.precision):
        loss = run.model(volumes, visible).loss
    mean_loss = distributed.mean_over(loss, run.processes)
    if not math.isfinite(mean_loss):
        raise FloatingPointError(not_finite("loss", mean_loss, step, batch, run))
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    limit = run.config.clip or math.inf
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), limit))
    if not math.isfinite(norm) and not run.scaler.is_enabled():  # with fp16 the scaler skips such a step by itself
        raise FloatingPointError(not_finite("gradient", norm, step, batch, run))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return mean_loss, norm


def not_finite(what: str, value: float, step: int, batch: Batch, run: Training) -> str:
    """The message that stops a run."""
    kept = training_file(run.config)
    return (
        f"the {what} is {value} at step {step} (cases {', '.join(sorted(set(batch['cases'])))}); "
        "the weights were not changed by it. "
        + (f"The last checkpoint is kept: {kept}. " if kept.is_file() else "No checkpoint was written yet. ")
        + "Look at these cases, lower --base_lr, or use --precision fp32"
    )


@torch.no_grad()
def validate(run: Training) -> float | None:
    """Mean loss on the fixed crops and masks of the held-out volumes; None where there are none."""
    if not run.validation:
        return None
    processes = run.processes
    losses: list[float] = []
    run.model.eval()
    for batch in validation_loader(run, range(processes.rank, len(run.validation), processes.world_size)):
        volumes, visible = inputs(run, batch)
        with distributed.autocast(processes, run.config.precision):
            losses.append(run.network(volumes, visible).loss.item())
    run.model.train()
    everyone = distributed.gather(losses, processes)
    return math.fsum(everyone) / len(everyone)


def validation_loader(run: Training, items: Sequence[int]) -> DataLoader[Batch]:
    """The fixed crops of the named held-out volumes."""
    config = run.config
    dataset = ValidationCrops(run.validation, config.crop_size, config.crops_per_volume, config.seed)
    return make_loader(dataset, items, 0, False)


def finish_epoch(run: Training, log: RunLog | None, step: int, epoch: int) -> None:
    """Validation loss, and pictures where they are due."""
    val_loss = validate(run)
    if log is None:
        return
    if val_loss is not None:
        log.write(step, epoch, val_loss=val_loss)
        LOG.info("epoch %d: validation loss %.4f after %d steps", epoch, val_loss, step + 1)
    every = run.config.picture_every
    if (every and epoch % every == 0) or step + 1 == run.last_step:
        draw_pictures(run, log, step, epoch)
        write_report(run)


@torch.no_grad()
def draw_pictures(run: Training, log: RunLog, step: int, epoch: int) -> None:
    """Reconstructions of the first held-out volumes (or of training volumes where none are held out), as PNG and to
    TensorBoard.
    """
    shown = run.validation or run.training
    config = run.config
    dataset = ValidationCrops(shown, config.crop_size, config.crops_per_volume, config.seed)
    run.model.eval()
    for index in range(min(NUM_PICTURES, len(shown))):
        batch = dataset[index]
        volumes, visible = (x[:1] for x in inputs(run, batch))
        with distributed.autocast(run.processes, config.precision):
            output = run.network(volumes, visible)
        voxels = visible_at(visible, volumes.shape[2:])
        planes: list[Any] = [x[0, 0].float().cpu().numpy() for x in (volumes, reconstruct(volumes, output))]
        figure = report.reconstruction_panel(
            planes[0],
            voxels[0, 0].cpu().numpy(),
            planes[1].clip(0, 1),
            title=f"{batch['cases'][0]}, epoch {epoch}",
            spacing=config.spacing,
        )
        report.save_figure(figure, config.run_folder / "pictures" / f"epoch_{epoch:04d}_{batch['cases'][0]}.png")
        log.board.add_figure(f"reconstruction/{batch['cases'][0]}", figure, step, close=False)
    run.model.train()


def save(run: Training, done: int) -> None:
    """Both released files, by the main process; the others wait."""
    if run.processes.is_main:
        config = run.config
        parts = {"model": run.network, "optimizer": run.optimizer, "scaler": run.scaler}
        checkpoint.save(checkpoint.training_state(done, as_plain(config), **parts), training_file(config))
        checkpoint.save(run.network.encoder.state_dict(), encoder_file(config))
    distributed.barrier(run.processes)


def write_report(run: Training) -> Path:
    """The run's HTML page."""
    config = run.config
    summary = {
        "training volumes": str(len(run.training)),
        "validation volumes": str(len(run.validation)),
        "parameters": f"{sum(p.numel() for p in run.network.parameters()) / 1e6:.1f} M",
        "device": f"{run.processes.device}, {run.processes.world_size} process(es), {config.precision}",
    }
    return report.write_report(
        config.run_folder,
        title=f"HySparK pre-training: {config.exp_name}",
        config=as_plain(config),
        environment=report.environment(),
        summary=summary,
    )
