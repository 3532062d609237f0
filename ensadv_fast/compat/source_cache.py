"""The fast sources of other libraries' models: made once per model, and not used when the model has changed."""
import operator
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..sources.source import Source


class _State(NamedTuple):
    """What a model's forward depends on, as far as that shows without looking at values."""

    modules: list[ref]
    hooks: list[int]
    tensors: list[ref]
    versions: list[tuple[int, int, int]]

    @classmethod
    def of(cls, model: nn.Module) -> "_State":
        modules = list(model.modules())
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        return cls([ref(m) for m in modules], [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
                   [ref(t) for t in tensors], [(t._version, t.data_ptr(), _fused_steps.get(t, 0)) for t in tensors])

    def equals(self, other: "_State") -> bool:
        """Was nothing exchanged or written in between?"""
        # A living object has one plain weak reference, always the same.
        return (self.hooks == other.hooks and self.versions == other.versions
                and all(map(operator.is_, self.modules, other.modules))
                and all(map(operator.is_, self.tensors, other.tensors)))


class _Entry(NamedTuple):
    state: _State
    source: Source | None


_fused_steps = WeakTensorKeyDictionary()  # of a parameter: how often a fused optimizer moved it
_entries: WeakKeyDictionary[nn.Module, dict[tuple, _Entry]] = WeakKeyDictionary()


def _count_fused_steps(optimizer: Optimizer, *_: object) -> None:
    """Note that a fused optimizer moved its parameters: it does so without counting their versions."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for p in group["params"]:
                _fused_steps[p] = _fused_steps.get(p, 0) + 1


register_optimizer_step_post_hook(_count_fused_steps)


def get_source(model: nn.Module, mean: Tensor | None = None, std: Tensor | None = None) -> Source:
    """A source of the model. mean, std: of its normalisation, one number per channel; None: there is none.

    The first call makes a frozen source, in ``dtype="auto"``. Later calls get the same one as long as modules, hooks,
    parameters and buffers are the same objects and nothing wrote into the tensors. The tensors' version counters show
    that, and for fused optimizers their own steps. Writing through ``.data`` is not counted: call :func:`forget` then.

    A call that finds the model changed gets a live source, the model itself: the model may be in training, and a copy
    would serve one call. When the next call finds the model as that call left it, a new frozen source is made.
    """
    key = tuple(None if v is None else tuple(v.flatten().tolist()) for v in (mean, std))
    entries = _entries.setdefault(model, {})
    entry, state = entries.get(key), _State.of(model)
    moved = entry is not None and not entry.state.equals(state)
    source = None if entry is None or moved else entry.source
    if source is None and not moved:
        source = Source(model, mean=mean, std=std)
    entries[key] = _Entry(state, source)
    if source is None:  # the model has changed
        return Source(model, mean=mean, std=std, live=True, fold=False, channels_last=False, dtype=None)
    return source


def forget(model: nn.Module) -> None:
    """Drop the sources that fast attacks made of the model, so that the next fast attack makes a new one.

    This is needed only after weights were written through ``.data``, which leaves no trace.
    """
    _entries.pop(model, None)
