"""Graphs of a model's forward pass (torch.fx), and passes over them.

A trace only reads: it runs the forward of a stand-in that shares the model's tensors, and its graph says which module
is called on what. Passes then change the model's modules in place, and its own Python forward goes on running, so
that nothing it computes besides (sizes, random numbers, state) is frozen into a graph.
"""
import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Untraceable(Exception):
    """A forward pass that torch.fx cannot follow; the message says why."""


class Trace(NamedTuple):
    """graph: its call_module nodes name modules as the traced model does. read: ids of parameters and buffers that
    some forward reads itself instead of calling the module that owns them. opaque: names of the modules with
    children that the graph calls as a whole, because they have hooks or cannot be followed, and why."""

    graph: fx.Graph
    read: set[int]
    opaque: dict[str, str]


def hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


class _Call(nn.Module):
    """Calls the model as its user does: with one argument, through __call__."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Goes as deep as it can: what it cannot follow, or what has hooks, becomes one call; so do `leaves`, by name."""

    def __init__(self, leaves: set[str]):
        super().__init__()
        self.leaves = {f"model.{name}" for name in leaves}
        self.read: set[int] = set()
        self.opaque: dict[str, str] = {}
        self.proxies: dict[str, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds = (_ConvNd, nn.Linear, _NormBase)  # subclasses too: what they do with their weights is theirs
        return (isinstance(m, kinds) or module_qualified_name in self.leaves
                or super().is_leaf_module(m, module_qualified_name))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        self.proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if m is self.root.model or self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        why, depth, end = "it has hooks", len(self.module_stack), next(iter(reversed(self.graph.nodes)))
        if not hooked(m):
            try:
                return super().call_module(m, forward, args, kwargs)
            except Exception as e:  # noqa: BLE001 - forwards fail on proxies in any way that Python offers
                why = f"{type(e).__name__}: {e}".splitlines()[0]
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            while (node := next(iter(reversed(self.graph.nodes)))) is not end:
                self.graph.erase_node(node)
            self.proxies.clear()  # some may be of nodes just erased
        self.opaque[name] = why
        return self.create_proxy("call_module", name, args, kwargs)


def trace(model: nn.Module, leaves: Iterable[str] = ()) -> Trace:
    """Follow model(x), in the mode the model is in, without a look inside `leaves`. Raises :class:`Untraceable`.

    torch.fx patches nn.Module while it traces: no other thread may call a module meanwhile.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # What a forward leaves behind in attributes, it leaves in the stand-in.
    stand_in = copy.deepcopy(model, {id(t): t for t in tensors})
    for hooks in HOOKS:  # they see arguments and results of the whole, which no pass changes
        setattr(stand_in, hooks, OrderedDict())
    tracer = _Tracer(set(leaves))
    devices = {t.device for t in tensors if t.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            graph = tracer.trace(_Call(stand_in))
    except Exception as e:
        raise Untraceable(f"{type(e).__name__}: {e}".splitlines()[0]) from e
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("model").removeprefix(".")
    return Trace(graph, tracer.read, {name.removeprefix("model."): why for name, why in tracer.opaque.items()})


def trace_parts(model: nn.Module, kind: type[nn.Module]) -> tuple[dict[str, Trace], dict[str, str]]:
    """Traces of the model and of its parts that cannot be traced with it, as far as modules of `kind` are in them.

    Returns the traces by the name of the part ("" is the model), and the names of what is in no trace, with why. A
    part is traced alone only where its forward takes one argument, since others could change its course, and where
    it is no mere container, since the owner of one may walk through it without calling it.
    """
    traces: dict[str, Trace] = {}
    left: dict[str, str] = {}

    def visit(name: str, part: nn.Module, why: str) -> None:
        if isinstance(part, kind) or not any(isinstance(m, kind) for m in part.modules()):
            return
        container = getattr(type(part), "forward", None) in (nn.Sequential.forward, nn.Module.forward)
        if name and (container or len(inspect.signature(part.forward).parameters) != 1):
            left[name] = why
        else:
            try:
                traces[name] = trace(part)
            except Untraceable as e:
                left[name] = str(e)
        if name in traces:
            inner = {child: part.get_submodule(child) for child in traces[name].opaque}
        else:
            inner = dict(part.named_children())
        for child, module in inner.items():
            reason = traces[name].opaque[child] if name in traces else left[name]
            visit(f"{name}.{child}".lstrip("."), module, reason)

    visit("", model, "")
    return traces, left


def called(part: nn.Module, node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    return part.get_submodule(str(node.target))


def node_of(argument: object) -> fx.Node:
    """What passes know to be a node's value."""
    assert isinstance(argument, fx.Node)
    return argument


def passes_on(part: nn.Module, node: fx.Node) -> bool:
    """Does this node return its input as it is, in eval mode?"""
    if node.op != "call_module" or len(node.args) != 1:
        return False
    module = called(part, node)
    own = type(module).__module__ == _DropoutNd.__module__  # torch.nn's; subclasses could do anything
    known = type(module) is nn.Identity or (own and isinstance(module, _DropoutNd))
    return known and not module.training and not hooked(module) and "forward" not in vars(module)


def flattens(part: nn.Module, node: fx.Node) -> bool:
    """Does this node make [N, ...] a matrix [N, M]?"""
    if node.op == "call_module":
        module = called(part, node)
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    return node.target in (torch.flatten, "flatten") and (
        node.args[1:] == (1,) or (len(node.args) == 1 and node.kwargs == {"start_dim": 1}))
