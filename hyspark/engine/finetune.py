"""Fine-tuning for segmentation: the wiring, then the loop.

Source of the recipe: UNETR's BTCV example (Project-MONAI/research-contributions), the usual stand-in for the paper's.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from torch import nn
from tqdm import tqdm

from hyspark import report
from hyspark.config import FinetuneConfig, as_plain
from hyspark.data import datalist
from hyspark.data.crops import seed_at
from hyspark.data.loading import Batch, FinetuneBatches, Share, make_loader
from hyspark.data.store import StoredVolume
from hyspark.engine import checkpoint, distributed, optim
from hyspark.engine.distributed import LOG, Processes
from hyspark.engine.evaluate import dice, load_label, mean_dice, segment, to_grid
from hyspark.engine.run import RunLog, check_settings, prepared
from hyspark.models.segmentation import Hybird, build_hybird
from hyspark.models.weights import load_pretrained

BTCV_CLASSES = 14


@dataclass
class Task:
    """Labelled cases and their classes. names: class names by value, background first."""

    training: list[datalist.Case]
    validation: list[datalist.Case]
    names: list[str]


@dataclass
class Training:
    """What the loop works with. `model` is the network as trained (wrapped where there are several processes)."""

    config: FinetuneConfig
    processes: Processes
    task: Task
    training: list[StoredVolume]
    validation: list[StoredVolume]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: nn.Module
    steps_per_epoch: int
    first_step: int
    best: float

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.max_epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Where this call stops."""
        return min(self.total_steps, self.config.max_steps or self.total_steps)


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune as the settings say, or continue; returns the run folder.

    Raises ValueError or FileNotFoundError for settings, weights and data that do not fit, FloatingPointError where
    the loss is not finite.
    """
    processes = distributed.find_processes(config.device)
    check_settings(config)
    share = Share(config.batch_size, processes.rank, processes.world_size)
    task = find_task(config)
    LOG.info("%s", describe(config, processes, task))
    if config.dry_run:
        return config.run_folder
    volumes = prepared(config, processes, Path(config.data_dir), (task.training, task.validation))
    distributed.connect(processes)
    try:
        run = wire(config, processes, task, *volumes)
        if run.first_step >= run.last_step:
            LOG.info("nothing to do: %s has all %d steps", config.run_folder, run.last_step)
            return config.run_folder
        train(run, share)
    finally:
        distributed.disconnect(processes)
    return config.run_folder


def find_task(config: FinetuneConfig) -> Task:
    """Labelled cases from a decathlon JSON or an nnU-Net data set, with a validation part, and the class names.

    Raises ValueError where there is nothing to train or to validate on.
    """
    listed = find_cases(config)
    training, validation = list(listed.training), list(listed.validation)
    if not validation:
        training, validation = datalist.split_by_subject(training, val_fraction=config.val_fraction, seed=config.seed)
    if not training or not validation:
        raise ValueError(
            f"{config.data_dir}: {len(training)} labelled cases to train on and {len(validation)} to validate on; "
            "at least one of each is needed"
        )
    return Task(training, validation, class_names(config, listed.labels))


def find_cases(config: FinetuneConfig) -> datalist.Datalist:
    """The JSON that the settings name; else data_dir/dataset.json where it is a data list; else the nnU-Net folders."""
    folder = Path(config.data_dir)
    if config.json_list:
        inside = folder / config.json_list
        return datalist.read(inside if inside.is_file() else Path(config.json_list), require_labels=True)
    default = folder / "dataset.json"
    if default.is_file() and datalist.is_datalist(default):
        return datalist.read(default, require_labels=True)
    return datalist.read_folder(folder, seed=config.seed, val_fraction=config.val_fraction)


def class_names(config: FinetuneConfig, labels: dict[str, int] | None) -> list[str]:
    """Names by label value; raises ValueError where out_channels and the data's labels disagree."""
    if not labels:
        num = config.out_channels or BTCV_CLASSES
        return ["background", *(f"class_{v}" for v in range(1, num))]
    num = max(labels.values()) + 1
    if config.out_channels and config.out_channels != num:
        raise ValueError(
            f"out_channels is {config.out_channels}, but the data set's labels go from 0 to {num - 1}: {labels}; "
            "leave out_channels away to take the number from the data"
        )
    by_value = {v: k for k, v in labels.items()}
    return [by_value.get(v, f"class_{v}") for v in range(num)]


def describe(config: FinetuneConfig, processes: Processes, task: Task) -> str:
    """The run in a few lines, for the terminal."""
    settings = "\n".join(f"  {k}: {v}" for k, v in as_plain(config).items())
    num_parameters = sum(p.numel() for p in build(config, len(task.names)).parameters())
    steps = math.ceil(len(task.training) / config.batch_size)
    return (
        f"{settings}\n"
        f"data     {len(task.training)} training and {len(task.validation)} validation cases from {config.data_dir}\n"
        f"classes  {', '.join(task.names)}\n"
        f"model    hybird, {num_parameters / 1e6:.1f} M parameters, crops of {' x '.join(map(str, config.crop_size))}\n"
        f"steps    {config.max_epochs} epochs of {steps}, {config.batch_size * config.crops_per_volume} crops each\n"
        f"device   {processes.device}, {processes.world_size} process(es), {config.precision}\n"
        f"run      {config.run_folder}"
    )


def build(config: FinetuneConfig, num_classes: int) -> Hybird:
    """The network with its seeded fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(config.seed, "weights"))
        return build_hybird(
            config.in_channels,
            num_classes,
            config.crop_size,
            widths=config.encoder_widths,
            depths=config.encoder_depths,
            expansions=config.expansions,
            vit_depth=config.vit_depth,
            num_heads=config.num_heads,
        )


def wire(
    config: FinetuneConfig,
    processes: Processes,
    task: Task,
    training: list[StoredVolume],
    validation: list[StoredVolume],
) -> Training:
    """Model, loss, optimizer and the state they continue from."""
    model = build(config, len(task.names))
    last = config.run_folder / "last.pth"
    state = checkpoint.read_training_state(last) if last.is_file() else None
    if state:
        model.load_state_dict(state["model"])
    elif config.pretrained != "none":
        LOG.info("weights of %s\n%s", config.pretrained, load_pretrained(model, config.pretrained))
    wrapped = distributed.share_gradients(model, processes)
    optimizer = torch.optim.AdamW(optim.parameter_groups(wrapped), lr=config.optim_lr)
    scaler = distributed.loss_scaler(processes, config.precision)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        LOG.info("continuing %s at step %d", last, state["step"])
    loss = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)
    return Training(
        config,
        processes,
        task,
        training,
        validation,
        wrapped,
        optimizer,
        scaler,
        loss,
        steps_per_epoch=math.ceil(len(training) / config.batch_size),
        first_step=state["step"] if state else 0,
        best=state["best"] if state else -1.0,
    )


def train(run: Training, share: Share) -> None:
    """The loop: batch, forward, backward, update, log; validate and save when due."""
    config, processes = run.config, run.processes
    log = RunLog(config, run.first_step) if processes.is_main else None
    dataset = FinetuneBatches(
        run.training,
        share,
        config.crop_size,
        config.crops_per_volume,
        config.flip_prob,
        config.rot90_prob,
        config.intensity_prob,
        config.seed,
    )
    steps = range(run.first_step, run.last_step)
    batches = iter(make_loader(dataset, steps, config.dataloader_workers, processes.device.type != "cpu"))
    bar = tqdm(
        total=run.last_step,
        initial=run.first_step,
        desc="finetune",
        unit="step",
        disable=not processes.is_main,
        dynamic_ncols=True,
    )
    clock = time.perf_counter()
    run.model.train()
    for step in steps:
        batch = next(batches)
        waited = time.perf_counter() - clock
        epoch = step // run.steps_per_epoch
        lr = learning_rate(run, step)
        optim.set_rates(run.optimizer, lr, config.reg_weight)
        loss, grad_norm = update(run, batch, step)
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        speed = len(batch["cases"]) * processes.world_size / seconds
        if log:
            numbers = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
            log.write(
                step,
                epoch,
                **numbers,
                samples_per_second=round(speed, 3),
                data_wait=round(waited / seconds, 4),
            )
            bar.set_postfix(loss=f"{loss:.4f}", crops_per_s=f"{speed:.1f}", epoch=epoch)
            bar.update()
        done = step + 1
        epochs, rest = divmod(done, run.steps_per_epoch)
        due = (rest == 0 and epochs % config.val_every == 0) or done == run.last_step
        if due:
            validate_and_keep(run, log, step, epoch)
        if due or (config.save_every and done % config.save_every == 0):
            save(run, config.run_folder / "last.pth", done)
        if due:
            clock = time.perf_counter()
    bar.close()
    if log:
        log.close()
        LOG.info("%s", report.dice_table(scores(config.run_folder)))
        LOG.info("report   %s", write_report(run))


def learning_rate(run: Training, step: int) -> float:
    """Linear warm-up, then a cosine or constant."""
    config = run.config
    warmup = min(config.warmup_epochs * run.steps_per_epoch, run.total_steps - 1)
    if config.lrschedule == "constant" and step >= warmup:
        return config.optim_lr
    return optim.learning_rate(step, peak=config.optim_lr, warmup=warmup, total=run.total_steps)


def update(run: Training, batch: Batch, step: int) -> tuple[float, float]:
    """One step of the optimizer; returns the loss over the global batch and the gradient's norm before clipping.

    Raises FloatingPointError, before the weights are touched, where one of the two is not finite.
    """
    device = run.processes.device
    images, labels = (batch[k].to(device, non_blocking=True) for k in ("image", "label"))
    with distributed.autocast(run.processes, run.config.precision):
        scores = run.model(images)
    loss = run.loss(scores.float(), labels)
    mean_loss = distributed.mean_over(loss, run.processes)
    if not math.isfinite(mean_loss):
        raise FloatingPointError(
            f"the loss is {mean_loss} at step {step} (cases {', '.join(sorted(set(batch['cases'])))})"
        )
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip or math.inf))
    if not math.isfinite(norm) and not run.scaler.is_enabled():
        raise FloatingPointError(
            f"the gradient's norm is {norm} at step {step} (cases {', '.join(sorted(set(batch['cases'])))})"
        )
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return mean_loss, norm


def validate(run: Training) -> dict[str, list[float]]:
    """Dice per class of each validation case, on the label's own grid."""
    config, processes = run.config, run.processes
    mine = range(processes.rank, len(run.validation), processes.world_size)
    rows: list[tuple[str, list[float]]] = []
    run.model.eval()
    for i in tqdm(mine, desc="validate", unit="case", leave=False, disable=not processes.is_main):
        volume, label = run.validation[i], run.task.validation[i].label
        assert label is not None
        network = distributed.bare(run.model)
        with distributed.autocast(processes, config.precision):
            prediction = segment(
                network,
                volume,
                processes.device,
                config.crop_size,
                config.infer_overlap,
                config.sw_batch_size,
            )
        truth = load_label(label)
        own_grid = to_grid(prediction, volume.entry.affine, truth)
        rows.append((volume.name, dice(own_grid, truth[0].numpy(), len(run.task.names))))
    run.model.train()
    return dict(sorted(distributed.gather(rows, processes)))


def validate_and_keep(run: Training, log: RunLog | None, step: int, epoch: int) -> None:
    """Validate; keep the weights where they are the best so far; write the scores."""
    config = run.config
    cases = validate(run)
    organs = mean_dice(list(cases.values()), run.task.names[1:])
    held = [v for v in organs.values() if not math.isnan(v)]
    mean = sum(held) / len(held) if held else 0.0
    is_best = mean > run.best
    run.best = max(run.best, mean)
    if log is None:
        return
    log.write(step, epoch, dice_mean=mean, dice={k: v for k, v in organs.items() if not math.isnan(v)})
    LOG.info("epoch %d: mean Dice %.4f on %d cases%s", epoch, mean, len(cases), " (best)" if is_best else "")
    entry = {"step": step, "mean": mean, "organs": organs, "cases": cases}
    if is_best:
        weights = {
            "model": distributed.bare(run.model).state_dict(),
            "config": as_plain(config),
            "classes": run.task.names,
        }
        checkpoint.save(weights, config.run_folder / "best.pth")
        write_scores(config.run_folder, best=entry)
    write_scores(config.run_folder, last=entry)
    draw_picture(run, epoch)
    write_report(run)


def write_scores(folder: Path, **entries: object) -> None:
    """Update dice.json, which holds the scores of the best and of the last weights."""
    path = folder / "dice.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | entries, indent=1) + "\n")


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """Dice per organ of the best and of the last weights of a run.

    Raises FileNotFoundError where the folder holds no scores yet.
    """
    path = folder / "dice.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no scores (dice.json); is it a fine-tuning run that was validated?")
    loaded = json.loads(path.read_text())
    return {name: loaded[name]["organs"] for name in ("best", "last")}


def compare(folders: Sequence[Path]) -> str:
    """The Dice of several runs side by side, each run's best weights; columns are named after the folders."""
    return report.dice_table({folder.name: scores(folder)["best"] for folder in folders})


def draw_picture(run: Training, epoch: int) -> None:
    """The first validation case: image, truth, prediction, on the prepared grid."""
    config, volume = run.config, run.validation[0]
    run.model.eval()
    with distributed.autocast(run.processes, config.precision):
        prediction = segment(
            distributed.bare(run.model),
            volume,
            run.processes.device,
            config.crop_size,
            config.infer_overlap,
            config.sw_batch_size,
        )
    run.model.train()
    box = ((0, 0, 0), volume.entry.shape)
    figure = report.segmentation_panel(
        volume.read("image", *box),
        volume.read("label", *box),
        prediction,
        run.task.names,
        title=f"{volume.name}, epoch {epoch}",
        spacing=config.spacing,
    )
    report.save_figure(figure, config.run_folder / "pictures" / f"epoch_{epoch:04d}_{volume.name}.png")


def save(run: Training, path: Path, done: int) -> None:
    """The resumable state, by the main process; the others wait."""
    if run.processes.is_main:
        parts = {"model": distributed.bare(run.model), "optimizer": run.optimizer, "scaler": run.scaler}
        state = checkpoint.training_state(done, as_plain(run.config), **parts)
        checkpoint.save(state | {"best": run.best}, path)
    distributed.barrier(run.processes)


def write_report(run: Training) -> Path:
    """The run's HTML page."""
    config = run.config
    summary = {
        "start": "from scratch" if config.pretrained == "none" else f"weights of {config.pretrained}",
        "training cases": str(len(run.training)),
        "validation cases": str(len(run.validation)),
        "scored on": "the label's own grid, mean over cases that hold the organ, background excluded",
        "device": f"{run.processes.device}, {run.processes.world_size} process(es), {config.precision}",
    }
    return report.write_report(
        config.run_folder,
        title=f"HySparK fine-tuning: {config.run_folder.name}",
        config=as_plain(config),
        environment=report.environment(),
        summary=summary,
        dice=scores(config.run_folder),
    )
