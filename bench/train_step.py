"""What adversarial training costs: a step of it over a clean float32 step, in time and in peak memory.

    python bench/train_step.py --networks mnist_a cifar_resnet18 --out bench/results/train_step_cpu.json

Contenders: the clean step; FGSM-AT (half the batch replaced by FGSM on the live model); EAT with 1, 2 and 3 static
sources of the same size beside the live model, each source taking its turn, and with 1 static source alone. A time is
that of one whole round of turns divided by its steps, so that cheap and dear sources count as often as they are drawn.
The step is SGD with momentum in float32; some have the live source under bfloat16 autocast. Peak memory is the most
that is allocated at once: "step" during a round, beside what is there before it; "peak" from the making of network,
sources and optimizer on, which counts the static networks' weights (and, on the CPU, the copies that
`Source.calibrate` needs). On the CPU it is read from the profiler's record of the allocator. On CUDA neither counts the
memory that graphs keep for the passes of static sources, which is what those passes need without graphs.
"""
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from attack_step import begin, finish, options
from networks import NETWORKS, Network, images, logits_of
from torch.profiler import ProfilerActivity, profile

import ensadv_fast as ea
from ensadv_fast.bench import timing

BFLOAT16, ALONE = ", live crafting in bfloat16", " alone"
# Static sources beside the live model; None: the clean step.
CONTENDERS = {"clean": None, "FGSM-AT": 0, "EAT, 1 static": 1, "EAT, 2 static": 2, "EAT, 3 static": 3,
              "EAT, 1 static" + ALONE: 1, "FGSM-AT" + BFLOAT16: 0, "EAT, 1 static" + BFLOAT16: 1}


class Trainer:
    """A network in training: `turns` calls of `step` make one round, in which every source crafts once."""

    def __init__(self, network: Network, name: str, batch: int, device: str):
        static = CONTENDERS[name]
        torch.manual_seed(0)
        self.model = network.make().to(device).train()
        self.x, self.y = images(network, batch, device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.adversary, self.turns = None, 1
        if static is not None:
            frozen = [network.make().to(device).eval() for _ in range(static)]
            live = ALONE not in name and ea.Source(self.model, live=True,
                                                   dtype=torch.bfloat16 if BFLOAT16 in name else None)
            self.adversary = ea.EnsembleAdversary(self.model, frozen, ea.fgsm(network.eps), select="rotate", live=live,
                                                  key=ea.fresh_key(seed=0))
            self.turns = len(self.adversary.sources)

    def step(self) -> None:
        if self.adversary is None:
            loss = F.cross_entropy(logits_of(self.model(self.x)), self.y)
        else:
            batch = self.adversary(self.x, self.y)
            loss = ea.mixed_cross_entropy(logits_of(self.model(batch.x)), batch.y, batch.is_adv)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def round(self) -> None:
        for _ in range(self.turns):
            self.step()


def verify(trainer: Trainer, eps: float) -> None:
    """Half the batch is perturbed, within eps and up to it, on every source in turn; and a step moves the weights."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    if trainer.adversary is not None:
        for turn in range(trainer.turns):
            batch = trainer.adversary(trainer.x, trainer.y)
            size, half = (batch.x - trainer.x).abs().flatten(1).amax(1), len(trainer.x) // 2
            if batch.source != turn or batch.is_adv.tolist() != [i < half for i in range(len(trainer.x))]:
                raise AssertionError(f"turn {turn}: source {batch.source} perturbed {int(batch.is_adv.sum())} samples")
            if not ((size[:half] - eps).abs() < 1e-3).all() or size[half:].any():
                raise AssertionError(f"turn {turn}: perturbations of sizes {size.tolist()}, eps {eps}")
    trainer.step()
    if all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before)):
        raise AssertionError("the step left the weights as they were")


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that was allocated at once during the call, beside what is there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    for _ in range(2):  # of memory from before its first record the profiler does not notice that it is freed
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def row(network: Network, batch: int, device: str, seconds: float, least: int) -> dict:
    """One network: every contender verified, then all timed in turn."""
    load = os.getloadavg()
    cells, trainers = {}, {}
    for name in CONTENDERS:
        def whole(name=name) -> Trainer:
            trainer = Trainer(network, name, batch, device)
            trainer.round()
            trainer.round()  # now with momentum, and the gradients of the round before
            return trainer

        trainers[name] = whole()
        verify(trainers[name], network.eps)
        cells[name] = {"peak_bytes": peak_bytes(whole, device), "step_bytes": peak_bytes(trainers[name].round, device)}
    timed = timing.time_calls({name: t.round for name, t in trainers.items()}, seconds, device, least)
    for name, t in timed.items():
        turns = trainers[name].turns
        cells[name].update(ms=t.median / turns, quartiles=[q / turns for q in t.quartiles], best=t.best / turns)
    return {"network": network.name, "shape": [batch, *network.shape], "contenders": cells, "load_before": load,
            "load_after": os.getloadavg()}


def _line(r: dict) -> str:
    clean = r["contenders"]["clean"]
    lines = [f"{r['network']} {'x'.join(map(str, r['shape']))}"]
    for name, c in r["contenders"].items():
        memory = [f"{what} {c[key] / 2**20:.1f} MiB, {c[key] / clean[key]:.3f}"
                  for what, key in (("step", "step_bytes"), ("peak", "peak_bytes"))]
        lines.append(f"  {c['ms']:9.2f} ms, {c['ms'] / clean['ms']:.3f} of the clean step; {'; '.join(memory)}: {name}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = options(__doc__, ["mnist_a", "cifar_resnet18"], 3.0).parse_args(argv)
    result = begin(args)
    for network in [n for n in map(NETWORKS.get, args.networks) if n.installed]:
        result["rows"].append(row(network, args.batch or network.train_batch, args.device, args.seconds, args.least))
        print(_line(result["rows"][-1]), flush=True)
    finish(result, args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
