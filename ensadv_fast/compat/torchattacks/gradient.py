"""What the gradient attacks share: arguments, the choice between exact and fast, and the exact steps."""
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import attacks, ops
from ...ops.memory import broadcast, widen
from ...sources.base import for_autograd
from ...sources.source import Source
from .. import source_cache
from ..steps import linf_step
from .attack import Attack

Size = float | Tensor  # a number or, beyond the library, a tensor with one per sample, [N] or [N, 1, 1, 1]


class GradientAttack(Attack):
    """An attack along the gradient of the cross-entropy, its mean over the batch.

    eps, alpha: in image units; a number or, beyond the library, a tensor with one per sample. precision:
    "exact", "fast", or None for what :func:`ensadv_fast.compat.precision` chose.
    """

    norm = "linf"
    steps = 1

    def __init__(self, name: str, model: nn.Module, eps: Size, precision: str | None):
        super().__init__(name, model)
        self.precision = precision
        self.eps = eps

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]  # the library's signature
        """Adversarial images for float images [N, C, H, W] in [0, 1] and labels int64 [N]."""
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{self.attack}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if not images.is_floating_point():
            raise TypeError(f"{self.attack}: images must be float in [0, 1], got {images.dtype}")
        images, labels = (for_autograd(t.detach().to(self.device)) for t in (images, labels))
        if self.targeted:
            labels = self.get_target_label(images, labels)
        if self._is_fast:
            why = self._why_exact(images, labels)
            if why is None:
                return self._make_fast()(self._get_source(), images, labels)
            warnings.warn(f"{self.attack}: is exact, not fast, since {why}", stacklevel=4)
        iteration = Iteration(self, images, labels)
        return iteration.result(self._run_exact(iteration))

    def _run_exact(self, iteration: "Iteration") -> Tensor:
        """The library's own numbers, in the dtype of iterates."""
        raise NotImplementedError

    def _make_fast(self) -> attacks.Attack:
        """The same attack of :mod:`ensadv_fast.attacks`."""
        raise NotImplementedError

    def _why_exact(self, images: Tensor, labels: Tensor) -> str | None:
        """Why a source cannot do this call, or None."""
        if not isinstance(self.model, nn.Module):
            return "its model is no torch.nn.Module"
        if type(self).get_logits is not Attack.get_logits or "get_logits" in vars(self):
            return "get_logits is overridden"
        if self._model_training:
            return "it attacks the model in training mode"
        if images.dtype == torch.float64:
            return "its images are float64"
        if labels.dtype != torch.int64 or labels.dim() != 1:
            return "its labels are not int64 [N]"
        if isinstance(self.eps, Tensor) or isinstance(getattr(self, "alpha", None), Tensor):
            return "its sizes are tensors"
        return "it takes no step" if self.steps < 1 else None

    def _get_source(self) -> Source:
        return source_cache.get_source(self.model, **(self.normalization_used or {}))


class Iteration:
    """One exact call of an attack, from iterate to iterate.

    images: in the dtype that the model sees. clean: the same in the dtype of iterates, float32 for 16-bit images. eps,
    alpha: numbers, or tensors that broadcast over the images.
    """

    def __init__(self, attack: GradientAttack, images: Tensor, labels: Tensor):
        self.attack, self.images, self.labels = attack, images, labels
        self.clean = widen(images)
        self.eps = broadcast_size(attack.eps, self.clean)
        self.alpha = broadcast_size(getattr(attack, "alpha", 0.0), self.clean)
        self._free: Tensor | None = None

    def draw_uniform(self, reach: Size, like: Tensor) -> Tensor:
        """U(-reach, reach) in the dtype of iterates, drawn into `like` as the library does."""
        if isinstance(reach, Tensor):
            return like.uniform_(-1, 1).to(self.clean.dtype) * reach
        return like.uniform_(-reach, reach).to(self.clean.dtype)

    def start_uniformly(self) -> Tensor:
        """A point uniform in the ball around the images, clipped."""
        return self.draw_uniform(self.eps, torch.empty_like(self.images)).add_(self.clean).clamp_(0, 1)

    def gradient(self, point: Tensor, view: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The gradient of the cross-entropy by the point; where targeted, of its negative. view: what is done to the
        point before the model sees it."""
        with torch.enable_grad():
            leaf = point.detach().to(self.images.dtype).requires_grad_()
            cost = F.cross_entropy(self.attack.get_logits(leaf if view is None else view(leaf)), self.labels)
            (grad,) = torch.autograd.grad(-cost if self.attack.targeted else cost, leaf)
        return grad.to(self.clean.dtype)

    def sign_step(self, point: Tensor, along: Tensor) -> Tensor:
        """clamp(x + clamp(point + alpha sign(along) - x, -eps, eps), 0, 1), in the library's order, which rounds
        otherwise than our kernel's.

        `point` is overwritten by a later step, unless it is x itself: do not use it afterwards.
        """
        out = torch.empty_like(self.clean) if self._free is None else self._free
        linf_step(out, point, along, self.alpha, self.clean, self.eps).clamp_(0, 1)
        self._free = None if point is self.clean else point
        return out

    def result(self, point: Tensor) -> Tensor:
        """The point in the images' dtype, rounded within eps for 16-bit images. Never the images themselves."""
        if point.dtype != self.images.dtype:
            return ops.project(point, self.clean, flatten_size(self.eps), norm=self.attack.norm,
                               out=torch.empty_like(self.images))
        return point.clone() if point is self.images else point


def broadcast_size(value: Size, x: Tensor) -> Size:
    """A size as a number, or one per sample shaped to broadcast over x."""
    if not isinstance(value, Tensor) or not value.dim():
        return float(value)
    if value.numel() != len(x):
        raise ValueError(f"eps and alpha must be numbers or have one element per sample, {len(x)}, "
                         f"got shape {tuple(value.shape)}")
    return broadcast(value.to(x.device, x.dtype).flatten(), x)


def flatten_size(value: Size) -> Size:
    """A size in the form that our ops take: a number, or a tensor [N]."""
    return value.flatten() if isinstance(value, Tensor) else value
