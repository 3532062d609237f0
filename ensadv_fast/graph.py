"""Graphs of a model's forward pass (torch.fx), and passes over them.

A trace only reads: it runs the forward of a stand-in that shares the model's tensors, and its graph says which module
is called on what. Passes then change the model's modules in place, and its own Python forward goes on running, so
that nothing it computes besides (sizes, random numbers, state) is frozen into a graph.
"""
import copy
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
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


def fold_batch_norms(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Fold every batch normalisation that follows a convolution or linear layer into that layer's weights, in place.

    W' = W * s and b' = (b - mean) * s + beta per output channel, s = gamma / sqrt(var + eps), computed in float64 and
    rounded once to `dtype` (None: the layer's own). The normalisation becomes nn.Identity; what else it did, as
    timm's BatchNormAct2d does dropout and an activation, stays. Both must be in eval mode, called once, on each
    other alone, of exactly these classes, registered once, with no hooks, and their tensors read by nobody else; and
    a second trace must find the forward on the same course.

    Returns the names of the parts that still hold normalisations because they could not be traced, and why.
    """
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return {}
    traces, left = trace_parts(model, _BatchNorm)
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    calls: Counter[int] = Counter()
    read: set[int] = set()
    for prefix, traced in traces.items():
        part = model.get_submodule(prefix)
        calls.update(id(part.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module")
        read |= traced.read

    def alone(module: nn.Module) -> bool:
        own = (*module._parameters.values(), *module._buffers.values())
        return calls[id(module)] == names[id(module)] == 1 and read.isdisjoint(map(id, own))

    for prefix, traced in traces.items():
        part = model.get_submodule(prefix)
        done = {}
        for layer_name, norm_name in _pairs(part, traced.graph):
            layer, norm = part.get_submodule(layer_name), part.get_submodule(norm_name)
            before = layer.weight, layer.bias
            free = not (hooked(layer) or hooked(norm))  # a hook asked for these very values
            if free and alone(layer) and alone(norm) and _fold(layer, norm, dtype):
                part.set_submodule(norm_name, _rest_of(norm))
                done[norm_name] = layer, before, norm
        if done and not _same_course(part, traced, done):
            for norm_name, (layer, before, norm) in done.items():
                layer.weight, layer.bias = before
                part.set_submodule(norm_name, norm)
            left[prefix] = "its forward looks at its normalisations"
    return {name: why for name, why in left.items()
            if any(isinstance(m, _BatchNorm) for m in model.get_submodule(name).modules())}


def _same_course(part: nn.Module, before: Trace, leaves: Iterable[str]) -> bool:
    """Does the part's forward still call the same on the same, now that `leaves` are of other classes?"""
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
# Of timm, known by name because it need not be installed: a convolution that pads by itself, and a normalisation with
# what it does after normalising.
_SAME_CONV = ("timm.layers.conv2d_same", "Conv2dSame")
_NORM_ACT = ("timm.layers.norm_act", "BatchNormAct2d")


def _named(module: nn.Module, name: tuple[str, str]) -> bool:
    return (type(module).__module__, type(module).__qualname__) == name


def _layer_kind(module: nn.Module) -> type[nn.Module] | None:
    kind = nn.Conv2d if _named(module, _SAME_CONV) else type(module)
    return kind if kind in _NORM_OF and "forward" not in vars(module) else None


def _norm_kind(module: nn.Module) -> type[nn.Module] | None:
    kind = nn.BatchNorm2d if _named(module, _NORM_ACT) else type(module)
    known = kind in (*_NORM_OF.values(), nn.SyncBatchNorm) and "forward" not in vars(module)
    return kind if known and not module.training and module.running_mean is not None else None


def _rest_of(norm: Any) -> nn.Module:
    """What a folded normalisation still has to do."""
    rest = nn.Sequential(norm.drop, norm.act) if _named(norm, _NORM_ACT) else nn.Identity()
    return rest.train(norm.training)


def _pairs(part: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """(layer, normalisation) where the latter is the only use of the former's output."""
    found = []
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        norm_kind, source = _norm_kind(called(part, node)), node.args[0]
        if norm_kind is None or not isinstance(source, fx.Node):
            continue
        while passes_on(part, source) and len(source.users) == 1:
            source = node_of(source.args[0])
        if source.op != "call_module" or len(source.users) != 1:
            continue
        kind = _layer_kind(called(part, source))
        if kind is None or norm_kind not in (_NORM_OF[kind], nn.SyncBatchNorm):
            continue
        # Of [N, L, C], which a linear layer takes too, BatchNorm1d normalises L.
        if kind is not nn.Linear or _is_matrix(part, source.args[0]):
            found.append((str(source.target), str(node.target)))
    return found


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


def _is_matrix(part: nn.Module, node: object) -> bool:
    """Does the graph prove that this value has two dimensions?"""
    if not isinstance(node, fx.Node):
        return False
    if flattens(part, node):
        return True
    if node.op == "call_module":
        module = called(part, node)
        keeps = type(module) in (nn.Linear, nn.BatchNorm1d, nn.Identity, nn.Dropout)
        keeps |= type(module).__module__ == "torch.nn.modules.activation" and len(node.args) == 1
        return keeps and _is_matrix(part, node.args[0])
    if node.target in ("view", "reshape"):
        return len(node.args) == 3
    elementwise = node.target in (torch.relu, F.relu, "relu", torch.tanh, "tanh", F.gelu, F.silu)
    return elementwise and _is_matrix(part, node.args[0])


def _fold(layer: Any, norm: Any, dtype: torch.dtype | None) -> bool:
    """Multiply the normalisation into the layer's weights; False, and nothing done, where `dtype` cannot hold them."""
    dtype = layer.weight.dtype if dtype is None else dtype

    def wide(t: Tensor | None, default: float) -> Tensor:
        return torch.full_like(norm.running_mean, default, dtype=torch.float64) if t is None else t.detach().double()

    s = wide(norm.weight, 1.0) * (norm.running_var.double() + norm.eps).rsqrt()
    weight = layer.weight.detach().double()
    if getattr(layer, "transposed", False):  # [in, out / groups, ...]: a group's outputs are along dimension 1
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
