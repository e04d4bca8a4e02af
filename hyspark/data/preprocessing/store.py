"""Prepared volumes in compressed chunks; a crop is read without reading its volume.

Each volume has a folder:

- `image.b2nd`: uint16, see below; further channels in `image_1.b2nd`, `image_2.b2nd`, ...;
- `label.b2nd`: uint8, if the case has a label;
- `counts.npy`: the foreground index;
- `entry.json`: shape, affine, source, steps, checksums; where a range is the volume's own, steps and map by channel.

The folder's name is a hash of file path, size, modification time and the settings of preparation. So changed settings
or files never read old voxels. An entry appears by renaming a finished folder. `is_sound` compares sizes, and checksums
where a file was touched since the last comparison.

Fractions 0..1 of a range of values (see intensity.py) are stored as 0..steps. For CT, the number of steps per HU is the
largest power of two that fits 16 bits, 128 for the usual window. CT comes in whole HU, so voxels that were not
interpolated, or halfway, end in zero bits, which compress to nothing. The error is at most 1.6e-5. The choice of format
and codec is explained in docs/results/store.md.

Foreground is indexed as counts per cell of 32^3 voxels. To draw one foreground voxel of a volume, uniformly and
exactly, a cell is drawn by its count and only that cell is read.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.data.datasets.cases import UNANNOTATED, Case
from hyspark.data.datasets.nnunet_prepared import NnunetPreparation
from hyspark.data.datasets.words import FIRST_CHANNELS
from hyspark.data.intensity import MAX_STORED, LinearMap, VolumeScale, quantise, store_key
from hyspark.data.preprocessing.arrays import MAX_OPEN, damaged_entry, open_array, write_array
from hyspark.data.preprocessing.entry_files import UNFINISHED_PREFIX, checksums, is_complete
from hyspark.data.settings import PrepareSettings

STORE_FORMAT, EARLIER_FORMAT = 5, 4
CELL_EDGE = 32
"""Edge of the cells in which foreground is counted."""

VOXEL_KINDS: Mapping[str, Callable[[np.ndarray, np.ndarray | None], np.ndarray]] = {
    "foreground": lambda foreground, label: foreground,
    "labelled": lambda foreground, label: (
        np.zeros(foreground.shape, bool) if label is None else (label > 0) & (label != UNANNOTATED)
    ),
    "unlabelled": lambda foreground, label: foreground if label is None else foreground & (label == 0),
}
"""Kinds of voxel a crop may be centred on, by foreground (in any channel) and label."""


def array_name(channel: int) -> str:
    """Return the name of a channel's array."""
    return f"image_{channel}" if channel else "image"


def entry_folder(
    store_dir: Path,
    settings: PrepareSettings,
    image: Path,
    label: Path | None,
    ignore: int | None = None,
    store_format: int = STORE_FORMAT,
    others: Sequence[Path] = (),
    by_nnunet: NnunetPreparation | None = None,
) -> Path:
    """Return the folder of a prepared volume, whose name is a hash of files, settings and the label's ignored value.

    Of an array of nnU-Net, also of how it was prepared.
    """
    key: dict[str, Any] = {"format": store_format} | store_key(settings)
    further = {array_name(channel): path for channel, path in enumerate(others, 1)}
    for name, path in ({"image": image, "label": label} | further).items():
        if path is not None:
            stat = path.stat()
            key[name] = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    if ignore is not None:
        key["ignore"] = ignore
    if settings.image_channels != FIRST_CHANNELS:  # which may be volumes of one file
        key["image_channels"] = settings.image_channels
    if by_nnunet is not None:
        key["by_nnunet"] = asdict(by_nnunet)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return store_dir / digest[:32]


def case_folder(store_dir: Path, settings: PrepareSettings, case: Case, store_format: int = STORE_FORMAT) -> Path:
    """Return the folder of a prepared case, see `entry_folder`."""
    return entry_folder(
        store_dir, settings, case.image, case.label, case.ignore, store_format, case.others, case.prepared
    )


@dataclass(frozen=True)
class Entry:
    """The content of entry.json.

    Attributes:
        shape: voxels per axis.
        affine: `(4, 4)` of the prepared grid, RAS mm.
        source: the image file it was made from.
        max_label: largest value of its label's file, 0 without one; the ignored value does not count.
        steps: number that 1 is stored as, of channels in the HU window.
        channels: by channel, steps and map where the range is the volume's own, None in the HU window.
    """

    shape: tuple[int, ...]
    affine: list[list[float]]
    source: str
    max_label: int
    steps: int
    channels: tuple[tuple[int, LinearMap] | None, ...] = (None,)


def write_entry(
    folder: Path,
    *,
    image: np.ndarray,
    label: np.ndarray | None,
    affine: np.ndarray,
    source: str,
    steps: int = MAX_STORED,
    max_label: int | None = None,
    scales: Sequence[VolumeScale] = (),
) -> None:
    """Write one entry of the store, atomically.

    Args:
        folder: folder of the entry.
        image: float32 `(h, w, d)` or `(c, h, w, d)`, fractions in [0, 1].
        label: uint8 `(h, w, d)`.
        affine: `(4, 4)` of the grid, RAS mm.
        source: the image file.
        steps: number that 1 is stored as, in the HU window.
        max_label: largest value of the label's file; by default that of `label`.
        scales: the range of each channel; by default the HU window.
    """
    channels = image[None] if image.ndim == 3 else image
    own = [None if scale.map is None else (scale.steps, scale.map) for scale in scales] or [None] * len(channels)
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=folder.parent))
    try:
        foreground = np.zeros(channels.shape[1:], bool)
        for number, (channel, known) in enumerate(zip(channels, own, strict=True)):
            quantised = quantise(channel, known[0] if known else steps)
            foreground |= quantised > 0
            write_array(temporary / f"{array_name(number)}.b2nd", quantised)
        if label is not None:
            write_array(temporary / "label.b2nd", label)
        counts = np.stack([cell_counts(where(foreground, label)).ravel() for where in VOXEL_KINDS.values()])
        np.save(temporary / "counts.npy", counts.astype(np.uint32))
        if max_label is None:
            max_label = 0 if label is None else int(label.max(initial=0))
        entry = Entry(foreground.shape, affine.tolist(), source, max_label, steps, tuple(own))
        names = sorted(path.name for path in temporary.iterdir())
        content = json.loads(json.dumps(asdict(entry)))
        if entry.channels == (None,):
            del content["channels"]  # as entries of CT always were
        content["sizes"] = {name: (temporary / name).stat().st_size for name in names}
        content["checksums"] = checksums(temporary, [*names, "entry.json"], content)
        (temporary / "entry.json").write_text(json.dumps(content))
        try:
            os.replace(temporary, folder)
        except OSError:
            if not is_complete(folder):  # otherwise another process has just made the same entry
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cell_counts(where: np.ndarray) -> np.ndarray:
    """Count the True voxels in each cell of 32^3: bool `(h, w, d)` -> int64 of shape ceil(shape / 32)."""
    padded = np.pad(where, [(0, -s % CELL_EDGE) for s in where.shape])
    split = [n for s in padded.shape for n in (s // CELL_EDGE, CELL_EDGE)]
    counts: np.ndarray = padded.reshape(split).sum(axis=tuple(range(1, len(split), 2)))
    return counts


@dataclass(frozen=True)
class StoredVolume:
    """A prepared volume on disk. Holds no voxels; safe to send to other processes.

    Attributes:
        folder: folder of its entry.
        name: name of its case.
        of_settings: by channel, the map to a network's input that the settings give (`hu_maps`); empty without any.
    """

    folder: Path
    name: str
    of_settings: tuple[LinearMap | None, ...] = ()

    @property
    def entry(self) -> Entry:
        """Content of entry.json."""
        return read_entry(self.folder)

    @property
    def num_channels(self) -> int:
        """Number of channels of the image."""
        return len(self.entry.channels)

    @property
    def maps(self) -> list[LinearMap | None]:
        """The map of each channel from fractions to a network's input; None where fractions are the input."""
        known = self.of_settings or (None,) * self.num_channels
        return [own[1] if own else other for own, other in zip(self.entry.channels, known, strict=True)]

    def read_whole(self) -> np.ndarray:
        """Read all channels, fractions, float32 `(c, h, w, d)`."""
        shape = self.entry.shape
        return self.read_channels((0,) * len(shape), shape)

    def read_channels(self, start: Sequence[int], size: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Read a box of all channels as `read` does, float32 `(c, *size)`."""
        out = np.empty((self.num_channels, *size), np.float32) if out is None else out
        for channel, part in enumerate(out):
            self.read(array_name(channel), start, size, part)
        return out

    def read(self, array: str, start: Sequence[int], size: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Read a box of voxels; voxels outside the volume are 0.

        Args:
            array: "image" (fractions, float32 in [0, 1]), "image_1" for the second channel, ..., or "label" (uint8).
            start: first voxel on each axis, may be negative.
            size: voxels per axis.
            out: float32 array of this size that an image is written to, instead of a new one.
        """
        box = self.read_stored(array, start, size)
        if array == "label":
            return box
        own = self.entry.channels[int(array.partition("_")[2] or 0)]
        return np.divide(box, np.float32(own[0] if own else self.entry.steps), out=out, dtype=np.float32)

    def read_stored(self, array: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Read a box as `read`, without scaling to [0, 1]: an image is uint16."""
        shape = self.entry.shape
        low = [max(0, s) for s in start]
        high = [max(a, min(n, s + e)) for n, a, s, e in zip(shape, low, start, size, strict=True)]
        stored = open_array(self.folder / f"{array}.b2nd")
        try:
            box = np.asarray(stored[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])
        except Exception as error:  # of blosc2: of several types
            raise damaged_entry(self.folder, error) from error
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
        foreground = self.read_stored("image", start, size) > 0
        for channel in range(1, self.num_channels):
            foreground |= self.read_stored(array_name(channel), start, size) > 0
        needs_label = kind != "foreground" and (self.folder / "label.b2nd").exists()
        label = self.read_stored("label", start, size) if needs_label else None
        within = np.flatnonzero(VOXEL_KINDS[kind](foreground, label))[rank - (int(ends[number - 1]) if number else 0)]
        offset = np.unravel_index(within, size)
        return tuple(a + int(o) for a, o in zip(start, offset, strict=True))


@lru_cache(MAX_OPEN)
def read_entry(folder: Path) -> Entry:
    """Read the content of entry.json; entries never change once they exist."""
    loaded = json.loads((folder / "entry.json").read_text())
    channels = tuple(own and (own[0], LinearMap(*own[1])) for own in loaded.get("channels", [None]))
    of_file = (loaded["affine"], loaded["source"], loaded["max_label"], loaded["steps"])
    return Entry(tuple(loaded["shape"]), *of_file, channels)


@lru_cache(MAX_OPEN)
def cumulative_counts(folder: Path) -> np.ndarray:
    """Read the number of voxels of each kind up to and in each cell: int64 `(kinds, cells)`."""
    return np.cumsum(np.load(folder / "counts.npy", allow_pickle=False), axis=1, dtype=np.int64)
