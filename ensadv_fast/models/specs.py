"""Networks by name, `family:name[=CHECKPOINT]`, and files of weights."""
from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cifar import CIFAR
from .mnist import MNIST, Shape
from .names import did_you_mean
from .weights import fit_weights

AUX = "+aux"
FAMILIES = ("mnist", "cifar", "timm", "torchvision")


class Normalized(nn.Module):
    """A network that expects (x - mean) / std, made to take images x in [0, 1] [N, C, H, W].

    mean, std: one number per channel. Weights are saved and loaded under the network's own names.
    """

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
    """(network, mean, std) of what `build` made, for a `Source`, which normalises images itself, in one pass."""
    return (model.net, model.mean, model.std) if isinstance(model, Normalized) else (model, None, None)


def parse(spec: str) -> tuple[str, str, str | None]:
    """Split `family:name[=CHECKPOINT]` into its three parts. Raises TypeError and ValueError for anything else."""
    if not isinstance(spec, str):
        raise TypeError(f"model: spec must be a string such as 'mnist:A', got {type(spec).__name__}")
    name, eq, checkpoint = spec.partition("=")
    family, colon, name = name.partition(":")
    if not colon or not family or not name or (eq and not checkpoint):
        raise ValueError("model: spec must be mnist:NAME, cifar:NAME, timm:NAME, torchvision:NAME or "
                         f"package.module:callable, optionally followed by =CHECKPOINT, got {spec!r}")
    return family, name, checkpoint or None


def short_name(spec: str) -> str:
    """The part of a spec that names the network: 'mnist:A=runs/a.pt' -> 'A', 'timm:inception_v3+aux' ->
    'inception_v3'."""
    return parse(spec)[1].removesuffix(AUX)


def build(spec: str, num_classes: int | None = None, in_shape: Shape | None = None,
          download: bool = False) -> nn.Module:
    """Make the network that `spec` names, in train mode, on the CPU, in float32.

    spec: `mnist:A|B|C|C_tanh|D`, `cifar:NAME` (`ensadv_fast.models.CIFAR`), `timm:NAME`, `torchvision:NAME` or
        `package.module:callable` (called without arguments), each optionally with `=CHECKPOINT`, a file of weights
        (see `load_weights`). `timm:NAME+aux` has the auxiliary classifier of timm's Inception v3: it gives
        (logits, auxiliary logits).
    num_classes: width of the logits; None leaves the network's own default. in_shape: (C, H, W): the mnist networks
        are made for it, the others for its channels. A `package.module:callable` is given neither.
    download: let timm and torchvision fetch their pretrained weights; nothing is downloaded otherwise.

    All take images in [0, 1]. timm's and torchvision's networks are `Normalized` by the mean and std that their
    published weights were trained with, unless in_shape has another number of channels.

    Raises ValueError for an unknown or malformed name or a checkpoint that does not fit, ImportError where timm
    or torchvision is absent, TypeError for a callable that returns no module.
    """
    family, name, checkpoint = parse(spec)
    channels = None if in_shape is None else in_shape[0]
    pretrained = download and checkpoint is None
    mean = std = None
    if family == "mnist":
        model = _make_own(MNIST, spec, num_classes=num_classes, in_shape=in_shape)
    elif family == "cifar":
        model = _make_own(CIFAR, spec, num_classes=num_classes, channels=channels)
    elif family == "timm":
        model, mean, std = _make_timm(name, pretrained, num_classes=num_classes, in_chans=channels)
    elif family == "torchvision":
        model, mean, std = _make_torchvision(name, pretrained, num_classes=num_classes)
    else:
        model = _call(family, name)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if mean is None or std is None or len(mean) != (3 if channels is None else channels):
        return model
    return Normalized(model, mean, std)


Made = tuple[nn.Module, Sequence[float] | None, Sequence[float] | None]  # a network, mean and std of its images


def _given(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that are not None: the others are left to the network."""
    return {name: value for name, value in sizes.items() if value is not None}


def _make_own(known: Mapping[str, Callable[..., nn.Module]], spec: str, **sizes: Any) -> nn.Module:
    family, name, _ = parse(spec)
    if name not in known:
        raise ValueError(f"model: spec must be {family}: and one of {', '.join(known)}, got {spec!r}"
                         f"{did_you_mean(name, known)}")
    return known[name](**_given(sizes))


def _make_timm(name: str, pretrained: bool, **sizes: Any) -> Made:
    timm = _import_library("timm")
    if name.endswith(AUX):
        name, sizes["aux_logits"] = name.removesuffix(AUX), True
    if not timm.is_model(name):
        raise ValueError(f"model: timm has no network named {name!r}{did_you_mean(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=pretrained, **_given(sizes))
    return model, model.pretrained_cfg.get("mean"), model.pretrained_cfg.get("std")


def _make_torchvision(name: str, pretrained: bool, **sizes: Any) -> Made:
    tv = _import_library("torchvision").models
    if name not in tv.list_models():
        raise ValueError(f"model: torchvision has no network named {name!r}{did_you_mean(name, tv.list_models())}")
    # torchvision refuses another width together with pretrained weights, which have their own.
    model = tv.get_model(name, **{"weights": "DEFAULT"} if pretrained else {"weights": None, **_given(sizes)})
    made_for = tv.get_model_weights(name).DEFAULT.transforms()
    return model, getattr(made_for, "mean", None), getattr(made_for, "std", None)


def _import_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as e:  # torchvision beside another build of torch fails with RuntimeError, not ImportError
        raise ImportError(f"model: '{name}:' networks need the package {name}, which does not import here "
                          f"({type(e).__name__}: {e}); pip install {name}") from e


def _find(module: str, name: str) -> Callable[[], Any]:
    """The callable that a user names."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"model: '{module}:{name}' cannot be found ({e}); networks by name are mnist:, cifar:, timm: "
                         f"and torchvision:{did_you_mean(module, FAMILIES)}") from e


def check(spec: str, num_classes: int | None = None, in_shape: Shape | None = None) -> None:
    """Raise what `build` raises for a name that does not exist and a file that is not there, in no time: networks are
    made without memory (on the meta device), and a `package.module:callable` is found, not called."""
    family, name, checkpoint = parse(spec)
    if checkpoint is not None and not any(Path(f).is_file() for f in (checkpoint, checkpoint.removesuffix("#model"))):
        raise FileNotFoundError(f"model: no checkpoint at {checkpoint}")
    if family not in FAMILIES:
        _find(family, name)
        return
    try:
        with torch.device("meta"):
            build(f"{family}:{name}", num_classes, in_shape)
    except RuntimeError:  # the name exists, and its network computes with numbers that are not there on this device
        pass


def _call(module: str, name: str) -> nn.Module:
    """The module that a user's own function returns."""
    model = _find(module, name)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {module}:{name}() must return an nn.Module, got {type(model).__name__}")
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into `model`, in place.

    The file is a state_dict as torch.save writes it, or a dict that holds one under 'model' (checkpoints of
    `ensadv-fast train`), 'state_dict' or 'model_state_dict'; a wrapper's prefix is dropped. Where a checkpoint
    of `ensadv-fast train` has averaged weights (--ema), these are loaded; FILE#model names those that are not averaged.
    The file is read with weights_only=True: no code in it runs.

    Raises FileNotFoundError, and ValueError for a file that is corrupt or does not fit the model, and for weights that
    are not finite.
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
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"model: {path} holds no state_dict: its keys must be names, and its values tensors")
    fit_weights(model, state, path)


def unique_names(specs: tuple[str, ...], taken: dict[str, Any], by_file: bool = False) -> dict[str, str]:
    """Short names of specs, name -> spec, that differ from each other and from `taken`: D, D_2.

    by_file: specs that would share a name are called after their checkpoints: D_adv-seed0.
    """
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
