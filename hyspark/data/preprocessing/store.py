"""Prepared volumes in compressed chunks; a crop is read without reading its volume.

Each volume has a folder:

- `image.b2nd`: uint16, see below;
- `label.b2nd`: uint8, if the case has a label;
- `counts.npy`: the foreground index;
- `entry.json`: shape, affine, source, steps, checksums.

The folder's name is a hash of file path, size, modification time and the settings of preparation. So changed settings
or files never read old voxels. An entry appears by renaming a finished folder; `is_intact` compares its checksums.

0..1 is stored as 0..steps. The number of steps per HU is the largest power of two that fits 16 bits, 128 for the usual
window. CT comes in whole HU, so voxels that were not interpolated, or halfway, end in zero bits, which compress to
nothing. The error is at most 1.6e-5. docs/store.md explains the choice of format and codec.

Foreground is indexed as counts per cell of 32^3 voxels. To draw one foreground voxel of a volume, uniformly and
exactly, a cell is drawn by its count and only that cell is read.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from hyspark.data.datasets.cases import UNANNOTATED
from hyspark.data.intensity import MAX_STORED, quantise
from hyspark.data.settings import PrepareSettings

STORE_FORMAT = 4
CHUNK_EDGE, CELL_EDGE = 64, 32
BLOCK_SHAPE = (16, 32, 32)
UNFINISHED_PREFIX, ABANDONED_SECONDS = ".writing-", 86400.0
"""Prefix of folders that are being written; age from which they count as abandoned."""
MAX_OPEN = 8
"""Arrays that a process keeps open; the crops of one volume are read one after the other."""

CODE_MARKERS = (b"LazyArray", b"b2o", b"proxy-source")
"""Markers of files from which blosc2 computes an array by running their code; before 4.14 it does so unasked."""

VOXEL_KINDS: Mapping[str, Callable[[np.ndarray, np.ndarray | None], np.ndarray]] = {
    "foreground": lambda image, label: image > 0,
    "labelled": lambda image, label: (
        np.zeros(image.shape, bool) if label is None else (label > 0) & (label != UNANNOTATED)
    ),
    "unlabelled": lambda image, label: image > 0 if label is None else (image > 0) & (label == 0),
}
"""Kinds of voxel a crop may be centred on."""


def entry_folder(
    store_dir: Path, settings: PrepareSettings, image: Path, label: Path | None, ignore: int | None = None
) -> Path:
    """Return the folder of a prepared volume, whose name is a hash of files, settings and the label's ignored value."""
    key: dict[str, Any] = {"format": STORE_FORMAT}
    key |= {f.name: getattr(settings, f.name) for f in fields(PrepareSettings)}
    for name, path in (("image", image), ("label", label)):
        if path is not None:
            stat = path.stat()
            key[name] = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    if ignore is not None:
        key["ignore"] = ignore
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return store_dir / digest[:32]


def is_complete(folder: Path) -> bool:
    """Return whether an entry exists."""
    return (folder / "entry.json").is_file()


def is_intact(folder: Path) -> bool:
    """Return whether the files of an entry match their checksums (CRC-32)."""
    try:
        loaded = json.loads((folder / "entry.json").read_bytes())
        known = loaded.pop("checksums")
        return bool(known == checksums(folder, known, loaded))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def remove_entry(folder: Path) -> None:
    """Delete an entry; it is moved first, since another run may be making it again."""
    doomed = Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=folder.parent))
    with suppress(FileNotFoundError):
        os.replace(folder, doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_abandoned(store_dir: Path) -> None:
    """Delete the unfinished entries of killed processes, which are too old to be still written."""
    for folder in store_dir.glob(f"{UNFINISHED_PREFIX}*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def checksums(folder: Path, names: Iterable[str], entry: Mapping[str, Any]) -> dict[str, int]:
    """Compute the CRC-32 of files of an entry; that of entry.json is of `entry`, its content without checksums."""
    return {
        name: zlib.crc32(json.dumps(entry).encode() if name == "entry.json" else (folder / name).read_bytes())
        for name in names
    }


@dataclass(frozen=True)
class Entry:
    """The content of entry.json.

    Attributes:
        shape: voxels per axis.
        affine: `(4, 4)` of the prepared grid, RAS mm.
        source: the image file it was made from.
        max_label: largest value of its label, 0 without one. UNANNOTATED does not count in a label with ignored voxels.
        steps: number that 1 is stored as.
    """

    shape: tuple[int, ...]
    affine: list[list[float]]
    source: str
    max_label: int
    steps: int


def write_entry(
    folder: Path,
    *,
    image: np.ndarray,
    label: np.ndarray | None,
    affine: np.ndarray,
    source: str,
    steps: int = MAX_STORED,
    has_ignored: bool = False,
) -> None:
    """Write one entry of the store, atomically.

    Args:
        folder: folder of the entry.
        image: float32 `(h, w, d)` in [0, 1].
        label: uint8 `(h, w, d)`.
        affine: `(4, 4)` of the grid, RAS mm.
        source: the image file.
        steps: number that 1 is stored as.
        has_ignored: whether UNANNOTATED in the label marks voxels to ignore.
    """
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=folder.parent))
    try:
        quantised = quantise(image, steps)
        write_array(temporary / "image.b2nd", quantised)
        if label is not None:
            write_array(temporary / "label.b2nd", label)
        counts = np.stack([cell_counts(where(quantised, label)).ravel() for where in VOXEL_KINDS.values()])
        np.save(temporary / "counts.npy", counts.astype(np.uint32))
        values = np.zeros(1, np.uint8) if label is None else label[label != UNANNOTATED] if has_ignored else label
        entry = Entry(image.shape, affine.tolist(), source, int(values.max(initial=0)), steps)
        names = sorted(path.name for path in temporary.iterdir())
        content = json.loads(json.dumps(asdict(entry)))
        content["checksums"] = checksums(temporary, [*names, "entry.json"], content)
        (temporary / "entry.json").write_text(json.dumps(content))
        try:
            os.replace(temporary, folder)
        except OSError:
            if not is_complete(folder):  # otherwise another process has just made the same entry
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one chunked, compressed array."""
    chunks = tuple(min(CHUNK_EDGE, s) for s in array.shape)
    blocks = tuple(min(b, s) for b, s in zip(BLOCK_SHAPE, array.shape, strict=True))
    cparams = {
        "codec": blosc2.Codec.LZ4HC,
        "clevel": 5,
        "filters": [blosc2.Filter.SHUFFLE],
        "typesize": array.itemsize,
        "nthreads": 1,
    }
    blosc2.asarray(array, chunks=chunks, blocks=blocks, urlpath=str(path), cparams=cparams)


def cell_counts(where: np.ndarray) -> np.ndarray:
    """Count the True voxels in each cell of 32^3: bool `(h, w, d)` -> int64 of shape ceil(shape / 32)."""
    padded = np.pad(where, [(0, -s % CELL_EDGE) for s in where.shape])
    split = [n for s in padded.shape for n in (s // CELL_EDGE, CELL_EDGE)]
    counts: np.ndarray = padded.reshape(split).sum(axis=tuple(range(1, len(split), 2)))
    return counts


@dataclass(frozen=True)
class StoredVolume:
    """A prepared volume on disk. Holds no voxels; safe to send to other processes."""

    folder: Path
    name: str

    @cached_property
    def entry(self) -> Entry:
        """Content of entry.json."""
        loaded = json.loads((self.folder / "entry.json").read_text())
        return Entry(tuple(loaded["shape"]), loaded["affine"], loaded["source"], loaded["max_label"], loaded["steps"])

    def read(self, array: str, start: Sequence[int], size: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Read a box of voxels; voxels outside the volume are 0.

        Args:
            array: "image" (float32 in [0, 1]) or "label" (uint8).
            start: first voxel on each axis, may be negative.
            size: voxels per axis.
            out: float32 array of this size that an image is written to, instead of a new one.
        """
        box = self.read_stored(array, start, size)
        if array == "label":
            return box
        return np.divide(box, np.float32(self.entry.steps), out=out, dtype=np.float32)

    def read_stored(self, array: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Read a box as `read`, without scaling to [0, 1]: "image" is uint16."""
        shape = self.entry.shape
        low = [max(0, s) for s in start]
        high = [max(a, min(n, s + e)) for n, a, s, e in zip(shape, low, start, size, strict=True)]
        stored = open_array(self.folder / f"{array}.b2nd")
        box = np.asarray(stored[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])
        if box.shape == tuple(size):
            return box
        out = np.zeros(size, box.dtype)
        out[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = box
        return out

    def draw_voxel(self, kind: str, rng: np.random.Generator) -> tuple[int, ...] | None:
        """Draw one voxel of a kind, each equally likely; return None if the volume has none.

        Args:
            kind: "foreground", "labelled" or "unlabelled".
            rng: source of the random choice.
        """
        ends = cumulative_counts(self.folder)[list(VOXEL_KINDS).index(kind)]
        if ends[-1] == 0:
            return None
        rank = int(rng.integers(ends[-1]))
        number = int(np.searchsorted(ends, rank, side="right"))
        shape = self.entry.shape
        cell = np.unravel_index(number, [-(-s // CELL_EDGE) for s in shape])
        start = [int(c) * CELL_EDGE for c in cell]
        size = [min(CELL_EDGE, s - a) for s, a in zip(shape, start, strict=True)]
        image = self.read_stored("image", start, size)
        needs_label = kind != "foreground" and (self.folder / "label.b2nd").exists()
        label = self.read_stored("label", start, size) if needs_label else None
        within = np.flatnonzero(VOXEL_KINDS[kind](image, label))[rank - (int(ends[number - 1]) if number else 0)]
        offset = np.unravel_index(within, size)
        return tuple(a + int(o) for a, o in zip(start, offset, strict=True))


@lru_cache(MAX_OPEN)
def open_array(path: Path) -> Any:
    """Open a stored array, mapped into memory; entries never change once they exist.

    Raises:
        ValueError: if the file holds code.
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(15)[11:], "big"))
    if any(name in header for name in CODE_MARKERS):
        raise ValueError(f"{path}: expected an array, got a program; delete its folder")
    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})


@lru_cache(MAX_OPEN)
def cumulative_counts(folder: Path) -> np.ndarray:
    """Read the number of voxels of each kind up to and in each cell: int64 `(kinds, cells)`."""
    return np.cumsum(np.load(folder / "counts.npy", allow_pickle=False), axis=1, dtype=np.int64)
