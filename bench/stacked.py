"""FGSM on ensembles of network D: members stacked, members in turn, and the loop that one writes: verified, then timed.

    python bench/stacked.py

Prints a line of JSON for every dtype, number of members and batch size: milliseconds of a whole attack, medians of
interleaved rounds, and the loss increase on the exact mixture over that of the loop's step, under 0.97 of which none
is timed.
"""
import argparse
import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ensadv_fast as ea
from ensadv_fast import data, models
from ensadv_fast.bench.timing import time_calls
from ensadv_fast.sources.stacking import units

EPS, ENOUGH = 0.1, 0.97


def trained(members: int) -> list[nn.Module]:
    """Of network D, some steps each on the embedded digits: an untrained one's gradient says little."""
    train, nets = data.digits().train, []
    for seed in range(members):
        torch.manual_seed(seed)
        net = models.mnist_d()
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for index in torch.randperm(len(train)).split(100):
            x, y = train.batch(index)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        nets.append(net.eval().requires_grad_(False))
    return nets


def contenders(nets: list[nn.Module], dtype: torch.dtype, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    attack = ea.fgsm(EPS)
    stacked = ea.Ensemble([ea.Source(net, dtype=dtype) for net in nets])
    in_turn = ea.Ensemble([ea.Source(net, dtype=dtype) for net in nets])
    in_turn._running = units(in_turn.sources, stack=False)

    def loop() -> Tensor:
        leaf = x.clone().requires_grad_()
        loss = F.cross_entropy(sum(net(leaf) for net in nets) / len(nets), y, reduction="sum")
        grad, = torch.autograd.grad(loss, leaf)
        return (x + EPS * grad.sign()).clamp(0, 1)

    return {"stacked": lambda: attack(stacked, x, y), "in turn": lambda: attack(in_turn, x, y), "loop": loop}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="per contender (default: 0.5)")
    args = parser.parse_args()
    nets, train = [net.to(args.device) for net in trained(4)], data.digits().train
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for members in (3, 4):
            for batch in (64, 256):
                x, y = (t.to(args.device) for t in train.batch(torch.arange(batch)))
                some = nets[:members]

                def loss(images: Tensor) -> float:
                    with torch.no_grad():
                        return F.cross_entropy(sum(net(images) for net in some) / members, y).double().item()

                calls = contenders(some, dtype, x, y)
                clean, wanted = loss(x), loss(calls["loop"]())
                gains = {name: (loss(call().float()) - clean) / (wanted - clean) for name, call in calls.items()}
                if min(gains.values()) < ENOUGH:
                    raise SystemExit(f"too weak: {gains}")
                ms = {name: t.median for name, t in time_calls(calls, args.seconds, args.device).items()}
                print(json.dumps({"dtype": str(dtype).removeprefix("torch."), "members": members, "batch": batch,
                                  "ms": ms, "loss_increase": gains}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
