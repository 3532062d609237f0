"""Keys: where randomness comes from.

A key is an int64 tensor [2] = (seed, offset). An op that draws random numbers takes a key as an argument and is a
function of that key; it never draws from torch's generators. Callers that give no key get one from :func:`next_key`,
the package's own stream of keys.
"""
from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from . import checks
from . import reference as ref
from .library import register_fake

_streams: dict[torch.device, Tensor] = {}
_seed: int | None = None


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def fresh_key(device: torch.device | str = "cpu", seed: int | None = None) -> Tensor:
    """A new key (seed, offset), int64 [2], on `device`.

    With `seed` (any int, of which the low 64 bits are used) the key is (seed, 0). Without a seed, the key is the next
    of the package's own stream for that device, which :func:`manual_seed` resets.
    """
    if seed is None:
        return next_key(device)
    return torch.tensor([_signed(checks.integer("fresh_key", "seed", seed)), 0], dtype=torch.int64, device=device)


def next_key(device: torch.device | str) -> Tensor:
    """The next key of the package's stream for `device`; no synchronisation."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with torch.inference_mode(False):  # the stream's state is used again later, in any mode
        if device not in _streams:
            seed = torch.initial_seed() if _seed is None else _seed
            _streams[device] = torch.tensor([_signed(seed), 0], dtype=torch.int64, device=device)
        key = _streams[device].clone()
        _streams[device][1] += 1
    return key


def manual_seed(seed: int) -> None:
    """Restart the package's key stream of every device at `seed`."""
    global _seed
    _seed = checks.integer("manual_seed", "seed", seed)
    _streams.clear()


def split(key: Tensor, n: int = 2) -> Tensor:
    """n independent keys, int64 [n, 2], from one; unpack them: ``a, b = split(key, 2)``.

    Child i is the Philox block with counter (i low, i high, offset low, offset high) under the key's seed with
    "SPLT" xor-ed into its upper word: words 0 and 1 are the child's seed, words 2 and 3 shifted right by two bits
    its offset.
    """
    n = checks.integer("split", "n", n, least=0)
    key = checks.key("split", key, key.device if isinstance(key, Tensor) else torch.device("cpu"))
    out = torch.empty(n, 2, dtype=torch.int64, device=key.device)
    torch.ops.ensadv_fast.split_key.default(key, out)
    return out


def split_reference(key: Tensor, n: int = 2) -> Tensor:
    """:func:`split` in plain PyTorch."""
    i = torch.arange(n, device=key.device)
    words = ref.draw(torch.stack([key[0] ^ (0x53504C54 << 32), key[1]]), *ref.halves(i))
    seed = words[:, 1] << 32 | words[:, 0]
    offset = (words[:, 3] >> 2) << 32 | (words[:, 3] << 30 | words[:, 2] >> 2) & 0xFFFFFFFF
    return torch.stack([seed, offset], dim=1)


register_fake("split_key")


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that is a fixed function of `parts`: the same on every machine, rank and version."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
