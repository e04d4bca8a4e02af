"""The depthwise 3^3 convolution three ways, against the memory's bandwidth: cuDNN, 27 shifted sums that torch.compile
fuses, a Triton kernel. It is a few operations a byte, so that bandwidth is all that can limit it.

Shapes: n patches or samples, c channels, e voxels per axis of the result; the input has a border of one voxel more.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_steps import timed
from torch import Tensor

PASSES = 5
"""Times that a map goes through memory at least: read and written forward; backward, the gradient read for that of the
input, which is written, and the map read for that of the weight (the gradient, once more, from the cache).
"""


def by_cudnn(x: Tensor, weight: Tensor) -> Tensor:
    """(n, c, e + 2, ...), (c, 1, 3, 3, 3) -> (n, c, e, ...)."""
    return F.conv3d(x, weight, groups=x.shape[1])


def by_shifts(x: Tensor, weight: Tensor) -> Tensor:
    """The same as a sum of 27 shifted maps."""
    size = [s - 2 for s in x.shape[2:]]
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    for i in range(27):
        a, b, c = i // 9, i // 3 % 3, i % 3
        shifted = x[:, :, a : a + size[0], b : b + size[1], c : c + size[2]]
        total = total + shifted.float() * weight[:, 0, a, b, c].float().view(1, -1, 1, 1, 1)
    return total.to(x.dtype)


def by_triton(x: Tensor, weight: Tensor) -> Tensor:
    """The same by kernels of our own; imported where it is needed, since Triton is not everywhere."""
    from depthwise_triton import Depthwise

    out: Tensor = Depthwise.apply(x, weight)
    return out


def methods(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is compared. On the CPU the compiled one is traced and not fused, and there is no Triton."""
    backend = "inductor" if device == "cuda" else "eager"
    found = {"cuDNN": by_cudnn, "27 shifts compiled": torch.compile(by_shifts, backend=backend, dynamic=False)}
    return found | ({"Triton": by_triton} if device == "cuda" else {})


def depthwise(device: str, n: int, channels: int, edge: int, bandwidth: float | None = None) -> dict[str, Any]:
    """Time forward and backward in bf16, channels last, each way.

    Args:
        n: samples, or visible patches of a batch.
        edge: voxels per axis of the result.
        bandwidth: GB/s of a copy, for the ratio to it.
    """
    torch.manual_seed(0)
    shape = (n, *(edge + 2,) * 3, channels)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).movedim(-1, 1).requires_grad_()
    weight = torch.randn(channels, 1, 3, 3, 3, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(n, edge, edge, edge, channels, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    gigabytes = PASSES * x.numel() * x.element_size() / 1e9
    values: dict[str, Any] = {"n": n, "channels": channels, "edge": edge}
    for name, method in methods(device).items():

        def both_ways(method: Callable[[Tensor, Tensor], Tensor] = method) -> None:
            torch.autograd.grad(method(x, weight), (x, weight), gradient)

        try:
            seconds = timed(both_ways, device).seconds
        except Exception as error:  # one way that fails does not cost the others their row
            values[f"{name} ms"] = f"{type(error).__name__}"
            continue
        values |= {f"{name} ms": 1e3 * seconds, f"{name} GB/s": gigabytes / seconds}
        if bandwidth:
            values[f"{name} of a copy"] = gigabytes / seconds / bandwidth
    return values
