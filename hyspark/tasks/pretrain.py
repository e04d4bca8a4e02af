"""Pre-training outside of its steps: the data list, the network, the cost, and the end of a run."""

import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hyspark.config.nnunet import describe_plan, find_plan, keep_plan, names_plan, warnings_of_plan
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.shared import encoder_options
from hyspark.data.batches.loader import Shard
from hyspark.data.datasets.build import read_data
from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.nnunet_prepared import is_prepared
from hyspark.data.datasets.stored_axes import find_permuted
from hyspark.data.datasets.subjects import warn_of_split
from hyspark.data.preprocessing.store_size import estimate_store_size
from hyspark.evaluation.linear_probe import find_probe_cases, make_probe
from hyspark.models.backbones import build_backbone, suggest_backbones
from hyspark.models.compile import compile_blocks
from hyspark.models.contrastive import Siamese, build_siamese
from hyspark.models.defaults import CONTRASTIVE_METHODS
from hyspark.models.masked_autoencoder import MaskedAutoencoder, build_hyspark
from hyspark.models.network_faults import UnsupportedNetworkError
from hyspark.models.nnunet_network import build_from_plan
from hyspark.models.nnunet_plans import to_volume_axes
from hyspark.models.spark import build_spark
from hyspark.models.weights.load import LoadReport
from hyspark.planning.plan import count_flops, crops_per_process, format_plan
from hyspark.planning.trial_steps import run_trials
from hyspark.tasks.contrastive_task import ContrastiveTask
from hyspark.tasks.launch import Experiment, launch
from hyspark.tasks.masked_task import MaskedTask
from hyspark.tasks.pretrain_common import format_num_parameters, write_pretraining_report
from hyspark.training import memory
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import initialise, load_volume_weights
from hyspark.training.prepared_data import list_prepared
from hyspark.training.run import Run, make_run
from hyspark.training.run_folder import encoder_file, steps_per_epoch
from hyspark.training.run_volumes import check_files_exist, describe_cases, prepare_run_volumes, store_folder
from hyspark.utils.log import LOG
from hyspark.utils.text import listing


def run_pretraining(config: PretrainConfig) -> Path:
    """Pre-train as the settings say, or continue; see `launch`."""
    return launch(config, PretrainingExperiment)


class PretrainingExperiment(Experiment[MaskedTask | ContrastiveTask]):
    """Pre-training by the method that the settings name."""

    def __init__(self, config: PretrainConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.shard = Shard(config.batch_size, processes.rank, processes.world_size)
        self.training, self.validation = find_pretraining_cases(config)
        self.probe_cases = (
            find_probe_cases(Path(config.probe_data), config.probe_cases, config.image_channels)
            if config.probe_data
            else None
        )
        self.data = describe_cases(self.training, self.validation)
        if config.dry_run:
            check_files_exist(config, [*self.training, *self.validation])
        self.plan = find_plan(config.model, config.run_folder, config.resume_from) if names_plan(config.model) else None
        if self.plan:
            by_nnunet = any(case.prepared for case in self.training)
            axes = [] if by_nnunet else warnings_of_axes([*self.training, *self.validation])
            for line in (*warnings_of_plan(self.plan, config, by_nnunet=by_nnunet), *axes):
                LOG.warning("%s", line)
        self.model = initialise_pretraining(config, processes.world_size)

    def describe(self) -> dict[str, str]:
        """Describe data, network, steps and probe."""
        c = self.config
        encoder: Any = self.model.encoder
        untrained = [] if c.method == "hyspark" else untrained_modules(encoder.backbone)
        plan = {"plan": describe_plan(self.plan, c)} if self.plan else {}
        return plan | {
            "data": f"{len(self.training)} training and {len(self.validation)} validation volumes from {c.data}"
            + (", prepared by nnU-Net" if any(case.prepared for case in self.training) else ""),
            "model": f"{c.model}, {format_num_parameters(self.model)} parameters, "
            f"crops of {' x '.join(map(str, c.crop_shape))}"
            + (
                f", mask units of {' x '.join(map(str, to_volume_axes(encoder.patch, c.axis_order)))}"
                if c.method == "spark"
                else ""
            )
            + (f"; not trained by this method, left unchanged: {', '.join(untrained)}" if untrained else ""),
            "steps": f"{c.epochs} epochs of {steps_per_epoch(c, len(self.training))}, "
            f"{c.batch_size * c.crops_per_volume} crops each",
            "probe": f"{c.probe_cases} labelled volumes of {c.probe_data}, epochs between probes: {c.probe_every}"
            if c.probe_data
            else "none",
        }

    def load_weights(self) -> LoadReport | None:
        """Load pre-trained weights; the momentum encoder starts as a copy."""
        if self.config.weights == "none":
            return None
        network = self.model.encoder if isinstance(self.model, Siamese) else self.model
        report = load_volume_weights(network, self.config.weights, self.config)
        if isinstance(self.model, Siamese):
            self.model.prepare_step(0.0)
        return report

    def estimate_cost(self, first_step: int) -> str:
        """Estimate time, memory and disk space by trial steps; nothing is written."""
        config, processes = self.config, self.processes
        free = memory.free_memory(processes)
        task = task_class(config)(config, self.shard, [], [])
        crops = crops_per_process(config, processes)
        least = 2 if config.method in CONTRASTIVE_METHODS else 1  # BatchNorm on vectors takes two
        make = partial(initialise_pretraining, config)
        trials = run_trials(config, processes, make, task, task.random_batch, crops, free, least)
        flops = count_flops(config, self.model, crops)
        store = store_folder(config, Path(config.data))
        storage = estimate_store_size(config, [*self.training, *self.validation], store)
        per_epoch = steps_per_epoch(config, len(self.training))
        left = min(config.epochs * per_epoch, config.max_steps or math.inf) - first_step
        steps = {"steps_per_epoch": per_epoch, "steps_left": max(0, int(left))}
        return format_plan(config, processes, self.model, flops, trials, free, storage, **steps)

    def set_up(self, state: dict[str, Any] | None) -> tuple[Run, MaskedTask | ContrastiveTask]:
        """Prepare the volumes, and make run and task."""
        config, processes = self.config, self.processes
        if self.plan and processes.is_main and not config.replay:
            keep_plan(self.plan, config.run_folder)
        volumes = prepare_run_volumes(config, processes, Path(config.data), self.training, self.validation)
        probe = make_probe(config, processes, self.probe_cases) if self.probe_cases else None
        best = state["best"] if state else math.inf
        task = task_class(config)(config, self.shard, volumes.training, volumes.validation, probe, best)
        steps = steps_per_epoch(config, len(volumes.training))
        run = make_run(config, self.data, processes, self.model, steps, state, excluded=volumes.excluded)
        return run, task

    def finish(self, run: Run, task: MaskedTask | ContrastiveTask, has_trained: bool) -> None:
        """Write the report after the last step."""
        if has_trained and self.processes.is_main:
            LOG.info("encoder  %s", encoder_file(self.config))
            LOG.info("report   %s", write_pretraining_report(task, run))
            LOG.info("pictures %s", self.config.run_folder / "pictures")


def warnings_of_axes(cases: Sequence[Case]) -> list[str]:
    """Return a line if nnU-Net would read volumes in other axes than this package."""
    permuted, num = find_permuted(cases)
    if not permuted:
        return []
    return [
        f"{len(permuted)} of {num} files store their axes in another order than x, y, z ({listing(permuted, 3)}); "
        "nnU-Net takes the axes of the file, and here volumes are turned to x, y, z; save these files in that order"
    ]


def task_class(config: PretrainConfig) -> type[MaskedTask] | type[ContrastiveTask]:
    """Return the task of the method that the settings name."""
    return ContrastiveTask if config.method in CONTRASTIVE_METHODS else MaskedTask


def find_pretraining_cases(config: PretrainConfig) -> tuple[list[Case], list[Case]]:
    """Read training and validation cases from the data list, or from a folder of data without one.

    A list without validation cases is split; the same fraction of volumes is held out in every run. With the network
    of an nnU-Net plan, the data may be a folder of volumes that nnU-Net has prepared by it.

    Raises:
        FileNotFoundError: There is no data list, and no image.
    """
    path = Path(config.data)
    if not path.exists():
        if path.suffix != ".json" or not path.parent.is_dir():
            raise FileNotFoundError(f"--data {config.data}: no such file or folder")
        words = ["hyspark", "datalist", "--data", str(path.parent), "--out", str(path)]
        raise FileNotFoundError(f"no data list at {path}; make it by: {shlex.join(words)}")
    if is_prepared(path):
        listed = list_prepared(config)
    else:
        listed = read_data(
            path,
            labels=False,
            val_fraction=config.val_fraction,
            subject_regex=config.subject_regex,
            fold=config.fold,
            channels=config.image_channels,
        )
    for line in listed.unused:
        LOG.warning("%s", line)
    if config.val_fraction:
        warn_of_split(listed.training, listed.validation, config.subject_regex)
    return list(listed.training), list(listed.validation)


def untrained_modules(network: Any) -> list[str]:
    """List the top-level modules of a network without a trained weight.

    These are its head and, in crops as small as its stride, its last stage, which then has no map.
    """
    trained: dict[str, bool] = {}
    for name, parameter in network.named_parameters():
        top = name.partition(".")[0]
        trained[top] = trained.get(top, False) or parameter.requires_grad
    return [top for top, is_trained in trained.items() if not is_trained]


def initialise_pretraining(config: PretrainConfig, num_processes: int = 1) -> MaskedAutoencoder | Siamese:
    """Build the network with random weights from the seed.

    Raises:
        ValueError: Settings of the network do not fit together.
    """
    network = initialise(partial(build_pretraining_network, config, num_processes), config.seed)
    if config.compile == "blocks" and not config.replay:
        compile_blocks(network)
    return network


def build_pretraining_network(config: PretrainConfig, num_processes: int) -> MaskedAutoencoder | Siamese:
    """Build the network that the settings name, with random weights from torch's global generator."""
    axes = len(config.crop_shape)
    if config.method == "hyspark":
        return build_hyspark(
            config.crop_shape,
            config.mask_ratio,
            config.compute,
            hide=config.hide,
            **encoder_options(config),
            decoder_width=config.decoder_width,
            axes=axes,
            in_channels=config.in_channels,
            reconstruct_fraction=config.reconstruct_fraction,
        )
    name = config.model.partition("/")[2]
    try:
        return build_around_backbone(config, name, num_processes)
    except UnsupportedNetworkError as error:
        raise UnsupportedNetworkError(f"{config.model}: {error}; {suggest_backbones(name)}") from error


def build_around_backbone(config: PretrainConfig, name: str, num_processes: int) -> MaskedAutoencoder | Siamese:
    """Build the pre-training network around a third-party one."""
    axes = len(config.crop_shape)
    if names_plan(config.model):
        backbone = build_from_plan(find_plan(config.model, config.run_folder, config.resume_from), config.in_channels)
    else:
        backbone = build_backbone(name, config.in_channels, axes)
    shared: dict[str, Any] = {"in_channels": config.in_channels, "axes": axes, "run": backbone.run}
    if config.method == "spark":
        shared |= {"decoder_width": config.decoder_width, "reconstruct_fraction": config.reconstruct_fraction}
        shared |= {"mask_unit": config.network_unit, "compute": config.compute}
        return build_spark(backbone.network, config.network_crop, config.mask_ratio, **shared)
    return build_siamese(
        config.method,
        backbone.network,
        config.network_crop,
        head_width=config.head_width,
        queue_size=config.queue_size,
        num_prototypes=config.prototypes,
        num_processes=num_processes,
        **shared,
    )
