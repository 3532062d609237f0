"""training_loss.py: crafting on the smoothed loss of all logits."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ensadv_fast as ea
from ensadv_fast.ops.losses import Objective
from ensadv_fast.sources.source import Source
from ensadv_fast.sources.training_loss import TrainingLossSource


class Two(nn.Module):
    """A convolutional network with an auxiliary head, in train and in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head, self.aux = (nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 7)) for _ in range(2))

    def forward(self, x):
        x = self.trunk(x)
        return self.head(x), self.aux(x)


def batch(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.rand(9, 3, 8, 8, dtype=dtype), torch.arange(9) % 7


def plain(model, x, y, smoothing, aux):
    x = x.clone().requires_grad_()
    logits, other = model(x)
    losses = (F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
              + aux * F.cross_entropy(other, y, reduction="none", label_smoothing=smoothing))
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


@pytest.mark.parametrize("smoothing, aux", [(0.1, 0.4), (0.0, 0.4), (0.1, 0.0)])
@pytest.mark.parametrize("options", [{"dtype": torch.float64, "fold": False}, {"dtype": torch.float64},
                                     {"live": True, "fold": False, "channels_last": False, "dtype": None}])
def test_loss_and_gradient_are_autograds(smoothing, aux, options):
    x, y = batch()
    model = Two().double().eval()
    source = TrainingLossSource(model, smoothing=smoothing, aux=aux, **options)
    wanted, grad = plain(model, x, y, smoothing, aux)
    got = source.input_grad(x, y)
    torch.testing.assert_close(got.loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.grad / got.scale.view(-1, 1, 1, 1), grad, rtol=1e-9, atol=1e-13)
    assert torch.equal(got.labels, y) and (torch.frexp(got.scale).mantissa == 0.5).all()
    least = source.input_grad(x, rule="least_likely")
    assert torch.equal(least.labels, model(x)[0].argmin(1))
    with source.session():
        torch.testing.assert_close(source.losses_unchecked(x, y, Objective())[0], wanted, rtol=1e-12, atol=1e-12)


def test_without_either_it_is_the_source_itself():
    x, y = batch(torch.float32)
    model = Two().eval()
    one, two = TrainingLossSource(model, smoothing=0.0, aux=0.0), Source(model)
    torch.testing.assert_close(one.input_grad(x, y).loss, two.input_grad(x, y).loss)
    for loss in ("cw", "dlr"):  # other losses are untouched
        first, second = (TrainingLossSource(model), two)
        assert torch.equal(first.input_grad(x, y, loss=loss).grad, second.input_grad(x, y, loss=loss).grad)


def test_step_ll_descends_the_training_loss():
    x, _ = batch(torch.float64)
    model = Two().double().eval()
    source = TrainingLossSource(model, dtype=torch.float64, fold=False, channels_last=False)
    _, grad = plain(model, x, model(x)[0].argmin(1), 0.1, 0.4)
    x_adv = ea.step_ll(eps=0.03)(source, x)
    wanted = (x - 0.03 * grad.sign()).clamp(0, 1)
    assert (x_adv - wanted).abs().max() < 1e-7


def test_a_training_adversary_uses_it():
    x, y = batch(torch.float32)
    model = Two().train()
    live = TrainingLossSource(model, live=True, fold=False, channels_last=False, dtype=None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = ea.EnsembleAdversary(model, attack=ea.step_ll(eps=0.03), live=live, key=ea.fresh_key("cpu", 0))(x, y)
    assert made.is_adv.sum() == 4 and (made.x[:4] != x[:4]).any() and torch.equal(made.x[4:], x[4:])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [{"smoothing": 1.5}, {"smoothing": -0.1}, {"aux": -1.0}, {"aux": float("nan")}])
def test_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainingLossSource(Two(), **bad)
