"""Errors of targets under attacks crafted on sources: white-box and black-box (transfer).

Everything is derived from one thing: for each (attack, source, target) a bool array over the test inputs, true where
the target misclassifies. Errors are fractions of ALL test inputs (Tramer et al., ICLR 2018, section 4), not Kurakin's
transfer rate, which counts only those that fool the source.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from . import ops
from .attacks import Attack
from .data import derive_seed
from .protocol import BaseSource

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


@dataclass
class TransferMatrix:
    """wrong[attack, source, target]: bool [N], true where `target` misclassifies the example that `attack` crafted
    on `source`; clean[target]: bool [N], the same for the unperturbed inputs."""

    wrong: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)
    clean: dict[str, np.ndarray] = field(default_factory=dict)

    def error(self, attack: str, source: str, target: str) -> float:
        """The fraction of all test inputs that are misclassified, 0..1."""
        return float(self.wrong[attack, source, target].mean())

    def clean_error(self, target: str) -> float:
        return float(self.clean[target].mean())

    def merge(self, other: TransferMatrix) -> TransferMatrix:
        """Both matrices in one; they must be of the same test inputs."""
        return TransferMatrix({**self.wrong, **other.wrong}, {**self.clean, **other.clean})

    @property
    def attacks(self) -> list[str]:
        return list(dict.fromkeys(attack for attack, _, _ in self.wrong))


@dataclass(frozen=True)
class BlackBox:
    """A target's errors over (attack, source) pairs: the highest of the pairs' errors (the papers' "Max.
    Black-Box"), their mean, and the fraction of inputs that at least one pair fools (per-example worst case)."""

    max: float
    mean: float
    worst_case: float


def black_box(matrix: TransferMatrix, target: str, sources: Sequence[str]) -> BlackBox:
    """Summarise `target` over all attacks crafted on `sources`, the held-out ones. ValueError if there are none."""
    wrong = [w for (_, s, t), w in matrix.wrong.items() if t == target and s in sources]
    if not wrong:
        raise ValueError(f"black_box: the matrix has no attack from {list(sources)} on {target!r}")
    errors = np.stack(wrong)
    per_pair = errors.mean(axis=1)
    return BlackBox(float(per_pair.max()), float(per_pair.mean()), float(errors.any(axis=0).mean()))


def transfer_matrix(targets: Mapping[str, nn.Module], sources: Mapping[str, BaseSource | nn.Module],
                    attacks: Mapping[str, Attack], loader: Batches, *, key: Tensor | None = None,
                    progress: Callable[[int], object] = lambda n: None) -> TransferMatrix:
    """Craft every attack on every source and show the examples to every target.

    A target that is named among the sources too gives the white-box errors wrong[attack, name, name]. The true
    labels are used in crafting. loader: batches (x float [B, C, H, W] in [0, 1], y int64 [B], index int64 [B], the
    positions in the test set, on which alone the attacks' noise depends). Targets are put in eval mode and their
    flags restored. key: int64 [2] from `ops.fresh_key`; None draws one. progress: called with the batch size after
    each (batch, source, attack). Raises ValueError where the loader is empty or there is no target.
    """
    if not targets:
        raise ValueError("transfer_matrix: targets: got none, want at least one")
    seed = derive_seed(*(ops.fresh_key("cpu") if key is None else key).tolist())
    found: dict[tuple[str, str, str], list[Tensor]] = {}
    clean: dict[str, list[Tensor]] = {t: [] for t in targets}
    flags = {m: m.training for t in targets.values() for m in t.modules()}
    try:
        for t in targets.values():
            t.eval()
        for x, y, index in loader:
            for t, model in targets.items():
                clean[t].append(_wrong(model, x, y))
            for s, source in sources.items():
                for a, attack in attacks.items():
                    noise = ops.fresh_key(x.device, derive_seed(seed, a, s))
                    x_adv = attack(source, x, y, key=noise, index=index)
                    for t, model in targets.items():
                        found.setdefault((a, s, t), []).append(_wrong(model, x_adv, y))
                    progress(len(x))
    finally:
        for module, training in flags.items():
            module.training = training
    if not all(clean.values()):
        raise ValueError("transfer_matrix: the loader gave no batch")
    return TransferMatrix({pair: torch.cat(w).cpu().numpy() for pair, w in found.items()},
                          {t: torch.cat(w).cpu().numpy() for t, w in clean.items()})


@torch.no_grad()
def _wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) != y
