"""One training by nnU-Net on a subset of the labelled cases, scored as runs of `hyspark finetune` are.

nnU-Net reads folders that environment variables name. A run has its own, in RUN/nnunet: prepared data, which are links
to the user's, a plan, and a splits_final.json with the cases of this run; and results. So any trainer of nnU-Net trains
on these cases. A run is a process of its own, since the variables and the seeds are of the whole process.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from nibabel.affines import voxel_sizes

from hyspark.config.nnunet_training import OWN_TRAINER, NnunetTrainingConfig
from hyspark.config.recipes import as_plain, read_yaml
from hyspark.data.datasets.cases import cases_digest
from hyspark.data.datasets.splits import NNUNET_SPLITS
from hyspark.data.readers.nifti import read_label
from hyspark.evaluation.each_case import work_on_each
from hyspark.evaluation.protocol import DATA_DIGEST, TRAINED_ON
from hyspark.evaluation.segmentation.metrics import OrganScores, score_case
from hyspark.evaluation.segmentation.scores import organ_score_table, summary_text, write_segmentation_scores
from hyspark.evaluation.segmentation.scoring_protocol import NSD_TOLERANCE
from hyspark.models.weights.model_folder import weights_file
from hyspark.training import distributed
from hyspark.training.labelled_cases import RunCases
from hyspark.training.metrics_log import drop_lines
from hyspark.training.nnunet_data import (
    LINKED,
    PreparedData,
    check_prepared,
    find_cases_of_fold,
    find_prepared,
)
from hyspark.training.nnunet_run import READ, RECIPE, WEIGHTS
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.install import PACKAGE, extra_error
from hyspark.utils.locks import lock_folder
from hyspark.utils.log import LOG
from hyspark.utils.paths import load_json

SPLIT_KEYS = {"train": "training", "val": "validation"}
"""Parts of nnU-Net's split, with those of a run's cases."""
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
"""Checkpoints of nnU-Net, in the order in which a training continues from them."""


def results_folder(config: NnunetTrainingConfig, prepared: PreparedData) -> Path:
    """Return the folder to which nnU-Net writes checkpoints and label maps of a run."""
    model = f"{config.trainer}__{prepared.plans['plans_name']}__{prepared.configuration}"
    return config.run_folder / "nnunet" / "results" / prepared.dataset / model / "fold_0"


def newest_checkpoint(config: NnunetTrainingConfig) -> Path | None:
    """Return the checkpoint from which nnU-Net continues a run; None before the first.

    nnU-Net writes in place. So a file that it was writing when it was killed has no end, and is passed over.
    """
    folder = config.run_folder / "nnunet" / "results"
    files = (file for name in CHECKPOINTS for file in sorted(folder.glob(f"*/*/fold_0/{name}")))
    return next((file for file in files if has_end(file)), None)


def has_end(file: Path) -> bool:
    """Check that a file of torch.save ends as an archive does, whose last record has 22 bytes."""
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - 22))
        return opened.read(4) == b"PK\5\6"


def link_data(config: NnunetTrainingConfig, prepared: PreparedData, cases: RunCases) -> Path:
    """Make the folder of prepared data of a run: links to the user's, the split, and the plan.

    The plan names no next stage of a cascade, whose prepared data nnU-Net's validation would read.

    Returns:
        The folder that stands for nnUNet_preprocessed.
    """
    root = config.run_folder / "nnunet" / "preprocessed"
    folder = root / prepared.dataset
    folder.mkdir(parents=True, exist_ok=True)
    for target in (prepared.arrays, *(prepared.folder / name for name in LINKED)):
        link = folder / target.name
        if link.is_symlink():
            link.unlink()  # the data may have moved
        link.symlink_to(target.resolve())
    configurations = {
        name: {key: value for key, value in one.items() if key != "next_stage"}
        for name, one in prepared.plans["configurations"].items()
    }
    write_json(folder / prepared.plans_file.name, prepared.plans | {"configurations": configurations})
    split = {part: [case.name for case in getattr(cases, name)] for part, name in SPLIT_KEYS.items()}
    write_json(folder / NNUNET_SPLITS, [split])
    return root


def set_environment(config: NnunetTrainingConfig, prepared: Path) -> None:
    """Set the variables that nnU-Net and its trainer read, before nnU-Net is imported."""
    variables = {
        "nnUNet_raw": str(Path(os.path.abspath(config.data)).parent),
        "nnUNet_preprocessed": str(prepared.resolve()),
        "nnUNet_results": str((config.run_folder / "nnunet" / "results").resolve()),
    }
    if config.trainer == OWN_TRAINER:
        recipe = config.run_folder / "nnunet" / "recipe.yaml"
        settings = {name: value for name, value in as_plain(config).items() if name in READ}
        write_whole(recipe, yaml.safe_dump(settings, sort_keys=False).encode())
        variables |= {"nnUNet_extTrainer": str(PACKAGE / "nnunet_trainers"), RECIPE: str(recipe)}
    if config.dataloader_workers >= 0:
        variables["nnUNet_n_proc_DA"] = str(config.dataloader_workers)
    os.environ.pop(WEIGHTS, None)  # the recipe names them
    os.environ |= variables


def seed_generators(seed: int) -> None:
    """Seed the generators of this process, of which nnU-Net's networks draw their weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def import_runner() -> Any:
    """Import nnU-Net's module of trainings.

    Raises:
        ImportError: nnU-Net is not installed, or fails to be imported.
    """
    try:
        from nnunetv2.run import run_training
    except ImportError as error:
        raise extra_error(error, "--engine nnunet needs nnunetv2", "nnunet", "nnunetv2", "nnunetv2.run") from error
    return run_training


def train_and_score(config: NnunetTrainingConfig) -> dict[str, Any]:
    """Train by nnU-Net, or continue, let it predict the validation cases, and score its label maps.

    Returns:
        The summary of the scores, in RUN/scores.

    Raises:
        ImportError: nnU-Net is not installed, or fails to be imported.
        FileNotFoundError, ValueError: Data, plan and settings do not fit.
    """
    processes = distributed.find_processes(config.device)
    prepared = find_prepared(config)
    cases = find_cases_of_fold(config, prepared)
    for note in cases.notes:
        LOG.warning("%s", note)
    check_prepared(prepared, cases)
    set_environment(config, link_data(config, prepared, cases))
    runner = import_runner()
    seed_generators(config.seed)
    checkpoint = newest_checkpoint(config)
    if checkpoint is None:  # what an attempt left has its settings, which need not be these
        shutil.rmtree(config.run_folder / "nnunet" / "results", ignore_errors=True)
    is_trained = checkpoint is not None and checkpoint.name == CHECKPOINTS[0]
    trainer = runner.get_trainer_from_args(
        prepared.dataset,
        prepared.configuration,
        0,
        config.trainer,
        prepared.plans_file.stem,
        checkpoint is not None,
        processes.device,
    )
    if checkpoint is not None:
        trainer.load_checkpoint(str(checkpoint))
    elif config.trainer != OWN_TRAINER and config.weights != "none":
        runner.maybe_load_checkpoint(trainer, False, False, str(weights_file(config.weights)))
    torch.backends.cudnn.benchmark = True  # as nnU-Net's own command sets it
    if not is_trained:
        log_epochs(trainer, config.run_folder / "metrics.jsonl")
        trainer.run_training()
    trainer.perform_actual_validation(False)
    return score_label_maps(config, prepared, cases, processes)


def log_epochs(trainer: Any, path: Path) -> None:
    """Let a trainer write a line of metrics.jsonl after each epoch: last step, loss, steps and seconds."""
    num = trainer.num_iterations_per_epoch
    if path.is_file():
        drop_lines(path, trainer.current_epoch * num, True)
    begin = trainer.on_epoch_start
    end_training: Callable[[list[dict[str, Any]]], None] = trainer.on_train_epoch_end
    end: Callable[[], None] = trainer.on_epoch_end
    found: dict[str, float] = {}

    def on_epoch_start() -> None:
        found["begin"] = time.monotonic()
        begin()

    def on_train_epoch_end(outputs: list[dict[str, Any]]) -> None:
        found["loss"] = float(np.mean([output["loss"] for output in outputs]))
        found["seconds"] = time.monotonic() - found["begin"]
        end_training(outputs)

    def on_epoch_end() -> None:
        epoch = trainer.current_epoch
        line = {"step": (epoch + 1) * num - 1, "epoch": epoch, "loss": found["loss"]}
        with path.open("a") as file:
            file.write(json.dumps(line | {"epoch_steps": num, "epoch_seconds": round(found["seconds"], 3)}) + "\n")
        end()

    trainer.on_epoch_start, trainer.on_train_epoch_end, trainer.on_epoch_end = (
        on_epoch_start,
        on_train_epoch_end,
        on_epoch_end,
    )


def score_label_maps(
    config: NnunetTrainingConfig, prepared: PreparedData, cases: RunCases, processes: distributed.Processes
) -> dict[str, Any]:
    """Score nnU-Net's label maps of the validation cases; writes RUN/scores, and returns the summary."""
    folder = results_folder(config, prepared) / "validation"
    ending = load_json(prepared.folder / "dataset.json")["file_ending"]
    num = len(cases.names)

    def score(index: int) -> list[OrganScores]:
        case = cases.validation[index]
        assert case.label is not None
        truth = read_label(case.label, case.image, num, case.ignore)
        found = read_label(folder / f"{case.name}{ending}", case.image, num)
        return score_case(found.voxels, truth.voxels, num, voxel_sizes(truth.affine), NSD_TOLERANCE)

    done, failed = work_on_each([case.name for case in cases.validation], score, processes, "score")
    table = organ_score_table({cases.validation[i].name: organs for i, organs in done.items()}, cases.names[1:])
    protocol = {
        "engine": f"nnU-Net {version('nnunetv2')}",
        "trainer": config.trainer,
        "plan": f"{prepared.plans['plans_name']}, {prepared.configuration}",
        "weights": CHECKPOINTS[0],
        TRAINED_ON: len(cases.training),
        "data": f"validation cases of {config.data}",
        DATA_DIGEST: cases_digest([cases.validation[i] for i in done]),
        "scored_on": "the label's own grid",
        "nsd_tolerance_mm": NSD_TOLERANCE,
    }
    return write_segmentation_scores(config.run_folder / "scores", table, protocol, failed)


def train_from_recipe(recipe: str) -> None:
    """Train and score as a YAML file of settings says, and print the scores.

    Raises:
        ValueError: Another process trains in the folder, as one whose comparison was killed; or as `train_and_score`.
    """
    config = NnunetTrainingConfig(**read_yaml(recipe, NnunetTrainingConfig))
    with lock_folder(config.run_folder, "run folder"):
        print(summary_text(train_and_score(config)))
    LOG.info("scores in %s", config.run_folder / "scores")
