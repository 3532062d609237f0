"""Sources: classifiers that perturbations are computed on."""
import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import ops
from .losses import LOSSES, RULES, check_labels, choose_labels, power_of_two_scale, sample_losses
from .ops import _checks as check
from .ops import keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class InputGrad(NamedTuple):
    """What one forward and backward pass of a source gives.

    grad: gradient of the loss by the images, times scale, shape of x. labels: int64 [N], those chosen. loss: [N].
    logits: [N, C]. scale: [N], a power of two per sample; grad / scale is the true gradient.
    """

    grad: Tensor
    labels: Tensor
    loss: Tensor
    logits: Tensor
    scale: Tensor


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class Source:
    """A classifier prepared once for computing input gradients on it.

    Args:
        model: maps [N, C, H, W] to logits [N, classes]; a tuple or list is read as (logits, ...), as Inception's
            auxiliary head gives in train mode. Wrappers of data parallelism are taken off: crafting never
            communicates.
        mean, std: per-channel normalisation that the model expects, applied here, so that x is always an image in
            [0, 1]. Default: none.
        dtype: "auto" (bfloat16 where the device is fast at it, else float32), a float dtype, or None: the model's
            own, and the caller's autocast with it. Normalisation layers keep float32 statistics.
        channels_last: "auto" (where the device gains by it: CUDA), True or False.
        crafting: "eval", or "train": dropout active, under generators forked from the key; batch normalisation by
            the batch's statistics, without moving the running ones (the released MNIST code of Tramer et al. 2018).
        live: use the model itself instead of a frozen copy: it may be training. Every flag is restored after
            each use, also after an exception. dtype and channels_last must then leave it as it is.
        compile: pass the frozen copy through torch.compile.
        fold, cuda_graph: permissions for speed, without effect on CPUs and on models that cannot use them. Nothing
            is folded or captured in this version.

    Exact mode, ``Source(model, dtype=torch.float32, fold=False, channels_last=False)``, gives plain PyTorch's values.

    Raises:
        TypeError, ValueError: naming the argument; also for a model whose parameters were created in inference mode.
    """

    def __init__(self, model: nn.Module, *, mean: Sequence[float] | Tensor | None = None,
                 std: Sequence[float] | Tensor | None = None, dtype: torch.dtype | str | None = "auto",
                 fold: bool = True, channels_last: bool | str = "auto", compile: bool = False,
                 cuda_graph: bool | str = "auto", crafting: str = "eval", live: bool = False):
        op = "Source"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
        check.choice(op, "crafting", crafting, ("eval", "train"))
        if dtype not in ("auto", None, *DTYPES):
            raise ValueError(f"{op}: dtype must be 'auto', None, {check.names(DTYPES)}, got {dtype!r}")
        for name, value in (("channels_last", channels_last), ("cuda_graph", cuda_graph)):
            if value not in ("auto", True, False):
                raise ValueError(f"{op}: {name} must be 'auto', True or False, got {value!r}")
        if live and (dtype not in ("auto", None) or channels_last is True or compile):
            raise ValueError(f"{op}: a live model is used as it is; dtype, channels_last and compile do not apply")
        while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        self._refuse_inference(model)
        self.live, self.crafting, self._active = live, crafting, False
        self.device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())),
                           torch.device("cpu"))
        with torch.inference_mode(False):  # what is made here must serve autograd later
            self.mean, self.std = self._statistics(mean, "mean"), self._statistics(std, "std")
            if live:
                self.dtype, self.channels_last, self.module = None, False, model
                return
            self.dtype = fast_dtype(self.device) if dtype == "auto" else dtype
            self.channels_last = self.device.type == "cuda" if channels_last == "auto" else channels_last
            self.module = self._frozen_copy(model)
        if compile:
            self.module = torch.compile(self.module)

    @staticmethod
    def _refuse_inference(model: nn.Module) -> None:
        for name, t in itertools.chain(model.named_parameters(), model.named_buffers()):
            if t.is_inference():
                raise ValueError(
                    f"Source: model was created in torch.inference_mode ({name} is an inference tensor), so no "
                    "gradient can flow through it: create or load it outside that mode"
                )

    def _statistics(self, values, name: str) -> Tensor | None:
        if values is None:
            return None
        values = torch.as_tensor(values, dtype=torch.float32, device=self.device).reshape(-1)
        if name == "std" and not bool((values > 0).all()):
            raise ValueError(f"Source: std must be > 0, got {values.tolist()}")
        return values.view(1, -1, 1, 1)

    def _frozen_copy(self, model: nn.Module) -> nn.Module:
        frozen = copy.deepcopy(model).requires_grad_(False)
        for p in frozen.parameters():
            p.grad = None
        for module in frozen.modules():
            module.training = self.crafting == "train"
            if isinstance(module, _NormBase) and self.crafting == "train":
                module.track_running_stats = False
        if self.dtype is not None:
            frozen.to(self.dtype)
            if self.dtype in check.NARROW:
                for frozen_norm, norm in zip(frozen.modules(), model.modules()):
                    if isinstance(norm, _NormBase):  # 16-bit statistics would move every activation
                        frozen_norm.float().load_state_dict(norm.state_dict())
        return frozen.to(memory_format=torch.channels_last) if self.channels_last else frozen

    @contextmanager
    def session(self, key: Tensor | None = None) -> Iterator["Source"]:
        """The state in which this source computes; restored on leaving, also by an exception. Sessions nest.

        `key`: what the generators of dropout are forked from where crafting is "train".
        """
        if self._active:
            yield self
            return
        self._active = True
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                if self.dtype is not None:  # the caller's autocast is for the caller's model
                    stack.enter_context(torch.autocast(self.device.type, enabled=False))
                if self.live:
                    stack.enter_context(_flags(self.module, self.crafting))
                if self.crafting == "train":
                    stack.enter_context(_forked_generators(self.device, key))
                yield self
        finally:
            self._active = False

    @property
    def fused(self) -> bool:
        """Are the entrance and the loss our kernels'? Elsewhere they are plain PyTorch's, to the last bit."""
        return self.dtype in check.NARROW

    def _entrance(self, x: Tensor) -> Tensor:
        if self.fused and x.dim() == 4:
            channels_last = self.channels_last or check.memory_format(x) == torch.channels_last
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

    def _forward(self, x: Tensor) -> Tensor:
        logits = self.module(self._entrance(x))
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"Source: model must return logits [N, C] for x [N, ...], N = {len(x)}; got {got}")
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """Logits [N, C] of images x, in the source's dtype; differentiable where autograd records."""
        with self.session():
            return self._forward(x)

    def input_grad(self, x: Tensor, labels: Tensor | None = None, *, rule: str = "true", targeted: bool = False,
                   loss: str = "ce", kappa: float = 0.0, key: Tensor | None = None, index: Tensor | None = None,
                   rescale: bool = True) -> InputGrad:
        """Gradient by the images of the summed loss, with the labels chosen from the same forward pass.

        Args:
            x: images [N, ...] in [0, 1], float, on the model's device.
            labels: int64 [N], or None: then the prediction stands in for the true label.
            rule, targeted, loss, kappa: see :func:`ensadv_fast.losses.choose_labels` and
                :func:`ensadv_fast.losses.sample_losses`.
            key, index: for rule "random" and for crafting "train".
            rescale: multiply each sample's gradient by a power of two that keeps any dtype from underflow.

        Works inside torch.no_grad and inference_mode; computes no gradient of any parameter and touches no .grad.
        """
        op = "input_grad"
        x = check.images(op, x, check.FLOATS)
        check.choice(op, "rule", rule, RULES)
        check.choice(op, "loss", loss, LOSSES)
        if x.device != self.device:
            raise ValueError(f"{op}: x must be on the model's device {self.device}, got {x.device}")
        if labels is not None:
            labels = check_labels(op, labels, len(x), x.device)
        if key is None and rule == "random":
            key = keys.next_key(x.device)
        with self.session(key):
            return self.input_grad_unchecked(x, labels, rule, targeted, loss, kappa, key, index, rescale)

    def input_grad_unchecked(self, x: Tensor, labels: Tensor | None, rule: str, targeted: bool, loss: str,
                             kappa: float, key: Tensor | None, index: Tensor | None,
                             rescale: bool) -> InputGrad:
        """:meth:`input_grad` for callers that checked the arguments and hold a session."""
        x, labels = _for_autograd(x), _for_autograd(labels)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self._forward(leaf)
            if labels is not None:
                check_labels("attack", labels, len(x), x.device, logits.shape[1])
            if self.fused:
                start = ops.logit_grad(logits, labels, rule=rule, targeted=targeted, loss=loss, kappa=kappa, key=key,
                                       index=index, rescale=rescale)
                (grad,) = torch.autograd.grad(logits, leaf, start.grad)
                return InputGrad(grad, start.labels, start.loss, logits.detach(), start.scale)
            labels = choose_labels(logits.detach(), labels, rule, key, index)
            losses = sample_losses(logits, labels, loss, targeted=targeted, kappa=kappa)
            scale = power_of_two_scale(logits, labels, loss) if rescale else torch.ones_like(losses)
            (grad,) = torch.autograd.grad(losses, leaf, scale)
        return InputGrad(grad, labels, losses.detach(), logits.detach(), scale)


def _for_autograd(t: Tensor | None) -> Tensor | None:
    """Tensors made in inference mode cannot take part in a backward pass; their copies can."""
    return t.clone() if t is not None and t.is_inference() else t


def as_source(model: "Source | nn.Module") -> Source:
    """A Source as it is; a plain module as the live source that an attack means by it."""
    if isinstance(model, Source):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"attack: source must be a Source or a torch.nn.Module, got {type(model).__name__}")
    return Source(model, live=True, fold=False, channels_last=False, dtype=None)


@contextmanager
def _flags(model: nn.Module, crafting: str) -> Iterator[None]:
    """Put every submodule in the mode that crafting wants, and back exactly as it was."""
    modules = list(model.modules())
    training = [m.training for m in modules]
    norms = [(m, m.track_running_stats) for m in modules if isinstance(m, _NormBase)]
    try:
        if crafting == "eval":
            for m in modules:
                m.training = False
        else:
            if not model.training:
                for m in modules:
                    m.training = True
            for m, _ in norms:
                if m.training:  # batch statistics are used, the running ones left alone
                    m.track_running_stats = False
        yield
    finally:
        for m, flag in zip(modules, training):
            m.training = flag
        for m, flag in norms:
            m.track_running_stats = flag


@contextmanager
def _forked_generators(device: torch.device, key: Tensor | None) -> Iterator[None]:
    """torch's generators as if seeded from `key`; the caller's go on afterwards as if nothing had been drawn."""
    # Generators are seeded from the host: a key that lives on a GPU is waited for, one on the CPU is not.
    seed, offset = (keys.next_key("cpu") if key is None else key).tolist()
    seed = (seed ^ offset << 1) & (1 << 63) - 1
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
