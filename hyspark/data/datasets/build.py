"""nnU-Net folders -> dataset.json (a decathlon datalist): which cases a list holds, on which side.

Layout on disk: `DatasetXXX_Name/{imagesTr,labelsTr}`, images `CASE_0000.nii.gz`, labels `CASE.nii.gz`, and optionally
nnU-Net's `dataset.json` (class names) and a `splits.json`. BTCV's own names (img0001, label0001) are understood too.
Only file names are looked at; no image is opened. Nothing is dropped in silence: cases found and not used stand in
`Datalist.left_out`. Loose files are brought into this layout by `organize`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from hyspark.data.datasets.cases import Case, Datalist, common_labels
from hyspark.data.datasets.nnunet import dataset_cases, find_images, only_labelled
from hyspark.data.datasets.splits import split_by_file, split_by_subject


def build(
    data_path: Path,
    *,
    labels: bool = False,
    channel: str = "0000",
    splits: str = "",
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Datalist:
    """The datalist of everything `scan` finds, with class names where the data sets' dataset.json give them.

    `splits`: "" puts all cases in training; the path of a splits file applies it (`split_by_file`); "auto"
    takes each data set's own splits.json and, where there is none, splits that set with `split_by_subject`.
    Raises what `scan` and the two splits raise, and ValueError if no case is left to train on.
    """
    cases = find_images(data_path, labels=labels, channel=channel)
    return assemble(cases, data_path, labels=labels, splits=splits, val_fraction=val_fraction, seed=seed)


def read_folder(folder: Path, *, seed: int, val_fraction: float) -> Datalist:
    """The labelled cases of one data set folder, of any name, split by its splits.json or else by subject."""
    folder = Path(os.path.abspath(folder))
    if not (folder / "imagesTr").is_dir():
        raise FileNotFoundError(f"{folder} has no imagesTr: expected a folder with imagesTr and labelsTr")
    cases = dataset_cases(folder, labels=True, channel="0000")
    return assemble(cases, folder, labels=True, splits="auto", val_fraction=val_fraction, seed=seed)


def counts(datalist: Datalist) -> dict[str, dict[str, int]]:
    """Per data set the number of cases: training, validation, labelled (of these two), left_out."""
    table: dict[str, dict[str, int]] = {}
    for key in ("training", "validation", "left_out"):
        for case in getattr(datalist, key):
            row = table.setdefault(case.dataset, dict(training=0, validation=0, labelled=0, left_out=0))
            row[key] += 1
            row["labelled"] += key != "left_out" and case.label is not None
    return dict(sorted(table.items()))


def assemble(
    cases: Sequence[Case], root: Path, *, labels: bool, splits: str, val_fraction: float, seed: int
) -> Datalist:
    """Split `cases` as told, keep account of what is left out, and look up the class names."""
    usable = only_labelled(cases, root) if labels else list(cases)
    folders = sorted({case.image.parent.parent for case in usable}, key=lambda folder: folder.name)
    training: list[Case] = usable
    validation: list[Case] = []
    if splits == "auto":
        training = []
        for folder in folders:
            members = [case for case in cases if case.image.parent.parent == folder]
            if (folder / "splits.json").is_file():
                sides = split_by_file(members, folder / "splits.json", labels=labels)
            else:
                members = [case for case in members if not labels or case.label is not None]
                sides = split_by_subject(members, seed=seed, val_fraction=val_fraction)
            training, validation = training + sides[0], validation + sides[1]
    elif splits:
        training, validation = split_by_file(cases, Path(splits), labels=labels)
    if not training:
        raise ValueError(f"{root}: the split leaves no case to train on; check the splits file")
    used = set(training) | set(validation)
    left_out = tuple(case for case in cases if case not in used)
    return Datalist(tuple(training), tuple(validation), common_labels(folders) if labels else None, left_out)
