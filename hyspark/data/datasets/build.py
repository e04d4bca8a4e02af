"""nnU-Net folders -> a data list, split into training and validation.

Layout on disk: `DatasetXXX_Name/{imagesTr,labelsTr}`, images `CASE_0000.nii.gz`, labels `CASE.nii.gz`. Optional are
nnU-Net's `dataset.json` (class names) and a `splits.json`. BTCV's own names (img0001, label0001) are understood too.
Only file names are read; no image is opened. Cases found and not used are listed in `Datalist.excluded`. `organize`
brings loose files into this layout.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyspark.data.datasets.cases import Case, Datalist, common_labels
from hyspark.data.datasets.nnunet import dataset_cases, only_labelled, scan_images
from hyspark.data.datasets.splits import split_by_file, split_by_subject, splits_file


def build_datalist(
    data_path: Path,
    *,
    labels: bool = False,
    channel: str = "0000",
    splits: str = "",
    val_fraction: float = 0.2,
    seed: int = 0,
    subject_regex: str = "",
) -> Datalist:
    """Build the data list of all cases below a folder, with class names if the data sets' dataset.json give them.

    Args:
        data_path: folder that holds `DatasetXXX_Name/imagesTr`, at any depth.
        labels: whether to use labelled cases only.
        channel: four digits of the images' channel.
        splits: one of
            - "": all cases are for training;
            - path of a splits file, see `split_by_file`;
            - "auto": each data set's own splits.json or splits_final.json, or `split_by_subject` if it has none.
        val_fraction: fraction of subjects for validation, of `split_by_subject`.
        seed: seed of `split_by_subject`.
        subject_regex: pattern of subjects in case names, see `subject_of`.

    Raises:
        FileNotFoundError: if there is no case, no label or no splits file.
        ValueError: if files or splits contradict each other, or no case remains for training.
    """
    cases = scan_images(data_path, labels=labels, channel=channel)
    drawing: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed, "subject_regex": subject_regex}
    return split_cases(cases, data_path, labels=labels, splits=splits, **drawing)


def read_folder(folder: Path, *, seed: int, val_fraction: float, subject_regex: str = "") -> Datalist:
    """List the labelled cases of one data set folder, of any name, split by its splits.json or else by subject."""
    folder = Path(os.path.abspath(folder))
    if not (folder / "imagesTr").is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with imagesTr and labelsTr, found no imagesTr")
    cases = dataset_cases(folder, labels=True, channel="0000")
    drawing: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed, "subject_regex": subject_regex}
    return split_cases(cases, folder, labels=True, splits="auto", **drawing)


def count_cases(datalist: Datalist) -> dict[str, dict[str, int]]:
    """Count the cases of each data set: training, validation, labelled (of these two), excluded."""
    table: dict[str, dict[str, int]] = {}
    for key in ("training", "validation", "excluded"):
        for case in getattr(datalist, key):
            row = table.setdefault(case.dataset, dict(training=0, validation=0, labelled=0, excluded=0))
            row[key] += 1
            row["labelled"] += key != "excluded" and case.label is not None
    return dict(sorted(table.items()))


def split_cases(cases: Sequence[Case], root: Path, *, labels: bool, splits: str, **drawing: Any) -> Datalist:
    """Split cases, record the excluded ones, and look up the class names.

    `drawing` are the options of `split_by_subject`. See `build_datalist`.
    """
    usable = only_labelled(cases, root) if labels else list(cases)
    folders = sorted({case.image.parent.parent for case in usable}, key=lambda folder: folder.name)
    training: list[Case] = usable
    validation: list[Case] = []
    if splits == "auto":
        training = []
        for folder in folders:
            members = [case for case in cases if case.image.parent.parent == folder]
            if file := splits_file(folder):
                sides = split_by_file(members, file, labels=labels)
            else:
                members = [case for case in members if not labels or case.label is not None]
                sides = split_by_subject(members, **drawing)
            training, validation = training + sides[0], validation + sides[1]
    elif splits:
        training, validation = split_by_file(cases, Path(splits), labels=labels)
    if not training:
        raise ValueError(f"{root}: expected at least one training case, got a split without any; fix the splits file")
    used = set(training) | set(validation)
    excluded = tuple(case for case in cases if case not in used)
    return Datalist(tuple(training), tuple(validation), common_labels(folders) if labels else None, excluded)
