"""Whether an attack on a source may be captured in a CUDA graph, and whether a captured one still holds."""
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .base import BaseSource
from .frozen.tracing import hooked


class Uncapturable(Exception):
    """Work that a graph cannot hold; the message says why."""


def members(source: BaseSource) -> tuple[Any, ...]:
    """The sources with models of their own that a source is made of: an ensemble's members, or the source itself."""
    return getattr(source, "sources", (source,))


def _with_members(source: BaseSource) -> tuple[Any, ...]:
    """The source, and an ensemble's members too."""
    return (source, *getattr(source, "sources", ()))


# ---- what a graph relies on --------------------------------------------------------------------------------------

def _modules(source: BaseSource) -> list[nn.Module]:
    return [m for member in members(source) for m in member.module.modules()]


class Snapshot:
    """What a source's graphs depend on: its settings, its modules, and the addresses of their tensors.

    It keeps all of these alive, but not the source.
    """

    def __init__(self, source: BaseSource) -> None:
        dicts: Iterator[dict[str, Any]] = (d for m in _modules(source) for d in (m._parameters, m._buffers, m._modules))
        self.dicts = [d for d in dicts if d]
        self.held = [v for d in self.dicts for v in d.values()]
        self.tensors = [v for v in self.held if isinstance(v, Tensor)]
        self.ids, self.addresses = self._ids(), self._addresses()
        self.settings = [{k: v for k, v in vars(s).items() if k not in ("in_session", "replays")}
                         for s in _with_members(source)]

    # These two map built-in functions, because they run at every replay and some networks have a thousand tensors.
    def _ids(self) -> list[int]:
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self.dicts))))

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def holds(self, source: BaseSource) -> bool:
        """Are settings, modules and addresses still the same?"""
        for owner, settings in zip(_with_members(source), self.settings):
            now = vars(owner)
            for k, v in settings.items():
                if now[k] is not v:
                    return False
        return self._ids() == self.ids and self._addresses() == self.addresses


class _HostWatch(TorchDispatchMode):
    """Notes in `why` the first op that reads the device's values on the host, or copies between the two."""

    READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.why: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(tag in func.tags for tag in self.READS):
            if any(isinstance(a, Tensor) and a.device == self.device for a in args):
                self.why = self.why or f"the host waits for a value from the device ({func})"
        elif func in self.COPIES and len({t.device for t in (*args[:2], result) if isinstance(t, Tensor)}) > 1:
            self.why = self.why or f"a tensor is copied between the host and the device ({func})"
        return result


def rehearse(source: BaseSource, work: Callable[[], object]) -> None:
    """Run the work once. Raise :class:`Uncapturable` where a replay would do something else than the next run.

    A graph holds kernels only. A model that decides by values, draws random numbers or counts its calls does so in
    Python or on the host, and hooks are Python too. (Other reads of the device break the capture itself.)
    """
    _refuse_hooks_and_scripts(source)
    modules = _modules(source)
    before, drawn = [dict(vars(m)) for m in modules], _generators(source.device)
    with _HostWatch(source.device) as watch:
        work()
    if watch.why is not None:
        raise Uncapturable(watch.why)
    if not all(a == b for a, b in zip(drawn, _generators(source.device))):
        raise Uncapturable("the model draws random numbers")
    for m, old in zip(modules, before):
        now = vars(m)
        for name in old.keys() | now.keys():
            if not _is_same(old.get(name), now.get(name)):
                raise Uncapturable(f"{type(m).__name__}.{name} changes as the model is called")


def _refuse_hooks_and_scripts(source: BaseSource) -> None:
    for member in members(source):
        for name, m in member.module.named_modules():
            if isinstance(m, torch.jit.ScriptModule):
                raise Uncapturable(f"{name or 'the model'} is a script module, whose state cannot be watched")
            if hooked(m):
                raise Uncapturable(f"{name or 'the model'} has hooks, which a replay would not call")


def _is_same(a: object, b: object) -> bool:
    """Are they one object, or numbers, texts or sequences of the same value and type?"""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return isinstance(a, (bool, int, float, str)) and a == b


def _generators(device: torch.device) -> list[Any]:
    """The states of the generators that models draw from, in types that == compares."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    _, words, *rest = state
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [random.getstate(), np.asarray(words).tobytes(), rest, *(s.numpy().tobytes() for s in states)]
