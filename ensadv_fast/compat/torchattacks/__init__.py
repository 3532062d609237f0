"""torchattacks 3.5.1's interface: the same classes, constructor arguments, defaults, modes and return types.

Ours are FGSM, BIM, RFGSM, FFGSM, PGD, PGDL2, MIFGSM, NIFGSM, DIFGSM, TIFGSM, SINIFGSM, VMIFGSM, VNIFGSM, MultiAttack
and their base class. Every other name is the installed library's own, looked up when it is used (an ImportError where
the library is not installed). Each of ours takes one keyword and has one attribute more, ``precision``.

Exact: the module as it is, the library's loss and its mean over the batch, its order of projection, and its draws from
torch's generators in its order. So ``torch.manual_seed`` gives the library's own results: on one device the same bits,
except where sums are taken in another order.

Fast: the attacks of :mod:`ensadv_fast.attacks` on a :class:`ensadv_fast.Source`, with noise from
:func:`ensadv_fast.manual_seed`. The source is made once per model (:func:`ensadv_fast.compat.forget`). What it cannot
do runs exactly, with a warning that says why.

Where ours differ on purpose:

| torchattacks 3.5.1 | here |
| --- | --- |
| after an attack every submodule has the root's mode; after an exception, eval | its own, always |
| attacking in training mode moves batch normalisations' running statistics | they stay |
| after an exception, normalised images are taken for unnormalised | they are not |
| under no_grad or inference_mode it fails | it works |
| 16-bit images: iterates of 16 bits, up to 8.47/255 away for eps 8/255 | of float32, rounded within eps |
| a sample whose gradient is once 0 has a momentum of NaN and stops for good | it adds nothing |
| PGDL2 with eps 0 gives NaN where the gradient vanishes | it gives the image |
| least-likely and random targets: a loop over samples, host syncs for each class | a few operations |
| a kth_min beyond the classes is kthvalue's error | a ValueError |
| TIFGSM fails on images of other than 3 channels, and on float64 ones | it takes them |
| DIFGSM and TIFGSM resize images also where the draw keeps them as they are | only where needed |
| VMIFGSM and VNIFGSM compute neighbours' gradients for a step that never comes | only draw them |
| MultiAttack records its forward passes for autograd | it does not |
| save writes all batches anew after every batch | after 1, 2, 4, 8... batches and at the end |
| save with save_predictions, and neither verbose nor return_verbose, is a NameError | it saves predictions |
| save_type "int" truncates (0.999 becomes 254) and leaves float64 as it is | rounds to the nearest level, every dtype |
| normalisation given as float64 arrays makes float32 images float64 | images keep their dtype |
| setters reach attacks that an attribute held before | only those that it holds |
| a setter that an inner attack refuses has changed the outer one | nothing is changed |
| | eps and alpha may be tensors with one per sample (exact) |
"""
import importlib
from types import ModuleType
from typing import Any

from ..installing import import_library
from .attack import Attack, Kin
from .multiattack import MultiAttack
from .projected import BIM, FFGSM, FGSM, PGD, PGDL2, RFGSM
from .transfer import DIFGSM, MIFGSM, NIFGSM, SINIFGSM, TIFGSM, VMIFGSM, VNIFGSM

__version__ = "3.5.1"
__all__ = ["BIM", "DIFGSM", "FFGSM", "FGSM", "MIFGSM", "MultiAttack", "NIFGSM", "PGD", "PGDL2", "RFGSM", "SINIFGSM",
           "TIFGSM", "VMIFGSM", "VNIFGSM"]
PASSED = ("APGD", "APGDT", "AutoAttack", "CW", "DeepFool", "EADEN", "EADL1", "EOTPGD", "FAB", "GN", "JSMA", "Jitter",
          "LGV", "OnePixel", "PGDRS", "PGDRSL2", "PIFGSM", "PIFGSMPP", "Pixle", "SPSA", "SparseFool", "Square", "TPGD",
          "UPGD", "VANILA")


def __getattr__(name: str) -> Any:
    if name in PASSED:
        return getattr(import_library("torchattacks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PASSED])


def replacements(theirs: ModuleType) -> list[tuple[type, type]]:
    """(their class, ours) for :func:`ensadv_fast.compat.install`."""
    base = importlib.import_module("torchattacks.attack").Attack
    Kin.theirs = (base,)
    return [(base, Attack), *((getattr(theirs, name), globals()[name]) for name in __all__)]
