"""The labelled cases of a segmentation run: training, validation, classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.build import read_data
from hyspark.data.datasets.cases import DEFAULT_CLASSES, Case, Datalist, advise_ignore
from hyspark.data.datasets.subjects import split_faults
from hyspark.data.datasets.subsets import draw_subset, subset_size
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.utils.text import nearest


class RunCases(NamedTuple):
    """The labelled cases of a run.

    Attributes:
        training: Cases to train on, the subset that the settings ask for.
        validation: Cases to validate on.
        names: Class names by label value.
        notes: What to know of them: files that are not used, and what makes the split doubtful.
    """

    training: list[Case]
    validation: list[Case]
    names: list[str]
    notes: list[str]


def find_labelled_cases(config: SegmentationConfig) -> tuple[list[Case], list[Case], list[str]]:
    """Find labelled training and validation cases, and the class names by label value; see `find_run_cases`."""
    return find_run_cases(config)[:3]


def find_run_cases(config: SegmentationConfig) -> RunCases:
    """Find the labelled cases of a run.

    Raises:
        ValueError: There is no case to train or to validate on, or there are fewer than the settings ask for.
    """
    listed = read_labelled_datalist(config)
    training, validation = list(listed.training), list(listed.validation)
    if not training or not validation:
        raise ValueError(
            f"{config.data}: {len(training)} labelled cases to train on and {len(validation)} to validate on; "
            "at least one of each is needed; name more cases in the data list, or change val_fraction"
        )
    faults = [f"split: {fault}" for fault in split_faults(training, validation, config.subject_regex)]
    names = class_names(config, listed.labels)
    return RunCases(draw_labelled_subset(training, config), validation, names, [*listed.unused, *faults])


def read_labelled_datalist(config: SegmentationConfig) -> Datalist:
    """Read the JSON that the settings name; else DATA/dataset.json if it is a data list; else the folders of data.

    Raises:
        FileNotFoundError: The settings name a JSON that does not exist.
    """
    path = Path(config.data)
    if config.json_list:
        inside, outside = path / config.json_list, Path(config.json_list)
        if not inside.is_file() and not outside.is_file():
            raise FileNotFoundError(
                f"json_list: no such file: {inside}{'' if inside == outside else f', and no {outside}'}; give the path "
                f"of a data list, or write one: hyspark datalist --labels --data {path} --out {inside}"
            )
        path = inside if inside.is_file() else outside
    return read_data(
        path,
        labels=True,
        val_fraction=config.val_fraction,
        subject_regex=config.subject_regex,
        fold=config.fold,
        channels=config.image_channels,
    )


def draw_labelled_subset(training: Sequence[Case], config: SegmentationConfig) -> list[Case]:
    """Draw the number of training cases that the settings ask for, in their order; see `draw_subset`."""
    num = subset_size(len(training), num_labelled=config.num_labelled, label_fraction=config.label_fraction)
    return [training[i] for i in draw_subset([(case.dataset, case.name) for case in training], num, config.seed)]


def class_names(config: SegmentationConfig, labels: dict[str, int] | None) -> list[str]:
    """Return class names by label value, background first.

    Raises:
        ValueError: out_channels and the data's labels disagree.
    """
    if not labels:
        num = config.out_channels or DEFAULT_CLASSES
        return ["background", *(f"class_{v}" for v in range(1, num))]
    num = max(labels.values()) + 1
    if config.out_channels and config.out_channels != num:
        raise ValueError(
            f"out_channels is {config.out_channels}, but the data set's labels go from 0 to {num - 1}: {labels}; "
            "drop out_channels to take the number from the data"
        )
    by_value = {v: k for k, v in labels.items()}
    return [by_value.get(v, f"class_{v}") for v in range(num)]


def left_right_pairs(config: SegmentationConfig, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return the label values that a left-right flip swaps.

    Raises:
        ValueError: A name is no class, or comes twice, or is the background.
    """
    known = {name: value for value, name in enumerate(names)} | {str(value): value for value in range(len(names))}
    pairs = [tuple(side.strip() for side in pair.split("=")) for pair in config.left_right]
    for side in (side for pair in pairs for side in pair):
        if side not in known:
            raise ValueError(f"left_right names {side!r}, which is no class{nearest(side, names)}: {', '.join(names)}")
    values = [known[side] for pair in pairs for side in pair]
    if len(set(values)) != len(values) or 0 in values:
        raise ValueError(f"left_right names a class twice, or the background: {', '.join(config.left_right)}")
    return tuple((known[a], known[b]) for a, b in pairs)


def unpaired_sides(names: Sequence[str], swaps: Sequence[tuple[int, int]] = ()) -> list[str]:
    """List the class names that say left or right and are in none of the pairs of label values."""
    paired = {value for pair in swaps for value in pair}
    sides = ("left", "right")
    return [n for value, n in enumerate(names) if value not in paired and any(side in n.lower() for side in sides)]


def label_fault(volume: StoredVolume, names: Sequence[str]) -> str:
    """Return what is wrong with a label whose values go beyond the classes; empty if nothing."""
    if volume.entry.max_label < len(names):
        return ""
    return (
        f"its label holds the value {volume.entry.max_label}, but the classes go from 0 to {len(names) - 1} "
        f"({', '.join(names)}); classes come from the training data's dataset.json, or from --out_channels if that "
        f"names none{advise_ignore([volume.entry.max_label])}"
    )
