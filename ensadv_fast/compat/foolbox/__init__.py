"""Foolbox 3.3.4's interface: the same attack classes, aliases, constructor arguments, defaults and return types.

Ours are in :mod:`ensadv_fast.compat.foolbox.attacks`, as in the library: FastGradient (FGSM, FGM), BasicIterative,
ProjectedGradientDescent (PGD, LinfPGD, L2PGD), MomentumIterative (MIFGSM) and the Adam forms, in the L-inf and the L2
ball. Every other name, here and there, is the installed library's own, looked up when it is used (an ImportError where
the library is not installed). Ours are subclasses of the library's, made when one is first asked for. Each takes one
keyword and has one attribute more, ``precision``, which repr shows where it is not None.

Exact: any Foolbox model of torch tensors, in the mode it is in; the library's loss and its sum over the batch, its
steps in its order, and its draws from torch's generators in its order. So ``torch.manual_seed`` gives the library's own
results, to the bit where the model computes the same twice.

Fast: the attacks of :mod:`ensadv_fast.attacks` on a :class:`ensadv_fast.Source`, in the model's bounds, with noise from
:func:`ensadv_fast.manual_seed`. The source is made once per model (:func:`ensadv_fast.compat.forget`). Momentum and
Adam take the library's own start and steps on the source's gradients. ``success`` is always that of the model itself.
What a source cannot do runs exactly, with a warning that says why: a model other than a plain ``foolbox.PyTorchModel``,
or in training mode, or with a preprocessing that is not per channel; float64 images.

The library's own code runs where the inputs are not floating-point torch tensors, and for a subclass (or an attack)
that overrides value_and_grad, normalize, project, get_random_start, get_loss_fn, get_optimizer or distance.

Where ours differ on purpose:

| Foolbox 3.3.4 | here |
| --- | --- |
| an attack adds to the gradients of the model's parameters, which it computes for nothing | it computes none |
| a model in training mode: running statistics move | they stay |
| under no_grad or inference_mode, and with images that require gradients, it fails | it works |
| 16-bit images: iterates of 16 bits, up to 8.47/255 away for eps 8/255 | of float32 with its noise, within eps |
| the range of the inputs is read twice per eps, with two host syncs each | once per call, with one |
| several eps: all is computed for each | the gradient at the inputs once, unless the model draws random numbers |
| steps 0 without a random start gives the inputs themselves | their copy |
| an AssertionError without a word for inputs out of bounds | one that says which |
"""
from types import ModuleType
from typing import Any

from ..installing import import_library
from . import attacks

__version__ = "3.3.4"


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_library("foolbox"), name)


def replacements(theirs: ModuleType) -> list[tuple[type, type]]:
    """(their class, ours) for :func:`ensadv_fast.compat.install`."""
    return [(ours.theirs, ours) for ours in attacks.make_classes().values()]
