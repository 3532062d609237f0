"""What an attack runs besides the model, counted at the dispatcher: one image-sized kernel a step, no host sync."""
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ensadv_fast as ea
from ensadv_fast.ops import checks

EPS = 8 / 255
SYNCS = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select"}


class Linear(nn.Module):
    """A model whose passes over the images are two matrix products, one forward and one backward."""

    def __init__(self, inner):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, 10))

    def forward(self, x):
        return x.flatten(1) @ self.weight


class Trace(TorchDispatchMode):
    """Names of the kernels that read or write an image-sized tensor (views are none), and of host syncs."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.kernels, self.syncs = numel, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        touched = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if not view and name not in ("empty_like", "empty") and any(t.numel() == self.numel for t in touched):
            self.kernels.append(name)
        if name in SYNCS:
            self.syncs.append(name)
        return result


@pytest.fixture
def trace(monkeypatch):
    """Trace one attack as if its tensors lay on a GPU, where no value may be looked at."""
    monkeypatch.setattr(checks, "is_readable", lambda t: False)

    def run(attack, y=True, source=lambda m: m, **kw):
        x = torch.rand(4, 3, 32, 32)
        model = Linear(3 * 32 * 32)
        source, key = source(model), ea.fresh_key(seed=0)
        labels = torch.randint(0, 10, (4,)) if y else None
        with Trace(x.numel()) as seen:
            attack(source, x, labels, key=key, **kw)
        return seen

    return run


STEP = ["mm", "mm", "sign_step"]


@pytest.mark.parametrize("attack, kernels", [
    (ea.fgsm(EPS), STEP), (ea.step_ll(EPS), STEP), (ea.fgsm(EPS, rule="predicted"), STEP), (ea.step_rnd(EPS), STEP),
    (ea.rand_fgsm(EPS), ["random_step", *STEP]),
    (ea.rand_step_ll(EPS), ["mm", "random_step", *STEP]),  # the label comes from the clean image
    (ea.ifgsm(EPS, steps=4), STEP * 4), (ea.iter_ll(EPS, steps=4), STEP * 4),
    (ea.pgd(EPS, steps=10), ["random_step", *STEP * 10]),
], ids=lambda v: v.name if isinstance(v, ea.Attack) else "")
def test_one_kernel_a_step_and_no_sync(trace, attack, kernels):
    seen = trace(attack)
    assert seen.kernels == kernels
    assert seen.syncs == []


def test_sizes_per_sample_cost_nothing_more(trace):
    assert trace(ea.fgsm(EPS), eps=torch.rand(4)).kernels == STEP
    assert trace(ea.pgd(EPS, steps=2), eps=torch.rand(4)).kernels == ["random_step", *STEP * 2]


def test_no_label_needs_no_second_forward_pass(trace):
    assert trace(ea.fgsm(EPS), y=False).kernels == STEP
    assert trace(ea.step_ll(EPS), y=False).kernels == STEP


def test_a_frozen_float32_source_adds_nothing(trace):
    def proved(model):
        source = ea.Source(model, dtype=torch.float32, channels_last=False)
        source.logits(torch.rand(4, 3, 32, 32))  # the first pass compares the folded copy with the model
        return source

    exact = trace(ea.fgsm(EPS), source=proved)
    assert exact.kernels == STEP and exact.syncs == []


def test_the_trace_sees_plain_kernels_and_syncs():
    """The trace itself: it sees plain PyTorch's kernels and syncs."""
    x = torch.rand(2, 8)
    with Trace(16) as seen:
        torch.clamp(x + 0.1 * x.sign(), 0, 1).view(4, 4).max().item()
    assert seen.kernels == ["sign", "mul", "add", "clamp", "max"] and seen.syncs == ["_local_scalar_dense"]
