"""Settings in YAML: reading a recipe, writing the resolved settings, and what may change between a run and its
continuation.
"""

import types
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object

from hyspark.config.classification import ClassifyConfig
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.segmentation import FinetuneConfig
from hyspark.utils.atomic import write_whole
from hyspark.utils.text import nearest

Config = PretrainConfig | FinetuneConfig | ClassifyConfig
ConfigT = TypeVar("ConfigT", PretrainConfig, FinetuneConfig, ClassifyConfig)


def field_help(config_class: type) -> dict[str, str]:
    """The docstring of each field, base classes included."""
    docs: dict[str, str] = {}
    for cls in reversed(config_class.__mro__[:-1]):
        docs |= {p.arg_name: p.description or "" for p in parse_from_object(cls).params}
    return docs


def read_yaml(path: str | Path, config_class: type) -> dict[str, Any]:
    """Values of a YAML recipe, each in the type of its field.

    Raises FileNotFoundError for a missing file; ValueError, naming the file, for an unknown key or a value of
    another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; the recipes that come with the project are in configs/")
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: expected lines of `name: value`, got {type(loaded).__name__}")
    return typed_values(loaded, config_class, str(path))


def typed_values(loaded: Mapping[str, Any], config_class: type, source: str) -> dict[str, Any]:
    """Plain values (see `as_plain`) in the types of their fields.

    Raises ValueError, naming the source, for an unknown key or a value of another type.
    """
    hints = {f.name: get_type_hints(config_class)[f.name] for f in fields(config_class)}
    values = {}
    for key, value in loaded.items():
        if key not in hints:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(str(key), hints)}")
        try:
            values[key] = coerce(value, hints[key])
        except (TypeError, ValueError):
            wanted = (
                hints[key]
                if isinstance(hints[key], types.GenericAlias)
                else getattr(hints[key], "__name__", hints[key])
            )
            raise ValueError(f"{source}: {key} should be {wanted}, but it is {value!r}") from None
    return values


def coerce(value: Any, hint: Any) -> Any:
    """A YAML value in a field's type: lists become tuples, whole numbers become floats where a float is wanted, 1e-4
    is a number.
    """
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        values = value if isinstance(value, list | tuple) else [value]
        if inner[-1] is not Ellipsis and len(values) != len(inner):
            raise ValueError
        return tuple(coerce(v, inner[0]) for v in values)
    if get_origin(hint) is Literal:
        return str(value)
    if hint is float and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError
    return value


def write_yaml(config: Config, path: Path) -> None:
    """Write every field, so that `--config` on the file gives the same settings."""
    write_whole(path, yaml.safe_dump(as_plain(config), sort_keys=False).encode())


def as_plain(config: Config) -> dict[str, Any]:
    """The fields as plain values, tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


MAY_CHANGE = {
    *("max_steps", "save_every", "dataloader_workers", "prepare_workers", "store_dir", "device", "dry_run"),
    *("keep_last", "on_bad_case", "deterministic", "replay", "tf32", "cudnn_benchmark", "compile"),
    *(
        "exp_name",
        "exp_dir",
        "logdir",
        "resume_from",
        "picture_every",
        "probe_data",
        "probe_every",
        "probe_cases",
        "val_every",
        "data_path",
        "data_dir",
        "test_dir",
        "sw_batch_size",
    ),
}
"""Fields that may differ between a run and its continuation: they change neither the batches nor the weights, or
only move files.
"""


def differences(old: Mapping[str, Any], config: Config) -> list[str]:
    """Settings that forbid continuing a run, one line each: 'name: was X, is Y'. A field that is not in `old` had
    its default; the precision auto leaves the choice to the run.
    """
    defaults = as_plain(type(config)())
    return [
        f"{name}: was {old.get(name, defaults[name])}, is {value}"
        for name, value in as_plain(config).items()
        if name not in MAY_CHANGE and (name, value) != ("precision", "auto") and old.get(name, defaults[name]) != value
    ]
