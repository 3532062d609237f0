"""What attacks ask of a source: one model, or several fused into one."""
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..ops import checks, keys
from ..ops.losses import LOSSES, RULES, Objective, OwnLoss
from .first_look import DONE, FirstLook

_Given = TypeVar("_Given", Tensor, Tensor | None)


class InputGrad(NamedTuple):
    """What one forward and backward pass of a source gives.

    grad: gradient of the loss by the images, times scale, shape of x. labels: int64 [N], those chosen. loss: [N].
    logits: [N, C]. scale: [N], a power of two per sample; grad / scale is the true gradient.
    """

    grad: Tensor
    labels: Tensor
    loss: Tensor
    logits: Tensor
    scale: Tensor


class ReplayCache(Protocol):
    """The CUDA graphs of the attacks on a source (:class:`ensadv_fast.sources.cuda_graphs.Replays`).

    allowed: False: never; "auto": where an attack recurs and can be captured; True: always, or an error."""

    device: torch.device
    allowed: bool | str


class BaseSource(ABC):
    """What every source is: it has a device and a mode of crafting, and gives logits and input gradients."""

    device: torch.device
    crafting: str
    replays: ReplayCache | None = None  # None: it is never captured
    look: FirstLook = DONE  # at the first batch of attacks
    follows: bool = False  # the device is unknown before images come, as that of a lambda: it is theirs

    def check_device(self, op: str, x: Tensor) -> None:
        """ValueError where images x are not on the source's device."""
        if x.device != self.device:
            if not self.follows:
                raise ValueError(f"{op}: x must be on the model's device {self.device}, got {x.device}")
            self.device = x.device

    @abstractmethod
    def session(self, key: Tensor | None = None) -> AbstractContextManager["BaseSource"]:
        """The state in which this source computes; restored on leaving, also by an exception. Sessions nest.

        `key`: what the generators of dropout are forked from where crafting is "train".
        """

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Logits [N, C] of images x; differentiable where autograd records."""

    @abstractmethod
    def losses_unchecked(self, x: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """(loss [N], logits [N, C]) of images x and these labels by one forward pass alone, in a session."""

    @abstractmethod
    def input_grad_unchecked(self, x: Tensor, labels: Tensor | None, objective: Objective, *,
                             key: Tensor | None = None, index: Tensor | None = None,
                             rescale: bool = True) -> InputGrad:
        """:meth:`input_grad` for callers that checked the arguments and hold a session."""

    def input_grad(self, x: Tensor, labels: Tensor | None = None, *, rule: str = "true", targeted: bool = False,
                   loss: str | OwnLoss = "ce", kappa: float = 0.0, key: Tensor | None = None,
                   index: Tensor | None = None, rescale: bool = True) -> InputGrad:
        """Gradient by the images of the summed loss, with the labels chosen from the same forward pass.

        Args:
            x: images [N, ...] in [0, 1], float, on the source's device.
            labels: integers or bools [N] or [N, 1], or None: then the prediction stands in for the true label.
            rule, targeted, loss, kappa: see :func:`ensadv_fast.ops.losses.choose_labels` and
                :func:`ensadv_fast.ops.losses.sample_losses`. loss may be a callable (logits [N, ...], labels) -> [N],
                and labels are then whatever it takes.
            key, index: for rule "random" and for crafting "train".
            rescale: multiply each sample's gradient by a power of two that keeps any dtype from underflow.

        Works inside torch.no_grad and inference_mode; computes no gradient of any parameter and touches no .grad.
        """
        op = "input_grad"
        x = checks.images(op, x, checks.FLOATS)
        checks.choice(op, "rule", rule, RULES)
        if not callable(loss):
            checks.choice(op, "loss", loss, LOSSES)
        checks.number(op, "kappa", kappa)
        self.check_device(op, x)
        if labels is not None and not callable(loss):
            labels = checks.labels(op, "labels", labels, len(x), x.device)
        index = checks.index(op, index, len(x), x.device)
        if rule == "random":
            key = checks.key(op, keys.next_key(x.device) if key is None else key, x.device)
        with self.session(key):
            return self.input_grad_unchecked(x, labels, Objective(rule, targeted, loss, kappa), key=key, index=index,
                                             rescale=rescale)


def check_differentiable(outputs: Tensor) -> None:
    """ValueError where no gradient flows through outputs of a model."""
    if not outputs.requires_grad:
        raise ValueError(_NO_GRADIENT)


def gradient(leaf: Tensor, outputs: Tensor, start: Tensor) -> Tensor:
    """Gradient of sum(start * outputs) by the images `leaf`, and by no other tensor. ValueError where none reaches
    them."""
    check_differentiable(outputs)
    try:
        (grad,) = torch.autograd.grad(outputs, leaf, start.to(outputs.dtype), allow_unused=True)
    except RuntimeError as e:
        if "use_reentrant" not in str(e):
            raise
        raise RuntimeError("Source: model must checkpoint with use_reentrant=False, or not at all while it is "
                           "attacked: torch.utils.checkpoint(..., use_reentrant=True) gives gradients to all "
                           "parameters only, and an attack needs those of the images alone") from e
    if grad is None:
        raise ValueError(_NO_GRADIENT)
    return grad


_NO_GRADIENT = ("attack: source must let a gradient reach x, got logits that none flows through: its forward pass runs "
                "under no_grad or inference_mode, detaches, rounds, or computes in integers or outside PyTorch")


def for_autograd(t: _Given) -> _Given:
    """Tensors made in inference mode cannot take part in a backward pass; their copies can."""
    return t.clone() if isinstance(t, Tensor) and t.is_inference() else t
