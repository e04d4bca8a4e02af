"""Checks of settings that several classes share."""

from collections.abc import Iterable
from typing import Any

from hyspark.utils.text import nearest


def positive(config: Any, *names: str) -> None:
    """Raise ValueError if a field is not above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be above 0, but it is {getattr(config, name)}")


def not_negative(config: Any, *names: str) -> None:
    """Raise ValueError if a field is below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, but it is {getattr(config, name)}")


def between(config: Any, name: str, low: float, high: float) -> None:
    """Raise ValueError if a field is outside low <= x < high."""
    if not low <= getattr(config, name) < high:
        raise ValueError(f"{name} must be at least {low} and below {high}, but it is {getattr(config, name)}")


def check_probabilities(name: str, values: Iterable[float]) -> None:
    """Raise ValueError if a value is not a probability."""
    if any(not 0 <= p <= 1 for p in values):
        raise ValueError(f"{name} must be probabilities between 0 and 1, but got {tuple(values)}")


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError, with the nearest choice, if the value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}{nearest(str(value), choices)}")
