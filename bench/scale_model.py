"""What a step of ensemble adversarial training takes on many devices: formulas alone, nothing is measured here.

A rank trains on m images a step, a share f of them crafted on one source. The source is drawn for all ranks alike,
uniformly among n static ones and the live model (Tramer et al., ICLR 2018, section 4.1), so the mean over steps is

    compute = slowdown * (m' * train + f * m * (live + sum of static) / (n + 1) + update)

with seconds an image for `train` (forward and backward pass, weight gradients too), `live` and `static` (crafting:
forward pass and the gradient by the image), seconds a step for `update`; m' is m, or (1 + f) m where adversarial images
are appended. Without the live model the divisor is n.

Gradients of G bytes are summed over W ranks in k buckets, in a ring in each node and then a ring over nodes in which
every device carries its share (reduce-scatter, all-reduce of the shares, all-gather):

    ring(W, G) = 2 (W - 1) (k * latency + G / (W * bandwidth))
    all_reduce = ring(devices of a node, G; inside) + ring(nodes, G; between)

`between.bandwidth` is that of a whole node. A bucket goes out once the backward pass B has filled it, while the next
one is filled, so the step ends later by

    exposed = max(all_reduce / k, all_reduce - B (k - 1) / k), or all_reduce where nothing overlaps,

and takes max(compute + exposed, m / loader) seconds, since loaders work ahead. Left out: stragglers, jitter, SyncBN,
checkpoints, evaluation, the loss of efficiency of small batches, and what crafting ahead on a second stream gains.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

BUCKET = 25 * 2**20  # DistributedDataParallel's default


@dataclass(frozen=True)
class Costs:
    """Seconds on one device: an image for train, live and each static source, a step for update. live: None where the
    model in training is no source. backward: the part of `train` that is the backward pass."""

    train: float
    live: float | None = None
    static: tuple[float, ...] = ()
    update: float = 0.0
    backward: float = 2 / 3


@dataclass(frozen=True)
class Link:
    """latency: seconds a message. bandwidth: bytes a second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """per_node: devices. inside: between two devices of a node; between: of a whole node to others. overlap: whether
    gradients travel while the backward pass goes on. loader: images a second for one device."""

    per_node: int
    inside: Link
    between: Link
    overlap: bool = True
    loader: float = math.inf


@dataclass(frozen=True)
class Step:
    """Seconds of a mean step, and images of the data set a second over all devices. data: what loading takes."""

    compute: float
    communication: float
    exposed: float
    data: float
    seconds: float
    images_per_second: float


def ring(world: int, nbytes: float, link: Link, messages: int = 1) -> float:
    """Seconds of an all-reduce of `nbytes` in `messages` parts over a ring of `world`."""
    return 2 * (world - 1) * (messages * link.latency + nbytes / (world * link.bandwidth))


def buckets(nbytes: float) -> int:
    return max(1, math.ceil(nbytes / BUCKET))


def all_reduce(world: int, nbytes: float, cluster: Cluster) -> float:
    """Seconds to sum gradients of `nbytes` over `world` devices, bucket by bucket, with nothing beside it. ValueError
    where the devices do not fill whole nodes."""
    inside = min(world, cluster.per_node)
    if world % inside:
        raise ValueError(f"scale: world must be whole nodes of {cluster.per_node} devices, got {world}")
    k = buckets(nbytes)
    return ring(inside, nbytes, cluster.inside, k) + ring(world // inside, nbytes, cluster.between, k)


def exposed(communication: float, backward: float, k: int) -> float:
    """By how much the all-reduce of k equal buckets, filled evenly during the backward pass, outlasts it."""
    return max(communication / k, communication - backward * (k - 1) / k)


def crafting(costs: Costs) -> float:
    """Mean seconds to craft an image; 0 without any source."""
    sources = [*costs.static, *([] if costs.live is None else [costs.live])]
    return sum(sources) / len(sources) if sources else 0.0


def step(costs: Costs, batch: float, world: int, nbytes: float, cluster: Cluster, *, fraction: float = 0.5,
         append: bool = False, slowdown: float = 1.0) -> Step:
    """A step on `batch` images a device. fraction: the share that is crafted; append: crafted images come on top.
    slowdown: of computing, where ranks share cores."""
    trained = batch * (1 + fraction) if append else batch
    compute = slowdown * (trained * costs.train + fraction * batch * crafting(costs) + costs.update)
    communication = all_reduce(world, nbytes, cluster)
    backward = slowdown * trained * costs.train * costs.backward
    late = exposed(communication, backward, buckets(nbytes)) if cluster.overlap else communication
    data = batch / cluster.loader
    seconds = max(compute + late, data)
    return Step(compute, communication, late, data, seconds, world * batch / seconds)


@dataclass(frozen=True)
class Fit:
    """What a ring of processes on one machine takes, as fitted to measured all-reduces. cores: those that the ranks
    share. More ranks take turns, in proportion; every message then waits `wait` seconds more for its rank's turn."""

    link: Link
    cores: int
    wait: float = 0.0

    def share(self, world: int) -> float:
        return max(1.0, world / self.cores)

    def shared(self, world: int) -> Link:
        """The link as each of `world` ranks finds it."""
        waits = self.wait if world > self.cores else 0.0
        return Link(self.share(world) * self.link.latency + waits, self.link.bandwidth / self.share(world))

    def seconds(self, world: int, nbytes: float) -> float:
        return ring(world, nbytes, self.shared(world))


Measured = tuple[int, float, float]  # world, bytes, seconds


def fit(measured: Sequence[Measured], cores: int, crowded: Measured | None = None) -> Fit:
    """Latency and bandwidth with the least squared relative error, both at least 0, of worlds that have a core for each
    rank; the wait from one all-reduce, a small one, of a world that has not."""
    rows = []  # of seconds = a * latency + b / bandwidth, each divided by its own seconds
    for world, nbytes, seconds in measured:
        scale = 2 * (world - 1) / seconds
        rows.append((scale, scale * nbytes / world))
    aa, ab, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(r[i] for r in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if len(rows) < 2 or determinant <= 1e-12 * aa * bb:
        raise ValueError(f"scale: measured must be of at least two sizes, got {len({n for _, n, _ in measured})}")
    latency, inverse = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if latency < 0:
        latency, inverse = 0.0, b / bb
    elif inverse <= 0:
        raise ValueError("scale: fit: larger messages took no longer, so there is no bandwidth")
    fitted = Fit(Link(latency, 1 / inverse), cores)
    if crowded is None:
        return fitted
    world, nbytes, seconds = crowded
    return replace(fitted, wait=max(0.0, seconds - fitted.seconds(world, nbytes)) / (2 * (world - 1)))
