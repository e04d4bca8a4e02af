"""Whole runs on a GPU, as a user starts them: the tests for it, training with its loader, torchrun, prediction."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu_steps import Size
from measure import peak_memory

from data import FLIPS, phantom_file
from hyspark import build_hybird
from hyspark.cli import commands
from hyspark.data.batches.loader import Shard, loading, make_loader
from hyspark.data.batches.volumes import PretrainBatches
from hyspark.data.datasets import datalist_json
from hyspark.data.preprocessing.prepare import prepare_missing, stored_volumes
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.slab_storage import ITEM, SlabStorage
from hyspark.evaluation.segmentation.windows import Windows, class_score_slabs
from hyspark.training.precision import AUTOCAST_DTYPES
from hyspark.utils.processes import available_cores

ROOT = Path(__file__).parents[1]
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b")
REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+::.+?) - (.*)$")
FIRST_STEPS = 5
"""Left out of a run's speed: workers start and kernels are chosen."""


def run_tests(paths: Sequence[str], log: str, passed: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Run the tests with the marker gpu; yields each with its outcome as soon as it is known, reasons at the end.

    Args:
        paths: files and folders of tests.
        log: file for pytest's whole output.
        passed: tests that need not run again.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *paths]
    command += ["-W", "default"]  # what another version of a library warns of is no fault of what is tested
    command += [word for test in passed for word in ("--deselect", test)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "300"}
    outcomes: dict[str, str] = {}
    pipe = {"cwd": ROOT, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with Path(log).open("a") as file, subprocess.Popen(command, **pipe) as process:
        for line in process.stdout:
            file.write(line)
            file.flush()
            if found := OUTCOME.match(line):
                outcomes[found[1]] = found[2].lower()
                yield found[1], {"outcome": found[2].lower(), "reason": None}
            elif found := REASON.match(line):
                yield found[1], {"outcome": outcomes.get(found[1], "error"), "reason": found[2].replace("|", "/")[:200]}
    if process.returncode not in (0, 5):  # 5: none was left to run
        failed = sum(outcome in ("failed", "error") for outcome in outcomes.values())
        raise RuntimeError(f"{failed} tests failed, pytest ended with code {process.returncode}; see {log}")


def make_phantoms(folder: str, number: int, spacing: tuple[float, ...]) -> dict[str, Any]:
    """Write phantom CTs, each by a process of its own, and their data list."""
    images = Path(folder) / "Dataset901_Phantoms" / "imagesTr"
    images.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with ProcessPoolExecutor(min(number, available_cores()), get_context("spawn")) as pool:
        list(pool.map(partial(phantom_file, images, spacing=spacing), range(number)))
    commands.datalist(["--data", folder])
    return {"volumes": number, "s": time.perf_counter() - start}


def training(
    folder: str,
    run: str,
    size: Size,
    spacing: tuple[float, ...],
    *,
    workers: int,
    steps: int,
    precision: str,
    torchrun: bool = False,
) -> dict[str, Any]:
    """Pre-train as a user does, on the phantoms, and read its speed from the run folder.

    Args:
        torchrun: whether one process is started by it, so that it goes through DDP (NCCL on a GPU).
    """
    options = {
        "data": folder,
        "out": run,
        "spacing": spacing,
        "device": size.device,
        "precision": precision,
        "dataloader_workers": workers,
        "max_steps": steps,
        "crop_size": size.edge,
        "epochs": 100 * steps,
        "picture_every": 0,
        "val_fraction": 0,
    } | {NETWORK.get(name, name): value for name, value in size.options.items()}
    words = [w for name, value in options.items() for w in (f"--{name}", *map(str, as_tuple(value)))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] if torchrun else []
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *words], cwd=ROOT, capture_output=True, text=True
    )
    if finished.returncode:
        raise RuntimeError(f"train.py ended with code {finished.returncode}: {finished.stderr.strip()[-1500:]}")
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    taken = [line for line in lines if "samples_per_second" in line]
    taken = taken[FIRST_STEPS:] or taken[-1:]
    return {
        "workers": workers,
        "steps": len(taken),
        "samples/s": statistics.median(line["samples_per_second"] for line in taken),
        "data_wait": statistics.median(line["data_wait"] for line in taken),
        "whole command s": seconds,
    }


NETWORK = {"widths": "encoder_widths", "depths": "encoder_depths"}
"""Names of the network's options among the settings, where they differ."""


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Several values of a flag, or its one."""
    return value if isinstance(value, tuple) else (value,)


def loader(folder: str, size: Size, spacing: tuple[float, ...], workers: int, seconds: float) -> dict[str, Any]:
    """Crops a second of the loader alone, pinned as for training, from the volumes that training has prepared."""
    cases = datalist_json.read_datalist(Path(folder) / "dataset.json").training
    settings, store = PrepareSettings(spacing=spacing), Path(folder) / "prepared"
    prepare_missing(cases, settings, store, 0, progress=False)
    batches = PretrainBatches(stored_volumes(cases, settings, store), Shard(4), (size.edge,) * 3, 4, FLIPS, 0)
    made = make_loader(batches, range(100_000), workers, pin_memory=size.device == "cuda")
    crops = 0
    with loading(made) as found:
        for _ in range(max(1, workers)):
            next(found)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            crops += len(next(found)["cases"])
        rate = crops / (time.perf_counter() - start)
    return {"workers": workers, "crops/s": rate}


def sliding_window(size: Size, shape: Sequence[int], classes: int, precision: str) -> dict[str, Any]:
    """Class scores of one volume by windows that overlap by half, as `hyspark predict` makes them."""
    options = {name: value for name, value in size.options.items() if name != "decoder_width"}
    model = build_hybird(1, classes, size.edge, **options).eval()
    model = model.to(size.device, memory_format=torch.channels_last_3d)
    image, windows = torch.rand(*shape), Windows((size.edge,) * 3)
    if size.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with (
        torch.autocast(size.device, AUTOCAST_DTYPES[precision], enabled=precision != "fp32"),
        SlabStorage(10**12, Path.cwd()) as storage,
    ):
        num = sum(
            slab.numel()
            for _, slab in class_score_slabs(model, image[None], windows, torch.device(size.device), storage)
        )
    return {
        "s": time.perf_counter() - start,
        "GPU peak GB": torch.cuda.max_memory_allocated() / 1e9 if size.device == "cuda" else None,
        "resident peak GB": peak_memory() / 1e9,
        "class scores GB": num * ITEM / 1e9,
    }
