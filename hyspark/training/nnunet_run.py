"""What nnU-Net's training of HySparK's network takes from the plans, the recipe and the environment.

The plans give spacing, intensity and crop. A recipe of `hyspark finetune` gives the network and its learning rates.
Both are kept in the plans under "hyspark", which checkpoints and the plans.json of a trained model hold. So predictions
build the same network, and the weights say what they were made with.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hyspark.config.nnunet_training import EPOCHS, STEPS_PER_EPOCH
from hyspark.config.recipes import as_plain, read_yaml, typed_values
from hyspark.config.segmentation import SegmentationConfig, check_decoder, network_options
from hyspark.config.shared import EncoderSettings
from hyspark.data.intensity import SCALES
from hyspark.data.settings import PrepareSettings
from hyspark.models.axis_order import PermutedAxes
from hyspark.models.defaults import PATCH, nearest_multiple
from hyspark.models.nnunet_plans import OWN_SETTINGS, resolve_configuration, to_volume_axes
from hyspark.models.segmentation import build_hybird
from hyspark.models.weights.load import load_pretrained
from hyspark.models.weights.nnunet_settings import HU_WINDOWS, plan_settings
from hyspark.training.initial_weights import INPUT_SETTINGS, describe_differences, initialise
from hyspark.training.optim import finetuning_schedule, set_lr_and_decay
from hyspark.utils.settings import field_info
from hyspark.utils.text import flag_text

RECIPE, WEIGHTS = "HYSPARK_RECIPE", "HYSPARK_WEIGHTS"
"""Environment variables: a recipe of fine-tuning, by path or name; a file of initial weights."""
READ = (
    *field_info(EncoderSettings),
    *("decoder", "decoder_width", "decoder_min_width", "weights", "weights_key", "seed"),
    *("epochs", "steps_per_epoch", "lr", "warmup_epochs", "lrschedule", "weight_decay"),
    *("layer_decay", "encoder_lr_ratio", "pretrained_lr_ratio"),
)
"""Settings that a recipe gives; all others are nnU-Net's own, or the plan's."""
DEFAULTS = {"epochs": EPOCHS, "steps_per_epoch": STEPS_PER_EPOCH}


class NnunetRun(NamedTuple):
    """Settings of a training by nnU-Net.

    Attributes:
        config: the settings that are read of fine-tuning's.
        notes: lines for the log.
    """

    config: SegmentationConfig
    notes: list[str]


def plan_run(plans: dict[str, Any], configuration: str, environment: Mapping[str, str]) -> NnunetRun:
    """Resolve the settings of a training, and enter them into the plans, with a patch size that the network takes.

    Args:
        plans: plans of nnU-Net; changed.
        configuration: name of the configuration.
        environment: environment variables, of which RECIPE and WEIGHTS are read.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: The recipe is wrong, or as `enter_settings`.
    """
    recipe = environment.get(RECIPE)
    given = DEFAULTS | (read_yaml(recipe, SegmentationConfig) if recipe else {})
    notes = []
    if unread := sorted(set(given) - set(READ)):
        notes.append(f"{recipe}: not read here, since nnU-Net and its plan decide: {', '.join(unread)}")
    if weights := environment.get(WEIGHTS):
        given["weights"] = weights
    run = enter_settings(plans, configuration, given)
    return NnunetRun(run.config, [*notes, *run.notes])


def enter_settings(plans: dict[str, Any], configuration: str, given: Mapping[str, Any]) -> NnunetRun:
    """Enter settings into the plans, with a patch size that the network takes.

    Args:
        plans: plans of nnU-Net; changed.
        configuration: name of the configuration.
        given: settings by name, of which READ are read.

    Raises:
        ValueError: A setting is wrong, or the configuration takes labels of an earlier stage.
    """
    known = plans["configurations"]
    found = resolve_configuration(known, configuration, "plans")
    if found.get("previous_stage"):
        raise ValueError(
            f"{configuration}: expected a configuration of images alone, got one that also takes labels of "
            f"{found['previous_stage']}; train 3d_fullres or 3d_lowres"
        )
    patch = [int(edge) for edge in found["patch_size"]]
    fitting = list(nearest_multiple(patch, [PATCH] * len(patch)))
    notes = []
    if patch != fitting:
        known[configuration]["patch_size"] = found["patch_size"] = fitting
        notes.append(
            f"patch_size {flag_text(patch)} of the plan: trained with {flag_text(fitting)}, multiples of {PATCH}"
        )
    values = {name: value for name, value in given.items() if name in READ}
    if not values.get("steps_per_epoch"):  # a pass over the cases, which nnU-Net draws at random
        values["steps_per_epoch"] = STEPS_PER_EPOCH
    config = SegmentationConfig(**values)
    check_decoder(config)
    of_plan = plan_settings(plans, found)
    plans[OWN_SETTINGS] = {name: value for name, value in as_plain(config).items() if name in READ}
    plans[OWN_SETTINGS] |= {
        name: as_list(of_plan[name]) for name in (*INPUT_SETTINGS, "crop_size", HU_WINDOWS) if name in of_plan
    }
    notes.append("HySparK: " + ", ".join(f"{name} {flag_text(value)}" for name, value in plans[OWN_SETTINGS].items()))
    return NnunetRun(config, notes)


def validation_steps(config: SegmentationConfig) -> int:
    """Return the validation batches of an epoch, in nnU-Net's ratio: 50 of 250 steps."""
    return max(1, round(config.steps_per_epoch / 5))


def as_list(value: Any) -> Any:
    """Return a tuple as a list, as JSON has it; other values as they are."""
    return list(value) if isinstance(value, tuple) else value


def build_trained_network(
    plans: Mapping[str, Any], patch: Sequence[int], num_channels: int, num_classes: int
) -> PermutedAxes:
    """Build the segmentation network for arrays in the order of axes of the plans.

    Args:
        plans: plans with the settings of `plan_run`.
        patch: voxels of a crop, in the plans' order of axes.
        num_channels: input channels.
        num_classes: number of classes, background included.

    Raises:
        ValueError: The plans hold no settings of this network.
    """
    if OWN_SETTINGS not in plans:
        raise ValueError("plans: expected the settings of HySparK's network under 'hyspark', got none; was it trained?")
    values = {name: value for name, value in plans[OWN_SETTINGS].items() if name in READ}
    config = SegmentationConfig(**typed_values(values, SegmentationConfig, "plans"))
    order = volume_order(plans["transpose_forward"], len(patch))
    edges = to_volume_axes(patch, order)
    options = network_options(config) | {"axes": len(patch)}
    network = initialise(partial(build_hybird, num_channels, num_classes, edges, **options), config.seed)
    return PermutedAxes(network, order)


def volume_order(transpose_forward: Sequence[int], axes: int) -> list[int]:
    """Return the axis, of x, y, z or of the two of a slice, that is each axis of nnU-Net's arrays."""
    order = [2 - int(axis) for axis in transpose_forward][-axes:]
    return [sorted(order).index(axis) for axis in order]


def weight_sums(network: nn.Module) -> list[float]:
    """Sum each parameter of a network, in its order."""
    return [float(value.detach().cpu().double().sum()) for value in network.parameters()]


def check_nothing_loaded(before: Sequence[float], network: nn.Module, weights: str) -> None:
    """Check that a network has its random weights, before others are loaded.

    Args:
        before: sums of its weights after initialisation.
        network: the network at the start of its training.
        weights: file of initial weights.

    Raises:
        ValueError: nnU-Net's -pretrained_weights has loaded a file.
    """
    if weight_sums(network) != list(before):
        raise ValueError(
            f"-pretrained_weights and {WEIGHTS} (or weights of {RECIPE}): expected one file of initial weights, got "
            f"two; {weights} would replace the other; drop one"
        )


def load_initial_weights(network: nn.Module, config: SegmentationConfig, plans: Mapping[str, Any]) -> list[str]:
    """Load the initial weights.

    Returns:
        The report, in lines; then what the weights were made with that differs from the plan, and how to pre-train
        weights as the plan wants them.

    Raises:
        FileNotFoundError, ValueError: As `load_pretrained`.
    """
    report = load_pretrained(network, config.weights, config.weights_key)
    own = {name: value for name, value in plans[OWN_SETTINGS].items() if name in INPUT_SETTINGS}
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in own.items()}
    unknown = set(INPUT_SETTINGS) - values.keys()  # such as the spacing of 2d, which has two numbers
    windows = [tuple(one) if one else None for one in plans[OWN_SETTINGS].get(HU_WINDOWS, ())]
    unknown |= {"hu_min", "hu_max", HU_WINDOWS} if windows else set()
    differing = describe_differences(network, config.weights, report, PrepareSettings(**values), unknown)
    differing += differing_windows(config.weights, report.made_with, windows)
    lines = [f"initial weights {config.weights}", *str(report).splitlines()]
    if differing:
        lines += [f"WARNING: {line}" for line in differing]
        lines.append(advise_pretraining(plans[OWN_SETTINGS]))
    return lines


def differing_windows(
    weights: str, made_with: Mapping[str, Any], windows: Sequence[tuple[float, float] | None]
) -> list[str]:
    """Describe the channels of CT whose window of HU is another one than that of the weights, one line for each.

    Args:
        weights: file of the weights, for the lines.
        made_with: what they were made with.
        windows: that of each channel in nnU-Net, None for one that is not CT; empty where they are one for all.
    """
    if not {"hu_min", "hu_max"} <= made_with.keys():
        return []
    one = (made_with["hu_min"], made_with["hu_max"])
    known = [tuple(found) if found else None for found in made_with.get(HU_WINDOWS, [one] * len(windows))]
    return [
        f"{weights} was made with HU {flag_text(was)} in channel {channel}, this run has {flag_text(own)}"
        for channel, (was, own) in enumerate(zip(known, windows, strict=False))
        if was and own and was != own
    ]


def advise_pretraining(own: Mapping[str, Any]) -> str:
    """Describe how to pre-train for the settings of a plan, with the flags that it gives."""
    if unknown := sorted({name for name in own.get("intensity", ()) if name not in SCALES}):
        return f"no pre-training here fits this plan: {', '.join(unknown)} has no counterpart among --intensity"
    flags = [
        f"--{name} {flag_text(own[name])}"
        for name in (*INPUT_SETTINGS, "crop_size")
        if own.get(name, []) not in ([], "")
    ]
    return f"pre-train for this plan with: {' '.join(flags)}"


def check_same_settings(folder: str | None, plans: Mapping[str, Any]) -> None:
    """Check that a training has the settings of the other folds in its folder, whose plans.json predictions read.

    Args:
        folder: folder of all folds of a configuration.
        plans: plans with the settings of `plan_run`.

    Raises:
        ValueError: A setting differs.
    """
    file = Path(folder or ".") / "plans.json"
    if not folder or not file.is_file():
        return
    before = json.loads(file.read_text()).get(OWN_SETTINGS, {})
    own = json.loads(json.dumps(plans[OWN_SETTINGS]))
    changed = [
        f"{name}: was {before.get(name)}, is {value}" for name, value in own.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{file}: folds of one model have one recipe and one file of weights ({'; '.join(changed)}); set {RECIPE} "
            f"and {WEIGHTS} as before, or another folder nnUNet_results"
        )


class EpochSchedule:
    """Learning rate and weight decay of steps, by the calls of nnU-Net's scheduler.

    Args:
        optimizer: optimizer of `make_adamw`.
        config: settings.
        num_epochs: epochs of the training.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: SegmentationConfig, num_epochs: int) -> None:
        self.optimizer, self.config = optimizer, config
        self.total = num_epochs * config.steps_per_epoch
        self.set_step(0)

    def step(self, epoch: int) -> None:
        """Set the rates of the first step of an epoch."""
        self.set_step(epoch * self.config.steps_per_epoch)

    def set_step(self, step: int) -> None:
        """Set the rates of a step, counted from 0."""
        set_lr_and_decay(
            self.optimizer, **finetuning_schedule(self.config, step, self.config.steps_per_epoch, self.total)
        )
