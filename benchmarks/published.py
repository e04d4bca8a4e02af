"""One training step of the published network, from a checkout that the caller names; nothing of it is shipped here.

The checkout is used as it is, but for what keeps it from running at batch 2 on today's libraries:

- tokens: it counts the patches to keep over the whole batch; here, over one sample, which is what it does at batch 1;
- `timm.models.layers.drop` has moved, and `utils.misc` needs modules that a step does not.

The checkout has a module named as this package is, so a process of its own is needed, in which the package is put out
of the way.
"""

import statistics
import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from measure import peak_memory, seconds
from torch import Tensor, nn


def step(
    checkout: str, device: str, threads: int, num_samples: int, edge: int, repeats: int, precision: str = "fp32"
) -> dict[str, float]:
    """A training step (forward, backward, clip, AdamW), after one to warm up: median seconds a sample, and peak memory
    in bytes. precision: fp32, or bf16 by autocast.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = load(checkout, edge).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
        volumes = torch.rand(num_samples, 1, *(edge,) * 3, device=device)

        def take() -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = net(volumes)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5).item()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        take()
        median = statistics.median(seconds(take) for _ in range(repeats))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
    return {"seconds": median / num_samples, "peak_bytes": peak}


def load(checkout: str, edge: int) -> Any:
    """The pre-training network of the checkout with a mask ratio of .75."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "hyspark"]:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    moved: Any = import_module("timm.models.layers")
    moved.drop = import_module("timm.layers.drop")
    misc: Any = ModuleType("utils.misc")
    misc.is_pow2n = lambda x: x > 0 and x & (x - 1) == 0
    sys.modules["utils.misc"] = misc
    network: Any = import_module("models.network.hyspark_model")
    network.MaskedAutoencoderViT.random_masking = keep_visible
    encoder = import_module("models").build_sparse_encoder("hyspark", input_size=edge)
    decoder = import_module("models.decoder").LightDecoder(encoder.downsample_raito)
    return import_module("hyspark").HySparK(encoder, decoder, mask_ratio=0.75)


def keep_visible(_self: Any, tokens: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Visible tokens (b, v, c) of all (b, n, c), the mask (b, n, 1), and where each token goes back to (b, n, 1)."""
    mask = active.flatten(2).transpose(1, 2).int()
    order = (1 - mask).argsort(dim=1, stable=True)
    kept = order[:, : int(mask[0].sum())]
    return tokens.gather(1, kept.expand(-1, -1, tokens.shape[-1])), mask, order.argsort(dim=1)
