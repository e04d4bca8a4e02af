"""Faults of third-party networks in one line: which network, which of its modules, why, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

from hyspark.utils.free_memory import is_out_of_memory
from hyspark.utils.text import first_line

ATTENTION = re.compile(r"Attention|Attn|MultiQuery|Transformer|Mixer")
"""Names of the classes of modules that mix all positions."""
CHANNEL_ATTENTION = re.compile(r"Channel|Spatial|Split|Kernel|Radix|Cbam|Squeeze|Eca|Gather|Pool")
"""Names of classes with attention over channels, which runs under a mask."""
SINGLE_POSITION = "Expected more than 1 spatial element"
"""Part of torch's message on an InstanceNorm of one position."""


class UnsupportedNetworkError(ValueError, NotImplementedError):
    """A network that cannot be built, or does not compute what is asked."""


@contextmanager
def explain_faults(network: nn.Module, task: str) -> Iterator[None]:
    """Turn any fault of a network inside the block into one line.

    Args:
        network: the network.
        task: what it does inside the block.

    Raises:
        UnsupportedNetworkError: the network raised an error.
    """
    try:
        yield
    except UnsupportedNetworkError:
        raise
    except Exception as error:  # third-party networks raise any type
        if is_out_of_memory(error):
            raise
        raise UnsupportedNetworkError(describe_fault(network, error, task)) from error


def describe_fault(network: nn.Module, error: Exception, task: str) -> str:
    """Describe where in a network an error arose, and why."""
    where = failing_module(network, error.__traceback__)
    text = first_line(error)[:300].rstrip(".") if str(error).strip() else ""
    is_plain = isinstance(error, NotImplementedError | ValueError | AssertionError) and text
    reason = text if is_plain else f"{type(error).__name__}: {text}" if text else type(error).__name__
    attention = find_attention(network)
    hint = f"; it has attention ({attention}), which mixes all positions" if attention else ""
    if SINGLE_POSITION in text:
        hint += "; its deepest map has one position, so enlarge the crop"
    return f"{type(network).__name__} does not {task}: {where}{reason}{hint}"


def failing_module(network: nn.Module, traceback: TracebackType | None) -> str:
    """Name the innermost module of a network in a traceback, with its class and a colon; empty if there is none."""
    names = {id(module): name for name, module in network.named_modules()}
    found = ""
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = f"module {names[id(module)]} ({type(module).__name__}): "
        traceback = traceback.tb_next
    return found


def find_attention(network: nn.Module) -> str:
    """Name the first module of a network that is attention over positions, with its class; empty if there is none."""
    for name, module in list(network.named_modules())[1:]:
        kind = type(module).__name__
        if ATTENTION.search(kind) and not CHANNEL_ATTENTION.search(kind):
            return f"{name}, {kind}"
    return ""


def check_runs(network: nn.Module, images: Tensor) -> None:
    """Run a network once in evaluation mode.

    Raises:
        UnsupportedNetworkError: it raised an error.
    """
    was_training = network.training
    network.eval()
    with explain_faults(network, f"run on images of {' x '.join(map(str, images.shape[1:]))}"), torch.no_grad():
        network(images)
    network.train(was_training)
