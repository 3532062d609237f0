"""Members of an ensemble that are MLPs of one architecture run together, with one launch per layer for all of them.

Weights are stacked, [K, O, I]; :func:`ensadv_fast.ops.ensemble_linear` computes the forward pass and
:func:`ensadv_fast.ops.ensemble_linear_grad` the backward pass to the images. ReLUs keep one bit per element, as in
:mod:`ensadv_fast.sources.frozen`. The members' own forwards do not run then. So only those members are stacked whose
forwards are proved to do nothing else; the others run one after another, as without stacking.
"""
import itertools
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..ops.ensemble_linear import DTYPES, ensemble_linear, ensemble_linear_grad
from .frozen import relus, tracing
from .frozen.functions import refuse_create_graph
from .outputs import Outputs
from .source import Source

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_PARTS = (nn.Linear, nn.ReLU, nn.Flatten, nn.Dropout, nn.Identity)
_GLOBALS = {"torch": torch, "nn": nn, "F": F}
_NAMES = {*_GLOBALS, "functional", "relu", "flatten"}  # what a forward may name beside its own layers


class Chain(NamedTuple):
    """An MLP: these linear layers, each with True where a ReLU follows. flat: it flattens its images first."""

    flat: bool
    layers: list[tuple[nn.Linear, bool]]

    @property
    def architecture(self) -> tuple:
        return self.flat, *((m.weight.shape, m.bias is None, relu) for m, relu in self.layers)


def find_chain(model: nn.Module) -> Chain | None:
    """The layers of a frozen model in eval mode that is provably an MLP and nothing else; None for any other model."""
    if not all(_only_calls_layers(m) for m in model.modules()):
        return None
    try:
        nodes = list(tracing.trace(model).graph.nodes)
    except tracing.Untraceable:
        return None
    flat = False
    layers: list[tuple[nn.Linear, bool]] = []
    for before, node in itertools.pairwise(nodes):
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if node.all_input_nodes != [before] or node.args[0] is not before:
            return None
        if node.op == "output" or tracing.passes_on(model, node):
            continue
        if tracing.flattens(model, node):
            flat = flat or not layers  # behind a layer it changes nothing: a layer's output is flat if its input is
        elif type(module) is nn.Linear:
            layers.append((module, False))
        elif relus.is_relu(model, node) and layers:
            layers[-1] = layers[-1][0], True
        else:
            return None
    return Chain(flat, layers) if layers else None


def _only_calls_layers(module: nn.Module) -> bool:
    """Is this a layer or container of torch's, or does its forward only call its own layers, flatten and relu?"""
    if tracing.hooked(module) or "forward" in vars(module):
        return False
    if type(module) in (*_CONTAINERS, *_PARTS):
        return True
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__ or kind.__getattr__ is not nn.Module.__getattr__:
        return False
    forward = kind.forward
    code = getattr(forward, "__code__", None)
    if code is None or code.co_freevars or any(isinstance(c, CodeType) for c in code.co_consts):
        return False
    own = {name for name, _ in module.named_children()}
    return all(name in own or name in _NAMES and forward.__globals__.get(name) is _GLOBALS.get(name)
               for name in code.co_names)


class Layer(NamedTuple):
    """One layer of all members. weight: [K, O, I]. bias: [K, O] or None. act: "relu" or None."""

    weight: Tensor
    bias: Tensor | None
    act: str | None


class Stack:
    """Sources of one architecture and dtype that run together; logits are [K, N, C].

    The weights are kept once: the members' parameters become views of the stack, so the stack lives as long as any
    member does. Weights that are one stack already, as those of an ensemble made before, are used where they are.
    """

    def __init__(self, sources: Sequence[Source], chains: Sequence[Chain]):
        self.sources = tuple(sources)
        self.shared = all(_are_equal(s.mean, sources[0].mean) and _are_equal(s.std, sources[0].std)
                          for s in sources)
        self.flat = chains[0].flat
        self.layers: list[Layer] = []
        with torch.inference_mode(False), torch.no_grad():
            for same in zip(*(c.layers for c in chains), strict=True):
                modules = [m for m, _ in same]
                bias = None if modules[0].bias is None else _stack(modules, "bias")
                self.layers.append(Layer(_stack(modules, "weight"), bias, "relu" if same[0][1] else None))

    def logits_unchecked(self, x: Tensor) -> Tensor:
        """Logits [K, N, C] of images x, for callers that hold the members' sessions."""
        with self.sources[0].precision_context():
            entered = [s.entrance(x) for s in (self.sources[:1] if self.shared else self.sources)]
            entered = [e.flatten(1) for e in entered] if self.flat else entered
            if all(e.dim() == 2 and e.shape[1] == self.layers[0].weight.shape[2] for e in entered):
                return _Layers.apply(entered[0] if self.shared else torch.stack(entered), self.layers)
        # Images of another shape: the members themselves give their logits, or raise an error.
        return torch.stack([s.logits_unchecked(x) for s in self.sources])


class _Layers(Function):
    """All layers. It keeps weights and masks for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Layer]) -> Tensor:
        ctx.layers, ctx.shared, masks = layers, x.dim() == 2, []
        x = x.detach()
        for layer in layers:
            x, mask = ensemble_linear(x, layer.weight, layer.bias, act=layer.act)
            masks.append(mask)
        ctx.save_for_backward(*masks)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_create_graph()
        masks = ctx.saved_tensors
        for i in reversed(range(len(masks))):
            grad = ensemble_linear_grad(grad, ctx.layers[i].weight, masks[i], reduce=ctx.shared and i == 0)
        return grad, None


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or one is not None and other is not None and torch.equal(one, other)


def _stack(modules: Sequence[nn.Linear], name: str) -> Tensor:
    """The parameters of that name as one tensor, [K, ...], of which they are views afterwards."""
    parts = [getattr(m, name) for m in modules]
    if _are_one_stack(parts):
        return parts[0].detach().as_strided((len(parts), *parts[0].shape), (parts[0].numel(), *parts[0].stride()))
    stack = torch.stack([p.detach() for p in parts])
    for module, part in zip(modules, stack.unbind()):
        setattr(module, name, nn.Parameter(part, requires_grad=False))
    return stack


def _are_one_stack(parts: Sequence[Tensor]) -> bool:
    """Do these tensors of one shape lie one behind the other in one storage?"""
    first, store = parts[0], parts[0].untyped_storage().data_ptr()
    return all(p.is_contiguous() and p.untyped_storage().data_ptr() == store
               and p.storage_offset() == first.storage_offset() + k * first.numel() for k, p in enumerate(parts))


class Unit(NamedTuple):
    """What runs at once: the members `index` of an ensemble, as a source (logits [N, C]) or a stack ([K, N, C])."""

    index: tuple[int, ...]  # type: ignore[assignment]  # a field here, not the method of tuples
    run: Source | Stack

    def of(self, grad: Tensor) -> Tensor:
        """The part of a gradient by all members' logits [K, N, C] that is by this unit's logits."""
        if not isinstance(self.run, Stack):
            return grad[self.index[0]]
        return grad if len(self.index) == len(grad) else grad[list(self.index)]

    def undeclared(self, logits: Tensor) -> list[Tensor]:
        """The logits that may be probabilities instead: a source's, unless it was told so."""
        return self.run.reads.undeclared(logits) if isinstance(self.run, Source) else list(logits)

    def rows(self, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(index of a member, its logits [N, C]), from this unit's logits."""
        return zip(self.index, logits if isinstance(self.run, Stack) else [logits])


def units(sources: Sequence[Source], stack: bool) -> list[Unit]:
    """The units of an ensemble, in the order of their first members. Without `stack` every member is its own unit.

    Stacked are folded sources (fold, no compile, crafting "eval", not live, a dtype of ops.ensemble_linear) that are
    MLPs of one architecture and dtype; their normalisations may differ.
    """
    alike: dict[tuple, list[int]] = {}
    chains: dict[int, Chain] = {}
    for i, source in enumerate(sources):
        found = find_chain(source.module) if stack and source.keeps_bits and source.dtype in DTYPES else None
        if found is not None and (source.reads != Outputs() or found.layers[-1][0].out_features < 2):
            found = None  # one logit a sample, or an output that is to be read in another way
        if found is not None:
            chains[i] = found
        key = (i,) if found is None else (source.dtype, *found.architecture)
        alike.setdefault(key, []).append(i)

    def run(index: list[int]) -> Source | Stack:
        if len(index) == 1:
            return sources[index[0]]
        return Stack([sources[i] for i in index], [chains[i] for i in index])

    return [Unit(tuple(index), run(index)) for index in alike.values()]
