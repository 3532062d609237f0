"""What all attacks share: their sizes and rules, and what a call is checked for."""
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import ops
from ..ops import checks, memory
from ..ops.keys import next_key
from ..ops.losses import RULES, Objective, OwnLoss, choose_labels
from ..sources import cuda_graphs
from ..sources.base import BaseSource
from ..sources.source import as_source
from . import entropy
from .request import AttackResult, Budget, Keys, Request, empty_result

_EPS_UNITS = "the range of pixels; sizes are in its units: 8 / 255, not 8, for images in [0, 1]"


@dataclass(frozen=True)
class BaseAttack(ABC):
    """What every attack is: a size, a label rule, a box, and a call. Sizes are in image units (8/255).

    eps: size of the ball. rule, targeted, loss, kappa: see :mod:`ensadv_fast.ops.losses`. lo, hi: the range of pixels.
    """

    name: str
    eps: float
    rule: str = "true"
    targeted: bool = False
    loss: str | OwnLoss | None = "ce"
    kappa: float = 0.0
    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        op = self.name
        for name in ("eps", "lo", "hi"):
            self._one_number(name)
        checks.size(op, "eps", self.eps)
        checks.choice(op, "rule", self.rule, RULES)
        checks.number(op, "kappa", self.kappa)
        checks.bounds(op, self.lo, self.hi, torch.float32)
        if self.norm == "linf":
            checks.at_most(op, "eps", self.eps, self.hi - self.lo, _EPS_UNITS)

    def _one_number(self, name: str) -> None:
        """The field `name` as a number, where it is a tensor of one; TypeError that says what to do with more."""
        value = getattr(self, name)
        if isinstance(value, Tensor) and value.dim() == 0:
            object.__setattr__(self, name, value.item())  # the attack is frozen, and stays hashable
        elif isinstance(value, Tensor | tuple | list):
            way = ("sizes per sample are given at the call, attack(source, x, y, eps=...)" if name == "eps" else
                   "for bounds per channel, of normalised images, give images in [0, 1] and declare the normalisation, "
                   "Source(model, mean=..., std=...)")
            raise TypeError(f"{self.name}: {name} must be a number, got a {type(value).__name__}: {way}")

    @property
    def norm(self) -> str:
        """Of the ball: "linf" or "l2". An attack that has it as a field says so itself."""
        return "linf"

    @overload
    def __call__(self, source: BaseSource | Callable[[Tensor], Any], x: Tensor, y: Any = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: Literal[False] = False) -> Tensor: ...

    @overload
    def __call__(self, source: BaseSource | Callable[[Tensor], Any], x: Tensor, y: Any = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: Literal[True]) -> AttackResult: ...

    @overload
    def __call__(self, source: BaseSource | Callable[[Tensor], Any], x: Tensor, y: Any = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: bool) -> Tensor | AttackResult: ...

    def __call__(self, source: BaseSource | Callable[[Tensor], Any], x: Tensor, y: Any = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: bool = False) -> Tensor | AttackResult:
        """Adversarial examples for images x [N, ...] in [lo, hi].

        Args:
            source: a :class:`Source`, an :class:`Ensemble`, or a plain module, which is used as it is (in eval mode and
                its own dtype) and left exactly as it was; or another callable from images to logits.
            x: float32, float16, bfloat16, float64, or uint8 (level / 255), on the source's device. Iterates are
                float32 (float64 for float64 x) and rounded once at the end.
            y: true labels, integers or bools [N] or [N, 1]; where absent the prediction on the clean x stands in. For a
                callable loss: whatever that takes.
            key: int64 [2]; the same key, the same result. Default: the next of the package's own stream.
            eps: overrides the attack's, a number or one per sample ([N], [N, 1, 1, 1]); what was left None follows it.
            index: int64 [N] sample indices (positions in the data set): noise is a function of (key, index).
            out: written and returned where given; x's shape and dtype, or float32 for uint8 x.
            return_info: return an :class:`AttackResult` instead.

        Returns:
            x_adv of x's dtype (float32 for uint8 x) and memory format, without autograd history: within float32(eps)
            of x (strictly in 16 bits, plus 2^-24 in float32) and within [lo, hi].

        Raises:
            TypeError, ValueError: naming the argument, what came and what is wanted.
        """
        source = as_source(source)
        request = self._request(source, x, y, key, eps, index, out)
        result: AttackResult | Tensor
        if not len(request.x):
            result = empty_result(memory.widen(request.x).to(memory.result_dtype(request.x)) if out is None else out)
        elif self.capturable:
            return cuda_graphs.run(source, self, self._crafted, request, return_info)
        else:
            result = self._crafted(source, request, return_info)
        return result if return_info or isinstance(result, Tensor) else result.x_adv

    def _request(self, source: BaseSource, x: Tensor, y: Any, key: Tensor | None,
                 eps: float | Tensor | None, index: Tensor | None, out: Tensor | None) -> Request:
        """The call's arguments, checked."""
        op = self.name
        x = checks.images(op, x)
        source.check_device(op, x)
        if not source.look.images:
            source.look.at_images(op, x, self.lo, self.hi)
        if callable(self.loss):
            y = y.detach() if isinstance(y, Tensor) else y
        elif y is not None:
            y = checks.labels(op, "y", y, len(x), x.device)
        if y is None and self.targeted and self.rule == "true":
            raise ValueError(f"{op}: y must be the labels to reach, since targeted is True and rule 'true', got None")
        index = checks.index(op, index, len(x), x.device)
        if out is not None:
            checks.output(op, out, x, (torch.float32, x.dtype) if x.dtype == torch.uint8 else (x.dtype,))
        sizes = self._sizes(x, self.eps if eps is None else eps)
        return Request(x, y, self._key(source, key, x), index, sizes, out)

    def _crafted(self, source: BaseSource, request: Request, info: bool = True) -> AttackResult | Tensor:
        """The whole work of a checked call, for N >= 1: a function of the request, the attack and the source alone.

        A tensor, x_adv, where the attack looked at nothing and `info` is not asked for."""
        keys = request.split_key()
        with source.session(keys.crafting), torch.no_grad():
            result = self._worst_of(source, request, keys)
            return self._looked_at(source, request, keys, result) if info and isinstance(result, Tensor) else result

    def _key(self, source: BaseSource, key: Tensor | None, x: Tensor) -> Tensor | None:
        """The key, on the CPU or x's device; the package's next one only where anything is drawn."""
        if key is not None:
            at = torch.device("cpu") if isinstance(key, Tensor) and key.device.type == "cpu" else x.device
            return checks.key(self.name, key, at)
        draws = self.rule == "random" or source.crafting == "train" or self._draws_noise
        return next_key(x.device) if draws else None

    @cached_property
    def objective(self) -> Objective:
        """rule, targeted, loss and kappa."""
        return Objective(self.rule, self.targeted, self.loss, self.kappa)

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold the whole work? No value of a tensor may decide what it does, and there must be a
        result for every field."""
        return False

    @property
    @abstractmethod
    def _draws_noise(self) -> bool:
        """Does the attack itself draw anything?"""

    @abstractmethod
    def _sizes(self, x: Tensor, eps: float | Tensor) -> tuple:
        """The sizes of one call, checked, and whatever else the images' shape must be checked for."""

    @abstractmethod
    def _worst_of(self, source: BaseSource, request: Request, keys: Keys) -> AttackResult | Tensor:
        """The work in a session. A tensor, x_adv: the attack looked at nothing."""

    def _looked_at(self, source: BaseSource, request: Request, keys: Keys, x_adv: Tensor) -> AttackResult:
        """What an attack that looks at nothing says of itself where it is asked: by one forward pass, or two."""
        y = request.y
        if y is None or self.rule != "true":
            y = choose_labels(source.logits(memory.widen(request.x)), y, self.rule, keys.labels, request.index)
        loss, logits = self._losses(source, memory.widen(x_adv), y)
        return AttackResult(x_adv, y, loss, self.succeeded(logits, y))

    def _losses(self, source: BaseSource, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss [N], logits [N, C]) by one forward pass alone."""
        if self.loss == "entropy":
            logits = source.logits(x)
            return entropy.entropies(logits), logits
        # An attack without a loss says what cross-entropy is.
        return source.losses_unchecked(x, labels, self.objective if self.loss else Objective(targeted=self.targeted))

    def succeeded(self, logits: Tensor, labels: Tensor) -> Tensor:
        """bool [N]: is the label left (targeted: reached) by the prediction from logits [N, C]?

        With a callable loss the labels may be multi-hot, like the logits: then, is any of them left (all reached) by
        the signs of the logits? Of other labels no success is known: False.
        """
        if callable(self.loss):
            return self._own_success(logits, labels)
        return (logits.argmax(1) == labels) == self.targeted

    def _own_success(self, logits: Tensor, labels: Any) -> Tensor:
        n = len(logits)
        if isinstance(labels, Tensor) and logits.dim() == 2 and labels.shape == (n,) and logits.shape[1] > 1:
            return (logits.argmax(1) == labels) == self.targeted
        if isinstance(labels, Tensor) and labels.shape == logits.shape:
            return ((logits > 0) == (labels > 0.5)).flatten(1).all(1) == self.targeted
        return torch.zeros(n, dtype=torch.bool, device=logits.device)

    def _budget(self, x: Tensor, eps: float | Tensor) -> Budget:
        # No step in the L2 ball is longer than the box's diagonal.
        most = (self.hi - self.lo) * (1.0 if self.norm == "linf" else math.sqrt(x.numel() / max(1, len(x))))
        tensor, number = checks.per_sample(self.name, "eps", eps, x, is_size=True, most=most, units=_EPS_UNITS)
        return Budget(number if tensor is None else tensor)

    def _into_ball(self, x_adv: Tensor, request: Request, norm: str = "linf") -> Tensor:
        """x_adv projected on the ball and the box, rounded to the result's dtype, in `out` where given."""
        x, out = request.x, request.out
        clean = memory.widen(x)
        if out is None and memory.result_dtype(x) != clean.dtype:
            out = torch.empty_like(x)
        return ops.project(x_adv, clean, request.sizes.eps, norm=norm, lo=self.lo, hi=self.hi, out=out)
