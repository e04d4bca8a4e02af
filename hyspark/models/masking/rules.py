"""What torch functions mean where positions are hidden.

A hidden position counts as one outside the map: a convolution reads zero there, a maximum does not see it, an average
is taken over the others, statistics leave it out. What comes out is zero at hidden positions. With all of them visible
each rule is the function itself.

A rule takes the context, the function, and the function's own arguments. Shapes: b batch, c channels, *size positions
per axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

if TYPE_CHECKING:
    from hyspark.models.masking.context import hidden

Function = Callable[..., Any]
Dims = int | Sequence[int] | None


def mixes(func: Function) -> NotImplementedError:
    """The error for what no rule covers."""
    return NotImplementedError(
        f"{resolve_name(func) or func} mixes positions, and its form for visible positions only is not known here; if "
        "this network uses it on other things than positions, declare it safe: hidden(visible, safe=[...])"
    )


# --- convolutions and pools


def convolution(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of a map. Along fewer axes it works on something else, such as channels, and is left as it is."""
    if not context.is_map(input):
        if context.is_row(input, -1):
            raise mixes(func)
        plain: Tensor = func(input, *args, **kwargs)
        return plain
    return context.filled(func(context.filled(input), *args, **kwargs))


def max_pool(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The largest of the visible positions in each window."""
    if not context.is_map(input):
        raise mixes(func)
    return context.filled(func(context.filled(input, -math.inf), *args, **kwargs))


def avg_pool(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The average of the visible positions in each window; whether padding counts, the arguments say."""
    if not context.is_map(input):
        raise mixes(func)
    seen, everything = (x.to(input.dtype) for x in context.seen(input))
    share = func(seen, *args, **kwargs) / func(everything, *args, **kwargs)
    return context.filled(func(context.filled(input), *args, **kwargs) / share)


def global_pool(
    context: hidden, func: Function, input: Tensor, output_size: Any, return_indices: bool = False
) -> Tensor:
    """To one position, or to the size that it has."""
    size = tuple(input.shape[2:])
    asked = (output_size,) * context.axes if isinstance(output_size, int) else tuple(output_size)
    if not context.is_map(input) or return_indices:
        raise mixes(func)
    if asked == (1,) * context.axes:
        over = tuple(range(2, input.ndim))
        is_max = func in (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
        out: Tensor = (
            extreme(context, torch.amax, input, over, True) if is_max else mean(context, torch.mean, input, over, True)
        )
        return out
    if all(a in (None, s) for a, s in zip(asked, size, strict=True)):
        return context.filled(input)
    raise mixes(func)


def pad(
    context: hidden,
    func: Function,
    input: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Tensor:
    """With a constant: hidden positions get it too, as a convolution or pool follows."""
    spatial = list(pad)[: 2 * context.axes]
    if not any(spatial) or not context.is_map(input):
        if any(spatial) and context.spatial(input):
            raise mixes(func)
        plain: Tensor = func(input, pad, mode, value)
        return plain
    if mode != "constant" or min(spatial) < 0:
        raise mixes(func)
    out: Tensor = func(context.filled(input, value or 0.0), pad, mode, value)
    context.padded = (out, tuple(func(x.float(), spatial) for x in context.seen(input)))
    return out


# --- norms


def batch_norm(
    context: hidden,
    func: Function,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Statistics of the visible positions of the batch. What is no map (vectors; weights to standardise) is left."""
    is_map = context.is_map(input)
    if not training or (not is_map and not context.is_shared):
        out: Tensor = func(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return context.filled(out) if is_map else out
    x = precise(input)
    mask = context.mask(tuple(input.shape[2:])) if is_map else torch.ones_like(x[:, :1], dtype=torch.bool)
    over = (0, *range(2, x.ndim))
    kept = torch.where(mask, x, 0.0)
    sums = context.total(torch.cat([kept.sum(over), mask.sum().to(x).view(1)]))
    num = sums[-1].detach()
    centre = per_channel(sums[:-1] / num, x)
    centred = torch.where(mask, x - centre, 0.0)
    variance = context.total(centred.square().sum(over)) / num
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(centre.detach().flatten().to(running_mean), momentum)
        running_var.lerp_((variance.detach() * (num / (num - 1))).to(running_var), momentum)
    return scaled(centred * per_channel((variance + eps).rsqrt(), x), weight, bias, mask).to(input.dtype)


def group_norm(
    context: hidden,
    func: Function,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Statistics of each sample and group over its visible positions."""
    if not context.is_map(input):
        out: Tensor = func(input, num_groups, weight, bias, eps)
        return out
    mask = context.mask(tuple(input.shape[2:]))
    centred, variance = by_sample(precise(input).unflatten(1, (num_groups, -1)), mask.unsqueeze(1))
    return scaled((centred * (variance + eps).rsqrt()).flatten(1, 2), weight, bias, mask).to(input.dtype)


def instance_norm(
    context: hidden,
    func: Function,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Statistics of each sample and channel over its visible positions."""
    if not context.is_map(input) or (use_input_stats and running_mean is not None):
        raise mixes(func)
    if not use_input_stats:
        return context.filled(func(input, running_mean, running_var, weight, bias, False, momentum, eps))
    return group_norm(context, F.group_norm, input, input.shape[1], weight, bias, eps)


def layer_norm(
    context: hidden, func: Function, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor:
    """Over channels, position by position; of a channels-last map, hidden positions become zero."""
    out: Tensor = func(input, normalized_shape, *args, **kwargs)
    if len(normalized_shape) > 1 and context.spatial(input):
        raise mixes(func)
    if len(normalized_shape) == 1 and context.is_map(input.movedim(-1, 1)):
        mask = context.mask(tuple(input.shape[1:-1])).movedim(1, -1)
        return torch.where(mask, out, 0.0)
    return out


def precise(x: Tensor) -> Tensor:
    """At least fp32, in which statistics are taken."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def by_sample(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centred values, zero at hidden positions, and variances of (b, g, n, *size) over all axes from the third on."""
    over = tuple(range(2, x.ndim))
    num = mask.sum(over, keepdim=True) * x.shape[2]
    centre = torch.where(mask, x, 0.0).sum(over, keepdim=True) / num
    centred = torch.where(mask, x - centre, 0.0)
    return centred, centred.square().sum(over, keepdim=True) / num


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(c,) to be broadcast over (b, c, *size)."""
    return values.view(1, -1, *(1,) * (x.ndim - 2))


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor) -> Tensor:
    """The affine part of a norm, zero at hidden positions, where x is zero."""
    if weight is not None:
        x = x * per_channel(weight, x)
    return x if bias is None else torch.where(mask, x + per_channel(bias, x), 0.0)


# --- reductions


def positions(context: hidden, func: Function, x: Tensor, dims: Dims) -> range | None:
    """The spatial axes of a map, where a function works along all of them; None where along none of them, or where x is
    no map. Raises where it works along some of them.
    """
    chosen = range(x.ndim) if dims is None or dims == () else [dims] if isinstance(dims, int) else dims
    along = {d % x.ndim for d in chosen} if x.ndim else set()
    candidates = context.spatial(x)
    for spatial in candidates:
        if along >= set(spatial):
            return spatial
    if candidates and all(along & set(spatial) for spatial in candidates):
        raise mixes(func)
    if not candidates and x.ndim == 3 and any(context.is_row(x, d) for d in along - {0}):
        raise mixes(func)
    return None


def mean(
    context: hidden, func: Function, input: Tensor, dim: Dims = None, keepdim: bool = False, **kwargs: Any
) -> Tensor:
    """Over the visible positions."""
    where = positions(context, func, input, dim)
    if where is None:
        return plainly(func, input, dim, keepdim, kwargs)
    mask = context.over(input, where)
    total = plainly(func, torch.where(mask, input, 0.0), dim, keepdim, kwargs)
    return total / plainly(torch.mean, mask.to(total.dtype), dim, keepdim, {})


def sum_or_norm(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A sum, or a norm, over the visible positions."""
    dims = kwargs.get("dim", args[0] if args else None) if func in SUMS else kwargs.get("dim", (args + (None,) * 2)[1])
    where = positions(context, func, input, dims)
    if where is not None:
        input = torch.where(context.over(input, where), input, 0.0)
    out: Tensor = func(input, *args, **kwargs)
    return out


def extreme(
    context: hidden, func: Function, input: Tensor, dim: Dims = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """The largest, or smallest, of the visible positions."""
    where = positions(context, func, input, dim)
    if where is not None:
        worst = math.inf if "min" in (resolve_name(func) or "") else -math.inf
        input = torch.where(context.over(input, where), input, worst)
    return plainly(func, input, dim, keepdim, kwargs)


def plainly(func: Function, x: Tensor, dim: Dims, keepdim: bool, kwargs: dict[str, Any]) -> Any:
    """The function itself; without dimensions some take no such argument."""
    return func(x, **kwargs) if dim is None else func(x, dim, keepdim, **kwargs)


# --- functions that are welcome along channels alone


def along(argument: str, place: int, default: Dims = None) -> Function:
    """A rule for functions that work along the axes which an argument names, `place`-th after the input."""

    def rule(context: hidden, func: Function, input: Any, *args: Any, **kwargs: Any) -> Any:
        dims = kwargs.get(argument, args[place] if len(args) > place else default)
        first = input if isinstance(input, Tensor) else input[0]
        if positions(context, func, first, dims) is not None:
            raise mixes(func)
        return func(input, *args, **kwargs)

    return rule


def linear(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Along the last axis, if that is not one of positions."""
    refuse_rows(context, func, input)
    out: Tensor = func(input, *args, **kwargs)
    return out


def refuse_rows(context: hidden, func: Function, x: Tensor) -> None:
    """Raises where the last axis is one of positions."""
    spatial = context.spatial(x)
    is_mixer = x.ndim == 3 and context.is_row(x, 2) and not context.is_row(x, 1)
    if is_mixer or (spatial and all(dims.stop == x.ndim for dims in spatial)):
        raise mixes(func)


def product(context: hidden, func: Function, *args: Any, **kwargs: Any) -> Any:
    """Matrix products with a weight; those of two activations are attention."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if sum(x.ndim >= 3 for x in tensors) > 1:
        raise mixes(func)
    if tensors and tensors[0].ndim >= 3:
        refuse_rows(context, func, tensors[0])
    return func(*args, **kwargs)


def reshape(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """To anything but one vector a sample, whose entries are those of all positions."""
    out: Tensor = func(input, *args, **kwargs)
    if out.ndim == 2 and input.ndim > 2 and context.spatial(input) and out.shape[1] != input.shape[1]:
        raise mixes(func)
    return out


SUMS: set[Function] = {torch.sum, Tensor.sum}

RULES: dict[Function, Function] = {
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], convolution),
    **dict.fromkeys([F.max_pool1d, F.max_pool2d, F.max_pool3d], max_pool),
    **dict.fromkeys([torch.max_pool1d, torch.max_pool2d, torch.max_pool3d], max_pool),
    **dict.fromkeys([F.avg_pool1d, F.avg_pool2d, F.avg_pool3d], avg_pool),
    **dict.fromkeys([F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d], global_pool),
    **dict.fromkeys([F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d], global_pool),
    F.pad: pad,
    **dict.fromkeys([F.batch_norm, torch.batch_norm], batch_norm),
    **dict.fromkeys([F.group_norm, torch.group_norm], group_norm),
    F.instance_norm: instance_norm,
    **dict.fromkeys([F.layer_norm, torch.layer_norm], layer_norm),
    **dict.fromkeys([torch.mean, Tensor.mean], mean),
    **dict.fromkeys([*SUMS, torch.norm, Tensor.norm, torch.linalg.vector_norm], sum_or_norm),
    **dict.fromkeys([torch.amax, Tensor.amax, torch.amin, Tensor.amin], extreme),
    **dict.fromkeys([torch.max, Tensor.max, torch.min, Tensor.min], extreme),
    **dict.fromkeys([torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean, torch.std_mean], along("dim", 0)),
    **dict.fromkeys([F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax], along("dim", 0)),
    **dict.fromkeys([torch.cumsum, Tensor.cumsum, torch.sort, Tensor.sort], along("dim", 0, -1)),
    **dict.fromkeys([torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin], along("dim", 0)),
    **dict.fromkeys([torch.topk, Tensor.topk], along("dim", 1, -1)),
    **dict.fromkeys([torch.cat, torch.concat], along("dim", 0, 0)),
    **dict.fromkeys([torch.roll, Tensor.roll], along("dims", 1)),
    **dict.fromkeys([torch.flip, Tensor.flip], along("dims", 0)),
    F.normalize: along("dim", 1, 1),
    F.linear: linear,
    **dict.fromkeys([torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm], product),
    **dict.fromkeys([torch.flatten, Tensor.flatten, Tensor.reshape, torch.reshape, Tensor.view], reshape),
}

MIXES_POSITIONS: frozenset[Function] = frozenset(
    {
        F.interpolate,
        F.grid_sample,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        F.max_pool1d_with_indices,
        F.max_pool2d_with_indices,
        F.max_pool3d_with_indices,
        F.lp_pool1d,
        F.lp_pool2d,
        F.lp_pool3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.unfold,
        F.fold,
        F.pixel_shuffle,
        F.pixel_unshuffle,
        torch.einsum,
        torch.fft.fft2,
        torch.fft.fftn,
        torch.fft.rfft2,
        torch.fft.rfftn,
    }
)
"""Functions without a rule that are known to mix positions."""
