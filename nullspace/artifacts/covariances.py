"""`Covariances`: the second moments of all sites of a model, saved, added up, and used without the model.

Null spaces, CorDA's and EVA's factors of any rank are computed from them. Results of more data, other machines or other corpora are
added.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from nullspace.artifacts.identity import Weights, same_fingerprint
from nullspace.artifacts.shard_account import Shards, joined, what_is_missing
from nullspace.artifacts.shared_writes import written_once
from nullspace.artifacts.sitewise import Entry, Sitewise, write_sites
from nullspace.artifacts.store import new_directory
from nullspace.checks import Field, an_object, list_of, optional
from nullspace.errors import InputError, OtherModelError
from nullspace.model.experts import expert_of
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance
from nullspace.moments.grouped import pool_of
from nullspace.moments.pool import Pool
from nullspace.moments.state import DTYPES, FIELDS


class Covariances(Sitewise[Covariance]):
    """Module name → `Covariance`; the members of a site share one object. Loaded ones are read from their files when needed.

    Args:
        pairs: what `stream_covariances` yields.
        weights: module name → (d_out, d_in) and fingerprint of its weight, which identify the model.
        matrix_parameters: parameters in the model's matrices, embeddings and output head aside (`matrix_parameters` of
            `nullspace.model.sites`); None if that is unknown.

    Attributes:
        shards: the shards in the sum, if the data were split (`compute_covariances(shard=…)`); else empty.
    """

    KIND, WHAT, FIELDS = "covariances", "covariance", FIELDS
    MORE_FIELDS: ClassVar[Mapping[str, Field]] = {**Sitewise.MORE_FIELDS, "shards": optional(list_of(an_object()))}
    _dtype = torch.float64
    _last_pool: tuple[str, Pool] | None = None

    def __init__(
        self,
        pairs: Iterable[tuple[Site, Covariance]],
        weights: Weights | None = None,
        *,
        matrix_parameters: int | None = None,
    ) -> None:
        super().__init__(pairs, weights, matrix_parameters=matrix_parameters)
        self.shards: tuple[Shards, ...] = ()

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, partial: bool = False) -> Covariances:
        """Open a directory that `save` wrote, and check every byte. Tensors are read from their files when needed, site by site.

        Args:
            directory: of `save`, `compute_covariances` or the command line.
            partial: accept a sum in which shards of the data are missing.

        Raises:
            FileNotFoundError: if there is no such directory.
            ValueError: naming the file that is missing, truncated, altered or not written by nullspace; or the missing shards.
        """
        loaded = super().load(directory)
        missing = what_is_missing(loaded.shards)
        if missing and not partial:
            raise InputError(
                f"{directory} is not of all its data: {missing} missing. Merge it with these (`nullspace merge`), or take it "
                "as it is: partial=True, --partial"
            )
        return loaded

    def __getitem__(self, name: str) -> Covariance:
        covariance = super().__getitem__(name)
        site, expert = self._of[name].site, expert_of(name)
        if expert is not None and covariance.pool is None and len(site.members) == 1 and covariance.tokens < 2 * site.d_in:
            covariance.pool = self._pool(expert.stack)
        return covariance

    def _pool(self, stack: str) -> Pool:
        """The sum of the experts that share a parameter. The last one is held."""
        if self._last_pool is None or self._last_pool[0] != stack:
            own = {
                id(e): e for n, e in self._of.items() for expert in [expert_of(n)] if expert is not None and expert.stack == stack
            }
            self._last_pool = stack, pool_of([entry.value() for entry in own.values()])
        return self._last_pool[1]

    def _read_more(self, manifest: Mapping[str, Any]) -> None:
        super()._read_more(manifest)
        self.shards = tuple(Shards.from_json(entry) for entry in manifest.get("shards", ()))

    @staticmethod
    def _pack(value: Covariance) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return value.state()

    @staticmethod
    def _unpack(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Covariance:
        return Covariance.from_state(facts, tensors)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False, dtype: torch.dtype = torch.float64) -> None:
        """Write a directory: `nullspace.json` and one safetensors file a site (its lower triangle), completely or not at all.

        In a process group, one process may call this, or all of them. Then one writes, and the others return when it is done.

        Args:
            directory: must not exist yet, or be empty.
            overwrite: replace a directory that nullspace wrote.
            dtype: float64, or float32 for half the space: enough for CorDA and EVA, and for null spaces that leak more than
                some 1e-4 (`NullSpace.excess_estimate` includes its rounding).

        Raises:
            ValueError: for another dtype, or sums beyond its range.
            FileExistsError: if the directory exists and may not be replaced, or another run is writing to it.
            OSError: if it cannot be written; nothing is left behind. An error of the writing process is raised by all callers.
        """
        check_dtype(dtype)

        def write() -> None:
            with new_directory(directory, overwrite=overwrite) as part:
                sites = ((each.site, *each.value().state(dtype), each.weights()) for each in self._entries)
                write_sites(part, self.KIND, sites, content={**self._content(), **account(self.shards)})

        written_once(directory, write)

    @classmethod
    def merge(
        cls,
        runs: Sequence[Covariances],
        *,
        weights: Sequence[float] | None = None,
        normalise: bool = False,
        partial: bool = False,
    ) -> Covariances:
        """The sum of several runs. Each site is added when it is needed.

        Args:
            runs: of one model and the same layers, in any order. They may be merges: order and grouping change only rounding.
            weights: a positive factor a run; 1 by default. Only their ratios matter for bases.
            normalise: first divide each run's sums by their trace, site by site, so that runs count alike whatever their numbers
                and norms of tokens: for several corpora or tasks, all of which a basis shall preserve.
            partial: shards of the data may be missing; the result can be merged with others.

        Raises:
            ValueError: naming what differs, for runs of different layers, sites or models; for weights that are not positive,
                or not one a run; naming the shard, if one is missing or counted twice.
        """
        if not runs:
            raise InputError("nothing to merge")
        weights = [1.0] * len(runs) if weights is None else list(weights)
        if len(weights) != len(runs) or any(not 0.0 < w < float("inf") for w in weights):
            raise InputError(f"give one positive weight a run: {len(runs)} runs, weights {weights}")
        first = runs[0]
        for number, run in enumerate(runs[1:], 2):
            _check_same(first, run, number)
        shards = joined([run.shards for run in runs])
        missing = what_is_missing(shards)
        if missing and not partial:
            raise InputError(
                f"this is not a merge of all data: {missing} missing. Add what is missing, or say that this is a merge on the way: "
                "partial=True, --partial"
            )
        unequal = normalise or any(weight != weights[0] for weight in weights)
        lacking = next((n for n, run in enumerate(runs, start=1) if what_is_missing(run.shards)), None)
        if unequal and lacking is not None:
            raise InputError(f"run {lacking} is a part of its data: merge its shards first, and weigh or normalise the sum of them")
        merged = cls(())
        merged.shards, merged.matrix_parameters = shards, first.matrix_parameters
        merged._set_entries(
            _Sum(entry.site, [run._of[entry.site.name] for run in runs], weights, normalise) for entry in first._entries
        )
        return merged

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a site, of values that JSON can hold."""
        return [
            {
                "site": site.name,
                "members": list(site.members),
                "d_in": site.d_in,
                "tokens": covariance.tokens,
                "mass": covariance.mass,
                "trace": covariance.trace,
                "outliers": covariance.outliers,
                "precision": covariance.products,
            }
            for site in self.sites
            for covariance in [self[site.name]]
        ]


class _Sum(Entry[Covariance]):
    """The sum of one site over several runs."""

    def __init__(self, site: Site, parts: list[Entry[Covariance]], weights: list[float], normalise: bool) -> None:
        super().__init__(site)
        self._parts, self._by, self._normalise = parts, weights, normalise

    def value(self) -> Covariance:
        total: Covariance | None = None
        for part, weight in zip(self._parts, self._by, strict=True):
            covariance = Covariance.from_state(*part.value().state())  # a copy: the run keeps its sums
            if self._normalise and covariance.tokens:  # an expert may have none in one of the runs
                if not covariance.trace > 0:
                    raise InputError(
                        f"the inputs of {self.site.name!r} are all zero in one of the runs: there is no trace to divide by. "
                        "Merge without normalise, or leave that run out"
                    )
                weight /= covariance.trace
            if weight != 1.0:
                covariance.scale(weight)
            if total is None:
                total = covariance
            elif total.precision == covariance.precision:
                total.merge(covariance)
            else:
                raise InputError(
                    f"{self.site.name!r} was summed with precision 'qr' in one run and not in another: they cannot be added"
                )
        assert total is not None
        return total

    def weights(self) -> Weights:
        return self._parts[0].weights()


def account(shards: Iterable[Shards]) -> dict[str, Any]:
    """The field of a manifest for some shards; empty if there are none."""
    entries = [part.as_json() for part in shards]
    return {"shards": entries} if entries else {}


def check_dtype(dtype: torch.dtype) -> None:
    """Raise `ValueError` for a dtype that covariances are not saved in."""
    if dtype not in DTYPES:
        raise InputError(f"covariances are kept in float64 or float32, not {dtype}")


def _check_same(first: Covariances, run: Covariances, number: int) -> None:
    ours, theirs = dict.fromkeys(first.sites), dict.fromkeys(run.sites)
    other = next((s for s in (*ours, *theirs) if s not in ours or s not in theirs), None)
    if other is not None:
        where = "the first one" if other in ours else f"number {number}"
        site = f"{' + '.join(other.members)} (d_in = {other.d_in})"
        raise OtherModelError(f"these runs are of different layers or models: only {where} has the site {site}")
    for entry in first._entries:
        mine, others = entry.weights(), run._of[entry.site.name].weights()
        for name in mine.keys() & others.keys():
            (shape, mark), (other_shape, other_mark) = mine[name], others[name]
            known = mark is not None and other_mark is not None
            if tuple(shape) != tuple(other_shape) or (known and not same_fingerprint(mark, other_mark)):  # type: ignore[arg-type]
                raise OtherModelError(f"these runs are of different models: {name!r} has another weight in number {number}")
