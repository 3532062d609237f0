"""The options of a source: what they may be."""
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_options(crafting: str, dtype: torch.dtype | str | None, channels_last: bool | str, cuda_graph: bool | str,
                   **flags: bool) -> None:
    """TypeError or ValueError for an option of :class:`Source` that does not fit."""
    op = "Source"
    checks.choice(op, "crafting", crafting, ("eval", "train"))
    if dtype not in ("auto", None, *DTYPES):
        raise ValueError(f"{op}: dtype must be 'auto', None, {checks.names(DTYPES)}, got {dtype!r}")
    for name, value in flags.items():
        checks.flag(op, name, value)
    for name, choice in (("channels_last", channels_last), ("cuda_graph", cuda_graph)):
        if choice not in ("auto", True, False):
            raise ValueError(f"{op}: {name} must be 'auto', True or False, got {choice!r}")
    if flags["live"] and (dtype not in ("auto", None, *checks.NARROW) or channels_last is True or flags["compile"]):
        raise ValueError(f"{op}: a live model is used as it is; channels_last, compile and a dtype of more than 16 "
                         "bits do not apply")


def per_channel(name: str, values: Sequence[float] | Tensor | None, device: torch.device) -> Tensor | None:
    """mean or std as float32 [1, C, 1, 1]; None where there is none. ValueError where std is not positive."""
    if values is None:
        return None
    values = torch.as_tensor(values, dtype=torch.float32, device=device).reshape(-1)
    if name == "std" and not bool((values > 0).all()):
        raise ValueError(f"Source: std must be > 0, got {values.tolist()}")
    return values.view(1, -1, 1, 1)
