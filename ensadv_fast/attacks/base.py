"""The attack: what all attacks share, and the one loop that gradient attacks are."""
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from ..ops import checks, keys, memory
from ..ops.losses import RULES, choose_labels
from ..sources import cuda_graphs
from ..sources.base import BaseSource
from ..sources.source import as_source
from . import entropy


class AttackResult(NamedTuple):
    """x_adv, the labels the attack looked at (int64 [N]), and of the last forward pass it did anyway: the loss [N]
    and whether the attack's aim was met (bool [N]: the label left, or reached where targeted). That pass is the last
    step's first: of the point that nesterov, di and si make of the iterate, where they do."""

    x_adv: Tensor
    labels: Tensor
    loss: Tensor
    success: Tensor


@dataclass(frozen=True)
class BaseAttack(ABC):
    """What every attack is: a size, a label rule, a box, and a call. Sizes are in image units (8/255).

    eps: size of the ball. rule, targeted, loss, kappa: see :mod:`ensadv_fast.ops.losses`. lo, hi: the range of pixels.
    """

    name: str
    eps: float
    rule: str = "true"
    targeted: bool = False
    loss: str | None = "ce"
    kappa: float = 0.0
    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        op = self.name
        check_size(op, "eps", self.eps)
        checks.choice(op, "rule", self.rule, RULES)
        checks.number(op, "kappa", self.kappa)
        checks.bounds(op, self.lo, self.hi, torch.float32)

    @overload
    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: Literal[False] = False) -> Tensor: ...

    @overload
    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: Literal[True]) -> AttackResult: ...

    @overload
    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: bool) -> Tensor | AttackResult: ...

    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: bool = False) -> Tensor | AttackResult:
        """Adversarial examples for images x [N, ...] in [lo, hi].

        Args:
            source: a :class:`Source`, an :class:`Ensemble`, or a plain module, which is used as it is (in eval mode
                meanwhile) and left exactly as it was.
            x: float32, float16, bfloat16, float64, or uint8 (level / 255), on the source's device. Iterates are
                float32 (float64 for float64 x) and rounded once at the end.
            y: true labels int64 [N]; where absent the prediction on the clean x stands in.
            key: int64 [2]; the same key, the same result. Default: the next of the package's own stream.
            eps: overrides the attack's, a number or one per sample [N]; what was left None follows it.
            index: int64 [N] sample indices (positions in the data set): noise is a function of (key, index).
            out: written and returned where given; x's shape and dtype, or float32 for uint8 x.
            return_info: return an :class:`AttackResult` instead.

        Returns:
            x_adv of x's dtype (float32 for uint8 x) and memory format, without autograd history: within float32(eps)
            of x (strictly in 16 bits, plus 2^-24 in float32) and within [lo, hi].

        Raises:
            TypeError, ValueError: naming the argument, what came and what is wanted.
        """
        op = self.name
        source = as_source(source)
        x = checks.images(op, x)
        if x.device != source.device:
            raise ValueError(f"{op}: x must be on the model's device {source.device}, got {x.device}")
        if y is not None:
            y = checks.labels(op, "y", y, len(x), x.device)
        elif self.targeted and self.rule == "true":
            raise ValueError(f"{op}: targeted with rule 'true' needs y, the labels to reach")
        index = checks.index(op, index, len(x), x.device)
        if out is not None:
            checks.output(op, out, x, (torch.float32, x.dtype) if x.dtype == torch.uint8 else (x.dtype,))
        sizes = self._sizes(x, self.eps if eps is None else eps)
        key = self._key(source, key, x)
        if len(x) == 0:
            empty = torch.empty(0, device=x.device)
            x_adv = wide(x).to(memory.result_dtype(x)) if out is None else out
            return AttackResult(x_adv, empty.long(), empty, empty.bool()) if return_info else x_adv

        def work(x: Tensor, y: Tensor | None, sizes: Sizes, key: Tensor | None, index: Tensor | None,
                 out: Tensor | None) -> AttackResult | Tensor:
            start_key, label_key, craft_key = (None,) * 3 if key is None else keys.split(key, 3)
            if start_key is not None and label_key is not None:  # the third stays: generators are seeded from the host
                start_key, label_key = (k.to(x.device, non_blocking=True) for k in (start_key, label_key))
            with source.session(craft_key), torch.no_grad():
                result = self._worst_of(source, x, y, sizes, start_key, label_key, index, out)
                if isinstance(result, AttackResult):
                    return result
                if return_info:
                    return self._looked_at(source, x, y, result, label_key, index)
                return result

        if self.capturable:
            return cuda_graphs.run(source, self, work, x, y, sizes, key, index, out, return_info)
        result = work(x, y, sizes, key, index, out)
        return result if return_info or isinstance(result, Tensor) else result.x_adv

    def _key(self, source: BaseSource, key: Tensor | None, x: Tensor) -> Tensor | None:
        """The key, on the CPU or x's device; the package's next one only where anything is drawn."""
        if key is not None:
            at = torch.device("cpu") if isinstance(key, Tensor) and key.device.type == "cpu" else x.device
            return checks.key(self.name, key, at)
        draws = self.rule == "random" or source.crafting == "train" or self._draws
        return keys.next_key(x.device) if draws else None

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold the whole of `_worst_of`: does no value of a tensor decide what it does, and is there a
        result for every field?"""
        return False

    @property
    @abstractmethod
    def _draws(self) -> bool:
        """Does the attack itself draw anything?"""

    @abstractmethod
    def _sizes(self, x: Tensor, eps: float | Tensor) -> "Sizes":
        """The sizes of one call, checked, and whatever else the images' shape must be checked for."""

    @abstractmethod
    def _worst_of(self, source: BaseSource, x: Tensor, y: Tensor | None, sizes: "Sizes", start_key: Tensor | None,
                  label_key: Tensor | None, index: Tensor | None, out: Tensor | None) -> AttackResult | Tensor:
        """The whole work on checked arguments, in a session, for N >= 1. A tensor, x_adv: it looked at nothing."""

    def _looked_at(self, source: BaseSource, x: Tensor, y: Tensor | None, x_adv: Tensor, label_key: Tensor | None,
                   index: Tensor | None) -> AttackResult:
        """What an attack that looks at nothing says of itself where it is asked: by one forward pass, or two."""
        if y is None or self.rule != "true":
            y = choose_labels(source.logits(wide(x)), y, self.rule, label_key, index)
        loss, logits = self._losses(source, wide(x_adv), y)
        return AttackResult(x_adv, y, loss, self._met(logits, y))

    def _losses(self, source: BaseSource, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss [N], logits [N, C]) by one forward pass alone."""
        if self.loss == "entropy":
            logits = source.logits(x)
            return entropy.entropies(logits), logits
        return source.losses_unchecked(x, labels, self.loss or "ce", self.targeted, self.kappa)

    def _met(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels) == self.targeted


class Sizes(NamedTuple):
    """An attack's sizes for one call: numbers, or tensors [N] where eps is one. reach: of the neighbours of vt."""

    eps: float | Tensor
    start: float | Tensor
    step: float | Tensor
    steps: int
    reach: float | Tensor


def wide(x: Tensor) -> Tensor:
    """x as iterates are kept: the very tensor where it already is so."""
    return x if x.dtype in (torch.float32, torch.float64) else memory.widen(x)


@overload
def over(value: float, x: Tensor) -> float: ...


@overload
def over(value: Tensor, x: Tensor) -> Tensor: ...


def over(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one per sample [N] shaped to broadcast over x."""
    return value.view(-1, *[1] * (x.dim() - 1)) if isinstance(value, Tensor) else value


def check_size(op: str, name: str, value: object) -> None:
    if checks.number(op, name, value) < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
