"""Labelled cases on the disk, and whether their classes are those of a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hyspark.data.datasets import datalist_json
from hyspark.data.datasets.cases import Case, common_labels
from hyspark.data.datasets.data_folder import find_cases, labelled_of, read_data_folder
from hyspark.data.datasets.found import log_unused
from hyspark.data.datasets.words import FIRST_CHANNELS
from hyspark.utils.text import listing


class LabelledCases(NamedTuple):
    """Labelled cases.

    Attributes:
        cases: The cases.
        labels: Values by class name; None if the data does not name its classes.
        text: The cases, in words.
    """

    cases: list[Case]
    labels: dict[str, int] | None
    text: str


def find_labelled(
    data: Path, part: str = "", fold: int | None = None, channels: Sequence[int] = FIRST_CHANNELS
) -> LabelledCases:
    """Find labelled cases on the disk.

    Args:
        data: A decathlon JSON, or a folder of data (see `read_data_folder`). All labelled cases of folders are taken. A
            folder without images that holds a list dataset.json stands for the list.
        part: Part of a JSON: "training", "validation" or "all". By default "validation", or "all" if it lists none.
        fold: Fold for validation, where the entries of a JSON have folds; None for the first.
        channels: Channels that are read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are no such cases, or two of one name.
    """
    if data.is_file():
        return listed_cases(data, part, fold, channels)
    if data.suffix == ".json":
        raise FileNotFoundError(f"{data}: no such file; expected a decathlon JSON")
    found = read_data_folder(data, channels)
    list_file = data / "dataset.json"
    if not found.cases and list_file.is_file() and datalist_json.is_datalist(list_file):
        return listed_cases(list_file, part, fold, channels)
    if part not in ("", "all"):
        raise ValueError(f"--part {part}: expected a decathlon JSON, got the folder {data}; drop --part")
    found = find_cases(data, labels=True, channels=channels)
    cases = labelled_of(found)
    log_unused(found.unused_lines())
    if len({case.name for case in cases}) < len(cases):
        raise ValueError(f"{data} holds data sets with cases of one name; score one data set at a time")
    labels = common_labels(one.folder for one in found.sets if any(case.label for case in one.cases))
    return LabelledCases(cases, labels, f"all labelled cases of {data}")


def listed_cases(path: Path, part: str, fold: int | None, channels: Sequence[int]) -> LabelledCases:
    """Read the labelled cases of a part of a decathlon JSON; see `find_labelled`."""
    folds = datalist_json.read_list(path, fold=None, channels=channels).folds
    if folds and fold is not None and fold not in folds:
        raise ValueError(
            f"{path}: the network was validated on fold {fold}, but the folds of this list are "
            f"{listing(map(str, folds))}; use --part all"
        )
    fold = fold if folds else None
    listed = datalist_json.read_datalist(path, require_labels=True, fold=fold, channels=channels)
    part = part or ("validation" if listed.validation else "all")
    parts = {"training": listed.training, "validation": listed.validation}
    cases = [case for name, found in parts.items() if part in (name, "all") for case in found]
    if not cases:
        raise ValueError(f"{path} lists no {part} cases")
    log_unused(listed.unused)
    return LabelledCases(cases, listed.labels, f"{part} cases of {path}")


def check_classes(names: Sequence[str], labels: dict[str, int] | None, data: Path) -> None:
    """Compare the classes of the data with those of the network; class_N is no name.

    Raises:
        ValueError: They give different names to one value.
    """
    for name, value in (labels or {}).items():
        own = names[value] if value < len(names) else "none"
        if normalised_name(own) != normalised_name(name) and f"class_{value}" not in (own, name):
            raise ValueError(
                f"{data}: the value {value} is {name!r} there, but {own!r} for the network, whose classes are "
                f"{', '.join(names)}"
            )


def normalised_name(name: str) -> str:
    """Write a class name in lower case, with spaces for - and _."""
    return name.lower().replace("_", " ").replace("-", " ")
