"""One optimizer step on an adversarial batch."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adversary.batches import AdversarialBatch, Counts
from ..adversary.loss import mixed_cross_entropy
from ..sources.copies import lay_out
from .config import Config
from .ema import EMA
from .nonfinite import FiniteWatch, NonFinite
from .optimizers import make_optimizer

Batches = AdversarialBatch | Sequence[AdversarialBatch]


class Update:
    """Forward pass, mixed loss, backward pass and optimizer step of `model`, in the precision that `config` asks for.

    model: the network, or DistributedDataParallel around it; `prepare` it before it is wrapped. lam: weight of
    adversarial examples in the loss. `state_dict` holds what a resumed run needs besides the weights.

    config.compile: the training forward goes through torch.compile; `model` itself, and with it the attack on the
    live model and the names in checkpoints, stays as it is. config.dtype float16: loss scaling by torch's GradScaler,
    which skips steps that overflow. `ema`: the averaged weights, or None.

    A step whose gradients are not finite changes no weight (nor, with config.nan "skip", a batch statistic). This is
    decided on the device, from gradients that DDP has averaged, so alike on all ranks; `nonfinite()` reports it. Under
    float16 overflows are normal while the loss scale is sought: only those at a loss scale of 1 or less are reported.
    """

    def __init__(self, config: Config, model: nn.Module, lam: float, device: torch.device) -> None:
        self.config, self.model, self.lam, self.device = config, model, lam, device
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        prepare(config, plain)
        self._forward = torch.compile(model) if config.compile else model
        self.optimizer = make_optimizer(config, plain)
        self.ema = EMA(plain, config.ema) if config.ema else None
        self.scaler = torch.amp.GradScaler(device.type) if config.dtype == "float16" else None
        self.watch = FiniteWatch(device, plain.buffers() if config.nan == "skip" else ())
        self.steps = 0

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes, the attack's on the live model too.

        Each pass needs a new one: a context caches casts of the weights, which may stem from a pass without grad.
        """
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.dtype))

    def clear(self) -> None:
        """Drop the gradients, so that crafting and the forward pass can use their memory."""
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, batch: Batches, lr: float, *, scale: float = 1.0,
                 index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step with this learning rate; (loss [], logits [N, C]) of before it, detached.

        batch: a batch, or micro-batches, all crafted before the step. The mixed loss is that of all their samples
            together: gradients are added up, and DDP communicates on the last only. Logits come in the micro-batches'
            order, as `labels` gives y and is_adv.
        scale: multiplies the loss, the returned one too. DDP averages gradients over the R ranks: with R times the
            share that this rank's samples have in the global batch (`Counts.share`), the average is the gradient of
            the global batch's mixed loss, whatever the shares are.
        index: int64 [n], dataset positions of this rank's samples, kept where the step is not finite.
        """
        parts = [batch] if isinstance(batch, AdversarialBatch) else list(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.watch.before()
        whole = Counts.total(part.counts for part in parts)
        losses, logits = [], []
        for i, part in enumerate(parts):
            with self._communication(last=i == len(parts) - 1):
                loss, out = self._loss(part)
                if len(parts) > 1:  # the shares, and so the sum of their losses, in float64
                    loss = loss.double() * part.counts.share(whole, self.lam)
                loss = loss * scale
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            losses.append(loss.detach())
            logits.append(out.detach())
        self._step(index)
        if len(parts) == 1:
            return losses[0], logits[0]
        return torch.stack(losses).sum(), torch.cat(logits)

    def _communication(self, last: bool) -> AbstractContextManager:
        """DDP averages the gradients over the ranks in the last micro-batch's backward pass, and not before."""
        return nullcontext() if last or not isinstance(self.model, DistributedDataParallel) else self.model.no_sync()

    def _loss(self, batch: AdversarialBatch) -> tuple[Tensor, Tensor]:
        """(mixed loss, with the weighted loss of auxiliary logits where the model gives some; logits)."""
        config, x = self.config, batch.x
        if config.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            out = self._forward(x)
        logits, *aux = out if isinstance(out, (tuple, list)) else (out,)
        loss = mixed_cross_entropy(logits, batch.y, batch.is_adv, self.lam, config.label_smoothing)
        for other in aux:
            loss = loss + config.aux * mixed_cross_entropy(other, batch.y, batch.is_adv, self.lam,
                                                           config.label_smoothing)
        return loss, logits

    @torch.no_grad()
    def _step(self, index: Tensor | None) -> None:
        """Clip the gradients, then update the weights, their average and the watch."""
        optimizer, clip = self.optimizer, self.config.clip
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
        bad = reported = ~norm.isfinite()
        if self.scaler is not None:
            reported = bad & (self.scaler.scale(torch.ones((), device=self.device)) <= 1)
            self.scaler.step(optimizer)
            self.scaler.update()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: a bad step is skipped on the device
            setattr(optimizer, "found_inf", bad.float())  # as GradScaler does
            optimizer.step()
            delattr(optimizer, "found_inf")
        elif not bad:
            optimizer.step()
        self.watch.undo(bad)
        self.watch.note(reported, self.steps, index)
        self.steps += 1
        if self.ema is not None:
            self.ema.update()

    def nonfinite(self) -> NonFinite | None:
        """Steps with NaN or infinite gradients since the last call, or None. Their numbers count from the job's first
        step on, also after a resume. It waits for the device: to be called for log lines and checkpoints only."""
        return self.watch.look()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the steps done, and those of the loss scaling and the averaged weights, or None."""
        return {"optimizer": self.optimizer.state_dict(), "updates": self.steps,
                "scaler": self.scaler and self.scaler.state_dict(), "ema": self.ema and self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["updates"]
        for mine, saved in ((self.scaler, state["scaler"]), (self.ema, state["ema"])):
            if mine is not None:
                mine.load_state_dict(saved)


def prepare(config: Config, model: nn.Module) -> nn.Module:
    """The model, in place, in the memory format of its training. To be called before DistributedDataParallel wraps it,
    whose buckets keep the strides that parameters have then."""
    if config.channels_last:
        lay_out(model, torch.channels_last)
    return model


def labels(batch: Batches) -> tuple[Tensor, Tensor]:
    """(y, is_adv) of a batch or of micro-batches, in the order of the logits that `Update` returns."""
    if isinstance(batch, AdversarialBatch):
        return batch.y, batch.is_adv
    return torch.cat([b.y for b in batch]), torch.cat([b.is_adv for b in batch])
