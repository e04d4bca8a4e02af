"""Embedding as a Python function: vectors of volumes or regions in files, and what a probe finds in them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.evaluation.embedding.embed import EmbedOptions, embed_volumes
from hyspark.evaluation.embedding.networks import NetworkChoice, load_embedding_network
from hyspark.evaluation.embedding.probe import probe_vectors
from hyspark.evaluation.embedding.probe_data import ProbeOptions, check_labels, read_labels, read_probe_data
from hyspark.evaluation.embedding.report import difference_rows, import_umap, score_rows, write_probe
from hyspark.evaluation.embedding.vectors import VectorTable, import_pyarrow, write_table
from hyspark.tasks.api import StrPath, check_caller
from hyspark.tasks.python_words import in_python_words
from hyspark.training.distributed import find_processes
from hyspark.training.initial_weights import INPUT_SETTINGS
from hyspark.utils.log import LOG
from hyspark.utils.tables import aligned_table
from hyspark.utils.text import nearest

RANDOM_SEEDS = (0, 1, 2)
"""Seeds of the random weights that a probe compares with, unless others are given."""
NETWORK = ("model", "weights_key", "window")
REGIONS = ("boxes", "labels", "grid", "stages", "pooling", "batch_size", "min_slices", "prepare_workers")
PROBE = ("target", "features", "folds", "picture", "random_seeds")


@dataclass(frozen=True)
class Embeddings:
    """Vectors of volumes or regions.

    Attributes:
        folder: Folder of the files.
        files: embeddings.safetensors and embeddings.csv, and further forms that were asked for.
        table: Names of volumes and regions, centres in mm, and the vectors.
        failures: Reasons of volumes and regions without a vector, by name.
        scores: Content of probe.json; empty without a probe.
    """

    folder: Path
    files: list[Path]
    table: VectorTable
    failures: dict[str, str]
    scores: dict[str, Any] = field(default_factory=dict)

    @property
    def vectors(self) -> np.ndarray:
        """The vectors, float32 (n, c)."""
        return self.table.vectors


@in_python_words
def embed(
    weights: StrPath, inputs: StrPath | Sequence[StrPath], out: StrPath, *, device: str = "auto", **options: Any
) -> Embeddings:
    """Compute a vector per volume or region from an encoder, as `hyspark embed` does; the same call continues.

    Args:
        weights: File of weights, or a run folder: pre-trained or fine-tuned; a folder of `hyspark export --hf`, or
            hf://OWNER/NAME[@REVISION] on the Hugging Face Hub.
        inputs: NIfTI files, and folders that hold some or DICOM series.
        out: Folder to write to.
        device: "auto", "cpu" or "cuda".
        **options: One of boxes, labels and grid; stages, pooling, window, model, weights_key, batch_size, min_slices,
            prepare_workers, parquet; settings of preparation in the position of those of the weights: spacing,
            intensity, hu_min, hu_max, image_channels, input_mean, input_std; and of a probe: probe, target, features,
            random_seeds, folds, picture.

    Returns:
        The vectors. Volumes and regions without one are in its `failures`.

    Raises:
        ValueError: An option is unknown or does not fit; no volume has a vector.
        FileNotFoundError: Weights, inputs or labels are missing.
        ModuleNotFoundError: Parquet or UMAP is asked for, and not installed.
    """
    check_caller(device)
    known = ("parquet", "probe", *INPUT_SETTINGS, *NETWORK, *REGIONS, *PROBE)
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; options are {', '.join(known)}{nearest(name, known)}")
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    if not paths:
        raise ValueError("inputs: expected one path or more, got none")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    probe = probe_options(options)
    if options.get("parquet"):
        import_pyarrow()
    network = load_embedding_network(
        NetworkChoice(
            Path(weights),
            **{name: options[name] for name in NETWORK if name in options},
            inputs={name: options[name] for name in INPUT_SETTINGS if name in options},
        )
    )
    regions = {name: options[name] for name in REGIONS if name in options}
    regions |= {name: Path(regions[name]) for name in ("boxes", "labels") if regions.get(name)}
    regions["num_workers"] = regions.pop("prepare_workers", 0)
    seeds = tuple(options.get("random_seeds", RANDOM_SEEDS)) if probe else ()
    check = partial(check_labels, probe) if probe else None
    embed_options = EmbedOptions(**regions, random_seeds=seeds)
    made = embed_volumes(network, paths, Path(out), embed_options, device=device, check=check)
    if not find_processes(device).is_main:
        return Embeddings(Path(out), [], made.table, made.failures)
    files = write_table(Path(out), made.table, made.settings, parquet=bool(options.get("parquet")))
    scores = {}
    if probe:
        data = read_probe_data(probe, made.table, made.cases)
        LOG.info("probe of %s: %d vectors", probe.target, len(data.positions))
        found = probe_vectors(made.table.vectors, made.random, data)
        scores = write_probe(Path(out), probe, data, made.table.vectors, found, made.settings)
    return Embeddings(Path(out), files, made.table, made.failures, scores)


def probe_options(options: dict[str, Any]) -> ProbeOptions | None:
    """Return the options of a probe, or None without one.

    Raises:
        ValueError: An option of a probe is given without one; the file of labels lacks a column.
        ModuleNotFoundError: UMAP is asked for, and not installed.
    """
    given = {name: options[name] for name in PROBE if name in options}
    if not options.get("probe"):
        if given:
            raise ValueError(f"{', '.join(f'--{name}' for name in given)}: read with --probe alone; add --probe")
        return None
    given.pop("random_seeds", None)
    probe = ProbeOptions(Path(options["probe"]), **{"target": "", **given})
    read_labels(probe)
    if probe.picture == "umap":
        import_umap()
    return probe


def summarise_embeddings(made: Embeddings) -> str:
    """Write what was made, for the terminal: the files, and the scores of a probe."""
    num, length = made.table.vectors.shape
    lines = [f"{num} vectors of {length} numbers: {', '.join(map(str, made.files))}"]
    if made.scores:
        lines += ["", aligned_table(score_rows(made.scores["rows"]))]
        if made.scores["differences"]:
            lines += ["", aligned_table(difference_rows(made.scores["differences"]))]
        lines += ["", f"report {made.folder / 'probe.md'}"]
    return "\n".join(lines)
