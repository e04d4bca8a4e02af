"""Settings in YAML: recipes are read, resolved settings are written, and earlier spellings become the present ones."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object

from hyspark.config.classification import ClassificationConfig
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.segmentation import SegmentationConfig
from hyspark.config.yaml_files import find_recipe, load_mapping
from hyspark.data.intensity import reads_window
from hyspark.data.settings import PrepareSettings
from hyspark.models.nnunet_plans import without_plan_folder
from hyspark.utils.atomic import write_whole
from hyspark.utils.settings import field_info
from hyspark.utils.text import nearest

Config = PretrainConfig | SegmentationConfig | ClassificationConfig
ConfigT = TypeVar("ConfigT", PretrainConfig, SegmentationConfig, ClassificationConfig)
SETTINGS_OF = {"pretrain": PretrainConfig, "finetune": SegmentationConfig, "finetune-classifier": ClassificationConfig}
"""Verbs that train, with the class of their settings."""


def field_help(config_class: type) -> dict[str, str]:
    """Return the docstring of each field by name, base classes included."""
    docs: dict[str, str] = {}
    for cls in reversed(config_class.__mro__[:-1]):
        docs |= {p.arg_name: p.description or "" for p in parse_from_object(cls).params}
    return docs


def old_spellings(config_class: type) -> dict[str, str]:
    """Return the earlier spellings of settings, each with the present one."""
    return {old: name for name, info in field_info(config_class).items() for old in (*info.old, *info.old_axes)}


def present_spelling(
    values: Mapping[str, Any], config_class: type, source: str = "settings", base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Replace earlier spellings of settings by the present ones.

    Args:
        values: Settings by name, in any spelling.
        config_class: Class of the settings.
        source: What messages call the origin of the values.
        base: Settings below these, by their present names; a setting of one axis changes them.

    Raises:
        ValueError: A setting is given in two spellings.
    """
    renamed, infos = old_spellings(config_class), field_info(config_class)
    found: dict[str, Any] = {}
    spelled: dict[str, list[str]] = {}
    for name, value in values.items():
        new = renamed.get(name, name)
        axes = infos[new].old_axes if new in infos else ()
        spelled.setdefault(new, []).append(name)
        if len(spelled[new]) > 1 and not set(spelled[new]) <= set(axes):
            raise ValueError(f"{source}: {' and '.join(spelled[new])} are one setting; keep one of the two")
        if name in axes:
            whole = (base or {}).get(new, getattr(config_class, new))
            edges = axis_values(found.get(new, whole), axes)
            edges[axes.index(name)] = value
            found[new] = edges
        else:
            found[new] = "none" if (name, value) == ("init_weight", "") else value
    return found


def axis_values(value: Sequence[Any], axes: Sequence[str]) -> list[Any]:
    """Expand one value for all axes to one value per axis."""
    return list(value) * len(axes) if len(value) == 1 else list(value)


def read_yaml(name: str | Path, config_class: type) -> dict[str, Any]:
    """Read a YAML recipe.

    Args:
        name: File, or the name of a recipe of the package, such as finetune_openkbp or openkbp.
        config_class: Class of the settings.

    Returns:
        Values by the present names of the settings, each in the type of its field.

    Raises:
        FileNotFoundError: There is no such file and no such recipe.
        ValueError: It is no YAML mapping, or has an unknown key or a value of another type.
    """
    path = find_recipe(name, next(verb for verb, one in SETTINGS_OF.items() if issubclass(config_class, one)))
    return typed_values(load_mapping(path), config_class, str(path))


def typed_values(
    loaded: Mapping[str, Any], config_class: type, source: str, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Convert plain values (see `as_plain`) to the types of their fields.

    Args:
        loaded: Values by name, in any spelling.
        config_class: Class of the settings.
        source: What messages call the origin of the values.
        base: Settings below these, by their present names; a setting of one axis changes them.

    Raises:
        ValueError: There is an unknown key, or a value of another type.
    """
    hints = {f.name: get_type_hints(config_class)[f.name] for f in fields(config_class)}
    renamed = old_spellings(config_class)
    given = {renamed.get(key, key): key for key in loaded}
    values = {}
    for key, value in present_spelling(loaded, config_class, source, base).items():
        if key not in hints:
            earlier = {old: new for one in SETTINGS_OF.values() for old, new in old_spellings(one).items()} | renamed
            here = nearest(str(key), hints, {old: new for old, new in earlier.items() if new in hints})
            owner = "" if earlier.get(key) in hints else owner_of_settings(loaded, key)
            raise ValueError(f"{source}: unknown key {key!r}{owner or here}")
        if get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            quoted = "; in YAML, quote yes, no, on and off" if isinstance(value, bool) else ""
            choices = get_args(hints[key])
            raise ValueError(
                f"{source}: {given[key]} must be one of {', '.join(choices)}, not {value!r}"
                f"{nearest(str(value), choices)}{quoted}"
            )
        try:
            values[key] = coerce(value, hints[key])
        except (TypeError, ValueError, OverflowError):
            wanted = (
                hints[key]
                if isinstance(hints[key], types.GenericAlias)
                else getattr(hints[key], "__name__", hints[key])
            )
            raise ValueError(f"{source}: {given[key]} should be {wanted}, but it is {value!r}") from None
    return values


def owner_of_settings(values: Mapping[str, Any], key: str) -> str:
    """Return '; ...' with the verb that has a setting, or all of the settings; empty if none has it."""
    known = {verb: {*field_info(one), *old_spellings(one)} for verb, one in SETTINGS_OF.items()}
    if whole := [verb for verb, names in known.items() if names >= set(values)]:
        return f"; these are settings of `hyspark {whole[0]}`"
    owners = [f"`hyspark {verb}`" for verb, names in known.items() if key in names]
    return f"; it is a setting of {' and '.join(owners)}" if owners else ""


def coerce(value: Any, hint: Any) -> Any:
    """Convert a YAML value to a field's type: lists become tuples, integers become floats, 1e-4 is a number.

    Raises:
        TypeError, ValueError, OverflowError: The value is of another type.
    """
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        value = value.tolist() if hasattr(value, "tolist") else value
        values = value if isinstance(value, list | tuple) else [value]
        if inner[-1] is not Ellipsis and len(values) != len(inner):
            raise ValueError
        return tuple(coerce(v, inner[0]) for v in values)
    if get_origin(hint) is Literal:
        return str(value)
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)) or "\0" in str(value):
        raise TypeError
    return value


def write_yaml(config: Config, path: Path) -> None:
    """Write every field, so that `--config` with the file gives the same settings."""
    write_whole(path, yaml.safe_dump(as_plain(config), sort_keys=False).encode())


def as_plain(config: Config) -> dict[str, Any]:
    """Convert settings to plain values, tuples to lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def shown_settings(config: Config) -> dict[str, Any]:
    """Convert settings to plain values for a report, without those of CT in a run on other images."""
    unread = () if not isinstance(config, PrepareSettings) or reads_window(config) else ("hu_min", "hu_max")
    return {name: value for name, value in as_plain(config).items() if name not in unread}


def differences(old: Mapping[str, Any], config: Config) -> list[str]:
    """List the settings that forbid a run to continue.

    Args:
        old: Plain settings of the run, in any spelling. A missing field has its default.
        config: Settings of the continuation. precision=auto keeps that of the run.

    Returns:
        Lines "name: was X, is Y".
    """
    config_class = type(config)
    known = as_plain(config_class()) | present_spelling(old, config_class)
    infos = field_info(config_class)
    lines = []
    for name, value in as_plain(config).items():
        before = known[name]
        if infos[name].old_axes:
            before, value = (axis_values(v, infos[name].old_axes) for v in (before, value))
        if name == "model":
            before, value = (without_plan_folder(v) for v in (before, value))
        if not infos[name].may_change and (name, value) != ("precision", "auto") and before != value:
            lines.append(f"{name}: was {before}, is {value}")
    return lines
