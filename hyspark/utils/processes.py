"""Processes that help a run: they leave signals to it, and end with it, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


T = TypeVar("T")
ASKING = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Signals that ask a run to stop. Schedulers send them to all processes of a job; only the run itself heeds them."""


@contextmanager
def pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes of one thread each. Where the block is left early, what has not begun is not done."""
    # spawn: a forked child of a process with OpenMP threads may hang in its first parallel region.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_workers, context, be_helper)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def as_done(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], num_workers: int) -> Iterator[T]:
    """What a function returns for each job, as they get done; one worker, or one job, is this process itself."""
    if min(num_workers, len(jobs)) <= 1:
        yield from (function(*job) for job in jobs)
        return
    with pool(min(num_workers, len(jobs))) as processes:
        for future in as_completed([processes.submit(function, *job) for job in jobs]):
            try:
                yield future.result()
            except BrokenProcessPool as error:
                raise OSError(
                    "a process that prepared volumes was killed, perhaps for its memory; lower --prepare_workers"
                ) from error


def be_helper() -> None:
    """First thing in a process of the pool."""
    torch.set_num_threads(1)
    ignore_signals()
    threading.Thread(target=end_with_parent, daemon=True).start()


def ignore_signals(worker: int = 0) -> None:
    """Leave signals to the run. worker: number of a loader's process, which gives it."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Wait for the parent's end; a pool's processes would otherwise wait for work from a killed one for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
