"""Vectors in files: one file per network and case, which a repeated command keeps, and the table of all."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.scan_inputs import ScanCase
from hyspark.utils.atomic import write_whole
from hyspark.utils.digests import content_digest, text_digest
from hyspark.utils.install import extra_error

KEPT_FOLDER = "vectors"
"""Folder of the files of single cases, a folder per network in it."""
TABLE_STEM = "embeddings"
PLACE_COLUMNS = ("case", "region", "x_mm", "y_mm", "z_mm", "voxels")
"""Columns before those of the vector: names, centre of the region, and its voxels at the prepared spacing."""


class CaseVectors(NamedTuple):
    """Vectors of the regions of a case.

    Attributes:
        regions: Names of the regions.
        centres: Centre of each in mm, float64 (n, 3).
        voxels: Voxels of each at the prepared spacing, int64 (n,).
        vectors: float32 (n, c).
        failures: Reasons of regions without a vector, by name.
    """

    regions: list[str]
    centres: np.ndarray
    voxels: np.ndarray
    vectors: np.ndarray
    failures: dict[str, str]


@dataclass(frozen=True)
class VectorTable:
    """Vectors of all cases.

    Attributes:
        cases: Case of each vector.
        regions: Region of each vector.
        centres: Centre of the region in mm, (n, 3).
        voxels: Voxels of the region at the prepared spacing, (n,).
        columns: Name of each number of a vector, "s4_017" for the 18th channel of stage 4.
        vectors: float32 (n, c).
    """

    cases: tuple[str, ...]
    regions: tuple[str, ...]
    centres: np.ndarray
    voxels: np.ndarray
    columns: tuple[str, ...]
    vectors: np.ndarray

    def rows(self) -> list[list[Any]]:
        """Return a row per vector: names, centre, voxels, and its numbers."""
        return [
            [case, region, *(round(float(x), 3) for x in centre), int(voxels), *map(float, vector)]
            for case, region, centre, voxels, vector in zip(
                self.cases, self.regions, self.centres, self.voxels, self.vectors, strict=True
            )
        ]


def case_keys(settings: Mapping[str, Any], names: Sequence[str], case: Case, regions: Any) -> dict[str, str]:
    """Compute the digests of everything that the vectors of a case depend on.

    Args:
        settings: The weights' digest, the settings of preparation and of pooling.
        names: Names of the networks.
        case: The case; its files are read once for all networks.
        regions: What its regions are made of.

    Returns:
        A digest for each network.
    """
    if isinstance(case, ScanCase):
        files = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in case.volume.files]
    else:
        files = [content_digest(path) for path in case.images]
    label = [content_digest(case.label)] if case.label else []
    return {
        name: text_digest([json.dumps({**settings, "name": name}, sort_keys=True), *files, *label, repr(regions)])
        for name in names
    }


def kept_file(out: Path, network: str, case: str) -> Path:
    """Return the file of the vectors of a case."""
    return out / KEPT_FOLDER / network / f"{case}.safetensors"


def write_case_vectors(path: Path, key: str, found: CaseVectors) -> None:
    """Write the vectors of a case."""
    about = {"key": key, "regions": json.dumps(found.regions), "failures": json.dumps(found.failures)}
    tensors = {"vectors": found.vectors, "centres": found.centres, "voxels": found.voxels}
    write_whole(path, save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, about))


def read_case_vectors(path: Path, key: str) -> CaseVectors | None:
    """Read the vectors of a case; None if there is no file, or one that is damaged or of another key."""
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in ("centres", "voxels", "vectors")}
    except (OSError, SafetensorError):
        return None
    return CaseVectors(json.loads(about["regions"]), **tensors, failures=json.loads(about["failures"]))


def join_cases(found: Mapping[str, CaseVectors], columns: Sequence[str]) -> VectorTable:
    """Join the vectors of cases to one table."""
    parts = [one for one in found.values() if one.regions]
    return VectorTable(
        tuple(case for case, one in found.items() for _ in one.regions),
        tuple(region for one in found.values() for region in one.regions),
        np.concatenate([one.centres for one in parts]),
        np.concatenate([one.voxels for one in parts]),
        tuple(columns),
        np.concatenate([one.vectors for one in parts]),
    )


def column_names(stages: Sequence[int], channels: Sequence[int]) -> list[str]:
    """Name the numbers of a vector by stage and channel."""
    return [f"s{stage}_{channel:03d}" for stage, num in zip(stages, channels, strict=True) for channel in range(num)]


def write_table(out: Path, table: VectorTable, settings: Mapping[str, Any], *, parquet: bool = False) -> list[Path]:
    """Write the table as embeddings.safetensors and embeddings.csv, and as embeddings.parquet if asked for.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: Parquet is asked for, and pyarrow is not installed.
    """
    files = [out / f"{TABLE_STEM}.safetensors", out / f"{TABLE_STEM}.csv"]
    names = {name: json.dumps(list(getattr(table, name))) for name in ("cases", "regions", "columns")}
    tensors = {"embeddings": table.vectors, "centres_mm": table.centres, "voxels": table.voxels}
    content = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    write_whole(files[0], save(content, names | {"settings": json.dumps(settings)}))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*PLACE_COLUMNS, *table.columns])
    for row in table.rows():
        writer.writerow([f"{value:.7g}" if isinstance(value, float) else value for value in row])
    write_whole(files[1], text.getvalue().encode("utf-8", "surrogateescape"))
    if parquet:
        files.append(out / f"{TABLE_STEM}.parquet")
        write_parquet(files[2], table)
    return files


def write_parquet(path: Path, table: VectorTable) -> None:
    """Write the table as Parquet, a column per number; numbers keep their precision."""
    pyarrow = import_pyarrow()
    place = {name: values.tolist() for name, values in zip(PLACE_COLUMNS[2:5], table.centres.T, strict=True)}
    columns = {"case": list(table.cases), "region": list(table.regions), **place, "voxels": table.voxels}
    columns |= dict(zip(table.columns, table.vectors.T, strict=True))
    buffer = pyarrow.BufferOutputStream()
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), buffer)
    write_whole(path, buffer.getvalue().to_pybytes())


def import_pyarrow() -> Any:
    """Import pyarrow; raise ModuleNotFoundError with the command that installs it."""
    try:
        import pyarrow
    except ImportError as error:
        raise extra_error(error, "--parquet needs pyarrow", "parquet", "pyarrow") from error
    return pyarrow


def plain_settings(settings: Any) -> dict[str, Any]:
    """Convert a dataclass of settings to values that JSON keeps."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
