"""Two processes under a mask equal one: values, gradients and running statistics, in double precision.

The processes are threads that wait for one another's sums, each with its own forward and backward pass.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from hyspark.models.masking.context import hidden
from hyspark.models.masking.packed import packed


class Exchange:
    """Sums over two threads, whose gradients are sums, too."""

    def __init__(self):
        self.barrier, self.parts = threading.Barrier(2, timeout=60), [None, None]

    def of_rank(self, rank):
        def add(x):
            self.parts[rank] = x.detach()
            self.barrier.wait()
            total = self.parts[0] + self.parts[1]
            self.barrier.wait()
            return total

        class Sum(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return add(x)

            @staticmethod
            def backward(ctx, gradient):
                return add(gradient)

        return Sum.apply


def train(net, images, visible, compute, **options):
    """Gradients of a loss that adds over samples."""
    context = packed(visible, 32, **options) if compute == "packed" else hidden(visible, **options)
    with context:
        maps = net(context.pack(images) if compute == "packed" else images)
    maps = [context.unpack(x) for x in maps] if compute == "packed" else maps
    loss = sum(x.pow(3).sum() for x in maps)
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.parametrize("compute", ["packed", "masked"])
def test_two_processes_equal_one(compute):
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", features_only=True).double()
    images, visible = torch.rand(4, 3, 64, 64, dtype=torch.float64), torch.ones(4, 1, 2, 2, dtype=torch.bool)
    visible[:2, :, 0], visible[2:, :, 0, 0] = False, False  # the processes see different numbers of patches
    exchange, nets = Exchange(), [copy.deepcopy(net) for _ in range(2)]

    def run(rank):
        part = slice(2 * rank, 2 * rank + 2)
        return train(nets[rank], images[part], visible[part], compute, all_reduce=exchange.of_rank(rank))

    with ThreadPoolExecutor(2) as pool:
        found = [one + other for one, other in zip(*pool.map(run, range(2)), strict=True)]
    for one, other in zip(found, train(net, images, visible, compute), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
    for name, x in net.named_buffers():
        torch.testing.assert_close(nets[1].get_buffer(name), x)
