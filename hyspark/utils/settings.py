"""Fields of settings, with what is known of each besides its name, type and default value."""

from dataclasses import dataclass, field, fields
from typing import Any

GROUPS = ("data", "network", "optimisation", "run", "machine")
"""Groups of settings, in the order of `--help`."""


@dataclass(frozen=True)
class FieldInfo:
    """What is known of a setting besides its name, type and default value.

    Attributes:
        group: One of GROUPS.
        first: Whether `--help` lists it among the flags that matter first.
        old: Earlier spellings, which still work as YAML keys and flags.
        old_axes: Earlier spellings of the elements of a setting with one value per axis.
        methods: Pre-training methods that read it; empty if all do.
        may_change: Whether a resumed run may have another value.
        affects_results: Whether another value changes a result by more than rounding.
    """

    group: str = "data"
    first: bool = False
    old: tuple[str, ...] = ()
    old_axes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    may_change: bool = False
    affects_results: bool = True


def setting(default: Any, group: str, **known: Any) -> Any:
    """Make a dataclass field with its `FieldInfo`.

    Args:
        default: Default value, immutable.
        group: One of GROUPS.
        **known: Further attributes of `FieldInfo`.
    """
    return field(default=default, metadata={"info": FieldInfo(group, **known)})


def field_info(config_class: type) -> dict[str, FieldInfo]:
    """Return the `FieldInfo` of each field of a dataclass, by name."""
    return {field.name: field.metadata["info"] for field in fields(config_class)}
