"""Files that are either whole or not there."""
from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then put it in place in one step.

    Where that fails nothing is left of it, and what was at `path` before is untouched; OSError says so where the disk
    is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        full = _full_disk(e)
        if full is None:
            raise
        raise OSError(full.errno, f"the disk is full: {path} could not be written. What was there before is "
                      "untouched: free some space and go on with --resume", str(path)) from e
    _flush_folder(path.parent)


def _full_disk(e: BaseException | None) -> OSError | None:
    """The error of a full disk among those that led to this one: torch's writer puts one of its own on top."""
    while e is not None and not (isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)):
        e = e.__cause__ or e.__context__
    return e


def _flush_folder(folder: Path) -> None:
    """A new name is on the disk once its folder is."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
