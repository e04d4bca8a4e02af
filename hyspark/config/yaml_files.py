"""YAML recipes: files of the user, and those of the package by their names."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hyspark.utils.install import PACKAGE
from hyspark.utils.text import nearest

FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "configs")
"""Recipes of the package: of an installed wheel, of a checkout."""


class UniqueKeyLoader(yaml.SafeLoader):
    """A loader that refuses a key with two values, of which YAML's own silently drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping.

        Raises:
            ValueError: A key comes twice; the message names it with its lines.
        """
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise ValueError(f"{key.value!r} is set in line {lines[key.value]} and in line {line}; keep one")
        return super().construct_mapping(node, deep)


def load_mapping(path: Path) -> Mapping[Any, Any]:
    """Load a YAML file of lines `name: value`.

    Raises:
        ValueError: It is no YAML mapping, is empty, or sets a key twice.
    """
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty; expected lines of `name: value`")
    try:
        loaded = UniqueKeyLoader(content).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not valid YAML{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}  # comments alone
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: expected lines of `name: value`, got {type(loaded).__name__}")
    return loaded


def find_recipe(name: str | Path, verb: str = "") -> Path:
    """Return the file that a recipe's name or path means; a file of the user comes first.

    Args:
        name: File, or the name of a recipe of the package, with or without the first word of its verb.
        verb: The verb that reads it.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipe_files()
    if str(name) == path.name and path.suffix in ("", ".yaml"):
        for stem in (path.stem, f"{verb.partition('-')[0]}_{path.stem}"):
            if stem in known:
                return known[stem]
    if path.is_dir() and str(name):
        raise FileNotFoundError(f"--config {name}: expected a YAML recipe, got a folder; name a file in it")
    suggestion = f"; --config {path.stem} is the package's own" if path.stem in known else nearest(path.stem, known)
    raise FileNotFoundError(
        f"no recipe at {name or repr('')}; expected a YAML file, or one of the package: {', '.join(known)}{suggestion}"
    )


def recipe_files() -> dict[str, Path]:
    """Return the recipes of the package by their names."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
