"""metrics.jsonl and TensorBoard of a run."""

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hyspark.config.recipes import Config, write_yaml
from hyspark.utils.atomic import write_whole


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl file; a last line torn by an interruption is left out.

    Raises FileNotFoundError when there is no file, ValueError when any other line is not a JSON object.
    """
    lines = [line for line in Path(path).read_bytes().splitlines() if line.strip()]
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError(f"a {type(entry).__name__}")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}: expected one JSON object a line, got {line[:80]!r} as entry {number} ({error}); "
                "remove that line"
            ) from error
        metrics.append(entry)
    return metrics
