"""Initial weights of a run: random ones from the seed, and pre-trained ones."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hyspark.config.shared import VolumeSettings
from hyspark.config.yaml_files import load_mapping
from hyspark.data.intensity import OF_CT
from hyspark.data.seeds import seed_at
from hyspark.data.settings import PrepareSettings
from hyspark.models.weights.load import LoadReport, is_own_network, load_pretrained
from hyspark.models.weights.nnunet_settings import HU_WINDOWS, VOLUME_AXES
from hyspark.utils.log import LOG
from hyspark.utils.text import short_text

InitialisedT = TypeVar("InitialisedT", bound=nn.Module)
INPUT_SETTINGS = tuple(setting.name for setting in fields(PrepareSettings))
"""Settings that determine a network's input from a volume."""
SHOWN_SETTINGS = (*INPUT_SETTINGS, "crop_size", "axis_order")
"""Settings of weights that are printed."""


def initialise(build: Callable[[], InitialisedT], seed: int) -> InitialisedT:
    """Build a network with random weights from a run's seed; the global generator is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(seed, "weights"))
        return build()


def load_volume_weights(model: nn.Module, path: str | Path, config: VolumeSettings) -> LoadReport:
    """Load weights of a network of volumes, and warn of another spacing or intensity than this run's.

    Raises:
        FileNotFoundError, ValueError: As `load_pretrained`.
    """
    report = load_pretrained(model, path, config.weights_key)
    for line in describe_differences(model, path, report, config):
        LOG.warning("%s", line)
    return report


def describe_differences(
    model: nn.Module,
    path: str | Path,
    report: LoadReport,
    settings: PrepareSettings,
    unknown: Collection[str] = (),
) -> list[str]:
    """Describe in what a network's input differs from what its loaded weights were made with, one line for each.

    Args:
        model: The network.
        path: File of the weights.
        report: What was loaded.
        settings: Preparation of the volumes that the network will see.
        unknown: Names of settings whose value is not known, which are not compared.
    """
    made_with = report.made_with or settings_beside(Path(path))
    made_with = {name: value for name, value in made_with.items() if name not in unknown}
    lines = []
    for name, own, other in differing_inputs(settings, made_with):
        shown, wanted = (" ".join(map(str, values)) for values in (other, own))
        lines.append(f"{path} was made with {name} {shown}, this run has {wanted}")
    if not made_with and is_own_network(model) and set(settings.intensity) != {"ct"}:
        lines.append(
            f"{path} does not say for which intensity it was made (the released weights: ct), this run has "
            + " ".join(settings.intensity)
        )
    own, other = (axis_order_of(given) for given in (vars(settings), made_with))
    if own != other and any(name in made_with for name in INPUT_SETTINGS):
        shown, wanted = (" ".join("xyz"[axis] for axis in order) for order in (other, own))
        lines.append(
            f"{path} was made with arrays of axes {shown}, this run has {wanted}: its kernels lie along other axes"
        )
    return lines


def describe_inputs(made_with: Mapping[str, Any]) -> list[str]:
    """Describe the input of the network that weights were made with, in a line; none if they do not say it."""
    given = {name: as_values(made_with.get(name, ()), name == "intensity") for name in SHOWN_SETTINGS}
    found = [f"{name} {short_text(values)}" for name, values in given.items() if values]
    if windows := made_with.get(HU_WINDOWS):
        shown = ", ".join(f"{window[0]:g} to {window[1]:g}" if window else "none" for window in windows)
        found.append(f"windows of HU by channel {shown}")
    return [f"made with  {', '.join(found)}"] if found else []


def axis_order_of(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the axis of x, y, z (0, 1, 2) that is each axis of a network, by the setting axis_order."""
    order = as_values(settings.get("axis_order", ()), False)
    return order if sorted(order) == list(VOLUME_AXES) else VOLUME_AXES


def settings_beside(path: Path) -> Mapping[str, Any]:
    """Return the settings of the run whose folder holds weights in the released format, which names none itself."""
    file = path.with_name("config.yaml")
    if not path.name.endswith("_timm_style.pth") or not file.is_file():
        return {}
    try:
        return load_mapping(file)
    except (OSError, ValueError):
        return {}


def differing_inputs(
    config: PrepareSettings, made_with: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...]]]:
    """Yield the settings of a network's input that are others than those that weights were made with.

    Weights that name a spacing or a window but no intensity are of one channel of CT, as all were before. The window,
    input_mean and input_std are compared where both sides read them.

    Args:
        config: Settings of this run.
        made_with: Settings that the weights were made with; empty if unknown.

    Yields:
        Name of a setting, its values in this run, and those of the weights.
    """
    if not any(name in made_with for name in INPUT_SETTINGS):
        return
    known: dict[str, tuple[Any, ...]] = {"intensity": ("ct",), "image_channels": (0,)}
    known |= {name: as_values(made_with[name], name == "intensity") for name in INPUT_SETTINGS if name in made_with}
    known |= window_per_channel(config, made_with)
    both = set(config.intensity) & set(known["intensity"])
    unread: set[str] = set() if both & set(OF_CT) else {"hu_min", "hu_max"}
    unread |= set() if "ct-zscore" in both else {"input_mean", "input_std"}
    for name in INPUT_SETTINGS:
        own, other = as_values(getattr(config, name), name == "intensity"), known.get(name, ())
        longest = max(len(own), len(other))
        if name not in unread and other and expanded(own, longest) != expanded(other, longest):
            yield name, own, other


def window_per_channel(config: PrepareSettings, made_with: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return hu_min and hu_max of each channel that weights were made with; empty where they were one for all.

    A channel that is not CT has those of the run, which do not matter to it.
    """
    own = (config.hu_min, config.hu_max)
    windows = [window or own for window in made_with.get(HU_WINDOWS, ())]
    return {name: tuple(window[i] for window in windows) for i, name in enumerate(("hu_min", "hu_max")) if windows}


def expanded(values: tuple[Any, ...], num: int) -> tuple[Any, ...]:
    """Repeat the value of a setting with one value for all; others are as they are."""
    return values * num if len(values) == 1 else values


def as_values(value: object, is_text: bool) -> tuple[Any, ...]:
    """Return a setting of one or several texts or numbers as a tuple; empty for a value of another type."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if all(isinstance(x, str if is_text else int | float) for x in values) else ()
