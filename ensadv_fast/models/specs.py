"""The MNIST networks of the ensemble-adversarial-training paper, and networks by name.

Two versions of these networks exist (Tramer et al., "Ensemble Adversarial Training", ICLR 2018). `mnist_a` to
`mnist_d` are those of the authors' released code (github.com/ftramer/ensemble-adv-training, mnist.py); `mnist_c_tanh`
is network C as the paper's appendix describes it, with Tanh and max-pooling. All end in logits. Weights start as
PyTorch's layers do, except that D's hidden layers are he_normal, as in the released code.
"""
from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cifar import CIFAR
from .mnist import MNIST, Shape

AUX = "+aux"


class Normalized(nn.Module):
    """A network that expects (x - mean) / std, fed with images x in [0, 1]. Its weights keep the network's names."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.net((x - self.mean) / self.std)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.net.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.net.load_state_dict(*args, **options)


def parts(model: nn.Module) -> tuple[nn.Module, Tensor | None, Tensor | None]:
    """(network, mean, std) of what `build` made: a `Source` normalises in its own entrance, in one pass."""
    return (model.net, model.mean, model.std) if isinstance(model, Normalized) else (model, None, None)


def parse(spec: str) -> tuple[str, str, str | None]:
    """Split `family:name[=CHECKPOINT]` into its three parts; ValueError says what is wanted."""
    if not isinstance(spec, str):
        raise TypeError(f"model: got {type(spec).__name__}, want a string such as 'mnist:A'")
    name, eq, checkpoint = spec.partition("=")
    family, colon, name = name.partition(":")
    if not colon or not family or not name or (eq and not checkpoint):
        raise ValueError(f"model: got {spec!r}, want mnist:NAME, cifar:NAME, timm:NAME, torchvision:NAME or "
                         "package.module:callable, optionally followed by =CHECKPOINT")
    return family, name, checkpoint or None


def short_name(spec: str) -> str:
    """The part of a spec that names the network: 'mnist:A=runs/a.pt' -> 'A', 'timm:inception_v3+aux' ->
    'inception_v3'."""
    return parse(spec)[1].removesuffix(AUX)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as e:  # torchvision beside another build of torch fails with RuntimeError, not ImportError
        raise ImportError(f"model: '{name}:' networks need the package {name}, which does not import here "
                          f"({type(e).__name__}: {e}); pip install {name}") from e


def build(spec: str, num_classes: int | None = None, in_shape: Shape | None = None,
          download: bool = False) -> nn.Module:
    """Make the network that `spec` names, in train mode, on the CPU, in float32.

    spec: `mnist:A|B|C|C_tanh|D`, `cifar:NAME` (`ensadv_fast.cifar.CIFAR`), `timm:NAME`, `torchvision:NAME` or
        `package.module:callable` (called without arguments), each optionally with `=CHECKPOINT`, a file of weights
        (see `load_weights`). `timm:NAME+aux` has the auxiliary classifier of timm's Inception v3: it gives
        (logits, auxiliary logits).
    num_classes: width of the logits; None leaves the network's own default. in_shape: (C, H, W): the mnist networks
        are made for it, the others for its channels. Both are left to a `package.module:callable` itself.
    download: let timm and torchvision fetch their pretrained weights; nothing is downloaded otherwise.
    All take images in [0, 1]: timm's and torchvision's networks for three channels are `Normalized`, by the mean and
    std that their published weights were trained with, which is also declared nowhere else.

    Raises ValueError for an unknown or malformed name or a checkpoint that does not fit, ImportError where timm
    or torchvision is absent.
    """
    family, name, checkpoint = parse(spec)
    sizes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    statistics: tuple[Sequence[float] | None, Sequence[float] | None] = None, None
    if family == "mnist":
        if name not in MNIST:
            raise ValueError(f"model: got {spec!r}, the mnist networks are {', '.join(MNIST)}")
        if in_shape is not None:
            sizes["in_shape"] = in_shape
        model = MNIST[name](**sizes)
    elif family == "cifar":
        if name not in CIFAR:
            raise ValueError(f"model: got {spec!r}, the cifar networks are {', '.join(CIFAR)}")
        if in_shape is not None:
            sizes["channels"] = in_shape[0]
        model = CIFAR[name](**sizes)
    elif family == "timm":
        timm = _library("timm")
        if in_shape is not None:
            sizes["in_chans"] = in_shape[0]
        if name.endswith(AUX):
            name, sizes["aux_logits"] = name.removesuffix(AUX), True
        if not timm.is_model(name):
            raise ValueError(f"model: timm has no network named {name!r}")
        model = timm.create_model(name, pretrained=download and checkpoint is None, **sizes)
        statistics = model.pretrained_cfg.get("mean"), model.pretrained_cfg.get("std")
    elif family == "torchvision":
        tv = _library("torchvision").models
        if name not in tv.list_models():
            raise ValueError(f"model: torchvision has no network named {name!r}")
        pretrained = download and checkpoint is None
        # torchvision refuses another width together with pretrained weights, which have their own.
        model = tv.get_model(name, weights="DEFAULT") if pretrained else tv.get_model(name, weights=None, **sizes)
        made_for = tv.get_model_weights(name).DEFAULT.transforms()
        statistics = getattr(made_for, "mean", None), getattr(made_for, "std", None)
    else:
        try:
            make = getattr(importlib.import_module(family), name)
        except (ImportError, AttributeError) as e:
            raise ValueError(f"model: {spec!r} cannot be found ({e})") from e
        model = make()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: {family}:{name}() returned {type(model).__name__}, want an nn.Module")
    if checkpoint is not None:
        load_weights(model, checkpoint)
    mean, std = statistics
    if mean is None or std is None or len(mean) != (3 if in_shape is None else in_shape[0]):
        return model
    return Normalized(model, mean, std)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into `model`, in place.

    The file is a state_dict as torch.save writes it, or a dict that holds one under 'model' (checkpoints of
    `ensadv-fast train`), 'state_dict' or 'model_state_dict'; a 'module.' prefix (DDP) is dropped. Where a checkpoint
    of `ensadv-fast train` has averaged weights (--ema), these are taken; FILE#model names the others. It is read with
    weights_only=True: no code in it runs. Raises FileNotFoundError, and ValueError for a file that is corrupt or
    does not fit the model.
    """
    path, averaged = Path(path), True
    if path.name.endswith("#model") and not path.is_file():
        path, averaged = path.with_name(path.name.removesuffix("#model")), False
    if not path.is_file():
        raise FileNotFoundError(f"model: no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"model: {path} is corrupt or no file of weights ({type(e).__name__}: {e})") from e
    if averaged and isinstance(state, dict) and isinstance(state.get("ema"), dict):
        state = state["ema"]
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"model: {path} holds no state_dict")
    state = OrderedDict((k.removeprefix("module."), v) for k, v in state.items())
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"model: the weights in {path} do not fit {type(model).__name__}: {e}") from e


def unique_names(specs: tuple[str, ...], taken: dict[str, Any], by_file: bool = False) -> dict[str, str]:
    """Short names for specs that differ from each other and from `taken`: D, D_2. by_file: those that would share one
    take their checkpoint's: D_adv-seed0."""
    names: dict[str, str] = {}
    short = [short_name(spec) for spec in specs]
    for spec, base in zip(specs, short, strict=True):
        file = parse(spec)[2]
        if by_file and file is not None and (short.count(base) > 1 or base in taken):
            base = Path(file).stem
        i, name = 2, base
        while name in names or name in taken:
            name, i = f"{base}_{i}", i + 1
        names[name] = spec
    return names
