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
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from nibabel.affines import voxel_sizes

from hyspark.config.nnunet_training import OWN_TRAINER, NnunetTrainingConfig
from hyspark.config.prepared_data import identifier_of
from hyspark.config.recipes import as_plain, read_yaml
from hyspark.data.datasets.cases import cases_digest, class_values
from hyspark.data.datasets.channels import NIFTI_ENDINGS
from hyspark.data.datasets.nnunet_prepared import ARRAY, EARLIER_ARRAY, preparing_command
from hyspark.data.datasets.splits import split_by_file
from hyspark.data.datasets.subjects import split_faults
from hyspark.data.readers.nifti import read_label
from hyspark.evaluation.each_case import work_on_each
from hyspark.evaluation.protocol import DATA_DIGEST, TRAINED_ON
from hyspark.evaluation.segmentation.metrics import OrganScores, score_case
from hyspark.evaluation.segmentation.scores import organ_score_table, summary_text, write_segmentation_scores
from hyspark.evaluation.segmentation.scoring_protocol import NSD_TOLERANCE
from hyspark.models.nnunet_plans import resolve_configuration, split_plan_name
from hyspark.models.weights.model_folder import weights_file
from hyspark.training import distributed
from hyspark.training.labelled_cases import (
    RunCases,
    class_names,
    draw_labelled_subset,
    find_run_cases,
    read_labelled_datalist,
)
from hyspark.training.metrics_log import drop_lines
from hyspark.training.nnunet_run import READ, RECIPE, WEIGHTS
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.install import PACKAGE, extra_error
from hyspark.utils.locks import lock_folder
from hyspark.utils.log import LOG
from hyspark.utils.paths import load_json
from hyspark.utils.text import listing

LINKED = ("dataset.json", "gt_segmentations", "dataset_fingerprint.json")
"""What nnU-Net's training reads beside plan, split and prepared cases."""
SPLIT_FILE = "splits_final.json"
SPLIT_KEYS = {"train": "training", "val": "validation"}
"""Parts of nnU-Net's split, with those of a run's cases."""
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
"""Checkpoints of nnU-Net, in the order in which a training continues from them."""


class PreparedData(NamedTuple):
    """Data that nnU-Net has prepared for a plan.

    Attributes:
        plans_file: The plan.
        plans: Its content.
        configuration: Name of the configuration.
        arrays: Folder of the prepared cases.
        num_channels: Channels of an image.
    """

    plans_file: Path
    plans: dict[str, Any]
    configuration: str
    arrays: Path
    num_channels: int

    @property
    def folder(self) -> Path:
        """The data set's folder in nnUNet_preprocessed."""
        return self.plans_file.parent

    @property
    def dataset(self) -> str:
        """Name of the data set, which nnU-Net's folders have."""
        return str(self.plans["dataset_name"])

    def array(self, case: str) -> Path | None:
        """Return the file of a prepared case; None without one."""
        files = (self.arrays / f"{case}{ending}" for ending in (ARRAY, EARLIER_ARRAY))
        return next((file for file in files if file.is_file()), None)


def find_prepared(config: NnunetTrainingConfig) -> PreparedData:
    """Find the plan that the settings name, and the data prepared for it.

    Raises:
        FileNotFoundError: The plan, or the folder of its data, is missing.
        ValueError: No plan is named, or it is none of nnU-Net v2 for images alone.
    """
    if not config.plans:
        raise ValueError("--plans: expected nnUNet_preprocessed/DATASET/PLANS.json[:CONFIGURATION], got none")
    file, configuration = split_plan_name(config.plans)
    file = Path(os.path.abspath(file))
    if not file.is_file():
        raise FileNotFoundError(f"--plans: {file}: no such file; run nnUNetv2_plan_and_preprocess, or correct the path")
    plans = load_json(file)
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
        raise ValueError(f"--plans: {file}: expected a plans.json of nnU-Net v2 (configurations), got another JSON")
    if absent := [key for key in ("dataset_name", "plans_name") if not isinstance(plans.get(key), str)]:
        raise ValueError(f"--plans: {file}: expected {listing(absent)} in it, got none; plan the data set again")
    found = resolve_configuration(plans["configurations"], configuration, f"--plans: {file}")
    if found.get("previous_stage"):
        raise ValueError(
            f"--plans: {configuration}: expected a configuration of images alone, got one that also takes labels of "
            f"{found['previous_stage']}; name 3d_fullres or 3d_lowres"
        )
    arrays = file.parent / identifier_of(plans, configuration, file)
    if not arrays.is_dir():
        advice = preparing_command(plans["dataset_name"], plans["plans_name"], configuration)
        raise FileNotFoundError(f"--plans: no folder {arrays} beside the plan; run {advice}")
    return PreparedData(file, plans, configuration, arrays, len(found.get("normalization_schemes", [None])))


def find_cases_of_fold(config: NnunetTrainingConfig, prepared: PreparedData) -> RunCases:
    """Find the labelled cases of a run, by a fold of the splits_final.json beside the plan if there is one.

    The images have all channels of the plan.

    Raises:
        FileNotFoundError, ValueError: As `find_run_cases` and `split_by_file`.
    """
    config = replace(config, in_channels=prepared.num_channels, image_channels=tuple(range(prepared.num_channels)))
    file = prepared.folder / SPLIT_FILE
    if not file.is_file():
        return find_run_cases(config)
    listed = read_labelled_datalist(replace(config, fold=0))
    pool = sorted([*listed.training, *listed.validation], key=lambda case: case.name)
    training, validation = split_by_file(pool, file, labels=True, fold=config.fold)
    if not training or not validation:
        raise ValueError(
            f"{file}: expected training and validation cases in fold {config.fold}, got {len(training)} and "
            f"{len(validation)}"
        )
    faults = [f"split: {fault}" for fault in split_faults(training, validation, config.subject_regex)]
    names = class_names(config, listed.labels)
    return RunCases(draw_labelled_subset(training, config), validation, names, [*listed.unused, *faults])


def check_prepared(prepared: PreparedData, cases: RunCases) -> None:
    """Check that the data are those that nnU-Net has prepared.

    Args:
        prepared: The prepared data.
        cases: Labelled cases.

    Raises:
        FileNotFoundError: A case is not prepared, or files that nnU-Net's validation reads are missing.
        ValueError: The classes are others, or nnU-Net writes label maps that are not scored here.
    """
    advice = f"run {preparing_command(prepared.dataset, prepared.plans['plans_name'], prepared.configuration)}"
    labelled = [*cases.training, *cases.validation]
    if absent := [case.name for case in labelled if prepared.array(case.name) is None]:
        raise FileNotFoundError(f"{prepared.arrays}: no prepared case for {listing(absent)}; {advice}")
    for name in LINKED:
        if not (prepared.folder / name).exists():
            raise FileNotFoundError(f"{prepared.folder / name}: missing; {advice}")
    declared = prepared.folder / "dataset.json"
    content = load_json(declared)
    ending = content.get("file_ending") if isinstance(content, dict) else None
    if ending not in NIFTI_ENDINGS:
        raise ValueError(
            f"{declared}: expected file_ending {' or '.join(NIFTI_ENDINGS)}, as label maps are scored in these forms "
            f"alone, got {ending}; convert the data by hyspark import, and plan them again"
        )
    known = class_values(content.get("labels"), declared)
    own = [name for name, value in known.items() if cases.names[value : value + 1] != [name]]
    if own or len(known) != len(cases.names):
        raise ValueError(
            f"{declared}: expected the classes of the labelled data, {', '.join(cases.names)}, got "
            f"{', '.join(known)}; {advice}"
        )


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
    write_json(folder / SPLIT_FILE, [split])
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
