"""The choice between exact and fast, for the whole process or for one attack."""
from ..ops import checks

PRECISIONS = ("exact", "fast")
_current = "exact"


class precision:
    """Choose how attacks of all backends compute from now on, in every thread.

    Args:
        which: "exact": the library's own numbers, on the module as it is, with torch's random draws in the library's
            order; or "fast": on a :class:`ensadv_fast.Source` of the model, made once, with noise by our keys
            (:func:`ensadv_fast.manual_seed`).

    As a context manager it restores at its end what was chosen before. An attack's own ``precision``, where it is not
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


def check_precision(op: str, which: str | None) -> str | None:
    """An attack's own choice, as it is. Raises a ValueError that names the attack for anything else."""
    if which not in (None, *PRECISIONS):
        raise ValueError(f"{op}: precision must be None, {', '.join(PRECISIONS)}, got {which!r}")
    return which


def is_fast(which: str | None) -> bool:
    """Does an attack with this choice of its own run fast?"""
    return (which or _current) == "fast"
