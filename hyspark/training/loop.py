"""The training loop of all tasks: batch, forward, backward, update, log; validation and checkpoint when due.

A `Task` says what a batch, a loss, a schedule and a validation are. Everything that makes a run resumable lies here:
step t sees batch t, its learning rate, and the state that step t - 1 left.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hyspark.data.batches.loader import Batch, loading, make_loader
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.checkpoint import explain_full_disk
from hyspark.training.distributed import Processes
from hyspark.training.metrics_log import RunLog
from hyspark.training.precision import autocast
from hyspark.training.run import Run
from hyspark.training.run_folder import checkpoint_file
from hyspark.training.signals import StopRequested, StopRequests

MIN_LOSS_SCALE = 1.0
"""Scale factor of fp16's losses below which a value that is not finite is not due to the scale."""


class Task(Protocol):
    """What differs between the kinds of training in a step and in a validation.

    Tasks derive from this class, which does nothing in the hooks that a task leaves as they are.
    """

    @property
    def batches(self) -> Dataset[Batch]:
        """Batches by step; item t is this process's shard of the global batch t."""

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Return the scalar loss of a micro-batch."""

    def schedule(self, run: Run, step: int) -> dict[str, float]:
        """Return learning rate `lr` and weight decay `wd` of a step."""

    def validate(self, run: Run, log: RunLog | None, step: int, epoch: int) -> None:
        """Validate and draw pictures; `log` is None on other processes than the main one."""

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds for the task alone."""

    def before_training(self, run: Run, log: RunLog | None) -> None:
        """Do what is due once, before the first step of a call."""
        return

    def before_step(self, run: Run, step: int) -> None:
        """Change what a step needs: frozen weights, momentum."""
        return

    def micro_batches(self, run: Run, batch: Batch) -> Sequence[Batch]:
        """Split a batch into equal micro-batches; called once a step, on all processes."""
        return [batch]

    def export(self, run: Run) -> None:
        """Export the weights alone; called on the main process when a checkpoint is saved."""
        return


def train(run: Run, task: Task, requests: StopRequests) -> None:
    """Do the steps from `run.first_step` to `run.last_step`.

    Raises:
        FloatingPointError: A loss or gradient is not finite; the weights are those of the step before.
        StopRequested: A signal came; all is saved.
        OSError: The disk is full.
    """
    with ExitStack() as stack:
        stack.enter_context(explain_full_disk(run.config.run_folder))
        stack.enter_context(logging_redirect_tqdm())  # log lines above the bar, not in it
        bar = stack.enter_context(progress_bar(run))
        log = None
        if run.processes.is_main:
            log = stack.enter_context(closing(RunLog(run.config, run.first_step, run.is_validated)))
        task.before_training(run, log)
        if not run.is_validated:
            validate_and_save(run, task, log, run.first_step)
        steps = range(run.first_step, run.last_step)
        workers = run.config.dataloader_workers
        loader = make_loader(task.batches, steps, workers, pin_memory=run.processes.device.type != "cpu")
        with requests.handled(at_once=False), loading(loader) as batches:
            take_steps(run, task, batches, log, bar, requests)


def take_steps(
    run: Run, task: Task, batches: Iterator[Batch], log: RunLog | None, bar: Any, requests: StopRequests
) -> None:
    """Take the steps of a run, with validations and checkpoints between them."""
    config, processes = run.config, run.processes
    run.model.train()
    clock = time.perf_counter()
    for step in range(run.first_step, run.last_step):
        batch = next(batches)
        waited = time.perf_counter() - clock
        rates = task.schedule(run, step)
        optim.set_lr_and_decay(run.optimizer, **rates)
        task.before_step(run, step)
        loss, grad_norm = update_or_save_step(run, task, batch, step)
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        done, epoch = step + 1, step // run.steps_per_epoch
        if log:
            speed = len(batch["cases"]) * processes.world_size / seconds
            timing = {"samples_per_second": round(speed, 3), "data_wait": round(waited / seconds, 4)}
            log.write(step, epoch, loss=loss, **rates, grad_norm=grad_norm, **timing)
            bar.set_postfix(loss=f"{loss:.4f}", crops_per_s=f"{speed:.1f}", epoch=epoch)
            bar.update()
        is_due = run.is_due(done)
        save_due = is_due or (config.save_every and done % config.save_every == 0)
        stop = distributed.any_process(bool(requests.pending), processes)
        if save_due or stop:
            save_checkpoint(run, task, log, done, is_validated=not is_due)
        if stop:
            raise StopRequested(
                f"stopped by {requests.pending or 'a signal to another process'} after {done} steps; "
                f"they are saved in {config.run_folder}, and the same command continues"
            )
        if is_due:
            with requests.handled(at_once=True):
                validate_and_save(run, task, log, done)
        if save_due:
            clock = time.perf_counter()  # validations and checkpoints are not part of a step


def validate_and_save(run: Run, task: Task, log: RunLog | None, done: int) -> None:
    """Validate after `done` steps, and save that it has been done."""
    run.model.eval()
    # Compiling the shapes of a validation would take longer than its few calls.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        task.validate(run, log, done - 1, (done - 1) // run.steps_per_epoch)
    run.model.train()
    save_checkpoint(run, task, log, done, is_validated=True)


def save_checkpoint(run: Run, task: Task, log: RunLog | None, done: int, is_validated: bool) -> None:
    """Save metrics, weights and state after `done` steps; the state last, so that it never promises missing files."""
    if log:
        log.sync()
        task.export(run)
        keep = run.config.keep_last if done != run.saved_step else 1  # a second state of one step replaces the first
        checkpoint.save(run.state(done, is_validated, **task.extra_state()), checkpoint_file(run.config), keep)
    run.saved_step = done
    distributed.barrier(run.processes)


def update_or_save_step(run: Run, task: Task, batch: Batch, step: int) -> tuple[float, float]:
    """Update the weights by one step; if a value is not finite, save the state before the step for --replay.

    Returns:
        What `update` returns.

    Raises:
        FloatingPointError: The loss or the gradient is not finite.
    """
    statistics = [(buffer, buffer.clone()) for buffer in run.network.buffers()]  # a forward pass changes them
    try:
        return update(run, task, batch, step)
    except FloatingPointError as error:
        for buffer, before in statistics:
            buffer.copy_(before)
        path = run.config.run_folder / f"nonfinite_step_{step}.pth"
        advice = f"The step is saved: repeat it in fp32 with --replay {path}"
        if run.processes.is_main:
            extra = {"stopped_by": str(error)} | task.extra_state()
            try:
                checkpoint.save(run.state(step, is_validated=True, **extra), path)
            except OSError as disk_error:
                advice = f"The step could not be saved ({disk_error})"
        distributed.barrier(run.processes)  # torchrun ends all processes when the first one has ended
        raise FloatingPointError(f"{error}. {advice}") from None


def progress_bar(run: Run) -> Any:
    """Make the bar of steps, loss, speed and remaining time; silent on other processes than the main one."""
    return tqdm(
        total=run.last_step,
        initial=run.first_step,
        desc=run.config.run_folder.name,
        unit="step",
        disable=not run.processes.is_main,
        dynamic_ncols=True,
    )


def update(run: Run, task: Task, batch: Batch, step: int) -> tuple[float, float]:
    """Update the weights by one step of the optimizer.

    Returns:
        Loss over the global batch, and norm of the gradient before clipping.

    Raises:
        FloatingPointError: One of them is not finite; the weights are unchanged.
    """
    mean_loss = distributed.mean_over_processes(compute_gradient(run, task, batch), run.processes)
    check_finite("loss", mean_loss, step, batch, run.processes)
    norm = clip_gradient(run)
    # With fp16 the scaler skips such a step and lowers its scale, which helps only if the scale was to blame.
    if not run.scaler.is_enabled() or run.scaler.get_scale() <= MIN_LOSS_SCALE:
        check_finite("gradient norm", norm, step, batch, run.processes)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return mean_loss, norm


def compute_gradient(run: Run, task: Task, batch: Batch) -> Tensor:
    """Do forward and backward passes of a batch, and leave the scaled gradient in the weights.

    Returns:
        Scalar loss over this process's shard.
    """
    run.optimizer.zero_grad(set_to_none=True)
    micro_batches = task.micro_batches(run, batch)
    total = torch.zeros((), device=run.processes.device)
    for number, micro_batch in enumerate(micro_batches, start=1):
        with distributed.synchronise_gradients(run.model, number == len(micro_batches)):
            with autocast(run.processes, run.config.precision):
                loss = task.loss(run, micro_batch) / len(micro_batches)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def clip_gradient(run: Run) -> float:
    """Clip the gradient after fp16's scale is taken out; return its norm before clipping."""
    run.scaler.unscale_(run.optimizer)
    return nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip or math.inf).item()


def check_finite(quantity: str, value: float, step: int, batch: Batch, processes: Processes) -> None:
    """Check a value that is the same on all processes.

    Raises:
        FloatingPointError: It is not finite; the message names the step and the cases of all processes.
    """
    if not math.isfinite(value):
        cases = distributed.gather_lists(batch["cases"], processes)
        raise FloatingPointError(
            f"the {quantity} is {value} at step {step} (cases {', '.join(sorted(set(cases)))}). "
            "The weights were not changed by this step and earlier checkpoints are kept. "
            "Look at these cases, lower the learning rate, or use --precision fp32"
        )
