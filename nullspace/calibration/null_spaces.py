"""`compute_null_spaces`: from a model and data to the null spaces of all its layers, in one call."""

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
from nullspace.artifacts.null_space import NullSpace
from nullspace.artifacts.spaces import (
    NEGLIGIBLE_LEAK,
    TOLERANCE,
    NullSpaces,
    bottom_of,
    check_avoid,
    check_site_rank,
    few_names,
    warn_of_few_directions,
)
from nullspace.calibration.run import Run, prepare
from nullspace.calibration.stream import one_pass
from nullspace.checks import Range, check_integer, check_real
from nullspace.distributed import Job
from nullspace.distributed.loaders import example_of, length
from nullspace.errors import InputError, InsufficientMemoryError, PrecisionWarning
from nullspace.model.coverage import matrix_parameters
from nullspace.model.linear import weight_shape
from nullspace.model.sites import Site
from nullspace.moments.precision import precision_of
from nullspace.planning.choice import advice
from nullspace.progress import Progress
from nullspace.solvers import decompose

logger = logging.getLogger(__name__)

# Infinity: whatever error rounding leaves is accepted.
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
    experts: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Progress = True,
    job: Job | None = None,
) -> NullSpaces:
    """Run the model over the loader and compute, for every linear layer, the directions in which its inputs have the smallest norm.

    In an initialised `torch.distributed` process group, all of its processes must call this. Each reads its share of the loader and
    solves its share of the sites; all get the same result. See `stream_covariances`.

    Args:
        model: any module; run in eval mode, without gradients, and left as it was found.
        loader: an iterable of mappings that the model takes (`input_ids`, `attention_mask`, …), or of tensors. It should yield
            at least d_in + rank tokens; with fewer, part of each null space is due to missing data.
        rank: columns of each basis: at least the rank of the adapters made from it.
        targets: `"all-linear"`, a list of name endings, or a regular expression: see `nullspace.model.sites.find_targets`.
            `"all-linear"` leaves out layers that are smaller than the rank, that these data do not reach, or whose output is not
            W x + b, with one warning. Such a layer is an error if it is given by name.
        exclude: layers to remove from `targets`: a list of name endings, or a regular expression.
        strategy: how the model is run: see `stream_covariances`.
        precision: `"auto"`: the fast sums of `Covariance`; then a second pass in float64 over the sites whose excess leak by
            rounding may exceed `tolerance` (`NullSpace.excess_estimate`), and a third one by QR where float64 is not enough.
            `"mixed"`: the fast sums only. `"fp64"`: all products in float64. `"qr"`: QR decompositions, no products. Or a mapping
            from regular expressions for layer names to these: see `stream_covariances`.
        tolerance: estimated excess leak that `"auto"` accepts.
        spectrum: compute effective ranks too.
        avoid: module name → (m, d_in) matrix; the basis will be orthogonal to its rows. With the A matrices of adapters that were
            trained before (`nullspace.integrations.peft.row_spaces`), a new one does not change their inputs (O-LoRA,
            arXiv 2310.14152). The rows of all members of a site count.
        device, hidden_states: for the layerwise strategy: see `stream_covariances`.
        experts: `"each"`, `"pooled"` or `"auto"`: see `stream_covariances`. The basis of an expert with fewer than d_in + rank
            tokens is that of its second moment shrunk towards all experts' of its layer (`Covariance.completed`).
        checkpoint: a directory for finished sites. An interrupted run that is called again with the same arguments continues after
            the last finished site (with `strategy="layerwise"`, in its block), and ends with the same bits. The loader must give
            the same batches every time. Under `strategy="resident"`, an interrupt (Ctrl-C, or a signal that the command line turns
            into an exception) waits for the batch, or for the sites that are being solved, and the sums so far are kept too, 4 ·
            d_in² bytes a site: the next run goes on behind them, and ends with the same sums but for rounding. Not so with several
            processes, and with experts that are one tensor. The caller deletes the
            directory. With several processes, all must see it. Each then writes its own sites, no process holds all bases, and the
            result reads them from there when needed: delete it later than that. Another number of processes may continue.
        progress: True for bars (of the first process), False for none, or a callable (`nullspace.progress.Progress`).
        job: the processes that work together; by default those of the default process group, if one is initialised.

    Returns:
        A mapping from module name to `NullSpace`, in the model's own order. Of several processes without a checkpoint, each holds
        all bases, 8 · d_in · rank bytes a site.

    Raises:
        ValueError: see `stream_covariances`. Before the forward pass: if the rank does not fit a layer; if the checkpoint is
            another run's (the differences are named), has a damaged `run.json`, or is used with a loader that is read only once.
            After it, naming the site: if the rank does not fit beside the rows to avoid of all members that share an input.

    Warns:
        UserWarning: naming the layers that `"all-linear"` has left out; the sites with fewer than d_in + rank tokens; those that a
            second pass should sum again, if the loader can be read only once; and file and site of a damaged file in the
            checkpoint, whose site is computed again.

    PyTorch's out-of-memory error comes with the forecast of this run and the cheapest setting that fits (`nullspace.planning`).
    """
    job = job or Job()
    with job.sharing_errors(), contextlib.ExitStack() as held:
        rank = check_integer("rank", rank)
        check_real("tolerance", tolerance, ANY_TOLERANCE)
        run = prepare(
            model,
            loader,
            targets=targets,
            exclude=exclude,
            strategy=strategy,
            precision=precision,
            device=device,
            hidden_states=hidden_states,
            experts=experts,
            progress=progress,
            job=job,
            rank=rank,
            check=lambda targets: _check_avoid(avoid, targets, rank),
        )
        avoided = check_avoid(avoid, run.targets)
        bases = _Bases(run, rank, spectrum, avoided)
        if checkpoint is not None:
            digests = {name: hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest() for name, rows in avoided.items()}
            settings = {"rank": rank, "tolerance": tolerance, "spectrum": spectrum, "avoid": digests}
            bases.resume(run.open_checkpoint(checkpoint, settings), held)
        bases.find()
        unsure = bases.refine(tolerance)
        if unsure and job.first:
            warnings.warn(
                f"rounding may have cost {len(unsure)} of {len(bases.spaces)} sites more than {tolerance:g} of their leak (at "
                f"worst {max(s.excess_estimate for s in unsure):.1g}, by estimate): {few_names(unsure)}. The loader can be read "
                "only once, so they were not summed again: use precision='fp64', or a loader that can be read twice.",
                PrecisionWarning,
                stacklevel=2,
            )
        run.targets.settle(run.model, warn=job.first)
        if job.first:
            warn_of_few_directions(bases.spaces)
        return bases.result()


def _check_avoid(avoid: Mapping[str, torch.Tensor] | None, targets: Mapping[str, nn.Module], rank: int) -> None:
    """Raise `ValueError`, naming the layer, if rows do not fit it, or leave no room for a basis."""
    avoided = check_avoid(avoid, targets)
    for name in avoided:
        check_site_rank(Site((name,), weight_shape(targets[name])[1]), rank, avoided)


class _Bases:
    """The null spaces of a run, in the order in which they were computed.

    Args:
        run: the calibration.
        rank, spectrum: as in `compute_null_spaces`.
        avoided: result of `check_avoid`.
    """

    def __init__(self, run: Run, rank: int, spectrum: bool, avoided: Mapping[str, torch.Tensor]) -> None:
        self.spaces: list[NullSpace] = []
        self._run, self._rank = run, rank
        self._solve = functools.partial(bottom_of, rank=rank, spectrum=spectrum, avoid=avoided)
        self._columns = None if spectrum else rank
        self._kept: Checkpoint | None = None
        self._owners: dict[Site, int] = {}  # site → the process that has the basis

    def resume(self, kept: Checkpoint, held: contextlib.ExitStack) -> None:
        """Load the sites of a checkpoint, and keep new ones there. `held` closes it."""
        held.callback(kept.close)
        self._kept = kept

        def check(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
            space = NullSpace.from_facts(facts, tensors)
            check_site(facts, self._run.targets)
            if space.rank != self._rank:
                raise InputError(f"its rank is {space.rank}, not {self._rank}")

        for facts, read in kept.load(check):
            self.spaces.append(NullSpace.from_facts(facts, read() if self._run.job.count == 1 else _without_basis(facts, read)))
        if self.spaces:
            logger.info("the checkpoint has %d finished sites", len(self.spaces))

    def find(self) -> None:
        """Compute the missing spaces, in one pass."""
        done = {name for space in self.spaces for name in space.site.members}
        left = [name for name in self._run.targets if name not in done]
        if left:
            self.spaces += self._measure(left, self._run.precision, "forward", len(done))

    def refine(self, tolerance: float) -> list[NullSpace]:
        """Repeat the sums of sites whose estimated excess leak exceeds `tolerance`, in float64 and then by QR.

        Returns:
            The sites that should be summed again, if the loader can be read only once; otherwise an empty list.
        """
        for better in ("fp64", "qr"):
            unsure = [
                s
                for s in self.spaces
                if precision_of(s.site.name, self._run.precision) == "auto"
                and s.precision not in (better, "qr")
                and s.excess_estimate > tolerance
            ]
            if self._run.reads_once:
                return unsure
            if better == "qr":  # without outlier tokens, such a small leak needs no more digits
                unsure = [s for s in unsure if s.outliers > 0 or s.leak > NEGLIGIBLE_LEAK]
            if unsure:
                logger.info("%d sites are summed again by %s: rounding may exceed %g of their leak", len(unsure), better, tolerance)
                names = [member for s in unsure for member in s.site.members]
                again = {s.site: s for s in self._measure(names, better, f"forward, {better}", 0)}
                self.spaces = [again.get(s.site, s) for s in self.spaces]
        return []

    def result(self) -> NullSpaces:
        """All spaces, in the model's order. With several processes, each gets the others' bases, or reads them when needed."""
        run, job = self._run, self._run.job
        weights = {name: run.weights[name] for name in run.targets}
        position = {name: index for index, name in enumerate(run.targets)}  # one process does not see the order of all calls
        self.spaces.sort(key=lambda s: min(position[member] for member in s.site.members))
        size = matrix_parameters(run.model)
        if job.count == 1:
            return NullSpaces(self.spaces, weights, matrix_parameters=size)
        run.report("null spaces", len(run.targets), len(run.targets), 0)
        if self._kept is not None:
            return NullSpaces._of_files(self.spaces, self._kept, weights, size)
        spaces = [replace(s, basis=job.broadcast(s.basis, self._owners[s.site])) for s in self.spaces]
        return NullSpaces(spaces, weights, matrix_parameters=size)

    def _measure(self, names: Iterable[str], precision: str | Mapping[str, str], forward: str, before: int) -> list[NullSpace]:
        """One pass over some targets.

        Args:
            names: of the targets.
            precision: of the sums.
            forward: name of the forward pass in the progress.
            before: number of targets that were finished before, for the progress.
        """
        run = self._run

        def report(stage: str, done: int, total: int | None, tokens: int) -> None:
            run.report(forward if stage == "forward" else stage, done, total, tokens)

        if self._kept is not None:
            self._kept.hold()
        own: list[NullSpace] = []
        # A basis from a caller's inference mode could not be used in training. The forecast runs the model, which is a collective
        # if it is sharded.
        explaining = contextlib.nullcontext() if run.is_sharded else _explaining_memory(self._advice)
        with torch.inference_mode(False), run.interruptible(), explaining:
            stream = one_pass(run, run.targets.only(names), precision=precision, report=report)
            for space in decompose(stream, self._solve, rank=self._columns):
                if self._kept is not None:
                    self._kept.keep(space.site.name, space.facts(), {"basis": space.basis, "eigenvalues": space.eigenvalues})
                logger.info("%s: leak %.1e, rounding %.0e of it", space.site, space.leak, space.excess_estimate)
                own.append(space)
                run.report("null spaces", before + sum(len(s.site.members) for s in own), len(run.targets), 0)
        return self._pooled(own)

    def _pooled(self, own: list[NullSpace]) -> list[NullSpace]:
        """Collective: the spaces of all processes; those of others have no bases (meta tensors)."""
        job, kept = self._run.job, self._kept
        if job.count == 1:
            return own
        mine = {s.site: s for s in own}
        everyones: list[NullSpace] = []
        facts_of_own = [(s.facts(), s.eigenvalues, 0 if kept is None else kept.numbers[s.site.name]) for s in own]
        for number, theirs in enumerate(job.exchange(facts_of_own)):
            for facts, eigenvalues, file in theirs:
                space = NullSpace.from_facts(facts, _without_basis(facts, lambda _, values=eigenvalues: {"eigenvalues": values}))
                self._owners[space.site] = number
                everyones.append(mine.get(space.site, space))
                if kept is not None:
                    kept.numbers[space.site.name] = file
        return everyones

    def _advice(self) -> str:
        run = self._run
        return advice(
            run.model,
            targets=run.targets,
            strategy=run.strategy,
            batch=example_of(run.loader),
            batches=length(run.loader),
            device=run.device,
            rank=self._rank,
            experts="pooled" if run.pooled else "each",
        )


def _without_basis(facts: Mapping[str, Any], read: Callable[..., dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of another process's space: the basis on the meta device."""
    basis = torch.empty(facts["d_in"], facts["rank"], dtype=torch.float64, device="meta")
    return {"basis": basis, **read("eigenvalues")}


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
        except Exception:  # a failed forecast must not hide the error
            raise error from None
        kind = torch.cuda.OutOfMemoryError if isinstance(error, torch.cuda.OutOfMemoryError) else InsufficientMemoryError
        raise kind(f"{error}\n{text}") from error
