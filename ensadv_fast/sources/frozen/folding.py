"""Batch normalisations folded into the layers before them."""
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .tracing import (
    Trace,
    Untraceable,
    called_module,
    flattens,
    hooked,
    may_read,
    node_of,
    passes_on,
    trace,
    trace_parts,
)


def fold_batch_norms(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Fold every batch normalisation that follows a convolution or linear layer into that layer's weights, in place.

    W' = W * s and b' = (b - mean) * s + beta per output channel, s = gamma / sqrt(var + eps), computed in float64 and
    rounded once to `dtype` (None: the layer's own). An nn.Identity takes the normalisation's place; where it did more,
    as timm's BatchNormAct2d does dropout and an activation, that stays. Layer and normalisation must be in eval mode,
    of exactly the classes known here, without hooks, registered and called once, and the normalisation must be all that
    uses the layer's output. Nothing else may read their tensors, nor may the code of a part that could not be traced
    name such ones. A second trace must find that the forward still makes the same calls.

    Returns the parts that still hold normalisations because they could not be traced: name -> reason.
    """
    if not any(_has_norms(m) for m in model.modules()):
        return {}
    traces, left = trace_parts(model, _BatchNorm)
    free = _free_modules(model, traces)
    for prefix in left:
        part = model.get_submodule(prefix)
        if may_read(part):
            free.difference_update(map(id, part.modules()))
    for prefix, traced in traces.items():
        part = model.get_submodule(prefix)
        folded = _fold_pairs(part, traced.graph, free, dtype)
        if folded and not _same_course(part, traced, (pair.norm_name for pair in folded)):
            for pair in folded:
                pair.undo(part)
            left[prefix] = "its forward looks at its normalisations"
    return {name: why for name, why in left.items() if _has_norms(model.get_submodule(name))}


def _has_norms(part: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) for m in part.modules())


def _free_modules(model: nn.Module, traces: dict[str, Trace]) -> set[int]:
    """ids of the modules that are registered once and called once, and whose tensors no other code reads."""
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    calls: Counter[int] = Counter()
    read: set[int] = set()
    for prefix, traced in traces.items():
        part = model.get_submodule(prefix)
        calls.update(id(called_module(part, n)) for n in traced.graph.nodes if n.op == "call_module")
        read |= traced.read

    def is_read(module: nn.Module) -> bool:
        return not read.isdisjoint(map(id, (*module._parameters.values(), *module._buffers.values())))

    return {id(m) for m in model.modules() if calls[id(m)] == names[id(m)] == 1 and not is_read(m)}


class _Folded(NamedTuple):
    """A layer into which the normalisation of that name was folded, and what both were before."""

    layer: Any
    weight: nn.Parameter
    bias: nn.Parameter | None
    norm_name: str
    norm: nn.Module

    def undo(self, part: nn.Module) -> None:
        self.layer.weight, self.layer.bias = self.weight, self.bias
        part.set_submodule(self.norm_name, self.norm)


def _fold_pairs(part: nn.Module, graph: fx.Graph, free: set[int], dtype: torch.dtype | None) -> list[_Folded]:
    """Fold what can be folded of one traced part."""
    folded = []
    for layer_name, norm_name in _pairs(part, graph):
        layer: Any = part.get_submodule(layer_name)
        norm = part.get_submodule(norm_name)
        before = _Folded(layer, layer.weight, layer.bias, norm_name, norm)
        both_free = all(id(m) in free and not hooked(m) for m in (layer, norm))  # hooks must see the values as they are
        if both_free and _fold(layer, norm, dtype):
            part.set_submodule(norm_name, _rest_of(norm))
            folded.append(before)
    return folded


def _same_course(part: nn.Module, before: Trace, leaves: Iterable[str]) -> bool:
    """Does the part's forward still make the same calls on the same values, with `leaves` of other classes now?"""
    try:
        after = trace(part, leaves)
    except Untraceable:
        return False
    one, other = ([(n.op, n.target, [i.name for i in n.all_input_nodes]) for n in t.graph.nodes]
                  for t in (before, after))
    return one == other


# ---- pairs of a layer and the normalisation of its output --------------------------------------------------------

_NORM_OF = {
    nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d, nn.Linear: nn.BatchNorm1d,
    nn.ConvTranspose1d: nn.BatchNorm1d, nn.ConvTranspose2d: nn.BatchNorm2d, nn.ConvTranspose3d: nn.BatchNorm3d,
}
# Two classes of timm, known by name because timm need not be installed: a convolution that pads its input itself, and a
# normalisation followed by dropout and an activation.
_SAME_CONV = ("timm.layers.conv2d_same", "Conv2dSame")
_NORM_ACT = ("timm.layers.norm_act", "BatchNormAct2d")


def _has_class(module: nn.Module, name: tuple[str, str]) -> bool:
    return (type(module).__module__, type(module).__qualname__) == name


def _layer_kind(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that this layer works as, or None where nothing can be folded into it."""
    kind = nn.Conv2d if _has_class(module, _SAME_CONV) else type(module)
    return kind if kind in _NORM_OF and "forward" not in vars(module) else None


def _norm_kind(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that this normalisation works as, or None where it cannot be folded."""
    kind = nn.BatchNorm2d if _has_class(module, _NORM_ACT) else type(module)
    known = kind in (*_NORM_OF.values(), nn.SyncBatchNorm) and "forward" not in vars(module)
    return kind if known and not module.training and module.running_mean is not None else None


def _rest_of(norm: Any) -> nn.Module:
    """The module for what a folded normalisation still has to do."""
    rest = nn.Sequential(norm.drop, norm.act) if _has_class(norm, _NORM_ACT) else nn.Identity()
    return rest.train(norm.training)


def _pairs(part: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """Names (layer, normalisation) where the normalisation is all that uses the layer's output."""
    found = []
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        norm_kind, source = _norm_kind(called_module(part, node)), node.args[0]
        if norm_kind is None or not isinstance(source, fx.Node):
            continue
        while passes_on(part, source) and len(source.users) == 1:
            source = node_of(source.args[0])
        if source.op != "call_module" or len(source.users) != 1:
            continue
        kind = _layer_kind(called_module(part, source))
        if kind is None or norm_kind not in (_NORM_OF[kind], nn.SyncBatchNorm):
            continue
        # A linear layer also takes [N, L, C], of which BatchNorm1d normalises L.
        if kind is not nn.Linear or _is_matrix(part, source.args[0]):
            found.append((str(source.target), str(node.target)))
    return found


def _is_matrix(part: nn.Module, node: object) -> bool:
    """Does the graph prove that this value has two dimensions?"""
    if not isinstance(node, fx.Node):
        return False
    if flattens(part, node):
        return True
    if node.op == "call_module":
        module = called_module(part, node)
        keeps = type(module) in (nn.Linear, nn.BatchNorm1d, nn.Identity, nn.Dropout)
        keeps |= type(module).__module__ == "torch.nn.modules.activation" and len(node.args) == 1
        return keeps and _is_matrix(part, node.args[0])
    if node.target in ("view", "reshape"):
        return len(node.args) == 3
    elementwise = node.target in (torch.relu, F.relu, "relu", torch.tanh, "tanh", F.gelu, F.silu)
    return elementwise and _is_matrix(part, node.args[0])


def _fold(layer: Any, norm: Any, dtype: torch.dtype | None) -> bool:
    """Multiply the normalisation into the layer's weights. False, and no change, where `dtype` cannot hold them."""
    dtype = layer.weight.dtype if dtype is None else dtype

    def wide(t: Tensor | None, default: float) -> Tensor:
        return torch.full_like(norm.running_mean, default, dtype=torch.float64) if t is None else t.detach().double()

    s = wide(norm.weight, 1.0) * (norm.running_var.double() + norm.eps).rsqrt()
    weight = layer.weight.detach().double()
    if getattr(layer, "transposed", False):  # [in, out / groups, ...]: outputs of a group are along dimension 1
        grouped = weight.unflatten(0, (layer.groups, -1))
        weight = (grouped * s.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    else:
        weight = weight * s.view(-1, *[1] * (weight.dim() - 1))
    bias = (wide(layer.bias, 0.0) - norm.running_mean.double()) * s + wide(norm.bias, 0.0)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return False
    layer.weight, layer.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    return True
