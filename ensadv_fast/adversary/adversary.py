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
from ..ops.keys import derive_seed
from ..sources.base import BaseSource
from ..sources.ensemble import Ensemble
from ..sources.source import Source
from ..system.streams import SideStream
from .arguments import OP, EpsDist, Select, check_arguments, check_key, check_select, make_live, make_static
from .batches import AdversarialBatch, Counts, EpsDistribution, Part
from .incoming import hard_or_soft, read_items


@dataclass(frozen=True)
class _Ahead:
    """What a stream knows of the batch after the one that it yields.

    when: (seed, step) of that batch; source: the one drawn for it; batch: under way on the side stream, or None where
    it cannot be crafted before the model has moved.
    """

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

    Raises ValueError for an argument out of its range, TypeError for one of another type.
    """

    def __init__(self, model: nn.Module, static: Sequence[BaseSource | nn.Module] = (),
                 attack: BaseAttack | None = None, *, fraction: float = 0.5, mix: str = "replace",
                 eps_dist: EpsDist = None, select: Select = "uniform", live: bool | Source = True, start_step: int = 0,
                 crafting: str = "eval", key: Tensor | None = None) -> None:
        check_arguments(model, attack, fraction, mix, eps_dist, start_step, crafting)
        self.attack = step_ll(eps=16 / 255) if attack is None else attack
        self.fraction, self.mix, self.eps_dist, self.start_step = fraction, mix, eps_dist, start_step
        self.static = tuple(make_static(s, crafting) for s in static)
        self.sources: tuple[BaseSource, ...] = (*self.static, *make_live(model, live, crafting))
        if not self.sources:
            raise ValueError(f"{OP}: static must hold at least one source where live is False, got none")
        self.select = check_select(select, len(self.sources))
        self.seed = derive_seed(*check_key(ops.fresh_key("cpu") if key is None else key).tolist())
        self.step = 0
        self._keys: dict[torch.device, tuple[int, Tensor]] = {}

    def source_at(self, step: int) -> int:
        """The position in `sources` of the source that crafts the batch of this step."""
        n = len(self.sources)
        if callable(self.select):
            chosen = self.select(step, n)
            if not 0 <= chosen < n:
                raise ValueError(f"{OP}: select must return a position in 0..{n - 1}, got {chosen}")
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
        then stands for the true label in an attack, unless its loss is a callable: that gets y).
        index: int64 [m], dataset positions; the noise of a sample then depends on its position in the data set
        alone and not on the batch or the rank it is in.
        part: which part of a global batch the m samples are; None: they are the whole batch. The parts of all ranks
        are together what one process makes of the global batch.
        """
        return self.micro(1, x, y, index, part)[0]

    def micro(self, n: int, x: Tensor, y: Tensor, index: Tensor | None = None,
              part: Part | None = None) -> list[AdversarialBatch]:
        """One step's batch in n micro-batches (at most one a sample), all crafted on one source.

        The i-th has every n-th sample from the i-th on, so that all have about the same share of adversarial ones.
        """
        x, y, index, part = _complete(x, y, index, part)
        source = self._draw(self.step, part.total)
        batches = [self._make_batch(self.step, source, x[i::n], y[i::n], None if index is None else index[i::n],
                                    part.every(n, i))
                   for i in range(max(1, min(n, len(x))))]
        self.step += 1
        return batches

    def _count_perturbed(self, m: int) -> int:
        """How many of m samples are perturbed."""
        if self.mix == "append":
            return m if self.fraction else 0
        # The small term keeps 0.29 * 100 = 28.999... from losing a sample to rounding.
        return math.floor(self.fraction * m + 1e-9)

    def _draw(self, step: int, total: int) -> int:
        """The source of this step's global batch of `total` samples, or -1 where it stays clean."""
        return self.source_at(step) if step >= self.start_step and self._count_perturbed(total) else -1

    def _make_batch(self, step: int, source: int, x: Tensor, y: Tensor, index: Tensor | None,
                    part: Part) -> AdversarialBatch:
        """The batch of this step's source (-1: a clean one)."""
        m = len(x)
        if len(y) != m:
            raise ValueError(f"{OP}: y must have one label for each of the {m} images, got {len(y)} labels")
        y = hard_or_soft(OP, y, m)
        x = x.detach().float().div_(255) if x.dtype == torch.uint8 else x.detach()
        if source < 0:
            return AdversarialBatch(x.clone(), y, torch.zeros(m, dtype=torch.bool, device=x.device), -1,
                                    Counts(m, 0), Counts(part.total, 0))
        append, all_k = self.mix == "append", self._count_perturbed(part.total)
        k = min(m, part.count(all_k))
        new_x = torch.cat([x, x]) if append else x.clone()
        adversarial = slice(m, m + k) if append else slice(k)
        if k:
            self._craft(step, self.sources[source], x[:k], y[:k], None if index is None else index[:k],
                        new_x[adversarial], part, all_k)
        is_adv = torch.zeros(len(new_x), dtype=torch.bool, device=x.device)
        is_adv[adversarial] = True
        clean, all_clean = (m, part.total) if append else (m - k, part.total - all_k)
        return AdversarialBatch(new_x, torch.cat([y, y]) if append else y, is_adv, source, Counts(clean, k),
                                Counts(all_clean, all_k))

    def _craft(self, step: int, source: BaseSource, x: Tensor, y: Tensor, index: Tensor | None, out: Tensor,
               part: Part, all_k: int) -> None:
        """Perturb x into `out`; all_k: how many samples of the global batch are perturbed."""
        if index is None and part.world > 1:
            index = part.positions(len(x), x.device)
        eps_key = self._step_keys(step, x.device)[0]
        # Dropout draws from torch's generators, which are seeded on the host: a key on the GPU would have to be
        # waited for.
        attack_key = self._step_keys(step, torch.device("cpu") if source.crafting == "train" else x.device)[1]
        eps: float | Tensor | None
        if isinstance(self.eps_dist, EpsDistribution):
            eps = self.eps_dist(len(x), eps_key, index)
        elif callable(self.eps_dist):
            eps = self.eps_dist(all_k, eps_key)[part.rank::part.world][:len(x)]
        else:
            eps = self.eps_dist
        labels = y if y.dim() == 1 or callable(self.attack.loss) else y.argmax(1)
        self.attack(source, x, labels, key=attack_key, eps=eps, index=index, out=out)

    def stream(self, loader: Iterable[Any], *,
               batch: Callable[[Any], Sequence[Any]] | None = None) -> Iterator[AdversarialBatch]:
        """The adversarial batch of every (x, y), (x, y, index) or (x, y, index, part) that `loader` yields: the same
        that calling this object on each in turn gives.

        batch: makes such a tuple of what the loader yields, where that has another form: dicts, rows, paths or metadata
        beside the labels. TypeError, which names what came, where there is none.

        On the CPU a batch is crafted when it is asked for. On CUDA the loader is one batch ahead. A next batch whose
        source is frozen is crafted on a stream of its own while the caller's training step runs; one whose source is
        live is crafted when it is asked for, on the model as the step before has left it. Batches are in the current
        stream's order; `state_dict` never counts a batch that was not yielded.
        """
        items = read_items(OP, loader, batch)
        item = next(items, None)
        side: SideStream | None = None
        ahead: _Ahead | None = None
        try:
            while item is not None:
                made = self._take(item, ahead, side)
                ahead, failure = None, None
                if self._overlaps(item[0]):
                    side = side or SideStream(item[0].device)
                    try:
                        item = next(items, None)
                        ahead = None if item is None else self._craft_ahead(side, item)
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

    def _take(self, item: Sequence[Any], ahead: _Ahead | None, side: SideStream | None) -> AdversarialBatch:
        """This step's batch: the one that is under way on the side stream, or one that is crafted now."""
        if ahead is None or ahead.when != (self.seed, self.step):  # a state was loaded meanwhile
            return self(*item)
        batch = ahead.batch
        if batch is None:
            batch = self._make_batch(self.step, ahead.source, *_complete(*item))
        else:
            assert side is not None  # it was crafted there
            side.hand_over((batch.x, batch.y, batch.is_adv))
        self.step += 1
        return batch

    def _overlaps(self, x: Tensor) -> bool:
        """Can anything be gained by crafting ahead?"""
        return x.is_cuda and any(map(is_frozen, self.sources))

    def _craft_ahead(self, side: SideStream, item: Sequence[Any]) -> _Ahead:
        """The next step's source, and its batch where that can be crafted before the model has moved."""
        x, y, index, part = _complete(*item)
        source = self._draw(self.step, part.total)
        batch = None
        if source >= 0 and is_frozen(self.sources[source]):
            self._step_keys(self.step, x.device)  # a block of keys serves both streams: made on this one
            batch = side.start(lambda: self._make_batch(self.step, source, x, y, index, part))
        return _Ahead((self.seed, self.step), source, batch)

    def state_dict(self) -> dict[str, int]:
        """The seed and the step: all that the next batches depend on besides the models."""
        return {"seed": self.seed, "step": self.step, "sources": len(self.sources)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken; ValueError if it is of an adversary with another number of sources."""
        if state["sources"] != len(self.sources):
            raise ValueError(f"{OP}: the saved state must be of {len(self.sources)} sources, as this adversary has, "
                             f"got one of {state['sources']} sources")
        self.seed, self.step = state["seed"], state["step"]
        self._keys.clear()


def is_frozen(source: BaseSource) -> bool:
    """Do its weights stay while the model trains?"""
    members = source.sources if isinstance(source, Ensemble) else (source,)
    return all(isinstance(m, Source) and not m.live for m in members)


def _complete(x: Tensor, y: Tensor, index: Tensor | None = None,
              part: Part | None = None) -> tuple[Tensor, Tensor, Tensor | None, Part]:
    """What a batch is made of; without `part` it is the whole global batch."""
    return x, y, index, Part(0, 1, len(x)) if part is None else part
