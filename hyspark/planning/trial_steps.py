"""Trial steps: what a step of a task takes in time and memory, by taking a few on random crops.

On the CPU they are taken in a process of their own, whose peak of resident memory is theirs alone and which may run
out of memory without harm.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch import nn

from hyspark.config.recipes import Config
from hyspark.data.batches.loader import Batch
from hyspark.training import memory, optim
from hyspark.training.distributed import Processes
from hyspark.training.loop import Task, make_run, update

REPEATS, SHORT = 3, 1.0
"""The fastest of so many steps counts, where a step takes less than so many seconds."""
PATIENCE = 5.0
"""More crops than in the first two trials are tried where a step is expected to take at most so many seconds."""
RESERVE = 0.2
"""Share of the free memory that steps of more crops than those leave alone."""


@dataclass(frozen=True)
class Trial:
    """A step of so many crops: seconds, and the peak of memory until then in bytes (None where it is not known)."""

    crops: int
    seconds: float
    peak: int | None


def try_steps(
    config: Config,
    processes: Processes,
    make: Callable[[], nn.Module],
    task: Task,
    make_batch: Callable[[int], Batch],
    most: int,
    free: int | None,
    least: int = 1,
) -> list[Trial]:
    """Trials of 1, 2, 4, ... crops up to `most`, from `least` on, at least of two numbers; fewer where memory ran out.

    make: the model, fresh. make_batch: a batch of so many crops. All of this must be picklable. free: bytes that may be
    taken. least: crops that a step needs. Raises RuntimeError where a step fails for another reason than memory.
    """
    args = (config, processes, make, task, make_batch, most, free, least)
    return list(trials(*args)) if processes.device.type != "cpu" else in_fresh_process(*args)


def trials(
    config: Config,
    processes: Processes,
    make: Callable[[], nn.Module],
    task: Task,
    make_batch: Callable[[int], Batch],
    most: int,
    free: int | None,
    least: int = 1,
) -> Iterator[Trial]:
    """The trials, in this process; they end where memory runs out."""
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

        seconds(make_batch(least))  # the first step of all makes the optimizer's state
        for number, crops in enumerate(sizes(most, least)):
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


def sizes(most: int, least: int = 1) -> list[int]:
    """`least`, twice that and so on, and `most` itself; always the first two."""
    doubled = [least * 2**k for k in range(2, most.bit_length()) if least * 2**k < most]
    return sorted({least, 2 * least, *doubled, max(most, least)})


def is_cheap(found: Sequence[Trial], crops: int, free: int | None) -> bool:
    """Whether a step of so many crops should take little time and leave some memory, by the trials before it."""
    seconds = extrapolated([(t.crops, t.seconds) for t in found], crops)
    peaks = [(t.crops, t.peak) for t in found if t.peak is not None]
    return seconds <= PATIENCE and (free is None or not peaks or extrapolated(peaks, crops) <= (1 - RESERVE) * free)


def extrapolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Value at x of the straight line through the last two points; of the only point where there is one."""
    (x1, y1), (x2, y2) = points[-2:] if len(points) > 1 else [points[0]] * 2
    return y2 if x == x2 or x1 == x2 else y2 + (x - x2) * (y2 - y1) / (x2 - x1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out; on the CPU it has no class of its own.

    The second text is what oneDNN says where it gets no memory for the code or the tables of a kernel.
    """
    message = str(error)
    without_class = "alloc" in message or message == "could not create a primitive"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or without_class


def in_fresh_process(*args: Any) -> list[Trial]:
    """What `trials` gives, taken in a new process. One that the system kills counts as one that ran out of memory."""
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
        raise RuntimeError("a trial step failed; its traceback stands above")
    return received


def send_trials(sender: Connection, threads: int, *args: Any) -> None:
    """Work of the new process: each trial is sent as soon as it is done."""
    torch.set_num_threads(threads)
    limit_memory(args[-2])
    with sender:
        for trial in trials(*args):
            sender.send(trial)


def limit_memory(free: int | None) -> None:
    """Let an allocation fail that goes beyond `free` bytes, rather than have Linux end some process."""
    used = getattr(psutil.Process().memory_info(), "data", None)  # Linux and other Unix systems only
    if free is None or used is None:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + free if hard == resource.RLIM_INFINITY else min(used + free, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
