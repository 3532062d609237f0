"""``foolbox.attacks`` with our classes: subclasses of the library's, made when one is first asked for."""
import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..installing import import_library
from .descent import GradientDescent, Kin

NAMES = tuple(norm + kind for norm in ("Linf", "L2")
              for kind in ("FastGradientAttack", "BasicIterativeAttack", "ProjectedGradientDescentAttack",
                           "MomentumIterativeFastGradientMethod", "AdamBasicIterativeAttack",
                           "AdamProjectedGradientDescentAttack"))
ALIASES = {"FGM": "L2FastGradientAttack", "FGSM": "LinfFastGradientAttack",
           "L2PGD": "L2ProjectedGradientDescentAttack", "LinfPGD": "LinfProjectedGradientDescentAttack",
           "PGD": "LinfProjectedGradientDescentAttack", "MIFGSM": "LinfMomentumIterativeFastGradientMethod",
           "L2AdamPGD": "L2AdamProjectedGradientDescentAttack", "LinfAdamPGD": "LinfAdamProjectedGradientDescentAttack",
           "AdamPGD": "LinfAdamProjectedGradientDescentAttack"}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = make_classes().get(ALIASES.get(name, name))
    return getattr(import_library("foolbox").attacks, name) if own is None else own


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES, *ALIASES])


@functools.cache
def make_classes() -> dict[str, Kin]:
    """Our classes by name. Raises an ImportError where the library is not installed."""
    theirs = import_library("foolbox").attacks
    plain = theirs.LinfProjectedGradientDescentAttack.get_optimizer
    return {name: _make_class(getattr(theirs, name), plain) for name in NAMES if hasattr(theirs, name)}


def _make_class(theirs: Any, plain: Callable) -> Kin:
    """Our subclass of one of the library's attacks. plain: the library's ``get_optimizer`` of plain gradient steps."""
    def __init__(self: Any, *, precision: str | None = None, **arguments: Any) -> None:
        theirs.__init__(self, **arguments)
        self.precision = precision

    taken = inspect.signature(theirs.__init__)
    own = inspect.signature(__init__).parameters["precision"]
    setattr(__init__, "__signature__", taken.replace(parameters=[*taken.parameters.values(), own]))
    __init__.__doc__ = theirs.__init__.__doc__
    return Kin(theirs.__name__, (GradientDescent, theirs), {
        "__init__": __init__, "__module__": __name__, "__qualname__": theirs.__name__, "__doc__": theirs.__doc__,
        "theirs": theirs, "plain": theirs.get_optimizer is plain,
        "untargeted": theirs.__name__.endswith("FastGradientAttack")})
