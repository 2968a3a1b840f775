"""The sums of several processes, added up at the processes that solve them.

Second moments add up exactly. Each process sums its own batches. Each site is added up once, at its *owner*, which solves it; no
other process keeps it. A site is sent as one float64 vector: the lower triangle of Σ x xᵀ, Σ x and a few counts,
d (d + 1) / 2 + O(d) numbers. Roots (`precision="qr"`) cannot be added. They are combined pairwise, in ⌈log₂ n⌉ rounds of a QR
decomposition (Demmel et al. 2012, arXiv 0808.2664).

All sites of one `Totals.add` are reduced before the first of them is solved, so that the owners solve at the same time. In a
layerwise run, the reductions of one block run during the next block's forward pass, and each process holds its own sites until all
processes have enough to solve (`Totals`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nullspace.calibration.input_sums import InputSums, refuse_empty
from nullspace.distributed import Job
from nullspace.distributed.job import Reduction
from nullspace.errors import InputError
from nullspace.model.experts import expert_of
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance
from nullspace.moments.pool import Pool


class Arriving:
    """One site whose sums are being added up at its owner.

    Args:
        site: of the sums.
        own: at the owner, its part of the sums, which becomes the total; None on other processes.
        vector: the compressed part; None for a root, which is complete already.
        reduction: adds the vectors up.

    Attributes:
        pool: of the experts of its layer, over all processes, if it is an expert's.
    """

    def __init__(
        self, site: Site, own: Covariance | None, vector: torch.Tensor | None = None, reduction: Reduction | None = None
    ) -> None:
        self.site, self.own = site, own
        self.pool: Pool | None = None
        self._vector, self._reduction = vector, reduction

    def wait(self) -> None:
        """Wait until the reduction is done. Frees the sums on processes that are not the owner."""
        if self._reduction is not None:
            self._reduction.wait()
        self._reduction = None
        if self.own is None:
            self._vector = None

    def take(self) -> Covariance:
        """The total; this object drops its reference."""
        own, self.own = self.own, None
        assert own is not None
        if self._vector is not None:
            own.expand()
            self._vector = None
        own.pool = self.pool
        return own


def uncalled_everywhere(sums: InputSums, job: Job) -> dict[str, nn.Module]:
    """Collective: leaves out on all processes what one has left out; returns the targets that no process has called."""
    reports = job.exchange((list(sums.uncalled), sums.left_out))
    for _, left_out in reports:
        for name, why in left_out.items():
            sums.leave_out(name, why)
    everywhere = set.intersection(*(set(uncalled) for uncalled, _ in reports))
    return {name: module for name, module in sums.uncalled.items() if name in everywhere}


def begin(job: Job, covariance: Covariance, site: Site, owner: int) -> Arriving:
    """Begin to add up a site's sums at its owner. The caller must drop its reference to the covariance."""
    what = f"the reduction of {site.name!r}"
    job.enters(what)
    with job.naming_rank(what):
        if covariance.precision == "qr":
            return Arriving(site, _folded(job, covariance, owner, what))
        vector = covariance.compress()
        return Arriving(site, covariance if owner == job.number else None, vector, job.reduce(vector, owner, what))


def _folded(job: Job, covariance: Covariance, owner: int, what: str) -> Covariance | None:
    """The total of all processes' roots, at the owner; None elsewhere."""
    distance, step = (job.number - owner) % job.count, 1
    while step < job.count:
        if distance % (2 * step):
            facts, tensors = covariance.state()
            del covariance
            job.send(_packed(facts, tensors), owner + distance - step, what)
            return None
        if distance + step < job.count:
            facts, tensors = covariance.state()
            vector = job.receive(_packed(facts, tensors), owner + distance + step, what)
            del tensors
            covariance.merge(Covariance.from_state(*_unpacked(vector, facts), device=covariance.device))
            del vector
        step *= 2
    return covariance


class Totals:
    """The sites of one pass that are being added up, or wait at their owners to be solved.

    While one process solves, the others wait, since nothing can be added up without its part. So solving begins when there is
    enough for all: on average, the sites of one block per process, by memory. All processes know all sites, so they reach this
    point together. They first finish adding up the block that reached it, rather than hold its sums while they solve.

    Args:
        job: the processes.
        loads: per process, Σ d³ of the sites that it was dealt before; updated here. Zeros by default.
    """

    def __init__(self, job: Job, loads: list[float] | None = None) -> None:
        self._job = job
        self._loads = [0.0] * job.count if loads is None else loads
        self._under_way: list[Arriving] = []
        self._here: list[Arriving] = []
        self._waiting = self._enough = 0  # entries of all processes' sites; of a block's sites

    def add(self, sums: InputSums) -> Iterator[tuple[Site, Covariance]]:
        """Begin to add up some sites; drops the references to their sums.

        The reductions run in the background until the next call. All other collectives must meanwhile come in the same order on all
        processes.

        Yields:
            This process's own sites to solve now, with the sums of all processes.

        Raises:
            ValueError: naming the layer and the processes, if an input is shared in one and not in the other; or if no process has
                a token at a site.
        """
        job = self._job
        if job.count == 1:
            yield from sums.release()
            return
        self._arrive()
        sums.flush()  # its errors must be raised before the first reduction
        sites = _all_sites(job.exchange([(site, c.tokens, c.device.type) for site, c in sums.partial()]))
        refuse_empty([(site.name, tokens) for site, (tokens, _) in sites.items()], sums.MASKED)
        pools = _pools(job, sums, {site: tokens for site, (tokens, _) in sites.items()})
        owners = self.deal([site.d_in for site in sites])
        for (site, (_, kind)), owner in zip(sites.items(), owners, strict=True):
            arriving = begin(job, sums.take(site, torch.device(kind)), site, owner)
            expert = expert_of(site.name)
            arriving.pool = None if expert is None else pools.get(expert.stack)
            self._under_way.append(arriving)
        added = sum(site.d_in**2 for site in sites)
        self._waiting += added
        self._enough = max(self._enough, added)
        if self._waiting >= job.count * self._enough:
            yield from self.rest()

    def deal(self, widths: Sequence[int]) -> list[int]:
        """The owners of some sites, by `deal`, given what was dealt before. The widths must be the same on all processes."""
        owners = deal(widths, self._job.count, self._loads)
        for d, owner in zip(widths, owners, strict=True):
            self._loads[owner] += float(d) ** 3
        return owners

    def rest(self) -> Iterator[tuple[Site, Covariance]]:
        """Yields all sites that were added and not yielded."""
        self._arrive()  # all of them, before the first is solved
        self._here.sort(key=lambda each: each.site.d_in)  # the largest last, when nothing else is in memory
        self._waiting = 0
        while self._here:
            each = self._here.pop(0)
            self._job.enters(f"the work on {each.site.name!r}")
            yield each.site, each.take()

    def _arrive(self) -> None:
        while self._under_way:
            each = self._under_way.pop(0)
            each.wait()
            if each.own is not None:
                self._here.append(each)


def _pools(job: Job, sums: InputSums, tokens: Mapping[Site, int]) -> dict[str, Pool]:
    """Collective: parameter of fused experts → the sums of all of its experts over all processes, where one has few tokens."""
    few: dict[str, int] = {}
    for site, count in tokens.items():
        expert = expert_of(site.name)
        if expert is not None and len(site.members) == 1 and count < 2 * site.d_in:
            few[expert.stack] = site.d_in
    pools = {}
    for stack, d in few.items():
        own = sums.pool(stack)
        vector = torch.zeros(d * d + d + 3, dtype=torch.float64)
        if own is not None:
            vector = torch.cat(
                [own.matrix.flatten(), own.total, own.total.new_tensor([own.tokens, own.mixed_energy, own.lost])]
            ).cpu()
        what = f"the reduction of {stack!r}"
        with job.naming_rank(what):
            job.reduce(vector, 0, what).wait()
        matrix, total, numbers = job.broadcast(vector, 0).split([d * d, d, 3])
        count, mixed_energy, lost = numbers.tolist()
        pools[stack] = Pool(matrix.view(d, d), total, int(count), mixed_energy, lost)
    return pools


def deal(widths: Sequence[int], count: int, loads: Sequence[float] = ()) -> list[int]:
    """Deal sites to processes: the largest first, each to the process with the smallest load.

    With equal loads before, the largest load is at most 4/3 of the best possible one (Graham 1969).

    Args:
        widths: d_in of the sites; an eigenproblem costs d_in³.
        count: of processes.
        loads: per process, what it was dealt before; zeros by default.

    Returns:
        For every site, its owner.

    Example:
        >>> deal([48, 48, 48, 112], 2)
        [1, 1, 1, 0]
    """
    work = list(loads) or [0.0] * count
    owners = [0] * len(widths)
    for index in sorted(range(len(widths)), key=lambda i: -widths[i]):
        owners[index] = min(range(count), key=work.__getitem__)
        work[owners[index]] += float(widths[index]) ** 3
    return owners


def _all_sites(reports: Sequence[Sequence[tuple[Site, int, str]]]) -> dict[Site, tuple[int, str]]:
    """Site → tokens in all processes, and the kind of device that sums it; `ValueError` unless all share inputs alike."""
    totals: dict[Site, tuple[int, str]] = {}
    whose: dict[str, tuple[Site, int]] = {}
    for number, sites in enumerate(reports):
        for site, tokens, kind in sites:
            for member in site.members:
                other, before = whose.setdefault(member, (site, number))
                if other != site:
                    raise InputError(
                        f"{member!r} shares its input with {_others(member, other)} on rank {before}, and with "
                        f"{_others(member, site)} on rank {number}: one sum cannot serve both. Calibrate them in separate runs "
                        f"(targets=[{member!r}], …)."
                    )
            before_tokens, kind_before = totals.get(site, (0, kind))
            totals[site] = (before_tokens + tokens, kind_before)
    return totals


def _others(member: str, site: Site) -> str:
    return " and ".join(repr(name) for name in site.members if name != member) or "no other layer"


def _packed(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The state of a root as one vector; the inverse is `_unpacked`."""
    numbers = [facts["tokens"], facts["mass"], facts["outliers"], *facts["sums"].values()]
    return torch.cat([tensors["root"], tensors["total"], tensors["root"].new_tensor(numbers)])


def _unpacked(vector: torch.Tensor, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    d = like["d_in"]
    entries, total, numbers = vector.split([d * (d + 1) // 2, d, 3 + len(like["sums"])])
    tokens, mass, outliers, *sums = numbers.tolist()
    facts = {"d_in": d, "tokens": int(tokens), "mass": mass, "outliers": int(outliers)}
    return {**facts, "sums": dict(zip(like["sums"], sums, strict=True))}, {"root": entries, "total": total}
