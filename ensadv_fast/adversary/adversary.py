"""Adversarial training batches from one source drawn per batch, and the loss for them.

Tramer et al., "Ensemble Adversarial Training" (ICLR 2018): every batch is perturbed on one source, drawn uniformly
among the model in training and static pre-trained ones. Kurakin et al., "Adversarial Machine Learning at Scale"
(ICLR 2017), Algorithm 1: the first k of m samples are replaced, eps is drawn per sample, and one training step is
done on the mixed batch, so that BatchNorm sees clean and adversarial samples together.
"""
from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..attacks import BaseAttack, step_ll
from ..ops import checks
from ..ops.keys import derive_seed
from ..sources.base import BaseSource
from ..sources.ensemble import Ensemble
from ..sources.source import Source
from ..system.streams import SideStream
from .batches import AdversarialBatch, EpsDistribution, Part, hard_or_soft

EpsDist = float | Callable[[int, Tensor], Tensor] | None
Select = str | Sequence[float] | Callable[[int, int], int]


@dataclass(frozen=True)
class _Ahead:
    """What a stream knows of the batch after the one it yields. when: (seed, step) of it; source: as drawn; batch: on
    its way on the side stream, or None where it must wait."""

    when: tuple[int, int]
    source: int
    batch: AdversarialBatch | None


class EnsembleAdversary:
    """Turns clean batches into partly adversarial ones: `batch = adversary(x, y, index=None)`.

    model: the network in training. It is a source too (unless live=False) and is left exactly as it was.
    live: True, False, or a live `Source` of the model: `Source(model, live=True, dtype=torch.bfloat16)` crafts under
        autocast where training is in float32.
    static: further sources, trained beforehand: `Source`, `Ensemble` or nn.Module. A plain module becomes
        `Source(module, crafting=crafting)`, a frozen copy; the others keep their own settings.
    attack: an `Attack`; None means step_ll(eps=16/255), the papers' choice on ImageNet.
    fraction, mix: "replace" perturbs the first floor(fraction*m) of m samples in place of their clean versions
        (Kurakin, Algorithm 1); "append" perturbs all m and appends them, the doubled batch of the released MNIST
        code (fraction 0 still means a clean batch).
    eps_dist: None (the attack's own eps), a float, or a callable (n, key) -> float32 [n].
    select: how the source of a batch is chosen: "uniform"; "rotate" (step modulo the number of sources); weights,
        one per source, the live model last; or a callable (step, number of sources) -> position. The draw is a
        function of (seed, step) only, so it is alike on all ranks.
    start_step: the first that many batches are clean (Kurakin's delayed start).
    crafting: "eval", or "train" (the released MNIST code: dropout active while crafting), for the live model and
        for static modules that are not yet a Source.
    key: int64 [2] from `ops.fresh_key`; None draws one from the package's own stream.

    Raises ValueError or TypeError for an argument that is none of these.
    """

    def __init__(self, model: nn.Module, static: Sequence[BaseSource | nn.Module] = (),
                 attack: BaseAttack | None = None, *, fraction: float = 0.5, mix: str = "replace",
                 eps_dist: EpsDist = None, select: Select = "uniform", live: bool | Source = True, start_step: int = 0,
                 crafting: str = "eval", key: Tensor | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"EnsembleAdversary: model: got {type(model).__name__}, want an nn.Module")
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"EnsembleAdversary: fraction: got {fraction}, want 0..1")
        if mix not in ("replace", "append"):
            raise ValueError(f"EnsembleAdversary: mix: got {mix!r}, want 'replace' or 'append'")
        if crafting not in ("eval", "train"):
            raise ValueError(f"EnsembleAdversary: crafting: got {crafting!r}, want 'eval' or 'train'")
        if start_step < 0:
            raise ValueError(f"EnsembleAdversary: start_step: got {start_step}, want at least 0")
        if attack is not None and not isinstance(attack, BaseAttack):
            raise TypeError(f"EnsembleAdversary: attack: got {type(attack).__name__}, want an Attack")
        if eps_dist is not None and not callable(eps_dist) and not isinstance(eps_dist, (int, float)):
            raise TypeError(f"EnsembleAdversary: eps_dist: got {type(eps_dist).__name__}, want None, a float or a "
                            "callable (n, key) -> [n]")
        self.attack = step_ll(eps=16 / 255) if attack is None else attack
        self.fraction, self.mix, self.eps_dist, self.start_step = fraction, mix, eps_dist, start_step
        self.static = tuple(Source(s, crafting=crafting) if isinstance(s, nn.Module) else s for s in static)
        for s in self.static:
            if not isinstance(s, BaseSource):
                raise TypeError(f"EnsembleAdversary: static: got {type(s).__name__}, want a Source, an Ensemble or an "
                                "nn.Module")
        if not isinstance(live, bool | Source):
            raise TypeError(f"EnsembleAdversary: live: got {type(live).__name__}, want a bool or a live "
                            "Source of model")
        self.sources: tuple[BaseSource, ...] = self.static
        if live is not False:
            own = Source(model, live=True, fold=False, channels_last=False, dtype=None, crafting=crafting)
            if isinstance(live, Source) and not (live.live and live.module is own.module):
                raise ValueError("EnsembleAdversary: live: got a Source that is not live or not of model, want "
                                 "Source(model, live=True, ...)")
            self.sources += (live if isinstance(live, Source) else own,)
        if not self.sources:
            raise ValueError("EnsembleAdversary: live=False needs at least one static source")
        self.select = self._checked_select(select)
        key = ops.fresh_key("cpu") if key is None else key
        if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape != (2,):
            raise TypeError("EnsembleAdversary: key: want an int64 tensor [2] from ops.fresh_key")
        self.seed = derive_seed(*key.tolist())
        self.step = 0
        self._keys: dict[torch.device, tuple[int, Tensor]] = {}

    def _checked_select(self, select: Select) -> Select:
        if callable(select) or select in ("uniform", "rotate"):
            return select
        n = len(self.sources)
        if isinstance(select, str):
            raise ValueError(f"EnsembleAdversary: select: got {select!r}, want 'uniform', 'rotate', weights or a "
                             "callable")
        weights = [float(w) for w in select]
        if len(weights) != n or not all(w >= 0 and math.isfinite(w) for w in weights) or sum(weights) <= 0:
            raise ValueError(f"EnsembleAdversary: select: got weights {weights}, want {n} finite ones, not "
                             "negative and not all zero (static sources first, the live model last)")
        return weights

    def source_at(self, step: int) -> int:
        """The position in `sources` of the source that crafts the batch of this step."""
        n = len(self.sources)
        if callable(self.select):
            chosen = self.select(step, n)
            if not 0 <= chosen < n:
                raise ValueError(f"EnsembleAdversary: select returned {chosen}, want 0..{n - 1}")
            return int(chosen)
        if self.select == "rotate":
            return step % n
        weights = [1.0] * n if isinstance(self.select, str) else self.select
        edges = list(itertools.accumulate(weights))
        u = derive_seed(self.seed, "source", step) / 2**63
        # A weight of zero must never be drawn, also where u rounds up to 1: step back over empty intervals.
        chosen = min(bisect.bisect_right(edges, u * edges[-1]), n - 1)
        while not weights[chosen]:
            chosen -= 1
        return chosen

    def _step_keys(self, step: int, device: torch.device) -> Tensor:
        """A step's two keys, int64 [2, 2] on `device`. A block of steps is made at once: no copy per step."""
        size = 1024
        block, row = divmod(step, size)
        if device not in self._keys or self._keys[device][0] != block:
            key = ops.fresh_key(device, derive_seed(self.seed, "keys", block))
            self._keys[device] = block, ops.split(key, 2 * size).view(size, 2, 2)
        return self._keys[device][1][row]

    def __call__(self, x: Tensor, y: Tensor, index: Tensor | None = None, part: Part | None = None) -> AdversarialBatch:
        """The training batch for clean images x [m, C, H, W] (float in [0, 1], or uint8, which becomes that) and y.

        y: integers or bools [m] or [m, 1], which the batch has as int64 [m]; or soft labels [m, classes] (their argmax
        then stands for the true label in an attack).
        index: int64 [m], dataset positions; the noise of a sample then depends on its position in the data set
        alone and not on the batch or the rank it is in.
        part: of which global batch these are a part; None: they are the whole batch. The parts of all ranks are
        together what one process makes of the global batch.
        """
        return self.micro(1, x, y, index, part)[0]

    def micro(self, n: int, x: Tensor, y: Tensor, index: Tensor | None = None,
              part: Part | None = None) -> list[AdversarialBatch]:
        """One step's batch in n micro-batches (fewer where there are not as many samples), on one source: every n-th
        sample each, so that the shares of adversarial ones are alike."""
        part = Part(0, 1, x.shape[0]) if part is None else part
        source = self._draw(self.step, x, part)
        batches = [self._batch(self.step, source, x[i::n], y[i::n], None if index is None else index[i::n],
                               Part(part.rank + part.world * i, part.world * n, part.total))
                   for i in range(max(1, min(n, len(x))))]
        self.step += 1
        return batches

    def _replaced(self, m: int) -> int:
        """How many of m samples are perturbed."""
        if self.mix == "append":
            return m if self.fraction else 0
        # The small term keeps 0.29 * 100 = 28.999... from losing a sample to rounding.
        return math.floor(self.fraction * m + 1e-9)

    def _draw(self, step: int, x: Tensor, part: Part | None = None) -> int:
        """The source of this step's batch, or -1 where it stays clean."""
        m = x.shape[0] if part is None else part.total
        return self.source_at(step) if step >= self.start_step and self._replaced(m) else -1

    def _batch(self, step: int, source: int, x: Tensor, y: Tensor, index: Tensor | None = None,
               part: Part | None = None) -> AdversarialBatch:
        m = x.shape[0]
        part = Part(0, 1, m) if part is None else part
        if y.shape[0] != m:
            raise ValueError(f"EnsembleAdversary: y: got {y.shape[0]} labels for {m} images")
        y = hard_or_soft("EnsembleAdversary", y, m)
        x = x.detach().float().div_(255) if x.dtype == torch.uint8 else x.detach()
        if source < 0:
            return AdversarialBatch(x.clone(), y, torch.zeros(m, dtype=torch.bool, device=x.device), -1,
                                    (m, 0), (part.total, 0))
        append, all_k = self.mix == "append", self._replaced(part.total)
        k = min(m, part.of(all_k))
        new_x = torch.cat([x, x]) if append else x.clone()
        adversarial = slice(m, m + k) if append else slice(k)
        if k:
            self._craft(step, self.sources[source], x[:k], y[:k], None if index is None else index[:k],
                        new_x[adversarial], part, all_k)
        is_adv = torch.zeros(new_x.shape[0], dtype=torch.bool, device=x.device)
        is_adv[adversarial] = True
        clean, all_clean = (m, part.total) if append else (m - k, part.total - all_k)
        return AdversarialBatch(new_x, torch.cat([y, y]) if append else y, is_adv, source, (clean, k),
                                (all_clean, all_k))

    def _craft(self, step: int, source: BaseSource, x: Tensor, y: Tensor, index: Tensor | None, out: Tensor,
               part: Part, all_k: int) -> None:
        """Perturb x into `out`; all_k: how many samples of the global batch are perturbed."""
        if index is None and part.world > 1:
            index = part.places(len(x), x.device)
        eps_key = self._step_keys(step, x.device)[0]
        # torch's generators, which dropout draws from, are seeded on the host: there the key must not be waited for.
        at = torch.device("cpu") if source.crafting == "train" else x.device
        attack_key = self._step_keys(step, at)[1]
        eps: float | Tensor | None
        if isinstance(self.eps_dist, EpsDistribution):
            eps = self.eps_dist(x.shape[0], eps_key, index)
        elif callable(self.eps_dist):
            eps = self.eps_dist(all_k, eps_key)[part.rank::part.world][:len(x)]
        else:
            eps = self.eps_dist
        labels = y if y.dim() == 1 else y.argmax(1)
        self.attack(source, x, labels, key=attack_key, eps=eps, index=index, out=out)

    def stream(self, loader: Iterable[Any], *,
               batch: Callable[[Any], Sequence[Any]] | None = None) -> Iterator[AdversarialBatch]:
        """The adversarial batch of every (x, y), (x, y, index) or (x, y, index, part) that `loader` yields: those that
        calling this object on one after the other gives.

        batch: makes such a tuple of what the loader yields, where that has another form: dicts, rows, paths or metadata
        beside the labels. TypeError, which names what came, where there is none.

        On the CPU a batch is crafted when it is asked for. On CUDA the loader is one batch ahead, and where the next
        batch's source is frozen its pass runs on a stream of its own while the caller's training step does; a live
        source's is crafted when it is asked for, on the model as the step before has left it. Batches are in the
        current stream's order; `state_dict` never counts a batch that was not yielded.
        """
        items = _items(loader, batch)
        item = next(items, None)
        side: SideStream | None = None
        ahead: _Ahead | None = None
        try:
            while item is not None:
                if ahead is None or ahead.when != (self.seed, self.step):
                    made = self(*item)
                else:
                    if ahead.batch is None:
                        made = self._batch(self.step, ahead.source, *item)
                    else:
                        made = ahead.batch
                        assert side is not None  # it was crafted there
                        side.hand_over((made.x, made.y, made.is_adv))
                    self.step += 1
                ahead, failure = None, None
                if self._overlaps(item[0]):
                    side = side or SideStream(item[0].device)
                    try:
                        item = next(items, None)
                        ahead = None if item is None else self._begun(side, item)
                    except Exception as e:  # noqa: BLE001 - what goes wrong belongs to the next batch, not to this one
                        failure = e
                    yield made
                    if failure is not None:
                        raise failure
                else:
                    yield made
                    item = next(items, None)
        finally:
            if side is not None:
                side.close()

    def _overlaps(self, x: Tensor) -> bool:
        """Can anything be gained by crafting ahead?"""
        return x.is_cuda and any(map(_is_frozen, self.sources))

    def _begun(self, side: SideStream, item: Sequence[Any]) -> "_Ahead":
        """The next step's source, and its batch where that can be crafted before the model has moved."""
        source = self._draw(self.step, item[0], item[3] if len(item) > 3 else None)
        batch = None
        if source >= 0 and _is_frozen(self.sources[source]):
            self._step_keys(self.step, item[0].device)  # a block of keys serves both streams: made on this one
            batch = side.start(lambda: self._batch(self.step, source, *item))
        return _Ahead((self.seed, self.step), source, batch)

    def state_dict(self) -> dict[str, int]:
        """The seed and the step: all that the next batches depend on besides the models."""
        return {"seed": self.seed, "step": self.step, "sources": len(self.sources)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken; ValueError if it is of an adversary with another number of sources."""
        if state["sources"] != len(self.sources):
            raise ValueError(f"EnsembleAdversary: the saved state is of {state['sources']} sources, this adversary "
                             f"has {len(self.sources)}")
        self.seed, self.step = state["seed"], state["step"]
        self._keys.clear()


def _items(loader: Iterable[Any], pick: Callable[[Any], Sequence[Any]] | None) -> Iterator[Sequence[Any]]:
    """(x, y), (x, y, index) or (x, y, index, part) of what the loader yields. TypeError, ValueError: another thing."""
    op = "EnsembleAdversary"
    for given in loader:
        item = checks.batch_parts(op, given, pick, most=4)
        checks.images(op, item[0])
        index, part = [*item[2:], None, None][:2]
        flat = index is None or index.dim() == 1
        if not (isinstance(item[1], Tensor) and flat and isinstance(part, Part | None)):
            raise TypeError(f"{op}: loader must give batches (x, y) or (x, y, index), got {checks.told(item)}; a "
                            "function given as batch= makes (x, y) of that")
        yield item


def _is_frozen(source: BaseSource) -> bool:
    """Do its weights stay while the model trains?"""
    members = source.sources if isinstance(source, Ensemble) else (source,)
    return all(isinstance(m, Source) and not m.live for m in members)
