"""Parameter groups; learning rate and weight decay as pure functions of the step."""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from hyspark.config.classification import ClassificationConfig
from hyspark.config.segmentation import SegmentationConfig
from hyspark.models.encoder import NUM_STAGES

LR_RATIO = "share"
"""Key of a parameter group's ratio of learning rates. Saved optimizer states have it, so its name stays."""


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, start_factor: float = 0.0, end_factor: float = 0.0
) -> float:
    """Compute the learning rate of a step: linear warm-up, then a cosine.

    Args:
        step: Step, counted from 0.
        peak: Learning rate after the warm-up.
        warmup: Steps of the warm-up.
        total: Steps of the schedule.
        start_factor: Learning rate at the first step, as a fraction of the peak.
        end_factor: Learning rate at the last step, as a fraction of the peak.
    """
    if step < warmup:
        return peak * (start_factor + (1 - start_factor) * step / warmup)
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (end_factor + (1 - end_factor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def weight_decay(step: int, *, start: float, end: float, total: int) -> float:
    """Compute the weight decay of a step: half a cosine from `start` to `end` over `total` steps."""
    progress = min(1.0, step / max(1, total - 1))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def finetuning_schedule(
    config: SegmentationConfig | ClassificationConfig, step: int, steps_per_epoch: int, total: int
) -> dict[str, float]:
    """Compute learning rate `lr` and weight decay `wd` of a step of fine-tuning.

    The learning rate is warmed up linearly. Then it is constant, or follows a cosine to 0.
    """
    warmup = min(config.warmup_epochs * steps_per_epoch, total - 1)
    lr = learning_rate(step, peak=config.lr, warmup=warmup, total=total)
    is_constant = config.lrschedule == "constant" and step >= warmup
    return {"lr": config.lr if is_constant else lr, "wd": config.weight_decay}


def finetuning_encoder_lr_ratio(config: SegmentationConfig | ClassificationConfig) -> float:
    """Return the learning rate of the encoder divided by that of the rest; it depends on the initial weights."""
    return config.encoder_lr_ratio * (1.0 if config.weights == "none" else config.pretrained_lr_ratio)


def make_adamw(model: nn.Module, layer_decay: float = 1.0, encoder_lr_ratio: float = 1.0) -> torch.optim.Optimizer:
    """Make AdamW with `parameter_groups`, whose rates are set at every step. Fused: one pass over the weights."""
    return torch.optim.AdamW(parameter_groups(model, layer_decay, encoder_lr_ratio), fused=True)


def parameter_groups(
    model: nn.Module,
    layer_decay: float = 1.0,
    encoder_lr_ratio: float = 1.0,
    layers: Mapping[str, int | None] | None = None,
) -> list[dict[str, object]]:
    """Group parameters by weight decay and learning rate. Norms, biases and tokens have no weight decay.

    Args:
        model: Network.
        layer_decay: Learning rate of an encoder layer divided by that of the layer above (layer-wise decay; Clark et
            al., "ELECTRA", ICLR 2020).
        encoder_lr_ratio: Learning rate of the encoder divided by that of the rest.
        layers: Index of each parameter's layer in the encoder by name, None outside of it; by default that of this
            package's own networks.

    Returns:
        Groups with `params`, `decays` (whether weight decay applies) and the key LR_RATIO.
    """
    named = list(model.named_parameters())
    if layers is None:
        layers = {name: encoder_layer(name) for name, _ in named}
        encoder = {name for name, _ in named if re.search(r"\b(embeddings|mae|backbone)\.", name)}
    else:
        encoder = {name for name, layer in layers.items() if layer is not None}
    num_layers = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        layer = layers[name]
        ratio = encoder_lr_ratio if name in encoder else 1.0
        if layer is not None:
            ratio *= layer_decay ** (num_layers - layer)
        decays = parameter.ndim > 1 and not name.endswith("mask_token")
        groups.setdefault((decays, ratio), []).append(parameter)
    return [{"params": parameters, "decays": decays, LR_RATIO: ratio} for (decays, ratio), parameters in groups.items()]


def encoder_layer(name: str) -> int | None:
    """Return the index of a parameter's layer in the encoder, counted from the input.

    Layers are the five stages, each with its widening convolution, then the transformer's blocks. The encoder's last
    norm and all outside of the encoder have None.
    """
    if found := re.search(r"\bembeddings\.(?:stem|(?:layer|expend)(\d))\.", name):
        return int(found[1] or 1) - 1
    if found := re.search(r"\bmae\.blocks\.(\d+)\.", name):
        return NUM_STAGES + int(found[1])
    return None


def set_lr_and_decay(optimizer: torch.optim.Optimizer, lr: float, wd: float) -> None:
    """Set learning rate and weight decay of a step in all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_RATIO]
        group["weight_decay"] = wd if group["decays"] else 0.0
