"""Ensemble adversarial training on CIFAR-10 by several processes, killed twice and resumed: the same weights?

    python bench/large.py --data cifar10:DIR --out DIR

Trains two static sources, then the target on both and itself, once unbroken and once killed with -9: first one of the
ranks, then all of them together with torchrun. Prints what came of it and leaves it in OUT/large.json.
"""
import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from ensadv_fast.bench.stamp import stamp
from ensadv_fast.system import files
from ensadv_fast.train import checkpoints


def command(args, out, static):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks), "-m",
            "ensadv_fast", "train", "--out", str(out), "--resume", "--data", args.data, "--model", args.model,
            "--static", *static, "--held-out", "--preset", "eat", "--epochs", str(args.epochs), "--source-epochs",
            str(args.epochs), "--batch-size", "128", "--optimizer", "sgd", "--lr", "0.1", "--schedule", "cyclic",
            "--augment", "pad", "--eps", "8/255", "--seeds", "1", "--save-every", str(args.save_every), "--log-every",
            "20", "--no-evaluate", *args.more]


def step_of(out, name):
    found = [int(m[1]) for p in out.glob(f"checkpoints/{name}-*.pt") if (m := re.search(r"-(\d+)\.pt$", p.name))]
    return max(found, default=0)


def ranks_of(agent):
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def train(args, out, static, name, until=None, everyone=False):
    """Seconds, and the exit status; until: the step after whose checkpoint a rank, or everyone, is killed."""
    print(shlex.join(command(args, out, static)), flush=True)
    start = time.time()
    process = subprocess.Popen(command(args, out, static))
    while until is not None and process.poll() is None:
        if step_of(out, name) >= until:
            ranks = ranks_of(process.pid)
            for pid in ([process.pid, *ranks] if everyone else ranks[-1:]):
                os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.2)
    return {"status": process.wait(), "seconds": round(time.time() - start), "checkpoint": step_of(out, name)}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="cifar10:DIR")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--save-every", type=int, default=40)
    p.add_argument("--model", default="cifar:resnet14")
    p.add_argument("--static", nargs="*", default=["cifar:resnet8", "cifar:convnet"])
    p.add_argument("more", nargs="*", help="further options of ensadv-fast train, after --")
    args = p.parse_args()
    start = stamp()
    name = f"{args.model.partition(':')[2]}_eat-seed0"
    whole, broken = args.out / "unbroken", args.out / "broken"
    runs = {"unbroken": train(args, whole, args.static, name)}
    # The same sources, so that the two targets can be compared.
    static = [f"{s}={whole}/models/source-{s.partition(':')[2]}.pt" for s in args.static]
    steps = checkpoints.load(whole / "models" / f"{name}.pt")["step"]
    runs["one rank killed"] = train(args, broken, static, name, steps // 3)
    runs["all killed"] = train(args, broken, static, name, 2 * steps // 3, everyone=True)
    runs["resumed"] = train(args, broken, static, name)
    one, two = (checkpoints.load(d / "models" / f"{name}.pt") for d in (whole, broken))
    same = {part: files.digest(one[part]) == files.digest(two[part])
            for part in ("model", "optimizer", "adversary", "sampler", "rng")}
    lines = [[json.loads(t) for t in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, broken)]
    last = {k: v for k, v in lines[0][-1].items() if k != "monitor"}
    result = {**start, "model": args.model, "static": args.static, "ranks": args.ranks, "steps": steps,
              "weights": files.digest(one["model"]), "same": same, "runs": runs, "last_line": last,
              "load_after": os.getloadavg()}
    (args.out / "large.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
