"""The peer libraries' own code for what our cases compute, called as installed: what is timed is theirs, not a copy.

One step of an attack needs a model's gradient, which is no part of any op. Where a library's method takes tensors, that
method alone is called. Where only the whole attack can be called, it runs one step on a stub model whose input gradient
is a given tensor; the stub's forward and backward pass is timed on its own as "stub alone" and may be subtracted.
Attacks start at the ball's center and momentum at zero, because the libraries offer no way to enter in between.

Left out, because they compute something else: the L2 steps of cleverhans and ART, which clip before they project as
well as after; foolbox's and ART's momentum, which sum signs or another norm's multiples.

Nothing is imported before it is called; a package that is not installed leaves its contender out.
"""
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensadv_fast.bench.contenders import Setting

ANY = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Peer:
    """One library's code for one case.

    make: from the case's arguments, a zero-argument function. start: what the arguments are changed to before, for
    the reference too. verified: it computes what the case does (a stub alone does not). dtypes, channels_last:
    what it accepts and keeps.
    """

    package: str
    what: str
    case: str
    make: Callable
    start: Callable = lambda args, kw: (args, kw)
    verified: bool = True
    dtypes: tuple[str, ...] = ("float32",)
    channels_last: bool = True

    @property
    def name(self) -> str:
        return f"{self.package} {self.what}"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def bind(self, args, kw) -> Callable[[], object]:
        """The call on these arguments, or on those that :attr:`start` makes of them."""
        args, kw = self.start(args, kw)
        return self.make(*args, **kw)


class _GivenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad):
        ctx.grad = grad
        return x.new_zeros(len(x), 2)

    @staticmethod
    def backward(ctx, _):
        return ctx.grad, None


class Stub(nn.Module):
    """A classifier that computes nothing; its input gradient is the given one, whatever the loss."""

    def __init__(self, grad: Tensor):
        super().__init__()
        self.grad = grad
        self.anchor = nn.Parameter(grad.new_zeros(1))  # libraries ask a parameter for the device

    def forward(self, x: Tensor) -> Tensor:
        return _GivenGradient.apply(x, self.grad)


def _labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def stub_alone(x, grad, *args, **kw):
    """What every attack on the stub pays beside its own code: forward pass, loss, backward pass."""
    stub, y = Stub(grad), _labels(x)

    def call():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(stub(leaf), y), leaf)[0]
    return call


def at_center(args, kw):
    """One step from the ball's center."""
    return (kw["center"], *args[1:]), kw


def at_center_without_momentum(args, kw):
    x, grad, momentum, *rest = args
    return (kw["center"], grad, torch.zeros_like(momentum), *rest), kw


# ---- torchattacks: the attack's forward, one step ----------------------------------------------------------------

def torchattacks_fgsm(x, grad, step):
    import torchattacks
    attack, y = torchattacks.FGSM(Stub(grad), eps=step), _labels(x)
    return lambda: attack(x, y)


def torchattacks_pgd(x, grad, step, *, center, eps):
    import torchattacks
    attack, y = torchattacks.PGD(Stub(grad), eps=eps, alpha=step, steps=1, random_start=False), _labels(x)
    return lambda: attack(center, y)


def torchattacks_mifgsm(x, grad, momentum, step, *, decay, center, eps):
    import torchattacks
    attack, y = torchattacks.MIFGSM(Stub(grad), eps=eps, alpha=step, steps=1, decay=decay), _labels(x)
    return lambda: attack(center, y)


def torchattacks_pgdl2(x, grad, step, *, center, eps):
    import torchattacks
    attack, y = torchattacks.PGDL2(Stub(grad), eps=eps, alpha=step, steps=1, random_start=False), _labels(x)
    return lambda: attack(center, y)


def torchattacks_rfgsm_start(x, key, eps, *, kind):
    """RFGSM with no gradient step after it: its random step alone."""
    import torchattacks
    attack, y = torchattacks.RFGSM(Stub(x), eps=eps, alpha=eps, steps=0), _labels(x)
    return lambda: attack(x, y)


def torchattacks_gn(x, key, eps, *, kind):
    import torchattacks
    attack, y = torchattacks.GN(Stub(x), std=eps), _labels(x)
    return lambda: attack(x, y)


def torchattacks_normalize(x, mean, std):
    import torchattacks
    attack = torchattacks.FGSM(Stub(x))
    attack.set_normalization_used(mean.tolist(), std.tolist())
    return lambda: attack.normalize(x)


# ---- cleverhans: the statements of fast_gradient_method and projected_gradient_descent after the backward pass ---

def cleverhans_fgm(norm):
    def make(x, grad, step):
        from cleverhans.torch.utils import optimize_linear
        return lambda: torch.clamp(x + optimize_linear(grad, step, norm), 0, 1)
    return make


def cleverhans_pgd(x, grad, step, *, center, eps):
    from cleverhans.torch.utils import clip_eta, optimize_linear

    def call():
        moved = torch.clamp(x + optimize_linear(grad, step, np.inf), 0, 1)
        return torch.clamp(center + clip_eta(moved - center, np.inf, eps), 0, 1)
    return call


# ---- foolbox: run() of the attack for one step, its value_and_grad replaced by the given gradient ----------------

def foolbox_pgd(attack_name):
    def make(x, grad, step, *, center, eps):
        import eagerpy as ep
        import foolbox
        given = ep.astensor(grad)

        class Attack(getattr(foolbox.attacks, attack_name)):
            def value_and_grad(self, loss_fn, x):
                return None, given

        attack = Attack(abs_stepsize=step, steps=1, random_start=False)
        model = foolbox.PyTorchModel(Stub(grad).eval(), bounds=(0, 1), device=x.device)
        criterion = foolbox.criteria.Misclassification(_labels(x))
        size = ep.astensor(eps) if isinstance(eps, Tensor) else eps
        return lambda: attack.run(model, center, criterion, epsilon=size)
    return make


def foolbox_project(attack_name):
    def make(x, center, eps, *, norm, lo):
        import eagerpy as ep
        import foolbox
        attack = getattr(foolbox.attacks, attack_name)()
        point, origin = ep.astensors(x, center)
        size = eps.view(-1, 1, 1, 1) if norm == "linf" else ep.astensor(eps)
        return lambda: ep.clip(attack.project(point, origin, size), lo, 1).raw
    return make


def foolbox_random_start(x, key, eps, *, kind, clip):
    import eagerpy as ep
    import foolbox
    attack, origin = foolbox.attacks.LinfProjectedGradientDescentAttack(), ep.astensor(x)
    return lambda: attack.get_random_start(origin, eps).raw


def foolbox_preprocess(x, mean, std):
    import eagerpy as ep
    import foolbox
    model = foolbox.PyTorchModel(Stub(x).eval(), bounds=(0, 1), device=x.device,
                                 preprocessing={"mean": mean.tolist(), "std": std.tolist(), "axis": -3})
    images = ep.astensor(x)
    return lambda: model._preprocess(images).raw


# ---- ART: _compute_pytorch, one iteration on tensors, its classifier's loss_gradient being the given tensor ------

def _art_attack(x: Tensor, grad: Tensor, norm):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    class Given(PyTorchClassifier):
        def loss_gradient(self, x, y, **kw):
            return grad

    device = "gpu" if x.is_cuda else "cpu"
    given = Given(Stub(grad), nn.CrossEntropyLoss(), x.shape[1:], 2, clip_values=(0.0, 1.0), device_type=device)
    return ProjectedGradientDescentPyTorch(given, norm=norm, eps=1.0, eps_step=1.0, verbose=False)


def art_pgd(x, grad, step, *, center, eps):
    attack, y, zero = _art_attack(x, grad, np.inf), _labels(x), torch.zeros_like(x)
    return lambda: attack._compute_pytorch(x, center, y, None, eps, step, False, zero)


def art_project(norm):
    def make(x, center, eps, *, lo, **kw):
        attack, size = _art_attack(x, x, norm), eps.view(-1, 1, 1, 1).cpu().numpy()
        return lambda: (attack._projection(x - center, size, norm) + center).clamp(lo, 1)
    return make


PEERS = [
    Peer("torchattacks", "FGSM", "sign_step-free", torchattacks_fgsm, dtypes=ANY),
    Peer("torchattacks", "PGD", "sign_step-ball", torchattacks_pgd, at_center, dtypes=ANY),
    Peer("torchattacks", "MIFGSM", "momentum_step-ball", torchattacks_mifgsm, at_center_without_momentum),
    Peer("torchattacks", "PGDL2", "l2_step-ball", torchattacks_pgdl2, at_center, channels_last=False),
    Peer("torchattacks", "RFGSM start", "random_step-rademacher", torchattacks_rfgsm_start, dtypes=ANY),
    Peer("torchattacks", "GN", "random_step-normal", torchattacks_gn, dtypes=ANY),
    Peer("torchattacks", "normalize", "model_entry-normalise", torchattacks_normalize),
    *[Peer("torchattacks", "stub alone", case, stub_alone, verified=False, dtypes=dtypes) for case, dtypes in (
        ("sign_step-free", ANY), ("sign_step-ball", ANY), ("momentum_step-ball", ("float32",)),
        ("l2_step-ball", ("float32",)))],
    Peer("cleverhans", "FGM", "sign_step-free", cleverhans_fgm(np.inf), dtypes=ANY),
    Peer("cleverhans", "PGD", "sign_step-ball", cleverhans_pgd, dtypes=ANY),
    Peer("cleverhans", "FGM L2", "l2_step-free", cleverhans_fgm(2)),
    Peer("foolbox", "LinfPGD", "sign_step-ball", foolbox_pgd("LinfProjectedGradientDescentAttack"), at_center,
         dtypes=ANY),
    Peer("foolbox", "L2PGD", "l2_step-ball", foolbox_pgd("L2ProjectedGradientDescentAttack"), at_center),
    Peer("foolbox", "project", "project-linf", foolbox_project("LinfProjectedGradientDescentAttack")),
    Peer("foolbox", "project", "project-l2", foolbox_project("L2ProjectedGradientDescentAttack")),
    Peer("foolbox", "random start", "random_step-uniform", foolbox_random_start, dtypes=ANY),
    Peer("foolbox", "preprocess", "model_entry-normalise", foolbox_preprocess),
    Peer("art", "PGD", "sign_step-ball", art_pgd),
    Peer("art", "project", "project-linf", art_project(np.inf)),
    Peer("art", "project", "project-l2", art_project(2)),
]


def peers_of(setting: Setting) -> list[Peer]:
    """Those that can do what the setting asks."""
    return [peer for peer in PEERS if peer.case == setting.case.name and setting.dtype in peer.dtypes
            and (peer.channels_last or setting.format == "contiguous")]
