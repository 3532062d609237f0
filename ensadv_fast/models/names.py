"""What was probably meant by a name that does not exist."""
from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """" (did you mean X or Y?)", the closest of the known names; "" where none is close."""
    close = difflib.get_close_matches(name, list(known), 3, 0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
