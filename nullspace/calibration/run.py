"""`Run`: one calibration. Its arguments are checked once; its strategy, fingerprints and checkpoint are determined once.

`compute_null_spaces`, `compute_covariances` and `stream_covariances` prepare a run and make one or more passes over its loader
(`nullspace.calibration.stream.one_pass`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nullspace.artifacts import store
from nullspace.artifacts.checkpoint import Checkpoint
from nullspace.artifacts.identity import Fingerprints, Weights, fingerprint_of_run
from nullspace.artifacts.residual import warn_of_residual
from nullspace.calibration.hidden_states import PLACES
from nullspace.calibration.interruption import Interruption, PartialSums, deferred
from nullspace.checks import check_device, check_one_of
from nullspace.devices import free_on_device
from nullspace.distributed import Job
from nullspace.distributed.loaders import digest_of, example_of, length
from nullspace.errors import InputError
from nullspace.model import sharded
from nullspace.model.blocks import find_blocks
from nullspace.model.experts import ExpertMatrix, fused_of
from nullspace.model.sharded_tensors import device_of
from nullspace.model.sites import Targets, find_targets
from nullspace.model.weights import refuse_meta
from nullspace.model.wrappers import unwrap
from nullspace.moments.precision import PRECISIONS
from nullspace.planning.choice import choose_strategy
from nullspace.planning.experts import should_pool
from nullspace.planning.memory import free_on_host
from nullspace.planning.plan import EXPERTS, Rates
from nullspace.planning.survey import batch_shape
from nullspace.progress import Progress, reporter

logger = logging.getLogger(__name__)

STRATEGIES = ("auto", "resident", "layerwise")
# Facts of a run that `prepare` compares between processes.
COMPARED = ("strategy", "precision", "targets", "experts")


@dataclass
class Run:
    """One calibration: a model, its targets, the data, and how the model is run.

    Attributes:
        model: without wrappers.
        loader: as given.
        targets: module name → linear layer.
        precision: as given: one for all layers, or a mapping from regular expressions.
        strategy: `"resident"` or `"layerwise"`.
        device: where a layerwise pass computes; None for the devices of the weights.
        hidden_states: where a layerwise pass keeps the hidden states between two blocks.
        pooled: whether what all experts of a layer receive is summed together.
        job: the processes that work together.
        report: gets the progress.
        is_sharded: whether the weights are sharded over processes, so that reading one is a collective.
        loads: per process, Σ d³ of the sites that it was dealt in all passes so far.
    """

    model: nn.Module
    loader: Iterable[Any]
    targets: Targets
    precision: str | Mapping[str, str]
    strategy: str
    device: torch.device | None
    hidden_states: str
    pooled: bool
    job: Job
    report: Progress
    is_sharded: bool
    loads: list[float]
    _fingerprints: Fingerprints = field(default_factory=Fingerprints)
    _kept: Checkpoint | None = None
    _interruption: Interruption | None = None

    @property
    def reads_once(self) -> bool:
        """Whether the loader can be read only once."""
        return isinstance(self.loader, Iterator)

    @functools.cached_property
    def weights(self) -> Weights:
        """Shape and fingerprint of the targets' weights; a collective where weights are sharded."""
        self._before_collectives()
        return self._fingerprints.weights(self.targets)

    def plain_precision(self) -> str | dict[str, str]:
        """The precision as a value that JSON can hold."""
        return self.precision if isinstance(self.precision, str) else dict(self.precision)

    def open_checkpoint(self, directory: str | os.PathLike[str], settings: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint of this run.

        Args:
            directory: of the checkpoint.
            settings: that the results depend on, beside model, data, targets, precision and strategy; values that JSON can hold.

        Raises:
            ValueError: naming what differs, if it is another run's or processes disagree; for a loader that can be read only once.
            FileExistsError: if the directory is neither empty nor a checkpoint.
        """
        self._before_collectives()
        settings = {"precision": self.plain_precision(), "strategy": self.strategy, **settings}
        if fused_of(self.targets.values()):
            settings["experts"] = "pooled" if self.pooled else "each"
        identity = fingerprint_of_run(self.model, self.loader, self.targets, settings, self.job, self._fingerprints)
        self.job.check_same(**{name: fact for name, fact in identity.items() if name not in COMPARED})
        self._kept = Checkpoint(directory, identity, self.job)
        return self._kept

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context manager: an interrupt of a resident pass inside waits until the sums are kept in the checkpoint.

        It is raised at once without a checkpoint, with several processes, and with experts that are one tensor, whose pooled sums
        are not those of their sites.
        """
        if self._kept is None or self.strategy != "resident" or self.job.count > 1 or fused_of(self.targets.values()):
            yield
            return
        with deferred() as interruption:
            self._interruption = interruption
            try:
                yield
            finally:
                self._interruption = None
        if self._kept.sums.exists():
            store.delete_directory(self._kept.sums)

    def partial_sums(self, targets: Targets, precision: str | Mapping[str, str]) -> PartialSums | None:
        """The kept sums of a pass, inside `interruptible`; None if none are to be kept."""
        if self._interruption is None or self._kept is None:
            return None
        named = precision if isinstance(precision, str) else json.dumps(dict(precision))
        return PartialSums(self._kept, named, list(targets), self._interruption)

    def _before_collectives(self) -> None:
        """If reading weights is a collective, first raise on all processes the errors of one, so that none waits for it."""
        if self.is_sharded:
            self.job.exchange(None)


def prepare(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    targets: str | Iterable[str],
    exclude: str | Iterable[str] | None,
    strategy: str,
    precision: str | Mapping[str, str],
    device: torch.device | str | None,
    hidden_states: str,
    progress: bool | Progress,
    job: Job,
    experts: str = "auto",
    rank: int | None = None,
    check: Callable[[Targets], object] | None = None,
) -> Run:
    """Check the arguments of a calibration, and resolve `"auto"`.

    Args:
        rank: columns of the bases, if there are any: layers must be larger, and a forecast counts the bases.
        check: raises for arguments of the caller that do not fit the targets; called before the loader is read.
        others: as in `nullspace.stream_covariances`.

    Raises:
        ValueError, TypeError: as `nullspace.stream_covariances` before the forward pass.
    """
    check_options(strategy, precision, hidden_states, device)
    check_one_of("experts", experts, EXPERTS)
    model = unwrap(model)
    chosen = find_targets(model, targets, exclude=exclude, rank=rank)
    if check is not None:
        check(chosen)
    refuse_meta(model)
    warn_of_residual(model)
    is_sharded = sharded.prepare_sharded(model, chosen, job, strategy)
    pooled = _is_pooled(experts, chosen, loader, rank, job, device, resident=strategy == "resident")
    if strategy == "auto":
        strategy, hidden_states = resolve_strategy(
            model,
            loader,
            chosen,
            device=device,
            hidden_states=hidden_states,
            rank=rank,
            experts="pooled" if pooled else "each",
            job=job,
        )
        if strategy == "resident":
            device, hidden_states = None, "auto"
    elif strategy == "resident" and (device is not None or hidden_states != "auto"):
        raise InputError("device and hidden_states belong to strategy='layerwise'")
    run = Run(
        model=model,
        loader=loader,
        targets=chosen,
        precision=precision,
        strategy=strategy,
        device=None if device is None else torch.device(device),
        hidden_states=hidden_states,
        pooled=pooled,
        job=job,
        report=reporter(progress, bars=job.first),
        is_sharded=is_sharded,
        loads=[0.0] * job.count,
    )
    logger.info("%d layers, strategy %s, precision %s", len(chosen), strategy, run.plain_precision())
    if job.count > 1:
        weights = digest_of([{name: mark for name, (_, mark) in run.weights.items()}])
        names = {} if is_sharded else {"targets": list(chosen)}  # which `prepare_sharded` has compared
        if fused_of(chosen.values()):
            names["experts"] = ["pooled" if pooled else "each"]
        job.check_same(strategy=strategy, precision=run.plain_precision(), **names, weights=weights)
    return run


def _is_pooled(
    experts: str,
    targets: Targets,
    loader: Iterable[Any],
    rank: int | None,
    job: Job,
    device: torch.device | str | None,
    *,
    resident: bool,
) -> bool:
    """Whether experts are pooled, the same on all processes."""
    matrix = next((layer for layer in targets.values() if isinstance(layer, ExpertMatrix)), None)
    if matrix is None or experts != "auto":
        return experts == "pooled"
    batches, shape = length(loader), batch_shape(example_of(loader))
    there = torch.device(device) if device is not None else device_of(matrix.stack)
    pooled = should_pool(
        targets,
        tokens=None if batches is None or shape is None else float(batches * math.prod(shape)),
        rank=rank,
        device=there.type,
        rates=Rates.of(there.type, matrix.stack.dtype),
        free=free_on_device(there) if there.type == "cuda" else free_on_host(),
        resident=resident,
    )
    return any(job.exchange(pooled))


def check_options(
    strategy: str, precision: str | Mapping[str, str], hidden_states: str, device: torch.device | str | None = None
) -> None:
    """Raise `ValueError` for a value that these arguments of `nullspace.stream_covariances` do not take."""
    check_one_of("strategy", strategy, STRATEGIES)
    for value in precision.values() if isinstance(precision, Mapping) else [precision]:
        check_one_of("precision", value, PRECISIONS)
    check_one_of("hidden_states", hidden_states, PLACES)
    if device is not None:
        check_device(device)


def resolve_strategy(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Targets,
    *,
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    rank: int | None = None,
    experts: str = "auto",
    job: Job | None = None,
) -> tuple[str, str]:
    """The strategy and the place of hidden states for `strategy="auto"`, given the model's devices and the free memory.

    If one of several processes has no room for a resident run, all run layerwise.

    Args: as in `nullspace.stream_covariances` and `nullspace.compute_null_spaces`.
    """
    if sharded.is_model_sharded(model):
        return sharded.sharded_strategy(model, lambda: find_blocks(model, targets)), hidden_states
    choice = choose_strategy(
        model,
        targets=targets,
        batch=example_of(loader),
        batches=length(loader),
        device=device,
        hidden_states=hidden_states,
        experts=experts,
        **({} if rank is None else {"rank": rank}),
    )
    chosen = (job or Job.alone()).exchange(choice.strategy)
    if choice.strategy == "resident" and "layerwise" in chosen:
        return "layerwise", hidden_states
    return choice.strategy, choice.hidden_states
