"""`compute_null_spaces`: the whole calibration in one call."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nullspace.artifacts.checkpoint import Checkpoint, check_site
from nullspace.artifacts.identity import fingerprint_of_run, weights_of
from nullspace.artifacts.null_space import NullSpace
from nullspace.artifacts.spaces import (
    QUIET,
    TOLERANCE,
    NullSpaces,
    _bottom,
    _few_names,
    _warn_of_few_directions,
    check_avoid,
    check_site_rank,
)
from nullspace.calibration.stream import check_options, resolve_strategy, stream_covariances
from nullspace.checks import Range, check_integer, check_real
from nullspace.distributed.job import Job
from nullspace.distributed.loaders import example_of, length
from nullspace.model.linear import weight_shape
from nullspace.model.sharded import prepare_sharded, reshard_model
from nullspace.model.sites import Site, find_targets
from nullspace.model.weights import refuse_meta
from nullspace.model.wrappers import unwrap
from nullspace.moments.covariance import precision_of
from nullspace.planning.choice import advice
from nullspace.progress import Progress, reporter
from nullspace.solvers.together import decompose

logger = logging.getLogger(__name__)

# Infinity: whatever rounding has left is accepted.
ANY_TOLERANCE = Range("a number ≥ 0", lambda value: value >= 0)


def compute_null_spaces(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    rank: int = 128,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] | None = None,
    strategy: str = "auto",
    precision: str | Mapping[str, str] = "auto",
    tolerance: float = TOLERANCE,
    spectrum: bool = False,
    avoid: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Progress = True,
    job: Job | None = None,
) -> NullSpaces:
    """Run the model over the loader and find, for every linear layer, the directions that its input hardly ever takes.

    Under an initialised `torch.distributed` process group, all of its processes have to call this: each reads its share of the
    loader and solves its share of the sites, and all get the same. See `stream_covariances`.

    Args:
        model: any module; run in eval mode, without gradients, and left as it was found.
        loader: an iterable of mappings that the model takes (`input_ids`, `attention_mask`, …), or of tensors. It should yield
            at least d_in + rank tokens: with fewer, part of the null space is only what the data did not show.
        rank: columns of each basis: at least the rank of the adapters that will be made of it.
        targets: `"all-linear"`, a list of name endings, or a regular expression: see `nullspace.sites.find_targets`. `"all-linear"`
            leaves out layers that are smaller than the rank, that these data do not reach, or whose output is not W x + b, with
            one warning; a layer that is named otherwise is an error then.
        exclude: what to take away from `targets`: a list of name endings, or a regular expression.
        strategy: how the model is run: see `stream_covariances`.
        precision: `"auto"`: the fast sums of `Covariance`, and a second pass in float64 over just those sites, if there are any,
            whose bases rounding may have made louder than `tolerance` allows (`NullSpace.excess_estimate`), and a third one
            by QR where float64 is short too. `"mixed"`: the fast sums alone. `"fp64"`: every product in float64 at once. `"qr"`:
            no product at all. Or a mapping from regular expressions for layer names to these: see `stream_covariances`.
        tolerance: excess leak, by estimate, that `"auto"` accepts.
        spectrum: report effective ranks too.
        avoid: module name → (m, d_in) matrix whose rows the basis is to be orthogonal to: the A matrices of adapters that were
            trained before (`nullspace.integrations.peft.row_spaces`), so that a new one does not write where they read (O-LoRA,
            arXiv 2310.14152). The members of a site avoid each other's too.
        device, hidden_states: for the layerwise strategy: see `stream_covariances`.
        checkpoint: a directory for what is finished, site by site. A run that was cut off and is called again with the same
            arguments goes on behind the last finished site (with `strategy="layerwise"`, in the block where it was), and ends
            with the same bits. The caller deletes it. The loader must give the same batches every time. Several processes need a
            directory that all of them see; each writes its own sites, no process holds all bases, and what is returned reads them
            from there when they are asked for: it is to be deleted after that. Another number of processes may go on with it.
        progress: True for bars (of the first process), False for none, or a callable (`nullspace.progress.Progress`).
        job: which processes work together; by default those of the default process group, if one is initialised.

    Returns:
        A mapping from module name to `NullSpace`, in the model's own order. Of several processes without a checkpoint, each holds
        all bases, 8 · d_in · rank bytes a site.

    Raises:
        ValueError: see `stream_covariances`; before the forward pass if the rank does not fit a layer, or if the checkpoint is
            that of another run (another model, data, or setting: which ones is said), has a damaged `run.json`, or is asked for
            with a loader that can be read only once; after it, naming the site, if the rank does not fit beside what members that
            turn out to share an input avoid between them.

    Warns:
        UserWarning: naming what `"all-linear"` has left out; the sites that saw fewer than d_in + rank tokens; those that a second
            pass should sum again, if the loader can be read only once; and file and site of a damaged file of the checkpoint,
            whose site is computed again.

    Out of memory, PyTorch's error comes with what the run was going to take, and the cheapest setting that fits
    (`nullspace.planning`).
    """
    job = job or Job()
    with job.sharing_errors(), contextlib.ExitStack() as held:
        rank = check_integer("rank", rank)
        check_real("tolerance", tolerance, ANY_TOLERANCE)
        check_options(strategy, precision, hidden_states, device)
        model = unwrap(model)
        modules = find_targets(model, targets, exclude=exclude, rank=rank)
        refuse_meta(model)
        spread = prepare_sharded(model, modules, job, strategy)
        avoided = check_avoid(avoid, modules)
        for name in avoided:
            check_site_rank(Site((name,), weight_shape(modules[name])[1]), rank, avoided)
        if strategy == "auto":
            strategy, hidden_states = resolve_strategy(
                model, loader, modules, device=device, hidden_states=hidden_states, rank=rank, job=job
            )
            device = None if strategy == "resident" else device
            hidden_states = "auto" if strategy == "resident" else hidden_states
        report_progress = reporter(progress, bars=job.first)
        kept: Checkpoint | None = None
        if checkpoint is not None:
            settings = {
                "rank": rank,
                "precision": precision if isinstance(precision, str) else dict(precision),
                "tolerance": tolerance,
                "spectrum": spectrum,
                "strategy": strategy,
                "avoid": {name: hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest() for name, rows in avoided.items()},
            }
            if spread:  # fingerprints of sharded weights are collectives
                job.exchange(None)
            run = fingerprint_of_run(model, loader, modules, settings, job)
            job.check_same(**run)
            kept = Checkpoint(checkpoint, run, job)
            held.callback(kept.close)

        def check(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
            space = NullSpace.from_facts(facts, tensors)
            check_site(facts, modules)
            if space.rank != rank:
                raise ValueError(f"its rank is {space.rank}, not {rank}")

        found_before = kept.load(check) if kept is not None else ()
        spaces = [NullSpace.from_facts(f, read() if job.count == 1 else _without_basis(f, read)) for f, read in found_before]
        done = {name for space in spaces for name in space.site.members}

        bottom_of = functools.partial(_bottom, rank=rank, spectrum=spectrum, avoid=avoided)

        def explain() -> str:
            return advice(
                model,
                targets=modules,
                strategy=strategy,
                batch=example_of(loader),
                batches=length(loader),
                device=device,
                rank=rank,
            )

        def measure(names: Iterable[str], precision: str | Mapping[str, str], forward: str) -> list[NullSpace]:
            def renamed(stage: str, done: int, total: int | None, tokens: int) -> None:
                report_progress(forward if stage == "forward" else stage, done, total, tokens)

            if kept is not None:
                kept.hold()
            found: list[NullSpace] = []
            # A caller in inference mode would otherwise get bases that no later training step may touch.
            # A forecast runs the model; of a sharded one all processes would have to.
            with torch.inference_mode(False), contextlib.nullcontext() if spread else _explaining_memory(explain):
                stream = stream_covariances(
                    model,
                    loader,
                    targets=modules.only(names),
                    strategy=strategy,
                    precision=precision,
                    device=device,
                    hidden_states=hidden_states,
                    progress=renamed,
                    job=job,
                )
                for space in decompose(stream, bottom_of):
                    if kept is not None:
                        kept.keep(space.site.name, space.facts(), {"basis": space.basis, "eigenvalues": space.eigenvalues})
                    logger.info("%s: leak %.1e, rounding %.0e of it", space.site, space.leak, space.excess_estimate)
                    found.append(space)
                    members = sum(len(s.site.members) for s in found)
                    report_progress("null spaces", members + (len(done) if forward == "forward" else 0), len(modules), 0)
            return _pooled(found, owners, kept, job)

        owners: dict[Site, int] = {}
        left = [name for name in modules if name not in done]
        if left:
            spaces += measure(left, precision, "forward")
        once = isinstance(loader, Iterator)
        for better in ("fp64", "qr"):
            unsure = [
                s
                for s in spaces
                if precision_of(s.site.name, precision) == "auto"
                and s.precision not in (better, "qr")
                and s.excess_estimate > tolerance
            ]
            if better == "qr":  # without massive tokens a leak as small as this is none, and more digits of it are worth no pass
                unsure = [s for s in unsure if s.outliers > 0 or s.leak > QUIET]
            if once:
                break
            if not unsure:
                continue
            again = {s.site: s for s in measure([m for s in unsure for m in s.site.members], better, f"forward, {better}")}
            spaces = [again.get(s.site, s) for s in spaces]
        if once and unsure and job.first:
            warnings.warn(
                f"rounding may have cost {len(unsure)} of {len(spaces)} sites more than {tolerance:g} of their leak (at worst "
                f"{max(s.excess_estimate for s in unsure):.1g}, by estimate): {_few_names(unsure)}. The loader can be read only "
                "once, so they were not summed again: use precision='fp64', or a loader that can be read twice.",
                stacklevel=2,
            )
        modules.settle(model, quiet=not job.first)
        if job.first:
            _warn_of_few_directions(spaces)
        if spread:
            reshard_model(model)
            job.exchange(None)
        weights = weights_of(modules)
        place = {name: index for index, name in enumerate(modules)}  # one process does not see in which order all are called
        spaces.sort(key=lambda s: min(place[member] for member in s.site.members))
        if job.count == 1:
            return NullSpaces(spaces, weights)
        report_progress("null spaces", len(modules), len(modules), 0)
        if kept is not None:
            return NullSpaces._of_files(spaces, kept, weights)
        return NullSpaces([replace(s, basis=job.broadcast(s.basis, owners[s.site])) for s in spaces], weights)


def _without_basis(facts: Mapping[str, Any], read: Callable[..., dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a space, the basis only by its shape: what a process must know of another one's."""
    basis = torch.empty(facts["d_in"], facts["rank"], dtype=torch.float64, device="meta")
    return {"basis": basis, **read("eigenvalues")}


def _pooled(found: list[NullSpace], owners: dict[Site, int], kept: Checkpoint | None, job: Job) -> list[NullSpace]:
    """What all processes have found; of the others', all but the bases. `owners` learns whose they are."""
    if job.count == 1:
        return found
    own = [(s.facts(), s.eigenvalues, 0 if kept is None else kept.numbers[s.site.name]) for s in found]
    mine = {s.site: s for s in found}
    everyones: list[NullSpace] = []
    for number, theirs in enumerate(job.exchange(own)):
        for facts, eigenvalues, file in theirs:
            space = NullSpace.from_facts(facts, _without_basis(facts, lambda _, found=eigenvalues: {"eigenvalues": found}))
            owners[space.site] = number
            everyones.append(mine.get(space.site, space))
            if kept is not None:
                kept.numbers[space.site.name] = file
    return everyones


@contextlib.contextmanager
def _explaining_memory(explain: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # PyTorch's allocator for the CPU raises a plain RuntimeError.
        if not isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        try:
            text = explain()
        except Exception:  # advice is not worth hiding the error for
            raise error from None
        kind = torch.cuda.OutOfMemoryError if isinstance(error, torch.cuda.OutOfMemoryError) else MemoryError
        raise kind(f"{error}\n{text}") from error
