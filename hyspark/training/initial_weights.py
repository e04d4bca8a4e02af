"""Weights that a run on volumes starts from."""

from dataclasses import fields
from pathlib import Path

from torch import nn

from hyspark.config.shared import VolumeSettings
from hyspark.data.settings import PrepareSettings
from hyspark.models.weights.load import LoadReport, load_pretrained
from hyspark.utils.log import LOG

SEEN = tuple(setting.name for setting in fields(PrepareSettings))
"""Settings that decide what a network sees of a volume."""


def load_start(model: nn.Module, path: str | Path, config: VolumeSettings) -> LoadReport:
    """Load weights and return what matched; warns where the file says that they have seen volumes of another spacing or
    window. Raises as `load_pretrained`.
    """
    found = load_pretrained(model, path)
    for name in SEEN:
        own, other = (as_numbers(value) for value in (getattr(config, name), found.made_with.get(name)))
        if other and own != other and other * 3 != own:
            LOG.warning("%s was made with %s %s, this run has %s", path, name, text(other), text(own))
    return found


def as_numbers(value: object) -> tuple[float, ...]:
    """A setting of one or several numbers; empty where it is anything else."""
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    return numbers if all(isinstance(x, int | float) for x in numbers) else ()


def text(numbers: tuple[float, ...]) -> str:
    """Numbers as the flags take them."""
    return " ".join(map(str, numbers))
