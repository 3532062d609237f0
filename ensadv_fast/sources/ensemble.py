"""Ensembles: several sources that a perturbation is computed on at once."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import checks
from ..ops.logit_grad import FUSES, LogitGrad, member_weights
from ..ops.logit_grad import unchecked as start_backward
from ..ops.losses import Objective, choose_labels
from ..ops.memory import broadcast
from ..system.streams import SideStreams
from .base import BaseSource, InputGrad, for_autograd, gradient
from .cuda_graphs import Replays
from .first_look import FirstLook
from .source import Source, as_source
from .stacking import Stack, Unit, units


class Ensemble(BaseSource):
    """K sources fused into one: one label and one loss from all logits [K, N, C], gradients summed over members.

    Args:
        sources: K >= 1 members on one device, with the same classes: :class:`Source`, each with its own dtype,
            normalisation and memory format, or plain modules, which are used as they are.
        fuse: what is mixed. ``logits``: one loss of sum_k w_k z_k (Dong et al. 2018, section 3.3, who found it the
            strongest). ``probs``: one loss of the mixed probabilities P = sum_k w_k p_k. ``loss``: sum_k w_k loss(z_k).
            Labels come from the mixed logits for "logits", from P for the other two; :func:`ensadv_fast.ops.logit_grad`
            has the formulas.
        weights: w, K numbers or a tensor [K] on the members' device, >= 0 and used as given. Default: 1/K each.
        sequential: hold the activations of one member at a time. It costs one more forward pass of every member;
            none where fuse is "loss" and the labels are given. Members then compute their own scale each, and the
            gradient differs from the other mode's by roundings.

    Members that are MLPs of one architecture and dtype, folded sources in eval mode, run as one stack, a launch a
    layer for all of them (:mod:`ensadv_fast.sources.stacking`): the same but for roundings. Their weights are then
    views of the stack, kept once, and alive while any of these sources is. Not with `sequential`.

    On CUDA the members' passes run beside each other, on streams of their own, unless `sequential`; attacks are
    captured in CUDA graphs where every member's `cuda_graph` lets them be.

    Wherever a :class:`Source` is taken as an attack's source, an Ensemble is. Its logits are float32 (float64 where a
    member's are): the mixed ones for fuse "logits", log P for the others. An ensemble of one without weights is that
    source, to the bit.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """

    def __init__(self, sources: Sequence[Source | Callable[[Tensor], Any]], *, fuse: str = "logits",
                 weights: Sequence[float] | Tensor | None = None, sequential: bool = False) -> None:
        op = "Ensemble"
        if isinstance(sources, nn.Module | BaseSource) or not isinstance(sources, Sequence):
            raise TypeError(f"{op}: sources must be a sequence of sources, got {type(sources).__name__}")
        for s in sources:
            if not isinstance(s, Source) and (isinstance(s, BaseSource | type) or not callable(s)):
                raise TypeError(f"{op}: sources must be Source or torch.nn.Module each, got {type(s).__name__}")
        self.sources: tuple[Source, ...] = tuple(as_source(s) for s in sources)
        if not self.sources:
            raise ValueError(f"{op}: sources must be at least one, got none")
        devices = {s.device for s in self.sources if not s.follows}
        if len(devices) > 1:
            raise ValueError(f"{op}: sources must be on one device, got {', '.join(sorted(map(str, devices)))}")
        checks.choice(op, "fuse", fuse, FUSES)
        checks.flag(op, "sequential", sequential)
        self.fuse, self.sequential, self.look = fuse, sequential, FirstLook()
        self.follows, self.device = not devices, next(iter(devices), self.sources[0].device)
        self.crafting = "train" if any(s.crafting == "train" for s in self.sources) else "eval"
        with torch.inference_mode(False):
            weights = weights.clone() if isinstance(weights, Tensor) else weights
            self._weights = {dtype: member_weights(op, weights, len(self.sources), self.device, dtype)
                             for dtype in (torch.float32, torch.float64)}
        self._modules: list[nn.Module] = []
        self._units()
        wishes = {s.replays.allowed for s in self.sources if s.replays is not None}
        self.replays = Replays(self.device, False if False in wishes else True if wishes == {True} else "auto")
        self._sides = SideStreams(self.device) if self.device.type == "cuda" and not sequential else None
        self._alone = self.sources[0] if len(self.sources) == 1 and weights is None else None

    def check_device(self, op: str, x: Tensor) -> None:
        super().check_device(op, x)
        for source in self.sources:
            source.check_device(op, x)
        if self.follows:
            self._weights = {dtype: None if w is None else w.to(x.device) for dtype, w in self._weights.items()}

    def __repr__(self) -> str:
        return f"Ensemble({', '.join(map(repr, self.sources))}, fuse={self.fuse!r})"

    @contextmanager
    def session(self, key: Tensor | None = None) -> Iterator["Ensemble"]:
        with ExitStack() as stack:
            for source in self.sources:
                stack.enter_context(source.session(key))
            yield self

    def _units(self) -> list[Unit]:
        """What runs at once: again after a member's module was prepared anew, as by :meth:`Source.calibrate`."""
        modules = [s.module for s in self.sources]
        if len(modules) != len(self._modules) or any(a is not b for a, b in zip(modules, self._modules)):
            self._running = units(self.sources, stack=not self.sequential)
            self._modules = modules
        return self._running

    def _logits(self, x: Tensor) -> Tensor:
        """All members' logits [K, N, C]."""
        works: list[Callable[[], Tensor]] = [partial(unit.run.logits_unchecked, x) for unit in self._units()]
        # A backward pass of the caller's would free what side streams still read: there only one stream will do.
        return self._stacked([work() for work in works] if torch.is_grad_enabled() else self._together(works))

    def _stacked(self, passed: list[Tensor]) -> Tensor:
        """What the units gave as [K, N, C] in the dtype of the computation."""
        rows = dict(row for unit, logits in zip(self._running, passed, strict=True) for row in unit.rows(logits))
        members = [rows[k] for k in range(len(self.sources))]
        classes = [z.shape[1] for z in members]
        if len(set(classes)) > 1:
            raise ValueError(f"Ensemble: sources must have the same classes, got {classes}")
        wide = torch.float64 if any(z.dtype == torch.float64 for z in members) else torch.float32
        return torch.stack([z.to(wide) for z in members])

    def _member_weights(self, dtype: torch.dtype) -> Tensor:
        weights, k = self._weights[dtype], len(self.sources)
        return torch.full((k,), 1 / k, dtype=dtype, device=self.device) if weights is None else weights

    def _mixed(self, stacked: Tensor) -> Tensor:
        w = self._member_weights(stacked.dtype).view(-1, 1, 1)
        if self.fuse == "logits":
            return (w * stacked).sum(0)
        return (w.log() + stacked.log_softmax(2)).logsumexp(0)

    def logits(self, x: Tensor) -> Tensor:
        """The mixed logits [N, C] of images x (log P for fuse "probs" and "loss"), float32 or float64."""
        if self._alone is not None:
            return self._alone.logits(x)
        with self.session():
            return self._mixed(self._logits(x))

    def losses_unchecked(self, x: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        if self._alone is not None:
            return self._alone.losses_unchecked(x, labels, objective)
        if callable(objective.loss):
            return self._own_losses(x, labels, objective)
        stacked = self._logits(x)
        start = start_backward(stacked, labels, objective.of_labels, fuse=self.fuse,
                               weights=self._weights[stacked.dtype], rescale=False)
        return start.loss, self._mixed(stacked)

    def input_grad_unchecked(self, x: Tensor, labels: Tensor | None, objective: Objective, *,
                             key: Tensor | None = None, index: Tensor | None = None,
                             rescale: bool = True) -> InputGrad:
        if self._alone is not None:
            return self._alone.input_grad_unchecked(x, labels, objective, key=key, index=index, rescale=rescale)
        x, labels = for_autograd(x.detach()), for_autograd(labels)
        if callable(objective.loss):
            return self._own_gradient(x, labels, objective, key, index)
        wide = x if x.dtype == torch.float64 else x.float()  # what members' gradients are summed in
        running = self._units()

        def begin(passed: list[Tensor]) -> tuple[Tensor, LogitGrad]:
            stacked = self._stacked([z.detach() for z in passed])
            if labels is not None:
                checks.labels("attack", "y", labels, len(x), x.device, stacked.shape[2])
            return self._mixed(stacked), start_backward(stacked, labels, objective, fuse=self.fuse,
                                                        weights=self._weights[stacked.dtype], index=index, key=key,
                                                        rescale=rescale)

        passed: list[Tensor] = []  # stays empty where the members look at theirs
        if self.sequential and self.fuse == "loss" and labels is not None and objective.rule == "true":
            alone = [source.input_grad_unchecked(wide, labels, objective, rescale=rescale) for source in self.sources]
            mixed, start = begin([p.logits for p in alone])
            w = self._member_weights(start.scale.dtype)
            grads = [p.grad * broadcast(w[k] * start.scale / p.scale, x).to(wide.dtype)
                     for k, p in enumerate(alone)]
        else:
            leaves = [wide.detach().requires_grad_() for _ in running]
            with torch.enable_grad():
                passed = self._together([partial(self._forward, unit.run, leaf)
                                         for unit, leaf in zip(running, leaves)])
            mixed, start = begin(passed)
            grads = self._together([partial(gradient, leaf, z, unit.of(start.grad))
                                    for unit, z, leaf in zip(running, passed, leaves)])
        total = sum(grads[1:], grads[0]).to(x.dtype)
        if not self.look.gradient and rescale:
            self.look.at_gradient(total, [t for u, z in zip(running, passed) for t in u.undeclared(z)], objective.loss)
        return InputGrad(total, start.labels, start.loss, mixed, start.scale)

    def _together(self, works: list[Callable[[], Tensor]]) -> list[Tensor]:
        """The units' works: on CUDA at once, on streams of their own; on the CPU, or if `sequential`, in turn."""
        return self._sides.together(works) if self._sides is not None else [work() for work in works]

    def _forward(self, source: Source | Stack, leaf: Tensor) -> Tensor:
        """A unit's logits; with `sequential`, its activations are computed again when its backward pass begins."""
        if not self.sequential or isinstance(source, Stack):  # there are no stacks with `sequential`
            return source.logits_unchecked(leaf)
        return checkpoint(source.logits_unchecked, leaf, use_reentrant=False,
                          preserve_rng_state=source.crafting == "train")

    def _own_losses(self, x: Tensor, labels: Any, objective: Objective) -> tuple[Tensor, Tensor]:
        """(loss [N], mixed logits) where the loss is the caller's own: of the mixed logits, or for fuse "loss" the
        mixed loss of the members'; the logits are then mixed as for fuse "logits"."""
        stacked = self._stacked([unit.run.logits_unchecked(x) for unit in self._units()])
        if self.fuse != "loss":
            mixed = self._mixed(stacked)
            return objective.losses(mixed, labels), mixed
        losses = torch.stack([objective.losses(z, labels) for z in stacked])
        w = self._member_weights(stacked.dtype)
        return (w.to(losses.dtype)[:, None] * losses).sum(0), (w.view(-1, 1, 1) * stacked).sum(0)

    def _own_gradient(self, x: Tensor, labels: Any, objective: Objective, key: Tensor | None,
                      index: Tensor | None) -> InputGrad:
        if labels is None or objective.rule != "true":
            with torch.no_grad():
                labels = choose_labels(self.logits(x), labels, objective.rule, key, index)
        with torch.enable_grad():
            leaf = (x if x.dtype == torch.float64 else x.float()).detach().requires_grad_()
            losses, mixed = self._own_losses(leaf, labels, objective)
            scale = torch.ones_like(losses)
            grad = gradient(leaf, losses, scale)
        return InputGrad(grad.to(x.dtype), labels, losses.detach(), mixed.detach(), scale)
