"""Pre-training: finding the data, building the network, and the run from the settings to the report."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hyspark.config.pretrain import PretrainConfig
from hyspark.data.batches.loader import Shard
from hyspark.data.datasets import datalist_json
from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.splits import SPLIT_SEED, split_by_subject
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.preprocessing.store_size import estimate_store_size
from hyspark.data.seeds import seed_at
from hyspark.evaluation.linear_probe import find_probe_cases, make_probe
from hyspark.models.backbones import build_backbone
from hyspark.models.compile import compile_blocks
from hyspark.models.contrastive import CONTRASTIVE_METHODS, Siamese, build_siamese
from hyspark.models.masked_autoencoder import MaskedAutoencoder, build_hyspark
from hyspark.models.spark import build_spark
from hyspark.planning.plan import count_flops, crops_per_process, format_plan
from hyspark.planning.trial_steps import run_trials
from hyspark.tasks.contrastive import ViewPretraining
from hyspark.tasks.masked import Pretraining, encoder_file, num_parameters, training_file
from hyspark.training import distributed, memory
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import load_start
from hyspark.training.loop import start_run, train
from hyspark.training.precision import with_precision
from hyspark.training.replay import repeat, stopped_run
from hyspark.training.run_folder import begun, saved_state, settings_text
from hyspark.training.run_volumes import data_text, store_folder, usable
from hyspark.utils.log import LOG


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train as the settings say, or continue; returns the run folder.

    Raises ValueError or FileNotFoundError for settings and data that do not fit, OSError for a full disk,
    FloatingPointError where the loss is not finite, AskedToStop (a SystemExit) after SIGTERM or SIGUSR1.
    """
    processes = distributed.find_processes("cpu" if config.replay else config.device)
    stopped = None
    if config.replay:
        config, stopped = stopped_run(config, processes)
    config = with_precision(config, processes)
    share = Shard(config.batch_size, processes.rank, processes.world_size)
    cases = find_cases(config)
    probe_cases = find_probe_cases(Path(config.probe_data), config.probe_cases) if config.probe_data else None
    data = data_text(*cases)
    model = build(config, processes.world_size)
    LOG.info("%s", describe(config, processes, model, *cases))
    if config.dry_run:
        state = start(config, model)
        if processes.is_main:
            LOG.info("%s", plan(config, processes, model, *cases, first_step=state["step"] if state else 0))
        return config.run_folder
    with begun(config, processes, model, training_file(config)) as asked:
        state = stopped or start(config, model)
        found = usable(config, processes, Path(config.data), *cases, state)
        probe = make_probe(config, processes, probe_cases) if probe_cases else None
        best = state["best"] if state else math.inf
        task = task_of(config)(config, share, found.training, found.validation, probe, best)
        steps = steps_per_epoch(config, found.training)
        run = start_run(config, data, processes, model, steps, config.epochs, state, left_out=found.left_out)
        if stopped:
            LOG.info("%s", repeat(run, task, stopped["stopped_by"]))
            return config.run_folder
        if run.first_step >= run.last_step and run.is_reviewed:
            LOG.info("nothing to do: %s has done %d steps", config.run_folder, run.first_step)
            return config.run_folder
        train(run, task, asked, before=partial(task.probe_fresh, run))
    if processes.is_main:
        LOG.info("encoder  %s", encoder_file(config))
        LOG.info("report   %s", task.write_report(run))
        LOG.info("pictures %s", config.run_folder / "pictures")
    return config.run_folder


def start(config: PretrainConfig, model: MaskedAutoencoder | Siamese) -> dict[str, Any] | None:
    """The state that a run continues from; where there is none, the weights that the settings name are loaded."""
    state = saved_state(config, training_file(config), config.resume_from)
    if not state and config.weights != "none":
        part = model.encoder if isinstance(model, Siamese) else model
        LOG.info("weights of %s\n%s", config.weights, load_start(part, config.weights, config))
        if isinstance(model, Siamese):
            model.prepare_step(0.0)
    return state


def find_cases(config: PretrainConfig) -> tuple[list[Case], list[Case]]:
    """Training and validation cases; where the list names no validation part, the same share of the volumes is
    always held out.
    """
    path = Path(config.data)
    path = path if path.suffix == ".json" else path / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"no data list at {path}; make it by: python generate_js.py --data {path.parent}")
    listed = datalist_json.read_datalist(path, require_files=False)
    training, validation = list(listed.training), list(listed.validation)
    if not validation:
        training, validation = split_by_subject(training, val_fraction=config.val_fraction, seed=SPLIT_SEED)
    return training, validation


def steps_per_epoch(config: PretrainConfig, training: Sequence[Case | StoredVolume]) -> int:
    """Steps in which every volume comes at least once."""
    return math.ceil(len(training) / config.batch_size)


def describe(
    config: PretrainConfig,
    processes: Processes,
    model: MaskedAutoencoder | Siamese,
    training: Sequence[Case],
    validation: Sequence[Case],
) -> str:
    """The run in a few lines, for the terminal."""
    steps = steps_per_epoch(config, training)
    encoder: Any = model.encoder
    fixed = [] if config.method == "hyspark" else untrained(encoder.backbone)
    probe = f"{config.probe_cases} labelled volumes of {config.probe_data}, epochs between probes: {config.probe_every}"
    return settings_text(
        config,
        processes,
        data=f"{len(training)} training and {len(validation)} validation volumes from {config.data}",
        model=f"{config.model}, {num_parameters(model)} parameters, crops of {' x '.join(map(str, config.crop_shape))}"
        + (f"; without part in what is learned, left as they are: {', '.join(fixed)}" if fixed else ""),
        steps=f"{config.epochs} epochs of {steps}, {config.batch_size * config.crops_per_volume} crops each",
        probe=probe if config.probe_data else "none",
    )


def untrained(network: Any) -> list[str]:
    """The first parts of a network's names of which no weight is trained: its head; in crops as small as its stride,
    also its last stage, which then has no map.
    """
    trained: dict[str, bool] = {}
    for name, parameter in network.named_parameters():
        top = name.partition(".")[0]
        trained[top] = trained.get(top, False) or parameter.requires_grad
    return [top for top, is_trained in trained.items() if not is_trained]


def plan(
    config: PretrainConfig,
    processes: Processes,
    model: MaskedAutoencoder | Siamese,
    training: Sequence[Case],
    validation: Sequence[Case],
    first_step: int,
) -> str:
    """What the run will cost, for the terminal; takes trial steps, writes nothing."""
    free = memory.free_memory(processes)
    task = task_of(config)(config, Shard(config.batch_size, processes.rank, processes.world_size), [], [])
    crops = crops_per_process(config, processes)
    make, least = (
        partial(build, config),
        2 if config.method in CONTRASTIVE_METHODS else 1,
    )  # BatchNorm on vectors takes two
    trials = run_trials(config, processes, make, task, task.random_batch, crops, free, least)
    flops = count_flops(config, model, crops)
    storage = estimate_store_size(config, [*training, *validation], store_folder(config, Path(config.data)))
    per_epoch = steps_per_epoch(config, training)
    left = min(config.epochs * per_epoch, config.max_steps or math.inf) - first_step
    steps = {"steps_per_epoch": per_epoch, "steps_left": max(0, int(left))}
    return format_plan(config, processes, model, flops, trials, free, storage, **steps)


def task_of(config: PretrainConfig) -> type[Pretraining]:
    """What the loop does for the method that the settings name."""
    return ViewPretraining if config.method in CONTRASTIVE_METHODS else Pretraining


def build(config: PretrainConfig, num_processes: int = 1) -> MaskedAutoencoder | Siamese:
    """The network with its seeded fresh weights; raises ValueError where its settings do not fit together."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(config.seed, "weights"))
        network = network_of(config, num_processes)
    if config.compile == "blocks" and not config.replay:
        compile_blocks(network)
    return network


def network_of(config: PretrainConfig, num_processes: int) -> MaskedAutoencoder | Siamese:
    """The network that the settings say, with fresh weights from torch's generator."""
    axes = len(config.crop_shape)
    if config.method == "hyspark":
        return build_hyspark(
            config.crop_shape,
            config.mask_ratio,
            config.compute,
            hide=config.hide,
            widths=config.encoder_widths,
            depths=config.encoder_depths,
            expansions=config.expansions,
            vit_depth=config.vit_depth,
            num_heads=config.num_heads,
            decoder_width=config.decoder_width,
            axes=axes,
        )
    backbone = build_backbone(config.model.partition("/")[2], config.in_channels, axes)
    shared: dict[str, Any] = {"in_channels": config.in_channels, "axes": axes, "run": backbone.run}
    if config.method == "spark":
        shared |= {"decoder_width": config.decoder_width}
        return build_spark(backbone.network, config.crop_shape, config.mask_ratio, **shared)
    return build_siamese(
        config.method,
        backbone.network,
        config.crop_shape,
        head_width=config.head_width,
        queue_size=config.queue_size,
        num_prototypes=config.prototypes,
        num_processes=num_processes,
        **shared,
    )
