"""Augmentation on the device: a function of (key, sample index) alone."""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import checks

CROPS = ("random", "resized", "pad", "center")
_CACHED = 1 << 20  # pixels of results that a CPU makes at a time: intermediate results then stay in its cache
_DRAWS = 5  # numbers drawn for each sample, used or not: row, column, flip, area, shape


@dataclass(frozen=True)
class Augment:
    """Random crops and mirror images of uint8 images: `augment(x, key, index)`, for a whole batch at once.

    What happens to an image is a function of (key, its index in the data set): the same in any batch, on any rank and
    with any number of loading processes. Nothing waits on the host. The result is uint8, as the images are.

    Args:
        size: height and width of the result.
        crop: what the result shows. "random": a square of that size at a random place. "pad": the same from the
            image with `padding` zeros around it (He et al. 2016, section 4.2). "resized": a part of random area and
            shape, resized bilinearly (Szegedy et al. 2015, section 6): its area is uniform in `scale` of the image's,
            the logarithm of its width over its height uniform in that of `ratio`; a side that would be longer than the
            image's is cut to it. "center": the square in the middle.
        padding: zeros on every side; only "pad" uses it.
        flip: mirror left and right with probability 1/2.
        scale, ratio: (lowest, highest); only "resized" uses them.

    Raises:
        TypeError, ValueError: naming the argument, what is wanted and what came.
    """

    size: int
    crop: str = field(default="random", kw_only=True)
    padding: int = field(default=4, kw_only=True)
    flip: bool = field(default=True, kw_only=True)
    scale: tuple[float, float] = field(default=(0.08, 1.0), kw_only=True)
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), kw_only=True)

    def __post_init__(self) -> None:
        checks.choice("Augment", "crop", self.crop, CROPS)
        checks.integer("Augment", "size", self.size, 1)
        checks.integer("Augment", "padding", self.padding, 0)
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise ValueError(f"Augment: {name} must be 0 < lowest <= highest <= {most}, got ({low}, {high})")

    def check(self, height: int, width: int) -> None:
        """Raise ValueError where images of this size have no such crop."""
        around = 2 * self.padding if self.crop == "pad" else 0
        if self.crop != "resized" and min(height, width) + around < self.size:
            raise ValueError(f"Augment: size: a crop of {self.size} cannot be taken from images of {height} x {width}"
                             + (f" with {self.padding} zeros around them" if around else ""))

    @torch.no_grad()
    def __call__(self, x: Tensor, key: Tensor, index: Tensor) -> Tensor:
        """Augmented images uint8 [B, C, size, size], channels_last.

        x: uint8 [B, C, H, W]. key: int64 [2]. index: the images' positions in the data set, int64 [B], each in
        [0, 2^32). All are on one device.
        """
        if x.dtype != torch.uint8 or x.dim() != 4:
            raise ValueError(f"Augment: x must be uint8 [B, C, H, W], got {x.dtype} {tuple(x.shape)}")
        self.check(*x.shape[2:])
        most = max(1, _CACHED // self.size**2)
        if x.device.type == "cpu" and len(x) > most:
            parts = zip(x.split(most), index.split(most), strict=True)
            return torch.cat([self(images, key, ids) for images, ids in parts])
        row, column, flip, area, shape = _draw_uniform(len(x), key, index).unbind(1)
        mirrored = (flip < 0.5) if self.flip else torch.zeros_like(flip, dtype=torch.bool)
        x = x.permute(0, 2, 3, 1)  # whole rows and pixels are picked
        if self.crop == "resized":
            return self._resize(x, row, column, mirrored, area, shape)
        if self.crop == "pad" and self.padding:
            x = F.pad(x, [0, 0, *[self.padding] * 4])
        height, width = x.shape[1:3]
        if self.crop == "center":
            row, column = (torch.full_like(row, 0.5) for _ in range(2))
        # Each place 0..height - size is equally likely; the middle is rounded down.
        free = height - self.size, width - self.size
        spread = 0 if self.crop == "center" else 1
        top, left = ((u * (f + spread)).floor().long() for u, f in zip((row, column), free, strict=True))
        at = torch.arange(self.size, device=x.device)
        rows, columns = top[:, None] + at, left[:, None] + _mirror(at, mirrored)
        return _pick_columns(_pick_rows(x, rows), columns).permute(0, 3, 1, 2)

    def _resize(self, x: Tensor, row: Tensor, column: Tensor, mirrored: Tensor, area: Tensor, shape: Tensor) -> Tensor:
        """Images [B, H, W, C] as "resized" says: uint8 [B, C, size, size]."""
        height, width = x.shape[1:3]
        pixels = (self.scale[0] + area * (self.scale[1] - self.scale[0])) * (height * width)
        low, high = map(math.log, self.ratio)
        ratio = (low + shape * (high - low)).exp()
        w = (pixels * ratio).sqrt().round().clamp(1, width)
        h = (pixels / ratio).sqrt().round().clamp(1, height)
        at = torch.arange(self.size, device=x.device)
        rows, down = _find_neighbours(at, h, (row * (height - h + 1)).floor(), self.size)
        columns, right = _find_neighbours(_mirror(at, mirrored), w, (column * (width - w + 1)).floor(), self.size)
        # Each product and sum is rounded once, so all devices give the same bits; a fused interpolation would not.
        above, below = (_pick_rows(x, r).float() for r in rows)
        mixed = _mix(above, below, down[:, :, None, None])
        before, after = (_pick_columns(mixed, c) for c in columns)
        mixed = _mix(before, after, right[:, None, :, None])
        return mixed.round_().to(torch.uint8).permute(0, 3, 1, 2)


def _draw_uniform(n: int, key: Tensor, index: Tensor) -> Tensor:
    """Numbers uniform in (0, 1), float64 [n, _DRAWS]: (2 i + 1) / 2^25, i being the 24 bits of `ops.random_step`."""
    unit = ops.random_step(torch.zeros(n, _DRAWS, device=index.device), key, 1.0, kind="uniform", index=index,
                           clip=False)
    return (unit.double() + 1) / 2


def _mirror(at: Tensor, mirrored: Tensor) -> Tensor:
    """The columns 0..size-1, backwards where a sample is mirrored: [B, size]."""
    return torch.where(mirrored[:, None], at.flip(0), at)


def _find_neighbours(at: Tensor, length: Tensor, start: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """Resizing the pixels [start, start + length) of a side to `size` pixels: what each new pixel lies between.

    at: the new pixels, 0..size-1 in the order wanted. Returns the two old pixels beside each, int64 [B, size] each, and
    its distance from the first, float32 [B, size].
    """
    where = ((at + 0.5) * length[:, None] / size - 0.5).clamp(min=0)
    first = torch.minimum(where.floor(), length[:, None] - 1)
    second = torch.minimum(first + 1, length[:, None] - 1)
    return [(start[:, None] + t).long() for t in (first, second)], (where - first).float()


def _pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows [B, R] of images [B, H, W, C], each image's own: [B, R, W, C]."""
    at = _count_by(len(x), x.shape[1], rows) + rows
    return x.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, rows.shape)


def _pick_columns(x: Tensor, columns: Tensor) -> Tensor:
    """The columns [B, R] of images [B, H, W, C], each image's own: [B, H, R, C].

    Whole pixels are picked, which is several times as fast as picking numbers.
    """
    b, h, w, c = x.shape
    at = _count_by(b * h, w, columns).view(b, h, 1) + columns[:, None, :]
    return x.reshape(b * h * w, c).index_select(0, at.flatten()).view(b, h, columns.shape[1], c)


def _count_by(n: int, step: int, like: Tensor) -> Tensor:
    """0, step, 2 step ... (n numbers) on `like`'s device: int64 [n, 1]."""
    return torch.arange(0, n * step, step, device=like.device)[:, None]


def _mix(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    """a + (b - a) part, written into b."""
    return b.sub_(a).mul_(part).add_(a)
