"""AutoAttack on our sources: a thin adapter to whichever package carries it. Nothing here imports one before a call."""
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import checks, memory
from ..ops.losses import choose_labels
from ..sources.base import BaseSource, for_autograd
from .base import BaseAttack
from .request import AttackResult, Budget, Keys, Request

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
            raise ValueError(f"{op}: targeted, loss, lo and hi must be AutoAttack's own, got targeted {self.targeted}, "
                             f"loss {self.loss!r}, [lo, hi] = [{self.lo}, {self.hi}]")
        checks.integer(op, "batch_size", self.batch_size, least=1)

    @property
    def _draws_noise(self) -> bool:
        return True

    def _sizes(self, x: Tensor, eps: float | Tensor) -> Budget:
        if isinstance(eps, Tensor):
            raise ValueError(f"{self.name}: eps must be one number for the batch, got a tensor {tuple(eps.shape)}")
        if x.dim() != 4:
            raise ValueError(f"{self.name}: x must have shape [N, C, H, W], got {tuple(x.shape)}")
        _package(self.package)
        return self._budget(x, eps)

    def _worst_of(self, source: BaseSource, request: Request, keys: Keys) -> AttackResult:
        clean = memory.widen(request.x)
        logits = source.logits(clean)
        labels = choose_labels(logits, request.y, self.rule, keys.labels, request.index)
        checks.labels(self.name, "y", labels, len(clean), clean.device, logits.shape[1])
        assert keys.start is not None
        seed = int(keys.start[0] ^ keys.start[1]) & (1 << 31) - 1
        if logits.shape[1] < 4:
            raise ValueError(f"{self.name}: source must have at least 4 classes, which AutoAttack's margin loss "
                             f"needs, got {logits.shape[1]}: take pgd with loss 'ce' and 'cw', each with restarts")
        module, devices = _package(self.package), [clean.device] if clean.device.type == "cuda" else []
        with _alone(source) as net, torch.random.fork_rng(devices), torch.enable_grad():
            found = _RUNS[module.__name__](module, net, for_autograd(clean).float().contiguous(), for_autograd(labels),
                                           self, float(request.sizes.eps), logits.shape[1], seed)
        x_adv = self._into_ball(found.detach().to(clean.dtype), request, self.norm)
        loss, logits = self._losses(source, memory.widen(x_adv), labels)
        return AttackResult(x_adv, labels, loss, self.succeeded(logits, labels))


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
    more says what it does. It synchronises often. Fewer than four classes are too few for its margin loss: an error.

    Raises:
        ImportError: at the call, where no package is found; TypeError, ValueError as every attack.
    """
    return AutoAttack("autoattack", eps, norm=norm, version=version, batch_size=batch_size, package=package, **kw)
