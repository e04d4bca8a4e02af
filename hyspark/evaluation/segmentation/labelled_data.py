"""Labelled cases on the disk, and whether their classes are those of a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hyspark.data.datasets import datalist_json, nnunet
from hyspark.data.datasets.cases import Case, common_labels


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


def find_labelled(data: Path, part: str = "") -> LabelledCases:
    """Find labelled cases on the disk.

    Args:
        data: A decathlon JSON, an nnU-Net data set (imagesTr, labelsTr), or a folder of such data sets. All labelled
            cases of folders are taken.
        part: Part of a JSON: "training", "validation" or "all". By default "validation", or "all" if it lists none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are no such cases, or two of one name.
    """
    if data.is_file():
        listed = datalist_json.read_datalist(data, require_labels=True)
        part = part or ("validation" if listed.validation else "all")
        parts = {"training": listed.training, "validation": listed.validation}
        cases = [case for name, found in parts.items() if part in (name, "all") for case in found]
        if not cases:
            raise ValueError(f"{data} lists no {part} cases")
        return LabelledCases(cases, listed.labels, f"{part} cases of {data}")
    if data.suffix == ".json":
        raise FileNotFoundError(f"{data}: no such file; expected a decathlon JSON")
    if part not in ("", "all"):
        raise ValueError(f"--part {part}: expected a decathlon JSON, got the folder {data}; drop --part")
    if (data / "imagesTr").is_dir():
        found = nnunet.dataset_cases(data.absolute(), labels=True, channel="0000")
        cases = nnunet.only_labelled(found, data)
    else:
        cases = nnunet.scan_cases(data, labels=True)
    if len({case.name for case in cases}) < len(cases):
        raise ValueError(f"{data} holds data sets with cases of one name; score one data set at a time")
    labels = common_labels(sorted({case.image.parent.parent for case in cases}))
    return LabelledCases(cases, labels, f"all labelled cases of {data}")


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
