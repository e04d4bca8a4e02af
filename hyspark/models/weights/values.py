"""Check the values of weights before they are loaded: numbers of a precision that the network has, and finite."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_loaded(loaded: dict[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> None:
    """Check values that are to be loaded; sparse ones become dense.

    Args:
        loaded: values by the network's keys.
        wanted: state dict of the network.
        name: name of the file, for messages.

    Raises:
        ValueError: a value has no numbers, is quantised, or is not finite in the network's precision.
    """
    bad: dict[str, str] = {}
    for key, value in loaded.items():
        want = wanted[key]
        if value.is_meta:
            bad[key] = "the file has its shape but no numbers; it was saved from the meta device: save it anew"
        elif value.is_quantized or (want.is_floating_point() and not value.is_floating_point()):
            bad[key] = f"expected {want.dtype}, got {value.dtype}; it is quantised: use the weights before quantisation"
        else:
            loaded[key] = value = value.to_dense() if value.layout is not torch.strided else value
            num = int((~value.to(want.dtype).isfinite()).sum()) if want.is_floating_point() else 0
            if num:
                was_finite = bool(value.double().isfinite().all())
                bad[key] = f"{num} of {value.numel()} numbers are " + (
                    f"beyond the range of {want.dtype}; build the model in {value.dtype}"
                    if was_finite
                    else "not finite (NaN or infinite); its training diverged: use an earlier checkpoint"
                )
    if bad:
        key, why = next(iter(bad.items()))
        more = f" ({len(bad)} tensors in all: {', '.join(list(bad)[:3])}, ...)" if len(bad) > 1 else ""
        raise ValueError(f"{name}: {key}: {why}{more}")
