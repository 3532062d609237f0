"""Drop-in backends: other libraries' classes that run on our engine.

``ensadv_fast.compat.torchattacks``, ``.foolbox``, ``.cleverhans`` and ``.art`` mirror those libraries' classes and
functions, their arguments, defaults, modes and return types.
:func:`install` puts them in place inside a program that is not edited. :func:`precision` chooses between the library's
own numbers ("exact", the default) and our source engine ("fast"); :func:`forget` drops the sources that fast attacks
made of a model. Importing this imports no other library.
"""
import importlib
from typing import TYPE_CHECKING, Any

from .installing import BACKENDS, Installation, install, uninstall
from .precisions import current_precision, precision

if TYPE_CHECKING:
    from .source_cache import forget

__all__ = ["Installation", "current_precision", "forget", "install", "precision", "uninstall"]


def __getattr__(name: str) -> Any:
    """Backends and the sources of their models are imported where they are first asked for."""
    if name in BACKENDS:
        return importlib.import_module(f".{name}", __name__)
    if name == "forget":
        return importlib.import_module(".source_cache", __name__).forget
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
