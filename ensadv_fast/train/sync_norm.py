"""Batch normalisation over the batches of all ranks."""
from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm


class _Quiet(_BatchNorm):
    """Communicates in training's forward passes only, not while an attack crafts.

    Crafting is in eval mode, or in train mode with running statistics off: then by the statistics of this rank's own
    batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            return self.normalise_synced(x)
        mean, var = (None, None) if self.training else (self.running_mean, self.running_var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, mean is None, 0.0, self.eps)

    def normalise_synced(self, x: Tensor) -> Tensor:
        """x normalised by the statistics of all ranks' batches."""
        raise NotImplementedError

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class CudaNorm(_Quiet, nn.SyncBatchNorm):
    """torch's own, which works on GPUs only."""

    def normalise_synced(self, x: Tensor) -> Tensor:
        return nn.SyncBatchNorm.forward(self, x)


class HostNorm(_Quiet):
    """The same on the CPU, where DistributedDataParallel refuses torch's class."""

    def normalise_synced(self, x: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (x.dim() - 2)]
        axes = [d for d in range(x.dim()) if d != 1]
        wide = x.double()  # mean of squares minus square of the mean cancels: float32 has too few digits for it
        sums = _Sum.apply(torch.cat([wide.sum(axes), (wide * wide).sum(axes),
                                     wide.new_tensor([x.numel() / x.shape[1]])]))
        n = sums[-1].detach()
        mean, square = (sums[:-1] / n).chunk(2)
        var = (square - mean * mean).clamp(min=0)
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None and running_var is not None and batches is not None
        with torch.no_grad():
            batches.add_(1)
            momentum = 1.0 / float(batches) if self.momentum is None else self.momentum
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * n / (n - 1).clamp(min=1)).to(running_var.dtype), momentum)
        y = ((wide - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)).to(x.dtype)
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


class _Sum(Function):
    """The sum over ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


def convert(model: nn.Module) -> nn.Module:
    """`model` with synchronised layers in place of its batch normalisations; names and weights stay. TypeError for a
    layer that does more than normalise."""
    for name, m in model.named_modules():
        if isinstance(m, _BatchNorm) and type(m) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise TypeError(f"train: {name} must be a plain batch normalisation for --sync-bn, got a "
                            f"{type(m).__name__}")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for m in model.modules():
        if type(m) is nn.SyncBatchNorm:
            cuda = m.running_mean is not None and m.running_mean.is_cuda
            cast(Any, m).__class__ = CudaNorm if cuda else HostNorm
    return model
