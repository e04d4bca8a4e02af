"""Initial weights of a run: random ones from the seed, and pre-trained ones."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from hyspark.config.shared import VolumeSettings
from hyspark.data.seeds import seed_at
from hyspark.data.settings import PrepareSettings
from hyspark.models.weights.load import LoadReport, load_pretrained
from hyspark.utils.log import LOG

InitialisedT = TypeVar("InitialisedT", bound=nn.Module)
INPUT_SETTINGS = tuple(setting.name for setting in fields(PrepareSettings))
"""Settings that determine a network's input from a volume."""


def initialise(build: Callable[[], InitialisedT], seed: int) -> InitialisedT:
    """Build a network with random weights from a run's seed; the global generator is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(seed, "weights"))
        return build()


def load_volume_weights(model: nn.Module, path: str | Path, config: VolumeSettings) -> LoadReport:
    """Load weights of a network of volumes, and warn of another spacing or window than this run's.

    Raises:
        FileNotFoundError, ValueError: As `load_pretrained`.
    """
    report = load_pretrained(model, path, config.weights_key)
    for name in INPUT_SETTINGS:
        own, other = (as_numbers(value) for value in (getattr(config, name), report.made_with.get(name)))
        if other and own != other and other * 3 != own:
            shown, wanted = (" ".join(map(str, numbers)) for numbers in (other, own))
            LOG.warning("%s was made with %s %s, this run has %s", path, name, shown, wanted)
    return report


def as_numbers(value: object) -> tuple[float, ...]:
    """Return a setting of one or several numbers as a tuple; empty for any other value."""
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    return numbers if all(isinstance(x, int | float) for x in numbers) else ()
