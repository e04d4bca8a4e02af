"""BatchNorm over all processes, on CPUs too."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class AllReduceSum(torch.autograd.Function):
    """Sum of a tensor over all processes; gradients flow back to each of them.

    torch.distributed.nn.functional.all_reduce computes the same values and gradients. It is deprecated (FutureWarning
    in torch 2.14) in favour of a private module, torch.distributed._functional_collectives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return AllReduceSum.forward(ctx, grad)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of the global batch, on any device: (b, c, *size) -> same.

    Its children are applied after it, in their order.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"input of BatchNorm: expected (b, c, *size), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        out = self.normalise(input) if self.training else super().forward(input)
        for child in self.children():
            out = child(out)
        return out

    def normalise(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of the global batch, and update the running statistics."""
        axes = [0, *range(2, input.ndim)]
        shape = (1, -1, *(1,) * (input.ndim - 2))
        x = input.float()
        count = x.new_tensor([x.numel() / x.shape[1]])
        total = AllReduceSum.apply(torch.cat([x.sum(axes), count]))
        num = total[-1].detach()
        mean = total[:-1] / num
        centred = x - mean.view(shape)
        variance = AllReduceSum.apply(centred.square().sum(axes)) / num
        self.update_running_statistics(mean.detach(), variance.detach() * (num / (num - 1)))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, if any, as torch's BatchNorm does.

        Without a momentum they are means over all batches.
        """
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance, weight)


def global_batch_norm(norm: nn.modules.batchnorm._BatchNorm) -> GlobalBatchNorm:
    """Convert a BatchNorm to statistics of the global batch, with dropout and activation of timm's BatchNormAct2d."""
    new = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, child in norm.named_children():
        new.add_module(name, child)
    new.load_state_dict(norm.state_dict())
    return new.requires_grad_(all(p.requires_grad for p in norm.parameters()))


def synchronise_batch_norms(module: nn.Module, convert: Callable[[Any], nn.Module]) -> None:
    """Replace every BatchNorm by `convert(norm)`, preserving names, weights and statistics.

    The network of a PyramidEncoder is unchanged: there the context of the mask computes and reduces the statistics.
    """
    from hyspark.models.spark import PyramidEncoder  # takes seconds, and processes meet before they build networks

    for name, child in module.named_children():
        if isinstance(child, PyramidEncoder):
            child.all_reduce = AllReduceSum.apply
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            module.add_module(name, convert(child))
        else:
            synchronise_batch_norms(child, convert)
