"""nnU-Net folders -> dataset.json (a decathlon datalist): finding, splitting, writing and reading cases.

Layout on disk: `DatasetXXX_Name/{imagesTr,labelsTr}`, images `CASE_0000.nii.gz`, labels `CASE.nii.gz`, and
optionally nnU-Net's `dataset.json` (class names) and a `splits.json`. BTCV's own names (img0001, label0001)
are understood too. Only file names are looked at; no image is opened. Nothing is dropped in silence: cases
found and not used stand in `Datalist.left_out`. Loose files are brought into this layout by
`organize_by_names`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from filecmp import cmp as same_content
from pathlib import Path
from typing import Any

from tqdm import tqdm

_NIFTI = re.compile(r"(?P<stem>.+?)(?P<ending>\.nii(\.gz)?)", re.DOTALL)
_VISIT = re.compile(r"__|_(visit|session|ses-|scan|series|t\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """One image and, where there is one, its label. `name` is the file name without channel and ending."""

    name: str
    dataset: str
    image: Path
    label: Path | None = None


@dataclass(frozen=True)
class Datalist:
    """The cases of one run; `labels` maps class names to label values, background included.

    `left_out` holds cases that were found but are not used. It is for the report on the terminal: it is not
    written to the file, and two lists that differ in it alone are equal.
    """

    training: tuple[Case, ...]
    validation: tuple[Case, ...] = ()
    labels: dict[str, int] | None = None
    left_out: tuple[Case, ...] = field(default=(), compare=False)


def scan(data_path: Path, *, labels: bool = False, channel: str = "0000") -> list[Case]:
    """All cases of every `Dataset*/imagesTr` in or below `data_path`, by data set and name; absolute paths.

    With `labels`, only cases that have a label. FileNotFoundError if there is no case; ValueError if two
    files stand for one case, or a label has no image.
    """
    cases = _scan_images(data_path, labels=labels, channel=channel)
    return _labelled(cases, data_path) if labels else cases


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
    cases = _scan_images(data_path, labels=labels, channel=channel)
    return _assemble(cases, data_path, labels=labels, splits=splits, val_fraction=val_fraction, seed=seed)


def read_folder(folder: Path, *, seed: int, val_fraction: float) -> Datalist:
    """The labelled cases of one data set folder, of any name, split by its splits.json or else by subject."""
    folder = Path(os.path.abspath(folder))
    if not (folder / "imagesTr").is_dir():
        raise FileNotFoundError(f"{folder} has no imagesTr: expected a folder with imagesTr and labelsTr")
    cases = _dataset_cases(folder, labels=True, channel="0000")
    return _assemble(cases, folder, labels=True, splits="auto", val_fraction=val_fraction, seed=seed)


def counts(datalist: Datalist) -> dict[str, dict[str, int]]:
    """Per data set the number of cases: training, validation, labelled (of these two), left_out."""
    table: dict[str, dict[str, int]] = {}
    for key in ("training", "validation", "left_out"):
        for case in getattr(datalist, key):
            row = table.setdefault(case.dataset, dict(training=0, validation=0, labelled=0, left_out=0))
            row[key] += 1
            row["labelled"] += key != "left_out" and case.label is not None
    return dict(sorted(table.items()))


def subject_of(name: str) -> str:
    """The subject in a case name: all before "__", "_visit", "_session", "_ses-", "_scan", "_series", "_t1".

    Upper and lower case are the same; any digit may follow "_t". A name without such a part is its own
    subject.
    """
    found = _VISIT.search(name)
    return (name[: found.start()] if found else name) or name


def split_by_subject(cases: Sequence[Case], *, seed: int, val_fraction: float) -> tuple[list[Case], list[Case]]:
    """Training and validation cases in given order, `val_fraction` of the subjects (rounded) in validation.

    Two or more subjects give at least one to each side, unless `val_fraction` is 0. Subjects are ranked by
    a hash of seed and name, so the split depends on neither order, folder nor library version.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")

    def rank(subject: str) -> str:
        return hashlib.sha256(f"{seed}:{subject}".encode("utf-8", "surrogatepass")).hexdigest()

    subjects = sorted({subject_of(case.name) for case in cases}, key=rank)
    num_validation = max(1, round(val_fraction * len(subjects))) if val_fraction else 0
    held_out = set(subjects[: max(0, min(num_validation, len(subjects) - 1))])
    training = [case for case in cases if subject_of(case.name) not in held_out]
    return training, [case for case in cases if subject_of(case.name) in held_out]


def split_by_file(cases: Sequence[Case], path: Path, *, labels: bool) -> tuple[list[Case], list[Case]]:
    """Training and validation cases as named in a splits file, in given order; with `labels`, labelled ones.

    Forms: {"train": [...], "validation" or "val": [...]}, optionally with "unlabelled" and "test", or
    nnU-Net's splits_final.json: a list of folds, of which the first is used. "unlabelled" joins training
    unless `labels`; "test" is not used. `cases` are all images there are, labelled or not. ValueError if a
    name is on both sides, unknown, or found in two data sets; FileNotFoundError if there is no such file.
    """
    content = _load_json(path)
    fold = content[0] if isinstance(content, list) and content else content
    keys = set(fold) if isinstance(fold, dict) else set()
    validation_key = "val" if "val" in keys else "validation"
    if not {"train", validation_key} <= keys <= {"train", validation_key, "unlabelled", "test"}:
        raise ValueError(
            f'{path}: expected {{"train": [...], "validation" or "val": [...]}}, optionally '
            f'with "unlabelled" and "test", or a list of such folds; '
            f"got {sorted(keys) or type(fold).__name__}"
        )
    for key, value in fold.items():
        if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise ValueError(f'{path}: "{key}" must be a list of case names')

    train, validation, unlabelled = (set(fold.get(key, [])) for key in ("train", validation_key, "unlabelled"))
    if both := (train | unlabelled) & validation:
        raise ValueError(f"{path}: on both sides, training and validation: {_listing(both)}")
    num_images = Counter(case.name for case in cases)
    if unknown := (train | validation | unlabelled) - set(num_images):
        raise ValueError(f"{path}: no image has these names: {_listing(unknown)}")
    if several := {name for name in train | validation | unlabelled if num_images[name] > 1}:
        raise ValueError(
            f"{path}: names found in more than one data set: {_listing(several)}; give each data set its own "
            'splits.json and use splits "auto"'
        )
    usable = [case for case in cases if not labels or case.label is not None]
    train = train if labels else train | unlabelled
    training = [case for case in usable if case.name in train]
    return training, [case for case in usable if case.name in validation]


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
        _check_replaceable(path)
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
    loaded = _load_json(path)
    return isinstance(loaded, dict) and isinstance(loaded.get("training"), list)


def read(path: Path, *, require_labels: bool = False) -> Datalist:
    """Read a decathlon JSON; paths in it are relative to its folder. Other keys ("test", ...) are allowed.

    An entry is {"image": ..., "label": ...} or the image's path alone. ValueError if the shape is wrong, an
    image comes twice, or, with `require_labels`, a label is missing; FileNotFoundError if files are
    missing.
    """
    path = Path(os.path.abspath(path))
    content = _load_json(path)
    if not (isinstance(content, dict) and isinstance(content.get("training"), list) and content["training"]):
        raise ValueError(f'{path}: expected {{"training": [{{"image": "./..."}}, ...]}} with at least one image')
    validation = content.get("validation", [])
    if not isinstance(validation, list):
        raise ValueError(f'{path}: "validation" must be a list, got {type(validation).__name__}')

    pairs: list[tuple[Path, Path | None]] = []
    for key, entries in (("training", content["training"]), ("validation", validation)):
        for index, value in enumerate(entries):
            pairs.append(_entry_paths(value, path, f"{key}[{index}]", require_labels))
    images = [image for image, _ in pairs]
    if twice := {str(image) for image, times in Counter(images).items() if times > 1}:
        raise ValueError(f"{path}: images listed more than once: {_listing(twice)}")
    files = [file for pair in pairs for file in pair if file is not None]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(files)} files are missing: {_listing(missing)}")

    names = _names(images)
    cases = tuple(Case(names[image], _dataset_of(image), image, label) for image, label in pairs)
    num_training = len(content["training"])
    labels = _class_values(content["labels"], path) if content.get("labels") else None
    return Datalist(cases[:num_training], cases[num_training:], labels)


def organize_by_names(source: Path, target: Path, *, copy: bool = False) -> int:
    """Bring NIfTI files in and below `source` into nnU-Net's layout as `target/imagesTr/CASE_0000.nii.gz`.

    `target` must be named DatasetXXX_Name. CASE is the file name without ending and "_0000", with
    characters other than letters, digits, ".", "_" and "-" replaced by "-"; ".nii" stays ".nii". Files are
    linked, or copied with `copy`. Running it again changes nothing. Returns the number of images.
    ValueError for two files of one name or another file in the way, FileNotFoundError if there is no NIfTI
    file; both before the first change.
    """
    source, target = Path(os.path.abspath(source)), Path(os.path.abspath(target))
    if not re.fullmatch(r"Dataset\d{3}_\w+", target.name, re.ASCII):
        raise ValueError(f"the target folder must be named like Dataset501_Name, got {target.name!r}")
    files: dict[str, list[Path]] = {}
    for folder, _ in _walk(source, skip=target):
        for file in _nifti_files(folder):
            case = re.sub(r"[^A-Za-z0-9._-]", "-", re.sub(r"(?<=.)_0000$", "", _stem(file)))
            files.setdefault(case, []).append(file)
    if not files:
        raise FileNotFoundError(f"no .nii.gz or .nii file in {source} or the folders below it")
    if twice := [f"{case} ({_listing(map(str, found))})" for case, found in files.items() if len(found) > 1]:
        raise ValueError(f"files that would get the same name; rename them: {_listing(twice)}")

    images = target / "imagesTr"
    plan = {images / f"{case}_0000{_ending(found[0])}": found[0] for case, found in sorted(files.items())}
    for new, old in plan.items():
        # The same case with the other ending would make two files for one case.
        other = new.with_name(_stem(new) + (".nii" if _ending(new) == ".nii.gz" else ".nii.gz"))
        changed = os.path.lexists(new) and not (new.is_file() and same_content(new, old, shallow=False))
        if changed or os.path.lexists(other):
            raise ValueError(f"{new if changed else other} is in the way of {old}: move it, or choose another target")
    images.mkdir(parents=True, exist_ok=True)
    for new, old in tqdm(plan.items(), desc="copying", disable=not copy, leave=False):
        if copy and (new.is_symlink() or not new.exists()):
            temporary = new.with_name(f".{new.name}.{os.getpid()}.tmp")
            shutil.copyfile(old, temporary)
            os.replace(temporary, new)
        elif not copy and not new.exists():
            new.symlink_to(old.resolve())
    return len(plan)


def _scan_images(data_path: Path, *, labels: bool, channel: str) -> list[Case]:
    """Every image below `data_path`; with `labels`, its label too where there is one."""
    data_path = Path(os.path.abspath(data_path))
    if not re.fullmatch(r"\d{4}", channel):
        raise ValueError(f'channel must be four digits as in nnU-Net\'s file names ("0000"), got {channel!r}')
    if not data_path.is_dir():
        raise FileNotFoundError(f"{data_path} is not a folder: expected one that holds DatasetXXX_Name/imagesTr")
    folders: dict[str, Path] = {}
    for folder, below in _walk(data_path):
        if folder.name.startswith("Dataset") and (folder / "imagesTr").is_dir():
            if folder.name in folders:
                raise ValueError(f"two data sets of one name: {folders[folder.name]} and {folder}; rename one of them")
            folders[folder.name] = folder
        below[:] = [name for name in below if name not in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")]
    cases = [c for _, f in sorted(folders.items()) for c in _dataset_cases(f, labels=labels, channel=channel)]
    if not cases:
        seen = f"; images of this channel are missing in {_listing(folders)}" if folders else ""
        raise FileNotFoundError(
            f"no images found: looked in {data_path} and all folders below it for "
            f"DatasetXXX_Name/imagesTr/CASE_{channel}.nii.gz (or .nii){seen}"
        )
    return cases


def _dataset_cases(folder: Path, *, labels: bool, channel: str) -> list[Case]:
    """The cases of one data set folder by name; labels are looked for in labelsTr, if asked for."""
    images: dict[str, Path] = {}
    for file in _nifti_files(folder / "imagesTr"):
        name, suffix = _stem(file)[:-5], _stem(file)[-5:]
        if suffix != f"_{channel}" or not name:
            if channel != "0000" or not re.fullmatch(r"img\d+", _stem(file)):
                continue
            name = _stem(file)
        _add_once(images, name, file)
    paired: dict[str, Path] = {}
    orphans: list[str] = []
    for file in _nifti_files(folder / "labelsTr") if labels and (folder / "labelsTr").is_dir() else []:
        # BTCV's label0001 belongs to img0001.
        owners = (_stem(file), re.sub(r"^label(?=\d+$)", "img", _stem(file)))
        owner = next((name for name in owners if name in images), None)
        if owner is None:
            orphans.append(file.name)
        else:
            _add_once(paired, owner, file)
    if orphans:
        raise ValueError(
            f"{folder}: labels without an image of channel {channel} in imagesTr: {_listing(orphans)}; "
            "add the images or move these labels away"
        )
    return [Case(name, folder.name, images[name], paired.get(name)) for name in sorted(images)]


def _assemble(
    cases: Sequence[Case], root: Path, *, labels: bool, splits: str, val_fraction: float, seed: int
) -> Datalist:
    """Split `cases` as told, keep account of what is left out, and look up the class names."""
    usable = _labelled(cases, root) if labels else list(cases)
    folders = sorted({case.image.parent.parent for case in usable}, key=lambda folder: folder.name)
    training, validation = usable, list[Case]()
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
    return Datalist(tuple(training), tuple(validation), _common_labels(folders) if labels else None, left_out)


def _labelled(cases: Sequence[Case], root: Path) -> list[Case]:
    """The cases that have a label; FileNotFoundError if none has."""
    if found := [case for case in cases if case.label is not None]:
        return found
    raise FileNotFoundError(
        f"{root}: {len(cases)} images but no label; expected labelsTr/CASE.nii.gz beside imagesTr/CASE_0000.nii.gz"
    )


def _common_labels(folders: Iterable[Path]) -> dict[str, int] | None:
    """The class names all folders agree on; None if no dataset.json gives any."""
    known: dict[str, int] | None = None
    origin = Path()
    for file in (folder / "dataset.json" for folder in folders):
        content = _load_json(file) if file.is_file() else {}
        if not isinstance(content, dict) or not content.get("labels"):
            continue
        labels = _class_values(content["labels"], file)
        if known is not None and labels != known:
            raise ValueError(f"{origin} and {file} have different class names; make one list per data set")
        known, origin = labels, file
    return known


def _class_values(labels: Any, path: Path) -> dict[str, int]:
    """Class names with values, by value, from {"spleen": 1} (nnU-Net) or {"1": "spleen"} (decathlon)."""
    pairs = list(labels.items()) if isinstance(labels, dict) else []
    if any(isinstance(value, list) for _, value in pairs):
        raise ValueError(f'{path}: "labels" has regions (lists of values), which are not supported')
    if all(key.isdecimal() and isinstance(value, str) for key, value in pairs):
        pairs = [(value, int(key)) for key, value in pairs]
    if not pairs or any(type(value) is not int or value < 0 for _, value in pairs):
        raise ValueError(f'{path}: "labels" must be like {{"background": 0, "spleen": 1}}, got {labels!r}')
    values = dict(sorted(pairs, key=lambda pair: pair[1]))
    if not len(pairs) == len(values) == len(set(values.values())):
        raise ValueError(f'{path}: "labels" gives one name or one value to two classes: {labels!r}')
    return values


def _entry_paths(value: Any, path: Path, place: str, require_label: bool) -> tuple[Path, Path | None]:
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


def _names(images: Sequence[Path]) -> dict[Path, str]:
    """Case names: file names without ending and channel, which is "_0000" or what a whole data set shares."""
    endings: dict[str, set[str]] = {}
    for image in images:
        endings.setdefault(_dataset_of(image), set()).add(_stem(image)[-5:])
    names = {}
    for image in images:
        stem = _stem(image)
        shared = len(endings[_dataset_of(image)]) == 1
        has_channel = re.fullmatch(r".+_\d{4}", stem, re.DOTALL) and (shared or stem.endswith("_0000"))
        names[image] = stem[:-5] if has_channel else stem
    return names


def _dataset_of(image: Path) -> str:
    """The folder above imagesTr or imagesTs; without one of these, the image's own folder."""
    return (image.parent.parent if image.parent.name in ("imagesTr", "imagesTs") else image.parent).name


def _check_replaceable(path: Path) -> None:
    """ValueError unless `path` holds a list with nothing in it that `write` would lose."""
    content: Any = None
    if path.is_file():
        with suppress(ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
    entries = content.get("training") if isinstance(content, dict) else None
    ours = isinstance(entries, list) and all(isinstance(entry, dict) and "image" in entry for entry in entries)
    if not ours or set(content) - {"training", "validation", "labels"}:
        raise ValueError(f"{path} is not a list as written here, so it is kept: choose another output name")


def _load_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _walk(top: Path, *, skip: Path | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Folders from `top` down, with the names below, which the caller may shorten.

    Each folder comes once. Links are followed last, so that a folder is met under its own name where it has
    one.
    """
    seen = {os.path.realpath(skip)} if skip else set()
    pending = [os.fspath(top)]
    for start in pending:
        for folder, below, _ in os.walk(start):
            if (real := os.path.realpath(folder)) in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not name.startswith("."))
            yield Path(folder), below
            pending += [link for name in below if os.path.islink(link := os.path.join(folder, name))]


def _nifti_files(folder: Path) -> list[Path]:
    """The NIfTI files right in `folder` by name, without hidden ones; FileNotFoundError for a broken link."""
    files = [f for f in sorted(folder.iterdir()) if _NIFTI.fullmatch(f.name) and not f.name.startswith(".")]
    if broken := [str(file) for file in files if not file.exists()]:
        raise FileNotFoundError(f"links to files that do not exist: {_listing(broken)}")
    return [file for file in files if file.is_file()]


def _stem(file: Path) -> str:
    found = _NIFTI.fullmatch(file.name)
    return found["stem"] if found else file.name


def _ending(file: Path) -> str:
    return file.name[len(_stem(file)) :]


def _add_once(files: dict[str, Path], name: str, file: Path) -> None:
    if name in files:
        raise ValueError(f"two files for the case {name}: {files[name]} and {file}; keep one of them")
    files[name] = file


def _listing(items: Iterable[str], limit: int = 10) -> str:
    """Up to `limit` items, in order, and how many there are if not all are shown."""
    items = sorted(items)
    return ", ".join(items[:limit]) + (f", ... ({len(items)} in all)" if len(items) > limit else "")
