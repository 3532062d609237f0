"""Adversarial sets: what one attack crafted on one source, saved once, shared, and shown to any target later.

A set is a folder. Each batch that was crafted is a shard: a safetensors file, a format that runs no code and is read by
slices. For its n examples it holds

    x_adv     [n, ...]   uint8 levels, or float32, in [0, 1]
    labels    int64 [n]  the true labels
    index     int64 [n]  positions in the data set
    checksums int64 [n]  of the clean images (`fingerprint.image_checksums`)
    counted   uint8 [n]  bit 0: the source had the clean image right and this one wrong (the condition of Kurakin's
                         transfer rate); bit 1: the same by top-5

and manifest.json, written last, says what the set is:

    {"format", "source": {"name", "sha256": its fingerprint, "description"}, "attack": {"name", ...all its fields},
     "eps", "norm", "key": the seed of the noise, "data": what the caller calls the data set, "dtype",
     "shape": of an image, "n", "cell": fingerprint of source, attack and key, "versions",
     "shards": [{"file", "n", "sha256", "batch": digest of the clean batch}], "sha256": of all the rest}
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..ops.memory import widen
from ..system import files
from .loader import Batch

FORMAT = "ensadv_fast adversarial set, version 1"
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
ABOUT = "ensadv_fast"  # the only metadata entry: safetensors writes several in any order, and files must not differ
PARTS = ("x_adv", "labels", "index", "checksums", "counted")
SLACK = 255 * 2.0**-24  # levels: the rounding of float32 by which a budget in [0, 1] may be exceeded


def to_levels(x_adv: Tensor, x: Tensor, eps: float | None, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """uint8 levels nearest to x_adv among those that keep the budget: |level / 255 - x| <= eps + 2^-24 in float64.

    x_adv, x: [N, ...], float or (x alone) uint8 levels; lo, hi: the box. eps: of an L-inf budget in image units. None:
    no element moves further from x than x_adv has, which keeps a budget of any norm. ValueError where an element has no
    such level, which happens only where clean images are between levels and the budget is below half a level.
    """
    x, x_adv = widen(x).double(), x_adv.double()
    radius = (x_adv - x).abs() if eps is None else eps
    low = torch.ceil(255 * (x - radius).clamp(min=lo) - SLACK)
    high = torch.floor(255 * (x + radius).clamp(max=hi) + SLACK)
    if bool((low > high).any()):
        raise ValueError("save_set: no uint8 level is within the budget of some element, as the clean images are not "
                         "on levels k / 255: save the set as float32")
    return torch.minimum(torch.maximum((255 * x_adv).round(), low), high).to(torch.uint8)


def set_folder(parent: str | Path, source: str, attack: str) -> Path:
    """The folder of the set of this source and attack, inside a folder of sets."""
    return Path(parent) / "-".join(re.sub(r"[^\w.@=+]+", "_", name) for name in (source, attack))


@dataclass(frozen=True)
class Rows:
    """Some examples of a set, on the CPU: x_adv float32 [n, ...] in [0, 1], the others as in a shard (this module)."""

    x_adv: Tensor
    labels: Tensor
    index: Tensor
    checksums: Tensor
    counted: Tensor

    def identity(self) -> Tensor:
        """int64 [n, 3], as `Batch.identity`."""
        return torch.stack([self.index, self.labels, self.checksums], 1)


class AdversarialSet:
    """A saved set (:func:`load_set`). Only the rows asked for are read; each shard's SHA-256 is checked at its first
    use. manifest: see this module; source, attack: names; eps: in image units, None where the attack has none; len():
    the number of examples."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.source: str = self.manifest["source"]["name"]
        self.attack: str = self.manifest["attack"]["name"]
        self.eps: float | None = self.manifest["eps"]
        self._starts = [0]
        for shard in self.manifest["shards"]:
            self._starts.append(self._starts[-1] + shard["n"])
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, start: int, stop: int) -> Rows:
        """The examples start..stop-1. ValueError naming the file that is missing, altered or cut off."""
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"AdversarialSet: rows must be some of the {len(self)} of {self.folder}, got "
                             f"{start}..{stop - 1}")
        parts: list[dict[str, Tensor]] = []
        for i, shard in enumerate(self.manifest["shards"]):
            first, last = max(start, self._starts[i]), min(stop, self._starts[i + 1])
            if first < last:
                path = self.folder / shard["file"]
                if i not in self._verified:
                    _check_file(path, shard["sha256"])
                    self._verified.add(i)
                parts.append(_read_shard(path, slice(first - self._starts[i], last - self._starts[i]))[0])
        joined = {name: torch.cat([part[name] for part in parts]) for name in PARTS}
        return Rows(**{**joined, "x_adv": widen(joined["x_adv"])})

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All examples in their order, `size` at a time: (x_adv float32 in [0, 1], labels, index), on the CPU."""
        for start in range(0, len(self), size):
            rows = self.rows(start, min(start + size, len(self)))
            yield rows.x_adv, rows.labels, rows.index

    def verify(self) -> None:
        """Check every shard. ValueError naming the first that is missing, altered or cut off."""
        for shard in self.manifest["shards"]:
            _check_file(self.folder / shard["file"], shard["sha256"])


def load_set(folder: str | Path) -> AdversarialSet:
    """Open the set in `folder`; its images are read when they are asked for.

    Raises FileNotFoundError where there is no finished set, ValueError naming a manifest that is damaged.
    """
    return AdversarialSet(folder)


def find_sets(folder: str | Path) -> list[AdversarialSet]:
    """The set in `folder`, or all finished ones one level below it. FileNotFoundError where there is none."""
    folder = Path(folder)
    below = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if (folder / "manifest.json").exists() or not below:
        return [load_set(folder)]
    return [load_set(path) for path in below]


class SetWriter:
    """Writes a set shard by shard. A shard is either whole or not there, and one that is there is not crafted again.

    head: the manifest without shards, n and shape. ValueError where the folder holds a finished set of another cell.
    """

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.folder, self.head = folder, head
        self._shards: list[dict[str, Any]] = []
        self._shape: list[int] = []
        self._finished = (folder / "manifest.json").exists()
        if self._finished and _read_manifest(folder)["cell"] != head["cell"]:
            raise ValueError(f"save_set: {folder} already holds the set of another source, attack, key or dtype: give "
                             "another folder, or delete it")
        folder.mkdir(parents=True, exist_ok=True)

    def existing(self, batch: str) -> Tensor | None:
        """x_adv float32 of the next shard, where it was written from the batch of this digest; else None.

        ValueError where a finished set was written from another batch.
        """
        path = self.folder / self._next_name()
        try:
            parts, about = _read_shard(path)
        except ValueError:
            return None
        if (about.get("cell"), about.get("batch")) != (self.head["cell"], batch):
            if self._finished:
                raise ValueError(f"save_set: {self.folder} holds a set crafted from other images or batches: give "
                                 "another folder, or delete it")
            return None
        if about["sha256"] != files.digest(parts):
            return None
        self._add_shard(path, parts["x_adv"], batch)
        return widen(parts["x_adv"])

    def write(self, batch: Batch, digest: str, x_adv: Tensor, counted: Tensor) -> None:
        """Write the next shard. digest: of the batch; x_adv: [n, ...] in the set's dtype; counted: uint8 [n]."""
        index, labels, checksums = batch.identity.cpu().unbind(1)
        parts = {"x_adv": x_adv.cpu(), "labels": labels, "index": index, "checksums": checksums, "counted": counted}
        parts = {name: t.contiguous() for name, t in parts.items()}
        about = {"cell": self.head["cell"], "batch": digest, "sha256": files.digest(parts)}
        path = self.folder / self._next_name()
        files.atomic_write(path, lambda f: f.write(to_bytes(parts, metadata={ABOUT: json.dumps(about)})))
        self._add_shard(path, x_adv, digest)

    def _next_name(self) -> str:
        return f"{len(self._shards):05d}.safetensors"

    def _add_shard(self, path: Path, x_adv: Tensor, batch: str) -> None:
        self._shape = list(x_adv.shape[1:])
        self._shards.append({"file": path.name, "n": len(x_adv), "sha256": _file_sha256(path), "batch": batch})

    def finish(self) -> AdversarialSet:
        """Write the manifest, which makes the folder a set."""
        body = {**self.head, "shape": self._shape, "n": sum(s["n"] for s in self._shards), "shards": self._shards}
        files.write_json(self.folder / "manifest.json", {**body, "sha256": _manifest_sha256(body)}, indent=1)
        return AdversarialSet(self.folder)


def _manifest_sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"load_set: no finished adversarial set in {folder} (there is no manifest.json)")
    try:
        body = json.loads(path.read_text())
        intact = body.pop("sha256") == _manifest_sha256(body)
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"load_set: {path} is corrupt or no manifest ({type(e).__name__}: {e})") from e
    if not intact:
        raise ValueError(f"load_set: {path} is corrupt or was altered: its contents do not match their SHA-256")
    if body["format"] != FORMAT:
        raise ValueError(f"load_set: the format of {path} must be {FORMAT!r}, got {body['format']!r}")
    return body


def _file_sha256(path: Path) -> str:
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"load_set: {path} is missing, though the manifest names it")
    if _file_sha256(path) != sha256:
        raise ValueError(f"load_set: {path} is corrupt, cut off or was altered: it does not match its SHA-256")


def _read_shard(path: Path, rows: slice = slice(None)) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The PARTS of these rows, and the metadata of the file. ValueError where it is no shard."""
    try:
        with safe_open(path, framework="pt") as f:
            about = json.loads((f.metadata() or {}).get(ABOUT, "{}"))
            return {name: f.get_slice(name)[rows] for name in PARTS}, about
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"load_set: {path} is corrupt or no shard of a set ({e})") from e
