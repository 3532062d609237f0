"""Putting our classes in place of a library's, inside the library's own modules."""
import importlib
import sys
import warnings
from types import ModuleType

BACKENDS = ("torchattacks", "foolbox", "cleverhans", "art")
PIP_NAMES = {"art": "adversarial-robustness-toolbox"}  # what pip calls a library, where that is not its module's name
# For each library: how many installs are not undone yet, and (module, attribute, theirs, ours) of each replacement.
_installed: dict[str, tuple[int, list[tuple[ModuleType, str, object, object]]]] = {}


class Installation:
    """What :func:`install` returns: a context manager that undoes the install at its end."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *_: object) -> None:
        uninstall(self.name)


def install(name: str) -> Installation:
    """Put our classes in place of those of the library `name` ("torchattacks", "foolbox", "cleverhans" or "art"), in
    all of its modules.

    From now on ``library.PGD`` is ours wherever it is looked up, also in code that imported the library before, and so
    is ``from library import PGD``. Names that such an import bound before, default arguments of the library's own
    functions, and objects that exist already cannot be reached: install first. Classes that we do not have stay the
    library's.

    Installs nest: the library has its own classes again when each install has been undone, by :func:`uninstall` or at
    the end of the ``with compat.install(name):`` block.

    Raises:
        ValueError: for a name without backend. ImportError: where the library is not installed.
    Warns:
        UserWarning: where another version of the library is installed than we mirror.
    """
    _check_name(name)
    count, put = _installed.get(name, (0, []))
    if not count:
        put = _replace(name)
    _installed[name] = count + 1, put
    return Installation(name)


def uninstall(name: str) -> None:
    """Undo one :func:`install`. Undoing the last gives the library its own classes back.

    Raises ValueError for a name without backend, RuntimeError where nothing is installed.
    """
    _check_name(name)
    if name not in _installed:
        raise RuntimeError(f"compat.uninstall: {name} is not installed: there is nothing to undo")
    count, put = _installed.pop(name)
    if count > 1:
        _installed[name] = count - 1, put
        return
    for module, attribute, theirs, ours in put:
        if vars(module).get(attribute) is ours:  # other code may have replaced it since
            setattr(module, attribute, theirs)


def import_library(name: str) -> ModuleType:
    """The library itself. Raises an ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise ImportError(f"compat: {name} is not installed: pip install {PIP_NAMES.get(name, name)}", name=name) from e


def _replace(name: str) -> list[tuple[ModuleType, str, object, object]]:
    """Put our classes into the library's modules; (module, attribute, theirs, ours) of each replacement."""
    theirs = import_library(name)
    backend = importlib.import_module(f".{name}", __package__)
    if theirs.__version__.split("-")[0] != backend.__version__:  # CleverHans adds a digest of its files
        warnings.warn(f"compat: {name} {backend.__version__} is mirrored, {theirs.__version__} is installed",
                      stacklevel=3)
    replacements = backend.replacements(theirs)
    modules = [m for n, m in list(sys.modules.items()) if m is not None and (n == name or n.startswith(name + "."))]
    put = [(module, attribute, old, new) for module in modules for attribute, value in vars(module).items()
           for old, new in replacements if value is old]
    for module, attribute, _, new in put:
        setattr(module, attribute, new)
    return put


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"compat: name must be one of {', '.join(BACKENDS)}, got {name!r}")
