"""Embedding of volumes: each is prepared once, and each network computes the vectors of its regions."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.found import log_unused
from hyspark.data.datasets.inputs import OWN_LABELS
from hyspark.data.datasets.scan_inputs import ScanCase, find_inputs, scan_folder
from hyspark.data.readers.nifti import read_label
from hyspark.evaluation.embedding.networks import EmbeddingNetwork
from hyspark.evaluation.embedding.pooling import Pooling, plan_windows, pool_regions
from hyspark.evaluation.embedding.regions import (
    VOLUME,
    Region,
    WorldBox,
    box_region,
    grid_regions,
    label_regions,
    read_boxes,
    volume_region,
)
from hyspark.evaluation.embedding.vectors import (
    CaseVectors,
    VectorTable,
    case_keys,
    column_names,
    join_cases,
    kept_file,
    plain_settings,
    read_case_vectors,
    write_case_vectors,
)
from hyspark.evaluation.failures import NO_OUTPUT, OutputError, case_failure
from hyspark.evaluation.segmentation.prepare_ahead import MAX_PREPARE_WORKERS, prepare_ahead
from hyspark.training import distributed
from hyspark.training.distributed import Processes
from hyspark.utils.free_memory import free_main_memory
from hyspark.utils.log import LOG
from hyspark.utils.paths import NIFTI, nifti_stem
from hyspark.utils.processes import available_cores
from hyspark.utils.text import listing

VECTOR_FORMAT = 1
"""Vectors in files of another number are computed anew; raised where vectors change."""
CheckCases = Callable[[Mapping[str, Case], Mapping[str, Sequence[str]] | None], None]
"""Takes the cases by name, and the names of their regions, or None where preparation finds them."""
PRETRAINED = "weights"
"""Name of the network with the given weights, beside those with random ones."""


@dataclass(frozen=True)
class EmbedOptions:
    """What is embedded, and how.

    Attributes:
        boxes: CSV file of boxes; None for none.
        labels: Folder of label maps, CASE.nii.gz; None for none.
        grid: Edge in mm of the cells of a grid; 0 for none.
        stages: Numbers of the stages, from 1, the finest; empty for all.
        pooling: "mean" or "max".
        batch_size: Windows in one forward pass.
        min_slices: DICOM scans of fewer slices are not embedded.
        num_workers: Processes that prepare volumes. 0 takes one per core, at most 4; 1 prepares in this process.
        random_seeds: Seeds of random weights, whose vectors are computed too.
    """

    boxes: Path | None = None
    labels: Path | None = None
    grid: float = 0
    stages: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    batch_size: int = 4
    min_slices: int = 8
    num_workers: int = 0
    random_seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("boxes", "labels", "grid") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(f'--{name}' for name in given)}: expected one kind of region; give one")
        if not 0 <= self.grid < math.inf or self.num_workers < 0:
            raise ValueError(f"--grid and --prepare_workers: expected 0 or more, got {self.grid}, {self.num_workers}")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size: expected 1 or more, got {self.batch_size}")
        if self.pooling not in ("mean", "max"):
            raise ValueError(f"--pooling: expected mean or max, got {self.pooling!r}")
        if min(self.random_seeds, default=0) < 0 or len(set(self.random_seeds)) < len(self.random_seeds):
            raise ValueError(f"--random_seeds: expected different numbers from 0, got {list(self.random_seeds)}")


@dataclass(frozen=True)
class Embedded:
    """Vectors of volumes.

    Attributes:
        table: Vectors of the given weights.
        random: Vectors of random weights by seed, in the rows of the table.
        cases: The volumes by name.
        failures: Reasons of volumes and regions without a vector, by name.
        settings: What the vectors were made with.
    """

    table: VectorTable
    random: dict[int, np.ndarray]
    cases: dict[str, Case]
    failures: dict[str, str]
    settings: dict[str, Any]


def embed_volumes(
    network: EmbeddingNetwork,
    inputs: Sequence[Path],
    out: Path,
    options: EmbedOptions,
    *,
    device: str = "auto",
    check: CheckCases | None = None,
) -> Embedded:
    """Compute the vectors of volumes. One that fails, for whatever reason, stops no other; existing vectors are kept.

    The processes that torchrun started divide the volumes among themselves.

    Args:
        network: The encoder.
        inputs: NIfTI files, and folders of such files or of DICOM series.
        out: Folder to write to.
        options: What is embedded, and how.
        device: "auto", or a device of torch.
        check: Called with the cases before the first is embedded.

    Raises:
        FileNotFoundError: Inputs are missing.
        ValueError: Options do not fit the network or the volumes, or no volume has a vector.
        OutputError: The folder takes no file.
    """
    stages = chosen_stages(options.stages, len(network.stages))
    processes = distributed.find_processes(device)
    boxes = read_boxes(options.boxes) if options.boxes else {}
    found = find_inputs(
        inputs,
        out,
        settings=network.settings,
        only_dicom=False,
        min_slices=options.min_slices,
        progress=processes.is_main,
    )
    log_unused([line for line in found.lines if not (options.labels and OWN_LABELS in line)])
    cases, failures = [replace(case, label=None) for case in found.cases], dict(found.failures)
    if options.labels:
        cases = labelled_cases(cases, options.labels)
    if options.boxes:
        cases = boxed_cases(cases, boxes, options.boxes)
    if check:
        check({case.name: case for case in cases}, known_regions(cases, options, boxes))
    settings = {
        "format": VECTOR_FORMAT,
        "weights": network.digest,
        "network": network.name,
        "preparation": plain_settings(network.settings),
        "window": list(network.window),
        "stages": list(stages),
        "pooling": options.pooling,
        "regions": next((name for name in ("boxes", "labels", "grid") if getattr(options, name)), VOLUME),
        "grid": options.grid,
    }
    embedder = Embedder(network, stages, options, boxes, settings, out)
    LOG.info("%d volumes, %s, on %s", len(cases), network.name, processes.describe("fp32"))
    todo = [case for case in cases if set(embedder.read_kept(case)) < set(embedder.names)]
    if len(todo) < len(cases):
        LOG.info("%d volumes have their vectors from before", len(cases) - len(todo))
    with distributed.join_process_group(processes):
        distributed.barrier(processes)  # no process writes before all have looked
        mine = todo[processes.rank :: processes.world_size]
        try:
            failures |= dict(
                distributed.run_and_gather(lambda: [*embed_cases(embedder, mine, processes).items()], processes)
            )
        finally:
            if processes.is_main:
                shutil.rmtree(scan_folder(out), ignore_errors=True)
    done = {case.name: embedder.read_kept(case) for case in cases if case.name not in failures}
    for name, one in done.items():
        failures |= {f"{name}/{region}": why for region, why in one[PRETRAINED].failures.items()}
    if not any(one[PRETRAINED].regions for one in done.values()):
        reasons = "".join(f"\n  {name}: {why}" for name, why in failures.items())
        raise ValueError(f"none of {len(cases)} volumes has a vector:{reasons}")
    columns = column_names(stages, [network.stages[stage - 1][0] for stage in stages])
    tables = {name: join_cases({case: one[name] for case, one in done.items()}, columns) for name in embedder.names}
    random = {seed: tables[random_name(seed)].vectors for seed in options.random_seeds}
    return Embedded(tables[PRETRAINED], random, {case.name: case for case in cases}, failures, settings)


def embed_cases(embedder: "Embedder", cases: Sequence[Case], processes: Processes) -> dict[str, str]:
    """Write the vectors of this process's cases.

    Returns:
        The reason for each case without vectors.
    """
    failures = {}
    workers = embedder.options.num_workers or min(available_cores(), MAX_PREPARE_WORKERS)
    memory = free_main_memory() // 4
    ahead = closing(prepare_ahead(cases, embedder.network.settings, workers, memory, is_whole=True))
    bar = tqdm(total=len(cases), desc="embed", unit="volume", disable=not (cases and processes.is_main))
    with bar, ahead as all_prepared:
        for case, prepared in all_prepared:
            try:
                if isinstance(prepared, str):
                    raise ValueError(prepared)
                embedder.embed_case(case, prepared, processes.device)
            except Exception as error:
                failures[case.name] = f"{case.origin}: {case_failure(error)}"
            finally:
                if isinstance(case, ScanCase):
                    case.image.unlink(missing_ok=True)
            bar.update()
    return failures


@dataclass(frozen=True)
class Embedder:
    """Computes the vectors of a case by all networks, and keeps them in files.

    Attributes:
        network: The network, and how volumes are prepared for it.
        stages: Numbers of the stages.
        options: What is embedded, and how.
        boxes: Boxes by case.
        settings: What the vectors depend on besides the case.
        out: Folder to write to.
        encoders: Those with random weights that were built, by name.
    """

    network: EmbeddingNetwork
    stages: tuple[int, ...]
    options: EmbedOptions
    boxes: Mapping[str, list[WorldBox]]
    settings: Mapping[str, Any]
    out: Path
    encoders: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the networks: that of the weights, and those of random weights."""
        return [PRETRAINED, *map(random_name, self.options.random_seeds)]

    def encoder(self, name: str) -> nn.Module:
        """Return the encoder of a network by its name."""
        if name == PRETRAINED:
            return self.network.encoder
        if name not in self.encoders:
            self.encoders[name] = self.network.random(int(name.rpartition("_")[2]))
        return self.encoders[name]

    def keys(self, case: Case) -> dict[str, str]:
        """Compute the digest of what the vectors of a case depend on, for each network."""
        boxes = [(box.name, box.low.tolist(), box.high.tolist()) for box in self.boxes.get(case.name, ())]
        return case_keys(self.settings, self.names, case, boxes)

    def read_kept(self, case: Case) -> dict[str, CaseVectors]:
        """Read the vectors of a case that an earlier call has left, by network."""
        try:
            keys = self.keys(case)
        except OSError:  # preparation finds the reason
            return {}
        found = {name: read_case_vectors(kept_file(self.out, name, case.name), key) for name, key in keys.items()}
        return {name: one for name, one in found.items() if one is not None}

    def embed_case(self, case: Case, prepared: Mapping[str, Any], device: torch.device) -> None:
        """Compute the vectors of a case that are not kept, and write them.

        Raises:
            ValueError: The case has no region, or features are not finite.
            OutputError: The folder takes no file.
        """
        image, affine = prepared["image"], prepared["affine"]
        regions, failures = self.regions(case, prepared)
        shape, window, unit = image.shape[1:], self.network.window, self.network.unit
        windows = plan_windows(regions, shape, window, unit, is_shared=self.options.grid > 0) if regions else []
        kept, keys = self.read_kept(case), self.keys(case)
        for name in [name for name in self.names if name not in kept]:
            vectors = np.zeros((0, sum(self.network.stages[stage - 1][0] for stage in self.stages)), np.float32)
            if regions:
                vectors = pool_regions(
                    self.encoder(name).to(device),
                    image,
                    prepared["maps"],
                    regions,
                    windows,
                    stages=self.stages,
                    pooling=self.options.pooling,
                    batch_size=self.options.batch_size,
                    device=device,
                )
            found = CaseVectors(
                [region.name for region in regions],
                np.array([region.centre(affine) for region in regions], np.float64).reshape(-1, 3),
                np.array([np.count_nonzero(region.mask) for region in regions], np.int64),
                vectors,
                failures,
            )
            self.write(case, name, keys[name], found)

    def regions(self, case: Case, prepared: Mapping[str, Any]) -> tuple[list[Region], dict[str, str]]:
        """Find the regions of a prepared case, and the reasons of those that it does not have."""
        image, affine = prepared["image"], prepared["affine"]
        if self.options.grid:
            return list(grid_regions(image, affine, self.options.grid)), {}
        if self.options.labels:
            assert case.label is not None
            found = list(label_regions(prepared["label"]))
            if not found:
                raise ValueError(f"{case.label}: no voxel of the prepared grid is labelled")
            names = {f"label_{value}" for value in np.unique(read_label(case.label, case.image).voxels) if value}
            lost = sorted(names - {region.name for region in found})
            return found, dict.fromkeys(lost, "on no voxel of the prepared grid; lower --spacing, or give a box")
        if not self.options.boxes:
            return [volume_region(image)], {}
        regions, failures = [], {}
        for box in self.boxes[case.name]:
            try:
                regions.append(box_region(box, image.shape[1:], affine))
            except ValueError as error:
                failures[box.name] = str(error)
        return regions, failures

    def write(self, case: Case, name: str, key: str, found: CaseVectors) -> None:
        """Write the vectors of a case by a network; raise OutputError if the folder takes no file."""
        path = kept_file(self.out, name, case.name)
        try:
            write_case_vectors(path, key, found)
        except OSError as error:
            if error.errno not in NO_OUTPUT:
                raise
            raise OutputError(f"{path}: not writable ({error.strerror}); make room, or choose another --out") from error


def random_name(seed: int) -> str:
    """Name the network with the random weights of a seed."""
    return f"random_{seed}"


def chosen_stages(stages: tuple[int, ...], num: int) -> tuple[int, ...]:
    """Return the numbers of the stages, all if none is named; raise ValueError for one that the network lacks."""
    if len(set(stages)) < len(stages) or not set(stages) <= set(range(1, num + 1)):
        raise ValueError(f"--stages: expected different numbers from 1 to {num}, got {' '.join(map(str, stages))}")
    return stages or tuple(range(1, num + 1))


def labelled_cases(cases: Sequence[Case], folder: Path) -> list[Case]:
    """Give cases their label maps of a folder, CASE.nii.gz.

    Raises:
        FileNotFoundError: There is no such folder, or none of the cases has a label map in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--labels {folder}: no such folder")
    maps = {nifti_stem(file): file for file in sorted(folder.iterdir()) if NIFTI.fullmatch(file.name)}
    found = [replace(case, label=maps[case.name]) for case in cases if case.name in maps]
    if not found:
        raise FileNotFoundError(f"--labels {folder}: expected label maps named as the volumes, {cases[0].name}.nii.gz")
    warn_of_others(cases, found, f"has no label map in {folder}")
    return found


def boxed_cases(cases: Sequence[Case], boxes: Mapping[str, list[WorldBox]], path: Path) -> list[Case]:
    """Return the cases with boxes.

    Raises:
        ValueError: A box is of no case.
    """
    names = {case.name for case in cases}
    if unknown := [name for name in boxes if name not in names]:
        raise ValueError(f"{path}: boxes of {listing(unknown, 5)}, which is no volume; volumes: {listing(names, 5)}")
    found = [case for case in cases if case.name in boxes]
    if not found:
        raise ValueError(f"{path}: expected boxes, got none")
    warn_of_others(cases, found, f"has no box in {path}")
    return found


def known_regions(
    cases: Sequence[Case], options: EmbedOptions, boxes: Mapping[str, list[WorldBox]]
) -> dict[str, list[str]] | None:
    """Return the names of the regions of cases; None for labels and cells, which are found in prepared volumes."""
    if options.labels or options.grid:
        return None
    return {case.name: [box.name for box in boxes[case.name]] if options.boxes else [VOLUME] for case in cases}


def warn_of_others(cases: Sequence[Case], found: Sequence[Case], why: str) -> None:
    """Log the cases that are not embedded."""
    names = {case.name for case in found}
    if others := [case.name for case in cases if case.name not in names]:
        LOG.warning("%d of %d volumes not embedded, each %s: %s", len(others), len(cases), why, listing(others, 5))
