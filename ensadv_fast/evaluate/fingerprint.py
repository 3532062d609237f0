"""What a result was computed from, in a few bytes: fingerprints of models, attacks, images and batches."""
from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.memory import widen
from ..sources.ensemble import Ensemble
from ..sources.source import Source
from ..system import files
from .code import FUNCTIONS, beside_state, code_of, plain_repr

ELEMENTS = 1 << 18  # elements of images whose checksums are made together, which bounds the memory for them


def describe(value: Any) -> Any:
    """`value` as JSON holds it: names and parameters of dataclasses and other objects, digests of tensors and models.

    Any other object is described by its class and attributes, and one without attributes by its repr without addresses.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return {"shape": list(value.shape), "sha256": files.digest(torch.as_tensor(value))}
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, Source):
        # Its memory format is left out: it may change at the first forward pass, and changes nothing but roundings.
        return {"class": "Source", "crafting": value.crafting, "dtype": str(value.dtype), "fold": value.fold,
                "live": value.live, "mean": describe(value.mean), "std": describe(value.std),
                "model": describe(value.module)}
    if isinstance(value, Ensemble):
        return {"class": "Ensemble", "fuse": value.fuse, "weights": describe(value._weights[torch.float64]),
                "sources": [describe(s) for s in value.sources]}
    if isinstance(value, nn.Module):
        state = dict(itertools.chain(value.named_parameters(), value.named_buffers()))
        described = {"class": type(value).__qualname__, "layers": fingerprint(plain_repr(value)),
                     "sha256": files.digest(state)}
        beside = beside_state(value)
        return {**described, "beside": fingerprint(beside)} if beside else described
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__qualname__, **{f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, FUNCTIONS) and (code := code_of(value)) is not None:
        return {"function": getattr(value, "__qualname__", ""), "code": fingerprint(code)}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if getattr(value, "__dict__", None):
        return {"class": type(value).__qualname__, **describe(vars(value))}
    return plain_repr(value)


def fingerprint(*values: Any) -> str:
    """32 hexadecimal digits of SHA-256 over :func:`describe`."""
    text = json.dumps(describe(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def image_checksums(x: Tensor) -> Tensor:
    """int64 [N] on x's device: for each sample the sum, modulo 2^64, of its elements' bits as float32 (float64 for
    float64 x), each times an odd weight of its place.

    uint8 images have the checksum of their levels / 255. The checksum guards against mistakes, not against forgery. It
    is the same for any batch size, memory format and device, and costs no synchronisation.
    """
    elements = x.shape[1:].numel()
    place = torch.arange(elements, device=x.device)
    weights = (place * -7046029254386353131).bitwise_xor((place + 1) << 31).bitwise_or(1)
    parts = []
    for part in x.detach().split(max(1, ELEMENTS // max(1, elements))):
        wide = widen(part).contiguous().flatten(1)
        bits = wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32)
        parts.append((bits * weights).sum(1))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=x.device)
