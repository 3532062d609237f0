"""What reading images costs: images a second of a stream from JPEG files, per number of decoding processes.

    python bench/input.py --workers 0 1 2 --out FILE
    python bench/input.py --folder DIR --size 224 --device cuda --workers 8 16

Without --folder a set of 2,000 JPEGs of about 224 x 250 pixels is made up (tests/pictures.py), which a network can
learn. Contenders: our stream (decoding to 256 pixels in the processes, random resized crop and mirror on the device,
floats), and, where it is installed, torchvision's ImageFolder with RandomResizedCrop, RandomHorizontalFlip and ToTensor
in a DataLoader of as many processes, whose batches are copied to the device. Before anything is timed, a batch of each
number of processes is compared with that of none, bit for bit. A rate is that of all batches of an epoch after the
first, which nobody uses; "start" is the time to that first one. What the device does alone is timed apart.
"""
import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from pictures import write_pictures  # noqa: E402  it lies beside the tests, which use it too

from ensadv_fast import data  # noqa: E402
from ensadv_fast.bench.stamp import stamp  # noqa: E402

Batch = tuple[torch.Tensor, ...]


def ours(split: data.FolderSplit, args: argparse.Namespace, workers: int) -> data.Stream:
    return data.Stream(split, data.Sampler(len(split), args.batch, seed=0), device=args.device, seed=0, workers=workers,
                       prefetch=args.prefetch, channels_last=True, augment=data.Augment(args.size, crop="resized"))


class Torchvision:
    """Batches (x, y) on the device, as one makes them with torchvision alone."""

    def __init__(self, split: data.FolderSplit, args: argparse.Namespace, workers: int):
        from torchvision import datasets, transforms

        step = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        options = {"prefetch_factor": args.prefetch, "multiprocessing_context": "forkserver"} if workers else {}
        self.device = args.device
        self.loader = torch.utils.data.DataLoader(
            datasets.ImageFolder(split.root, transforms.Compose(step)), args.batch, shuffle=True, num_workers=workers,
            pin_memory=args.device == "cuda", **options)

    def __iter__(self):
        for x, y in self.loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def close(self) -> None:
        self.loader = None


def rate(batches: Iterable[Batch], device: str) -> dict:
    """Seconds to the first batch of an epoch, and images a second of the others."""
    begin = time.perf_counter()
    start, images = 0.0, 0
    for x, *_ in batches:
        if not start:
            begin, start = (now := time.perf_counter()), now - begin
        else:
            images += len(x)
    if device == "cuda":
        torch.cuda.synchronize()
    return {"start_seconds": start, "images_per_second": images / (time.perf_counter() - begin)}


def device_part(split: data.FolderSplit, args: argparse.Namespace) -> float:
    """Images a second of the augmentation and the entrance alone, on a batch that lies on the device."""
    stream = ours(split, args, 0)
    images, _ = split.pixels(list(range(min(args.batch, len(split)))))
    images, index = images.to(args.device), torch.arange(len(images), device=args.device)
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        stream.prepare(images, stream._key, index)
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return len(images) / sorted(times[2:])[5]


def verify(split: data.FolderSplit, args: argparse.Namespace, workers: int) -> None:
    with closing(ours(split, args, workers)) as stream:
        for a, b in zip(next(iter(stream)), next(iter(ours(split, args, 0))), strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{workers} processes give another batch than none")


def measure(folder: Path, args: argparse.Namespace) -> dict:
    split = data.load(f"imagefolder:{folder}", size=args.size).train
    contenders = {"ours": ours} | ({"torchvision": Torchvision} if importlib.util.find_spec("torchvision") else {})
    result = {**stamp(), "device": args.device, "threads": torch.get_num_threads(), "images": len(split),
              "size": args.size, "batch": args.batch, "prefetch": args.prefetch,
              "device_part_images_per_second": device_part(split, args), "rows": []}
    for workers in args.workers:
        verify(split, args, workers)
        for name, make in contenders.items():
            with closing(make(split, args, workers)) as batches:
                result["rows"].append({"contender": name, "workers": workers, **rate(batches, args.device)})
            row = result["rows"][-1]
            print(f"{name}, {workers} workers: {row['images_per_second']:.0f} images/s, first batch after "
                  f"{row['start_seconds']:.1f} s", flush=True)
    return {**result, "load_after": os.getloadavg()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an image folder with train/ and val/ (default: a made-up one)")
    parser.add_argument("--images", type=int, default=2000, help="of the made-up one (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of the crops, in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--prefetch", type=int, default=2, help="batches a worker is ahead (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the stamped JSON here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or write_pictures(Path(made), args.images, 20, args.size, 10)
        result = measure(folder, args)
    print(f"on the device alone: {result['device_part_images_per_second']:.0f} images/s")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
