"""Activation checkpointing of cheap layers: what they give is made again in the backward pass instead of being kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any, batch_norm: nn.Module | None = None) -> Any:
    """function(*args), keeping only `args` for the backward pass.

    torch stops the second pass as soon as it has what the backward pass needs, so a convolution at the end of the
    function is not computed twice. batch_norm: a BatchNorm inside it, whose running statistics are to move once.
    Where torch.compile is at work the function is called plainly: it decides by itself what to keep.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*args)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), freeze_statistics(batch_norm) if isinstance(batch_norm, _BatchNorm) else nullcontext()

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def freeze_statistics(norm: _BatchNorm) -> Iterator[None]:
    """The running statistics of a BatchNorm stay as they are inside the block."""
    momentum, count = norm.momentum, norm.num_batches_tracked
    before = None if count is None else count.clone()
    norm.momentum = 0.0
    try:
        yield
    finally:
        norm.momentum = momentum
        if count is not None and before is not None:
            count.copy_(before)
