"""Sources: input gradients equal to plain PyTorch's, the modes of crafting, and what a copy shares (nothing)."""
import copy
import os

import pytest
import torch
import torch.nn.functional as F
from networks import batch, gradient, small_net
from torch import nn

import ensadv_fast as ea
from ensadv_fast.ops.losses import power_of_two_scale
from ensadv_fast.sources.precision import fast_dtype

EXACT = dict(dtype=torch.float32, fold=False, channels_last=False)


def test_exact_mode_gives_plain_pytorchs_values():
    net, (x, y) = small_net(), batch()
    grad, logits = gradient(net, x, y)
    source = ea.Source(net, **EXACT)
    got = source.input_grad(x, y, rescale=False)
    assert torch.equal(got.grad, grad) and torch.equal(got.logits, logits) and torch.equal(got.labels, y)
    assert torch.equal(got.loss, F.cross_entropy(logits, y, reduction="none"))
    assert (got.scale == 1).all()
    assert torch.equal(source.logits(x), logits)


def test_rescaling_is_exact_and_by_powers_of_two():
    net, (x, y) = small_net(), batch()
    grad, logits = gradient(net, x, y)
    got = ea.Source(net, **EXACT).input_grad(x, y)
    assert torch.equal(got.grad / got.scale.view(-1, 1, 1, 1), grad)
    assert (torch.frexp(got.scale).mantissa == 0.5).all()


def test_scale_lifts_saturated_gradients_out_of_underflow():
    """float16 turns gradients of confident predictions into zeros; the scaled start does not."""
    logits = torch.tensor([[20.0, 0.0, 1.0], [60.0, 0.0, -5.0], [0.1, 0.2, 0.3], [200.0, 0.0, 0.0]])
    y = torch.tensor([0, 0, 0, 0])
    scale = power_of_two_scale(logits, y, "ce")
    p = logits.double().softmax(1)
    largest = p[:, 1:].amax(1) * scale
    assert ((largest[:3] >= 1) & (largest[:3] < 2)).all()
    assert scale[3] == 1  # nothing is left to lift
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([25.0, 0.0, 0.0]))
    x, y = torch.rand(8, 3, 2, 2), torch.zeros(8, dtype=torch.int64)
    source = ea.Source(net, dtype=torch.float16)
    # In float32, p - 1 is 0 for so sure a label, and plain PyTorch's gradient lacks that half: the truth is float64's.
    exact = ea.Source(net, **{**EXACT, "dtype": torch.float64}).input_grad(x.double(), y, rescale=False).grad
    assert (source.input_grad(x, y, rescale=False).grad == 0).all()
    lifted = source.input_grad(x, y).grad
    assert (lifted.sign() == exact.sign()).double().mean() > 0.95


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
def test_losses_against_their_formulas(loss, targeted):
    x = torch.randn(6, 5, 1, 1, dtype=torch.float64)
    y = torch.arange(6) % 5
    got = ea.Source(nn.Flatten(), live=True, dtype=None).input_grad(
        x, y, loss=loss, kappa=0.5, targeted=targeted, rescale=False)
    z = x.flatten(1).clone().requires_grad_()
    values = []
    for row, label in zip(z, y):
        others = torch.stack([v for i, v in enumerate(row) if i != label])
        top = row.sort(descending=True).values
        behind = others.max() - row[label]
        hinge = torch.relu(behind + 0.5) if targeted else -torch.relu(0.5 - behind)
        values.append({"ce": torch.logsumexp(row, 0) - row[label], "cw": hinge,
                       "dlr": -(row[label] - others.max()) / (top[0] - top[2])}[loss])
    values = torch.stack(values)
    wanted, = torch.autograd.grad(values.sum(), z)
    assert torch.allclose(got.loss, values.detach(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(got.grad.flatten(1), wanted, rtol=1e-9, atol=1e-10)


def test_normalisation_and_its_gradient():
    net, (x, y) = small_net(), batch()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net((x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1))

    grad, logits = gradient(Normalised(), x, y)
    got = ea.Source(net, mean=mean, std=std, **EXACT).input_grad(x, y, rescale=False)
    assert torch.equal(got.grad, grad) and torch.equal(got.logits, logits)


def test_the_copy_shares_nothing_and_follows_nothing():
    net, (x, _) = small_net().train(), batch()
    net(x).sum().backward()
    source = ea.Source(net, **EXACT)
    before = source.logits(x)
    own = {t.data_ptr() for t in [*net.parameters(), *net.buffers()]}
    assert own.isdisjoint(t.data_ptr() for t in [*source.module.parameters(), *source.module.buffers()])
    assert not any(p.requires_grad or p.grad is not None for p in source.module.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    assert torch.equal(source.logits(x), before)
    assert net.training and all(p.requires_grad for p in net.parameters())


def test_a_live_source_follows_its_model():
    net, (x, y) = small_net(), batch()
    source = ea.Source(net, live=True, dtype=None)
    first = source.input_grad(x, y).grad
    with torch.no_grad():
        net[0].weight.mul_(-1)
    assert not torch.equal(first, source.input_grad(x, y).grad)
    assert torch.equal(source.input_grad(x, y, rescale=False).grad, gradient(net, x, y)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_sources_keep_normalisation_statistics(dtype):
    net, (x, y) = small_net(), batch()
    source = ea.Source(net, dtype=dtype, fold=False)
    assert source.module[1].running_var.dtype == torch.float32 and source.module[0].weight.dtype == dtype
    got, (grad, logits) = source.input_grad(x, y), gradient(net, x, y)
    assert got.grad.dtype == torch.float32 and got.logits.dtype == dtype
    assert (got.logits.float() - logits).abs().max() < 0.05
    assert F.cosine_similarity(got.grad.flatten(1), grad.flatten(1)).mean() > 0.98


def test_auto_dtype_follows_the_hardware():
    source = ea.Source(small_net())
    assert source.dtype == fast_dtype(torch.device("cpu"))
    assert source.dtype in (torch.bfloat16, torch.float32)


def test_auto_dtype_follows_the_model(monkeypatch):
    """Depthwise convolutions are slow in bfloat16 on the CPU, unless dense ones outweigh them."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)

    def net(width):
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, width, 1), nn.AvgPool2d(6),
                             nn.Flatten(), nn.Linear(width, 10))

    assert ea.Source(net(16)).dtype == torch.float32
    assert ea.Source(net(2000)).dtype == ea.Source(small_net()).dtype == torch.bfloat16


def test_fast_default_is_as_strong_an_attack():
    """A network trained on a real task: the FGSM step found in the default dtype raises the loss as float32's does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4))
    centers = torch.rand(4, 1, 8, 8)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        y = torch.randint(0, 4, (64,))
        loss = F.cross_entropy(net((centers[y] + 0.2 * torch.randn(64, 1, 8, 8)).clamp(0, 1)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y = torch.randint(0, 4, (500,))
    x = (centers[y] + 0.2 * torch.randn(500, 1, 8, 8)).clamp(0, 1)

    def loss_of(x):
        return F.cross_entropy(net(x), y).item()

    clean = loss_of(x)
    exact = loss_of(ea.fgsm(0.1)(ea.Source(net, **EXACT), x, y)) - clean
    fast = loss_of(ea.fgsm(0.1)(ea.Source(net), x, y)) - clean
    assert exact > 0.1 and fast >= 0.97 * exact


# crafting="train": the released MNIST code


@pytest.mark.parametrize("live", [False, True])
def test_train_crafting_draws_dropout_from_the_key(live):
    net, (x, y) = small_net().eval(), batch()
    make = dict(live=True, dtype=None) if live else EXACT
    source = ea.Source(net, crafting="train", **make)
    generator = torch.get_rng_state()
    one = source.input_grad(x, y, key=ea.fresh_key(seed=1)).grad
    assert torch.equal(one, source.input_grad(x, y, key=ea.fresh_key(seed=1)).grad)
    assert not torch.equal(one, source.input_grad(x, y, key=ea.fresh_key(seed=2)).grad)
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("live", [False, True])
def test_train_crafting_uses_batch_statistics_without_moving_the_running_ones(live):
    net, (x, y) = small_net().eval(), batch()
    net[3].p = 0.0
    before = copy.deepcopy(net.state_dict())
    source = ea.Source(net, crafting="train", **(dict(live=True, dtype=None) if live else EXACT))
    got = source.input_grad(x, y, rescale=False)
    reference = copy.deepcopy(net).train()
    leaf = x.clone().requires_grad_()
    grad, = torch.autograd.grad(F.cross_entropy(reference(leaf), y, reduction="sum"), leaf)
    assert torch.equal(got.grad, grad)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    kept = source.module.state_dict()
    assert all(torch.equal(before[k], kept[k]) for k in before)


def test_train_crafting_takes_the_label_from_the_same_forward_pass():
    net, (x, _) = small_net().eval(), batch()
    source = ea.Source(net, crafting="train", **EXACT)
    got = source.input_grad(x, rule="predicted", key=ea.fresh_key(seed=1))
    assert torch.equal(got.labels, got.logits.argmax(1))
    assert not torch.equal(got.logits, net(x))  # dropout was active


def test_train_crafting_of_a_live_model_respects_what_the_caller_froze():
    net, (x, y) = small_net().train(), batch()
    net[1].eval()
    seen = []
    net[1].register_forward_hook(lambda m, *a: seen.append(m.training))
    ea.Source(net, live=True, dtype=None, crafting="train").input_grad(x, y)
    assert seen == [False]


# What models are like


def test_tuple_outputs():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            z = self.net(x)
            return z, z * 0

    (x, y), model = batch(), TwoHeads()
    assert torch.equal(ea.fgsm(0.1)(model, x, y), ea.fgsm(0.1)(model.net, x, y))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_script_modules_are_used_as_they_are():
    net, (x, y) = small_net().eval(), batch()
    scripted = torch.jit.script(net)
    source = ea.Source(scripted, **EXACT)
    assert torch.allclose(source.input_grad(x, y, rescale=False).grad, gradient(net, x, y)[0], atol=1e-7)
    assert ea.Source(scripted, dtype=torch.bfloat16).calibrate(x, y).loss_increase > 0.97
    assert all(p.requires_grad for p in scripted.parameters())


def test_the_callers_autocast_is_for_the_callers_model():
    net, (x, y) = small_net(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = ea.Source(net, live=True, dtype=None).input_grad(x, y)
        frozen = ea.Source(net, **EXACT).input_grad(x, y, rescale=False)
    assert live.logits.dtype == torch.bfloat16
    own = ea.Source(net, live=True, dtype=torch.bfloat16).input_grad(x, y)  # the same without the caller's
    assert own.logits.dtype == torch.bfloat16 and torch.equal(own.grad, live.grad)
    assert net[0].weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert torch.equal(frozen.grad, gradient(net, x, y)[0])


def test_channels_last():
    net, (x, y) = small_net(), batch()
    source = ea.Source(net, dtype=torch.float32, channels_last=True)
    assert source.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(source.input_grad(x, y, rescale=False).grad, gradient(net, x, y)[0], atol=1e-6)
    assert ea.Source(net).channels_last and not ea.Source(net, live=True).channels_last


class Viewed(nn.Module):
    """Written for contiguous tensors, as much code for MNIST is."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(288, 10)

    def forward(self, x):
        return self.fc(self.conv(x).view(-1, 288))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_need_contiguous_tensors(dtype):
    torch.manual_seed(0)
    net, (x, y) = Viewed(), batch()
    source = ea.Source(net, dtype=dtype)
    assert source.channels_last
    wanted = ea.Source(net, dtype=dtype, channels_last=False).input_grad(x, y).grad
    assert torch.equal(source.input_grad(x, y).grad, wanted) and not source.channels_last
    assert torch.equal(source.input_grad(x, y).grad, wanted)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        ea.Source(net, dtype=dtype, channels_last=True).input_grad(x, y)


def test_parallel_wrappers_are_taken_off(tmp_path):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = small_net()
        wrapped = nn.parallel.DistributedDataParallel(net)
        source = ea.Source(wrapped, live=True, dtype=None)
        assert source.module is net
        x, y = batch()
        assert torch.equal(ea.fgsm(0.1)(wrapped, x, y), ea.fgsm(0.1)(net, x, y))
    finally:
        torch.distributed.destroy_process_group()


BAD = [
    (lambda: ea.Source(lambda x: x), TypeError, "Source: model must be a torch.nn.Module, got function"),
    (lambda: ea.Source(small_net(), dtype="half"), ValueError, "dtype must be 'auto', None, float32.*got 'half'"),
    (lambda: ea.Source(small_net(), crafting="test"), ValueError, "crafting must be one of eval, train, got 'test'"),
    (lambda: ea.Source(small_net(), channels_last="yes"), ValueError, "channels_last must be 'auto', True or False"),
    (lambda: ea.Source(small_net(), live=True, dtype=torch.float32), ValueError, "a live model is used as it is"),
    (lambda: ea.Source(small_net(), std=(0.1, 0.0, 0.1)), ValueError, "std must be > 0"),
    (lambda: ea.Source(small_net()).input_grad(torch.rand(2, 3, 8, 8), torch.tensor([0, 12])), ValueError,
     r"y must lie in \[0, 10\)"),
    (lambda: ea.Source(small_net()).input_grad(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), TypeError,
     "x must be float32"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("live", [False, True])
def test_logits_are_differentiable_where_autograd_records_and_nowhere_else(live):
    net = small_net()
    source = ea.Source(net, live=True, dtype=None, fold=False) if live else ea.Source(net, dtype=torch.float32)
    x = batch()[0].requires_grad_()
    for model in (source, ea.Ensemble([source, source])):
        assert model.logits(x).requires_grad
        with torch.no_grad():
            assert not model.logits(x).requires_grad
        with torch.inference_mode():
            assert not model.logits(x).requires_grad
