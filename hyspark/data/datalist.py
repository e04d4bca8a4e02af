"""nnU-Net folders -> dataset.json (a decathlon datalist): finding, writing and reading cases.

Layout on disk: `DatasetXXX_Name/{imagesTr,labelsTr}`, images `CASE_0000.nii.gz`, labels `CASE.nii.gz`, and optionally
nnU-Net's `dataset.json` (class names) and a `splits.json`. BTCV's own names (img0001, label0001) are understood too.
Only file names are looked at; no image is opened. Nothing is dropped in silence: cases found and not used stand in
`Datalist.left_out`. Loose files are brought into this layout by `organize`.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hyspark.data.cases import Case, Datalist, class_values, common_labels
from hyspark.data.files import listing, load_json, nifti_files, nifti_stem, walk_folders
from hyspark.data.splits import split_by_file, split_by_subject


def scan(data_path: Path, *, labels: bool = False, channel: str = "0000") -> list[Case]:
    """All cases of every `Dataset*/imagesTr` in or below `data_path`, by data set and name; absolute paths.

    With `labels`, only cases that have a label. FileNotFoundError if there is no case; ValueError if two
    files stand for one case, or a label has no image.
    """
    cases = find_images(data_path, labels=labels, channel=channel)
    return only_labelled(cases, data_path) if labels else cases


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


def write(datalist: Datalist, path: Path) -> None:
    """Write a decathlon JSON with POSIX paths relative to its own folder; all at once, or not at all.

    ValueError if `path` exists and is anything but a list as written here, or if it cannot be written.
    """
    path = Path(os.path.abspath(path))

    def relative(file: Path) -> str:
        parts = Path(os.path.relpath(file, path.parent))
        return parts.as_posix() if parts.parts[0] == ".." else f"./{parts.as_posix()}"

    def entry(case: Case) -> dict[str, str]:
        image = {"image": relative(case.image)}
        return image if case.label is None else image | {"label": relative(case.label)}

    content: dict[str, Any] = {"training": [entry(case) for case in datalist.training]}
    if datalist.validation:
        content["validation"] = [entry(case) for case in datalist.validation]
    if datalist.labels is not None:
        content["labels"] = datalist.labels
    if os.path.lexists(path):
        check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"cannot write {path} ({error.strerror}): choose another output file") from error


def is_datalist(path: Path) -> bool:
    """Whether a JSON file is a datalist (has "training" with entries), unlike nnU-Net's own dataset.json."""
    loaded = load_json(path)
    return isinstance(loaded, dict) and isinstance(loaded.get("training"), list)


def read(path: Path, *, require_labels: bool = False, require_files: bool = True) -> Datalist:
    """Read a decathlon JSON; paths in it are relative to its folder. Other keys ("test", ...) are allowed.

    An entry is {"image": ..., "label": ...} or the image's path alone. ValueError if the shape is wrong, an
    image comes twice, or, with `require_labels`, a label is missing; FileNotFoundError if files are
    missing, unless `require_files` is False.
    """
    path = Path(os.path.abspath(path))
    content = load_json(path)
    if not (isinstance(content, dict) and isinstance(content.get("training"), list) and content["training"]):
        raise ValueError(f'{path}: expected {{"training": [{{"image": "./..."}}, ...]}} with at least one image')
    validation = content.get("validation", [])
    if not isinstance(validation, list):
        raise ValueError(f'{path}: "validation" must be a list, got {type(validation).__name__}')

    pairs: list[tuple[Path, Path | None]] = []
    for key, entries in (("training", content["training"]), ("validation", validation)):
        for index, value in enumerate(entries):
            pairs.append(entry_paths(value, path, f"{key}[{index}]", require_labels))
    images = [image for image, _ in pairs]
    if twice := {str(image) for image, times in Counter(images).items() if times > 1}:
        raise ValueError(f"{path}: images listed more than once: {listing(twice)}")
    files = [file for pair in pairs for file in pair if file is not None]
    missing = [str(file) for file in files if not file.is_file()]
    if missing and require_files:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(files)} files are missing: {listing(missing)}")

    names = case_names(images)
    cases = tuple(Case(names[image], dataset_of(image), image, label) for image, label in pairs)
    num_training = len(content["training"])
    labels = class_values(content["labels"], path) if content.get("labels") else None
    return Datalist(cases[:num_training], cases[num_training:], labels)


def find_images(data_path: Path, *, labels: bool, channel: str) -> list[Case]:
    """Every image below `data_path`; with `labels`, its label too where there is one."""
    data_path = Path(os.path.abspath(data_path))
    if not re.fullmatch(r"\d{4}", channel):
        raise ValueError(f'channel must be four digits as in nnU-Net\'s file names ("0000"), got {channel!r}')
    if not data_path.is_dir():
        raise FileNotFoundError(f"{data_path} is not a folder: expected one that holds DatasetXXX_Name/imagesTr")
    folders: dict[str, Path] = {}
    for folder, below in walk_folders(data_path):
        if folder.name.startswith("Dataset") and (folder / "imagesTr").is_dir():
            if folder.name in folders:
                raise ValueError(f"two data sets of one name: {folders[folder.name]} and {folder}; rename one of them")
            folders[folder.name] = folder
        below[:] = [name for name in below if name not in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")]
    cases = [c for _, f in sorted(folders.items()) for c in dataset_cases(f, labels=labels, channel=channel)]
    if not cases:
        seen = f"; images of this channel are missing in {listing(folders)}" if folders else ""
        raise FileNotFoundError(
            f"no images found: looked in {data_path} and all folders below it for "
            f"DatasetXXX_Name/imagesTr/CASE_{channel}.nii.gz (or .nii){seen}"
        )
    return cases


def dataset_cases(folder: Path, *, labels: bool, channel: str) -> list[Case]:
    """The cases of one data set folder by name; labels are looked for in labelsTr, if asked for."""
    images: dict[str, Path] = {}
    for file in nifti_files(folder / "imagesTr"):
        if name := name_of_image(file, channel):
            add_once(images, name, file)
    paired: dict[str, Path] = {}
    orphans: list[str] = []
    for file in nifti_files(folder / "labelsTr") if labels and (folder / "labelsTr").is_dir() else []:
        if name := name_of_label(file, images):
            add_once(paired, name, file)
        else:
            orphans.append(file.name)
    if orphans:
        raise ValueError(
            f"{folder}: labels without an image of channel {channel} in imagesTr: {listing(orphans)}; "
            "add the images or move these labels away"
        )
    return [Case(name, folder.name, images[name], paired.get(name)) for name in sorted(images)]


def name_of_image(file: Path, channel: str) -> str | None:
    """The case that an image of imagesTr belongs to; None where its name is not one of this channel."""
    stem = nifti_stem(file)
    if len(stem) > 5 and stem.endswith(f"_{channel}"):
        return stem[:-5]
    return stem if channel == "0000" and re.fullmatch(r"img\d+", stem) else None  # BTCV


def name_of_label(file: Path, images: Container[str]) -> str | None:
    """The case that a label of labelsTr belongs to; None where no image is its."""
    stem = nifti_stem(file)
    names = (stem, re.sub(r"^label(?=\d+$)", "img", stem))  # BTCV's label0001 belongs to img0001
    return next((name for name in names if name in images), None)


def add_once(files: dict[str, Path], name: str, file: Path) -> None:
    """Enter `file` as the file of the case `name`; ValueError if there is one already."""
    if name in files:
        raise ValueError(f"two files for the case {name}: {files[name]} and {file}; keep one of them")
    files[name] = file


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


def only_labelled(cases: Sequence[Case], root: Path) -> list[Case]:
    """The cases that have a label; FileNotFoundError if none has."""
    if found := [case for case in cases if case.label is not None]:
        return found
    raise FileNotFoundError(
        f"{root}: {len(cases)} images but no label; expected labelsTr/CASE.nii.gz beside imagesTr/CASE_0000.nii.gz"
    )


def entry_paths(value: Any, path: Path, place: str, require_label: bool) -> tuple[Path, Path | None]:
    """Absolute image and label of one entry of a decathlon list."""
    entry = value if isinstance(value, dict) else {"image": value}
    image, label = entry.get("image"), entry.get("label")
    if not isinstance(image, str) or not isinstance(label, str | None) or "" in (image, label):
        raise ValueError(
            f'{path}: {place} must be {{"image": "./..."}}, optionally with "label": "./...", each the '
            f"path of one file; got {value!r}"
        )
    if require_label and label is None:
        raise ValueError(f'{path}: {place} has no "label", but labels are needed here: {image}')
    absolute = Path(os.path.abspath(path.parent / image))
    return absolute, None if label is None else Path(os.path.abspath(path.parent / label))


def case_names(images: Sequence[Path]) -> dict[Path, str]:
    """Case names: file names without ending and channel, which is "_0000" or what a whole data set shares.

    A name that several files have (case_1/imaging.nii.gz, case_2/imaging.nii.gz) gets the folder's name in front, and
    those of the folders above as far as they are needed to tell the files apart.
    """
    endings: dict[str, set[str]] = {}
    for image in images:
        endings.setdefault(dataset_of(image), set()).add(nifti_stem(image)[-5:])
    names = {}
    for image in images:
        stem = nifti_stem(image)
        shared = len(endings[dataset_of(image)]) == 1
        has_channel = re.fullmatch(r".+_\d{4}", stem, re.DOTALL) and (shared or stem.endswith("_0000"))
        names[image] = stem[:-5] if has_channel else stem
    folders = {image: image.parent.relative_to(image.anchor).parts for image in names}
    stems = dict(names)
    for depth in range(1, max(map(len, folders.values()), default=0) + 1):
        if not (repeated := {name for name, num in Counter(names.values()).items() if num > 1}):
            break
        for image in [image for image, name in names.items() if name in repeated]:
            names[image] = "-".join([*folders[image][-depth:], stems[image]])
    return names


def dataset_of(image: Path) -> str:
    """The folder above imagesTr or imagesTs; without one of these, the image's own folder."""
    return (image.parent.parent if image.parent.name in ("imagesTr", "imagesTs") else image.parent).name


def check_replaceable(path: Path) -> None:
    """ValueError unless `path` holds a list with nothing in it that `write` would lose."""
    content: Any = None
    if path.is_file():
        with suppress(ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
    entries = content.get("training") if isinstance(content, dict) else None
    ours = isinstance(entries, list) and all(isinstance(entry, dict) and "image" in entry for entry in entries)
    if not ours or set(content) - {"training", "validation", "labels"}:
        raise ValueError(f"{path} is not a list as written here, so it is kept: choose another output name")
