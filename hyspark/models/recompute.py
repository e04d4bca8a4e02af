"""Activation checkpointing of cheap layers: their outputs are recomputed in the backward pass instead of kept."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any, batch_norm: nn.Module | None = None) -> Any:
    """Call function(*args), keeping only `args` for the backward pass.

    torch stops the recomputation as soon as it has all that the backward pass needs. A convolution at the end of the
    function is thus not computed twice. Under torch.compile the function is called plainly: the compiler decides by
    itself what to keep.

    Args:
        function: the layers.
        args: their inputs.
        batch_norm: a BatchNorm among the layers; its running statistics are updated once only.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*args)
    tensors = tuple(x for x in args if isinstance(x, Tensor))
    if has_torch_function(tensors):  # a context, inside which the layers shall be computed again, too
        return handle_torch_function(recomputed, tensors, function, *args, batch_norm=batch_norm)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), FrozenStatistics(batch_norm) if isinstance(batch_norm, _BatchNorm) else nullcontext()

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class FrozenStatistics:
    """Context in which the running statistics of a BatchNorm are unchanged; each backward pass enters it anew."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm

    def __enter__(self) -> None:
        self.momentum, count = self.norm.momentum, self.norm.num_batches_tracked
        self.count = None if count is None else count.clone()
        self.norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        self.norm.momentum = self.momentum
        if self.count is not None and self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.copy_(self.count)
