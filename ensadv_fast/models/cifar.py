"""Small networks for 32x32 images: residual ones, and plain ones without shortcuts, another kind of source."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


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


def resnet(widths: tuple[int, ...], blocks: int, num_classes: int = 10, channels: int = 3) -> nn.Sequential:
    """A 3x3 stem, then `blocks` residual blocks of each width, the first of each later width halving the image.

    [N, channels, H, W] -> logits [N, num_classes].
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]),
                               nn.ReLU()]
    inner = widths[0]
    for i, outer in enumerate(widths):
        for j in range(blocks):
            layers.append(_Block(inner, outer, 2 if i and not j else 1))
            inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, num_classes))


def convnet(width: int = 16, num_classes: int = 10, channels: int = 3) -> nn.Sequential:
    """Six 3x3 convolutions with BatchNorm, every second one halving the image.

    [N, channels, H, W] -> logits [N, num_classes].
    """
    layers: list[nn.Module] = []
    inner = channels
    for outer in (width, 2 * width, 4 * width):
        for stride in (1, 2):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
            inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, num_classes))


resnet8 = partial(resnet, (16, 32, 64), 1)
resnet14 = partial(resnet, (16, 32, 64), 2)
resnet18 = partial(resnet, (64, 128, 256, 512), 2)
resnet34 = partial(resnet, (64, 128, 256, 512), 3)
convnet24, convnet48, convnet64 = (partial(convnet, width) for width in (24, 48, 64))

CIFAR: dict[str, Callable[..., nn.Sequential]] = {
    "resnet8": resnet8, "resnet14": resnet14, "resnet18": resnet18, "resnet34": resnet34, "convnet": convnet,
    "convnet24": convnet24, "convnet48": convnet48, "convnet64": convnet64}
