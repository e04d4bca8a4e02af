"""Repeating one step on the CPU in fp32: what was not finite in it, and whether the precision was to blame.

A run with a loss or gradient that is not finite saves the state before that step. The step's batch is a function of
seed and step, so that nothing else is needed to repeat it.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyspark.config.nnunet import names_plan
from hyspark.config.recipes import ConfigT, typed_values
from hyspark.data.batches.loader import Batch
from hyspark.training import checkpoint
from hyspark.training.distributed import Processes
from hyspark.training.loop import Task, clip_gradient, compute_gradient
from hyspark.training.run import Run


def read_replay(config: ConfigT, processes: Processes) -> tuple[ConfigT, dict[str, Any]]:
    """Read the file config.replay.

    Returns:
        Settings of the run that wrote it, changed to the CPU and fp32; and the state before the step.

    Raises:
        ValueError: It is another file, or there are several processes. Or it builds its network by a function that the
            user did not name too: a file may not choose what is run. And as `read_checkpoint`.
    """
    path = Path(config.replay)
    state = checkpoint.read_checkpoint(path)
    if "stopped_by" not in state:
        raise ValueError(f"--replay: expected a file nonfinite_step_N.pth of a run that stopped, got {path}")
    if processes.world_size > 1:
        raise ValueError("--replay: one process repeats the step of all; start it without torchrun")
    settings = type(config)(**typed_values(state["config"], type(config), str(path)))
    factory = getattr(settings, "model", "")
    if ":" in factory and not names_plan(factory) and factory != getattr(config, "model", ""):
        raise ValueError(f"{path} builds its network by {factory!r}; if you trust it, name it: --model {factory}")
    return replace(settings, device="cpu", precision="fp32", dataloader_workers=0, replay=config.replay), state


def repeat_step(run: Run, task: Task, stopped_by: str) -> str:
    """Repeat the run's first step without changing its weights, and describe the result in a few lines.

    Args:
        run: Run at the step.
        task: Its task.
        stopped_by: Message that stopped the run.
    """
    step = run.first_step
    broken = [name for name, value in run.network.state_dict().items() if not bool(torch.isfinite(value).all())]
    batch = task.batches[step]
    first: list[str] = []
    handles = [m.register_forward_hook(nonfinite_hook(name, first)) for name, m in run.network.named_modules() if name]
    try:
        run.model.train()
        task.before_step(run, step)
        loss = float(compute_gradient(run, task, batch))
        norm = clip_gradient(run)
    finally:
        for handle in handles:
            handle.remove()
    return "\n".join(
        [
            f"step {step} stopped the run: {stopped_by}",
            *(f"  {line}" for line in describe_batch(batch)),
            f"in fp32 on the CPU: loss {loss:.6g}, gradient norm {norm:.6g}",
            f"  {diagnose(loss, norm, first, broken)}",
        ]
    )


def nonfinite_hook(name: str, first: list[str]) -> Any:
    """Make a forward hook that appends its module to an empty list if the output is not finite."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not bool(output.detach().isfinite().all()):
            first.append(f"{name} ({type(module).__name__})")

    return hook


def describe_batch(batch: Batch) -> list[str]:
    """List the cases of a batch with the range of values of each crop, or of all its views."""
    images = batch["views"] if "views" in batch else [batch[key] for key in ("volumes", "image") if key in batch]
    return [
        f"{case}: values {min(float(x.min()) for x in own):.4g} to {max(float(x.max()) for x in own):.4g}"
        for case, *own in zip(batch["cases"], *images, strict=True)
    ]


def diagnose(loss: float, norm: float, first: list[str], broken: list[str]) -> str:
    """Say what the repeated step shows, and what to do.

    Args:
        loss: Loss of the step in fp32.
        norm: Norm of its gradient.
        first: The first module whose output is not finite, if any.
        broken: Weights and buffers that are not finite before the step.
    """
    if broken:
        return f"the state itself is not finite: {', '.join(broken[:5])}; go back to an older checkpoint"
    if math.isfinite(loss) and math.isfinite(norm):
        return "both are finite, so the precision was to blame: use bf16 or fp32"
    if first:
        return f"not finite in fp32 either, first in the output of {first[0]}: lower the learning rate, or clip"
    what = "the gradient" if math.isfinite(loss) else "the loss"
    return f"all outputs are finite, but {what} is not: lower the learning rate, or clip"
