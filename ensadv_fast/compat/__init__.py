"""Drop-in backends: other libraries' classes that run on our engine.

``ensadv_fast.compat.torchattacks``, ``.foolbox``, ``.cleverhans`` and ``.art`` mirror those libraries' classes and
functions, their arguments, defaults, modes and return types.
:func:`install` puts them in place inside a program that is not edited. :func:`precision` chooses between the library's
own numbers ("exact", the default) and our source engine ("fast"); :func:`forget` drops the sources that fast attacks
made of a model. Importing this imports no other library.
"""
import importlib
from types import ModuleType

from .installing import BACKENDS, Installation, install, uninstall
from .precisions import current_precision, precision
from .source_cache import forget

__all__ = ["Installation", "current_precision", "forget", "install", "precision", "uninstall"]


def __getattr__(name: str) -> ModuleType:
    """A backend is imported where it is first asked for."""
    if name in BACKENDS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
