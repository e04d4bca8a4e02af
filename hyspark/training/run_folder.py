"""A run is a folder: resolved settings, metrics, TensorBoard; the same command on it continues."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from hyspark.config.classification import ClassificationConfig
from hyspark.config.recipes import Config, as_plain, differences
from hyspark.config.segmentation import SegmentationConfig
from hyspark.training import checkpoint, distributed
from hyspark.training.distributed import Processes
from hyspark.training.signals import Requests, requests
from hyspark.utils.log import LOG

WAIT_FOR_LOCK = 10.0
"""Seconds that a stopped process of the same run, or the loader processes of a killed one, have to end."""


@contextmanager
def locked(config: Config, processes: Processes) -> Iterator[None]:
    """The run folder for this run alone; the system opens the lock of a process that ends, however it ends.

    Raises ValueError where another process holds it.
    """
    if not processes.is_main:
        yield
        return
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            LOG.info("another process is writing to %s; waiting up to %.0f s for its end", folder, WAIT_FOR_LOCK)
            lock.acquire(timeout=WAIT_FOR_LOCK)
    except Timeout:
        raise ValueError(f"another process is writing to {folder}; wait for it, or name another run folder") from None
    try:
        yield
    finally:
        lock.release()


def last_file(config: SegmentationConfig | ClassificationConfig) -> Path:
    """The state that a fine-tuning continues from."""
    return config.run_folder / "last.pth"


def steps_per_epoch(config: SegmentationConfig | ClassificationConfig, num_training: int) -> int:
    """Of a fine-tuning: as set, or the steps in which every training case comes at least once."""
    return config.steps_per_epoch or math.ceil(num_training / config.batch_size)


def saved_state(config: Config, own: Path, other: str = "") -> dict[str, Any] | None:
    """The state that a run continues from: the newest whole one of its own, else that of the file `other` where one is
    named, else None.

    Raises ValueError where the state belongs to other settings, and what `read_newest` raises.
    """
    state, _ = checkpoint.read_newest(own)
    if state is None and not other:
        return None
    path = own
    if state is None:
        path = Path(other)
        state = checkpoint.read_training_state(path)
    if changed := differences(state["config"], config):
        raise ValueError(
            f"{path} holds a run with other settings; "
            "name another run folder, or use the same to continue it:\n  " + "\n  ".join(changed)
        )
    return state


def settings_text(config: Config, processes: Processes, **lines: str) -> str:
    """The resolved settings and what the run works on, for the terminal."""
    settings = [f"  {name}: {value}" for name, value in as_plain(config).items()]
    lines |= {"device": processes.text(config.precision), "run": str(config.run_folder)}
    return "\n".join([*settings, *(f"{name:8s} {text}" for name, text in lines.items())])


@contextmanager
def begun(config: Config, processes: Processes, model: nn.Module, state_file: Path) -> Iterator[Requests]:
    """What a run needs around it: its folder for itself, room on the disk, the other processes, an ear for signals.
    A replay, which writes nothing, needs none of it.

    Raises ValueError or OSError for a folder that is taken, or too full a disk.
    """
    with requests() as asked:
        if config.replay:
            yield asked
            return
        with locked(config, processes), distributed.connected(processes):
            if processes.is_main:
                checkpoint.remove_unfinished(config.run_folder)
                checkpoint.set_damaged_aside(state_file)
                checkpoint.check_space(state_file, model.parameters(), config.keep_last)
            distributed.barrier(processes)
            yield asked
