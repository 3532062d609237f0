"""The Adversarial Robustness Toolbox 1.20.1's gradient attacks (``art.attacks.evasion``): ART's classes, which compute
with our code where the estimator is a PyTorchClassifier.

Ours are FastGradientMethod, ProjectedGradientDescent, ProjectedGradientDescentPyTorch, BasicIterativeMethod and
MomentumIterativeMethod, each a subclass of ART's class of that name: constructor, set_params, estimator requirements
and errors are inherited, numpy arrays go in and float32 arrays come out, and ART's trainers take them. Every other name
is ``art.attacks.evasion``'s. Importing this imports ART. Each of ours takes one keyword and has one attribute more,
``precision``.

Exact: the classifier's loss and preprocessing, and ART's order of steps, clipping and projection. numpy's generator is
drawn from as ART draws, and so is torch's, which gives ART's data loaders their seeds. So ``numpy.random.seed`` gives
ART's own results: the same bits, except where sums are taken in another order (ART's FastGradientMethod sums in numpy).

Fast: the attacks of :mod:`ensadv_fast.attacks` on a :class:`ensadv_fast.Source` of the classifier's model, with noise
from :func:`ensadv_fast.manual_seed`. The source is made once (:func:`ensadv_fast.compat.forget`). What it cannot do
runs exactly, with a warning that says why.

ART's own code still runs for norms other than infinity and 2; estimators other than PyTorchClassifiers, and those that
compute gradients in their own way; preprocessing that is not in PyTorch; apex's mixed precision; a summary writer;
arrays of objects.

Where ours differ on purpose:

| ART 1.20.1 | here |
| --- | --- |
| attacks leave the model in eval mode | every submodule is left in its own mode |
| gradients of all parameters are computed, and the user's are deleted | neither |
| two or three waits for the device in each step | none; one where a defence may change labels |
| FastGradientMethod computes in numpy, on the host | on the classifier's device |
| after each call two more passes over the data, for a line of the log | only where the log is on |
| FastGradientMethod logs a success rate of 0 % | its own |
| clean predictions are made again for each restart | once |
| minimal: predictions of the whole batch in each step | of those not yet fooled |
| minimal, and y=None: float64 images fail | they become float32, as everywhere |
| random starts with one eps per image fail in more than two dimensions | they work |
| masks of shape [1, ...], and in PGD of fewer dimensions than the images less one, fail | they broadcast |
"""
import importlib
from types import ModuleType
from typing import Any

from ..installing import import_library

import_library("art")  # before what imports ART: an ImportError that says how to install it

from .fast_gradient import FastGradientMethod  # noqa: E402
from .projected import (  # noqa: E402
    BasicIterativeMethod,
    MomentumIterativeMethod,
    ProjectedGradientDescent,
    ProjectedGradientDescentPyTorch,
)

__version__ = "1.20.1"
__all__ = ["BasicIterativeMethod", "FastGradientMethod", "MomentumIterativeMethod", "ProjectedGradientDescent",
           "ProjectedGradientDescentPyTorch"]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("art.attacks.evasion"), name)


def replacements(_: ModuleType) -> list[tuple[type, type]]:
    """(their class, ours) for :func:`ensadv_fast.compat.install`."""
    ours = [globals()[name] for name in __all__]
    return [(_find_theirs(cls), cls) for cls in ours]


def _find_theirs(cls: type) -> type:
    """ART's class of the same name, among the bases of ours."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("art.") and base.__name__ == cls.__name__)
