"""What a source's forward pass keeps for the backward pass: `python bench/kept.py` writes bench/results/kept_cpu.json.

Bytes an image, batch 8: the plain module in float32, and Source(model) in float32 and bfloat16. Counted by
tests/kept.py: every storage that the forward leaves alive, whoever holds it, but for parameters, buffers, the images
and the logits. It depends on shapes alone, so the networks are as timm makes them.
"""
import json
import os
import sys
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from kept import kept_bytes  # noqa: E402  it lies beside the tests that hold the counts

import ensadv_fast as ea  # noqa: E402
from ensadv_fast.bench.stamp import stamp  # noqa: E402

NETWORKS = {"resnet18": 224, "resnet50": 224, "vgg11_bn": 224, "densenet121": 224, "inception_v3": 299,
            "mobilenetv2_100": 224}
BATCH = 8


def row(name: str, size: int) -> dict:
    net, x = timm.create_model(name).eval(), torch.rand(BATCH, 3, size, size)
    kept = {"plain": kept_bytes(net, net, x)}
    for dtype in (torch.float32, torch.bfloat16):
        source = ea.Source(net, dtype=dtype)
        kept[str(dtype).removeprefix("torch.")] = kept_bytes(source.module, source.logits, x)
    return {"network": name, "shape": list(x.shape), "bytes_per_image": {k: v / BATCH for k, v in kept.items()}}


def main() -> int:
    result = {**stamp(), "rows": [row(name, size) for name, size in NETWORKS.items()], "load_after": os.getloadavg()}
    (ROOT / "bench/results/kept_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
