"""Images in folders, one folder a class: ImageNet's layout."""
from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decode import need_pillow, try_decode
from .sets import Dataset

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SAMPLE, FIRST = 256, 1 << 16  # files whose contents tell a folder from others, and how many bytes of each
SIZE = 224  # the default height and width of the images that networks take


class FolderSplit:
    """Image files and their labels, decoded when they are asked for: root/CLASS/**/NAME.jpeg and the like.

    A file gives the square in its middle, resized to `resize` pixels a side (uint8). Batches show the `size` pixels in
    the middle of that square; training crops it at random (:class:`Augment`). The files' names are kept as bytes in two
    tensors, which loading processes share.

    labels: int64 [N], on the split's device. size, resize: pixels.
    """

    def __init__(self, root: str | Path, classes: Sequence[str], size: int, resize: int) -> None:
        """List the files of these class folders, in the order of their names.

        An empty or absent class folder has no samples. Raises ValueError where there are no samples at all.
        """
        self.root, self.size, self.resize = os.fspath(root), size, resize
        names: list[bytes] = []
        counts = []
        for name in classes:
            before = len(names)
            names += (os.fsencode(os.path.join(name, inside)) for inside in _list_images(os.path.join(self.root, name)))
            counts.append(len(names) - before)
        if not names:
            raise ValueError(f"data: {self.root}: no images ({', '.join(EXTENSIONS)}) in {len(counts)} class folders")
        self.device = torch.device("cpu")
        self.labels = torch.repeat_interleave(torch.arange(len(counts), device="cpu"),
                                              torch.tensor(counts, device="cpu"))
        self._names = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        self._ends = torch.tensor([len(n) for n in names], device="cpu").cumsum(0)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(3, size, size): of an image as it comes in a batch."""
        return 3, self.size, self.size

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, i: int) -> str:
        """The file of sample i."""
        start = int(self._ends[i - 1]) if i else 0
        return os.path.join(self.root, os.fsdecode(self._names[start:int(self._ends[i])].numpy().tobytes()))

    def contents(self) -> list[Any]:
        """Names and labels of all files; size and first bytes of `SAMPLE` of them, evenly spread."""
        some = range(0, len(self), -(-len(self) // SAMPLE))
        begin = [_first_bytes(self.path(i)) for i in some]
        return [self._names, self._ends, self.labels, self.size, self.resize, begin]

    def to(self, device: torch.device | str) -> FolderSplit:
        """The split whose batches are on `device`."""
        moved = copy.copy(self)
        moved.labels, moved.device = self.labels.to(device), torch.device(device)
        return moved

    def pixels(self, index: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        """The samples that can be decoded, uint8 [B, 3, resize, resize] channels_last on the CPU, and for each of the
        others the reason why not."""
        images = np.empty((len(index), self.resize, self.resize, 3), np.uint8)
        corrupt: dict[int, str] = {}
        row = 0
        for i in index:
            image = try_decode(self.path(i), self.resize)
            if isinstance(image, str):
                corrupt[i] = image
            else:
                images[row] = image
                row += 1
        return torch.from_numpy(images[:row]).permute(0, 3, 1, 2), corrupt

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `index` (int64 [B]), decoded in this process: images float32 in [0, 1] [B, 3, size, size]
        and labels [B]. Raises ValueError, naming the file, for one that cannot be decoded."""
        images, corrupt = self.pixels(index.tolist())
        for i, reason in corrupt.items():
            raise ValueError(f"data: {self.path(i)} cannot be decoded ({reason})")
        index = index.to(self.device)
        return cut_middle(images.to(self.device), self.size).float().div_(255), self.labels[index]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All samples in their order, `size` at a time, decoded in this process: (images float32 in [0, 1], labels,
        index). :class:`ensadv_fast.data.Stream` decodes in many processes, and leaves out corrupt files."""
        for index in torch.arange(len(self), device=self.device).split(size):
            yield *self.batch(index), index


def _first_bytes(path: str) -> tuple[int, str] | None:
    """(size, SHA-256 of the first bytes) of a regular file; None of anything else, which is never opened."""
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as f:
            return os.fstat(f.fileno()).st_size, hashlib.sha256(f.read(FIRST)).hexdigest()
    except OSError:
        return None


def cut_middle(images: Tensor, size: int) -> Tensor:
    """The `size` x `size` pixels in the middle of images [B, C, H, W], channels_last."""
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[..., top:top + size, left:left + size].contiguous(memory_format=torch.channels_last)


def _list_images(folder: str) -> list[str]:
    """Paths of the images under a folder, relative to it, sorted. Hidden files and folders are left out."""
    found = []
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # A link that leads nowhere is a damaged file, which will be named. A pipe or a device is none.
        if entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink() and not entry.is_dir()):
            found.append(entry.name)
        elif entry.is_dir():
            found += (os.path.join(entry.name, inside) for inside in _list_images(entry.path))
    return sorted(found)


def class_names(root: Path) -> list[str]:
    """The sorted names of a split's class folders."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def image_folder(name: str, folder: str | Path, size: int | None = None, resize: int | None = None) -> Dataset:
    """A data set in ImageNet's layout: folder/train/CLASS/*.jpeg and folder/val/CLASS/*.jpeg (or test/ for val/).

    A label is the place of its folder's name among the sorted names in train/. Images are recognised by their
    extensions, also in folders below a class's, and opened only when they are asked for. Needs Pillow.

    name: "imagenet" requires 1,000 classes, so that labels mean what published networks mean by them. size: height and
    width of the images that networks take; default 224. resize: to how many pixels a side the square in a file's middle
    is resized; default 256 for size 224, and in proportion.

    Raises FileNotFoundError, ValueError (no images, classes that do not fit), ImportError.
    """
    need_pillow()
    root = Path(folder).expanduser()
    size = SIZE if size is None else size
    resize = round(size * 256 / 224) if resize is None else resize
    if not 1 <= size <= resize:
        raise ValueError(f"data: {name}: size and resize must be 1 <= size <= resize, got size={size}, resize={resize}")
    train, test = root / "train", root / "val"
    if not test.is_dir() and (root / "test").is_dir():
        test = root / "test"
    for part in (train, test):
        if not part.is_dir():
            raise FileNotFoundError(f"data: {name} not found: there must be {part}/CLASS/*.jpeg (or .png, .webp ...)")
    classes = class_names(train)
    if name == "imagenet" and len(classes) != 1000:
        raise ValueError(f"data: {train} must have ImageNet's 1000 class folders, got {len(classes)}: another set of "
                         f"images is imagefolder:{folder}")
    _check_classes(train, test, classes)
    splits = [FolderSplit(part, classes, size, resize) for part in (train, test)]
    counts = torch.bincount(splits[0].labels, minlength=len(classes))
    if empty := [c for c, count in zip(classes, counts.tolist(), strict=True) if not count]:
        raise ValueError(f"data: {train}: no images of {len(empty)} classes: {', '.join(empty[:5])}")
    return Dataset(name, splits[0], splits[1], len(classes))


def _check_classes(train: Path, test: Path, classes: list[str]) -> None:
    """Raise ValueError unless the test images are in folders of the training classes."""
    if unknown := [c for c in class_names(test) if c not in set(classes)]:
        raise ValueError(f"data: {test}: class folders that {train} has not: {', '.join(unknown[:5])}")
    if not class_names(test) and _list_images(str(test)):
        raise ValueError(f"data: {test} has images but no class folders: move them into {test}/CLASS/")
