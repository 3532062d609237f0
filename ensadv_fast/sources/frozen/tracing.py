"""Graphs of a model's forward pass (torch.fx), and questions about their nodes.

A trace changes nothing: it runs the forward of a stand-in that shares the model's tensors, and its graph says which
module is called on what. Other modules of this folder then change the model's modules in place. The model's own Python
forward goes on running, so nothing else that it computes (sizes, random numbers, state) is frozen into a graph.
"""
import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from ..modes import exclusive

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Untraceable(Exception):
    """A forward pass that torch.fx cannot follow; the message says why."""


class Trace(NamedTuple):
    """What one run of a model's forward showed.

    graph: its call_module nodes name modules as the traced model does. read: ids of the parameters and buffers that
    some forward reads or exchanges itself, instead of calling the module that owns them, and of all those of modules
    whose mode or numbers a forward changes. opaque: the modules with children that the
    graph calls as a whole, because they have hooks or cannot be followed: name -> reason.
    """

    graph: fx.Graph
    read: set[int]
    opaque: dict[str, str]


def hooked(module: nn.Module) -> bool:
    """Has this module hooks of its own? Its calls, and the values in them, must then stay as they are."""
    return any(getattr(module, name) for name in HOOKS)


class _Call(nn.Module):
    """Calls the model as its user does: with one argument and through __call__."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


class _Watched(dict):
    """A module's parameters or buffers, that notes which of them somebody reads or exchanges."""

    def __init__(self, tensors: dict[str, Any], tracer: "_Tracer"):
        super().__init__(tensors)
        self._tracer = tracer

    def _note(self, *tensors: Any) -> None:
        if not self._tracer.looks_itself:
            self._tracer.read.update(id(t) for t in tensors if t is not None)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self._note(value)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self._note(super().get(name))
        super().__setitem__(name, value)

    def get(self, name: str, default: Any = None) -> Any:
        value = super().get(name, default)
        self._note(value)
        return value

    def items(self) -> Any:
        self._note(*super().values())
        return super().items()

    def values(self) -> Any:
        self._note(*super().values())
        return super().values()


class _Tracer(fx.Tracer):
    """Follows calls as deep as it can. A module becomes one call where it cannot be followed, has hooks, or is named in
    `leaves`. Calls of other threads, which torch.fx patches as well, are none of its own."""

    def __init__(self, leaves: set[str]):
        super().__init__()
        self.leaves = {f"model.{name}" for name in leaves}
        self.read: set[int] = set()
        self.thread, self.looks_itself = threading.get_ident(), True
        self.settings: dict[nn.Module, dict[str, Any]] = {}
        self.opaque: dict[str, str] = {}
        self.proxies: dict[str, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds = (_ConvNd, nn.Linear, _NormBase)  # subclasses too: they may use their weights in other ways
        return (isinstance(m, kinds) or module_qualified_name in self.leaves
                or super().is_leaf_module(m, module_qualified_name))

    def watch(self, model: nn.Module) -> None:
        """Note from now on what reads or changes this model's own tensors and settings."""
        for module in model.modules():
            self.settings[module] = _settings(module)
            for name in ("_parameters", "_buffers"):
                tensors = vars(module).get(name)
                if isinstance(tensors, dict):
                    vars(module)[name] = _Watched(tensors, self)
        self.looks_itself = False

    def note_changes(self, module: nn.Module) -> None:
        """Were this module's mode or numbers changed by a forward?"""
        if self.settings.get(module, {}) != _settings(module):
            with self._alone():
                self.read.update(map(id, [*module.parameters(recurse=False), *module.buffers(recurse=False)]))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What torch.fx itself, not a forward, looks at does not count."""
        before, self.looks_itself = self.looks_itself, True
        try:
            yield
        finally:
            self.looks_itself = before

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        self.proxies = parameter_proxy_cache
        with self._alone():
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        with self._alone():
            return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        self.note_changes(m)
        name = self.path_of_module(m)
        if m is self.root.model or self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        why, depth, end = "it has hooks", len(self.module_stack), next(iter(reversed(self.graph.nodes)))
        if not hooked(m):
            try:
                return super().call_module(m, forward, args, kwargs)
            except Exception as e:  # noqa: BLE001 - a forward may fail on proxies with any exception
                why = f"{type(e).__name__}: {e}".splitlines()[0]
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            while (node := next(iter(reversed(self.graph.nodes)))) is not end:
                self.graph.erase_node(node)
            self.proxies.clear()  # some may belong to nodes that were just erased
        self.opaque[name] = why
        return self.create_proxy("call_module", name, args, kwargs)


def trace(model: nn.Module, leaves: Iterable[str] = ()) -> Trace:
    """Follow model(x) in the model's present mode, without looking inside `leaves`. Raises :class:`Untraceable`.

    torch.fx patches nn.Module while it traces, for all threads: one traces at a time, the others' calls go on.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # A forward that sets attributes sets them on the stand-in.
    stand_in = copy.deepcopy(model, {id(t): t for t in tensors})
    for hooks in HOOKS:  # the model's own see only its arguments and results, which stay the same
        setattr(stand_in, hooks, OrderedDict())
    tracer = _Tracer(set(leaves))
    tracer.watch(stand_in)
    devices = {t.device for t in tensors if t.is_cuda}
    try:
        with exclusive, torch.random.fork_rng(devices):
            graph = tracer.trace(_Call(stand_in))
    except Exception as e:
        raise Untraceable(f"{type(e).__name__}: {e}".splitlines()[0]) from e
    for module in stand_in.modules():
        tracer.note_changes(module)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("model").removeprefix(".")
    return Trace(graph, tracer.read, {name.removeprefix("model."): why for name, why in tracer.opaque.items()})


def _settings(module: nn.Module) -> dict[str, Any]:
    """The mode and the numbers of a module by name."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float))}


def trace_parts(model: nn.Module, kind: type[nn.Module]) -> tuple[dict[str, Trace], dict[str, str]]:
    """Traces of the model, and of those of its parts that cannot be traced with it but can be traced alone.

    Parts without modules of `kind` are left out. Returns the traces by the name of the part ("" is the model), and the
    reasons by the name of each part that is in no trace.
    """
    traces: dict[str, Trace] = {}
    left: dict[str, str] = {}

    def visit(name: str, part: nn.Module, why: str) -> None:
        """Trace this part, else the parts in it. why: the reason why it is not in the trace of what it is a part of."""
        if isinstance(part, kind) or not any(isinstance(m, kind) for m in part.modules()):
            return
        if name and not _can_be_traced_alone(part):
            left[name] = why
        else:
            try:
                traces[name] = trace(part)
            except Untraceable as e:
                left[name] = str(e)
        if name in traces:
            untraced = traces[name].opaque
        else:
            untraced = {child: left[name] for child, _ in part.named_children()}
        for child, reason in untraced.items():
            visit(f"{name}.{child}".lstrip("."), part.get_submodule(child), reason)

    visit("", model, "")
    return traces, left


def _can_be_traced_alone(part: nn.Module) -> bool:
    """Does its forward take one argument, and is it more than a container?

    Further arguments could change the course of a forward, and the owner of a container may call what is in it without
    calling the container itself.
    """
    if getattr(type(part), "forward", None) in (nn.Sequential.forward, nn.Module.forward):
        return False
    return len(inspect.signature(part.forward).parameters) == 1


# What code names that reads a layer's tensors, or exchanges them, without calling the layer.
_READS = {"weight", "bias", "running_mean", "running_var", "parameters", "named_parameters", "_parameters", "buffers",
          "named_buffers", "_buffers", "get_parameter", "get_buffer", "state_dict", "functional_call"}


def may_read(module: nn.Module) -> bool:
    """Does a forward that was not traced, or anything that it calls by name, name what reads a layer's tensors?"""
    seen: set[Any] = set()
    todo: list[Any] = [module.forward, *vars(module).values()]
    while todo:
        function = inspect.unwrap(getattr(found := todo.pop(), "__func__", found))
        if not inspect.isfunction(function) or function in seen or _is_torchs(function):
            continue
        seen.add(function)
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        if not names.isdisjoint(_READS):
            return True
        todo += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        todo += [getattr(type(module), name, function.__globals__.get(name)) for name in names]
    return False


def _is_torchs(function: Any) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    """This code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def called_module(part: nn.Module, node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    return part.get_submodule(str(node.target))


def node_of(argument: object) -> fx.Node:
    """This argument of a node, which the caller knows to be the value of another node."""
    assert isinstance(argument, fx.Node)
    return argument


def passes_on(part: nn.Module, node: fx.Node) -> bool:
    """Does this node return its input as it is, in eval mode?"""
    if node.op != "call_module" or len(node.args) != 1:
        return False
    module = called_module(part, node)
    own = type(module).__module__ == _DropoutNd.__module__  # torch.nn's; subclasses could do anything
    known = type(module) is nn.Identity or (own and isinstance(module, _DropoutNd))
    return known and not module.training and not hooked(module) and "forward" not in vars(module)


def flattens(part: nn.Module, node: fx.Node) -> bool:
    """Does this node make [N, ...] a matrix [N, M]?"""
    if node.op == "call_module":
        module = called_module(part, node)
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    return node.target in (torch.flatten, "flatten") and (
        node.args[1:] == (1,) or (len(node.args) == 1 and node.kwargs == {"start_dim": 1}))
