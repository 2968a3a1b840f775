"""`compute_covariances`: the second moments of a model on some data, kept in a directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from nullspace.artifacts.checkpoint import Checkpoint, check_site
from nullspace.artifacts.covariances import Covariances, account, check_dtype
from nullspace.artifacts.identity import Weights, hash_data
from nullspace.artifacts.shard_account import Shards
from nullspace.artifacts.shared_writes import new_shared_directory
from nullspace.artifacts.sitewise import write_sites
from nullspace.artifacts.store import reserved, resolved
from nullspace.calibration.run import Run, prepare
from nullspace.calibration.stream import one_pass
from nullspace.distributed import Job
from nullspace.distributed.loaders import part_of
from nullspace.errors import InputError
from nullspace.model.coverage import matrix_parameters
from nullspace.model.sites import Site
from nullspace.moments.state import check_state
from nullspace.progress import Progress

# A site, the facts and tensors of its covariance, and the weights of its members.
Written: TypeAlias = tuple[Site, Mapping[str, Any], Mapping[str, torch.Tensor], Weights]


def compute_covariances(
    model: nn.Module,
    loader: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] | None = None,
    strategy: str = "auto",
    precision: str | Mapping[str, str] = "fp64",
    dtype: torch.dtype = torch.float64,
    shard: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    experts: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
    job: Job | None = None,
) -> Covariances:
    """Run the model over the loader and save the second moments in a directory, site by site.

    In an initialised `torch.distributed` process group, all of its processes must call this. Each reads its share of the loader,
    and writes its share of the sites into `out`, which all must see. See `stream_covariances`.

    Args:
        model, loader, targets, exclude, strategy, device, hidden_states, experts, progress: as in `nullspace.stream_covariances`.
        out: must not exist yet, or be empty. 4 · d_in² bytes a site (float64).
        precision: as there. `"fp64"` by default, since later ranks or merges may need it.
        dtype: of the files: see `Covariances.save`.
        shard: (i, n): use only every n-th batch of the loader, beginning with the i-th (from 1). For independent jobs, whose sums
            are merged afterwards (`Covariances.merge`). All jobs must get the same batches, which each reads once more for their
            digest. Processes that work together split the shard.
        checkpoint: a directory for finished sites: an interrupted run that is called again continues after them. It takes as much
            space as `out`. The caller deletes it.
        overwrite: replace a directory that nullspace wrote.
        job: the processes that work together; by default those of the default process group, if one is initialised.

    Returns:
        The covariances, read from `out` when needed.

    Raises:
        ValueError: as `nullspace.stream_covariances`; for a checkpoint of another run, or with a damaged `run.json`; for a shard
            that does not exist, has no batch, or is used with a loader that can be read only once or is a share already.
        FileExistsError: if `out` exists and may not be replaced, or another run is writing to it or to `checkpoint`.
        OSError: if it cannot be written; then nothing is left behind.

    Warns:
        UserWarning: naming file and site, for a damaged file of the checkpoint: its site is computed again.
    """
    job = job or Job()
    with job.sharing_errors(), contextlib.ExitStack() as held:
        check_dtype(dtype)
        out = resolved(out)
        if job.first:
            held.enter_context(reserved(out, overwrite=overwrite))
        run = prepare(
            model,
            loader if shard is None else _shard(loader, *shard),
            targets=targets,
            exclude=exclude,
            strategy=strategy,
            precision=precision,
            device=device,
            hidden_states=hidden_states,
            experts=experts,
            progress=progress,
            job=job,
        )
        shards = () if shard is None else (_account_of(loader, *shard),)
        kept: Checkpoint | None = None
        if checkpoint is not None:
            kept = run.open_checkpoint(checkpoint, {"keeps": "covariances", "dtype": str(dtype)})
            held.callback(kept.close)
        order = list(run.targets)
        with torch.inference_mode(False), new_shared_directory(out, job, overwrite=overwrite) as folder, run.interruptible():
            sites = _sites(run, kept, dtype)
            content = {"matrix_parameters": matrix_parameters(run.model), **account(shards)}
            write_sites(Path(folder), Covariances.KIND, sites, content=content, job=job, order=order)
        return Covariances._open(out, check=job.first)


def _sites(run: Run, kept: Checkpoint | None, dtype: torch.dtype) -> Iterator[Written]:
    """Yields this process's sites: those of the checkpoint, then those of a pass over the data, which the checkpoint keeps too."""
    job, targets, weights = run.job, run.targets, run.weights
    done: set[str] = set()

    def check(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        check_state(facts, tensors)
        check_site(facts, targets)

    for number, (facts, read) in enumerate(kept.load(check) if kept is not None else ()):
        site = Site(tuple(facts["members"]), facts["d_in"])
        done.update(site.members)
        if number % job.count == job.number:
            yield (
                site,
                {k: v for k, v in facts.items() if k != "members"},
                read(),
                {member: weights[member] for member in site.members},
            )
    left = targets.only(name for name in targets if name not in done)
    if left and kept is not None:
        kept.hold()
    for site, covariance in one_pass(run, left) if left else ():
        facts, tensors = covariance.state(dtype)
        del covariance
        if kept is not None:
            kept.keep(site.name, {"members": list(site.members), **facts}, tensors)
        yield site, facts, tensors, {member: weights[member] for member in site.members}
        done.update(site.members)
        run.report("covariances", len(done), len(targets), 0)
        del tensors
    targets.settle(run.model, warn=job.first, stacklevel=5)


def _shard(loader: Iterable[Any], number: int, count: int) -> Iterable[Any]:
    """One shard of a loader."""
    if isinstance(loader, Iterator):
        raise InputError("a shard needs a loader that can be read more than once: a list or a DataLoader, not an iterator")
    return part_of(loader, number, count)


def _account_of(loader: Iterable[Any], number: int, count: int) -> Shards:
    """The account of one shard. Reads the loader to its end."""
    whole = hash_data(loader)
    if whole["batches"] < number:
        raise InputError(f"shard {number}/{count} has no batch: there are {whole['batches']}. Ask for no more shards than that")
    return Shards((whole["content"], whole["batches"]), count, (number,))
