"""Parameter groups; learning rate and weight decay as pure functions of the step."""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from hyspark.config.classification import ClassificationConfig
from hyspark.config.segmentation import SegmentationConfig
from hyspark.models.encoder import NUM_STAGES


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


def finetuning_rates(
    config: SegmentationConfig | ClassificationConfig, step: int, steps_per_epoch: int, total: int
) -> dict[str, float]:
    """Learning rate `lr` and weight decay `wd` of a step: a linear warm-up, then a cosine to 0 or a constant rate."""
    warmup = min(config.warmup_epochs * steps_per_epoch, total - 1)
    lr = learning_rate(step, peak=config.lr, warmup=warmup, total=total)
    is_constant = config.lrschedule == "constant" and step >= warmup
    return {"lr": config.lr if is_constant else lr, "wd": config.weight_decay}


def encoder_share(config: SegmentationConfig | ClassificationConfig) -> float:
    """Learning rate of the encoder as a share of that of the rest, which depends on what it starts from."""
    return config.encoder_lr_ratio * (1.0 if config.weights == "none" else config.pretrained_lr_ratio)


def adamw(model: nn.Module, layer_decay: float = 1.0, encoder_share: float = 1.0) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; its rates are set at every step. Fused: one pass over the weights."""
    return torch.optim.AdamW(parameter_groups(model, layer_decay, encoder_share), fused=True)


def parameter_groups(
    model: nn.Module,
    layer_decay: float = 1.0,
    encoder_share: float = 1.0,
    layers: Mapping[str, int | None] | None = None,
) -> list[dict[str, object]]:
    """Groups of parameters with one weight decay and one learning rate: norms, biases and tokens are spared the decay.

    encoder_share: learning rate of the encoder as a share of that of the rest. layer_decay: below 1, each layer of the
    encoder learns that much more slowly than the one above it (layer-wise decay, as usual in fine-tuning; Clark et al.,
    "ELECTRA", ICLR 2020). layers: place of each parameter in the encoder, None where it is not of it; by default as in
    this package's own networks.
    """
    named = list(model.named_parameters())
    if layers is None:
        layers = {name: encoder_layer(name) for name, _ in named}
        encoder = {name for name, _ in named if re.search(r"\b(embeddings|mae|backbone)\.", name)}
    else:
        encoder = {name for name, layer in layers.items() if layer is not None}
    num = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        layer = layers[name]
        share = encoder_share if name in encoder else 1.0
        if layer is not None:
            share *= layer_decay ** (num - layer)
        decays = parameter.ndim > 1 and not name.endswith("mask_token")
        groups.setdefault((decays, share), []).append(parameter)
    return [{"params": parameters, "decays": decays, "share": share} for (decays, share), parameters in groups.items()]


def encoder_layer(name: str) -> int | None:
    """Place of a parameter in the encoder, counted from the input: the five stages, each with its widening
    convolution, then the transformer's blocks. None for what is not of the encoder, and for its last norm.
    """
    if found := re.search(r"\bembeddings\.(?:stem|(?:layer|expend)(\d))\.", name):
        return int(found[1] or 1) - 1
    if found := re.search(r"\bmae\.blocks\.(\d+)\.", name):
        return NUM_STAGES + int(found[1])
    return None


def set_rates(optimizer: torch.optim.Optimizer, lr: float, wd: float) -> None:
    """Put this step's learning rate and weight decay in place."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
        group["weight_decay"] = wd if group["decays"] else 0.0
