"""Recomputing in the backward pass changes memory alone: not the gradients, not the running statistics, and no
convolution is done twice.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hyspark.models.recompute import recomputed


class CountConvolutions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def make_step():
    torch.manual_seed(0)
    norm = nn.BatchNorm3d(4)
    return norm, nn.Conv3d(4, 5, 3)


@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_statistics_are_those_of_the_plain_call(training):
    x = torch.randn(2, 4, 5, 5, 5, requires_grad=True)
    results = []
    for call in (
        lambda function, x, _norm: function(x),
        lambda function, x, norm: recomputed(function, x, batch_norm=norm),
    ):
        norm, conv = make_step()
        norm.train(training)
        out = call(lambda x, norm=norm, conv=conv: conv(norm(x).relu_()), x, norm)
        gradients = torch.autograd.grad(out.square().sum(), (x, *norm.parameters(), *conv.parameters()))
        results.append([out, *gradients, *norm.buffers()])
        assert norm.momentum == 0.1
        assert norm.num_batches_tracked == training
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_graph_that_is_retained_is_recomputed_for_each_backward_pass():
    norm, conv = make_step()
    x = torch.randn(2, 4, 5, 5, 5, requires_grad=True)
    total = recomputed(lambda x: conv(norm(x).relu_()), x, batch_norm=norm).square().sum()
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert norm.num_batches_tracked == 1


def test_only_the_arguments_are_kept():
    norm, conv = make_step()
    x = torch.randn(2, 4, 5, 5, 5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        recomputed(lambda x: conv(norm(x).relu_()), x, batch_norm=norm)
    assert all(t.data_ptr() == x.data_ptr() for t in kept if t.numel())  # torch 2.6 keeps empty ones


def test_no_convolution_of_a_training_step_is_computed_twice(make_hyspark, make_visible):
    net, visible = make_hyspark(), make_visible(1, (2, 2, 2))
    volumes = torch.rand(1, 1, 32, 32, 32)
    with CountConvolutions() as forward:
        loss = net(volumes, visible).loss
    with CountConvolutions() as backward:
        loss.backward()
    pointwise = 2 * sum(encoder_depth for encoder_depth in (1, 1, 3, 3, 1))
    assert forward.count > 30
    assert backward.count <= pointwise  # these are recomputed, being cheap


def test_without_gradients_nothing_is_wrapped(make_hyspark, make_visible):
    with torch.no_grad():
        out = make_hyspark()(torch.rand(1, 1, 32, 32, 32), make_visible(1, (2, 2, 2)))
    assert out.loss.grad_fn is None
