"""CUDA without a GPU: tensors that have a shape, a type and a device, but no numbers.

What is computed from them is fake too, and torch refuses to mix devices or types as it would on a GPU. Real tensors
stay real on the CPU, so that masks keep their geometry, and become fake when something moves them to CUDA. The forward
pass alone can be done: torch's backward pass wants threads of a real device. Nothing that Python asks a fake tensor for
as a number (`item`, a boolean index) can be answered.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hyspark.models.recompute import recomputed

DEVICE = torch.device("cuda:0")

READ = ("num_batches_tracked", "bank_ptr", "class_weight")
"""Buffers that libraries read as numbers: batches that a norm has seen, keys in lightly's queue, MONAI's weights of
classes. They stay real.
"""


class OnFakeDevice(TorchFunctionMode):
    """Inside the block, what is put on CUDA, or made from what lies there, is a fake tensor."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__deepcopy__:  # its other argument holds what was copied before
            return again(args[0], args[0].clone())
        if func is recomputed:  # its layers one by one: masks stay real
            function, *values = args

            def inside(*values):
                with self:
                    return function(*values)

            return func(inside, *values, **kwargs)
        if any(is_cuda(value) for value in tree_leaves((args, kwargs))):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def is_cuda(value):
    """Whether an argument lies on the device or names it."""
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, FakeTensor) or (isinstance(value, torch.device) and value.type == "cuda")


@contextmanager
def fake_cuda():
    """A machine with a GPU, as far as autocast, modules and the generators of random numbers ask."""
    state = torch.zeros(16, dtype=torch.uint8)
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.get_rng_state", return_value=state),
        mock.patch("torch.cuda.set_rng_state"),
        mock.patch.object(nn.Module, "to", move),
        OnFakeDevice(),
    ):
        yield


def move(module, device=None, memory_format=None):
    """`nn.Module.to` with new weights in place of the old ones, since fake and real tensors cannot change places."""
    moved = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is None or name in READ:
                    continue
                if id(x) not in moved:
                    moved[id(x)] = x, moved_tensor(x, device or x.device, memory_format)
                tensors[name] = moved[id(x)][1]
    return module


def moved_tensor(x, device, memory_format):
    """A weight or buffer, on a device and in a memory format where it has the axes for it."""
    fits = memory_format is not None and x.ndim == {torch.channels_last: 4, torch.channels_last_3d: 5}[memory_format]
    return again(x, x.to(device, memory_format=memory_format if fits else torch.preserve_format))


def again(x, new):
    """A new tensor that is a weight where x is one."""
    return nn.Parameter(new.detach(), x.requires_grad) if isinstance(x, nn.Parameter) else new.detach()


def check_fake(x, dtype=torch.float32, shape=()):
    """The tensor is a fake one on CUDA."""
    assert isinstance(x, FakeTensor)
    assert (x.device, x.dtype, tuple(x.shape)) == (DEVICE, dtype, tuple(shape))
