"""Sources: classifiers that perturbations are computed on."""
import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks, keys, memory
from ..ops.logit_grad import unchecked as start_backward
from ..ops.losses import Objective, choose_labels
from .base import BaseSource, InputGrad, check_differentiable, for_autograd, gradient
from .calibration import Agreement, measure_agreement
from .copies import detached, lay_out, stepped_over, taken_out
from .cuda_graphs import Replays, permission
from .first_look import FirstLook, first_look_of
from .frozen import relus
from .frozen.frozen_pass import FrozenPass
from .frozen.packing import Packs
from .frozen.preparation import Preparation, prepare
from .frozen.proof import Unfit, first_right
from .modes import exclusive, forked_generators, mode_flags
from .options import check_options, per_channel
from .outputs import Called, Outputs, as_module
from .precision import fast_dtype

ENOUGH = 0.97  # of the exact FGSM step's loss increase: what calibrate lets a dtype lose


class Source(BaseSource):
    """A classifier prepared once for computing input gradients on it.

    Args:
        model: maps [N, C, H, W] to logits [N, classes], alone, first in a tuple or list (as Inception's auxiliary head
            in train mode has it), or named "logits" in a dict or an object. Wrappers of data parallelism are taken off,
            or stepped over where they are inside of a live model: crafting never communicates. A frozen copy has no
            torch.compile wrappers either. With live=True any callable will do, as it is; a lambda's device is x's.
        mean, std: normalisation along dimension 1 that the model expects, applied here, so that x is always an image in
            [0, 1]. Default: none.
        dtype: "auto" (:func:`fast_dtype`: bfloat16 where the device is faster at this model in it, else float32), a
            float dtype, or None: the model's own, that of its first floating tensor, and the caller's autocast with it.
            Normalisation layers keep float32 statistics.
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
            warning says so, once per source. At the first forward pass the copy is compared with the model, once, on
            random images in float64; one that differs is not used, and a warning says so. What its forward pass then
            keeps for the backward pass is weights and bits, not activations
            (:class:`ensadv_fast.sources.frozen.frozen_pass.FrozenPass`, without compile): gradients by the images,
            once. On the CPU convolutions' weights are then held in oneDNN's order as well, twice
            (:mod:`ensadv_fast.sources.frozen.packing`).
        compile: pass the frozen copy through torch.compile.
        cuda_graph: whether attacks on this source are captured in CUDA graphs, whole, and replayed on new data and keys
            (:mod:`ensadv_fast.sources.cuda_graphs`). "auto": for a frozen source on CUDA, crafting "eval", not
            compiled, an attack that comes a second time with the same shapes and numbers is captured then; where that
            cannot be (a model that waits for values, draws random numbers, has hooks or counts its calls), one warning,
            and no more graphs. True: at the first call, and what cannot be captured is an error; a live source too. Its
            weights must then move in place, as optimizers move them; parameters, buffers or submodules that are
            exchanged are noticed, but not plain attributes that a forward pass reads. False: never. A graph keeps the
            memory of what it works on; the graphs of a source share it, and nothing of it is what a caller gets.

        binary: the model gives one logit [N] or [N, 1], of class 1 against 0; the source's logits are then (0, z).
        output: which output the logits are: a key (or the name of an attribute), or a callable from what the model
            returns to logits [N, C]; "probabilities": the model returns those.

    The first batch of an attack on a source is looked at once, where that costs no synchronisation: images out of range
    are an error; outputs that look like probabilities, and a gradient that is zero everywhere, are a warning.

    A source that is not live and not exact keeps the model as it came, a second frozen copy in host memory, for
    :meth:`calibrate`: as many bytes as its parameters and buffers have.

    Several threads may use one source at once. Those of live sources, and of crafting "train", take turns.

    Exact mode, ``Source(model, dtype=torch.float32, fold=False, channels_last=False)``, gives plain PyTorch's values.

    Raises:
        TypeError, ValueError: naming the argument; also for a model whose parameters were created in inference mode,
            that is lazy and has none yet, or that cannot be copied (live=True is the way out).
    """

    dtype: torch.dtype | None
    channels_last: bool
    module: nn.Module
    _original: nn.Module | None = None
    _relu_plan, _packs = relus.NOTHING_FUSED, Packs()
    _format_is_free = _unproved = False

    def __init__(self, model: nn.Module | Callable[..., Any], *, mean: Sequence[float] | Tensor | None = None,
                 std: Sequence[float] | Tensor | None = None, dtype: torch.dtype | str | None = "auto",
                 fold: bool = True, channels_last: bool | str = "auto", compile: bool = False,
                 cuda_graph: bool | str = "auto", crafting: str = "eval", live: bool = False, binary: bool = False,
                 output: Hashable | Callable[[Any], Tensor] = None) -> None:
        check_options(crafting, dtype, channels_last, cuda_graph, fold=fold, compile=compile, live=live, binary=binary)
        model, self._wrappers = taken_out(as_module(model, live))
        self.look, self.reads = FirstLook(), Outputs(output, binary)
        self.live, self.crafting, self.fold, self.compile = live, crafting, fold, compile
        self._folds = fold and crafting == "eval" and not live
        self.keeps_bits = self._folds and not compile
        self.in_session: set[int] = set()  # the threads that are
        self._autocast = dtype if live and dtype in checks.NARROW else None
        tensors = itertools.chain(model.parameters(), model.buffers())
        first = next(tensors, None)
        self.device = torch.device("cpu") if first is None else first.device
        self.follows = live and first is None
        self._reference = next((t for t in itertools.chain([first], tensors) if t is not None
                                and t.dtype in checks.FLOATS), None) if live or dtype is None else None
        self.replays = Replays(self.device, permission("Source", cuda_graph, self.device, crafting, live, compile))
        with torch.inference_mode(False):  # what is made here must serve autograd later
            self.mean, self.std = per_channel("mean", mean, self.device), per_channel("std", std, self.device)
            if live:
                self.dtype, self.channels_last, self.module = None, False, model
                return
            self.dtype = dtype if isinstance(dtype, torch.dtype | None) else fast_dtype(self.device, model)
            self.channels_last = channels_last in ("auto", True)
            self._format_is_free = channels_last == "auto"
            self._prepare(model, self._wish())
            if (self.dtype, fold, self.channels_last, compile) != (torch.float32, False, False, False):
                self._original = detached(model).to("cpu")
            self._unproved = self._folds and not isinstance(model, torch.jit.ScriptModule)

    def __repr__(self) -> str:
        dtype = "the model's dtype" if self.dtype is None else checks.names([self.dtype])
        normalised = ["normalised"] if self.mean is not None or self.std is not None else []
        how = ["live" if self.live else "frozen", dtype, *normalised, f"crafting={self.crafting!r}",
               str(self.device)]
        return f"Source({type(self.module).__name__}: {', '.join(how)})"

    def _wish(self) -> Preparation:
        """How the model is prepared, unless it turns out that it cannot be."""
        return Preparation(self.crafting, self._folds, self.keeps_bits, self.dtype, self.channels_last)

    def _prepare(self, model: nn.Module, how: Preparation, quiet: bool = False) -> None:
        frozen, self._relu_plan, left = prepare(model, how)
        self._packs, self.keeps_bits, self._folds = Packs(), how.bits, how.fold
        if left and not quiet:
            parts = "; ".join(f"{name or 'the model itself'} ({why})" for name, why in left.items())
            warnings.warn(f"Source: fold leaves batch normalisations as they are in {parts}. Gradients are right, "
                          "but slower than they could be; fold=False silences this.", stacklevel=3)
        self.module = cast(nn.Module, torch.compile(frozen)) if self.compile else frozen

    def prove(self, x: Tensor) -> None:
        """Before the first forward pass: does the folded copy compute what the model does?

        It is compared with the model on random images of x's shape (:mod:`ensadv_fast.sources.frozen.proof`). Where it
        differs, it is prepared anew without what is wrong, and one warning says so.
        """
        if type(x) is not Tensor or torch.compiler.is_compiling() or Replays.is_capturing(x.device):
            return
        with exclusive, torch.inference_mode(False):
            if not self._unproved or self._original is None:
                return
            wish = self._wish()
            tries = [wish, wish._replace(bits=False)] if self.keeps_bits else [wish]
            try:
                right = first_right(self._original, x.shape, self._normalised, self.device, tries)
            except Unfit:
                return
            if right:
                how = (*tries, wish._replace(fold=False, bits=False))[right]
                self._prepare(detached(self._original).to(self.device), how, quiet=True)
                what = "the folded copy" if right == len(tries) else "a forward pass that keeps bits for activations"
                warnings.warn(f"Source: {what} does not compute what the model computes, so it is not used. Gradients "
                              "are right, but slower than they could be; fold=False silences this.", stacklevel=2)
            self._unproved = False

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
        if (x := checks.images(op, x, checks.FLOATS)).dim() != 4 or not len(x):
            raise ValueError(f"{op}: x must have shape [N, C, H, W], N >= 1, got {tuple(x.shape)}")
        self.check_device(op, x)
        if y is not None:
            y = checks.labels(op, "y", y, len(x), x.device)
        if checks.finite(op, "eps", eps) <= 0:
            raise ValueError(f"{op}: eps must be > 0, got {eps}")
        exact, original = self, self._original
        if original is not None:
            exact = Source(detached(original).to(self.device), mean=self.mean, std=self.std,
                           dtype=torch.float32, fold=False, channels_last=False, crafting=self.crafting)
        found = measure_agreement(self, exact, x, y, eps, keys.next_key("cpu"))
        if found.loss_increase < ENOUGH and self.dtype != torch.float32 and original is not None:
            self.dtype = torch.float32
            with torch.inference_mode(False):  # what cannot be folded was said when the source was made
                self._prepare(detached(original).to(self.device), self._wish(), quiet=True)
        return found

    @contextmanager
    def session(self, key: Tensor | None = None) -> Iterator["Source"]:
        thread = threading.get_ident()
        if thread in self.in_session:
            yield self
            return
        with ExitStack() as stack:
            if self.live or self.crafting == "train":  # flags and generators are every thread's: one at a time
                stack.enter_context(exclusive)
            self.in_session.add(thread)
            stack.callback(self.in_session.discard, thread)
            recording = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))  # which would turn recording on
            stack.enter_context(torch.set_grad_enabled(recording))
            if self.live:
                stack.enter_context(mode_flags(self.module, self.crafting))
                if self._wrappers:
                    stack.enter_context(stepped_over(self._wrappers))
            if self.crafting == "train":
                stack.enter_context(forked_generators(self.device, key))
            yield self

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
        x = self._normalised(x)
        if self.dtype is not None:
            x = x.to(self.dtype)
        elif self._reference is not None and x.dtype != self._reference.dtype and (
                x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)):  # it leaves float64 alone
            x = x.to(self._reference.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x

    def _normalised(self, x: Tensor) -> Tensor:
        mean, std = self.mean, self.std  # of four dimensions
        if x.dim() != 4:
            mean, std = (None if v is None else v.view(1, -1, *[1] * (x.dim() - 2)) for v in (mean, std))
        if mean is not None:
            x = x - mean.to(x)
        return x if std is None else x / std.to(x)

    def precision_context(self) -> AbstractContextManager:
        """Autocast as this source wants it: its own, none where it has a dtype, else the caller's."""
        if self._autocast is not None:
            return torch.autocast(self.device.type, self._autocast)
        if self.dtype is not None and torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, enabled=False)
        return nullcontext()

    def _forward(self, x: Tensor) -> Tensor:
        if self._unproved:
            self.prove(x)
        x = self.entrance(x)
        with FrozenPass(self._relu_plan, self._packs) if self.keeps_bits else nullcontext():
            return self.module(x)

    def logits_unchecked(self, x: Tensor) -> Tensor:
        """:meth:`logits` for callers that hold a session."""
        return self._outputs(x)[0]

    def _outputs(self, x: Tensor, any_shape: bool = False) -> Sequence[Tensor]:
        """The logits of images x, and what else the model gives beside them. any_shape: they may be [N, ...]."""
        with self.precision_context():
            try:
                out = self._forward(x)
            except RuntimeError as e:
                if not self._format_is_free or "view size is not compatible" not in str(e):
                    raise
                with exclusive:  # other threads may be about to say the same
                    self.channels_last = self._format_is_free = False
                    lay_out(self.module, torch.contiguous_format)
                out = self._forward(x)
        return self.reads.read(out, len(x), any_shape)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [N, C] of images x, in the source's dtype; differentiable where autograd records."""
        if self.follows:
            self.device = x.device
        with self.session():
            return self.logits_unchecked(x)

    def losses_unchecked(self, x: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        logits = self._outputs(x, callable(objective.loss))[0]
        return objective.losses(logits, labels), logits

    def input_grad_unchecked(self, x: Tensor, labels: Tensor | None, objective: Objective, *,
                             key: Tensor | None = None, index: Tensor | None = None,
                             rescale: bool = True) -> InputGrad:
        x, labels = for_autograd(x), for_autograd(labels)
        with torch.enable_grad(), self.precision_context():
            leaf, own_loss = x.detach().requires_grad_(), callable(objective.loss)
            logits = self._outputs(leaf, own_loss)[0]
            if labels is not None and not own_loss:
                checks.labels("attack", "y", labels, len(x), x.device, logits.shape[1])
            check_differentiable(logits)
            if self.fused and not own_loss:
                start = start_backward(logits, labels, objective, index=index, key=key, rescale=rescale)
                grad, chosen, losses, scale = start
                grad = gradient(leaf, logits, grad)
            else:
                chosen = choose_labels(logits.detach(), labels, objective.rule, key, index)
                losses = objective.losses(logits, chosen)
                scale = objective.scale(logits, chosen) if rescale else torch.ones_like(losses)
                grad = gradient(leaf, losses, scale)
        if not self.look.gradient and rescale:
            self.look.at_gradient(grad, self.reads.undeclared(logits), objective.loss)
        return InputGrad(grad, chosen, losses.detach(), logits.detach(), scale)


@overload
def as_source(model: Source | nn.Module | Callable[[Tensor], Any]) -> Source: ...


@overload
def as_source(model: BaseSource | nn.Module | Callable[[Tensor], Any]) -> BaseSource: ...


def as_source(model: BaseSource | nn.Module | Callable[[Tensor], Any]) -> BaseSource:
    """A source as it is; a plain module, or another callable, as the live source that an attack means by it."""
    if isinstance(model, BaseSource):
        return model
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"attack: source must be a Source or a torch.nn.Module, got {type(model).__name__}")
    source = Source(model, live=True, fold=False, channels_last=False, dtype=None)
    source.look = first_look_of(getattr(source.module, "owner", model) if type(source.module) is Called else model)
    return source
