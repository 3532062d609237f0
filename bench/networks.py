"""The networks that whole attacks and training steps are timed on, with weights and statistics that are alive."""
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensadv_fast.models import mnist_a

sys.path.append(str(Path(__file__).parent))
from papers.networks import resnet18  # noqa: E402

BUILD = Path(__file__).parent.parent / "build" / "networks"


def cifar_resnet18() -> nn.Module:
    """ResNet-18 as CIFAR repositories have it: a 3x3 stem, no max-pooling."""
    return resnet18()


def _imagenet(name: str, **timm_only) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        if importlib.util.find_spec("timm"):
            import timm
            return timm.create_model(name, **timm_only)
        import torchvision
        return torchvision.models.get_model(name, weights=None, **({"init_weights": True, "aux_logits": False}
                                                                   if name == "inception_v3" else {}))
    return make


@dataclass(frozen=True)
class Network:
    """shape: of one image. batch, gpu_batch: of an attack; train_batch: of a training step on the CPU. eps: the
    papers' for this data. needs: packages of which one must be installed."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    classes: int
    eps: float
    batch: int
    gpu_batch: int
    train_batch: int
    needs: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return not self.needs or any(importlib.util.find_spec(name) for name in self.needs)


_LIBRARIES = ("timm", "torchvision")
NETWORKS = {n.name: n for n in (
    Network("mnist_a", mnist_a, (1, 28, 28), 10, 0.3, 64, 64, 64),
    Network("cifar_resnet18", cifar_resnet18, (3, 32, 32), 10, 8 / 255, 128, 512, 32),
    Network("resnet50", _imagenet("resnet50", zero_init_last=False), (3, 224, 224), 1000, 8 / 255, 8, 64, 8,
            _LIBRARIES),
    Network("inception_v3", _imagenet("inception_v3"), (3, 299, 299), 1000, 8 / 255, 8, 64, 8, _LIBRARIES),
)}


def images(network: Network, n: int, device: str = "cpu", seed: int = 0, size: int | None = None) -> tuple[
        Tensor, Tensor]:
    """n images in [0, 1], each a coarse pattern of its class under noise, and their labels: something to learn.

    size: height and width, where not the network's own.
    """
    g = torch.Generator().manual_seed(seed)
    channels, height, width = network.shape
    seen = min(network.classes, 10)  # more would take longer to learn
    y = torch.randint(0, seen, (n,), generator=g)
    patterns = torch.rand(seen, channels, 7, 7, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(patterns[y], (size or height, size or width))
    return (x + 0.3 * torch.randn(x.shape, generator=g)).clamp(0, 1).to(device), y.to(device)


def settled(network: Network, device: str = "cpu", steps: int = 40, batch: int = 16) -> nn.Module:
    """The network after a few training steps, its running statistics those of its data, in eval mode.

    ImageNet networks learn at half their size. What was learnt is kept in build/networks/.
    """
    torch.manual_seed(0)
    net = network.make()
    kept = BUILD / f"{network.name}-{steps}x{batch}-torch{torch.__version__}.pt"
    if not kept.exists():
        _train(net, network, steps, batch)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), kept)
    net.load_state_dict(torch.load(kept, weights_only=True))
    return net.to(device).eval()


def _train(net: nn.Module, network: Network, steps: int, batch: int) -> None:
    net.train()
    size = network.shape[1] // 2 if network.shape[1] > 128 else None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for step in range(steps):
        x, y = images(network, batch, seed=100 + step, size=size)
        loss = F.cross_entropy(logits_of(net(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    with torch.no_grad():
        for step in range(2):
            net(images(network, 2 * batch, seed=1000 + step)[0])


def logits_of(result) -> Tensor:
    """Inception's auxiliary head gives a second result in train mode."""
    return result if isinstance(result, Tensor) else result[0]
