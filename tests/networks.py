"""Small networks and plain-PyTorch attacks that tests compare against. Nothing here uses ensadv_fast."""
import torch
import torch.nn.functional as F
from torch import nn


def small_net(seed: int = 0, channels: int = 3, size: int = 8, classes: int = 10) -> nn.Module:
    """Convolutions, batch normalisation with moved statistics, dropout; in train mode, some parts frozen."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * size * size, classes),
    )
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(32, channels, size, size))
    return net


def batch(n: int = 16, channels: int = 3, size: int = 8, classes: int = 10, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=g), torch.randint(0, classes, (n,), generator=g)


def trained():
    """A network that knows ten patterns, and images of them."""
    torch.manual_seed(0)
    patterns = torch.rand(10, 3, 28, 28)
    y = torch.arange(60) % 10
    x = (patterns[y] * 0.6 + 0.4 * torch.rand(60, 3, 28, 28))
    net = small_net(size=28)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    for p in net.parameters():
        p.grad = None
    return net.eval(), x, y


def gradient(net: nn.Module, x, y):
    """The whole of plain PyTorch's input gradient, summed cross-entropy, in eval mode."""
    training = [m.training for m in net.modules()]
    net.eval()
    x = x.detach().clone().requires_grad_()
    logits = net(x)
    grad, = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    for m, flag in zip(net.modules(), training):
        m.training = flag
    return grad, logits.detach()


def iterate(net, x0, start, y, eps, step, steps, sign=1.0):
    """The textbook loop: sign step, projection on the ball around x0, clamp."""
    x = start
    for _ in range(steps):
        grad, _ = gradient(net, x, y)
        x = x + sign * step * grad.sign()
        x = torch.min(torch.max(x, x0 - eps), x0 + eps).clamp(0, 1)
    return x


class Wide(nn.Module):
    """Computes in its weights' dtype, whatever the images' is."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight.dtype))


def double_net(norm: bool = False) -> nn.Module:
    """A float64 network for 28 x 28 digits whose samples do not touch each other, but by batch normalisation."""
    norms = [nn.BatchNorm2d(4)] if norm else []
    return Wide(nn.Conv2d(1, 4, 5, stride=3), *norms, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 8 * 8, 10)).double()


def double_norm_net() -> nn.Module:
    return double_net(norm=True)
