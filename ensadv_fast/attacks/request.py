"""One call of an attack: what all of it is a function of, beside the attack and the source."""
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import keys


class Keys(NamedTuple):
    """The children of a call's key: of random starts, of random labels, and of the source's generators."""

    start: Tensor | None
    labels: Tensor | None
    crafting: Tensor | None


class Request(NamedTuple):
    """One checked call of an attack.

    sizes: what the attack makes of eps: a :class:`Budget`, or another NamedTuple of numbers and tensors [N], the first
    of which is eps. out: where x_adv is written, or None.
    """

    x: Tensor
    y: Any  # int64 [N] or None; what the loss takes, where that is a callable
    key: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # a field here, not the method of tuples
    sizes: Any
    out: Tensor | None = None

    def split_key(self) -> Keys:
        """The key's children. Generators are seeded from the host, so the last of them stays where the key is."""
        if self.key is None:
            return Keys(None, None, None)
        start, labels, crafting = keys.split(self.key, 3)
        start, labels = (k.to(self.x.device, non_blocking=True) for k in (start, labels))
        return Keys(start, labels, crafting)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may be another from call to call: what a CUDA graph is given anew."""
        return (self.x, self.y, self.key, self.index, *(v for v in self.sizes if isinstance(v, Tensor)))

    def on(self, tensors: Sequence[Tensor | None], out: Tensor | None) -> "Request":
        """The same call on other tensors, in the order of :meth:`tensors`."""
        x, y, key, index, *per_sample = tensors
        assert x is not None
        others = iter(per_sample)
        sizes = type(self.sizes)._make(next(others) if isinstance(v, Tensor) else v for v in self.sizes)
        return Request(x, y, key, index, sizes, out)

    def signature(self) -> tuple[Hashable, ...]:
        """What the work is shaped by: shape, strides and dtype of x, which tensors there are, and all numbers."""
        return (self.x.shape, self.x.stride(), self.x.dtype, self.y is None, self.key is None, self.index is None,
                *(None if isinstance(v, Tensor) else v for v in self.sizes))


class Budget(NamedTuple):
    """The size of an attack that needs no other: a number, or a tensor [N]."""

    eps: float | Tensor


class AttackResult(NamedTuple):
    """x_adv, and what the attack found without a further forward pass.

    labels: int64 [N], those that the attack looked at; for a callable loss, y as it came. success: bool [N]: the
    prediction differs from the label (targeted: equals it). loss: [N]. loss and success are those of the last gradient
    step's first forward pass, so of the point before that step; with nesterov, di or si, of the transformed point.
    """

    x_adv: Tensor
    labels: Tensor
    loss: Tensor
    success: Tensor


def empty_result(x_adv: Tensor) -> AttackResult:
    """The result for no samples."""
    none = torch.empty(0, device=x_adv.device)
    return AttackResult(x_adv, none.long(), none, none.bool())
