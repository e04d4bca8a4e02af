"""Volumes that nnU-Net has prepared, as the data of a pre-training of its plan's network.

Their spacing, axes and values are those of the plan beside them. So a run takes them only if its own settings say the
same.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyspark.config.nnunet import find_plan, full, intensity_of_plan, names_plan, window_settings
from hyspark.config.pretrain import PretrainConfig
from hyspark.data.datasets.build import split_cases
from hyspark.data.datasets.cases import Case, Datalist
from hyspark.data.datasets.found import DataSet, FoundData
from hyspark.data.datasets.nnunet_prepared import (
    NnunetPreparation,
    array_stem,
    image_arrays,
    is_configuration,
    preparing_command,
)
from hyspark.data.datasets.splits import SPLIT_SEED
from hyspark.models.nnunet_plans import CT_SCHEME, NnunetPlan, read_plan, resolve_configuration
from hyspark.utils.paths import load_json
from hyspark.utils.text import listing, short_text

AS_PREPARED = "none"
"""Intensity for values that no other one stands for."""


def list_prepared(config: PretrainConfig) -> Datalist:
    """List the volumes that nnU-Net has prepared, split by its splits_final.json or else by subject.

    Args:
        config: Settings; `data` names the folder of a data set in nnUNet_preprocessed, or of one of its configurations.

    Raises:
        FileNotFoundError: There is no such volume, or no plan.
        ValueError: The run's network is not that of a plan, or its settings are others than those of the volumes.
    """
    path = Path(os.path.abspath(config.data))
    if not names_plan(config.model):
        raise ValueError(
            f"--model {config.model}: {path} holds what nnU-Net has prepared, which the network of its plan alone "
            "reads; expected spark/nnunet/PLANS.json (moco, byol, swav too); for other networks, name scans by --data"
        )
    plan = find_plan(config.model, config.run_folder, config.resume_from)
    folder = path if is_configuration(path) else configuration_folder(path, plan)
    preparation = find_preparation(folder, plan, config)
    further = len(config.image_channels) - 1
    cases = [
        Case(array_stem(file), folder.parent.name, file, others=(file,) * further, prepared=preparation)
        for file in image_arrays(folder)
    ]
    drawing = {"seed": SPLIT_SEED, "val_fraction": config.val_fraction, "subject_regex": config.subject_regex}
    found = FoundData(folder, [DataSet(folder.parent, cases)])
    return split_cases(found, labels=False, splits="auto", fold=config.fold, **drawing)


def configuration_folder(data_set: Path, plan: NnunetPlan) -> Path:
    """Return the folder of a plan's prepared volumes in that of a data set in nnUNet_preprocessed.

    Raises:
        FileNotFoundError: The data set has no such plan, or is not prepared by it.
    """
    file = data_set / f"{plan.name}.json"
    if not file.is_file():
        known = listing(other.name for other in plan_files(data_set)) or "none"
        raise FileNotFoundError(
            f"{data_set}: expected {file.name}, the plan of --model, found {known}; name the folder of a configuration"
        )
    content = load_json(file)
    folder = data_set / identifier_of(content, plan.configuration, file)
    if not is_configuration(folder):
        raise FileNotFoundError(
            f"{folder}: expected the volumes that nnU-Net prepared by {file.name}, {plan.configuration}, found none; "
            f"type {preparing_command(data_set.name, plan.name, plan.configuration)}"
        )
    return folder


def plan_files(data_set: Path) -> list[Path]:
    """List the plans in a folder by name."""
    return [file for file in sorted(data_set.glob("*.json")) if "configurations" in content_of_plan(file)]


def content_of_plan(file: Path) -> Mapping[str, Any]:
    """Return the content of a JSON file that may be a plan; empty if it is no object."""
    try:
        content = load_json(file)
    except (OSError, ValueError):
        return {}
    is_plan = isinstance(content, Mapping) and isinstance(content.get("configurations", {}), Mapping)
    return content if is_plan else {}


def identifier_of(content: Mapping[str, Any], configuration: str, file: Path) -> str:
    """Return the name of the folder that a configuration of a plan is prepared in; errors as `read_plan`."""
    found = resolve_configuration(content["configurations"], configuration, str(file))
    return str(found.get("data_identifier") or f"{content.get('plans_name')}_{configuration}")


def find_preparation(folder: Path, plan: NnunetPlan, config: PretrainConfig) -> NnunetPreparation:
    """Find the plan that the volumes of a folder were prepared by, and hold it against the settings of a run.

    Several plans may share a folder. The first that agrees is taken.

    Raises:
        FileNotFoundError: No plan beside the folder names it.
        ValueError: All plans differ from the settings; the message says in what.
    """
    differing, unreadable = [], []
    for file, configuration in sorted(plans_of(folder), key=lambda pair: pair[0].stem != plan.name):
        try:
            candidate = read_plan(file, configuration)
            pairs = differing_preparation(candidate, config)
        except ValueError as error:  # such as the axes of 2d
            unreadable.append(f"{folder}: prepared for a network that is not built here: {error}")
            continue
        if not pairs:
            return preparation_of(candidate)
        lines = "; ".join(
            f"{name} {short_text(theirs)}, not {short_text(own)}" for name, (own, theirs) in pairs.items()
        )
        differing.append(
            f"{folder}: expected volumes as this run's settings say: {file.name}, {configuration}, prepared them with "
            f"{lines}; take their plan as --model {config.method}/nnunet/{file}:{configuration} without flags that "
            "override it, or name scans by --data"
        )
    if differing or unreadable:
        raise ValueError([*differing, *unreadable][0])
    raise FileNotFoundError(
        f"{folder}: expected the plan of these volumes beside their folder, in {folder.parent}, with "
        f'"data_identifier": "{folder.name}", found none; copy it there'
    )


def plans_of(folder: Path) -> list[tuple[Path, str]]:
    """List the plans beside a folder of prepared volumes that name it, each with the configuration that does."""
    found = []
    for file in plan_files(folder.parent):
        content = content_of_plan(file)
        for name in content["configurations"]:
            try:
                is_named = identifier_of(content, name, file) == folder.name
                is_cascade = bool(resolve_configuration(content["configurations"], name, "").get("previous_stage"))
            except (AttributeError, TypeError, ValueError):
                continue
            if is_named and not is_cascade:  # of which 3d_fullres shares the folder
                found.append((file, name))
    return found


def differing_preparation(plan: NnunetPlan, config: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a run that are others than those of volumes prepared by a plan, each with both values.

    Raises:
        ValueError: The plan has no such channel.
    """
    channels = config.image_channels
    if beyond := [channel for channel in channels if not 0 <= channel < len(plan.schemes)]:
        raise ValueError(f"image_channels: expected some of {len(plan.schemes)} channels, from 0, got {beyond}")
    wanted: dict[str, Any] = {
        "spacing": plan.spacing,
        "axis_order": plan.axis_order,
        "intensity": tuple(intensity_of_plan(plan, channel) or AS_PREPARED for channel in channels),
    }
    wanted |= window_settings(plan, channels)
    pairs = {name: (getattr(config, name), value) for name, value in wanted.items()}
    return {name: pair for name, pair in pairs.items() if full(pair[0], len(channels)) != full(pair[1], len(channels))}


def preparation_of(plan: NnunetPlan) -> NnunetPreparation:
    """Return how a plan prepares volumes."""
    hu: list[tuple[float, float] | None] = []
    for channel, scheme in enumerate(plan.schemes):
        known = plan.intensities(channel)
        hu.append((known["mean"], max(known["std"], 1e-8)) if scheme == CT_SCHEME else None)
    return NnunetPreparation(plan.axis_order, plan.spacing, tuple(hu))
