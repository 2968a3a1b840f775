"""A model of the cost of n ranks: bytes between them, seconds of every step, and how many ranks are worth having.

`cost` takes a `Survey` of a model (also of one on the meta device), a `Workload`, a number of ranks and a `Cluster`, and follows
the steps of a calibration by several processes: every rank runs its share of the batches, every site is reduced to its owner, the
owners solve. Where a step waits for the slowest rank, so does the model.

Bytes are counted. Seconds are flops, bytes and hops over the rates of the cluster, and as accurate as these:
`benchmarks/results/scaling.md` has the model beside measurements on a CPU. `h100` comes from data sheets and was never measured.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.cost_model import H100
from nullspace.calibration.totals import deal
from nullspace.moments.triangle import PANEL_ROWS
from nullspace.planning.plan import Rates, Workload
from nullspace.planning.survey import Survey
from nullspace.solvers import decomposition_cost

# Beside the triangle and Σ x: tokens, their mass, outlier tokens, and four sums that account for rounding (`GramSums.state`).
COUNTS = 9
# Exchanges of a run: each rank's batches (before and after), whether the arguments and the models are the same, layers without
# input, sites, results. Layerwise, layers without input and sites are exchanged again after every block.
EXCHANGES, EXCHANGES_A_BLOCK = 7, 2
# Doubling the ranks is worth it while that saves this fraction of the time.
WORTH = 0.1


class Network(abc.ABC):
    """How long a collective takes. `crowd` is how many ranks there are to a core, at least 1; on GPUs it is 1."""

    @abc.abstractmethod
    def latency(self, ranks: int, crowd: float = 1.0) -> float:
        """Seconds of a collective that carries nothing."""

    @abc.abstractmethod
    def reduce_seconds(self, size: float, ranks: int, crowd: float = 1.0) -> float:
        """Of `torch.distributed.reduce` of so many bytes."""

    @abc.abstractmethod
    def broadcast_seconds(self, size: float, ranks: int, crowd: float = 1.0) -> float:
        """Of `torch.distributed.broadcast` of so many bytes."""


@dataclass(frozen=True)
class Chain(Network):
    """NCCL: a reduction goes from rank to rank until it is at its root, in pieces, so that all links are busy at once.

    Attributes:
        ranks_a_node: GPUs of a node.
        within: bytes a second from one GPU to the next in a node.
        between: bytes a second into a node, all its network cards together: NCCL runs a ring through each.
        start: seconds until a collective begins.
        hop_within, hop_between: seconds that a piece takes from rank to rank.
    """

    ranks_a_node: int
    within: float
    between: float
    start: float
    hop_within: float
    hop_between: float

    def latency(self, ranks: int, crowd: float = 1.0) -> float:
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.ranks_a_node)
        return self.start + (ranks - nodes) * self.hop_within + (nodes - 1) * self.hop_between

    def reduce_seconds(self, size: float, ranks: int, crowd: float = 1.0) -> float:
        if ranks == 1:
            return 0.0
        bandwidth = self.within if ranks <= self.ranks_a_node else min(self.within, self.between)
        return self.latency(ranks) + size / bandwidth

    def broadcast_seconds(self, size: float, ranks: int, crowd: float = 1.0) -> float:
        return self.reduce_seconds(size, ranks)


@dataclass(frozen=True)
class Gloo(Network):
    """Gloo on one machine. `reduce` is a ring reduce-scatter, then every rank hands its n-th part to the root.

    Both move (n − 1) / n of the vector through each rank, or into the root. In the ring all ranks are at work and share the cores.

    Attributes:
        start: seconds of a collective, however many ranks.
        hop: seconds a step of the ring.
        ring: bytes a second through a rank that has a core for itself: received, added, and sent on.
        gather: bytes a second into the root.
    """

    start: float
    hop: float
    ring: float
    gather: float

    def latency(self, ranks: int, crowd: float = 1.0) -> float:
        return 0.0 if ranks == 1 else self.start + (ranks - 1) * crowd * self.hop

    def reduce_seconds(self, size: float, ranks: int, crowd: float = 1.0) -> float:
        part = size * (ranks - 1) / ranks
        return self.latency(ranks, crowd) + part * (crowd / self.ring + 1 / self.gather)

    def broadcast_seconds(self, size: float, ranks: int, crowd: float = 1.0) -> float:
        rounds = math.ceil(math.log2(ranks))  # a binomial tree, the whole vector at once
        return self.latency(ranks, crowd) + rounds * size / self.gather


@dataclass(frozen=True)
class Cluster:
    """What n ranks run on.

    Attributes:
        name: for tables.
        network: between the ranks.
        rates: throughputs of one rank alone. `transfer` also applies to bases that go to the host.
        memory: bytes of device memory a rank.
        panel: seconds to launch the compression of one row panel of a triangle before a reduction, or its expansion after it.
        copy: bytes a second copied within a rank's memory.
        exchange: seconds of an exchange of Python objects, besides the network's.
        exchange_site: seconds that every site of every rank adds to the exchange of sites.
        cores: shared by all ranks; None if each has its own device.
        measured: whether the figures were fitted to measurements.
    """

    name: str
    network: Network
    rates: Rates
    memory: float
    panel: float
    copy: float
    exchange: float
    exchange_site: float
    cores: int | None = None
    measured: bool = False

    def crowd(self, ranks: int) -> float:
        """Ranks to a core, at least 1."""
        return 1.0 if self.cores is None else max(1.0, ranks / self.cores)

    def last(self, seconds: Sequence[float]) -> float:
        """When the last of some ranks is done that have so much to do each: cores that they share, they share evenly."""
        if self.cores is None:
            return max(seconds)
        now, before = 0.0, 0.0
        for index, own in enumerate(sorted(seconds)):
            now += (own - before) * self.crowd(len(seconds) - index)
            before = own
        return now

    def packing_seconds(self, d: int, ranks: int) -> float:
        """A site's triangle into the vector that travels, in its own memory (copied twice), on all ranks."""
        return 0.0 if ranks == 1 else self.crowd(ranks) * self.unpacking_seconds(d, ranks)

    def unpacking_seconds(self, d: int, ranks: int) -> float:
        """And back, at its owner."""
        return 0.0 if ranks == 1 else -(-d // PANEL_ROWS) * self.panel + 2 * site_bytes(d) / self.copy

    def travel_seconds(self, d: int, ranks: int) -> float:
        """The reduction of a site's vector: all that something else can hide."""
        return 0.0 if ranks == 1 else self.network.reduce_seconds(site_bytes(d), ranks, self.crowd(ranks))

    def site_seconds(self, d: int, ranks: int) -> float:
        """Of one site's reduction, from triangle to triangle."""
        return self.packing_seconds(d, ranks) + self.travel_seconds(d, ranks) + self.unpacking_seconds(d, ranks)


def h100(links: int = 8) -> Cluster:
    """Nodes of eight H100 SXM with NVLink, and network cards of 400 Gb/s: ASSUMED, from data sheets; nothing of it was measured.

    Args:
        links: network cards a node: 8 are one a GPU.
    """
    reached = 0.8  # of a link's bandwidth, by a collective on a long vector: a guess, near what NCCL's tuner counts NVLink 4 for
    return Cluster(
        name=f"8 × H100 a node, {links} × 400 Gb/s",
        network=Chain(
            ranks_a_node=8,
            within=reached * 450e9,  # NVLink 4, one direction: data sheet
            between=reached * links * 50e9,  # 400 Gb/s a card: data sheet
            start=8.4e-6,  # these three: the constants that NCCL's tuner has for rings of the "simple" protocol
            hop_within=3.4e-6,
            hop_between=14e-6,
        ),
        rates=H100.rates(),  # a forecast: `benchmarks/results/cost.md` says where each comes from
        memory=H100.memory,
        panel=10 / H100.launch.middle,  # about ten launches: a guess
        copy=H100.copy.middle / 2,  # copied, which is both read and written
        exchange=1e-3,  # pickling, copies to the device and back: a guess
        exchange_site=5e-6,  # unpickling one site: a guess
    )


@dataclass(frozen=True)
class Cost:
    """What a calibration by n ranks takes.

    Attributes:
        ranks: how many.
        strategy: `"resident"` or `"layerwise"`.
        reduced: bytes that every rank gives to reductions, all sites together.
        site_bytes, site_seconds: of one site's reduction, by its width.
        seconds: that are seen: forward, sums, weights (waited for), reductions (packed by all, sent, unpacked by the rank with most
            of them), eigenproblems (of the rank with most to do), exchanges, bases (sent to all).
        hidden: seconds of reductions behind a forward pass, or behind the packing of others.
        busy: ranks that have a batch to read; the others wait.
    """

    ranks: int
    strategy: str
    reduced: int
    site_bytes: Mapping[int, int]
    site_seconds: Mapping[int, float]
    seconds: Mapping[str, float]
    hidden: float
    busy: int

    @property
    def total_seconds(self) -> float:
        """Of everything that is seen."""
        return sum(self.seconds.values())


def site_bytes(d: int) -> int:
    """What a site's reduction carries: the lower triangle, Σ x and a few counts, in float64."""
    return 8 * (d * (d + 1) // 2 + d + COUNTS)


def makespan(
    widths: Sequence[int],
    ranks: int,
    solve: Callable[[int], float],
    cluster: Cluster | None = None,
    loads: list[float] | None = None,
) -> float:
    """Seconds until the owners of some sites have solved them, as `nullspace.distributed.deal` deals them.

    Args:
        widths: of the sites.
        ranks: how many.
        solve: seconds of one site, by its width.
        cluster: for the cores that the ranks share; none are shared by default.
        loads: what they have been dealt before, in d³; this is added to it.
    """
    before = loads if loads is not None else [0.0] * ranks
    seconds = [0.0] * ranks
    for d, owner in zip(widths, deal(widths, ranks, before), strict=True):
        seconds[owner] += solve(d)
        before[owner] += float(d) ** 3
    return max(seconds) if cluster is None else cluster.last(seconds)


def cost(
    survey: Survey,
    workload: Workload,
    ranks: int,
    cluster: Cluster,
    *,
    strategy: str = "resident",
    weights: str = "device",
    overlapped: bool = True,
    together: int | None = None,
    solved: bool = True,
) -> Cost:
    """What `compute_null_spaces` takes with n ranks; without second passes.

    Args:
        survey: of the model, for batches of the workload's size.
        workload: what to calibrate on. Its device says which solver is used; its rates do not count, but the cluster's.
        ranks: how many.
        cluster: what they run on.
        strategy: `"resident"` or `"layerwise"`.
        weights: where a layerwise pass has them: `"device"`; `"host"`: brought block by block, while the block before computes; or
            `"gathered"` likewise, from the GPUs of a node, each of which holds its part (FSDP2, which is not gathered ahead yet).
        overlapped: whether vectors travel while others are packed and, layerwise, while the next block computes. Packing itself
            keeps the host busy, and is seen. Where ranks share cores, nothing is hidden.
        together: how many blocks of a layerwise pass are solved at a time: by default as many as there are ranks, about what
            `nullspace.distributed.Totals` does. With 1, all would wait for one of them to solve the widest site of every block.
        solved: False for `stream_covariances` alone: no eigenproblems, no bases.

    Raises:
        ValueError: for a number below 1, another strategy, or another place.
    """
    together = ranks if together is None else together
    if ranks < 1 or together < 1:
        raise ValueError(f"ranks and together must be at least 1, not {ranks} and {together}")
    if strategy not in ("resident", "layerwise") or weights not in ("device", "host", "gathered"):
        raise ValueError(f"there is no strategy {strategy!r} with weights {weights!r}")
    rates, layerwise = cluster.rates, strategy == "layerwise"
    tokens = workload.samples * workload.length
    shares = [len(range(rank, workload.batches, ranks)) / workload.batches for rank in range(ranks)]

    def solve(d: int) -> float:
        return decomposition_cost(d, workload.rank, workload.device)[2] / rates.decomposition

    # What is run, then reduced, then solved, one after the other: all at once, or block by block.
    count = len(survey.block_flops)
    steps = (
        [[s.d_in for s in survey.sites if s.block == i] for i in range(count)] if layerwise else [[s.d_in for s in survey.sites]]
    )
    outside = [s.d_in for s in survey.sites if s.block is None] if layerwise else []
    flops = survey.block_flops if layerwise else [survey.flops]
    share = cluster.last(shares)
    forward = [share * f * workload.batches / rates.forward for f in flops]
    sums = [share * sum(float(d) ** 2 for d in own) * tokens / rates.sums for own in steps]
    # Every rank packs one vector after the other; they travel by themselves; their owners unpack them when all are there.
    waves = [outside, *steps]
    packing = [[cluster.packing_seconds(d, ranks) for d in own] for own in waves]
    travel = [[cluster.travel_seconds(d, ranks) for d in own] for own in waves]
    groups = [outside, *([d for own in steps[i : i + together] for d in own] for i in range(0, len(steps), together))]
    unpacking = _dealt(groups, ranks, lambda d: cluster.unpacking_seconds(d, ranks), cluster)
    eigenproblems = _dealt(groups, ranks, solve, cluster) if solved else 0.0
    hidden = 0.0
    if overlapped and (cluster.cores is None or ranks < cluster.cores):
        following = [f + x for f, x in zip(forward, sums, strict=True)] if layerwise else []
        after = [*following, 0.0] if layerwise else [0.0, 0.0]
        after = [0.0 if i and i % together == 0 else seconds for i, seconds in enumerate(after)]  # what is solved is waited for
        hidden = sum(min(sum(t), sum(p[1:]) + a) for p, t, a in zip(packing, travel, after, strict=True))
    waited = 0.0
    if layerwise and weights != "device":
        for i, size in enumerate(survey.block_weights):
            coming = size / rates.transfer if weights == "host" else _gather_seconds(size, ranks, cluster)
            waited += max(0.0, coming - (forward[i - 1] + sums[i - 1])) if i else coming
    exchanges = bases = 0.0
    if ranks > 1:
        crowd = cluster.crowd(ranks)
        number = EXCHANGES + (EXCHANGES_A_BLOCK * count if layerwise else 0)
        # Sizes first, then what there is to say.
        exchanges = number * (cluster.exchange * crowd + 2 * cluster.network.latency(ranks, crowd))
        exchanges += cluster.exchange_site * crowd * ranks * len(survey.sites)
        if solved:
            sizes = [8 * s.d_in * min(workload.rank, s.d_in - 1) for s in survey.sites]
            bases = sum(cluster.network.broadcast_seconds(size, ranks, crowd) + size / rates.transfer for size in sizes)
    widths = sorted({s.d_in for s in survey.sites})
    return Cost(
        ranks=ranks,
        strategy=strategy,
        reduced=0 if ranks == 1 else sum(site_bytes(s.d_in) for s in survey.sites),
        site_bytes={d: site_bytes(d) for d in widths},
        site_seconds={d: cluster.site_seconds(d, ranks) for d in widths},
        seconds={
            "forward": sum(forward),
            "sums": sum(sums),
            "weights": waited,
            "reductions": sum(map(sum, packing)) + sum(map(sum, travel)) - hidden + unpacking,
            "eigenproblems": eigenproblems,
            "exchanges": exchanges,
            "bases": bases,
        },
        hidden=hidden,
        busy=min(ranks, workload.batches),
    )


def _dealt(groups: Sequence[Sequence[int]], ranks: int, seconds: Callable[[int], float], cluster: Cluster) -> float:
    """One group after the other, each dealt with an eye to those before it."""
    loads = [0.0] * ranks
    return sum(makespan(own, ranks, seconds, cluster, loads) for own in groups)


def worth_having(total: Callable[[int], float], most: int = 4096) -> int:
    """The number of ranks, a power of two, beyond which doubling it takes less than a tenth off the time.

    Args:
        total: seconds of a run with so many ranks.
        most: not more than these.

    Example:
        >>> from benchmarks.scaling_model import worth_having
        >>> worth_having(lambda n: 100 / n + 20)  # a part that is shared, and one that all wait for
        32
    """
    ranks = 1
    while 2 * ranks <= most and total(2 * ranks) <= (1 - WORTH) * total(ranks):
        ranks *= 2
    return ranks


def _gather_seconds(size: int, ranks: int, cluster: Cluster) -> float:
    network = cluster.network
    if not isinstance(network, Chain) or ranks == 1:
        return size / cluster.rates.transfer
    holders = min(ranks, network.ranks_a_node)
    return network.latency(holders) + size * (holders - 1) / holders / network.within
