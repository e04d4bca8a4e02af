"""One step again, on the CPU in fp32: what was not finite in it, and whether the number format was to blame.

A run that meets a loss or gradient that is not finite leaves the state before that step. The step's batch is a function
of seed and step, so that nothing else is needed to repeat it.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyspark.config.recipes import ConfigT, typed_values
from hyspark.data.batches.loader import Batch
from hyspark.training import checkpoint
from hyspark.training.distributed import Processes
from hyspark.training.loop import Run, Task, gradient, gradient_norm


def stopped_run(config: ConfigT, processes: Processes) -> tuple[ConfigT, dict[str, Any]]:
    """The settings of the run that left the file config.replay, for the CPU and fp32, and the state before its step.

    Raises ValueError for a file of another kind, for several processes, and where it names a function to build its
    network by that the user did not name too: a file may not choose what is run. And what `read_training_state` raises.
    """
    path = Path(config.replay)
    state = checkpoint.read_training_state(path)
    if "stopped_by" not in state:
        raise ValueError(f"{path} is no step that a run stopped at; such files are called nonfinite_step_N.pth")
    if processes.world_size > 1:
        raise ValueError("--replay repeats the step of all processes in one; start it without torchrun")
    settings = type(config)(**typed_values(state["config"], type(config), str(path)))
    factory = getattr(settings, "model", "")
    if ":" in factory and factory != getattr(config, "model", ""):
        raise ValueError(f"{path} builds its network by {factory!r}; if you trust that, say so: --model {factory}")
    return replace(settings, device="cpu", precision="fp32", dataloader_workers=0, replay=config.replay), state


def repeat(run: Run, task: Task, stopped_by: str) -> str:
    """Do the run's first step, without changing its weights; what was found, in a few lines."""
    step = run.first_step
    broken = [name for name, value in run.network.state_dict().items() if not bool(torch.isfinite(value).all())]
    batch = task.batches[step]
    first: list[str] = []
    handles = [m.register_forward_hook(watch(name, first)) for name, m in run.network.named_modules() if name]
    try:
        run.model.train()
        task.begin(run, step)
        loss = float(gradient(run, task, batch))
        norm = gradient_norm(run)
    finally:
        for handle in handles:
            handle.remove()
    return "\n".join(
        [
            f"step {step} stopped the run: {stopped_by}",
            *(f"  {line}" for line in batch_lines(batch)),
            f"in fp32 on the CPU: loss {loss:.6g}, gradient norm {norm:.6g}",
            f"  {conclusion(loss, norm, first, broken)}",
        ]
    )


def watch(name: str, first: list[str]) -> Any:
    """A hook that notes the first module whose output is not finite."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not bool(output.detach().isfinite().all()):
            first.append(f"{name} ({type(module).__name__})")

    return hook


def batch_lines(batch: Batch) -> list[str]:
    """The cases of a batch with the range of their crops, or of all views of these."""
    images = batch["views"] if "views" in batch else [batch[key] for key in ("volumes", "image") if key in batch]
    return [
        f"{case}: values {min(float(x.min()) for x in own):.4g} to {max(float(x.max()) for x in own):.4g}"
        for case, *own in zip(batch["cases"], *images, strict=True)
    ]


def conclusion(loss: float, norm: float, first: list[str], broken: list[str]) -> str:
    """What follows from the repeated step."""
    if broken:
        return f"the state itself is not finite: {', '.join(broken[:5])}; go back to an older one"
    if math.isfinite(loss) and math.isfinite(norm):
        return "both are finite, so the number format was to blame: use bf16 or fp32"
    if first:
        return f"not finite in fp32 either, first in the output of {first[0]}: lower the learning rate, or clip"
    what = "the gradient" if math.isfinite(loss) else "the loss"
    return f"all outputs are finite, but {what} is not: lower the learning rate, or clip"
