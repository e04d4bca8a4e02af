"""Parameter groups; learning rate and weight decay as pure functions of the step."""

import math

import torch
from torch import nn


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, start_factor: float = 0.0, end_factor: float = 0.0
) -> float:
    """Linear warm-up from start_factor * peak over `warmup` steps, then a cosine to end_factor * peak at the last of
    `total` steps.
    """
    if step < warmup:
        return peak * (start_factor + (1 - start_factor) * step / warmup)
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (end_factor + (1 - end_factor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def weight_decay(step: int, *, start: float, end: float, total: int) -> float:
    """Half a cosine from start to end over `total` steps."""
    progress = min(1.0, step / max(1, total - 1))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Two groups: with weight decay, and without it (norms, biases, tokens)."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        spare = parameter.ndim <= 1 or name.endswith("mask_token")
        (spared if spare else decayed).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": spared, "decays": False}]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, wd: float) -> None:
    """Put this step's learning rate and weight decay in place."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = wd if group["decays"] else 0.0
