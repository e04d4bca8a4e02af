"""Whether weights fit an nnU-Net plan: axes, spacing, intensity and architecture, which no shape shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.config.nnunet import PLAN_FILE, intensity_of_plan, names_plan, plan_in_file
from hyspark.data.intensity import OF_CT, of_channel
from hyspark.models.axis_order import relative_order
from hyspark.models.nnunet_network import turned_architecture
from hyspark.models.nnunet_plans import CT_SCHEME, SCHEMES, NnunetPlan, read_plan, split_plan_name
from hyspark.models.weights.export import MADE_WITH
from hyspark.models.weights.files import made_with
from hyspark.training.initial_weights import settings_beside
from hyspark.utils.text import list_of

SAME_SPACING = 0.01
"""Largest difference of spacings, as a fraction, that is not worth a note."""
SAME_VALUES, OTHER_VALUES = 0.001, 0.1
"""Differences of a network's input, in deviations of the foreground: up to the first none, above the second refused."""
ADVICE = "pre-train with --model spark/nnunet/PLANS.json and this plan"
"""What makes weights that fit."""


@dataclass(frozen=True)
class PlanFit:
    """What weights were made with, per axis x, y, z, and how it differs from a plan.

    Attributes:
        axis_order: axes in the order in which the network takes them.
        spacing: mm.
        crop_size: voxels.
        method: method of pre-training; empty if unknown.
        settings: plain settings of the pre-training.
        notes: lines on differences.
    """

    axis_order: tuple[int, ...]
    spacing: tuple[float, ...]
    crop_size: tuple[int, ...]
    method: str
    settings: dict[str, Any]
    notes: list[str]


def fit_weights(contents: object, source: Path, plan: NnunetPlan) -> PlanFit:
    """Hold what weights were made with against a plan.

    Args:
        contents: contents of their file.
        source: the file. Settings and plan may lie beside it, in its run folder.
        plan: the plan to train.

    Raises:
        ValueError: the weights say nothing of it; or channels, intensity or architecture are others.
    """
    known = made_with(contents) or settings_beside(source)
    if not {"spacing", "intensity"} <= known.keys():
        raise ValueError(
            f"{source}: expected a file that says for which spacing and intensity it was made, as nnU-Net would not "
            "notice others; give the file of a pre-training run, in its run folder"
        )
    order = tuple(known.get("axis_order") or (0, 1, 2))
    spacing = tuple(known["spacing"])
    crop = tuple(known.get("crop_size") or plan.patch_size)
    notes = []
    if order != plan.axis_order:
        notes.append(f"turned: kernels from the axes {name_axes(order)} to the plan's {name_axes(plan.axis_order)}")
    if any(abs(own / wanted - 1) > SAME_SPACING for own, wanted in zip(spacing, plan.spacing, strict=True)):
        notes.append(
            f"differs: spacing {list_of(spacing)} mm (x, y, z) in pre-training, {list_of(plan.spacing)} in the plan"
        )
    check_plan_channels(known, plan, source)
    for channel in range(len(plan.schemes)):
        notes += compare_intensity(known, plan, channel, source)
    notes += compare_architecture(own_plan(contents, source, known), plan, order, source)
    return PlanFit(
        axis_order=order,
        spacing=spacing,
        crop_size=crop * 3 if len(crop) == 1 else crop,
        method=str(known.get("method") or known.get("model", "")).partition("/")[0],
        settings={name: known[name] for name in MADE_WITH if name in known},
        notes=notes,
    )


def name_axes(order: tuple[int, ...]) -> str:
    """Name axes by their letters, such as "z y x"."""
    return " ".join("xyz"[axis] for axis in order)


def check_plan_channels(known: Mapping[str, Any], plan: NnunetPlan, source: Path) -> None:
    """Raise ValueError if weights were made with another number of channels than the plan's."""
    num = len(known.get("image_channels", [0]))
    if num != len(plan.schemes):
        raise ValueError(f"{source}: expected weights for the plan's {len(plan.schemes)} channels, got {num}; {ADVICE}")


def compare_intensity(known: Mapping[str, Any], plan: NnunetPlan, channel: int, source: Path) -> list[str]:
    """Compare the values that a network sees of a channel, in pre-training and under the plan.

    Returns:
        Lines on harmless differences.

    Raises:
        ValueError: the values differ by more than a tenth of the foreground's deviation, or are of another kind.
    """
    own, scheme = of_channel(known["intensity"], channel), plan.schemes[channel]
    if scheme == CT_SCHEME and own in OF_CT:
        difference = largest_change(known, plan, channel)
        text = f"channel {channel}: its values differ by up to {difference:.2g} deviations from those under {scheme}"
        if difference > OTHER_VALUES:
            raise ValueError(
                f"{source}: {text}; zero padding then stands for another HU, and little of the features is left; "
                f"{ADVICE}, or give the data set the pre-training's plan (nnUNetv2_move_plans_between_datasets)"
            )
        return [f"differs: {text}"] if difference > SAME_VALUES else []
    if scheme not in SCHEMES:
        return [f"differs: channel {channel}: {scheme} has no counterpart, the weights were made with intensity {own}"]
    if intensity_of_plan(plan, channel) != own:
        raise ValueError(f"{source}: channel {channel}: expected weights for {scheme}, got intensity {own}; {ADVICE}")
    if own == "mr":
        return [
            f"differs: channel {channel}: {scheme} is by nonzero voxels and background is 0, mr is by the foreground"
        ]
    return []


def largest_change(known: Mapping[str, Any], plan: NnunetPlan, channel: int) -> float:
    """Compute the largest difference of a network's input over all HU, in deviations of the plan's foreground."""
    planned = plan.intensities(channel)
    windows = [(known["hu_min"], known["hu_max"]), (planned["percentile_00_5"], planned["percentile_99_5"])]
    values = np.linspace(min(low for low, _ in windows), max(high for _, high in windows), 501)
    own, other = (values.clip(*window) for window in windows)
    if of_channel(known["intensity"], channel) == "ct":
        own = (own - known["hu_min"]) / (known["hu_max"] - known["hu_min"])
    else:
        own = (own - of_channel(known["input_mean"], channel)) / of_channel(known["input_std"], channel)
    other = (other - planned["mean"]) / max(planned["std"], 1e-8)
    return float(np.abs(own - other).max())


def own_plan(contents: object, source: Path, known: Mapping[str, Any]) -> NnunetPlan | None:
    """Return the plan that weights were made with, from their file or its run folder; None if they have none."""
    if plan := plan_in_file(contents, str(source)):
        return plan
    beside = source.with_name(PLAN_FILE)
    if not names_plan(known.get("model")) or not beside.is_file():
        return None
    return read_plan(beside, split_plan_name(known["model"].partition("/")[2])[1])


def compare_architecture(own: NnunetPlan | None, plan: NnunetPlan, order: tuple[int, ...], source: Path) -> list[str]:
    """Compare the networks of two plans, in the axes of the second.

    Args:
        own: plan of the pre-training; None if the weights have none.
        plan: the plan to train.
        order: axes of the pre-training's network.
        source: file of the weights.

    Returns:
        A line if the weights have no plan.

    Raises:
        ValueError: the networks differ.
    """
    if own is None:
        return [
            "not checked: strides and activations, which the file does not name; names and shapes of all weights fit"
        ]
    axes = relative_order(order, plan.axis_order)
    one, other = (
        {"network_class_name": found["network_class_name"].rpartition(".")[2]} | found["arch_kwargs"]
        for found in (turned_architecture(own.architecture, axes), plan.architecture)
    )
    names = sorted({*one, *other} - {"deep_supervision"})
    if differing := [name for name in names if one.get(name) != other.get(name)]:
        shown = "; ".join(
            f"{name}: {one.get(name)} in pre-training, {other.get(name)} in the plan" for name in differing
        )
        raise ValueError(f"{source}: expected the network of the plan {plan.name}, got another ({shown}); {ADVICE}")
    return []
