"""A run is a folder: resolved settings, metrics, TensorBoard; the same command on it continues."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from hyspark.atomic import write_whole
from hyspark.config import FinetuneConfig, PretrainConfig
from hyspark.data.cases import Case
from hyspark.data.prepare import prepare_missing, stored, unusable
from hyspark.data.store import StoredVolume
from hyspark.engine import checkpoint, distributed
from hyspark.engine.distributed import LOG, Processes
from hyspark.engine.signals import Requests, requests
from hyspark.recipes import as_plain, differences, write_yaml

Config = PretrainConfig | FinetuneConfig
WAIT_FOR_LOCK = 3.0
"""Seconds that a killed process of the same run has to end."""


def data_text(training: Sequence[Case], validation: Sequence[Case]) -> str:
    """The data of a run in a few words, with a digest of the names: the order of batches is a function of them."""
    names = "\n".join([*(c.name for c in training), "", *(c.name for c in validation)])
    digest = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{len(training)} training and {len(validation)} validation cases ({digest})"


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
        lock.acquire(timeout=WAIT_FOR_LOCK)
    except Timeout:
        raise ValueError(f"another process is writing to {folder}; wait for it, or name another run folder") from None
    try:
        yield
    finally:
        lock.release()


def saved_state(config: Config, own: Path, other: str = "") -> dict[str, Any] | None:
    """The state that a run continues from: the newest whole one of its own, else that of the file `other` where one is
    named, else None.

    Raises ValueError where the state belongs to other settings, and what `read_newest` raises.
    """
    state, damaged = checkpoint.read_newest(own)
    for reason in damaged:
        LOG.warning("%s; going on from the state before it", reason)
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


def store_folder(config: Config, data: Path) -> Path:
    """Where prepared volumes lie: in the data's folder, or beside its JSON, unless the settings name another place."""
    return Path(config.store_dir) if config.store_dir else (data if data.is_dir() else data.parent) / "prepared"


def prepared(config: Config, processes: Processes, data: Path, cases: Sequence[Case]) -> list[StoredVolume]:
    """Volumes of the cases in the store; one process of each machine makes what is missing.

    data: folder of the data, or its JSON. Raises ValueError that lists all cases that cannot be used.
    """
    failed = prepare_once(config, processes, data, cases)
    if failed:
        raise ValueError(unusable(failed, len(cases)))
    return stored(cases, config, store_folder(config, data))


def prepare_once(config: Config, processes: Processes, data: Path, cases: Sequence[Case]) -> dict[str, tuple[str, ...]]:
    """Make what is missing in each machine's store; why cases cannot be used, by image, on any machine."""
    store = store_folder(config, data)
    workers, progress = config.prepare_workers, processes.is_main
    work = partial(prepare_missing, cases, config, store, workers, progress)
    return {image: why for failed in distributed.once_per_machine(work, processes) for image, why in failed.items()}


@dataclass(frozen=True)
class Usable:
    """The cases of a run that can be used, with their volumes, and the names of those that were left out."""

    training: list[StoredVolume]
    validation: list[StoredVolume]
    validation_cases: list[Case]
    left_out: list[str]


def left_out_text(names: Sequence[str]) -> str:
    """The cases left out, for reports."""
    return f"{len(names)}: {', '.join(names)}" if names else "none"


def usable(
    config: Config,
    processes: Processes,
    data: Path,
    training: Sequence[Case],
    validation: Sequence[Case],
    state: dict[str, Any] | None,
    fault: Callable[[StoredVolume], str] = lambda volume: "",
) -> Usable:
    """Prepare the data of a run, and treat broken cases as on_bad_case says.

    state: that the run continues from. fault: what is wrong with a prepared volume, or nothing. Raises ValueError that
    lists all broken cases; where nothing is left to train on, or to validate on where there was something; where a
    continued run was begun with other cases, or had left out others.
    """
    cases = [*training, *validation]
    if state and state["data"] != data_text(training, validation):
        raise ValueError(
            f"the run was begun on other data; name another run folder, or use the same to continue it:\n"
            f"  data: was {state['data']}, is {data_text(training, validation)}"
        )
    failed = prepare_once(config, processes, data, cases)
    whole = [case for case in cases if str(case.image) not in failed]
    volumes = dict(zip(whole, stored(whole, config, store_folder(config, data)), strict=True))
    failed |= {str(c.image): (f"{c.image}: {why}",) for c in whole if (why := fault(volumes[c]))}
    if failed and config.on_bad_case == "stop":
        raise ValueError(unusable(failed, len(cases)))
    train_on, validate_on = ([c for c in part if str(c.image) not in failed] for part in (training, validation))
    left_out = [case.name for case in cases if str(case.image) in failed]
    if failed:
        lines = "\n  ".join(line for lines in failed.values() for line in lines)
        LOG.warning("%d of %d volumes cannot be used and are left out:\n  %s", len(failed), len(cases), lines)
    if not train_on or (validation and not validate_on):
        raise ValueError(f"what is left out leaves {len(train_on)} to train on and {len(validate_on)} to validate on")
    if state and state["left_out"] != left_out:
        raise ValueError(
            f"this run was begun without the cases {state['left_out']}, now those that cannot be used are {left_out}; "
            "the batches would be others. Restore the files as they were, or name another run folder"
        )
    return Usable([volumes[c] for c in train_on], [volumes[c] for c in validate_on], validate_on, left_out)


@contextmanager
def begun(config: Config, processes: Processes, model: nn.Module, state_file: Path) -> Iterator[Requests]:
    """What a run needs around it: its folder for itself, room on the disk, the other processes, an ear for signals.

    Raises ValueError or OSError for a folder that is taken, or too full a disk.
    """
    if config.deterministic:
        distributed.make_deterministic()
    with requests() as asked, locked(config, processes), distributed.connected(processes):
        if processes.is_main:
            checkpoint.remove_unfinished(state_file)
            checkpoint.set_damaged_aside(state_file)
            checkpoint.check_space(state_file, model.parameters(), config.keep_last)
        yield asked


class RunLog:
    """Writes metrics.jsonl and TensorBoard in a run folder; for the main process only.

    Opening it at a step drops what was written from that step on by an interrupted run, and the review of the step
    before where that is still to be done.
    """

    def __init__(self, config: Config, first_step: int, is_reviewed: bool) -> None:
        self.folder = config.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, self.folder / "config.yaml")
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if keeps(line, first_step, is_reviewed)]
            write_whole(path, "".join(f"{line}\n" for line in kept).encode())
        self.metrics = path.open("a")
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, epoch: int, **values: Any) -> None:
        """One line of metrics, and its numbers to TensorBoard. Nested dictionaries become groups there."""
        self.metrics.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                self.board.add_scalar(f"{name}/{part}" if part else name, number, step)

    def sync(self) -> None:
        """Have the disk hold what was written."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())

    def close(self) -> None:
        """Flush and close both."""
        self.metrics.close()
        self.board.close()


def keeps(line: str, first_step: int, is_reviewed: bool) -> bool:
    """Whether a line of metrics is whole and of what is done before `first_step`; is_reviewed: whether that includes
    the review after the step before. What was measured before all steps has the step -1 and is made again with step 0.
    """
    try:
        values = json.loads(line)
        step = max(values["step"], 0)
        is_review = values["step"] == first_step - 1 and "loss" not in values
        return bool(step < first_step and (is_reviewed or not is_review))
    except (ValueError, KeyError, TypeError):
        return False
