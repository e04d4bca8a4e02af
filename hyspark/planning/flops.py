"""Count the floating-point operations (FLOPs) of a network; a multiplication and an addition are two.

torch counts convolutions, matrix products and attention while the network runs on fake tensors. These have a shape and
a device but no values, so a count takes neither memory nor noticeable time. (The meta device would do the same, but has
no autocast.) Pointwise layers, norms and copies are not counted.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


def flops_by_layer(
    net: nn.Module,
    size: Sequence[int],
    num_crops: int,
    visible: Tensor | None,
    channels: int = 1,
    reconstructed: Tensor | None = None,
) -> dict[str, int]:
    """Count the FLOPs of one forward pass by layer.

    Operations without a weight (attention, the composed up-convolution) count for the module that computes them. The
    network is unchanged.

    Args:
        net: the network.
        size: voxels per axis of a crop.
        num_crops: number of crops.
        visible: bool (num_crops, 1, *grid) on the CPU; None for a network without a mask.
        channels: channels of a crop.
        reconstructed: bool (num_crops, 1, *grid) on the CPU, see `MaskedAutoencoder`; None for all hidden patches.

    Returns:
        FLOPs by name of the submodule, in the order of the pass; their sum is the whole pass.
    """
    twin, volumes = fake_copy(net, (num_crops, channels, *size))
    with torch.no_grad(), flop_counter() as counter, LayerCounter(twin, counter) as layers:
        run_forward(twin, volumes, visible, reconstructed)
    return layers.flops


def step_flops(
    net: nn.Module,
    size: Sequence[int],
    num_crops: int,
    visible: Tensor | None = None,
    channels: int = 1,
    reconstructed: Tensor | None = None,
) -> tuple[int, int]:
    """Count the FLOPs of the forward and of the backward pass of a network whose output has a `loss`.

    Recomputation belongs to the backward pass. Arguments as in `flops_by_layer`.
    """
    twin, volumes = fake_copy(net, (num_crops, channels, *size))
    with flop_counter() as forward:
        loss = run_forward(twin, volumes, visible, reconstructed).loss
    with flop_counter() as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def sum_by_module(layers: dict[str, int]) -> dict[str, int]:
    """Sum FLOPs over the first parts of the names: {"encoder": ..., "decoder": ...}."""
    sums: dict[str, int] = {}
    for name, flops in layers.items():
        module = name.split(".")[0]
        sums[module] = sums.get(module, 0) + flops
    return sums


def run_forward(net: nn.Module, volumes: Tensor, *masks: Tensor | None) -> Any:
    """Run a network with attention as matrix products, which torch counts on every device."""
    with sdpa_kernel(SDPBackend.MATH):
        return net(volumes, *(mask for mask in masks if mask is not None))


def fake_copy(net: nn.Module, shape: Sequence[int]) -> tuple[nn.Module, Tensor]:
    """Create a copy of the network, and volumes of this shape, of fake tensors on the CPU."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # the geometry of a mask needs its real values
    with fake:
        memo: dict[int, Any] = {id(b): torch.empty_like(b, device="cpu") for b in net.buffers()}
        memo |= {id(p): nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad) for p in net.parameters()}
        volumes = torch.empty(*shape)
    return copy.deepcopy(net, memo), volumes


def flop_counter() -> FlopCounterMode:
    """Create torch's counter with a correct count for weight gradients of grouped convolutions.

    torch's own count (2.15) is too large by the number of groups.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward})


def convolution_backward(
    gradient: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
    **unused: Any,
) -> int:
    """Count the FLOPs of torch's function of this name from shapes.

    The gradients of the input and of the weight, if wanted, each cost as much as the forward pass.
    """
    positions = math.prod((x if transposed else gradient)[2:])
    return (wanted[0] + wanted[1]) * 2 * x[0] * positions * math.prod(weight)


class LayerCounter(TorchFunctionMode):
    """Context that assigns the FLOPs of `counter` to layers, in `flops`.

    The layer is the one whose weight is an argument of the function, else the innermost module that runs.
    """

    def __init__(self, net: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.flops: dict[str, int] = {}
        self.layers = {id(p): name.rpartition(".")[0] for name, p in net.named_parameters()}
        self.modules = ModuleTracker()

    def __enter__(self) -> "LayerCounter":
        self.modules.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.modules.__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        spent = self.counter.get_total_flops() - before
        if spent:
            name = self.layer(args)
            self.flops[name] = self.flops.get(name, 0) + spent
        return out

    def layer(self, args: tuple[Any, ...]) -> str:
        """Find the name of the layer, without the class of the network, which the tracker prepends."""
        for arg in args:
            if id(arg) in self.layers:
                return self.layers[id(arg)]
        return max(self.modules.parents, key=lambda name: name.count(".")).partition(".")[2]
