"""Finding and reading the files of a data set."""
from __future__ import annotations

import gzip
import zlib
from pathlib import Path


def read(path: Path) -> bytes:
    """The whole file, unpacked if its name ends in .gz. Raises ValueError where the packing is broken."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"data: {path} is truncated or corrupt ({e})") from e


def candidate_folders(name: str, folder: str | Path | None, inside: tuple[str, ...]) -> list[Path]:
    """Where to look for a data set: the folder given, or the usual ones, and their usual subfolders."""
    roots = [Path(folder).expanduser()] if folder else [
        Path("data") / name, Path("~/.cache/ensadv_fast").expanduser() / name, Path("/usr/share/datasets") / name]
    return [root / sub for root in roots for sub in ("", *inside)]


def missing_error(name: str, files: str, looked: list[Path]) -> FileNotFoundError:
    """The error to raise where none of the folders holds the data set. files: what it consists of."""
    return FileNotFoundError(f"data: {name} not found: it consists of {files}; looked in "
                             f"{', '.join(map(str, looked))}. Give the folder as --data {name}:DIR")
