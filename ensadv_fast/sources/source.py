"""Sources: classifiers that perturbations are computed on."""
import copy
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import ops
from ..ops import checks, keys, memory
from ..ops.logit_grad import unchecked as start_backward
from ..ops.losses import Objective, choose_labels
from .base import BaseSource, InputGrad, for_autograd
from .calibration import Agreement, measure_agreement
from .cuda_graphs import Replays, permission
from .frozen import folding, relus
from .frozen.frozen_pass import FrozenPass
from .frozen.packing import Packs
from .modes import forked_generators, mode_flags
from .precision import fast_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ENOUGH = 0.97  # of the exact FGSM step's loss increase: what calibrate lets a dtype lose


class Source(BaseSource):
    """A classifier prepared once for computing input gradients on it.

    Args:
        model: maps [N, C, H, W] to logits [N, classes]; a tuple or list is read as (logits, ...), as Inception's
            auxiliary head gives in train mode. Wrappers of data parallelism are taken off: crafting never
            communicates.
        mean, std: per-channel normalisation that the model expects, applied here, so that x is always an image in
            [0, 1]. Default: none.
        dtype: "auto" (:func:`fast_dtype`: bfloat16 where the device is faster at this model in it, else float32), a
            float dtype, or None: the model's own, and the caller's autocast with it. Normalisation layers keep float32
            statistics.
        channels_last: "auto" (as True, until the model calls .view on what only contiguous tensors allow), True or
            False.
        crafting: "eval", or "train": dropout active, under generators forked from the key; batch normalisation by
            the batch's statistics, without moving the running ones (the released MNIST code of Tramer et al. 2018).
        live: use the model itself instead of a frozen copy: it may be training. Every flag is restored after
            each use, also after an exception. A dtype of 16 bits then means autocast to it while crafting, whatever
            the training's precision is; another dtype, and channels_last, must leave the model as it is.
        fold: multiply batch normalisations that follow a convolution or linear layer into its weights, in the
            frozen copy, where crafting is "eval" (:func:`ensadv_fast.sources.frozen.folding.fold_batch_norms` says
            which; the others stay). Where a part of the model cannot be traced by torch.fx, it stays as it is, and a
            warning says so, once per source. What its forward pass then keeps for the backward pass is weights and
            bits, not activations (:class:`ensadv_fast.sources.frozen.frozen_pass.FrozenPass`, without compile):
            gradients by the images, once. On the CPU convolutions' weights are then held in oneDNN's order as well,
            twice (:mod:`ensadv_fast.sources.frozen.packing`).
        compile: pass the frozen copy through torch.compile.
        cuda_graph: whether attacks on this source are captured in CUDA graphs, whole, and replayed on new data and keys
            (:mod:`ensadv_fast.sources.cuda_graphs`). "auto": for a frozen source on CUDA, crafting "eval", not
            compiled, an attack that comes a second time with the same shapes and numbers is captured then; where that
            cannot be (a model that waits for values, draws random numbers, has hooks or counts its calls), one warning,
            and no more graphs. True: at the first call, and what cannot be captured is an error; a live source too. Its
            weights must then move in place, as optimizers move them; parameters, buffers or submodules that are
            exchanged are noticed, but not plain attributes that a forward pass reads. False: never. A graph keeps the
            memory of what it works on; the graphs of a source share it, and nothing of it is what a caller gets.

    A source that is not live and not exact keeps the model as it came, a second frozen copy in host memory, for
    :meth:`calibrate`: as many bytes as its parameters and buffers have.

    Exact mode, ``Source(model, dtype=torch.float32, fold=False, channels_last=False)``, gives plain PyTorch's values.

    Raises:
        TypeError, ValueError: naming the argument; also for a model whose parameters were created in inference mode.
    """

    dtype: torch.dtype | None
    channels_last: bool
    module: nn.Module

    def __init__(self, model: nn.Module, *, mean: Sequence[float] | Tensor | None = None,
                 std: Sequence[float] | Tensor | None = None, dtype: torch.dtype | str | None = "auto",
                 fold: bool = True, channels_last: bool | str = "auto", compile: bool = False,
                 cuda_graph: bool | str = "auto", crafting: str = "eval", live: bool = False) -> None:
        op = "Source"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
        checks.choice(op, "crafting", crafting, ("eval", "train"))
        if dtype not in ("auto", None, *DTYPES):
            raise ValueError(f"{op}: dtype must be 'auto', None, {checks.names(DTYPES)}, got {dtype!r}")
        for name, value in (("fold", fold), ("compile", compile), ("live", live)):
            checks.flag(op, name, value)
        for name, choice in (("channels_last", channels_last), ("cuda_graph", cuda_graph)):
            if choice not in ("auto", True, False):
                raise ValueError(f"{op}: {name} must be 'auto', True or False, got {choice!r}")
        if live and (dtype not in ("auto", None, *checks.NARROW) or channels_last is True or compile):
            raise ValueError(f"{op}: a live model is used as it is; channels_last, compile and a dtype of more than 16 "
                             "bits do not apply")
        model = self._unwrap(model)
        self.live, self.crafting, self.fold, self.compile = live, crafting, fold, compile
        self.keeps_bits = fold and crafting == "eval" and not (live or compile)
        self._relu_plan, self._packs = relus.NOTHING_FUSED, Packs()
        self.in_session, self._format_is_free = False, False
        self._original: nn.Module | None = None
        self._autocast = dtype if live and dtype in checks.NARROW else None
        self.device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())),
                           torch.device("cpu"))
        self.replays = Replays(self.device, permission(op, cuda_graph, self.device, crafting, live, compile))
        with torch.inference_mode(False):  # what is made here must serve autograd later
            self.mean, self.std = self._statistics(mean, "mean"), self._statistics(std, "std")
            if live:
                self.dtype, self.channels_last, self.module = None, False, model
                return
            self.dtype = dtype if isinstance(dtype, torch.dtype | None) else fast_dtype(self.device, model)
            self.channels_last = channels_last in ("auto", True)
            self._format_is_free = channels_last == "auto"
            self.module = self._prepared(model)
            if (self.dtype, fold, self.channels_last, compile) != (torch.float32, False, False, False):
                self._original = _detached(model).to("cpu")

    def __repr__(self) -> str:
        dtype = "the model's dtype" if self.dtype is None else checks.names([self.dtype])
        how = ["live" if self.live else "frozen", dtype, *["normalised"] * (self.mean is not None or
                                                                             self.std is not None),
               f"crafting={self.crafting!r}", str(self.device)]
        return f"Source({type(self.module).__name__}: {', '.join(how)})"

    @staticmethod
    def _unwrap(model: nn.Module) -> nn.Module:
        """The model without wrappers of data parallelism. ValueError where no gradient can flow through it."""
        while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        for name, t in itertools.chain(model.named_parameters(), model.named_buffers()):
            if t.is_inference():
                raise ValueError(
                    f"Source: model was created in torch.inference_mode ({name} is an inference tensor), so no "
                    "gradient can flow through it: create or load it outside that mode"
                )
        return model

    def _statistics(self, values: Sequence[float] | Tensor | None, name: str) -> Tensor | None:
        if values is None:
            return None
        values = torch.as_tensor(values, dtype=torch.float32, device=self.device).reshape(-1)
        if name == "std" and not bool((values > 0).all()):
            raise ValueError(f"Source: std must be > 0, got {values.tolist()}")
        return values.view(1, -1, 1, 1)

    def _prepared(self, model: nn.Module) -> nn.Module:
        frozen = _detached(model)
        for module in frozen.modules():
            module.training = self.crafting == "train"
            if isinstance(module, _NormBase) and self.crafting == "train":
                module.track_running_stats = False
        if self.fold and self.crafting == "eval":
            left = folding.fold_batch_norms(frozen, self.dtype)
            if left:
                parts = "; ".join(f"{name or 'the model itself'} ({why})" for name, why in left.items())
                warnings.warn(f"Source: fold leaves batch normalisations as they are in {parts}. Gradients are right, "
                              "but slower than they could be; fold=False silences this.", stacklevel=3)
        if self.keeps_bits:
            self._relu_plan, self._packs = relus.plan_relus(frozen), Packs()
        if self.dtype is not None:
            narrow = self.dtype in checks.NARROW  # 16-bit statistics would move every activation
            norms = [m for m in frozen.modules() if isinstance(m, _NormBase)] if narrow else []
            states = [copy.deepcopy(norm.state_dict()) for norm in norms]
            frozen.to(self.dtype)
            for norm, state in zip(norms, states):
                norm.float().load_state_dict(state)
        if self.channels_last:
            lay_out(frozen, torch.channels_last)
        return cast(nn.Module, torch.compile(frozen)) if self.compile else frozen

    def calibrate(self, x: Tensor, y: Tensor | None = None, *, eps: float = 8 / 255) -> Agreement:
        """Measure this source against exact mode on real images, and switch it to float32 where it is too weak.

        Args:
            x: images [N, C, H, W] in [0, 1], float, on the source's device: some hundreds that the model was not
                trained on. They are looked at 64 at a time.
            y: integers or bools [N] or [N, 1], the true labels; default: the exact model's predictions.
            eps: size of the FGSM step that the two are compared by, in image units.

        Returns:
            :class:`ensadv_fast.Agreement`, of the source as it was. Where its loss_increase is under 0.97, a source
            of another dtype is prepared anew, in place, in float32; everything else about it stays.

        It needs the model as it came, which the source keeps in host memory, and for its duration a float32 copy on
        the device. Raises TypeError, ValueError: also for a live source, which is used as it is.
        """
        op = "calibrate"
        if self.live:
            raise ValueError(f"{op}: source must not be live: its model is used as it is, in the caller's precision")
        x = checks.images(op, x, checks.FLOATS)
        if x.dim() != 4 or not len(x):
            raise ValueError(f"{op}: x must have shape [N, C, H, W], N >= 1, got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"{op}: x must be on the model's device {self.device}, got {x.device}")
        if y is not None:
            y = checks.labels(op, "y", y, len(x), x.device)
        if checks.finite(op, "eps", eps) <= 0:
            raise ValueError(f"{op}: eps must be > 0, got {eps}")
        exact, original = self, self._original
        if original is not None:
            exact = Source(copy.deepcopy(original).to(self.device), mean=self.mean, std=self.std,
                           dtype=torch.float32, fold=False, channels_last=False, crafting=self.crafting)
        found = measure_agreement(self, exact, x, y, eps, keys.next_key("cpu"))
        if found.loss_increase < ENOUGH and self.dtype != torch.float32 and original is not None:
            self.dtype = torch.float32
            with torch.inference_mode(False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what cannot be folded was said when the source was made
                self.module = self._prepared(copy.deepcopy(original).to(self.device))
        return found

    @contextmanager
    def session(self, key: Tensor | None = None) -> Iterator["Source"]:
        if self.in_session:
            yield self
            return
        self.in_session = True
        try:
            with ExitStack() as stack:
                recording = torch.is_grad_enabled()
                stack.enter_context(torch.inference_mode(False))  # which would turn recording on
                stack.enter_context(torch.set_grad_enabled(recording))
                if self.live:
                    stack.enter_context(mode_flags(self.module, self.crafting))
                if self.crafting == "train":
                    stack.enter_context(forked_generators(self.device, key))
                yield self
        finally:
            self.in_session = False

    @property
    def fused(self) -> bool:
        """Are the entrance and the loss our kernels'? Elsewhere they are plain PyTorch's, to the last bit."""
        return self.dtype in checks.NARROW or self.dtype == torch.float32 and (self.fold or self.channels_last)

    def entrance(self, x: Tensor) -> Tensor:
        """Images x as the model takes them: normalised, in its dtype and memory format."""
        as_it_is = self.mean is None and self.std is None and x.dtype == self.dtype
        if self.fused and x.dim() == 4 and not as_it_is:
            channels_last = self.channels_last or memory.memory_format(x) == torch.channels_last
            mean, std = (None if v is None else v.flatten().expand(x.shape[1]) if v.numel() == 1 else v.flatten()
                         for v in (self.mean, self.std))
            return ops.model_entry(x, mean, std, dtype=self.dtype, channels_last=channels_last, clamp=False)
        if self.mean is not None:
            x = x - self.mean.to(x.dtype)
        if self.std is not None:
            x = x / self.std.to(x.dtype)
        if self.dtype is not None:
            x = x.to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x

    def precision_context(self) -> AbstractContextManager:
        """Autocast as this source wants it: its own, none where it has a dtype, else the caller's."""
        if self._autocast is not None:
            return torch.autocast(self.device.type, self._autocast)
        if self.dtype is not None and torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, enabled=False)
        return nullcontext()

    def _forward(self, x: Tensor) -> Tensor:
        x = self.entrance(x)
        with FrozenPass(self._relu_plan, self._packs) if self.keeps_bits else nullcontext():
            return self.module(x)

    def logits_unchecked(self, x: Tensor) -> Tensor:
        """:meth:`logits` for callers that hold a session."""
        return self._outputs(x)[0]

    def _outputs(self, x: Tensor) -> Sequence[Tensor]:
        """The logits of images x, and what else the model gives beside them."""
        with self.precision_context():
            try:
                out = self._forward(x)
            except RuntimeError as e:
                if not self._format_is_free or "view size is not compatible" not in str(e):
                    raise
                self.channels_last = self._format_is_free = False
                lay_out(self.module, torch.contiguous_format)
                out = self._forward(x)
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        logits = outputs[0]
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"Source: model must return logits [N, C] for x [N, ...], N = {len(x)}; got {got}")
        return outputs

    def logits(self, x: Tensor) -> Tensor:
        """Logits [N, C] of images x, in the source's dtype; differentiable where autograd records."""
        with self.session():
            return self.logits_unchecked(x)

    def losses_unchecked(self, x: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        logits = self.logits_unchecked(x)
        return objective.losses(logits, labels), logits

    def input_grad_unchecked(self, x: Tensor, labels: Tensor | None, objective: Objective, *,
                             key: Tensor | None = None, index: Tensor | None = None,
                             rescale: bool = True) -> InputGrad:
        x, labels = for_autograd(x), for_autograd(labels)
        with torch.enable_grad(), self.precision_context():
            leaf = x.detach().requires_grad_()
            logits = self.logits_unchecked(leaf)
            if labels is not None:
                checks.labels("attack", "y", labels, len(x), x.device, logits.shape[1])
            if self.fused:
                start = start_backward(logits, labels, objective, index=index, key=key, rescale=rescale)
                (grad,) = torch.autograd.grad(logits, leaf, start.grad)
                return InputGrad(grad, start.labels, start.loss, logits.detach(), start.scale)
            chosen = choose_labels(logits.detach(), labels, objective.rule, key, index)
            losses = objective.losses(logits, chosen)
            scale = objective.scale(logits, chosen) if rescale else torch.ones_like(losses)
            (grad,) = torch.autograd.grad(losses, leaf, scale)
        return InputGrad(grad, chosen, losses.detach(), logits.detach(), scale)


def lay_out(module: nn.Module, layout: torch.memory_format) -> None:
    cast(Any, module).to(memory_format=layout)  # torch 2.13's stub lacks it


def _detached(model: nn.Module) -> nn.Module:
    """A copy that no gradient is computed for."""
    with torch.no_grad():  # script modules, which have no requires_grad_, clone their parameters
        alone = copy.deepcopy(model)
    for p in alone.parameters():
        p.requires_grad_(False)
        p.grad = None
    return alone


@overload
def as_source(model: Source | nn.Module) -> Source: ...


@overload
def as_source(model: BaseSource | nn.Module) -> BaseSource: ...


def as_source(model: BaseSource | nn.Module) -> BaseSource:
    """A source as it is; a plain module as the live source that an attack means by it."""
    if isinstance(model, BaseSource):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"attack: source must be a Source or a torch.nn.Module, got {type(model).__name__}")
    return Source(model, live=True, fold=False, channels_last=False, dtype=None)
