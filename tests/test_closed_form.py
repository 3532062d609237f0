"""Attacks on a linear model of two classes, where the best adversarial example is known.

With logits (-z/2, z/2), z = <w, x> + b, the loss of label y falls in s z, s = 2 y - 1, so its maximum over a ball is
that of the linear function -s z (its minimum where targeted): in the L-inf ball and a box clip(x - s eps sign(w)), in
the L2 ball x - s eps w / norm2(w), and the logits' margin there follows. w is small: the gradients of a saturated loss
differ from place to place, and variance tuning adds that difference to its own.
"""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ensadv_fast as ea
from ensadv_fast.compat import cleverhans

SHAPES = [(8,), (4, 6), (5, 7, 7)]
DTYPES = [torch.float32, torch.float64]
EPS, FREE = 0.1, {"lo": -torch.inf, "hi": torch.inf}


class Linear(nn.Module):
    def __init__(self, shape, dtype=torch.float32, seed=0):
        super().__init__()
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        w /= w.numel()
        self.w = nn.Parameter(w.to(dtype))
        self.b = nn.Parameter(torch.tensor(0.3, dtype=dtype))

    def margin(self, x):
        """The margin z [N] of label 1 over label 0."""
        return x.flatten(1) @ self.w.flatten() + self.b

    def forward(self, x):
        z = self.margin(x)
        return torch.stack([-z / 2, z / 2], 1)


def setting(shape, dtype=torch.float32, n=9):
    g = torch.Generator().manual_seed(1)
    return Linear(shape, dtype), torch.rand(n, *shape, generator=g).to(dtype), torch.arange(n) % 2


def up(model, y, targeted=False):
    """Per sample, the direction in which the loss of y rises (falls where targeted): -s w, or s w."""
    s = (1 - 2 * y.to(model.w.dtype)) * (-1 if targeted else 1)
    return s.view(-1, *[1] * model.w.dim()) * model.w.detach()


def same(adv, wanted, tol=None):
    assert adv.dtype == wanted.dtype and adv.shape == wanted.shape
    assert (adv - wanted).abs().max() <= (tol or (1e-6 if adv.dtype == torch.float32 else 1e-12))


LINF = {
    "fgsm": ea.fgsm(EPS), "ifgsm": ea.ifgsm(EPS, 0.03, 4), "pgd": ea.pgd(EPS, 0.05, 5),
    "pgd restarts": ea.pgd(EPS, 0.05, 5, restarts=3), "pgd on the margin": ea.pgd(EPS, 0.05, 5, loss="cw", kappa=9.0),
    "mifgsm": ea.mifgsm(EPS), "nifgsm": ea.nifgsm(EPS), "sinifgsm": ea.sinifgsm(EPS, m=3),
    "vmifgsm": ea.vmifgsm(EPS, n=3), "vnifgsm": ea.vnifgsm(EPS, n=3), "a decay of a half": ea.mifgsm(EPS, decay=0.5),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LINF)
def test_the_best_point_of_the_ball_and_the_box(name, shape, dtype, targeted):
    model, x, y = setting(shape, dtype)
    attack = replace(LINF[name], targeted=targeted)
    direction = up(model, y, targeted)
    same(attack(model, x, y), (x + EPS * direction.sign()).clamp(0, 1))
    free = replace(attack, **FREE)(model, x, y)
    same(free, x + EPS * direction.sign(), 2e-6 if dtype == torch.float32 else None)
    s = (2 * y - 1) * (-1 if targeted else 1)
    best = model.margin(x) - s * EPS * model.w.abs().sum()
    assert torch.allclose(model.margin(free), best, atol=1e-6)
    assert torch.allclose(F.cross_entropy(model(free), y, reduction="none"), F.softplus(-(2 * y - 1) * best), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_size_per_sample(shape):
    model, x, y = setting(shape)
    eps = torch.linspace(0, 0.2, len(x))
    for attack in (ea.fgsm(), ea.pgd(steps=6), ea.mifgsm()):
        wanted = x + eps.view(-1, *[1] * len(shape)) * up(model, y).sign()
        same(attack(model, x, y, eps=eps), wanted.clamp(0, 1))


@pytest.mark.parametrize("alpha", [None, 0.02, 0.08, EPS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_start_then_one_step(shape, alpha):
    """R+FGSM goes alpha either way, then eps - alpha up: eps or eps - 2 alpha in all, each for half of the pixels."""
    model, x, y = setting(shape, n=99)
    size = EPS / 2 if alpha is None else alpha
    adv = ea.rand_fgsm(EPS, alpha, **FREE)(model, x, y)
    gone = (adv - x) * up(model, y).sign()
    far, near = (gone - EPS).abs() < 1e-5, (gone - (EPS - 2 * size)).abs() < 1e-5
    assert (far ^ near).all()
    assert abs(far.double().mean() - 0.5) < 4 * 0.5 / gone.numel()**0.5
    boxed = ea.rand_fgsm(EPS, alpha)(model, x, y)
    assert boxed.min() >= 0 and boxed.max() <= 1 and (boxed - x).abs().max() <= EPS + 2**-24


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_best_point_of_the_l2_ball(shape, dtype, targeted):
    model, x, y = setting(shape, dtype)
    direction = up(model, y, targeted)
    unit = direction / direction.flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
    tol = 1e-6 if dtype == torch.float32 else 1e-9
    same(ea.fast_grad_l2(0.7, targeted=targeted, **FREE)(model, x, y), x + 0.7 * unit, tol)
    same(ea.pgd_l2(0.7, 0.2, 4, False, targeted=targeted, **FREE)(model, x, y), x + 0.7 * unit, tol)
    # From within the ball each step halves the angle, at least.
    adv = ea.pgd_l2(0.7, 0.7, 40, restarts=2, targeted=targeted, **FREE)(model, x, y)
    same(adv, x + 0.7 * unit, tol)
    s = (2 * y - 1) * (-1 if targeted else 1)
    assert torch.allclose(model.margin(adv), model.margin(x) - s * 0.7 * model.w.norm(), atol=1e-6)
    largest = direction.abs().flatten(1).amax(1).view(-1, *[1] * len(shape))
    same(ea.fast_grad_linf(EPS, targeted=targeted, **FREE)(model, x, y), x + EPS * direction / largest, tol)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cleverhans_interface(shape, precision):
    model, x, y = setting(shape)
    model.eval()
    direction = up(model, y)
    unit = direction / direction.flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
    for norm, wanted in ((np.inf, x + EPS * direction.sign()), (2, x + EPS * unit)):
        same(cleverhans.fast_gradient_method(model, x, EPS, norm, y=y, precision=precision), wanted, 2e-3
             if precision == "fast" and norm == 2 else None)
        adv = cleverhans.projected_gradient_descent(model, x, EPS, EPS, 40, norm, y=y, precision=precision)
        same(adv, wanted, 2e-3 if precision == "fast" and norm == 2 else 2e-6)
