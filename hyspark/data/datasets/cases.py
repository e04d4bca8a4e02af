"""Cases, data lists of training and validation cases, and class names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyspark.data.datasets.nnunet_prepared import NnunetPreparation
from hyspark.utils.digests import content_digest, text_digest
from hyspark.utils.paths import load_json
from hyspark.utils.text import listing

DEFAULT_CLASSES = 14
"""Classes of a run on data that names none: those of BTCV."""
UNANNOTATED = 255
"""Value in a label map, once read, of voxels that count in neither loss nor scores."""
IGNORED_NAME = "ignore"
"""Name of such voxels among the "labels" of nnU-Net's dataset.json."""


@dataclass(frozen=True)
class Case:
    """One image and its optional label.

    Attributes:
        name: file name without channel and ending.
        dataset: name of the data set's folder.
        image: path of the image.
        label: path of the label map.
        ignore: value in the label map's file of voxels to ignore; None if it has no such value.
        others: paths of the further channels of the image, in the order of the settings.
        prepared: how nnU-Net has prepared the image; None of a scan.
    """

    name: str
    dataset: str
    image: Path
    label: Path | None = None
    ignore: int | None = None
    others: tuple[Path, ...] = ()
    prepared: NnunetPreparation | None = None

    @property
    def images(self) -> tuple[Path, ...]:
        """The file of each channel."""
        return (self.image, *self.others)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files: channels, and the label map if there is one."""
        return self.images if self.label is None else (*self.images, self.label)

    @property
    def origin(self) -> str:
        """The path of the image, for messages."""
        return str(self.image)


@dataclass(frozen=True)
class Datalist:
    """The training and validation cases of one run.

    Attributes:
        training: cases to train on.
        validation: cases to validate on.
        labels: label values by class name, background included.
        excluded: cases that were found and are not used, for the summary on the terminal. They are not written to
            the file, and two lists that differ in them alone are equal.
        unused: lines for the terminal on files that are not used; likewise.
    """

    training: tuple[Case, ...]
    validation: tuple[Case, ...] = ()
    labels: dict[str, int] | None = None
    excluded: tuple[Case, ...] = field(default=(), compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)


def cases_digest(cases: Sequence[Case]) -> str:
    """Digest the names and the files' contents of cases in 12 digits, independent of their folders."""
    lines = []
    for case in cases:
        label = "" if case.label is None else content_digest(case.label)
        lines.append(f"{' '.join(map(content_digest, case.images))} {label} {case.name}")
    return text_digest(lines)


class DifferentClassesError(ValueError):
    """Data sets that name other classes."""


def common_labels(folders: Iterable[Path]) -> dict[str, int] | None:
    """Read the class names that all folders agree on; None if no dataset.json gives any.

    Raises:
        DifferentClassesError: if folders disagree.
        ValueError: if a dataset.json is no JSON object.
    """
    known: dict[str, int] | None = None
    origin = Path()
    for folder in folders:
        file = folder / "dataset.json"
        content = load_json(file) if file.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f'{file}: expected {{"labels": {{"background": 0, ...}}}}, got a {type(content).__name__}')
        if not content.get("labels"):
            continue
        labels = class_values(content["labels"], file)
        if known is not None and labels != known:
            raise DifferentClassesError(f"{origin} and {file} have different class names; make one list per data set")
        known, origin = labels, file
    return known


def name_value_pairs(labels: Any) -> list[tuple[str, Any]]:
    """List names and values of "labels" of either form; nothing for anything else."""
    pairs = list(labels.items()) if isinstance(labels, dict) else []
    if all(key.isdecimal() and isinstance(value, str) for key, value in pairs):
        return [(value, int(key)) for key, value in pairs]
    return pairs


def advise_ignore(values: Iterable[float]) -> str:
    """Return how to declare voxels that are not annotated, for an error, if undeclared values hold their usual one."""
    if UNANNOTATED not in values:
        return ""
    return (
        f'; if {UNANNOTATED} marks voxels that are not annotated, declare "ignore": {UNANNOTATED} among the labels of '
        "dataset.json"
    )


def ignored_value(labels: Any, path: Path) -> int | None:
    """Return the value of nnU-Net's "ignore" among "labels", of voxels that are not annotated; None without one.

    Raises:
        ValueError: if it is no value from 1 to 255; the message begins with `path`.
    """
    value = dict(name_value_pairs(labels)).get(IGNORED_NAME)
    if value is not None and not (type(value) is int and 0 < value <= UNANNOTATED):
        raise ValueError(f'{path}: "labels": "ignore": expected a value from 1 to {UNANNOTATED}, got {value!r}')
    return value


def class_values(labels: Any, path: Path) -> dict[str, int]:
    """Convert {"spleen": 1} (nnU-Net) or {"1": "spleen"} (decathlon) to class values by name, sorted by value.

    The name "ignore" is nnU-Net's for voxels that are not annotated, and no class (see `ignored_value`).

    Raises:
        ValueError: for anything else; the message begins with `path`.
    """
    pairs = name_value_pairs(labels)
    if regions := [name for name, value in pairs if isinstance(value, list)]:
        raise ValueError(
            f'{path}: "labels": expected one value per class, got regions (lists of values) for {listing(regions)}; '
            'give each value a name of its own, as in {"background": 0, "edema": 1, "tumour core": 2}'
        )
    pairs = [(name, value) for name, value in pairs if name != IGNORED_NAME]
    if not pairs or any(type(value) is not int or value < 0 for _, value in pairs):
        raise ValueError(
            f'{path}: "labels": expected class values as in {{"background": 0, "spleen": 1}}, got {labels!r}'
        )
    values = dict(sorted(pairs, key=lambda pair: pair[1]))
    if not len(pairs) == len(values) == len(set(values.values())):
        raise ValueError(f'{path}: "labels": expected one name and one value per class, got {labels!r}')
    return values
