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
        run = prepare(
            model,
            loader,
            targets=targets,
            exclude=exclude,
            strategy=strategy,
            precision=precision,
            device=device,
            hidden_states=hidden_states,
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
    """The null spaces of a run, in the order in which they were found.

    Args:
        run: the calibration.
        rank, spectrum: as of `compute_null_spaces`.
        avoided: `check_avoid`'s.
    """

    def __init__(self, run: Run, rank: int, spectrum: bool, avoided: Mapping[str, torch.Tensor]) -> None:
        self.spaces: list[NullSpace] = []
        self._run, self._rank = run, rank
        self._solve = functools.partial(bottom_of, rank=rank, spectrum=spectrum, avoid=avoided)
        self._kept: Checkpoint | None = None
        self._owners: dict[Site, int] = {}  # of several processes, which one has the basis

    def resume(self, kept: Checkpoint, held: contextlib.ExitStack) -> None:
        """Take what a checkpoint holds; from now on, finished sites go there. `held` closes it."""
        held.callback(kept.close)
        self._kept = kept

        def check(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
            space = NullSpace.from_facts(facts, tensors)
            check_site(facts, self._run.targets)
            if space.rank != self._rank:
                raise ValueError(f"its rank is {space.rank}, not {self._rank}")

        for facts, read in kept.load(check):
            self.spaces.append(NullSpace.from_facts(facts, read() if self._run.job.count == 1 else _without_basis(facts, read)))

    def find(self) -> None:
        """Find the spaces that are not there yet, in one pass."""
        done = {name for space in self.spaces for name in space.site.members}
        left = [name for name in self._run.targets if name not in done]
        if left:
            self.spaces += self._measure(left, self._run.precision, "forward", len(done))

    def refine(self, tolerance: float) -> list[NullSpace]:
        """Sum the sites again whose bases may be worse than `tolerance` allows, in float64 and then by QR.

        Returns:
            The sites that should be summed again, where the loader can be read only once; otherwise nothing.
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
            if better == "qr":  # without massive tokens a leak as small as this counts as none: more of its digits need no pass
                unsure = [s for s in unsure if s.outliers > 0 or s.leak > NEGLIGIBLE_LEAK]
            if unsure:
                names = [member for s in unsure for member in s.site.members]
                again = {s.site: s for s in self._measure(names, better, f"forward, {better}", 0)}
                self.spaces = [again.get(s.site, s) for s in self.spaces]
        return []

    def result(self) -> NullSpaces:
        """All spaces, in the model's order. Of several processes, each gets the bases of the others, or reads them when needed."""
        run, job = self._run, self._run.job
        weights = {name: run.weights[name] for name in run.targets}
        place = {name: index for index, name in enumerate(run.targets)}  # one process does not see the order of all calls
        self.spaces.sort(key=lambda s: min(place[member] for member in s.site.members))
        if job.count == 1:
            return NullSpaces(self.spaces, weights)
        run.report("null spaces", len(run.targets), len(run.targets), 0)
        if self._kept is not None:
            return NullSpaces._of_files(self.spaces, self._kept, weights)
        return NullSpaces([replace(s, basis=job.broadcast(s.basis, self._owners[s.site])) for s in self.spaces], weights)

    def _measure(self, names: Iterable[str], precision: str | Mapping[str, str], forward: str, before: int) -> list[NullSpace]:
        """One pass over some targets.

        Args:
            names: of the targets.
            precision: of the sums.
            forward: what the progress of the forward pass is called.
            before: how many targets were finished before, for the progress of the solutions.
        """
        run = self._run

        def report(stage: str, done: int, total: int | None, tokens: int) -> None:
            run.report(forward if stage == "forward" else stage, done, total, tokens)

        if self._kept is not None:
            self._kept.hold()
        found: list[NullSpace] = []
        # A basis that was made in a caller's inference mode could not be used in training later. A forecast runs the model, which
        # of a sharded one is a collective.
        with torch.inference_mode(False), contextlib.nullcontext() if run.is_sharded else _explaining_memory(self._advice):
            stream = one_pass(run, run.targets.only(names), precision=precision, report=report)
            for space in decompose(stream, self._solve):
                if self._kept is not None:
                    self._kept.keep(space.site.name, space.facts(), {"basis": space.basis, "eigenvalues": space.eigenvalues})
                logger.info("%s: leak %.1e, rounding %.0e of it", space.site, space.leak, space.excess_estimate)
                found.append(space)
                run.report("null spaces", before + sum(len(s.site.members) for s in found), len(run.targets), 0)
        return self._pooled(found)

    def _pooled(self, own: list[NullSpace]) -> list[NullSpace]:
        """Collective: the spaces of all processes, those of the others without their bases."""
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
        )


def _without_basis(facts: Mapping[str, Any], read: Callable[..., dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a space, the basis only by its shape: what a process must know of another one's."""
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
        except Exception:  # advice is not worth hiding the error for
            raise error from None
        kind = torch.cuda.OutOfMemoryError if isinstance(error, torch.cuda.OutOfMemoryError) else MemoryError
        raise kind(f"{error}\n{text}") from error
