"""BatchNorm over all processes, on CPUs too."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyspark.models.spark import PyramidEncoder


class AllReduceSum(torch.autograd.Function):
    """Sum of a tensor over all processes; gradients flow back to each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return AllReduceSum.forward(ctx, grad)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose statistics are those of the global batch, on any device: (b, c, *size) -> same. Its children, in
    their order, do what is done after it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (b, c, *size), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        out = self.normalised(input) if self.training else super().forward(input)
        for child in self.children():
            out = child(out)
        return out

    def normalised(self, input: Tensor) -> Tensor:
        """By the statistics of the global batch, which are remembered."""
        axes = [0, *range(2, input.ndim)]
        shape = (1, -1, *(1,) * (input.ndim - 2))
        x = input.float()
        count = x.new_tensor([x.numel() / x.shape[1]])
        total = AllReduceSum.apply(torch.cat([x.sum(axes), count]))
        num = total[-1].detach()
        mean = total[:-1] / num
        centred = x - mean.view(shape)
        variance = AllReduceSum.apply(centred.square().sum(axes)) / num
        self.remember(mean.detach(), variance.detach() * (num / (num - 1)))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def remember(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, where there are such, as torch's BatchNorm does: without a momentum they are
        means over all batches.
        """
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def global_batch_norm(norm: nn.modules.batchnorm._BatchNorm) -> GlobalBatchNorm:
    """The same with the statistics of the global batch, and with the dropout and activation that timm's BatchNormAct2d
    holds.
    """
    new = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, child in norm.named_children():
        new.add_module(name, child)
    new.load_state_dict(norm.state_dict())
    return new.requires_grad_(all(p.requires_grad for p in norm.parameters()))


def synchronise_batch_norms(module: nn.Module, shared: Callable[[Any], nn.Module]) -> None:
    """Put `shared(norm)` in the place of every BatchNorm, keeping names, weights and statistics. A pyramid's network
    stays as it is, which is what it is for: its statistics are taken, and shared, by the mask's context.
    """
    for name, child in module.named_children():
        if isinstance(child, PyramidEncoder):
            child.all_reduce = AllReduceSum.apply
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            module.add_module(name, shared(child))
        else:
            synchronise_batch_norms(child, shared)
