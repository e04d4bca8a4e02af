"""The two stages of the GPU study: pre-training for half of the time, fine-tuning seed by seed for the rest."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import study_data
import study_results
from measure import machine
from study_time import Budget, Limit, OutOfTimeError, epochs_that_fit, seeds_at_once, time_limit, warmup_of

from hyspark.comparison.benefit import run_comparison
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import read_yaml
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.batches.loader import Shard
from hyspark.models.weights.export import export_weights
from hyspark.planning.plan import crops_per_process
from hyspark.planning.trial_steps import iterate_trials
from hyspark.tasks import pretrain as tasks_pretrain
from hyspark.tasks.masked_task import MaskedTask
from hyspark.training.distributed import find_processes
from hyspark.training.run_folder import checkpoint_file, steps_per_epoch
from hyspark.training.run_volumes import prepare_run_volumes
from hyspark.training.signals import STOPPED
from hyspark.utils.atomic import write_json

PATCH = 16
TOY = {
    "encoder_widths": (6, 6, 12, 12, 24),
    "encoder_depths": (1, 1, 1, 1, 1),
    "expansions": (2, 2, 2, 2, 2),
    "vit_depth": 1,
    "decoder_width": 16,
    "precision": "fp32",
    "prepare_workers": 1,
    "dataloader_workers": 0,
    "crops_per_volume": 1,
}
"""Settings of both recipes on the CPU."""
TOY_PRETRAIN = {"crop_size": (32,), "batch_size": 2}
TOY_FINETUNE = {
    **{"crop_size": (32,), "decoder_min_width": 0, "infer_overlap": 0.0},
    **{"steps_per_epoch": 2, "epochs": 2, "val_every": 2, "warmup_epochs": 1},
    **{"left_right": (), "flip_prob": (0.0, 0.0, 0.0)},
}


def run(arguments: Any, budget: Budget) -> int:
    """Do what is missing of the study until it is complete or the time is up; returns the exit code.

    Args:
        arguments: of the command line (see gpu_study.py).
        budget: time of this call.
    """
    data, out = Path(arguments.data), Path(arguments.out)
    found = study_data.read_manifest(data)
    study_results.restore(out)
    pretraining, finetuning = settings(arguments, found)
    shared = describe(arguments, found, pretraining)
    calls = study_results.calls_before(out)

    def write(ended: str) -> dict[str, Any]:
        seconds = time.monotonic() - budget.begun
        account = {"device": arguments.device, "minutes": arguments.minutes, "seconds": seconds, "ended": ended}
        return study_results.write(out, shared, [*calls, account])

    failed: list[str] = []
    limit = Limit()
    try:
        with time_limit(budget.left(time.monotonic())) as limit:
            pretrain(pretraining, out, budget)
            write("pre-training is finished")
            failed = finetune(finetuning, out, arguments, partial(write, "fine-tuning"))
        ended = f"failed: {', '.join(failed)}" if failed else "complete"
    except (OutOfTimeError, SystemExit, KeyboardInterrupt):
        if not limit.is_over:  # somebody else asked to stop
            write("stopped")
            raise
        ended = "out of time"
    content = write(ended)
    print(f"{ended}; {content['fine_tuning']['finished']} fine-tuning runs finished; results in {out / 'results'}")
    if failed:
        return 1
    return 0 if content["pretraining"]["weights_mb"] else STOPPED


def settings(arguments: Any, found: dict[str, Any]) -> tuple[PretrainConfig, SegmentationConfig]:
    """Read both recipes, and put the folders and the data's spacing in."""
    data, out = Path(arguments.data), Path(arguments.out)
    where: dict[str, Any] = {"store_dir": str(out / "store"), "spacing": tuple(found["spacing_mm"])}
    where["device"] = arguments.device
    toy = arguments.device == "cpu"
    pretraining: dict[str, Any] = read_yaml(arguments.pretrain_config, PretrainConfig)
    pretraining |= where | (TOY | TOY_PRETRAIN if toy else {})
    pretraining |= {"data": str(data), "out": str(out / "pretrain")}
    finetuning: dict[str, Any] = read_yaml(arguments.finetune_config, SegmentationConfig)
    finetuning |= where | (TOY | TOY_FINETUNE if toy else {}) | {"data": str(data / found["labelled"])}
    return PretrainConfig(**pretraining), SegmentationConfig(**finetuning)


def describe(arguments: Any, found: dict[str, Any], config: PretrainConfig) -> dict[str, Any]:
    """Collect machine, data and settings as study.json shows them."""
    spacing = found["spacing_mm"]
    data = found | {"patch_mm": [PATCH * mm for mm in spacing]}
    data["crop_mm"] = [n * mm for n, mm in zip(config.crop_shape, spacing, strict=True)]
    asked = {name: getattr(arguments, name) for name in ("jobs", "num_labelled", "max_seeds")}
    return {"machine": machine(), "is_toy": arguments.device == "cpu", "settings": asked, "data": data}


def pretrain(config: PretrainConfig, out: Path, budget: Budget) -> None:
    """Pre-train, or continue, with as many epochs as fit the first half of the time; write the weights at the end."""
    weights = study_results.folder_of(out) / study_results.WEIGHTS
    if weights.is_file():
        return
    path = out / study_results.PLAN
    if not path.is_file():
        write_json(path, plan(config, budget))
    chosen = json.loads(path.read_text())
    config = replace(config, epochs=chosen["epochs"], warmup_epochs=chosen["warmup_epochs"])
    tasks_pretrain.run_pretraining(config)
    export_weights(checkpoint_file(config), weights, decoder=True)


def plan(config: PretrainConfig, budget: Budget) -> dict[str, Any]:
    """Prepare the volumes, measure a step, choose the epochs; raises OSError where a step does not fit the memory."""
    processes = find_processes(config.device)
    training, validation = tasks_pretrain.find_pretraining_cases(config)
    clock = time.monotonic()
    prepare_run_volumes(config, processes, Path(config.data), training, validation)
    preparing = time.monotonic() - clock
    crops = crops_per_process(config, processes)
    task = MaskedTask(config, Shard(config.batch_size, 0, 1), [], [])
    make = partial(tasks_pretrain.initialise_pretraining, config)
    trial = next(iterate_trials(config, processes, make, task, task.random_batch, crops, None, crops), None)
    if trial is None:
        raise OSError(
            f"--pretrain_config: expected a step of {crops} crops to fit the memory, but it does not; lower batch_size"
        )
    steps = steps_per_epoch(config, len(training))
    epochs = epochs_that_fit(budget.left_of_first_half(time.monotonic()), trial.seconds, steps)
    return {
        "num_parameters": sum(p.numel() for p in make().parameters()),
        "preparing_seconds": preparing,
        "crops_per_step": crops,
        "trial_step_seconds": trial.seconds,
        "peak_memory_bytes": trial.peak,
        "steps_per_epoch": steps,
        "epochs": epochs,
        "warmup_epochs": warmup_of(epochs),
        "total_steps": epochs * steps,
    }


def finetune(config: SegmentationConfig, out: Path, arguments: Any, after_report: Any) -> list[str]:
    """Compare random with pre-trained weights, a few more seeds at a time; returns the names of failed runs."""
    weights = study_results.folder_of(out) / study_results.WEIGHTS
    starts = {"scratch": "none", "pretrained": str(weights)}
    step = seeds_at_once(arguments.jobs, len(starts) * len(arguments.num_labelled))
    for seeds in range(step, arguments.max_seeds + step, step):
        wanted = range(min(seeds, arguments.max_seeds))
        where = (out / "benefit", starts, arguments.num_labelled, wanted)
        if failed := run_comparison(config, *where, num_at_once=arguments.jobs, after_report=after_report):
            return failed
    return []
