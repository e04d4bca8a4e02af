"""What a network costs to run_forward, in floating-point operations (FLOPs): a multiplication and an addition are two.

torch counts convolutions, matrix products and attention while the network runs on fake tensors, which have a shape
and a device but no numbers, so that a count takes neither memory nor a noticeable time. (The meta device would do the
same, but knows no autocast.) What is pointwise, norms and copies are not counted.
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
    net: nn.Module, size: Sequence[int], num_crops: int, visible: Tensor | None, channels: int = 1
) -> dict[str, int]:
    """FLOPs of one forward pass by the layer that spends them, as {name of the submodule: FLOPs}, in the order of the
    pass.

    size: voxels per axis of a crop. visible: bool (num_crops, 1, *grid) on the CPU, or None for a network that takes
    volumes alone. What is computed without a weight of its own (attention, the composed up-convolution) stands under
    the module that computes it. The sum is the whole pass; the network itself stays as it is.
    """
    twin, volumes = fake_copy(net, (num_crops, channels, *size))
    with torch.no_grad(), flop_counter() as counter, LayerCounter(twin, counter) as layers:
        run_forward(twin, volumes, visible)
    return layers.flops


def step_flops(
    net: nn.Module, size: Sequence[int], num_crops: int, visible: Tensor | None = None, channels: int = 1
) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass of a network whose output has a `loss`; what the backward pass
    computes again belongs to it. Arguments as in `flops_by_layer`.
    """
    twin, volumes = fake_copy(net, (num_crops, channels, *size))
    with flop_counter() as forward:
        loss = run_forward(twin, volumes, visible).loss
    with flop_counter() as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def sum_by_module(layers: dict[str, int]) -> dict[str, int]:
    """Sums over the first word of the names: {"encoder": ..., "decoder": ...}."""
    parts: dict[str, int] = {}
    for name, flops in layers.items():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + flops
    return parts


def run_forward(net: nn.Module, volumes: Tensor, visible: Tensor | None) -> Any:
    """The network's output; attention as matrix products, which torch counts on every device."""
    with sdpa_kernel(SDPBackend.MATH):
        return net(volumes) if visible is None else net(volumes, visible)


def fake_copy(net: nn.Module, shape: Sequence[int]) -> tuple[nn.Module, Tensor]:
    """A copy of the network and volumes of this shape, both of fake tensors on the CPU."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # the geometry of a mask is worked out with its real numbers
    with fake:
        memo: dict[int, Any] = {id(b): torch.empty_like(b, device="cpu") for b in net.buffers()}
        memo |= {id(p): nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad) for p in net.parameters()}
        volumes = torch.empty(*shape)
    return copy.deepcopy(net, memo), volumes


def flop_counter() -> FlopCounterMode:
    """torch's counter, with a right count for the weight gradient of grouped convolutions: torch's own (2.15) is too
    large by the number of groups.
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
    """FLOPs of torch's function of this name, given shapes: the gradient of the input and that of the weight, each
    where wanted, cost what the forward pass does.
    """
    positions = math.prod((x if transposed else gradient)[2:])
    return (wanted[0] + wanted[1]) * 2 * x[0] * positions * math.prod(weight)


class LayerCounter(TorchFunctionMode):
    """Inside the block, `flops` gathers what `counter` counts by the layer whose weight a function is given, else by
    the innermost module at work.
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
        """Name of the layer, without the class of the network that the tracker puts in front."""
        for arg in args:
            if id(arg) in self.layers:
                return self.layers[id(arg)]
        return max(self.modules.parents, key=lambda name: name.count(".")).partition(".")[2]
