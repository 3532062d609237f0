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
    """What a model's forward depends on, as far as it can be told without looking at values."""

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

    def same(self, other: "_State") -> bool:
        """Nothing was exchanged or written. An object that lives has one plain weak reference, always the same."""
        return (self.hooks == other.hooks and self.versions == other.versions
                and all(map(operator.is_, self.modules, other.modules))
                and all(map(operator.is_, self.tensors, other.tensors)))


class _Entry(NamedTuple):
    state: _State
    source: Source | None


_fused_steps = WeakTensorKeyDictionary()  # of a parameter: how often a fused optimizer moved it
_entries: WeakKeyDictionary[nn.Module, dict[tuple, _Entry]] = WeakKeyDictionary()


def _count(optimizer: Optimizer, *_: object) -> None:
    """Fused optimizers move weights without counting versions."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for p in group["params"]:
                _fused_steps[p] = _fused_steps.get(p, 0) + 1


register_optimizer_step_post_hook(_count)


def prepared(model: nn.Module, mean: Tensor | None = None, std: Tensor | None = None) -> Source:
    """A source of the model with these statistics of its normalisation.

    The first call makes a frozen one, in ``dtype="auto"``, and further calls get it as long as modules, hooks,
    parameters and buffers are the same objects and nothing wrote into the tensors. Their version counters tell, and for
    fused optimizers the optimizers themselves; what is written through ``.data`` is not counted: then call
    :func:`forget`. A call that finds the model
    changed gets a live source, the model itself: it may be in training, where a copy would serve one call. When the
    next call finds it as that one left it, a new frozen source is made.
    """
    key = tuple(None if v is None else tuple(v.flatten().tolist()) for v in (mean, std))
    entries = _entries.setdefault(model, {})
    entry, state = entries.get(key), _State.of(model)
    moved = entry is not None and not entry.state.same(state)
    source = None if entry is None or moved else entry.source
    if source is None and not moved:
        source = Source(model, mean=mean, std=std)
    entries[key] = _Entry(state, source)
    if source is None:  # it has moved
        return Source(model, mean=mean, std=std, live=True, fold=False, channels_last=False, dtype=None)
    return source


def forget(model: nn.Module) -> None:
    """Let go of the model's sources: the next fast attack makes a new one."""
    _entries.pop(model, None)
