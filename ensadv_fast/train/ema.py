"""An exponential moving average of a model's weights."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """average <- average + (1 - d) (weights - average), with d = min(decay, (1 + t) / (10 + t)) after t updates.

    This is TensorFlow's ExponentialMovingAverage(num_updates=t), with which Inception v3 was trained. Buffers are
    copied as they are.

    model: on the device where it stays; its parameters and buffers are followed by reference. decay: 0 <= decay < 1
    (ValueError otherwise). An update is one foreach pass over the weights, and needs no host sync.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay}")
        self.decay, self.updates = decay, 0
        self._live = model.state_dict(keep_vars=True)
        self.average: dict[str, Tensor] = {k: v.detach().clone() for k, v in self._live.items()}
        moving = [k for k, v in self._live.items() if isinstance(v, nn.Parameter) and v.is_floating_point()]
        self._moving = [self.average[k] for k in moving], [self._live[k].detach() for k in moving]
        copied: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for k in self._live.keys() - set(moving):
            to, of = copied.setdefault(self._live[k].dtype, ([], []))
            to.append(self.average[k])
            of.append(self._live[k].detach())
        self._copied = list(copied.values())

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(*self._moving, 1.0 - decay)
        for to, of in self._copied:
            torch._foreach_copy_(to, of)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context: within it the model has the averaged weights; it gets its own back, also after an exception."""
        own = {k: v.detach().clone() for k, v in self._live.items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for k, v in self._live.items():
            v.copy_(weights[k])

    def state_dict(self) -> dict[str, Any]:
        """The average under the model's own names ("model"), and how often it was updated."""
        return {"model": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; ValueError where it is of another model."""
        if state["model"].keys() != self.average.keys():
            differing = sorted(state["model"].keys() ^ self.average.keys())
            raise ValueError("EMA: the saved average must have the model's names, got that of another model (only one "
                             f"of them has {', '.join(differing[:3])})")
        for k, v in self.average.items():
            v.copy_(state["model"][k])
        self.updates = state["updates"]
