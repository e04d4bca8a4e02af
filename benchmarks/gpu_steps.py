"""Pre-training steps on a GPU: time, memory and FLOP/s by precision, batch and variant, against the card's ceilings.

All functions are rows of gpu.py: they take plain values and return {column: value}. On the CPU, at toy size, they go
through the same code; what they print there says nothing.
"""

import gc
import hashlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import published
import torch
from measure import machine
from networks import Setting, TrainingStep
from sides import Case, How, Side, Steps
from torch import nn

from hyspark import build_hyspark
from hyspark.models import light_decoder, recompute
from hyspark.models.compile import compile_blocks
from hyspark.models.masked_autoencoder import reconstruction_loss
from hyspark.planning.flops import step_flops
from hyspark.training.precision import AUTOCAST_DTYPES

ROOT = Path(__file__).parents[1]
WARM_UP, ENOUGH, LONG = 2, 1.0, 8.0
"""Steps before the timed ones; seconds of timed steps that suffice, and after which no further one is taken."""
FEW, MANY = 3, 30
"""Timed steps: at least, where they are not long, and at most."""
TF32 = {"fp32": "none", "TF32": "all", "bf16": "all"}
"""What each kind of step may compute in TF32."""
PAPER_CROPS = 2.72e6
"""The paper's pre-training: 6.8 k volumes, 4 crops each, 100 epochs."""
SPARE = 0.93
"""Of the memory, what the largest batch is to take."""


@dataclass(frozen=True)
class Size:
    """What is measured. network: options of `build_hyspark` with their values, none for HySparK-B. most: crops of the
    largest batch.
    """

    device: str = "cuda"
    edge: int = 96
    network: tuple[tuple[str, Any], ...] = ()
    most: int = 512

    @property
    def options(self) -> dict[str, Any]:
        """The network's, by name."""
        return dict(self.network)

    def setting(self, batch: int) -> Setting:
        """The same for networks.py."""
        return Setting(self.device, torch.get_num_threads(), batch, self.edge)


@dataclass(frozen=True)
class Variant:
    """How a step is taken; the defaults are how a training run takes it.

    compose: whether an up-convolution and the convolution behind it are one of kernel 4. compile: blocks of the
    encoder, the decoder, both (blocks), or none. graph: whether the step is one CUDA graph, for one fixed mask.
    """

    cudnn_benchmark: bool = False
    channels_last: bool = True
    compile: str = "none"
    compose: bool = True
    recompute: bool = True
    graph: bool = False
    fused: bool = True


SAME = ("gpu", "torch", "CUDA", "cuDNN")
"""Of an environment, what rows that stand beside each other have in common."""


def environment(device: str) -> dict[str, Any]:
    """Describe what it is measured on, and by which code: a digest of all of its files."""
    found: dict[str, Any] = machine()
    files = sorted(path for folder in ("hyspark", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    found["code"] = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
        found["CUDA"], found["cuDNN"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def ceilings(device: str, edge: int = 8192, megabytes: int = 1024) -> dict[str, float]:
    """The two ceilings of a card: TFLOP/s of a matrix product in each precision, GB/s of a copy, read and written."""
    found = {}
    for precision, dtype in (("bf16", torch.bfloat16), ("TF32", torch.float32), ("fp32", torch.float32)):
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
        a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        found[f"{precision} TFLOP/s"] = 2 * edge**3 / timed(lambda a=a, b=b: a @ b, device).seconds / 1e12
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["GB/s"] = 2 * source.numel() / timed(lambda: target.copy_(source), device).seconds / 1e9
    return found


@dataclass(frozen=True)
class Timed:
    """first: seconds of the first call, which chooses and compiles kernels. seconds: median of the timed ones."""

    first: float
    seconds: float


def timed(function: Callable[[], object], device: str) -> Timed:
    """Time a function that is called again and again, the device having finished each time."""

    def call() -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    warm = [call() for _ in range(WARM_UP)]
    taken: list[float] = []
    while len(taken) < MANY and sum(taken) < LONG and (len(taken) < FEW or sum(taken) < ENOUGH):
        taken.append(call())
    return Timed(warm[0], statistics.median(taken))


def step(
    size: Size,
    batch: int,
    compute: str = "packed",
    precision: str = "bf16",
    variant: Variant | None = None,
    ceiling: float | None = None,
    base_ms: float | None = None,
) -> dict[str, Any]:
    """Measure a step, with another mask each time.

    Args:
        ceiling: TFLOP/s of the matrix product in this precision, for the ratio to it.
        base_ms: of the row that this one is compared with.
    """
    if size.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    variant = variant or Variant()
    setting = size.setting(batch)
    with applied(variant, precision):
        found = timed(make_step(size, setting, compute, precision, variant), size.device)
    counted = flops(size, compute, batch_counted(size, batch)) * batch
    values: dict[str, Any] = {
        "batch": batch,
        "ms": 1e3 * found.seconds,
        "samples/s": batch / found.seconds,
        "peak GB": setting.peak() / 1e9,
        "TFLOP/s": counted / found.seconds / 1e12,
        "of the matrix product": counted / found.seconds / 1e12 / ceiling if ceiling else None,
        "first s": found.first,
    }
    if "widths" not in size.options:
        values["hours of the paper"] = PAPER_CROPS * found.seconds / batch / 3600
    return values if base_ms is None else values | {"faster by": base_ms / values["ms"]}


def encoder(case: Case, side: Side, how: How, packed_ms: float | None = None) -> dict[str, Any]:
    """Measure forward and backward of an encoder, with another mask each time.

    Args:
        packed_ms: of the same encoder packed.
    """
    if how.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with applied(Variant(), how.precision):
        found = timed(Steps(case, side, how), how.device)
    values: dict[str, Any] = {
        "batch": case.batch,
        "ms": 1e3 * found.seconds,
        "samples/s": case.batch / found.seconds,
        "peak GB": Setting(how.device).peak() / 1e9,
        "first s": found.first,
    }
    return values if packed_ms is None else values | {"packed is faster by": values["ms"] / packed_ms}


def make_step(size: Size, setting: Setting, compute: str, precision: str, variant: Variant) -> Callable[[], None]:
    """The step as the variant says."""
    kind = GraphedStep if variant.graph else TrainingStep
    layout = {"channels_last": variant.channels_last, "fused": variant.fused}
    taken = kind(setting, compute, "fp32" if precision == "TF32" else precision, **layout, **size.options)
    parts = {"none": [], "blocks": [taken.network], "encoder": [taken.network.encoder]}
    for part in [*parts.get(variant.compile, [taken.network.decoder])]:
        compile_blocks(part, "inductor" if size.device == "cuda" else "aot_eager")
    return taken


@contextmanager
def applied(variant: Variant, precision: str) -> Iterator[None]:
    """Torch's switches and the network's inner choices, as before when it is over."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = TF32[precision] == "all"
    torch.set_float32_matmul_precision("high" if TF32[precision] == "all" else "highest")
    torch.backends.cudnn.benchmark = variant.cudnn_benchmark
    compose = light_decoder.COMPOSE_FROM if variant.compose else 2**62
    kept = recompute.checkpoint if variant.recompute else called
    try:
        with patch.object(light_decoder, "COMPOSE_FROM", compose), patch.object(recompute, "checkpoint", kept):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[:2]
        torch.set_float32_matmul_precision(before[2])


def called(function: Callable[..., Any], *args: Any, **_how: Any) -> Any:
    """Call a function and keep what it computes, in place of recomputing it in the backward pass."""
    return function(*args)


class GraphedStep(TrainingStep):
    """The step as one CUDA graph, which replays the kernels without Python: what the launches cost beside it. The mask
    is fixed, since the number of neighbours, and with it the shapes, is another for each mask.
    """

    def __init__(self, setting: Setting, compute: str, precision: str, **options: Any) -> None:
        super().__init__(setting, compute, precision, **options)
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        self.patches = self.network.encoder.patches(self.volumes, next(self.masks))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.take()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.take()

    def take(self) -> None:
        """The step without what waits for the device."""
        net, patches = self.network, self.patches
        self.optimizer.zero_grad(set_to_none=True)
        dtype, enabled = AUTOCAST_DTYPES[self.precision], self.precision != "fp32"
        with torch.autocast(self.setting.device, dtype, enabled=enabled, cache_enabled=False):
            features = net.encoder.encode(self.volumes, patches)[: -len(net.densify) - 1 : -1]
            maps = [fill(x, patches) for fill, x in zip(net.densify, features, strict=True)]
            loss = reconstruction_loss(self.volumes, net.decoder(maps), patches.visible)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5, foreach=True)
        self.optimizer.step()

    def __call__(self) -> None:
        self.graph.replay()


def largest(
    size: Size,
    measured: Sequence[tuple[int, float]],
    compute: str = "packed",
    precision: str = "bf16",
    ceiling: float | None = None,
) -> dict[str, Any]:
    """Measure the step of the largest batch that fits.

    Args:
        measured: batch and peak memory in GB of steps that were measured, two at least.
    """
    (b0, m0), (b1, m1) = sorted(measured)[0], sorted(measured)[-1]
    each = (m1 - m0) / (b1 - b0) if b1 > b0 else 0.0
    total = torch.cuda.mem_get_info()[1] / 1e9 if size.device == "cuda" else 0.0
    fits = int((SPARE * total - m0) / each + b0) if each > 0 else size.most
    batch = max(1, min(size.most, fits))
    while True:
        try:
            return step(size, batch, compute, precision, ceiling=ceiling)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        batch = max(1, int(0.9 * batch))


def batch_counted(size: Size, batch: int) -> int:
    """A batch that costs as many FLOPs a crop as this one: more crops only let more up-convolutions be composed."""
    width = size.options.get("decoder_width", 768)
    positions = (size.edge // 16) ** 3
    return 2 if batch * positions < light_decoder.COMPOSE_FROM * width else batch


@lru_cache
def flops(size: Size, compute: str, batch: int) -> float:
    """FLOPs of a step, a crop, counted on tensors without numbers; what is recomputed counts too."""
    visible = size.setting(batch).visible(0.25)
    network = build_hyspark(size.edge, compute=compute, **size.options)
    forward, backward = step_flops(network, (size.edge,) * 3, batch, visible)
    return (forward + backward) / batch


def published_step(size: Size, checkout: str, batch: int, precision: str) -> dict[str, Any]:
    """Measure a step of the published network, repaired for batches; alone in its process."""
    if size.device == "cuda":
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    found = published.step(checkout, size.device, torch.get_num_threads(), batch, size.edge, FEW, precision)
    seconds = batch * found["seconds"]
    return {
        "batch": batch,
        "ms": 1e3 * seconds,
        "samples/s": batch / seconds,
        "peak GB": found["peak_bytes"] / 1e9,
    }


def winners(base_ms: float, measured: Mapping[Variant, float], by: float = 1.02) -> Variant:
    """All choices together whose step was faster than the base's by so much; of several compiled ones the fastest."""
    best = asdict(Variant())
    fastest: dict[str, float] = {}
    for variant, ms in measured.items():
        for name, value in asdict(variant).items():
            is_chosen = value != getattr(Variant(), name)
            if is_chosen and base_ms / ms >= by and ms < fastest.get(name, float("inf")):
                best[name], fastest[name] = value, ms
    return Variant(**best)
