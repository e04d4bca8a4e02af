"""A run is a folder: resolved settings, metrics, TensorBoard; the same command on it continues."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hyspark.atomic import write_whole
from hyspark.config import FinetuneConfig, PretrainConfig
from hyspark.data.cases import Case
from hyspark.data.prepare import prepare_all, wait_for_all
from hyspark.data.store import StoredVolume
from hyspark.engine import checkpoint
from hyspark.engine.distributed import Processes
from hyspark.recipes import as_plain, differences, write_yaml

Config = PretrainConfig | FinetuneConfig


def data_text(training: Sequence[Case], validation: Sequence[Case]) -> str:
    """The data of a run in a few words, with a digest of the names: the order of batches is a function of them."""
    names = "\n".join([*(c.name for c in training), "", *(c.name for c in validation)])
    digest = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{len(training)} training and {len(validation)} validation cases ({digest})"


def saved_state(config: Config, data: str, own: Path, other: str = "") -> dict[str, Any] | None:
    """The state that a run continues from: its own file, else the file `other` where one is named, else None.

    data: the `data_text` of this run. Raises ValueError where the state belongs to other settings or data, and what
    `read_training_state` raises.
    """
    path = own if own.is_file() else Path(other)
    if not own.is_file() and not other:
        return None
    state = checkpoint.read_training_state(path)
    changed = differences(state["config"], config)
    if state["data"] != data:
        changed.append(f"data: was {state['data']}, is {data}")
    if changed:
        raise ValueError(
            f"{path} holds a run with other settings or data; "
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


def prepared(
    config: Config, processes: Processes, data: Path, training: Sequence[Case], validation: Sequence[Case]
) -> tuple[list[StoredVolume], list[StoredVolume]]:
    """Training and validation volumes in the store; one process of each machine makes what is missing.

    data: folder of the data, or its JSON.
    """
    store = store_folder(config, data)
    prepare = prepare_all if processes.local_rank == 0 else wait_for_all
    volumes = prepare([*training, *validation], config, store, config.prepare_workers, processes.is_main)
    return volumes[: len(training)], volumes[len(training) :]


class RunLog:
    """Writes metrics.jsonl and TensorBoard in a run folder; for the main process only.

    Opening it at a step drops what was written from that step on by an interrupted run.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self.folder = config.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, self.folder / "config.yaml")
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if keeps(line, first_step)]
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

    def close(self) -> None:
        """Flush and close both."""
        self.metrics.close()
        self.board.close()


def keeps(line: str, first_step: int) -> bool:
    """Whether a line of metrics is whole and from before `first_step`. What was measured before all steps has the step
    -1 and is made again with step 0.
    """
    try:
        return bool(max(json.loads(line)["step"], 0) < first_step)
    except (ValueError, KeyError, TypeError):
        return False
