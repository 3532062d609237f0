"""Files that are either whole or not there: atomic writes, and checkpoints that know their own SHA-256."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then put it in place in one step."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path: Path, body: Any, indent: int | None = 2) -> None:
    """`body` as strict JSON (ValueError for NaN and infinities), atomically. indent: None for one line."""
    text = json.dumps(body, indent=indent, allow_nan=False) + "\n"
    atomic_write(path, lambda f: f.write(text.encode()))


def digest(state: Any) -> str:
    """SHA-256 of nested dicts, lists and tuples of tensors and plain values: of the contents, not of the file."""
    h = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            t = value.detach().cpu().contiguous()
            h.update(f"{t.dtype}{list(t.shape)};".encode())
            h.update(t.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            h.update(f"dict{len(value)};".encode())
            for k, v in value.items():
                feed(k)
                feed(v)
        elif isinstance(value, (list, tuple)):
            h.update(f"list{len(value)};".encode())
            for v in value:
                feed(v)
        else:
            h.update(f"{value!r};".encode())

    feed(state)
    return h.hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` with its digest, atomically. It is an ordinary torch.save file of tensors and plain values."""
    atomic_write(path, lambda f: torch.save({**state, "sha256": digest(state)}, f))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU, without running any code in it (weights_only=True).

    Raises FileNotFoundError, and ValueError naming the file where it is truncated, altered or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        wanted = state.pop("sha256")
    except Exception as e:  # a damaged zip or pickle raises almost anything
        raise ValueError(f"checkpoint: {path} is corrupt or no checkpoint of ensadv-fast ({type(e).__name__}: {e}); "
                         "delete it to train this model again") from e
    if digest(state) != wanted:
        raise ValueError(f"checkpoint: {path} is corrupt: its contents do not match their SHA-256; "
                         "delete it to train this model again")
    return state
