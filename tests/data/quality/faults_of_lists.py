"""Faults of dataset.json, of data lists and of splits, as a table."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.data.quality.faults_of_files import Expected, Fault
from tests.data.quality.faults_of_names import labelled, without_channels
from tests.data.quality.small_data import NAMES, SmallData, save


def json_text(change: Callable[[str], bytes]) -> Callable[[SmallData], object]:
    """Write dataset.json anew from its text."""
    return lambda data: data.names.write_bytes(change(data.names.read_text()))


def with_names(**changed: Any) -> Callable[[SmallData], object]:
    return lambda data: data.write_names(**changed)


def with_labels(**labels: Any) -> Callable[[SmallData], object]:
    return with_names(labels=labels)


ZERO_BACKGROUND = {"0": "background", "1": "organ", "2": "node"}


def write_twenty(data: SmallData) -> None:
    save(data.label("p01"), data.organs("p01") * np.uint8(10))


CLASSES = [
    labelled("dataset.json missing", "otherwise", lambda d: d.names.unlink()),
    labelled("dataset.json with a BOM", "fine", json_text(lambda t: b"\xef\xbb\xbf" + t.encode())),
    labelled("dataset.json in UTF-16", "agree", json_text(lambda t: t.encode("utf-16"))),
    labelled(
        "dataset.json in Latin-1", "agree", json_text(lambda t: t.replace("organ", "Ma\u00dfe").encode("latin-1"))
    ),
    labelled("dataset.json cut", "refused", json_text(lambda t: t[: len(t) // 2].encode())),
    labelled("dataset.json empty", "refused", json_text(lambda t: b"")),
    labelled("dataset.json binary", "refused", json_text(lambda t: bytes(range(256)))),
    labelled("dataset.json a number", "agree", json_text(lambda t: b"3")),
    labelled("dataset.json an empty list", "agree", json_text(lambda t: b"[]")),
    labelled("dataset.json null", "agree", json_text(lambda t: b"null")),
    labelled("dataset.json empty braces", "otherwise", json_text(lambda t: b"{}")),
    labelled("dataset.json a folder", "agree", lambda d: (d.names.unlink(), d.names.mkdir())),
    labelled("dataset.json deep", "refused", json_text(lambda t: b"[" * 100000)),
    labelled(
        "dataset.json with a key twice",
        "agree",
        json_text(lambda t: t.replace('"node": 2', '"node": 2, "organ": 3').encode()),
    ),
    labelled("labels missing, and a label of 20", "agree", lambda d: (d.write_names(labels=None), write_twenty(d))),
    labelled("labels missing", "otherwise", with_names(labels=None)),
    labelled("labels empty", "otherwise", with_names(labels={})),
    labelled("labels a list", "refused", with_names(labels=["background", "organ", "node"])),
    labelled("labels as text", "refused", with_names(labels="organ")),
    labelled("labels reversed (decathlon)", "fine", with_names(labels=ZERO_BACKGROUND)),
    labelled("labels with gaps", "agree", with_labels(background=0, organ=1, node=2, far=9)),
    labelled("labels without background", "agree", with_labels(organ=1, node=2)),
    labelled("labels without a class that is there", "refused", with_labels(background=0, organ=1)),
    labelled(
        "labels with a class that no label holds", "otherwise", with_labels(background=0, organ=1, node=2, more=3)
    ),
    labelled("labels with one value twice", "refused", with_labels(background=0, organ=1, node=1)),
    labelled("labels with numbers in text", "agree", with_labels(background="0", organ="1", node="2")),
    labelled("labels with fractions", "refused", with_labels(background=0, organ=1, node=2.5)),
    labelled("labels with whole floats", "agree", with_labels(background=0.0, organ=1.0, node=2.0)),
    labelled("labels negative", "refused", with_labels(background=-1, organ=1, node=2)),
    labelled("labels true and false", "refused", with_labels(background=False, organ=True, node=2)),
    labelled("labels null", "refused", with_labels(background=0, organ=None, node=2)),
    labelled("labels above 255", "agree", with_labels(background=0, organ=1, node=2, far=300)),
    labelled("labels as regions", "refused", with_labels(background=0, whole=[1, 2], node=2)),
    labelled("labels with ignore", "fine", with_labels(background=0, organ=1, ignore=2)),
    labelled("labels with ignore below another", "agree", with_labels(background=0, ignore=1, node=2)),
    labelled("channel_names MRI", "agree", with_names(channel_names={"0": "MRI"})),
    labelled("channel_names T1", "agree", with_names(channel_names={"0": "T1"})),
    labelled("channel_names zscore", "agree", with_names(channel_names={"0": "zscore"})),
    labelled("channel_names missing", "fine", with_names(channel_names=None)),
    labelled("channel_names a list", "agree", with_names(channel_names=["CT"])),
    labelled("modality CT (nnU-Net 1)", "fine", with_names(channel_names=None, modality={"0": "CT"})),
    labelled("modality MRI (nnU-Net 1)", "agree", with_names(channel_names=None, modality={"0": "MRI"})),
    labelled("two channels", "agree", with_names(channel_names={"0": "CT", "1": "PET"})),
    labelled("file_ending of another format", "agree", with_names(file_ending=".nrrd")),
    labelled("numTraining wrong", "agree", with_names(numTraining=77)),
    labelled(
        "dataset dictionary (nnU-Net 2)",
        "fine",
        lambda d: d.write_names(
            dataset={c: {"images": [f"imagesTr/{c}_0000.nii.gz"], "label": f"labelsTr/{c}.nii.gz"} for c in d.cases}
        ),
    ),
]
"""Faults of dataset.json as nnU-Net has it."""


def listed(name: str, expected: Expected, change: Callable[[dict[str, Any]], object], where: Any = "set") -> Fault:
    """A fault of a decathlon list."""
    return Fault(f"list: {name}", where, expected, lambda data, case: data.write_list(change))


def first(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Change the first entry."""
    return lambda content: content["training"][0].update({key: value})


def folds(content: dict[str, Any]) -> None:
    for number, entry in enumerate(content["training"]):
        entry["fold"] = number % 2


def validated(content: dict[str, Any]) -> None:
    content["validation"] = [content["training"].pop()]


def encoded(name: str, expected: Expected, change: Callable[[str], bytes]) -> Fault:
    def edit(data: SmallData, case: str) -> None:
        data.write_list()
        data.names.write_bytes(change(data.names.read_text()))

    return Fault(f"list: {name}", "set", expected, edit)


def absolute(data: SmallData, case: str) -> None:
    data.write_list(
        lambda content: [
            entry.update({key: str(data.folder / path) for key, path in entry.items()}) for entry in content["training"]
        ]
    )


def first_version(data: SmallData, case: str) -> None:
    """nnU-Net 1 names images without their channel."""
    data.write_list(
        lambda content: content.update(
            modality={"0": "CT"},
            labels={str(value): name for name, value in NAMES.items()},
            numTraining=len(data.cases),
            test=[],
            training=[{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in data.cases],
        )
    )


def decathlon(data: SmallData, case: str) -> None:
    without_channels(data)
    first_version(data, case)


LISTS = [
    listed("sound", "fine", lambda c: None),
    Fault("list: nnU-Net 1", "set", "fine", first_version),
    Fault("list: decathlon", "set", "fine", decathlon),
    listed("folds", "fine", folds),
    listed("folds as text", "agree", lambda c: [e.update(fold=str(i % 2)) for i, e in enumerate(c["training"])]),
    listed("a fold in one entry", "agree", first("fold", 0)),
    listed("one fold alone", "agree", lambda c: [e.update(fold=0) for e in c["training"]]),
    listed("validation", "fine", validated),
    listed("validation no list", "refused", lambda c: c.update(validation="x")),
    listed("validation null", "agree", lambda c: c.update(validation=None)),
    listed("validation empty", "fine", lambda c: c.update(validation=[])),
    listed("an image missing", "refused", first("image", "./imagesTr/gone_0000.nii.gz")),
    listed("a label missing", "refused", first("label", "./labelsTr/gone.nii.gz"), "labelled"),
    listed("an entry without label", "agree", lambda c: c["training"][0].pop("label"), "labelled"),
    listed("entries without labels", "agree", lambda c: [e.pop("label") for e in c["training"]], "labelled"),
    listed("entries as text", "agree", lambda c: c.update(training=[e["image"] for e in c["training"]]), "labelled"),
    listed("label null", "agree", first("label", None), "labelled"),
    listed("an entry twice", "refused", lambda c: c["training"].append(c["training"][0])),
    listed("an entry in training and validation", "refused", lambda c: c.update(validation=[c["training"][0]])),
    listed(
        "an image by two paths",
        "refused",
        lambda c: c["training"].append(
            {"image": "imagesTr/../imagesTr/p01_0000.nii.gz", "label": "labelsTr/p01.nii.gz"}
        ),
    ),
    listed("one label for two images", "agree", first("label", "./labelsTr/p02.nii.gz")),
    listed("an image as its own label", "agree", first("label", "./imagesTr/p01_0000.nii.gz"), "labelled"),
    Fault("list: absolute paths", "set", "fine", absolute),
    listed("paths without a dot", "fine", lambda c: [e.update(image=e["image"][2:]) for e in c["training"]]),
    listed(
        "paths of Windows", "agree", lambda c: [e.update(image=e["image"].replace("/", "\\")) for e in c["training"]]
    ),
    listed("a path of a folder", "refused", first("image", "./imagesTr")),
    listed("a path to another format", "refused", first("image", "dataset.json")),
    listed("an empty path", "refused", first("image", "")),
    listed("a path that is a number", "refused", first("image", 3)),
    listed(
        "several images in an entry",
        "otherwise",
        first("image", ["./imagesTr/p01_0000.nii.gz", "./imagesTr/p01_0001.nii.gz"]),
    ),
    listed("an entry without image", "refused", lambda c: c["training"][0].pop("image")),
    listed("an entry null", "refused", lambda c: c["training"].append(None)),
    listed("training no list", "agree", lambda c: c.update(training="x")),
    listed("training empty", "refused", lambda c: c.update(training=[])),
    listed("other keys", "fine", lambda c: c.update(test=["./imagesTs/q.nii.gz"], name="x", tensorImageSize="3D")),
    encoded("with a BOM", "fine", lambda t: b"\xef\xbb\xbf" + t.encode()),
    encoded("in UTF-16", "agree", lambda t: t.encode("utf-16")),
    encoded("cut", "refused", lambda t: t[:-9].encode()),
    listed("labels reversed", "fine", lambda c: c.update(labels=ZERO_BACKGROUND)),
    listed("labels missing", "agree", lambda c: c.pop("labels"), "labelled"),
    listed(
        "labels as regions",
        "refused",
        lambda c: c.update(labels={"background": 0, "whole": [1, 2], "node": 2}),
        "labelled",
    ),
    listed("labels with ignore", "fine", lambda c: c.update(labels={"background": 0, "organ": 1, "ignore": 2})),
    listed("channel_names MRI", "agree", lambda c: c.update(channel_names={"0": "MRI"})),
]
"""Faults of data lists."""


def splits(name: str, expected: Expected, content: Any, file: str = "splits.json") -> Fault:
    def edit(data: SmallData, case: str) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (data.folder / file).write_bytes(text)

    return Fault(f"{file}: {name}", "set", expected, edit)


SPLIT: dict[str, Any] = {"train": ["p01", "p02"], "validation": ["p03", "p04"]}

SPLITS = [
    splits("sound", "fine", SPLIT),
    splits("val", "fine", {"train": ["p01", "p02", "p03"], "val": ["p04"]}),
    splits("an unknown name", "refused", SPLIT | {"train": ["p01", "p02", "p55"]}),
    splits("a name on both sides", "refused", SPLIT | {"train": ["p01", "p03"]}),
    splits("a name twice", "agree", SPLIT | {"train": ["p01", "p01", "p02"]}),
    splits("cases in neither", "otherwise", {"train": ["p01"], "validation": ["p04"]}),
    splits("empty validation", "agree", {"train": ["p01", "p02", "p03", "p04"], "validation": []}),
    splits("empty training", "refused", {"train": [], "validation": ["p03"]}),
    splits("no validation", "refused", {"train": ["p01"]}),
    splits("other keys", "refused", SPLIT | {"extra": ["p01"]}),
    splits("names that are numbers", "refused", {"train": [1, 2], "validation": [3]}),
    splits("invalid JSON", "refused", b"{"),
    splits("empty", "refused", b""),
    splits("a number", "refused", 3),
    splits("an empty list", "refused", []),
    splits("with a BOM", "fine", b"\xef\xbb\xbf" + json.dumps(SPLIT).encode()),
    splits("folds", "fine", [SPLIT, SPLIT]),
    splits("names with channel", "agree", {"train": ["p01_0000", "p02_0000"], "val": ["p03_0000"]}),
    splits("names with ending", "agree", {"train": ["p01.nii.gz", "p02.nii.gz"], "val": ["p03.nii.gz"]}),
    splits("folds", "fine", [{"train": ["p01", "p02"], "val": ["p03", "p04"]}] * 5, "splits_final.json"),
    splits("an unknown name", "refused", [{"train": ["p01", "p55"], "val": ["p03", "p04"]}], "splits_final.json"),
    splits("invalid JSON", "refused", b"[", "splits_final.json"),
]
"""Faults of splits."""
