"""The MNIST networks of the ensemble-adversarial-training paper.

Two versions of these networks exist (Tramer et al., "Ensemble Adversarial Training", ICLR 2018). `mnist_a` to
`mnist_d` are those of the authors' released code (github.com/ftramer/ensemble-adv-training, mnist.py); `mnist_c_tanh`
is network C as the paper's appendix describes it, with Tanh and max-pooling. All end in logits. Weights start as
PyTorch's layers do, except that D's hidden layers are he_normal, as in the released code.
"""
from __future__ import annotations

import torch
from torch import nn

Shape = tuple[int, int, int]
MNIST_SHAPE: Shape = (1, 28, 28)


def _count_features(trunk: nn.Sequential, in_shape: Shape) -> int:
    """Elements per sample after `trunk`, measured in eval mode, so that dropout draws no random number."""
    with torch.no_grad():
        n = trunk.eval()(torch.zeros(1, *in_shape)).shape[1]
    trunk.train()
    return n


def _conv_net(trunk: list[nn.Module], head: list[int], dropout: float, in_shape: Shape) -> nn.Sequential:
    """`trunk`, flattened, then linear layers of the widths `head`; ReLU (and dropout) between them."""
    layers = nn.Sequential(*trunk, nn.Flatten())
    widths = [_count_features(layers, in_shape), *head]
    for i in range(len(head)):
        if i:
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(widths[i], widths[i + 1]))
    return layers


def mnist_a(num_classes: int = 10, in_shape: Shape = MNIST_SHAPE) -> nn.Sequential:
    """A: two 5x5 convolutions of 64, dropout 0.25, FC128, dropout 0.5. [N, *in_shape] -> logits [N, num_classes]."""
    c = in_shape[0]
    return _conv_net([nn.Conv2d(c, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.Dropout(0.25)],
                     [128, num_classes], 0.5, in_shape)


def mnist_b(num_classes: int = 10, in_shape: Shape = MNIST_SHAPE) -> nn.Sequential:
    """B: dropout 0.2 on the input, convolutions 64 8x8/2 'same', 128 6x6/2, 128 5x5, dropout 0.5."""
    c = in_shape[0]
    # 'same' at stride 2, kernel 8 pads 6 in total for any even size: 3 on each side.
    return _conv_net([nn.Dropout(0.2), nn.Conv2d(c, 64, 8, stride=2, padding=3), nn.ReLU(),
                      nn.Conv2d(64, 128, 6, stride=2), nn.ReLU(), nn.Conv2d(128, 128, 5), nn.ReLU(),
                      nn.Dropout(0.5)], [num_classes], 0.0, in_shape)


def mnist_c(num_classes: int = 10, in_shape: Shape = MNIST_SHAPE) -> nn.Sequential:
    """C of the released code: convolutions 128 3x3 and 64 3x3 with ReLU, dropout 0.25, FC128, dropout 0.5."""
    c = in_shape[0]
    return _conv_net([nn.Conv2d(c, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 3), nn.ReLU(), nn.Dropout(0.25)],
                     [128, num_classes], 0.5, in_shape)


def mnist_c_tanh(num_classes: int = 10, in_shape: Shape = MNIST_SHAPE) -> nn.Sequential:
    """C of the paper: convolutions 128 3x3 and 64 3x3, each with Tanh and a 2x2 max-pool, then FC128."""
    c = in_shape[0]
    return _conv_net([nn.Conv2d(c, 128, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(128, 64, 3), nn.Tanh(),
                      nn.MaxPool2d(2)], [128, num_classes], 0.0, in_shape)


def mnist_d(num_classes: int = 10, in_shape: Shape = MNIST_SHAPE) -> nn.Sequential:
    """D: four times [FC300 (he_normal), ReLU, dropout 0.5], then the logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = in_shape[0] * in_shape[1] * in_shape[2]
    for _ in range(4):
        hidden = nn.Linear(width, 300)
        nn.init.kaiming_normal_(hidden.weight)
        nn.init.zeros_(hidden.bias)
        layers += [hidden, nn.ReLU(), nn.Dropout(0.5)]
        width = 300
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


MNIST = {"A": mnist_a, "B": mnist_b, "C": mnist_c, "C_tanh": mnist_c_tanh, "D": mnist_d}
