"""What a trace proves about a frozen network's ReLUs: which may work in place, and which may take in the sum before."""
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

_SUMS = (operator.add, torch.add, "add", "add_")  # `a += b` is traced as operator.add
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


class ReluPlan(NamedTuple):
    """Which sums of a network may be computed together with the ReLU after them.

    fuse_sums: every sum of two tensors is used by one ReLU only, so that it may be rectified as it is added.
    in_place: the first operand of every such sum is the result of a layer, and nothing else reads it, so that sums in
        place (`a += b`) may be fused too.
    """

    fuse_sums: bool
    in_place: bool


NOTHING_FUSED = ReluPlan(fuse_sums=False, in_place=False)


def plan_relus(model: nn.Module) -> ReluPlan:
    """Let ReLU modules work in place where nothing else reads their inputs, and say which sums may be fused.

    Where a part of the model cannot be traced, nothing is changed and nothing may be fused.
    """
    try:
        traced = tracing.trace(model)
    except tracing.Untraceable:
        return NOTHING_FUSED
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    # A module that the trace does not look into may call any other module and compute any sum.
    if traced.opaque or not all(_is_torchs_own(tracing.called_module(model, node)) for node in calls):
        return NOTHING_FUSED
    for relu, inputs in _relu_inputs(model, traced.graph).items():
        if all(_is_private_result(model, node) for node in inputs):
            relu.inplace = True
    sums = [node for node in traced.graph.nodes if _is_sum(node)]
    fuse_sums = all(_feeds_only_a_relu(model, node) for node in sums)
    in_place = fuse_sums and all(_is_private_result(model, node.args[0]) for node in sums)
    return ReluPlan(fuse_sums, in_place)


def _is_torchs_own(module: nn.Module) -> bool:
    """Is this a single layer of torch.nn, with the forward that PyTorch gave it?"""
    return (type(module).__module__.startswith("torch.nn.modules.") and not any(module.children())
            and "forward" not in vars(module))


def _relu_inputs(model: nn.Module, graph: fx.Graph) -> dict[nn.ReLU, list[fx.Node]]:
    """The inputs of each ReLU module, over all calls of it."""
    found: dict[nn.ReLU, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if is_relu(model, node) and node.op == "call_module":
            module = tracing.called_module(model, node)
            assert isinstance(module, nn.ReLU)
            found[module].append(tracing.node_of(node.args[0]))
    return found


def is_relu(model: nn.Module, node: fx.Node) -> bool:
    """Is this node a ReLU of PyTorch's own, as a module, function or method?"""
    if len(node.args) != 1:
        return False
    if node.op == "call_module":
        module = tracing.called_module(model, node)
        return type(module) is nn.ReLU and not tracing.hooked(module)
    return node.target in _RELUS


def _is_private_result(model: nn.Module, node: fx.Node) -> bool:
    """Is this value the result of a layer, made for the one node that uses it, so that this node may overwrite it?"""
    for value in _aliases(model, node):
        if len(value.users) != 1:
            return False
        node = value
    module = tracing.called_module(model, node) if node.op == "call_module" else None
    return isinstance(module, (_ConvNd, nn.Linear, _BatchNorm)) and not tracing.hooked(module)


def _aliases(model: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose value is the same tensor as this node's: itself, then the nodes before that pass it on."""
    yield node
    while tracing.passes_on(model, node):
        node = tracing.node_of(node.args[0])
        yield node


def _is_sum(node: fx.Node) -> bool:
    """Does this node add two tensors?"""
    return (node.op in ("call_function", "call_method") and node.target in _SUMS
            and sum(isinstance(a, fx.Node) for a in (*node.args, *node.kwargs.values())) > 1)


def _feeds_only_a_relu(model: nn.Module, node: fx.Node) -> bool:
    """Is this a plain sum (no `alpha`, no `out`) that one ReLU uses and nothing else?"""
    return len(node.args) == 2 and not node.kwargs and len(node.users) == 1 and is_relu(model, next(iter(node.users)))
