"""Memory of a training step on one device, from what autograd keeps: counted on the CPU, nothing is timed.

    always  = weights and buffers + gradients + their buckets under DistributedDataParallel + optimizer state + EMA
              + weights of the static sources + image batches
    peak    = always + the larger of: what the training step's forward pass keeps for its backward pass, and what
              crafting keeps on the dearest source (its memory is free again before the training step)

What is kept for an image is the difference between two batches, divided by their difference: weights cast under
autocast do not grow with the batch and are counted once. A stream that crafts ahead beside the training step (static
sources, on CUDA) adds what those keep, a few MB an image. Not counted: temporary buffers of single operations,
workspaces of the libraries, the CUDA context, fragmentation.
"""
from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from networks import NETWORKS, logits_of
from torch import Tensor, nn

import ensadv_fast as ea
from ensadv_fast import models

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from kept import kept_bytes  # noqa: E402  it lies beside the tests that hold the counts

del sys.path[0]  # the tests have a module `networks` of their own

BATCHES = (2, 4)  # BatchNorm over one pixel needs two images


@dataclass(frozen=True)
class Network:
    """A network to train or to craft on: timm's, "mnist:NAME" of `ensadv_fast.models`, or one of bench/networks.py.
    size: height and width. aux: with Inception's auxiliary head, which only training looks at."""

    name: str
    size: int
    channels: int = 3
    aux: bool = False

    def make(self, device: str = "cpu") -> nn.Module:
        with torch.device(device):
            if self.name.startswith("mnist:"):
                return models.build(self.name, 10, (self.channels, self.size, self.size))
            if self.name in NETWORKS and not NETWORKS[self.name].needs:
                return NETWORKS[self.name].make()
            import timm
            return timm.create_model(self.name, **({"aux_logits": True} if self.aux else {}))

    def images(self, n: int, device: str = "cpu") -> Tensor:
        return torch.rand(n, self.channels, self.size, self.size, device=device)


@dataclass(frozen=True)
class Preset:
    """What memory and time depend on. batch: images a device; states: buffers of the optimizer for each weight; live:
    whether the model in training is a source too."""

    name: str
    model: Network
    static: tuple[Network, ...]
    batch: int
    states: int
    dtype: str = "float32"
    ema: bool = False
    fraction: float = 0.5
    append: bool = False

    @property
    def crafted(self) -> int:
        return int(self.fraction * self.batch)

    @property
    def trained(self) -> int:
        return self.batch + self.crafted * self.append


INCEPTION, INCEPTION_RESNET, RESNET_V2 = (Network("inception_v3", 299), Network("inception_resnet_v2", 299),
                                          Network("resnetv2_50", 299))
INCEPTION_AUX = Network("inception_v3", 299, aux=True)
RESNETS = tuple(Network(f"resnet{n}", 224) for n in (50, 18, 34))
CIFAR, MNIST = Network("cifar_resnet18", 32), Network("mnist:A", 28, channels=1)
# Sources and batches of one device as in Tramer et al., section 4.2 and table 3, and Kurakin et al., section 4.1;
# RMSProp as TensorFlow has it keeps a second buffer, the momentum.
PRESETS = {p.name: p for p in (
    Preset("imagenet-eat-ens3", INCEPTION_AUX, (INCEPTION, RESNET_V2), 16, 2),
    Preset("imagenet-eat-ens4", INCEPTION_AUX, (INCEPTION, RESNET_V2, INCEPTION_RESNET), 16, 2),
    Preset("Inception-ResNet v2 on itself and Inception v3", INCEPTION_RESNET, (INCEPTION, INCEPTION_RESNET), 16, 2),
    Preset("imagenet-kurakin", INCEPTION_AUX, (), 32, 2),
    Preset("imagenet-resnet50-eat", RESNETS[0], RESNETS[1:], 128, 1, dtype="bfloat16"),
    Preset("CIFAR-10: ResNet-18 on two of its kind", CIFAR, (CIFAR, CIFAR), 128, 1),
    Preset("mnist-eat", MNIST, tuple(replace(MNIST, name=f"mnist:{n}") for n in "ACD"), 64, 2, fraction=1.0,
           append=True),
)}


def weight_bytes(network: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters, which are also those of its gradients, and of the buffers."""
    return tuple(sum(t.numel() * t.element_size() for t in some) for some in (network.parameters(), network.buffers()))


def gradient_bytes(network: Network) -> int:
    """What is all-reduced in a step. Nothing is allocated."""
    return weight_bytes(network.make("meta"))[0]


def _per_image(count: Callable[[int], int]) -> tuple[float, float]:
    """Bytes for each image, and those that do not grow with the batch."""
    small, large = map(count, BATCHES)
    each = (large - small) / (BATCHES[1] - BATCHES[0])
    return each, small - BATCHES[0] * each


@functools.cache
def training_kept(network: Network, dtype: str = "float32") -> tuple[float, float]:
    """What the forward pass of a training step keeps: bytes for each image, and bytes beside."""
    net = network.make().train()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            result = net(x.detach())  # a training step asks for no gradient by the images
        return result if isinstance(result, Tensor) else result[0] + 0.4 * result[1]

    return _per_image(lambda n: kept_bytes(net, forward, network.images(n)))


@functools.cache
def crafting_kept(network: Network, live: bool, dtype: str = "float32") -> tuple[float, float, int]:
    """What crafting keeps: bytes for each image, bytes beside, and the weights of the source itself: those of a static
    one, 0 of the live one, which shares the model's. dtype: of a static source, and of autocast for the live one."""
    net = network.make().eval()
    if live:
        source = ea.Source(net, live=True, dtype=torch.bfloat16 if dtype == "bfloat16" else None)
    else:
        source = ea.Source(net, dtype=getattr(torch, dtype))
    each, beside = _per_image(lambda n: kept_bytes(source.module, lambda x: logits_of(source.logits(x)),
                                                   network.images(n)))
    return each, beside, 0 if live else sum(weight_bytes(source.module))


def memory(preset: Preset, *, distributed: bool = True) -> dict[str, float]:
    """Bytes of one device, part by part. distributed: whether it is one of several."""
    weights, buffers = weight_bytes(preset.model.make("meta"))
    train_each, train_beside = training_kept(preset.model, preset.dtype)
    crafts = [crafting_kept(preset.model, True, preset.dtype)]
    crafts += [crafting_kept(s, False, "bfloat16") for s in preset.static]
    image = preset.model.channels * preset.model.size**2 * 4
    parts = {
        "weights": weights + buffers, "gradients": weights, "buckets": distributed * weights,
        "optimizer": preset.states * weights,
        "ema": preset.ema * (weights + buffers), "static_weights": sum(c[2] for c in crafts),
        "images": (preset.batch + preset.trained) * image,
        "kept_by_training": train_beside + preset.trained * train_each,
        "kept_by_crafting": max(beside + preset.crafted * each for each, beside, _ in crafts)}
    always = sum(v for k, v in parts.items() if not k.startswith("kept_by"))
    return {**parts, "kept_per_trained_image": train_each,
            "peak": always + max(parts["kept_by_training"], parts["kept_by_crafting"])}
