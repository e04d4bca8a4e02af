"""Trial steps: measure time and memory of a few steps of a task on random crops.

On the CPU they run in a process of their own. Its peak of resident memory is theirs alone, and it may run out of memory
without harm.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from hyspark.config.recipes import Config
from hyspark.data.batches.loader import Batch
from hyspark.training import memory, optim
from hyspark.training.distributed import Processes
from hyspark.training.loop import Task, update
from hyspark.training.run import make_run
from hyspark.utils.free_memory import is_out_of_memory

REPEATS, SHORT = 3, 1.0
"""Repetitions, of which the fastest counts, of steps that take less than this number of seconds."""
PATIENCE = 5.0
"""Longest expected seconds of a step with more crops than the first two trials."""
RESERVE = 0.2
"""Fraction of the free memory that steps with more crops than the first two trials do not use."""


@dataclass(frozen=True)
class Trial:
    """Measured step.

    Attributes:
        crops: number of crops.
        seconds: time of the step.
        peak: peak of memory until then in bytes; None if unknown.
    """

    crops: int
    seconds: float
    peak: int | None


def run_trials(
    config: Config,
    processes: Processes,
    make: Callable[[], nn.Module],
    task: Task,
    make_batch: Callable[[int], Batch],
    most: int,
    free: int | None,
    least: int = 1,
) -> list[Trial]:
    """Run trial steps with `least`, 2 * `least`, 4 * `least`, ... crops, up to `most` but at least two.

    All arguments must be picklable.

    Args:
        config: settings of the run.
        processes: this process among the others.
        make: builds the randomly initialised model.
        task: the task.
        make_batch: builds a batch with the given number of crops.
        most: largest number of crops.
        free: bytes that may be used; None if unknown.
        least: smallest number of crops of a step.

    Returns:
        The trials, fewer if memory ran out.

    Raises:
        RuntimeError: a step failed for another reason than memory.
    """
    args = (config, processes, make, task, make_batch, most, free, least)
    return list(iterate_trials(*args)) if processes.device.type != "cpu" else run_in_subprocess(*args)


def iterate_trials(
    config: Config,
    processes: Processes,
    make: Callable[[], nn.Module],
    task: Task,
    make_batch: Callable[[int], Batch],
    most: int,
    free: int | None,
    least: int = 1,
) -> Iterator[Trial]:
    """Iterate over the trials, in this process, until memory runs out; arguments as in `run_trials`."""
    found: list[Trial] = []
    try:
        alone = replace(processes, rank=0, world_size=1, by_torchrun=False)
        run = make_run(config, "", alone, make(), steps_per_epoch=1, state=None)
        run.model.train()
        optim.set_lr_and_decay(run.optimizer, lr=0.0, wd=0.0)

        def seconds(batch: Batch) -> float:
            start = time.perf_counter()
            update(run, task, batch, step=0)
            memory.synchronise_device(alone)
            return time.perf_counter() - start

        seconds(make_batch(least))  # the very first step allocates the optimizer's state
        for number, crops in enumerate(crop_counts(most, least)):
            if number > 1 and not is_cheap(found, crops, free):
                return
            batch = make_batch(crops)
            if processes.device.type != "cpu":
                seconds(batch)  # the first step of a size chooses kernels
            taken = [seconds(batch)]
            while len(taken) < REPEATS and taken[0] < SHORT:
                taken.append(seconds(batch))
            found.append(Trial(crops, min(taken), memory.peak_memory(alone)))
            yield found[-1]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


def crop_counts(most: int, least: int = 1) -> list[int]:
    """List `least`, its doubles below `most`, and `most` itself; always the first two."""
    doubled = [least * 2**k for k in range(2, most.bit_length()) if least * 2**k < most]
    return sorted({least, 2 * least, *doubled, max(most, least)})


def is_cheap(found: Sequence[Trial], crops: int, free: int | None) -> bool:
    """Whether the trials so far predict that a step takes little time and leaves some memory free."""
    seconds = extrapolate([(t.crops, t.seconds) for t in found], crops)
    peaks = [(t.crops, t.peak) for t in found if t.peak is not None]
    return seconds <= PATIENCE and (free is None or not peaks or extrapolate(peaks, crops) <= (1 - RESERVE) * free)


def extrapolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Compute the value at x of the line through the last two points, or the value of a single point."""
    (x1, y1), (x2, y2) = points[-2:] if len(points) > 1 else [points[0]] * 2
    return y2 if x == x2 or x1 == x2 else y2 + (x - x2) * (y2 - y1) / (x2 - x1)


def run_in_subprocess(*args: Any) -> list[Trial]:
    """Run `iterate_trials` in a new process; one that the system kills counts as one that ran out of memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_trials, args=(sender, torch.get_num_threads(), *args))
    process.start()
    sender.close()
    received: list[Trial] = []
    with receiver, suppress(EOFError):
        while True:
            received.append(receiver.recv())
    process.join()
    if process.exitcode is not None and process.exitcode > 0:
        raise RuntimeError("a trial step failed; see its traceback above")
    return received


def send_trials(sender: Connection, threads: int, *args: Any) -> None:
    """Send each trial as soon as it is done; this is the work of the new process."""
    torch.set_num_threads(threads)
    limit_memory(args[-2])
    with sender:
        for trial in iterate_trials(*args):
            sender.send(trial)


def limit_memory(free: int | None) -> None:
    """Let allocations beyond `free` bytes fail, so that Linux does not kill some process instead."""
    used = memory.data_memory()
    if free is None or used is None:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + free if hard == resource.RLIM_INFINITY else min(used + free, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
