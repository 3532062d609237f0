"""ema.py: averaged weights, and how they come back from a checkpoint."""
import copy

import pytest
import torch
from torch import nn

from ensadv_fast import models
from ensadv_fast.train import checkpoints
from ensadv_fast.train.ema import EMA


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))


def moved(model):
    """As if trained: weights and statistics change in place."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model.train()(torch.rand(5, 1, 8, 8))


def averaged(decay):
    """A model, and the average that has followed it for three steps."""
    model = net()
    ema = EMA(model, decay)
    for _ in range(3):
        moved(model)
        ema.update()
    return model, ema


def test_the_average_is_the_definition(device):
    model = net().double().to(device)
    ema = EMA(model, 0.9)
    wanted = {k: v.detach().clone() for k, v in model.named_parameters()}
    for t in range(30):
        model.to(torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        d = min(0.9, (1 + t) / (10 + t))
        wanted = {k: d * wanted[k] + (1 - d) * v.detach() for k, v in model.named_parameters()}
    assert ema.updates == 30
    for k, v in wanted.items():
        torch.testing.assert_close(ema.average[k], v, rtol=1e-12, atol=1e-13)


def test_buffers_are_copied():
    model, ema = averaged(0.99)
    for k, v in model.named_buffers():
        assert torch.equal(ema.average[k], v) and ema.average[k].data_ptr() != v.data_ptr()
    assert ema.average["1.num_batches_tracked"] == 3


def test_in_place_for_evaluation_and_back():
    model, ema = averaged(0.5)
    own, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="while evaluating"), ema.in_place():
        for k, v in model.state_dict().items():
            assert torch.equal(v, ema.average[k])
        raise RuntimeError("while evaluating")
    for k, v in model.state_dict().items():
        assert torch.equal(v, own[k])
    assert places == [p.data_ptr() for p in model.parameters()]  # graphs and optimizers hold them


def test_it_goes_on_from_its_state():
    model = net()
    ema = EMA(model, 0.9)
    for step in range(6):
        moved(model)
        ema.update()
        if step == 2:
            saved = copy.deepcopy(ema.state_dict())
            other = EMA(model, 0.9)
            other.load_state_dict(saved)
        elif step > 2:
            other.update()
    assert other.updates == 6 and all(torch.equal(v, other.average[k]) for k, v in ema.average.items())
    with pytest.raises(ValueError, match="another model"):
        EMA(nn.Linear(2, 2), 0.9).load_state_dict(saved)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match="EMA: decay must be .*, got"):
        EMA(net(), decay)


def test_checkpoints_give_the_average_unless_the_others_are_asked_for(tmp_path):
    model = models.build("mnist:D")
    ema = EMA(model, 0.5)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    for p in model.parameters():
        p.data.mul_(2)
    ema.update()
    path = tmp_path / "d.pt"
    checkpoints.save(path, {"model": model.state_dict(), "ema": ema.state_dict(), "step": 1})
    k = "1.weight"
    assert torch.equal(models.build(f"mnist:D={path}").state_dict()[k], ema.average[k])
    assert torch.equal(models.build(f"mnist:D={path}#model").state_dict()[k], 2 * own[k])
    checkpoints.save(path, {"model": own, "ema": None})
    assert torch.equal(models.build(f"mnist:D={path}").state_dict()[k], own[k])
    with pytest.raises(FileNotFoundError, match="none.pt"):
        models.build(f"mnist:D={tmp_path / 'none.pt'}#model")
