"""Whether training waits for its data: the small CPU recipe on phantoms, as a user runs it."""

import json
import statistics
import tempfile
from pathlib import Path

from measure import in_fresh_process

from hyspark.cli import commands

RECIPE = Path(__file__).parents[1] / "configs" / "pretrain_coarse_cpu.yaml"


def data_wait(steps: int = 12, num_workers: int = 2) -> dict[str, float]:
    """Mean fraction of a step that is spent waiting for its batch, after the first step, in which the workers start;
    and the largest fraction of any of these steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(train, folder, steps, num_workers)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    fractions = [line["data_wait"] for line in map(json.loads, lines) if "data_wait" in line and line["step"] > 0]
    return {"data_wait": statistics.mean(fractions), "largest": max(fractions), "steps": len(fractions)}


def train(folder: str, steps: int, num_workers: int) -> None:
    """The commands a user types."""
    commands.phantom(["--out", f"{folder}/data", "--num_labelled", "0", "--num_unlabelled", "6"])
    commands.datalist(["--data", f"{folder}/data"])
    limits = ["--max_steps", str(steps), "--dataloader_workers", str(num_workers), "--picture_every", "0"]
    commands.pretrain(["--config", str(RECIPE), "--data", f"{folder}/data", "--out", f"{folder}/run", *limits])
