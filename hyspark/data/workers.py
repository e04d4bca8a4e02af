"""Processes that help a run: they leave signals to it, and end with it, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

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
