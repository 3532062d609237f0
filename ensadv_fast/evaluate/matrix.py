"""What is known once attacks have been shown to targets: bits per example, and every measure derived from them.

Two measures that are often mixed up have different names here. The *error* (rate) of Tramer et al. (ICLR 2018,
section 4) is the fraction of ALL test inputs that the target misclassifies. The *transfer rate* of Kurakin et al.
(ICLR 2017, section 2.3) is that fraction among the inputs which the SOURCE classifies correctly when clean and wrongly
when attacked.

"Misclassifies" means that the label is not the highest logit (top-1), or not among the five highest (top-5). Top-5
measures use the second meaning for the target and, in the transfer rate's condition, for the source; with five classes
or fewer nothing is misclassified by top-5. Of two equal logits, that of the lower class counts as higher. A NaN counts
as higher than the label's logit, and a label whose own logit is NaN is misclassified.
"""
from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..system import files
from .statistics import Rate, ties, wilson


class PackedBools(MutableMapping):
    """name -> bool [N], kept as one bit each."""

    def __init__(self, items: Mapping[Any, np.ndarray] | Iterable[tuple[Any, np.ndarray]] = ()):
        self._packed: dict[Any, tuple[int, np.ndarray]] = {}
        self.update(items)

    def __setitem__(self, name: Any, bits: np.ndarray) -> None:
        bits = np.asarray(bits)
        if bits.dtype != bool or bits.ndim != 1:
            raise ValueError(f"TransferMatrix: {name} must be bool [N], got {bits.dtype} {list(bits.shape)}")
        self._packed[name] = len(bits), np.packbits(bits)

    def __getitem__(self, name: Any) -> np.ndarray:
        n, packed = self._packed[name]
        return np.unpackbits(packed, count=n).astype(bool)

    def __delitem__(self, name: Any) -> None:
        del self._packed[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def sizes(self) -> set[int]:
        return {n for n, _ in self._packed.values()}


def _bools() -> PackedBools:
    return field(default_factory=PackedBools)


@dataclass(repr=False)
class TransferMatrix:
    """Bits per example, and the measures (see this module) that follow from them.

    wrong[attack, source, target]: bool [N], true where `target` misclassifies the example that `attack` crafted on
    `source`. clean[target]: bool [N], the same of the unperturbed inputs. counted[attack, source]: bool [N], true where
    `source` classifies the clean input correctly and the adversarial one wrongly: the inputs among which the transfer
    rate is counted. wrong5, clean5, counted5: the same by top-5. Any of these may lack entries. A source of the same
    name as a target is that target, so wrong[attack, name, name] is white-box. data: digest of the test inputs, or
    None. `print` shows a table of all errors with their intervals. Raises ValueError: what is not bool [N] with one N
    for all.
    """

    wrong: MutableMapping[tuple[str, str, str], np.ndarray] = _bools()
    clean: MutableMapping[str, np.ndarray] = _bools()
    wrong5: MutableMapping[tuple[str, str, str], np.ndarray] = _bools()
    clean5: MutableMapping[str, np.ndarray] = _bools()
    counted: MutableMapping[tuple[str, str], np.ndarray] = _bools()
    counted5: MutableMapping[tuple[str, str], np.ndarray] = _bools()
    data: str | None = None

    def __post_init__(self) -> None:
        for name in BITS:
            if not isinstance(bits := getattr(self, name), PackedBools):
                setattr(self, name, PackedBools(bits))
        if len(sizes := self._sizes()) > 1:
            raise ValueError(f"TransferMatrix: all must be of the same test inputs, got {sorted(sizes)} of them")

    def _sizes(self) -> set[int]:
        return set().union(*(getattr(self, name).sizes() for name in BITS))

    def __len__(self) -> int:
        """N, the number of test inputs."""
        return next(iter(self._sizes()), 0)

    def error_rate(self, attack: str, source: str, target: str, *, top: int = 1) -> Rate:
        """Misclassified of all test inputs. top: 1 or 5."""
        return _rate(_by_top(self.wrong, self.wrong5, top)[attack, source, target])

    def error(self, attack: str, source: str, target: str) -> float:
        """The fraction of all test inputs that are misclassified, 0..1."""
        return _value(self.error_rate(attack, source, target))

    def clean_rate(self, target: str, *, top: int = 1) -> Rate:
        """Misclassified of all unperturbed test inputs. top: 1 or 5."""
        return _rate(_by_top(self.clean, self.clean5, top)[target])

    def clean_error(self, target: str) -> float:
        """The fraction of all unperturbed test inputs that are misclassified, 0..1."""
        return _value(self.clean_rate(target))

    def transfer_rate(self, attack: str, source: str, target: str, *, top: int = 1) -> Rate:
        """Kurakin's: misclassified by the target, of the inputs that fool the source (n may be 0). top: 1 or 5."""
        wrong = _by_top(self.wrong, self.wrong5, top)[attack, source, target]
        return _rate(wrong[_by_top(self.counted, self.counted5, top)[attack, source]])

    def tied_targets(self, attack: str, source: str, *, test: str = "mcnemar") -> list[str]:
        """Targets, other than the source itself, whose error is the lowest or tied with it (:func:`ties`)."""
        bits = {t: w for (a, s, t), w in self.wrong.items() if (a, s) == (attack, source) and t != source}
        return ties(bits, test=test) if bits else []

    def merge(self, other: TransferMatrix) -> TransferMatrix:
        """Both matrices in one. ValueError where they are not of the same test inputs."""
        if None not in (self.data, other.data) and self.data != other.data:
            raise ValueError("TransferMatrix: merge: both must be of the same test inputs, got different test inputs")
        return TransferMatrix(**{name: PackedBools({**getattr(self, name), **getattr(other, name)}) for name in BITS},
                              data=self.data or other.data)

    @property
    def attacks(self) -> list[str]:
        return list(dict.fromkeys(attack for attack, _, _ in self.wrong))

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(source for _, source, _ in self.wrong))

    @property
    def targets(self) -> list[str]:
        return list(dict.fromkeys([*self.clean, *(target for _, _, target in self.wrong)]))

    def __repr__(self) -> str:
        return (f"TransferMatrix({len(self.attacks)} attacks from {len(self.sources)} sources on {len(self.targets)} "
                f"targets, {len(self)} test inputs)")

    def __str__(self) -> str:
        from ..report import table  # the package itself loads no reports

        def row(r: Mapping[str, Any]) -> list[str]:
            transfer = None if r["white_box"] else r["transfer_rate"]
            return [r["target"], "itself (white-box)" if r["white_box"] else r["source"] or "-", r["attack"],
                    f"{100 * r['error']:.2f}", f"{100 * r['low']:.1f} to {100 * r['high']:.1f}",
                    "-" if transfer is None else f"{100 * transfer:.2f}"]

        head = ["model", "crafted on", "attack", "error %", "95 % interval", "transfer rate %"]
        return (f"{table(head, [row(r) for r in self._records() if r['n']])}\n\nErrors are of all {len(self)} test "
                "inputs, transfer rates of those that fool the source.")

    def _records(self) -> list[dict[str, Any]]:
        """A row of :meth:`to_pandas` for each clean error, then for each cell."""
        def record(target: str, source: str | None, attack: str, rate: Rate, rate5: Rate | None,
                   transfer: Rate | None) -> dict[str, Any]:
            low, high = rate.interval or (None, None)
            return {"target": target, "source": source, "attack": attack, "white_box": source == target,
                    "error": rate.value, "low": low, "high": high, "count": rate.count, "n": rate.n,
                    "error_top5": rate5 and rate5.value, "transfer_rate": transfer and transfer.value}

        found = [record(t, None, "clean", self.clean_rate(t),
                        self.clean_rate(t, top=5) if t in self.clean5 else None, None) for t in self.clean]
        return found + [record(t, s, a, self.error_rate(a, s, t),
                               self.error_rate(a, s, t, top=5) if (a, s, t) in self.wrong5 else None,
                               self.transfer_rate(a, s, t) if (a, s) in self.counted else None)
                        for a, s, t in self.wrong]

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for each target's clean error ("clean", source None) and for each cell: target,
        source, attack, white_box, error with its interval low to high (fractions, 95 %), count, n, error_top5,
        transfer_rate. ImportError without pandas, which is not among the dependencies."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as e:
            raise ImportError("TransferMatrix: to_pandas needs the package pandas: pip install pandas") from e
        return pandas.DataFrame(self._records())

    def to_dict(self, *, bits: bool = False) -> dict[str, Any]:
        """Everything as JSON holds it. A rate is {"value", "count", "n", "low", "high"} (:class:`Rate`, 95 %).

        {"n": test inputs, "data": their digest or null, "attacks", "sources", "targets": names in order,
         "clean": {target: {"top1": rate, "top5": rate or null}},
         "cells": [{"attack", "source", "target", "white_box": bool,
                    "error": {"top1": rate, "top5": rate or null},
                    "transfer_rate": {"top1": rate, "top5": rate or null}}],   a rate that was not measured is null
         "tied_targets": [{"attack", "source", "targets": those with the lowest error or tied with it}]}

        bits: add "bits", from which :meth:`load` restores the matrix.
        """
        def rates(measure: Callable[..., Rate], key: Any, top1: Mapping, top5: Mapping, *names: str) -> dict[str, Any]:
            """The measure of these names, where the bits that it needs are known under the key."""
            return {f"top{top}": measure(*names, top=top).to_dict() if key in known else None
                    for top, known in ((1, top1), (5, top5))}

        body: dict[str, Any] = {
            "n": len(self), "data": self.data, "attacks": self.attacks, "sources": self.sources,
            "targets": self.targets,
            "clean": {t: rates(self.clean_rate, t, self.clean, self.clean5, t) for t in self.clean},
            "cells": [{"attack": a, "source": s, "target": t, "white_box": s == t,
                       "error": rates(self.error_rate, (a, s, t), self.wrong, self.wrong5, a, s, t),
                       "transfer_rate": rates(self.transfer_rate, (a, s), self.counted, self.counted5, a, s, t)}
                      for a, s, t in self.wrong],
            "tied_targets": [{"attack": a, "source": s, "targets": self.tied_targets(a, s)}
                             for a, s in dict.fromkeys((a, s) for a, s, _ in self.wrong)]}
        if bits:
            body["bits"] = {name: [[key, base64.b64encode(np.packbits(b).tobytes()).decode()]
                                   for key, b in getattr(self, name).items()] for name in BITS}
        return body

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` with its bits as one JSON file, atomically."""
        files.write_json(Path(path), self.to_dict(bits=True), indent=1)

    @classmethod
    def load(cls, path: str | Path) -> TransferMatrix:
        """What :meth:`save` wrote. FileNotFoundError, or ValueError naming a file that is none."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"TransferMatrix: no file {path}")
        try:
            body = json.loads(path.read_text())
            n = body["n"]
            found = {name: PackedBools(
                (key if isinstance(key, str) else tuple(key),
                 np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(bool))
                for key, text in body["bits"][name]) for name in BITS}
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"TransferMatrix: {path} is corrupt or no saved matrix ({type(e).__name__}: {e})") from e
        return cls(**found, data=body["data"])


BITS = tuple(f.name for f in fields(TransferMatrix) if f.name != "data")


def _value(rate: Rate) -> float:
    if rate.value is None:
        raise ValueError("TransferMatrix: an error needs at least one test input, got a matrix without any")
    return rate.value


def _rate(bits: np.ndarray) -> Rate:
    return Rate(int(bits.sum()), len(bits))


def _by_top(top1: Mapping, top5: Mapping, top: int) -> Mapping:
    if top not in (1, 5):
        raise ValueError(f"TransferMatrix: top must be 1 or 5, got {top!r}")
    return top1 if top == 1 else top5


@dataclass(frozen=True)
class BlackBox:
    """A target's errors over (attack, source) pairs: the highest of the pairs' errors (the papers' "Max.
    Black-Box"), their mean, and the fraction of inputs that at least one pair fools (per-example worst case).

    pair: the (attack, source) of the highest error; tied: the pairs, `pair` among them, whose error does not differ
    from the highest at 95 % (:func:`ensadv_fast.evaluate.ties`). n: test inputs. max and worst_case are counts over n,
    with Wilson's interval; the interval of max is that of one pair, with no correction for the choice of the highest.
    """

    max: float
    mean: float
    worst_case: float
    pair: tuple[str, str]
    tied: tuple[tuple[str, str], ...]
    n: int

    @property
    def max_interval(self) -> tuple[float, float]:
        return wilson(round(self.max * self.n), self.n)

    @property
    def worst_case_interval(self) -> tuple[float, float]:
        return wilson(round(self.worst_case * self.n), self.n)

    def to_dict(self) -> dict[str, Any]:
        """{"max", "mean", "worst_case", "max_interval", "worst_case_interval", "pair", "tied", "n"}."""
        return {"max": self.max, "mean": self.mean, "worst_case": self.worst_case,
                "max_interval": list(self.max_interval), "worst_case_interval": list(self.worst_case_interval),
                "pair": list(self.pair), "tied": [list(pair) for pair in self.tied], "n": self.n}


def black_box(matrix: TransferMatrix, target: str, sources: Sequence[str] | None = None, *, top: int = 1,
              test: str = "mcnemar") -> BlackBox:
    """Summarise `target` over all attacks crafted on `sources`, the held-out ones.

    sources: None means every source of the matrix but the target itself, whether or not the target was trained on
    it. top: 1 or 5. test: of ties. ValueError if there is no such pair.
    """
    asked = [s for s in matrix.sources if s != target] if sources is None else sources
    wrong = _by_top(matrix.wrong, matrix.wrong5, top)
    bits = {(a, s): w for (a, s, t), w in wrong.items() if t == target and s in asked}
    if not bits:
        raise ValueError(f"black_box: the matrix has no attack from {list(asked)} on {target!r}")
    errors = {pair: float(w.mean()) for pair, w in bits.items()}
    pair = max(errors, key=lambda pair: errors[pair])
    return BlackBox(errors[pair], float(np.mean(list(errors.values()))),
                    float(np.logical_or.reduce(list(bits.values())).mean()), pair,
                    tuple(ties(bits, best="highest", test=test)), len(matrix))
