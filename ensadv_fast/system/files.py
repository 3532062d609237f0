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

    Where that fails, the temporary file is removed and what was at `path` before is untouched. Raises whatever `write`
    raises; where the disk is full, an OSError that says so and names `path`.
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
        full = _find_full_disk(e)
        if full is None:
            raise
        raise OSError(full.errno, f"the disk is full: {path} could not be written. What was there before is "
                      "untouched: free some space and go on with --resume", str(path)) from e
    flush_folder(path.parent)


def _find_full_disk(e: BaseException | None) -> OSError | None:
    """The error of a full disk among those that led to `e`, or None. torch's writer raises an error of its own from
    it."""
    while e is not None and not (isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)):
        e = e.__cause__ or e.__context__
    return e


def flush_folder(folder: Path) -> None:
    """Write the folder itself to the disk, and with it the names of new files."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, body: Any, indent: int | None = 2) -> None:
    """Write `body` as strict JSON, atomically. indent: None for one line. Raises ValueError for NaN and infinities."""
    text = json.dumps(body, indent=indent, allow_nan=False) + "\n"
    atomic_write(path, lambda f: f.write(text.encode()))


def digest(state: Any) -> str:
    """SHA-256 in hex of nested dicts, lists and tuples of tensors and plain values.

    It is that of the contents, whatever file they are saved in.
    """
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
