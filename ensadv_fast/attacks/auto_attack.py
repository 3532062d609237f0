"""AutoAttack on our sources: a thin adapter to whichever package carries it. Nothing here imports one before a call."""
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks, memory
from ..ops.losses import choose_labels
from ..sources.base import BaseSource, for_autograd
from .base import AttackResult, BaseAttack, Sizes, wide

PACKAGES = ("autoattack", "pyautoattack", "torchattacks")
NORMS = {"linf": "Linf", "l2": "L2"}
VERSIONS = ("standard", "plus", "rand")
_ITERATIONS, _TARGETS = 100, 9  # of the authors' standard version


@dataclass(frozen=True)
class AutoAttack(BaseAttack):
    """AutoAttack (Croce & Hein 2020); :func:`autoattack` makes one and says what it does."""

    norm: str = "linf"
    version: str = "standard"
    batch_size: int = 250
    package: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = self.name
        checks.choice(op, "norm", self.norm, tuple(NORMS))
        checks.choice(op, "version", self.version, VERSIONS)
        checks.choice(op, "package", self.package, (None, *PACKAGES))
        if self.targeted or self.loss != "ce" or (self.lo, self.hi) != (0, 1):
            raise ValueError(f"{op}: targeted, loss, lo and hi are AutoAttack's own, got targeted {self.targeted}, "
                             f"loss {self.loss!r}, [lo, hi] = [{self.lo}, {self.hi}]")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int):
            raise TypeError(f"{op}: batch_size must be an int, got {type(self.batch_size).__name__}")
        if self.batch_size < 1:
            raise ValueError(f"{op}: batch_size must be >= 1, got {self.batch_size}")

    @property
    def _draws(self) -> bool:
        return True

    def _sizes(self, x: Tensor, eps: float | Tensor) -> Sizes:
        if isinstance(eps, Tensor):
            raise ValueError(f"{self.name}: eps must be one number for the batch, got a tensor {tuple(eps.shape)}")
        if x.dim() != 4:
            raise ValueError(f"{self.name}: x must have shape [N, C, H, W], got {tuple(x.shape)}")
        _, eps = checks.per_sample(self.name, "eps", eps, x, is_size=True)
        _package(self.package)
        return Sizes(eps, eps, eps, 1, eps)

    def _worst_of(self, source: BaseSource, x: Tensor, y: Tensor | None, sizes: Sizes, start_key: Tensor | None,
                  label_key: Tensor | None, index: Tensor | None, out: Tensor | None) -> AttackResult:
        clean = wide(x)
        logits = source.logits(clean)
        labels = choose_labels(logits, y, self.rule, label_key, index)
        checks.labels(self.name, "y", labels, len(x), x.device, logits.shape[1])
        assert start_key is not None
        seed = int(start_key[0] ^ start_key[1]) & (1 << 31) - 1
        module, devices = _package(self.package), [x.device] if x.device.type == "cuda" else []
        with _alone(source) as net, torch.random.fork_rng(devices), torch.enable_grad():
            found = _RUNS[module.__name__](module, net, for_autograd(clean).float().contiguous(), for_autograd(labels),
                                           self, float(sizes.eps), logits.shape[1], seed)
        target = torch.empty_like(x) if out is None and memory.result_dtype(x) != clean.dtype else out
        x_adv = ops.project(found.detach().to(clean.dtype), clean, sizes.eps, norm=self.norm, out=target)
        loss, logits = self._losses(source, wide(x_adv), labels)
        return AttackResult(x_adv, labels, loss, self._met(logits, labels))


class _Logits(nn.Module):
    """A source as the module that the packages take: float32 logits of images."""

    def __init__(self, source: BaseSource):
        super().__init__()
        self.source = source
        self.where = nn.Parameter(torch.empty(0, device=source.device), requires_grad=False)  # tells them the device
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.source.logits(x).float()


@contextmanager
def _alone(source: BaseSource) -> Iterator[_Logits]:
    """The module, while no parameter asks for a gradient: the packages call backward(), which would leave some."""
    net = _Logits(source)
    members: tuple[Any, ...] = getattr(source, "sources", (source,))
    asked = [p for s in members for p in s.module.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        yield net
    finally:
        for p in asked:
            p.requires_grad_(True)


def _package(name: str | None) -> ModuleType:
    for package in PACKAGES if name is None else (name,):
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as e:
            if e.name != package:
                raise
    wanted = "one of autoattack (its authors', from GitHub), pyautoattack, torchattacks" if name is None else name
    raise ImportError(f"autoattack: needs {wanted}: pip install {name or 'pyautoattack'}")


def _original(module: ModuleType, net: nn.Module, x: Tensor, y: Tensor, attack: AutoAttack, eps: float, classes: int,
              seed: int) -> Tensor:
    """The authors' own code, from their repository or repackaged: it differs in how it is called."""
    own = module.__name__ == "autoattack"
    quiet = {"verbose": False} if own else {}
    runner = module.AutoAttack(net, norm=NORMS[attack.norm], eps=eps, seed=seed, version=attack.version,
                               device=x.device, **quiet)
    runner.verbose = False
    runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = min(_TARGETS, classes - 1)
    size = {"bs" if own else "batch_size": attack.batch_size}
    found = runner.run_standard_evaluation(x, y, **size)
    return found if own else found[0]


def _torchattacks(module: ModuleType, net: nn.Module, x: Tensor, y: Tensor, attack: AutoAttack, eps: float,
                  classes: int, seed: int) -> Tensor:
    """Its parts with the authors' iterations and targets, of which it has 10 and all."""
    runner = module.AutoAttack(net, norm=NORMS[attack.norm], eps=eps, version=attack.version, n_classes=classes,
                               seed=seed)
    for part in runner._autoattack.attacks:
        if hasattr(part, "steps"):
            part.steps = _ITERATIONS
        if hasattr(part, "n_target_classes"):
            part.n_target_classes = min(_TARGETS, classes - 1)
    found = [runner(a, b) for a, b in zip(x.split(attack.batch_size), y.split(attack.batch_size))]
    return torch.cat(found)


_RUNS = {"autoattack": _original, "pyautoattack": _original, "torchattacks": _torchattacks}


def autoattack(eps: float = 8 / 255, *, norm: str = "linf", version: str = "standard", batch_size: int = 250,
               package: str | None = None, **kw: Any) -> AutoAttack:
    """AutoAttack: APGD-CE, targeted APGD-DLR and FAB, and Square, each on the samples that the ones before left
    (Croce & Hein 2020), run by an optional package on our sources, and called like every attack.

    Args:
        eps: one size for the whole batch; norm: "linf" or "l2", its norm.
        version: "standard", "plus" or "rand", as in the package.
        batch_size: samples searched at a time.
        package: "autoattack" (its authors', from github.com/fra31/auto-attack), "pyautoattack" (the same, repackaged)
            or "torchattacks" (its parts, here with the authors' 100 iterations and 9 targets). None: the first found.
        kw: rule: which label is to be left. The others are AutoAttack's own.

    The packages compute in float32, on `source.logits`; a source in 16 bits answers in its own precision: take an
    exact one for figures that are to be compared. They seed torch's generators, from the key here, and the caller's go
    on as if nothing had been drawn. The result is projected on the ball and the box in x's dtype, and one forward pass
    more says what it does. It synchronises often. Fewer than four classes are too few for its margin loss.

    Raises:
        ImportError: at the call, where no package is found; TypeError, ValueError as every attack.
    """
    return AutoAttack("autoattack", eps, norm=norm, version=version, batch_size=batch_size, package=package, **kw)
