"""`with hidden(visible):` a network computes as if hidden positions did not exist. The readable reference of masking.

The context intercepts torch functions, so the network inside needs no special layers and its weights are its own.
After every convolution and pool the output is set to zero at hidden positions; LayerNorm over channels acts position
by position and is zeroed in the same way. Pointwise functions need nothing: what they make of a hidden position is
never read before the next zeroing. A function that would mix or shift positions in another way is refused by name
rather than computed wrongly.

The mask belongs to the context object. Nothing stays behind when the block ends, and activation checkpointing is
right as long as the block lies inside the checkpointed function.

Source: the rules of Tian et al., "Designing BERT for Convolutional Networks", ICLR 2023, and of HySparK, MICCAI
2024, section 2.1.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from hyspark.models.masking import visible_at

ZERO_AFTER = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    torch.max_pool1d,
    torch.max_pool2d,
    torch.max_pool3d,
}
"""Functions of channels-first maps (b, c, *size) whose output is zeroed at hidden positions."""

CHANNEL_NORMS = {F.layer_norm, torch.layer_norm}
"""LayerNorm over the last axis of a channels-last map (b, *size, c)."""

MIXES_POSITIONS = {
    F.batch_norm,
    F.group_norm,
    F.instance_norm,
    F.interpolate,
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
    F.max_pool1d_with_indices,
    F.max_pool2d_with_indices,
    F.max_pool3d_with_indices,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.pad,
    torch.roll,
    torch.Tensor.roll,
    torch.flip,
    torch.Tensor.flip,
}
"""Functions whose masked form this reference does not know."""


class hidden(TorchFunctionMode):  # noqa: N801 - reads as a statement: `with hidden(visible):`
    """Compute as if the positions outside `visible` did not exist.

    Args:
        visible: bool (b, 1, *grid), True where the network sees. Feature maps must have the same number of axes,
        each a multiple
            of the grid's.

    Raises, inside the block: NotImplementedError for a function that mixes positions in a way it does not know;
    ValueError for a feature map that the grid does not divide.
    """

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible
        self.masks: dict[tuple[int, ...], Tensor] = {}

    def mask(self, size: tuple[int, ...]) -> Tensor:
        """The mask at a resolution, made once for each: bool (b, 1, *size)."""
        if size not in self.masks:
            self.masks[size] = visible_at(self.visible, size)
        return self.masks[size]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in MIXES_POSITIONS:
            raise NotImplementedError(
                f"{resolve_name(func)} mixes positions, and its form for visible positions only is not known here"
            )
        out = func(*args, **(kwargs or {}))
        if func in ZERO_AFTER:
            return torch.where(self.mask(tuple(out.shape[2:])), out, out.new_zeros(()))
        if func in CHANNEL_NORMS:
            mask = self.mask(tuple(out.shape[1:-1])).movedim(1, -1)
            return torch.where(mask, out, out.new_zeros(()))
        return out
