"""Prepared volumes in compressed chunks; a crop is read without reading its volume.

One folder per volume: `image.b2nd` (uint16, see below), `label.b2nd` (uint8, where there is one), `counts.npy` (the
foreground index), `entry.json` (shape, affine, source, steps, checksums). The folder's name is a hash of file path,
size, modification time and the settings of preparation, so changed settings or files never read old voxels. An entry
appears by renaming a finished folder; `is_whole` tells whether its bytes are still those that were written.

0..1 is stored as 0..steps. Preparation takes as many steps per HU as fit, but a power of two (128 for the usual
window): CT comes in whole HU, so voxels that were not interpolated, or half-way, end in zero bits, which compress to
nothing. The error is at most 1.6e-5. docs/store.md says how format and codec were chosen.

Foreground is indexed as counts per cell of 32^3 voxels. To draw one foreground voxel of a volume, uniformly and
exactly, a cell is drawn by its count and only that cell is read.
"""

import hashlib
import json
import math
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

from hyspark.data.settings import PrepareSettings

FORMAT = 4
CHUNK, CELL = 64, 32
BLOCK = (16, 32, 32)
MOST = 65535
"""Largest number in 16 bits."""
UNFINISHED, ABANDONED = ".writing-", 86400.0
"""How folders are called that are being written, and seconds from which on they are taken for left behind."""
MAX_OPEN = 8
"""Arrays that a process keeps open; the crops of one volume come one after the other."""

COMPUTING = (b"LazyArray", b"b2o", b"proxy-source")
"""Marks of files that blosc2 would compute an array from, running code in them; before 4.14 it does so unasked."""

KINDS: Mapping[str, Callable[[np.ndarray, np.ndarray | None], np.ndarray]] = {
    "foreground": lambda image, label: image > 0,
    "labelled": lambda image, label: np.zeros(image.shape, bool) if label is None else label > 0,
    "unlabelled": lambda image, label: image > 0 if label is None else (image > 0) & (label == 0),
}
"""Kinds of voxel a crop may be centred on."""


def entry_folder(store_dir: Path, settings: PrepareSettings, image: Path, label: Path | None) -> Path:
    """Where the prepared volume of these files with these settings lies; the name changes when any of them does."""
    key: dict[str, Any] = {"format": FORMAT}
    key |= {f.name: getattr(settings, f.name) for f in fields(PrepareSettings)}
    for name, path in (("image", image), ("label", label)):
        if path is not None:
            stat = path.stat()
            key[name] = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return store_dir / digest[:32]


def steps_of(settings: PrepareSettings) -> int:
    """Into how many steps preparation divides 0..1: the largest power of two per HU that fits 16 bits."""
    window = settings.hu_max - settings.hu_min
    return round(window * 2.0 ** math.floor(math.log2(MOST / window)))


def is_complete(folder: Path) -> bool:
    """Whether an entry exists."""
    return (folder / "entry.json").is_file()


def is_whole(folder: Path) -> bool:
    """Whether the files of an entry are those that were written, by their checksums (CRC-32)."""
    try:
        loaded = json.loads((folder / "entry.json").read_bytes())
        known = loaded.pop("checksums")
        return bool(known == checksums(folder, known, loaded))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def remove_entry(folder: Path) -> None:
    """Delete an entry; out of the way first, since another run may be making it again."""
    doomed = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    with suppress(FileNotFoundError):
        os.replace(folder, doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(store_dir: Path) -> None:
    """Delete what killed processes have left, once it is so old that none can be writing it."""
    for folder in store_dir.glob(f"{UNFINISHED}*"):
        if time.time() - folder.stat().st_mtime > ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


def checksums(folder: Path, names: Iterable[str], entry: Mapping[str, Any]) -> dict[str, int]:
    """CRC-32 of files of an entry, and of the rest of entry.json under that name."""
    return {
        name: zlib.crc32(json.dumps(entry).encode() if name == "entry.json" else (folder / name).read_bytes())
        for name in names
    }


@dataclass(frozen=True)
class Entry:
    """What entry.json holds: shape in voxels, affine of the prepared grid (RAS mm), the file it was made from, the
    largest value of its label (0 without one), the number that 1 is stored as.
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
    steps: int = MOST,
) -> None:
    """Write one entry: image float32 (h, w, d) in [0, 1], label uint8 of the same shape or None, affine (4, 4)."""
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    try:
        quantised = np.rint(image * steps).astype(np.uint16)
        write_array(temporary / "image.b2nd", quantised)
        if label is not None:
            write_array(temporary / "label.b2nd", label)
        counts = np.stack([cell_counts(where(quantised, label)).ravel() for where in KINDS.values()])
        np.save(temporary / "counts.npy", counts.astype(np.uint32))
        entry = Entry(image.shape, affine.tolist(), source, 0 if label is None else int(label.max()), steps)
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
    """One chunked, compressed array."""
    chunks = tuple(min(CHUNK, s) for s in array.shape)
    blocks = tuple(min(b, s) for b, s in zip(BLOCK, array.shape, strict=True))
    cparams = {
        "codec": blosc2.Codec.LZ4HC,
        "clevel": 5,
        "filters": [blosc2.Filter.SHUFFLE],
        "typesize": array.itemsize,
        "nthreads": 1,
    }
    blosc2.asarray(array, chunks=chunks, blocks=blocks, urlpath=str(path), cparams=cparams)


def cell_counts(where: np.ndarray) -> np.ndarray:
    """True voxels in each cell of 32^3: bool (h, w, d) -> int64 of ceil(shape / 32)."""
    padded = np.pad(where, [(0, -s % CELL) for s in where.shape])
    split = [n for s in padded.shape for n in (s // CELL, CELL)]
    counts: np.ndarray = padded.reshape(split).sum(axis=tuple(range(1, len(split), 2)))
    return counts


@dataclass(frozen=True)
class StoredVolume:
    """A prepared volume on disk. Holds no voxels; safe to send to other processes."""

    folder: Path
    name: str

    @cached_property
    def entry(self) -> Entry:
        """Shape, affine and source."""
        loaded = json.loads((self.folder / "entry.json").read_text())
        return Entry(tuple(loaded["shape"]), loaded["affine"], loaded["source"], loaded["max_label"], loaded["steps"])

    def read(self, array: str, start: Sequence[int], size: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """A box of "image" (float32 in [0, 1]) or "label" (uint8); what lies outside the volume is 0.

        start: first voxel on each axis, may be negative. size: voxels per axis. out: float32 array of this size that an
        image is written to, in place of a new one.
        """
        box = self.read_stored(array, start, size)
        if array == "label":
            return box
        return np.divide(box, np.float32(self.entry.steps), out=out, dtype=np.float32)

    def read_stored(self, array: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """As `read`, with the numbers as they are stored: "image" is uint16."""
        shape = self.entry.shape
        low = [max(0, s) for s in start]
        high = [max(a, min(n, s + e)) for n, a, s, e in zip(shape, low, start, size, strict=True)]
        stored = opened(self.folder / f"{array}.b2nd")
        box = np.asarray(stored[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])
        if box.shape == tuple(size):
            return box
        out = np.zeros(size, box.dtype)
        out[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = box
        return out

    def draw_voxel(self, kind: str, rng: np.random.Generator) -> tuple[int, ...] | None:
        """One voxel of a kind ("foreground", "labelled", "unlabelled"), each equally likely; None where there is
        none.
        """
        ends = cumulative_counts(self.folder)[list(KINDS).index(kind)]
        if ends[-1] == 0:
            return None
        rank = int(rng.integers(ends[-1]))
        number = int(np.searchsorted(ends, rank, side="right"))
        shape = self.entry.shape
        cell = np.unravel_index(number, [-(-s // CELL) for s in shape])
        start = [int(c) * CELL for c in cell]
        size = [min(CELL, s - a) for s, a in zip(shape, start, strict=True)]
        image = self.read_stored("image", start, size)
        needs_label = kind != "foreground" and (self.folder / "label.b2nd").exists()
        label = self.read_stored("label", start, size) if needs_label else None
        within = np.flatnonzero(KINDS[kind](image, label))[rank - (int(ends[number - 1]) if number else 0)]
        offset = np.unravel_index(within, size)
        return tuple(a + int(o) for a, o in zip(start, offset, strict=True))


@lru_cache(MAX_OPEN)
def opened(path: Path) -> Any:
    """A stored array, mapped into memory; entries never change once they exist.

    Raises ValueError for a file that is more than numbers.
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(15)[11:], "big"))
    if any(name in header for name in COMPUTING):
        raise ValueError(f"{path} holds a program, not an array; delete the folder it lies in")
    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})


@lru_cache(MAX_OPEN)
def cumulative_counts(folder: Path) -> np.ndarray:
    """For each kind of voxel, how many there are up to and in each cell: int64 (kinds, cells)."""
    return np.cumsum(np.load(folder / "counts.npy", allow_pickle=False), axis=1, dtype=np.int64)
