"""Finding and reading the files of a data set."""
from __future__ import annotations

import gzip
import zlib
from pathlib import Path

CHUNK = 1 << 20
MOST_PACKED = 1032  # deflate packs no more bytes than this into one


def read(path: Path, most: int) -> bytearray:
    """The first `most` bytes of a file, or all where there are fewer, unpacked if its name ends in .gz. No more is
    unpacked, so that a small file cannot fill the memory.

    Raises ValueError where the packing is broken, and for what is no regular file, which is not opened.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"data: {path} must be a regular file")
    found = bytearray()
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
            while len(found) < most and (part := f.read(min(CHUNK, most - len(found)))):
                found += part
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"data: {path} is truncated or corrupt ({e})") from e
    return found


def most_bytes(path: Path) -> int:
    """How many bytes `read` may find at most in a file of this size."""
    size = path.stat().st_size
    return size * MOST_PACKED if path.suffix == ".gz" else size


def candidate_folders(name: str, folder: str | Path | None, inside: tuple[str, ...]) -> list[Path]:
    """Where to look for a data set: the folder given, or the usual ones, and their usual subfolders."""
    roots = [Path(folder).expanduser()] if folder else [
        Path("data") / name, Path("~/.cache/ensadv_fast").expanduser() / name, Path("/usr/share/datasets") / name]
    return [root / sub for root in roots for sub in ("", *inside)]


def missing_error(name: str, files: str, looked: list[Path]) -> FileNotFoundError:
    """The error to raise where none of the folders holds the data set. files: what it consists of."""
    return FileNotFoundError(f"data: {name} not found: it consists of {files}; looked in "
                             f"{', '.join(map(str, looked))}. Give the folder as --data {name}:DIR")
