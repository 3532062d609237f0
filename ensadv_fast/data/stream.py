"""Batches for training and evaluation: from memory or from files, on the device, augmented there."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import checks
from ..ops.keys import derive_seed
from ..system.streams import SideStream
from .augment import Augment
from .folder import FolderSplit, cut_middle
from .loading import Loader
from .sampler import Sampler, upload
from .sets import ImageSplit, Split

LEAST_LIMIT = 10  # corrupt images that are tolerated in any set, where max_corrupt is a share
MOST_NAMED = 100  # corrupt images that are kept with their reasons


class CorruptImages(RuntimeError):
    """More images could not be decoded than max_corrupt allows."""


class Stream:
    """The batches of a split in a sampler's order, on the device.

    Iterating yields the rest of the current epoch: (x, y, index), images float32 in [0, 1] [B, C, H, W], labels
    int64 [B] and positions in the split int64 [B], and then moves to the next epoch. `state_dict` taken after a batch
    describes the position right behind it, whatever was decoded ahead. Which images come in which batch, and all
    their pixels, are a function of (seed, epoch, position in the split, augment) alone: the same for any number of
    workers and ranks, and any prefetch.

    A :class:`Split` in memory lies on the device. The files of a :class:`FolderSplit` are decoded by `workers`
    processes, each up to `prefetch` batches ahead, also into the next epoch. On CUDA their images come by way of pinned
    memory, one batch ahead on a stream of its own. Images are uint8 until they are augmented; one pass makes them
    floats.

    A file that cannot be decoded is left out, so its batch is smaller (it may be empty). It is counted in `corrupt` and
    named in `skipped`; in one epoch at most `limit` are tolerated. Pixels depend on the installed versions of Pillow
    and libjpeg, and on nothing else of the machine.

    Args:
        split: of `data.load`.
        sampler: over the split's samples, of this rank. With train=False its order is 0..n-1.
        device: of the batches.
        seed: of the augmentation; alike on all ranks.
        augment: what is done to images at random; None: nothing, and files give the square in their middle.
        workers: processes that decode files; 0 decodes in this one. Memory splits need none.
        prefetch: batches that each worker is ahead; at most workers * prefetch lie in memory, and two on the device.
        channels_last: memory format of x; otherwise contiguous.
        max_corrupt: corrupt images that are tolerated in one epoch: a share of the split in [0, 1] (float; never fewer
            than 10 images), or a number (int). Each rank counts its own; the epoch's number is the sum over ranks.
        train: False is for evaluation: all samples in their order, shared out over ranks, without augmentation.

    Attributes:
        skipped: path -> reason, of the first 100 corrupt files met.
        corrupt: corrupt images that this rank met in this epoch; in a resumed epoch, since it was resumed.
        global_size: samples in the last global batch, over all ranks, the corrupt ones counted.

    Raises:
        TypeError, ValueError: naming the argument. Iterating raises CorruptImages beyond the limit, and RuntimeError
        where a worker died. Either ends the processes, as :meth:`close` and leaving `with Stream(...) as stream` do.
    """

    def __init__(self, split: ImageSplit, sampler: Sampler, *, device: torch.device | str, seed: int,
                 augment: Augment | None = None, workers: int = 0, prefetch: int = 2, channels_last: bool = False,
                 max_corrupt: float | int = 0.001, train: bool = True) -> None:
        if not isinstance(split, (Split, FolderSplit)):
            raise TypeError(f"Stream: split must be a Split or a FolderSplit, got {type(split).__name__}")
        if len(split) != sampler.n:
            raise ValueError(f"Stream: sampler must be over the split's {len(split)} samples, got n={sampler.n}")
        checks.integer("Stream", "workers", workers, 0)
        checks.integer("Stream", "prefetch", prefetch, 1)
        most = 1 if isinstance(max_corrupt, float) else len(split)
        if isinstance(max_corrupt, bool) or not 0 <= max_corrupt <= most:
            raise ValueError(f"Stream: max_corrupt must be a share in [0.0, 1.0] or a number of the {len(split)} "
                             f"images, got {max_corrupt!r}")
        if not train and augment is not None:
            raise ValueError(f"Stream: augment must be None with train=False, got {augment}")
        if augment is not None:
            augment.check(*([split.resize] * 2 if isinstance(split, FolderSplit) else split.in_shape[1:]))
        self.device, self.seed, self.augment, self.channels_last = torch.device(device), seed, augment, channels_last
        self.limit = max(LEAST_LIMIT, int(max_corrupt * len(split))) if isinstance(max_corrupt, float) else max_corrupt
        if not train and (sampler.shuffle or sampler.drop_last):
            sampler = Sampler(sampler.n, sampler.batch_size, sampler.seed, rank=sampler.rank, world=sampler.world,
                              shuffle=False)
        self.sampler = sampler
        self.corrupt, self.global_size = 0, 0
        self.skipped: dict[str, str] = {}
        self._counted_epoch = sampler.epoch  # the epoch that `corrupt` is of
        self._in_shape = split.in_shape
        self._key = ops.fresh_key(self.device, derive_seed(seed, "augment"))
        self._mean, self._std = (fill(split.in_shape[0], device=self.device) for fill in (torch.zeros, torch.ones))
        self._source: _Memory | _Files
        if isinstance(split, Split):
            self._source = _Memory(split, sampler, self.device)
        else:
            self._source = _Files(split, sampler, self.device, workers=workers, prefetch=prefetch, endless=train)

    @property
    def epoch(self) -> int:
        """The epoch of the batch last yielded; once all batches of its epoch are yielded, the next one."""
        return self.sampler.epoch

    def __len__(self) -> int:
        """Global batches in one epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        sampler, epoch = self.sampler, self.sampler.epoch
        if self._counted_epoch != epoch:
            self._counted_epoch, self.corrupt = epoch, 0
        key = self._key.clone()
        key[1].fill_(epoch)
        for batch in self._source.batches():
            self._count(batch.corrupt)
            x = self.prepare(batch.images, key, batch.ids)
            sampler.position, self.global_size = batch.stop, batch.stop - batch.start
            yield x, batch.labels, batch.ids
        sampler.next_epoch()

    def _count(self, corrupt: dict[str, str]) -> None:
        """Take note of a batch's corrupt files. Raises CorruptImages, all processes ended, beyond the limit."""
        self.corrupt += len(corrupt)
        self.skipped |= list(corrupt.items())[:MOST_NAMED - len(self.skipped)]
        if self.corrupt > self.limit:
            self.close()
            few = "; ".join(f"{path} ({reason})" for path, reason in list(corrupt.items())[-5:])
            raise CorruptImages(f"Stream: {self.corrupt} images of epoch {self.sampler.epoch} cannot be decoded, at "
                                f"most {self.limit} are tolerated (max_corrupt), the last of them: {few}")

    def prepare(self, images: Tensor, key: Tensor, index: Tensor) -> Tensor:
        """A batch's x of images uint8 [B, C, H, W] as they are in memory or decoded, and their positions [B].

        key: int64 [2], (the augmentation's seed, the epoch).
        """
        if self.augment is not None:
            images = self.augment(images, key, index)
        elif images.shape[1:] != self._in_shape:
            images = cut_middle(images, self._in_shape[1])
        return ops.model_entry(images, self._mean, self._std, channels_last=self.channels_last)

    def state_dict(self) -> dict[str, int]:
        """The position right behind the batch last yielded, and the seeds: plain numbers, alike on all ranks."""
        return {**self.sampler.state_dict(), "augment_seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken, with any number of ranks and workers. Raises ValueError for other seeds or
        another number of samples."""
        if state["augment_seed"] != self.seed:
            raise ValueError(f"Stream: the saved position is of seed={state['augment_seed']}, this stream has "
                             f"seed={self.seed}")
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """End the processes and wait for them. Iterating again starts new ones."""
        self._source.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Batch(NamedTuple):
    """This rank's part of the global batch [start, stop) of an epoch, on the device."""

    epoch: int
    start: int
    stop: int
    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor
    ids: Tensor
    corrupt: dict[str, str]  # path -> reason, of the samples that are left out of the tensors above


class _Memory:
    """The rest of the sampler's epoch from images that lie on the device."""

    def __init__(self, split: Split, sampler: Sampler, device: torch.device) -> None:
        self.split, self.sampler, self.device = split.to(device), sampler, device

    def batches(self) -> Iterator[_Batch]:
        epoch = self.sampler.epoch
        order = upload(self.sampler.order(epoch), self.device)  # one copy an epoch, none a batch
        for start, stop in self.sampler.spans(self.sampler.position):
            ids = self.sampler.share(order, start, stop)
            yield _Batch(epoch, start, stop, self.split.images[ids], self.split.labels[ids], ids, {})

    def close(self) -> None:
        """Do nothing: no process is open."""


class _Files:
    """The rest of the sampler's epoch from files that a :class:`Loader` decodes."""

    def __init__(self, split: FolderSplit, sampler: Sampler, device: torch.device, *, workers: int, prefetch: int,
                 endless: bool) -> None:
        self.split, self.sampler, self.device = split.to(device), sampler, device
        cuda = device.type == "cuda"
        self.loader = Loader(split, sampler, workers=workers, prefetch=prefetch, pinned=cuda, endless=endless)
        self.side = SideStream(device) if cuda else None
        self.ahead: _Batch | Exception | None = None

    def batches(self) -> Iterator[_Batch]:
        tasks = [(self.sampler.epoch, *span) for span in self.sampler.spans(self.sampler.position)]
        for task, following in itertools.zip_longest(tasks, tasks[1:]):
            batch, self.ahead = self.ahead, None
            if isinstance(batch, Exception):
                raise batch
            if batch is None or batch[:3] != task:
                batch = self.send(task)
            if self.side is not None:
                self.side.hand_over((batch.images, batch.labels, batch.ids))
                if following is not None:
                    try:
                        self.ahead = self.send(following)
                    except Exception as e:  # noqa: BLE001 - to be raised with the next batch, not with this one
                        self.ahead = e
            yield batch

    def send(self, task: tuple[int, int, int]) -> _Batch:
        """Start a batch on its way to the device. The host does not wait for it."""
        loaded = self.loader.take(task)
        ids = torch.tensor([i for i in loaded.task.ids if i not in loaded.corrupt], dtype=torch.int64, device="cpu")

        def copies() -> tuple[Tensor, Tensor, Tensor]:
            there = upload(ids, self.device)
            return upload(loaded.images, self.device), self.split.labels[there], there

        return _Batch(*task, *(copies() if self.side is None else self.side.issue(copies)),
                      {self.split.path(i): reason for i, reason in loaded.corrupt.items()})

    def close(self) -> None:
        self.ahead = None
        self.loader.close()
