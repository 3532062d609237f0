"""Networks that only these tables need, by names that `ensadv_fast.models.build` takes: papers.networks:NAME."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ensadv_fast.models import mnist_b
from ensadv_fast.models.cifar import convnet, convnet24, convnet48, convnet64, resnet8, resnet14, resnet18, resnet34

__all__ = ["convnet", "convnet24", "convnet48", "convnet64", "resnet8", "resnet14", "resnet18", "resnet34"]


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
