"""Where the time of a step goes, layer by layer: forward and backward, with the rate that each layer reaches.

A layer is named by the weight that a function is given, as in hyspark.planning.flops; a function without one by its own
name. torch's profiler ties what runs on the device to the function that started it, and autograd's sequence numbers tie
a backward function to its forward one. What is computed again in the backward pass counts as backward.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from gpu_steps import WARM_UP, Size, Variant, applied, make_step
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

from hyspark.models import recompute
from hyspark.models.masking import packed_convolution
from hyspark.planning.flops import flops_by_layer

SCOPE = "layer: "
BACKWARD = "autograd::engine::evaluate_function: "
LEAST = 0.005
"""Fraction of the step below which a layer is summed with the others."""
NUM_KERNELS = 25
REST = "all else"


@dataclass
class Spent:
    """Seconds on the device in one step, and bytes that its functions take and give in the forward pass."""

    forward: float = 0.0
    backward: float = 0.0
    bytes: int = 0


class Named(TorchFunctionMode):
    """Inside the block, the profiler sees each function below the name of the layer whose weight it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layers = {id(p): name.rpartition(".")[0] for name, p in network.named_parameters()}
        self.cast: list[Tensor] = []  # kept, so that no other tensor gets their id
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is recompute.recomputed:
            function, *inputs = args
            modes = iter([self])  # in the backward pass the block is entered already

            def inside(*inputs: Any) -> Any:
                with next(modes, nullcontext()):
                    return function(*inputs)

            return func(inside, *inputs, **kwargs)
        given = (*args, *kwargs.values())
        layer = next((self.layers[id(a)] for a in given if id(a) in self.layers), None)
        if layer is None:
            return func(*args, **kwargs)
        with record_function(SCOPE + layer):
            out = func(*args, **kwargs)
        if func is Tensor.to:  # a weight in the precision of autocast
            self.layers[id(out)] = layer
            self.cast.append(out)
        self.bytes[layer] += sum(x.numel() * x.element_size() for x in (*given, out) if isinstance(x, Tensor))
        return out


def named_convolution(layers: Mapping[int, str]) -> Callable[..., Tensor]:
    """Make `convolve_with_border` that the profiler sees below the name of its layer, backward pass included."""
    convolve = packed_convolution.convolve_with_border

    def named(*args: Any) -> Tensor:
        names = [layers[id(a)] for a in args if id(a) in layers]
        with record_function(SCOPE + names[0]) if names else nullcontext():
            return convolve(*args)

    return named


def by_layer(
    size: Size, batch: int, variant: Variant, ceilings: tuple[float | None, float | None] = (None, None)
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure one step; yields a row per layer, the longest first.

    Args:
        ceilings: TFLOP/s of a matrix product in bf16 and GB/s of a copy, None where they were not measured.
    """
    with applied(variant, "bf16"):
        step = make_step(size, size.setting(batch), "packed", "bf16", variant)
        for _ in range(WARM_UP):
            step()
        network = step.network
        # In one thread, so that what the backward pass computes again has its names, too.
        with (
            torch.autograd.set_multithreading_enabled(False),
            Named(network) as named,
            patch.object(packed_convolution, "convolve_with_border", named_convolution(named.layers)),
            profiled(size.device) as trace,
        ):
            step()
    spent = attributed(trace.events(), size.device)
    for layer, moved in named.bytes.items():
        spent[layer].bytes = moved
    visible = size.setting(batch).visible(0.25)
    flops = flops_by_layer(network, (size.edge,) * 3, batch, visible)
    total = sum(s.forward + s.backward for s in spent.values())
    rest = Spent()
    for name, s in sorted(spent.items(), key=lambda item: -(item[1].forward + item[1].backward)):
        if s.forward + s.backward >= LEAST * total:
            yield name, columns(s, total, flops.get(name, 0), ceilings)
        else:
            rest.forward, rest.backward = rest.forward + s.forward, rest.backward + s.backward
    yield REST, columns(rest, total, 0, ceilings)
    whole = Spent(sum(s.forward for s in spent.values()), sum(s.backward for s in spent.values()))
    yield "the step", columns(whole, total, sum(flops.values()), ceilings)


def columns(spent: Spent, total: float, flops: float, ceilings: tuple[float | None, float | None]) -> dict[str, Any]:
    """The row of a layer: whichever of the last two is near 1 is what limits its forward pass."""
    amounts = (flops / 1e12, spent.bytes / 1e9)
    rates = [amount / spent.forward if spent.forward and amount else None for amount in amounts]
    of_ceiling = [rate / ceiling if rate and ceiling else None for rate, ceiling in zip(rates, ceilings, strict=True)]
    return {
        "forward ms": 1e3 * spent.forward,
        "backward ms": 1e3 * spent.backward,
        "fraction": (spent.forward + spent.backward) / total if total else None,
        "forward TFLOP/s": rates[0],
        "forward GB/s": rates[1],
        "of the matrix product": of_ceiling[0],
        "of a copy": of_ceiling[1],
    }


def by_kernel(size: Size, batch: int, variant: Variant) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure one step; yields the kernels that take longest (on the CPU torch's functions), with their calls."""
    with applied(variant, "bf16"):
        step = make_step(size, size.setting(batch), "packed", "bf16", variant)
        for _ in range(WARM_UP):
            step()
        with profiled(size.device) as trace:
            step()
    taken: dict[str, list[float]] = defaultdict(list)
    for event in trace.events():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device == (size.device == "cuda") and not (on_device and event.is_user_annotation):
            taken[event.name].append(event.self_device_time_total if on_device else event.self_cpu_time_total)
    total = sum(map(sum, taken.values()))
    for name, times in sorted(taken.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS]:
        shown = name.replace("|", "/")[:90]
        yield shown, {"ms": sum(times) / 1e3, "calls": len(times), "fraction": sum(times) / total}


def profiled(device: str) -> profile:
    """Torch's profiler."""
    cuda = [ProfilerActivity.CUDA] if device == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *cuda])


def attributed(events: Any, device: str) -> dict[str, Spent]:
    """Time of each layer, by the events of one step."""
    own = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    layer_of = {}
    for event in own:
        scope = nearest(event, SCOPE)
        if scope is not None and event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            layer_of[event.sequence_nr] = scope.name.removeprefix(SCOPE)
    spent: dict[str, Spent] = defaultdict(Spent)
    for event in own:
        micros = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        scope, backward = nearest(event, SCOPE), nearest(event, BACKWARD)
        if scope is not None:
            name = scope.name.removeprefix(SCOPE)
        elif backward is not None:
            name = layer_of.get(backward.sequence_nr, backward.name.removeprefix(BACKWARD))
        else:
            name = outermost(event).name
        if backward is None:
            spent[name].forward += micros / 1e6
        else:
            spent[name].backward += micros / 1e6
    return spent


def nearest(event: Any, prefix: str) -> Any:
    """The event, or the innermost around it, whose name begins so; None where there is none."""
    while event is not None and not event.name.startswith(prefix):
        event = event.cpu_parent
    return event


def outermost(event: Any) -> Any:
    """The event around all others around it."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event
