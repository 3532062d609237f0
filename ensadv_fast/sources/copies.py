"""Models as they come: taken out of wrappers, refused where no gradient can flow, copied, cast and laid out."""
import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SPECIAL = (*PARALLEL, LazyModuleMixin)
_OWN = ("_parameters", "_buffers", "_modules")  # where a module keeps what torch knows of
DEEP = 3  # nested containers that are searched for tensors


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module inside this wrapper of data parallelism or torch.compile; None for any other module."""
    if isinstance(module, PARALLEL):
        return module.module
    return cast(nn.Module, module._modules["_orig_mod"]) if "_orig_mod" in module._modules else None


def taken_out(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The model without its outermost wrappers of data parallelism, and the wrappers that it has inside.

    A torch.compile'd model stays one, unless it has data parallelism inside; then its wrapper is taken off or listed as
    well, since what it compiled would communicate. ValueError where no gradient can flow: for tensors made in inference
    mode, and for lazy modules that have no weights yet.
    """
    special, compiled = False, False
    for m in model.modules():
        special |= isinstance(m, PARALLEL)
        compiled |= "_orig_mod" in m._modules
        if isinstance(m, LazyModuleMixin) and m.has_uninitialized_params():
            raise ValueError(f"Source: model must have its weights, got a {type(m).__name__} before its first forward "
                             "pass: call the model once on a batch")
        for tensors in (m._parameters, m._buffers):
            for name, t in tensors.items():
                if t is not None and t.is_inference():
                    raise ValueError(
                        f"Source: model was created in torch.inference_mode ({_path(model, m, name)} is an inference "
                        "tensor), so no gradient can flow through it: create or load it outside that mode")
    if not special:
        return model, []
    while (inner := wrapped_in(model)) is not None and (isinstance(model, PARALLEL) or _has_parallel(inner)):
        model = inner
    return model, [m for m in model.modules() if isinstance(m, PARALLEL) or (
        compiled and "_orig_mod" in m._modules and _has_parallel(m))]


def _has_parallel(model: nn.Module) -> bool:
    return any(isinstance(m, PARALLEL) for m in model.modules())


def _path(model: nn.Module, owner: nn.Module, name: str) -> str:
    return next((f"{prefix}.{name}".lstrip(".") for prefix, m in model.named_modules() if m is owner), name)


@contextmanager
def stepped_over(wrappers: Iterable[nn.Module]) -> Iterator[None]:
    """These wrappers call what is inside them, and do nothing else: they do not communicate."""
    changed: list[tuple[dict[str, Any], Any]] = []
    try:
        for wrapper in wrappers:
            attributes = vars(wrapper)
            changed.append((attributes, attributes.get("forward")))
            attributes["forward"] = wrapped_in(wrapper)
        yield
    finally:
        for attributes, forward in reversed(changed):
            if forward is None:
                del attributes["forward"]
            else:
                attributes["forward"] = forward


def detached(model: nn.Module) -> nn.Module:
    """A copy that no gradient is computed for and that has no wrappers of data parallelism or torch.compile.

    Tensors with a history that modules keep in attributes, or in lists, tuples and dicts of these (a feature map, the
    weight that a hook computes), are copied without it. TypeError, naming the attribute, where one cannot be copied.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():  # script modules, which have no requires_grad_, clone their parameters
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in _OWN:
                    _cut(value, memo)
        try:
            for wrapper in reversed([m for m in model.modules() if wrapped_in(m) is not None]):  # the inner ones first
                memo[id(wrapper)] = copy.deepcopy(wrapped_in(wrapper), memo)
            alone: nn.Module = copy.deepcopy(model, memo)
        except Exception as e:
            raise TypeError(f"Source: model must be one that copy.deepcopy can copy; {_culprit(model, memo)} cannot be "
                            f"({e}). Source(model, live=True) uses the model itself") from e
    for p in alone.parameters():
        p.requires_grad_(False)
        p.grad = None
    return alone


def _cut(value: Any, memo: dict[int, Any], depth: int = 0) -> None:
    """Note in `memo`, which copy.deepcopy looks into, copies of the tensors with a history in this attribute."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, (list, tuple, dict)) and depth < DEEP:
        for part in value.values() if isinstance(value, dict) else value:
            _cut(part, memo, depth + 1)


def _culprit(model: nn.Module, memo: dict[int, Any]) -> str:
    """The attribute that cannot be copied."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # noqa: BLE001 - attributes refuse to be copied with any exception
                inner = next((k for k, t in value.items() if not _copies(t)), "") if name in _OWN else name
                return f"its attribute {f'{prefix}.{inner}'.lstrip('.')} ({type(value).__name__})"
    return f"a {type(model).__name__}"


def _copies(t: Any) -> bool:
    try:
        copy.deepcopy(t)
    except Exception:  # noqa: BLE001 - as above
        return False
    return True


def cast_to(module: nn.Module, dtype: torch.dtype) -> None:
    """Real floating tensors alone: a complex one has no counterpart among the real dtypes."""
    module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def lay_out(module: nn.Module, layout: torch.memory_format) -> None:
    """Tensors of 4 dimensions, which are those that channels_last orders; others stay as they are."""
    module._apply(lambda t: t.to(memory_format=layout) if t.dim() == 4 else t)
