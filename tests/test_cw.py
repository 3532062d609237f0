"""C&W-L-inf against the released MNIST code's loop, one sample at a time in plain PyTorch."""
import math

import pytest
import torch
from networks import batch, small_net

import ensadv_fast as ea


def one_by_one(net, x, y, eps, kappa=0.0, rate=5e-3, iterations=1000, const=1e-3, largest=20.0, factor=10.0, abort=True,
               targeted=False):
    """li_attack on one sample x [1, C, H, W]: by autograd through the clip, Adam as TensorFlow has it. Returns the
    result, clipped to the ball, and how many forward passes it took."""
    change, first, second = (torch.zeros_like(x) for _ in range(3))
    result, t = x, 0
    while const < largest:
        for _ in range(iterations):
            leaf = change.clone().requires_grad_()
            image = (x + leaf).clamp(0, 1)
            z = net(image)[0]
            own, other = z[y], torch.cat([z[:y], z[y + 1:]]).max()
            hinge = ((other - own if targeted else own - other) + kappa).clamp(min=0)
            slack = ((image - x).abs() - eps).clamp(min=0).sum()
            total = const * hinge + slack
            (grad,) = torch.autograd.grad(total, leaf)
            t += 1
            if abort and total < 1e-4 * const and (z.argmax() == y) == targeted:
                return x + (image.detach() - x).clamp(-eps, eps), t
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad**2
            change = change - rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * first / (second.sqrt() + 1e-8)
        if slack >= 0.1 * eps:
            return x + (result - x).clamp(-eps, eps), t
        result, const = image.detach(), const * factor
    return x + (result - x).clamp(-eps, eps), t


def setting(n=8):
    net = small_net().double().eval()
    x, _ = batch(n=n)
    return net, x.double(), net(x.double()).argmax(1)


CASES = {
    "abort": dict(iterations=25, rate=5e-3), "kappa": dict(iterations=10, kappa=100.0, rate=5e-3),
    "slack": dict(iterations=12, kappa=100.0, rate=0.02, const=1e-2), "no-abort": dict(iterations=8, abort=False),
    "late": dict(iterations=6, rate=3e-3, const=0.1, factor=3.0, largest=5.0),
}


@pytest.mark.parametrize("check_every", [1, 4, 50])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_released_loop(name, targeted, check_every):
    net, x, y = setting()
    case = {"kappa": 0.0, "rate": 5e-3, "const": 1e-3, "factor": 10.0, "largest": 20.0, "abort": True, **CASES[name]}
    labels = (y + 1) % 10 if targeted else y
    eps = torch.linspace(0.02, 0.06, len(x), dtype=torch.float64)
    attack = ea.cw_linf(targeted=targeted, kappa=case["kappa"], learning_rate=case["rate"], abort_early=case["abort"],
                        max_iterations=case["iterations"], initial_const=case["const"], const_factor=case["factor"],
                        largest_const=case["largest"], check_every=check_every)
    info = attack(net, x, labels, eps=eps, return_info=True)
    wanted = [one_by_one(net, x[i:i + 1], int(labels[i]), float(eps[i]), targeted=targeted, **case)
              for i in range(len(x))]
    assert (info.x_adv - torch.cat([w for w, _ in wanted])).abs().max() <= 1e-6
    passes = [t for _, t in wanted]
    if name in ("abort", "late") and not targeted:
        assert len(set(passes)) > 4 and info.success.sum() >= 6  # samples stop each in its own time
        assert torch.equal(net(info.x_adv).argmax(1) != y, info.success)
    if name == "slack":
        assert min(passes) < 12 * 4  # some ran out of the ball and got what they had before
    if name == "kappa" and not targeted:
        assert {50} < set(passes) <= {10, 20, 30, 40, 50}  # nobody aborts; some leave the ball


def test_done_samples_leave_the_batch_and_the_search_ends():
    """As many forward passes as the slowest sample asks for, up to the next check, on ever fewer samples."""
    net, x, y = setting(16)
    sizes = []
    net.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    ea.cw_linf(0.05, max_iterations=100, check_every=10)(net, x, y)
    alone = [one_by_one(net, x[i:i + 1], int(y[i]), 0.05, iterations=100)[1] for i in range(16)]
    ours = sizes[:sizes.index(1) if 1 in sizes[:-sum(alone)] else len(sizes) - sum(alone)]
    assert len(ours) <= -(-max(alone) // 10) * 10 and ours[0] == 16
    assert ours == sorted(ours, reverse=True) and ours[-1] < 16


def test_a_sample_that_is_there_already_stays():
    net, x, y = setting()
    other = (y + 3) % 10
    info = ea.cw_linf(0.05, max_iterations=20)(net, x, other, return_info=True)
    assert torch.equal(info.x_adv, x) and info.success.all() and (info.loss == 0).all()
    assert torch.equal(ea.cw_linf(0.0, max_iterations=5)(net, x, y), x)


def test_labels_by_rule_are_the_clean_images():
    net, x, y = setting()
    info = ea.cw_linf(0.1, max_iterations=15, rule="least_likely", targeted=True)(net, x, return_info=True)
    assert torch.equal(info.labels, net(x).argmin(1))
    before, after = (net(images).gather(1, info.labels[:, None]) - net(images).amax(1, keepdim=True)
                     for images in (x, info.x_adv))
    assert (after >= before).all() and (after > before).sum() > 4
    assert torch.equal(ea.cw_linf(0.05, max_iterations=9)(net, x), ea.cw_linf(0.05, max_iterations=9)(net, x, y))


def test_confidence_goes_past_the_border():
    net, x, y = setting(32)

    def margin(x):
        z = net(x).detach()
        return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)

    near, far = (margin(ea.cw_linf(0.05, kappa=kappa, max_iterations=60)(net, x, y)) for kappa in (0.0, 0.02))
    assert (near < 0).double().mean() > 0.9 and (far < -0.019).double().mean() > 0.5
    assert far.mean() < near.mean() < margin(x).mean()
