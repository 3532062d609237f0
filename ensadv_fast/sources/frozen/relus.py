"""What a trace proves about a frozen network's ReLUs: where they may work in place, and where with the sum before."""
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from . import tracing

_ADDS = (operator.add, torch.add, "add", "add_")  # `a += b` is traced as operator.add
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


class Joins(NamedTuple):
    """fresh: every sum of two tensors is a ReLU's alone, so that it may be rectified as it is added. over: and what
    it is, or may be, written over is a layer's fresh result that nobody else sees."""

    fresh: bool
    over: bool


NONE = Joins(False, False)


def join(model: nn.Module) -> Joins:
    """Let the ReLUs that have a layer's fresh result to themselves work in place, and say which sums end in one.

    Nothing is changed, and nothing said, where a part of the model cannot be traced.
    """
    try:
        traced = tracing.trace(model)
    except tracing.Untraceable:
        return NONE
    if traced.opaque or not all(_known(model.get_submodule(n.target)) for n in traced.graph.nodes
                                if n.op == "call_module"):
        return NONE  # unseen, they may call any of these modules and add what they like
    for relu, inputs in _calls(model, traced.graph).items():
        if all(_own(model, node) for node in inputs):
            relu.inplace = True
    sums = [node for node in traced.graph.nodes if _adds(node)]
    fresh = all(_ends(model, node) for node in sums)
    return Joins(fresh, fresh and all(_own(model, node.args[0]) for node in sums))


def _known(module: nn.Module) -> bool:
    """Is this one function of torch.nn.functional, as PyTorch has it?"""
    return (type(module).__module__.startswith("torch.nn.modules.") and not any(module.children())
            and "forward" not in vars(module))


def _calls(model: nn.Module, traced: fx.Graph) -> dict[nn.ReLU, list[fx.Node]]:
    """The inputs of each ReLU, over all of its calls."""
    found: dict[nn.ReLU, list[fx.Node]] = defaultdict(list)
    for node in traced.nodes:
        if is_relu(model, node) and node.op == "call_module":
            module = tracing.called(model, node)
            assert isinstance(module, nn.ReLU)
            found[module].append(tracing.node_of(node.args[0]))
    return found


def is_relu(model: nn.Module, node: fx.Node) -> bool:
    """Is this node a ReLU, as PyTorch has it?"""
    if len(node.args) != 1:
        return False
    if node.op == "call_module":
        module = tracing.called(model, node)
        return type(module) is nn.ReLU and not tracing.hooked(module)
    return node.target in _RELUS


def _own(model: nn.Module, node: fx.Node) -> bool:
    """Is this value a layer's fresh result that nobody else sees?"""
    for value in _names(model, node):
        if len(value.users) != 1:
            return False
        node = value
    module = tracing.called(model, node) if node.op == "call_module" else None
    return isinstance(module, (_ConvNd, nn.Linear, _BatchNorm)) and not tracing.hooked(module)


def _names(model: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that this very tensor is the value of, backwards from this one."""
    yield node
    while tracing.passes_on(model, node):
        node = tracing.node_of(node.args[0])
        yield node


def _adds(node: fx.Node) -> bool:
    return (node.op in ("call_function", "call_method") and node.target in _ADDS
            and sum(isinstance(a, fx.Node) for a in (*node.args, *node.kwargs.values())) > 1)


def _ends(model: nn.Module, node: fx.Node) -> bool:
    """Is this sum the affair of the ReLU alone that follows?"""
    return len(node.args) == 2 and not node.kwargs and len(node.users) == 1 and is_relu(model, next(iter(node.users)))
