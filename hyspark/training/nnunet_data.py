"""Data that nnU-Net has prepared for a plan, and the labelled cases that a training by nnU-Net takes of them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hyspark.config.nnunet_training import NnunetTrainingConfig
from hyspark.data.datasets.cases import class_values
from hyspark.data.datasets.channels import NIFTI_ENDINGS
from hyspark.data.datasets.nnunet_prepared import ARRAY, EARLIER_ARRAY, preparing_command
from hyspark.data.datasets.splits import NNUNET_SPLITS, split_by_file
from hyspark.data.datasets.subjects import split_faults
from hyspark.models.nnunet_plans import resolve_configuration, split_plan_name
from hyspark.training.labelled_cases import (
    RunCases,
    class_names,
    draw_labelled_subset,
    find_run_cases,
    read_labelled_datalist,
)
from hyspark.training.prepared_data import identifier_of
from hyspark.utils.paths import load_json
from hyspark.utils.text import listing

LINKED = ("dataset.json", "gt_segmentations", "dataset_fingerprint.json")
"""What nnU-Net's training reads beside plan, split and prepared cases."""


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
    file = prepared.folder / NNUNET_SPLITS
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
