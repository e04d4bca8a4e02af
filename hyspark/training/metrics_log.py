"""metrics.jsonl and TensorBoard of a run."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hyspark.config.recipes import Config, write_yaml


class RunLog:
    """The metrics.jsonl and the TensorBoard of a run folder; for the main process only.

    Opening it at a step drops the lines that an interrupted run has written from that step on. It also drops the
    validation after the step before, if that has to be repeated.
    """

    def __init__(self, config: Config, first_step: int, is_validated: bool) -> None:
        self.folder = config.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, self.folder / "config.yaml")
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            drop_lines(path, first_step, is_validated)
        self.metrics = path.open("a")
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, epoch: int, **values: Any) -> None:
        """Write a line of metrics, and its numbers to TensorBoard, where nested dictionaries become groups."""
        self.metrics.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                self.board.add_scalar(f"{name}/{key}" if key else name, number, step)

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())

    def close(self) -> None:
        """Flush and close both."""
        self.metrics.close()
        self.board.close()


def drop_lines(path: Path, first_step: int, is_validated: bool) -> None:
    """Drop the lines that `is_valid_line` rejects, line by line: a long run has millions."""
    kept = path.with_name(f".{path.name}.kept")
    with path.open(errors="replace") as lines, kept.open("w") as file:
        file.writelines(f"{line.rstrip()}\n" for line in lines if is_valid_line(line, first_step, is_validated))
        file.flush()
        os.fsync(file.fileno())
    os.replace(kept, path)


def is_valid_line(line: str, first_step: int, is_validated: bool) -> bool:
    """Return whether a line of metrics is complete, and of work done before `first_step`.

    Args:
        line: JSON. A measurement before all steps has the step -1, and is repeated with step 0.
        first_step: Step that a run continues at.
        is_validated: Whether the validation after the step before has been done.
    """
    try:
        values = json.loads(line)
        step = max(values["step"], 0)
        is_last_validation = values["step"] == first_step - 1 and "loss" not in values
        return bool(step < first_step and (is_validated or not is_last_validation))
    except (ValueError, KeyError, TypeError):
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl file, without a last line cut short by an interruption.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another line is not a JSON object.
    """
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `read_metrics` one by one."""
    failed = None
    with Path(path).open("rb") as lines:
        for number, line in enumerate((line for line in lines if line.strip()), start=1):
            if failed:
                raise failed
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError(f"a {type(entry).__name__}")
            except ValueError as error:
                failed = ValueError(
                    f"{path}: expected one JSON object a line, got {line[:80]!r} as entry {number} ({error}); "
                    "remove that line"
                )
                continue
            yield entry
