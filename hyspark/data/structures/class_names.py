"""Names of structures -> classes, by a YAML file of synonyms."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from hyspark.utils.paths import read_text
from hyspark.utils.text import first_line

MAX_VALUE = 254
"""Largest value of a class; 255 stands for voxels that are not annotated."""
EXPECTED_CLASSES = 'expected {class: [synonym, "PATTERN*"], ...} or {class: {value: 3, names: [synonym]}, ...}'


@dataclass(frozen=True)
class ClassNames:
    """Classes with the names of their structures.

    Attributes:
        values: value of each class, in the order of the file.
        synonyms: simplified names and patterns of each class.
    """

    values: Mapping[str, int]
    synonyms: Mapping[str, tuple[str, ...]]

    def class_of(self, name: str) -> str:
        """Return the class of a structure: of an equal name, else of the first pattern; empty for none."""
        simple = simplified(name)
        for matches in (str.__eq__, fnmatchcase):
            for title, synonyms in self.synonyms.items():
                if any(matches(simple, synonym) for synonym in synonyms):
                    return title
        return ""


def simplified(name: str) -> str:
    """Return a name in small letters, with single spaces for spaces, "_" and "-"."""
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold().strip()


def read_class_names(path: Path) -> ClassNames:
    """Read the YAML file of classes and synonyms.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--label_names {path}: no such file; {EXPECTED_CLASSES}")
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--label_names {path}: not valid YAML ({first_line(error)})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"--label_names {path}: {EXPECTED_CLASSES}, got {content!r:.80}")
    values: dict[str, int] = {}
    synonyms: dict[str, tuple[str, ...]] = {}
    for title, entry in content.items():
        value, names = as_class(title, entry, len(values) + 1, path)
        values[str(title)] = value
        synonyms[str(title)] = tuple(dict.fromkeys(map(simplified, (str(title), *names))))
    if len(set(values.values())) < len(values):
        raise ValueError(f"--label_names {path}: expected one value for each class, got {values}")
    return ClassNames(values, synonyms)


def as_class(title: Any, entry: Any, number: int, path: Path) -> tuple[int, list[str]]:
    """Return the value and the synonyms of a class of the file."""
    value: Any = number
    if isinstance(entry, dict) and set(entry) <= {"value", "names"}:
        value, entry = entry.get("value", number), entry.get("names")
    names = [entry] if isinstance(entry, str) else [] if entry is None else entry
    is_named = isinstance(names, list) and all(isinstance(name, str | int) for name in names)
    if not is_named or not isinstance(title, str | int) or str(title).lower() == "background":
        raise ValueError(f"--label_names {path}: {title}: {EXPECTED_CLASSES}, got {entry!r:.80}")
    if type(value) is not int or not 0 < value <= MAX_VALUE:
        raise ValueError(f"--label_names {path}: {title}: expected a value from 1 to {MAX_VALUE}, got {value!r}")
    return value, [str(name) for name in names]


def class_names_found(names: Iterable[str]) -> ClassNames:
    """Make a class of each name, sorted; names that differ in letter case, spaces, "_" and "-" alone are one.

    Raises:
        ValueError: there are more names than values.
    """
    titles: dict[str, str] = {}
    for name in sorted(names):
        titles.setdefault(simplified(name) or "unnamed", name.strip() or "unnamed")
    if len(titles) > MAX_VALUE:
        raise ValueError(
            f"--labels: {len(titles)} names of structures, above {MAX_VALUE} classes; choose by --label_names"
        )
    ordered = sorted(titles)
    return ClassNames(
        {titles[simple]: value for value, simple in enumerate(ordered, 1)},
        {titles[simple]: (simple,) for simple in ordered},
    )
