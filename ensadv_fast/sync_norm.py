"""Batch normalisation over the batches of all ranks."""
from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm


class SyncNorm(nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm that also works on the CPU, and that communicates with nobody while an attack crafts: in
    eval mode, and where crafting is in train mode (running statistics off), by this rank's own batch then."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.track_running_stats):
            running = (None, None) if self.training else (self.running_mean, self.running_var)
            return F.batch_norm(x, *running, self.weight, self.bias, running[0] is None, 0.0, self.eps)
        if x.is_cuda or not dist.is_initialized():
            return super().forward(x)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        axes = [d for d in range(x.dim()) if d != 1]
        wide = x.double()  # of sums of squares: one pass, no cancellation that float32 would see
        sums = torch.cat([wide.sum(axes), (wide * wide).sum(axes), wide.new_tensor([x.numel() / x.shape[1]])])
        sums = _Sum.apply(sums)
        n, (mean, square) = sums[-1].detach(), (sums[:-1] / sums[-1].detach()).chunk(2)
        var = square - mean * mean
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((var * n / (n - 1).clamp(min=1)).to(self.running_var.dtype), momentum)
        y = ((wide - mean.view(shape)) * (var.clamp(min=0) + self.eps).rsqrt().view(shape)).to(x.dtype)
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


class _Sum(Function):
    """The sum over ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


def convert(model: nn.Module) -> nn.Module:
    """`model` with SyncNorm in place of its batch normalisations; names and weights stay. TypeError for a layer that
    does more than normalise."""
    for name, m in model.named_modules():
        if isinstance(m, _BatchNorm) and type(m) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SyncNorm):
            raise TypeError(f"train: sync_bn: {name} is a {type(m).__name__}, want plain batch normalisations")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for m in model.modules():
        if type(m) is nn.SyncBatchNorm:
            m.__class__ = SyncNorm
    return model
