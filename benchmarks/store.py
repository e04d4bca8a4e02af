"""Which chunked format holds prepared volumes best: size, writing, reading random 96^3 crops. One thread, medians.

    make bench
    python benchmarks/store.py --image some_ct.nii.gz

Without --image the volume is a phantom at 1.5 mm, which compresses less well than most CT. Speeds are given as
ratios to the chosen format, measured in the same run.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import zarr
from tap import Tap
from zarr.codecs import BloscCodec

from hyspark.data.cases import Case
from hyspark.data.phantom import make_phantom
from hyspark.data.prepare import prepare_case
from hyspark.data.settings import PrepareSettings

EDGE = 96


class Arguments(Tap):
    """Measure formats of the store."""

    image: str = ""  # A CT; by default a phantom
    repeats: int = 40  # Crops read per format


def prepared_volume(image: str, folder: Path) -> np.ndarray:
    """uint16 (h, w, d) of a CT, or of a phantom, prepared at 1.5 mm."""
    path = Path(image)
    if not image:
        phantom = make_phantom(0, spacing=(1.5, 1.5, 1.5))
        path = folder / "phantom_0000.nii.gz"
        nibabel.save(nibabel.Nifti1Image(phantom.image, phantom.affine), path)
    prepared = prepare_case(Case(path.name, "", path), PrepareSettings())
    return np.rint(prepared["image"] * 65535).astype(np.uint16)


def formats() -> Iterator[tuple[str, Callable[[np.ndarray, Path], Any]]]:
    """Name, and a function that writes an array to a path and opens it for reading."""
    for codec, level in ((blosc2.Codec.LZ4, 5), (blosc2.Codec.ZSTD, 1)):

        def with_blosc2(array: np.ndarray, path: Path, codec: Any = codec, level: int = level) -> Any:
            cparams = {"codec": codec, "clevel": level, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
            blosc2.asarray(array, chunks=(64,) * 3, blocks=(16,) * 3, urlpath=str(path), cparams=cparams)
            return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})

        yield f"blosc2 {codec.name.lower()} {level}", with_blosc2
    for name, level in (("lz4", 5), ("zstd", 1)):

        def with_zarr(array: np.ndarray, path: Path, name: str = name, level: int = level) -> Any:
            codec = BloscCodec(cname=name, clevel=level, shuffle="shuffle")
            zarr.create_array(path, shape=array.shape, chunks=(64,) * 3, dtype=array.dtype, compressors=codec)[:] = (
                array
            )
            return zarr.open_array(path, mode="r")

        yield f"zarr {name} {level}", with_zarr


def read_time(stored: Any, shape: tuple[int, ...], repeats: int) -> float:
    """Median seconds for a random crop as float32."""
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(repeats):
        start = [int(rng.integers(max(1, n - EDGE + 1))) for n in shape]
        clock = time.perf_counter()
        np.asarray(stored[tuple(slice(s, s + EDGE) for s in start)]).astype(np.float32)
        seconds.append(time.perf_counter() - clock)
    return statistics.median(seconds)


def main() -> None:
    """Print the table."""
    args = Arguments().parse_args()
    folder = Path(tempfile.mkdtemp())
    blosc2.set_nthreads(1)
    try:
        array = prepared_volume(args.image, folder)
        print(f"{' x '.join(map(str, array.shape))} voxels, {array.nbytes / 1e6:.1f} MB as uint16")
        reference = 0.0
        for number, (name, write) in enumerate(formats()):
            path = folder / f"{number}"
            clock = time.perf_counter()
            stored = write(array, path)
            written = time.perf_counter() - clock
            size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
            seconds = read_time(stored, array.shape, args.repeats)
            reference = reference or seconds
            print(
                f"{name:15s} {size / 1e6:6.1f} MB   write {written:5.2f} s   "
                f"crop {seconds * 1e3:5.2f} ms = {seconds / reference:4.1f} x the first"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
