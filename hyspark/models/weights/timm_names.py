"""Rename published tensors to those of a timm network by timm's own readers: DINOv2, CLIP, BEiT, SAM, Swin, ConvNeXt.

Authors publish their networks under other names than timm's, or for images of another size. The readers are those that
timm applies to files of its own hub: `checkpoint_filter_fn` of a network's module.
"""

import inspect
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from hyspark.models.weights.files import strip_wrappers

TIMM_READERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
"""Names of the readers in the modules of timm."""


class Renamed(NamedTuple):
    """Tensors of a file by a network's names.

    Attributes:
        tensors: the tensors; those that the reader dropped keep their names.
        adapted: how a value was changed, by its new name.
        names: the file's names, by the new ones that differ.
        dropped: names of tensors that the reader does not read.
    """

    tensors: Mapping[str, Tensor]
    adapted: Mapping[str, str]
    names: Mapping[str, str]
    dropped: frozenset[str] = frozenset()


def rename_by_timm(given: Mapping[str, Tensor], model: nn.Module, prefixes: Iterable[str]) -> list[Renamed]:
    """Rename the tensors of a file by the reader of a timm network, below each of some prefixes.

    Args:
        given: state dict of the file.
        model: the network, or one that contains it.
        prefixes: prefixes of the network in the file that may be.

    Returns:
        Ways of naming that the reader gives; none if the network is not of timm or has no reader.
    """
    part, reader = find_reader(model)
    if reader is None:
        return []
    ways = []
    for prefix in dict.fromkeys(prefixes):
        below = {strip_wrappers(key): key for key in given}
        below = {rest.removeprefix(prefix): key for rest, key in below.items() if rest.startswith(prefix)}
        for options in reader_options(reader):
            try:
                with quiet_timm():
                    found = reader({rest: given[key] for rest, key in below.items()}, part, **options)
            except Exception:  # a reader of timm takes its own files for granted: these are others
                continue
            if all(isinstance(value, Tensor) for value in found.values()):
                ways.append(describe_renaming(given, below, found))
    return ways


def reader_options(reader: Callable[..., Any]) -> list[dict[str, bool]]:
    """List the options to try a reader with: its defaults, and the names of DeiT III."""
    option = "adapt_layer_scale"
    return [{}, {option: True}] if option in inspect.signature(reader).parameters else [{}]


def describe_renaming(given: Mapping[str, Tensor], below: Mapping[str, str], found: Mapping[str, Tensor]) -> Renamed:
    """Compare what a reader returned with the tensors of the file.

    Args:
        given: state dict of the file.
        below: its keys by their names, as the reader got them.
        found: what the reader returned.
    """
    sources = {storage_of(value): key for key, value in given.items()}
    adapted, names = {}, {}
    for key, value in found.items():
        source = sources.get(storage_of(value), below.get(key))
        if source is not None:
            names[key] = source
        old = None if source is None else given[source]
        if old is None or (storage_of(old) != storage_of(value) and not same_values(old, value)):
            what = "computed from the file's tensors"
            if old is not None and old.shape != value.shape:
                what = f"{tuple(old.shape)} resampled to {tuple(value.shape)}"
            adapted[key] = f"{what}, by timm"
    beside = {key: value for key, value in given.items() if key not in names.values()}
    return Renamed({**found, **beside}, adapted, names, frozenset(beside.keys() & set(below.values())))


def find_reader(model: nn.Module) -> tuple[nn.Module, Callable[..., dict[str, Any]] | None]:
    """Find the network of timm in a module, and timm's reader of its published weights."""
    for part in model.modules():
        about = getattr(part, "pretrained_cfg", None)
        name = about.get("architecture") if isinstance(about, Mapping) else None
        if name and timm.is_model(name):
            home = sys.modules[timm.model_entrypoint(name).__module__]
            return part, next((found for reader in TIMM_READERS if (found := getattr(home, reader, None))), None)
    return model, None


def storage_of(value: Tensor) -> int:
    """Return the address of a tensor's numbers, which its views share."""
    return value.untyped_storage().data_ptr() if value.layout is torch.strided else id(value)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and numbers."""
    return one.shape == other.shape and bool((one == other).all())


@contextmanager
def quiet_timm() -> Iterator[None]:
    """Keep timm from logging, printing and warning about its conversions."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of torch, on how timm interpolates
            yield
    finally:
        logger.setLevel(level)
