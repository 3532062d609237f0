"""The published update rules of transfer attacks in plain PyTorch, by autograd through every transform; their random
draws are arguments. Nothing here uses ensadv_fast."""
import torch
import torch.nn.functional as F


def resized_and_padded(x, size, top, left, large):
    """Input diversity with these draws: resize to size, pad with zeros to large, and back where that is larger."""
    side = x.shape[-1]
    small = F.interpolate(x, size=[size, size], mode="bilinear", align_corners=False)
    padded = F.pad(small, [left, large - size - left, top, large - size - top])
    return padded if large <= side else F.interpolate(padded, size=[side, side], mode="bilinear", align_corners=False)


def kernel(name, size, nsig=3.0):
    """[size, size], float64, sum 1."""
    t = torch.linspace(-1, 1, size, dtype=torch.float64)
    line = {"gaussian": torch.exp(-0.5 * (nsig * t) ** 2), "uniform": torch.ones_like(t),
            "linear": 1 - t.abs() * (size - 1) / (size + 1)}[name]
    plane = line[:, None] * line
    return plane / plane.sum()


def convolved(grad, weights):
    channels = grad.shape[1]
    return F.conv2d(grad, weights.to(grad.dtype).expand(channels, 1, *weights.shape), padding="same", groups=channels)


def transfer(net, x, y, eps, step, steps, *, decay=1.0, lookahead=False, scales=1, diverse=None, weights=None,
             noise=None, targeted=False):
    """MI-FGSM and what was made of it.

    lookahead: NI. scales: SI's m. diverse(image, number of the forward pass): DI. weights: TI's kernel. noise: VMI's,
    [steps][n] tensors like x. decay None: no momentum, the gradient's own sign.
    """
    passes = 0

    def gradient(point):
        nonlocal passes
        leaf = point.detach().requires_grad_()
        total = 0.0
        for i in range(scales):
            image = leaf / 2**i
            image = image if diverse is None else diverse(image, passes)
            passes += 1
            total = total + F.cross_entropy(net(image), y, reduction="sum")
        (grad,) = torch.autograd.grad(total / scales, leaf)
        return -grad if targeted else grad

    adv, momentum, variance = x, torch.zeros_like(x), torch.zeros_like(x)
    for t in range(steps):
        grad = gradient(adv + step * decay * momentum if lookahead else adv)
        followed = grad + variance
        if noise is not None and t < steps - 1:
            variance = sum(gradient(adv + r) for r in noise[t]) / len(noise[t]) - grad
        if weights is not None:
            followed = convolved(followed, weights)
        if decay is not None:
            momentum = decay * momentum + followed / followed.abs().mean((1, 2, 3), keepdim=True)
            followed = momentum
        adv = x + (adv + step * followed.sign() - x).clamp(-eps, eps)
        adv = adv.clamp(0, 1)
    return adv
