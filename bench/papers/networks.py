"""Networks that only these tables need, by names that `ensadv_fast.models.build` takes: papers.networks:NAME."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ensadv_fast.models import mnist_b


def d(width: float = 1.0, activation: Callable[[], nn.Module] = nn.ReLU, dropout: float = 0.5) -> nn.Sequential:
    """Network D with `width` times 300 units in each hidden layer (`ensadv_fast.models.mnist_d` for the defaults)."""
    layers: list[nn.Module] = [nn.Flatten()]
    inner, outer = 784, round(300 * width)
    for _ in range(4):
        hidden = nn.Linear(inner, outer)
        nn.init.kaiming_normal_(hidden.weight)
        nn.init.zeros_(hidden.bias)
        layers += [hidden, activation(), *([nn.Dropout(dropout)] if dropout else [])]
        inner = outer
    return nn.Sequential(*layers, nn.Linear(inner, 10))


D_half, D_071, D_141, D_double = (partial(d, width=w) for w in (0.5, 2**-0.5, 2**0.5, 2.0))
D_tanh, D_relu6 = (partial(d, activation=a) for a in (nn.Tanh, nn.ReLU6))
D_no_dropout = partial(d, dropout=0.0)


def B_star() -> nn.Sequential:
    """B without the dropout on its input: the paper's B*."""
    return nn.Sequential(*list(mnist_b())[1:])


class Binarise(nn.Module):
    """Every pixel to 0 or 1, at 0.5; gradients pass as if it were not there (else an attack would see none)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + ((x >= 0.5).to(x.dtype) - x).detach()


def D_binarised() -> nn.Sequential:
    return nn.Sequential(Binarise(), *d())


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016), 1x1 where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential() if (inner, stride) == (outer, 1) else nn.Sequential(
            nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet(widths: tuple[int, ...], blocks: int) -> nn.Sequential:
    """For 32x32 images: a 3x3 stem, then `blocks` blocks of each width, halving the image from the second width on."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inner = widths[0]
    for i, outer in enumerate(widths):
        for j in range(blocks):
            layers.append(_Block(inner, outer, 2 if i and not j else 1))
            inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 10))


resnet8 = partial(resnet, (16, 32, 64), 1)
resnet14 = partial(resnet, (16, 32, 64), 2)
resnet18 = partial(resnet, (64, 128, 256, 512), 2)
resnet34 = partial(resnet, (64, 128, 256, 512), 3)


def convnet(width: int = 16) -> nn.Sequential:
    """A plain network of six 3x3 convolutions with BatchNorm, no shortcuts: another kind of source."""
    layers: list[nn.Module] = []
    inner = 3
    for outer in (width, 2 * width, 4 * width):
        for stride in (1, 2):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
            inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 10))


convnet24, convnet48, convnet64 = (partial(convnet, width) for width in (24, 48, 64))
