"""Which chunked format holds prepared volumes best: the table in docs/results/store.md. One thread.

    make bench
    python benchmarks/store.py --image some_ct.nii.gz

Without --image the volume is a phantom at 1.5 mm, whose noise compresses less well than most CT.
"""

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import zarr
from measure import in_fresh_process, seconds
from tap import Tap
from zarr.codecs import BloscCodec

EDGE = 96
MOST = 65535


class Arguments(Tap):
    """Measure formats of the store."""

    image: str = ""  # A CT; by default a phantom
    repeats: int = 60  # Crops read per format


@dataclass(frozen=True)
class Format:
    """One way to store a volume; by default the one in use. `steps`: what 1 is stored as, 0 for the store's choice."""

    library: str = "blosc2"
    codec: str = "lz4hc"
    level: int = 5
    filter: str = "shuffle"
    chunk: int = 64
    block: tuple[int, ...] = (16, 32, 32)
    steps: int = 0

    def write(self, array: np.ndarray, path: Path) -> None:
        """Write uint16 (h, w, d)."""
        if self.library == "zarr":
            codec = BloscCodec(cname=self.codec, clevel=self.level, shuffle=self.filter)
            chunks = (self.chunk,) * 3
            zarr.create_array(path, shape=array.shape, chunks=chunks, dtype=array.dtype, compressors=codec)[:] = array
            return
        cparams = {
            "codec": blosc2.Codec[self.codec.upper()],
            "clevel": self.level,
            "filters": [blosc2.Filter[self.filter.upper()]],
            "nthreads": 1,
        }
        chunks = tuple(min(self.chunk, n) for n in array.shape)
        blocks = tuple(min(b, n) for b, n in zip(self.block, array.shape, strict=True))
        blosc2.asarray(array, chunks=chunks, blocks=blocks, urlpath=str(path), cparams=cparams)

    def open(self, path: Path) -> Any:
        """What was written, for reading by slices."""
        if self.library == "zarr":
            return zarr.open_array(path, mode="r")
        return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})


IN_USE = Format()
FORMATS = (
    IN_USE,
    *(replace(IN_USE, level=level) for level in (1, 9)),
    *(replace(IN_USE, codec=codec) for codec in ("lz4", "blosclz")),
    *(replace(IN_USE, codec="zstd", level=level) for level in (1, 3, 5)),
    *(replace(IN_USE, codec=codec, filter="bitshuffle") for codec in ("lz4", "lz4hc")),
    *(replace(IN_USE, chunk=chunk) for chunk in (32, 128)),
    *(replace(IN_USE, block=block) for block in ((8,) * 3, (16,) * 3, (32,) * 3)),
    replace(IN_USE, steps=MOST),
    replace(IN_USE, codec="lz4", block=(16,) * 3, steps=MOST),
    *(Format("zarr", "lz4", 5, shuffle, block=()) for shuffle in ("shuffle", "bitshuffle")),
    Format("zarr", "zstd", 1, block=()),
)


def prepared_volume(image: str, folder: Path) -> tuple[np.ndarray, int]:
    """float32 (h, w, d) of a CT, or of a phantom, prepared at 1.5 mm; the steps in which the store holds it."""
    import nibabel  # here and below: processes that only read are measured without torch

    from hyspark.data.datasets.cases import Case
    from hyspark.data.intensity import stored_steps
    from hyspark.data.preprocessing.prepare import prepare_case
    from hyspark.data.settings import PrepareSettings
    from hyspark.data.synthetic.phantom import make_phantom

    path = Path(image)
    if not image:
        phantom = make_phantom(0, spacing=(1.5, 1.5, 1.5))
        path = folder / "phantom_0000.nii.gz"
        nibabel.save(nibabel.Nifti1Image(phantom.image, phantom.affine), path)
    settings = PrepareSettings()
    return prepare_case(Case(path.name, "", path), settings)["image"][0], stored_steps(settings)


def read_crops(form: Format, path: Path, shape: tuple[int, ...], repeats: int) -> float:
    """Median seconds to read a random crop as float32."""
    stored = form.open(path)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(repeats):
        start = [int(rng.integers(max(1, n - EDGE + 1))) for n in shape]
        clock = time.perf_counter()
        np.divide(stored[tuple(slice(s, s + EDGE) for s in start)], np.float32(MOST), dtype=np.float32)
        times.append(time.perf_counter() - clock)
    return statistics.median(times)


def main() -> None:
    """Print the table in Markdown."""
    args = Arguments().parse_args()
    blosc2.set_nthreads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        image, steps = prepared_volume(args.image, folder)
        print(f"{' x '.join(map(str, image.shape))} voxels, {image.nbytes / 1e6:.1f} MB as float32\n")
        print("| library | codec | level | filter | chunks | blocks | steps | MB | write s | crop ms | resident MB |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for number, form in enumerate(FORMATS):
            form = replace(form, steps=form.steps or steps)
            path = folder / f"{number}"
            array = np.rint(image * form.steps).astype(np.uint16)
            written = seconds(lambda form=form, array=array, path=path: form.write(array, path))
            size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
            read, memory = in_fresh_process(read_crops, form, path, image.shape, args.repeats)
            blocks = " x ".join(map(str, form.block)) or "-"
            settings = [form.library, form.codec, form.level, form.filter, form.chunk, blocks, form.steps]
            measured = [f"{size / 1e6:.2f}", f"{written:.2f}", f"{read * 1e3:.2f}", f"{memory / 1e6:.0f}"]
            print("|", " | ".join(map(str, [*settings, *measured])), "|", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
