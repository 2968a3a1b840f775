"""Principal components of layers' inputs, how EVA distributes ranks among them, and whether they have settled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from peft import EvaConfig
from torch import nn

from nullspace import factors, solvers
from nullspace.calibration.input_sums import InputSums
from nullspace.errors import InputError
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance
from nullspace.moments.directions import noise_of

# Equal inputs less their mean leave less than this part of Σ‖x‖², by `Covariance.products`: rounding, not variance.
NO_VARIANCE = {"fp64": 1e-12, "mixed": 1e-6}
# With this many tokens per direction of an input, components are computed whenever the number of batches has doubled.
EARLIEST = 32


class Components(NamedTuple):
    """The first k principal components of one input."""

    vectors: torch.Tensor
    """(k, d_in), orthonormal rows."""
    eigenvalues: torch.Tensor
    """(k,), descending."""
    shares: torch.Tensor
    """(k,), of the whole variance."""
    varying: int
    """How many of them vary by more than rounding."""


class Settled:
    """Whether every component that is used agrees with that of half the data, to a cosine of `EvaConfig.tau`."""

    def __init__(self, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], eva: EvaConfig) -> None:
        self._layers, self._ranks, self._eva = layers, ranks, eva
        self._next = 1
        self._before: dict[str, Components] = {}

    def __call__(self, number: int, sums: InputSums) -> bool:
        if number < self._next:
            return False
        self._next = 2 * number
        sites = sums.partial()
        if sum(len(site.members) for site, _ in sites) < len(self._layers):
            return False
        if any(covariance.tokens < EARLIEST * site.d_in for site, covariance in sites):
            return False
        before, self._before = self._before, components_of_layers(in_order(sites, self._layers), self._ranks, self._eva, False)
        ranks = distribute(self._before, self._ranks)
        return bool(before) and all(
            bool(((now.vectors[: ranks[name]] * before[name].vectors[: ranks[name]]).sum(1).abs() >= self._eva.tau).all())
            for name, now in self._before.items()
        )


def in_order(pairs: Iterable[tuple[Site, Covariance]], layers: Mapping[str, nn.Module]) -> list[tuple[Site, Covariance]]:
    """Sites, and the members of each, in the order of the layers in the model rather than of their calls."""
    index = {name: number for number, name in enumerate(layers)}
    ordered = [(Site(tuple(sorted(site.members, key=index.__getitem__)), site.d_in), sums) for site, sums in pairs]
    return sorted(ordered, key=lambda pair: index[pair[0].name])


def components_of_layers(
    sites: list[tuple[Site, Covariance]], ranks: Mapping[str, int], eva: EvaConfig, gather: bool
) -> dict[str, Components]:
    """The components of every layer, in PEFT's order for equal shares: the first layer of every input, then the others.

    Args:
        sites: with their sums. The list is emptied, so that each sum is freed after use.
        ranks: layer → the rank that its configuration asks for.
        eva: `rho` counts.
        gather: add up the sums of all ranks of the default group, on all of them.

    Raises:
        ValueError: naming the layer, if it had too few tokens for its components, or its inputs do not vary.
    """
    of_site: dict[tuple[str, ...], Components] = {}
    while sites:
        site, covariance = sites.pop(0)
        wanted = max(round(ranks[name] * eva.rho) for name in site.members)
        of_site[site.members] = _components_of(site, covariance, wanted, gather)
        del covariance
    first = {members[0]: components for members, components in of_site.items()}
    return {**first, **{name: components for members, components in of_site.items() for name in members[1:]}}


def _components_of(site: Site, covariance: Covariance, wanted: int, gather: bool) -> Components:
    c, mean, tokens = covariance.matrix(), covariance.mean(), covariance.mass
    if gather:
        total = torch.cat([mean * tokens, mean.new_tensor([tokens])])
        dist.all_reduce(c)
        dist.all_reduce(total)
        tokens = float(total[-1])
        mean = total[:-1] / tokens
    k = min(wanted, site.d_in)
    if tokens < k + 1:
        raise InputError(
            f"{site.name!r} received {tokens:.0f} tokens, which have at most {max(tokens - 1, 0):.0f} principal components, but "
            f"r · rho asks for {k}: give it more tokens, or a smaller rank or rho"
        )
    c_centred = factors.centred(c, mean, tokens)
    variance = c_centred.trace()
    if not bool(variance > NO_VARIANCE[covariance.products] * c.trace()):
        raise InputError(f"the inputs of {site.name!r} are all the same: there is no variance to explain")
    noise = max(noise_of(covariance), solvers.ZERO_EIGENVALUE * float(c.trace()))
    del c
    values, vectors = solvers.top_eigenpairs(c_centred, k)
    values = values.clamp(min=0)
    return Components(vectors.mT, values, values / variance, int((values > noise).sum()))


def distribute(components: Mapping[str, Components], ranks: Mapping[str, int]) -> dict[str, int]:
    """How many of the largest shares are each layer's, as many as the ranks add up to. Equal ones go to the first layer."""
    offers = {name: factors.caught(each.shares, 1) for name, each in components.items()}
    return factors.allocated(offers, sum(ranks.values()), least=0).ranks


def factor(name: str, components: Components, rank: int, *, whiten: bool, device: torch.device | None) -> torch.Tensor:
    """A (rank, d_in) float32 on the device: the first components, divided by λ^¼ under `whiten`.

    Raises:
        ValueError: naming the layer, if a component without variance is to be whitened.
    """
    a, values = components.vectors[:rank], components.eigenvalues[:rank]
    if whiten and rank:
        if not bool(values[-1] > NO_VARIANCE["fp64"] * values[0]):
            raise InputError(f"component {rank} of {name!r} explains nothing, and cannot be whitened: use a smaller rank")
        a = a / values.pow(0.25)[:, None]
    return a.to(device or a.device, torch.float32, copy=True, memory_format=torch.contiguous_format)
