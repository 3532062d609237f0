"""Exact or fast: chosen once for the process, or for one attack."""
from ..ops import checks

PRECISIONS = ("exact", "fast")
_current = "exact"


class precision:
    """Choose how attacks of all backends compute from now on, in every thread.

    Args:
        which: "exact": the library's own numbers, on the module as it is, with torch's random draws in the library's
            order; or "fast": on a :class:`ensadv_fast.Source` of the model, made once, with noise by our keys
            (:func:`ensadv_fast.manual_seed`).

    As a context manager it puts back on leaving what was chosen before. An attack's own ``precision``, where it is not
    None, wins over this. Raises ValueError for another name.
    """

    def __init__(self, which: str):
        global _current
        checks.choice("compat.precision", "which", which, PRECISIONS)
        self._before, _current = _current, which

    def __enter__(self) -> "precision":
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = self._before


def current_precision() -> str:
    """What :func:`precision` chose last: "exact" or "fast"."""
    return _current


def checked(op: str, which: str | None) -> str | None:
    """An attack's own choice; a ValueError that names the attack for what is none."""
    if which not in (None, *PRECISIONS):
        raise ValueError(f"{op}: precision must be None, {', '.join(PRECISIONS)}, got {which!r}")
    return which


def is_fast(which: str | None) -> bool:
    """Is an attack with this choice fast?"""
    return (which or _current) == "fast"
