"""Feature maps of a third-party network: the outputs of its modules, their strides, and which of them form a pyramid.

Shapes: b batch, c channels, *size positions per axis.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hyspark.models.defaults import Edges, edges_per_axis, nearest_multiple

Stride = tuple[int, ...]
"""Voxels of a crop per position of a map, for each axis a power of two."""


def run_features(backbone: nn.Module, x: Tensor) -> Any:
    """Run a network without its head if it has `forward_features`, else as a whole."""
    features = getattr(backbone, "forward_features", backbone)
    return features(x)


def timm_taps(backbone: nn.Module) -> list[str] | None:
    """Return the modules whose outputs are the feature maps of a timm network; None for other networks."""
    info = getattr(backbone, "feature_info", None)
    names = [entry.get("module", "") for entry in info] if isinstance(info, list) else []
    modules = {name for name, _ in backbone.named_modules()}
    return names if names and all(names) and modules.issuperset(names) else None  # HRNet names stages it does not have


@contextmanager
def record_outputs(network: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Record the last output of each named module while the network runs inside the block.

    Returns:
        Outputs by name, in the order in which the modules end.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                seen.pop(name, None)
                seen[name] = out

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def stride_of(x: Tensor, size: Sequence[int]) -> Stride | None:
    """Compute the stride of a map (b, c, *size / stride) with more than one position.

    Returns:
        The power of two on each axis, above one on some axis, that gives the map's size. If there is none, one that
        gives it rounded up or down: the same on all axes, or else the largest. None if the tensor is no such map.
    """
    own = tuple(x.shape[2:])
    if x.ndim != len(size) + 2 or max(own) == 1:
        return None
    fits = [
        [2**k for k in range(s.bit_length()) if o in (s // 2**k, -(-s // 2**k))] for o, s in zip(own, size, strict=True)
    ]
    if not all(fits):
        return None
    exact = [next((n for n in near if o * n == s), 0) for near, o, s in zip(fits, own, size, strict=True)]
    common = set.intersection(*map(set, fits))
    if all(exact) or not common:
        stride = tuple(one or near[-1] for one, near in zip(exact, fits, strict=True))
    else:
        stride = (max(common),) * len(size)
    return stride if max(stride) > 1 else None


def find_strides(
    seen: Mapping[str, Tensor], size: Sequence[int], run_longer: Callable[[], Mapping[str, Tensor]] | None
) -> dict[str, Stride]:
    """Find the maps among the outputs of modules.

    An output with the channels last may have by chance the shape of a map with other strides on each axis. So outputs
    of such a shape are compared with those of a crop of twice the length on the first axis.

    Args:
        seen: outputs by name of the module.
        size: voxels per axis of the crop.
        run_longer: computes the outputs of the longer crop; None if all outputs are known to have the channels first.

    Returns:
        Strides by name of the module.

    Raises:
        ValueError: the size of a map was rounded, so its positions fit no grid of patches.
    """
    found = {name: stride for name, x in seen.items() if (stride := stride_of(x, size))}
    rounded = {name for name, stride in found.items() if is_rounded(seen[name], stride, size)}
    doubtful = rounded | {name for name, stride in found.items() if len(set(stride)) > 1}
    if doubtful and run_longer is not None:
        longer = run_longer()
        for name in doubtful:
            if name not in longer or not are_channels_first(seen[name], longer[name]):
                del found[name]
    if broken := [name for name in found if name in rounded]:
        total = tuple(map(max, *found.values())) if len(found) > 1 else found[broken[0]]
        raise ValueError(
            f"crop size {tuple(size)}: this network computes a map of {tuple(seen[broken[0]].shape[2:])} from it, "
            f"which is no integer stride; set axes that are multiples of its total stride {total}, the nearest are "
            f"{nearest_multiple(size, total)}"
        )
    return found


def check_positions(network: nn.Module, seen: Mapping[str, Tensor], size: Sequence[int]) -> None:
    """Check that the deepest maps of a network have more than one position, or no part of them can be masked.

    Values of a whole image, as in squeeze-and-excite, have one position too, and no convolution with padding.

    Args:
        network: the network.
        seen: outputs of its modules, by name.
        size: voxels per axis of the crop.

    Raises:
        ValueError: a map has one position.
    """
    for name, x in seen.items():
        module = network.get_submodule(name)
        is_padded = isinstance(module, _ConvNd) and module.padding != "valid" and any(module.padding)
        if is_padded and x.ndim == len(size) + 2 and max(x.shape[2:]) == 1:
            raise ValueError(
                f"crop size {tuple(size)}: this network computes a map of one position from it ({name}), of which no "
                f"part can be masked; take crops of twice the edge, {tuple(2 * edge for edge in size)}"
            )


def is_rounded(x: Tensor, stride: Stride, size: Sequence[int]) -> bool:
    """Whether the size of a map is not that of the crop over the stride."""
    return any(o * s != full for o, s, full in zip(x.shape[2:], stride, size, strict=True))


def are_channels_first(x: Tensor, longer: Tensor) -> bool:
    """Whether an output (b, c, *size) changes on its first spatial axis at most if the crop is longer on that axis."""
    return x.ndim == longer.ndim and x.shape[:2] == longer.shape[:2] and x.shape[3:] == longer.shape[3:]


def choose_pyramid(strides: Mapping[str, Stride], are_chosen: bool) -> list[str]:
    """Choose the last map of each stride, such that strides do not decrease with depth on any axis.

    Args:
        strides: stride of each map, in the order in which they are computed.
        are_chosen: whether the user named these maps, so that none may be missing.

    Returns:
        Names, finest first.

    Raises:
        ValueError: no map is the coarsest on all axes, or a named one does not fit in.
    """
    last = {stride: name for name, stride in strides.items()}
    chain: list[Stride] = []
    for stride in sorted(reversed(last), key=math.prod, reverse=True):
        if not chain or is_finer(stride, chain[-1]):
            chain.append(stride)
        elif are_chosen or not is_finer(stride, chain[0]):
            pair = " and ".join(f"{s} ({last[s]})" for s in (chain[-1] if are_chosen else chain[0], stride))
            raise ValueError(
                f"expected maps whose strides do not decrease with depth on any axis, got {pair}; name maps that fit "
                "together (taps)"
            )
    return [last[stride] for stride in reversed(chain)]


def is_finer(stride: Stride, other: Stride) -> bool:
    """Whether a stride is at most another one on each axis."""
    return all(s <= o for s, o in zip(stride, other, strict=True))


def check_unit(mask_unit: Edges, size: Sequence[int], strides: Sequence[Stride]) -> Stride:
    """Return a mask unit per axis if masks of it fit the maps.

    Args:
        mask_unit: edge in voxels, one number or one per axis.
        size: voxels per axis of a crop.
        strides: stride of each map, deepest first.

    Raises:
        ValueError: an edge is neither a multiple nor a divisor of each stride on its axis, or no divisor of the crop,
            or the unit is one voxel.
    """
    unit = edges_per_axis(mask_unit, len(size), "mask_unit")
    fits = min(unit) > 0 and all(
        max(u, s) % min(u, s) == 0 for stride in strides for u, s in zip(unit, stride, strict=True)
    )
    if fits and any(full % u for full, u in zip(size, unit, strict=True)):
        raise ValueError(f"mask_unit: expected on each axis a divisor of the crop {tuple(size)}, got {unit}")
    if not fits or max(unit) == 1:
        raise ValueError(
            f"mask_unit: expected on each axis a multiple or a divisor of the network's strides "
            f"{', '.join(map(str, reversed(strides)))}, and more than one voxel, got {unit}; its total stride is "
            f"{strides[0]}"
        )
    return unit


def freeze_unused(network: nn.Module, maps: Sequence[Tensor]) -> None:
    """Freeze the weights of a network that do not contribute to its maps, such as those of a classifier.

    DistributedDataParallel waits for a gradient of every trainable weight.
    """
    used = contributing(maps)
    for parameter in network.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def uses_only_itself(network: nn.Module, run: Callable[[nn.Module, Tensor], Any], tap: str, crop: Tensor) -> bool:
    """Whether a copy of a network computes a map by its own weights alone.

    A function that holds the network, such as `net.forward_features = lambda x: net.encoder(x)`, is the same in every
    copy, and computes with the weights of the network.

    Args:
        network: the network.
        run: run(network, crop) computes the map.
        tap: name of the module whose output is the map.
        crop: (1, channels, *size).
    """
    copied = deepcopy(network).eval()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), record_outputs(copied, [tap]) as seen:
        run(copied, crop)
    used = contributing(list(seen.values()))
    return bool(seen) and not any(id(p) in used for p in network.parameters())


def contributing(maps: Sequence[Tensor]) -> set[int]:
    """Find the tensors that require gradients and contribute to maps.

    Returns:
        Their ids.
    """
    nodes: list[Any] = [x.grad_fn for x in maps]
    seen = set(nodes)
    used = set()
    while nodes:
        node = nodes.pop()
        used.add(id(getattr(node, "variable", None)))
        following = {child for child, _ in getattr(node, "next_functions", ())} - seen
        seen |= following
        nodes += following
    return used
