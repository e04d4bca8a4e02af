"""Parameter groups; learning rate and weight decay as pure functions of the step."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hyspark.config.classification import ClassificationConfig
from hyspark.config.segmentation import SegmentationConfig
from hyspark.training.distributed import unwrap
from hyspark.utils.log import LOG

LR_RATIO = "share"
"""Key of a parameter group's ratio of learning rates. Saved optimizer states have it, so its name stays."""

TOKENS = re.compile(
    r"(^|[._])(pos_embed(ding|s)?|position_embeddings?|(cls|class|dist|reg|register)_tokens?|"
    r"relative_position_bias_table)$"
)
"""Names of position embeddings and tokens."""


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


def make_adamw(
    model: nn.Module, layer_decay: float = 1.0, encoder_lr_ratio: float = 1.0, *, spare_tokens: bool = True
) -> torch.optim.Optimizer:
    """Make AdamW with `parameter_groups`, whose rates are set at every step. Fused: one pass over the weights."""
    groups = parameter_groups(model, layer_decay, encoder_lr_ratio, spare_tokens=spare_tokens)
    return torch.optim.AdamW(groups, fused=True)


def parameter_groups(
    model: nn.Module,
    layer_decay: float = 1.0,
    encoder_lr_ratio: float = 1.0,
    layers: Mapping[str, int | None] | None = None,
    *,
    spare_tokens: bool = True,
) -> list[dict[str, object]]:
    """Group parameters by weight decay and learning rate.

    Norms, biases, position embeddings and tokens have no weight decay, and what a network of timm declares.

    Args:
        model: Network, or its wrapper.
        layer_decay: Learning rate of an encoder layer divided by that of the layer above (layer-wise decay; Clark et
            al., "ELECTRA", ICLR 2020).
        encoder_lr_ratio: Learning rate of the encoder divided by that of the rest.
        layers: Index of each parameter's layer in the encoder by name, None outside of it; by default the network
            answers (`encoder_layers`).
        spare_tokens: Whether position embeddings and tokens, but for mask tokens, have no weight decay. Runs of earlier
            versions decayed them.

    Returns:
        Groups with `params`, `decays` (whether weight decay applies) and the key LR_RATIO.

    Raises:
        ValueError: The encoder is to have rates of its own, but the network does not say which weights it has.
    """
    network = unwrap(model)
    if layers is None:
        layers = encoder_layers_of(network, needed=(layer_decay, encoder_lr_ratio) != (1.0, 1.0))
        encoder = set(layers)
    else:
        encoder = {name for name, layer in layers.items() if layer is not None}
    num_layers = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    spared = without_decay(network) if spare_tokens else set()
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        layer = layers.get(name)
        ratio = encoder_lr_ratio if name in encoder else 1.0
        if layer is not None:
            ratio *= layer_decay ** (num_layers - layer)
        decays = parameter.ndim > 1 and not name.endswith("mask_token") and name not in spared
        groups.setdefault((decays, ratio), []).append(parameter)
    return [{"params": parameters, "decays": decays, LR_RATIO: ratio} for (decays, ratio), parameters in groups.items()]


def encoder_layers_of(network: Any, needed: bool) -> dict[str, int | None]:
    """Ask a network for the layers of its encoder; a network that does not know them has none.

    Raises:
        ValueError: They are needed, but the network does not know them.
    """
    if hasattr(network, "encoder_layers"):
        layers: dict[str, int | None] = network.encoder_layers()
        return layers
    if needed:
        raise ValueError(
            f"encoder_lr_ratio, layer_decay: {type(network).__name__} does not say which of its weights are the "
            "encoder's; expected a method encoder_layers; set both to 1"
        )
    return {}


def without_decay(network: nn.Module) -> set[str]:
    """Name a network's position embeddings and tokens, and what its modules declare (`no_weight_decay` of timm)."""
    found = {name for name, _ in network.named_parameters() if TOKENS.search(name)}
    for prefix, module in network.named_modules():
        declare = getattr(module, "no_weight_decay", None)
        if callable(declare):
            found |= {f"{prefix}.{name}" if prefix else name for name in declare()}
    return found


def match_saved_groups(
    make: Callable[..., torch.optim.Optimizer], model: nn.Module, saved: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Make the optimizer of a run that continues, with groups as it began.

    Args:
        make: Makes the optimizer of a model; takes `spare_tokens`.
        model: The model.
        saved: State of the optimizer.

    Raises:
        ValueError: The saved groups are of another network or version.
    """
    wanted = group_sizes(saved["param_groups"])
    for spare_tokens in (True, False):
        optimizer = make(model, spare_tokens=spare_tokens)
        if group_sizes(optimizer.param_groups) == wanted:
            if not spare_tokens:
                LOG.info("weight decay of position embeddings and tokens continues, as this run began")
            return optimizer
    found, expected = ([size for size, _ in sizes] for sizes in (wanted, group_sizes(optimizer.param_groups)))
    raise ValueError(
        f"the optimizer's state has groups of {found} weights, expected {expected} as in the network; continue with "
        "the version that began the run, or name another run folder"
    )


def group_sizes(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, bool]]:
    """Return the number of weights of each group, and whether they decay."""
    return [(len(group["params"]), group["decays"]) for group in groups]


def set_lr_and_decay(optimizer: torch.optim.Optimizer, lr: float, wd: float) -> None:
    """Set learning rate and weight decay of a step in all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_RATIO]
        group["weight_decay"] = wd if group["decays"] else 0.0
