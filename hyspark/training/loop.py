"""The training loop, the same for every task: batch, forward, backward, update, log; review and save when due.

A task (see `Task`) says what a batch and a loss are, which rates a step has and what happens in a review. Everything
that makes a run resumable lies here: step t sees batch t, rates t, and the state that step t - 1 left.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hyspark.config.recipes import Config, as_plain
from hyspark.data.batches.loader import Batch, loading, make_loader
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.checkpoint import full_disk_explained
from hyspark.training.distributed import Processes
from hyspark.training.metrics_log import RunLog
from hyspark.training.precision import autocast, choose_kernels, loss_scaler
from hyspark.training.signals import AskedToStop, Requests
from hyspark.utils.log import LOG

LEAST_SCALE = 1.0
"""Of fp16's losses; what is not finite at this scale is not finite because of it."""


@dataclass
class Run:
    """What the loop works with. `model` is the network as trained, wrapped where there are several processes.

    data: of `data_text`. total_steps: of the whole schedule. first_step, last_step: what this call does of it.
    is_reviewed: whether the review that is due after the step before the first, if one is, has been done. saved_step:
    that the newest state is of. left_out: names of cases that could not be used.
    """

    config: Config
    data: str
    processes: Processes
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    total_steps: int
    first_step: int
    is_reviewed: bool
    saved_step: int
    left_out: list[str]

    @property
    def last_step(self) -> int:
        """Where this call stops."""
        return min(self.total_steps, self.config.max_steps or self.total_steps)

    @property
    def network(self) -> Any:
        """The bare network."""
        return distributed.bare(self.model)

    def state(self, done: int, is_reviewed: bool, **more: Any) -> dict[str, Any]:
        """The resumable state after `done` steps, with or without the review that is due then, and what the task
        adds.
        """
        parts = {"model": self.network, "optimizer": self.optimizer, "scaler": self.scaler}
        state = checkpoint.training_state(done, as_plain(self.config), self.data, **parts)
        return checkpoint.sealed(state | {"is_reviewed": is_reviewed, "left_out": self.left_out} | more)


class Task(Protocol):
    """What differs between pre-training and fine-tuning."""

    @property
    def batches(self) -> Dataset[Batch]:
        """Item t: this process's share of the global batch t."""

    def begin(self, run: Run, step: int) -> None:
        """Called before each step."""

    def parts(self, run: Run, batch: Batch) -> Sequence[Batch]:
        """The batch in equal parts that go through the network one after the other. Called once a step, on all
        processes.
        """

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Scalar loss of a part of a batch."""

    def rates(self, run: Run, step: int) -> dict[str, float]:
        """Learning rate `lr` and weight decay `wd` of a step."""

    def is_due(self, run: Run, done: int) -> bool:
        """Whether a review and a checkpoint are due after `done` steps."""

    def review(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Validate and draw; `log` is None on other processes than the main one."""

    @property
    def state_file(self) -> Path:
        """Where the resumable state is saved."""

    def notes(self) -> dict[str, Any]:
        """What the task itself has to remember in the state."""

    def export(self, run: Run) -> None:
        """Write the weights alone, where they are released so; called on the main process when a state is saved."""


def start_run(
    config: Config,
    data: str,
    processes: Processes,
    model: nn.Module,
    steps_per_epoch: int,
    epochs: int,
    state: dict[str, Any] | None,
    *,
    left_out: Sequence[str] = (),
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    freezes: bool = False,
) -> Run:
    """Put the model on its device, make its optimizer, and continue from `state` where there is one.

    make_optimizer: from the model, on its device and wrapped, in groups as `optim.parameter_groups` has them; AdamW by
    default. freezes: whether some weights stay as they are for a while.
    """
    choose_kernels(config)
    if state:
        model.load_state_dict(state["model"])
    model = distributed.share_gradients(model, processes, some_unused=freezes)
    make_optimizer = make_optimizer or partial(optim.adamw, encoder_share=config.encoder_lr_ratio)
    optimizer = make_optimizer(model)
    scaler = loss_scaler(processes, config.precision)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        LOG.info("continuing at step %d", state["step"])
    first_step = state["step"] if state else 0
    starts = set(distributed.gather([first_step], processes))
    if len(starts) > 1:
        raise ValueError(
            f"the processes would continue at different steps: {sorted(starts)}; do all machines see the run folder "
            f"{config.run_folder}?"
        )
    return Run(
        config=config,
        data=data,
        processes=processes,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        steps_per_epoch=steps_per_epoch,
        total_steps=epochs * steps_per_epoch,
        first_step=first_step,
        is_reviewed=state["is_reviewed"] if state else True,
        saved_step=first_step,
        left_out=list(left_out),
    )


def train(run: Run, task: Task, asked: Requests, before: Callable[[RunLog | None], None] | None = None) -> None:
    """Do the steps from `run.first_step` to `run.last_step`.

    before: called once, before the first of them; the log is None on other processes than the main one.

    Raises FloatingPointError, with the weights as the step before left them, where a loss or gradient is not finite;
    AskedToStop, with all saved, where a signal says so; OSError where the disk is full.
    """
    with ExitStack() as stack:
        stack.enter_context(full_disk_explained(run.config.run_folder))
        stack.enter_context(logging_redirect_tqdm())  # log lines above the bar, not in it
        bar = stack.enter_context(progress_bar(run))
        log = None
        if run.processes.is_main:
            log = stack.enter_context(closing(RunLog(run.config, run.first_step, run.is_reviewed)))
        if before:
            before(log)
        if not run.is_reviewed:
            review(run, task, log, run.first_step)
        steps = range(run.first_step, run.last_step)
        workers = run.config.dataloader_workers
        loader = make_loader(task.batches, steps, workers, pin_memory=run.processes.device.type != "cpu")
        with asked.stops(at_once=False), loading(loader) as batches:
            take_steps(run, task, batches, log, bar, asked)


def take_steps(run: Run, task: Task, batches: Iterator[Batch], log: RunLog | None, bar: Any, asked: Requests) -> None:
    """The loop itself."""
    config, processes = run.config, run.processes
    steps = range(run.first_step, run.last_step)
    run.model.train()
    clock = time.perf_counter()
    for step in steps:
        batch = next(batches)
        waited = time.perf_counter() - clock
        rates = task.rates(run, step)
        optim.set_rates(run.optimizer, **rates)
        task.begin(run, step)
        loss, grad_norm = update_or_keep(run, task, batch, step)
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        done, epoch = step + 1, step // run.steps_per_epoch
        if log:
            speed = len(batch["cases"]) * processes.world_size / seconds
            shares = {"samples_per_second": round(speed, 3), "data_wait": round(waited / seconds, 4)}
            log.write(step, epoch, loss=loss, **rates, grad_norm=grad_norm, **shares)
            bar.set_postfix(loss=f"{loss:.4f}", crops_per_s=f"{speed:.1f}", epoch=epoch)
            bar.update()
        due = done == run.last_step or task.is_due(run, done)
        stop = distributed.any_of(bool(asked.pending), processes)
        if due or stop or (config.save_every and done % config.save_every == 0):
            save(run, task, log, done, is_reviewed=not due)
        if stop:
            raise AskedToStop(
                f"stopped by {asked.pending or 'a signal to another process'} after {done} steps; "
                f"what was done is saved in {config.run_folder}, and the same command continues"
            )
        if due:
            with asked.stops(at_once=True):
                review(run, task, log, done)
        if due or (config.save_every and done % config.save_every == 0):
            clock = time.perf_counter()  # reviews and checkpoints are not part of a step


def review(run: Run, task: Task, log: RunLog | None, done: int) -> None:
    """The review that is due after `done` steps, and the state that knows of it."""
    run.model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # its shapes would be compiled for a few calls
        task.review(run, log, done - 1, (done - 1) // run.steps_per_epoch)
    run.model.train()
    save(run, task, log, done, is_reviewed=True)


def save(run: Run, task: Task, log: RunLog | None, done: int, is_reviewed: bool) -> None:
    """Write the checkpoints after `done` steps; the state comes last, so that it never promises what is not there."""
    if log:
        log.sync()
        task.export(run)
        keep = run.config.keep_last if done != run.saved_step else 1  # a second state of one step replaces the first
        checkpoint.save(run.state(done, is_reviewed, **task.notes()), task.state_file, keep)
    run.saved_step = done
    distributed.barrier(run.processes)


def update_or_keep(run: Run, task: Task, batch: Batch, step: int) -> tuple[float, float]:
    """What `update` does; where it stops at a number that is not finite, the step is kept for a replay."""
    statistics = [(buffer, buffer.clone()) for buffer in run.network.buffers()]  # a forward pass moves them
    try:
        return update(run, task, batch, step)
    except FloatingPointError as error:
        for buffer, before in statistics:
            buffer.copy_(before)
        path = run.config.run_folder / f"nonfinite_step_{step}.pth"
        kept = f"The step is kept: repeat it in fp32 with --replay {path}"
        if run.processes.is_main:
            try:
                checkpoint.save(run.state(step, is_reviewed=True, stopped_by=str(error), **task.notes()), path)
            except OSError as full:
                kept = f"The step could not be kept ({full})"
        distributed.barrier(run.processes)  # torchrun ends all processes when the first one has ended
        raise FloatingPointError(f"{error}. {kept}") from None


def progress_bar(run: Run) -> Any:
    """Steps of the run with loss, speed and remaining time; silent on other processes than the main one."""
    return tqdm(
        total=run.last_step,
        initial=run.first_step,
        desc=run.config.run_folder.name,
        unit="step",
        disable=not run.processes.is_main,
        dynamic_ncols=True,
    )


def update(run: Run, task: Task, batch: Batch, step: int) -> tuple[float, float]:
    """One step of the optimizer: the loss over the global batch, and the gradient's norm before clipping."""
    mean_loss = distributed.mean_over(gradient(run, task, batch), run.processes)
    check_finite("loss", mean_loss, step, batch, run.processes)
    norm = gradient_norm(run)
    # With fp16 the scaler skips such a step and lowers its scale, which helps only where the scale was to blame.
    if not run.scaler.is_enabled() or run.scaler.get_scale() <= LEAST_SCALE:
        check_finite("gradient norm", norm, step, batch, run.processes)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return mean_loss, norm


def gradient(run: Run, task: Task, batch: Batch) -> Tensor:
    """Forward and backward: the loss over this process's share, with the scaled gradient left in the weights."""
    run.optimizer.zero_grad(set_to_none=True)
    parts = task.parts(run, batch)
    total = torch.zeros((), device=run.processes.device)
    for number, part in enumerate(parts, start=1):
        with distributed.gradients_shared(run.model, number == len(parts)):
            with autocast(run.processes, run.config.precision):
                loss = task.loss(run, part) / len(parts)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def gradient_norm(run: Run) -> float:
    """The gradient's norm, after which it is clipped; at its true size, also with fp16's scaled losses."""
    run.scaler.unscale_(run.optimizer)
    return nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip or math.inf).item()


def check_finite(what: str, value: float, step: int, batch: Batch, processes: Processes) -> None:
    """Raises FloatingPointError, naming the step and the cases of all processes; `value` must be the same on all of
    them.
    """
    if not math.isfinite(value):
        cases = distributed.gather(batch["cases"], processes)
        raise FloatingPointError(
            f"the {what} is {value} at step {step} (cases {', '.join(sorted(set(cases)))}). "
            "The weights were not changed by this step and earlier checkpoints are kept. "
            "Look at these cases, lower the learning rate, or use --precision fp32"
        )
