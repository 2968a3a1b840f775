"""The resident strategy: one ordinary forward pass a batch, with the sums of all sites in memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nullspace.calibration.input_sums import InputSums, leave_out_uncalled
from nullspace.calibration.recording import recording
from nullspace.calibration.run import Run
from nullspace.calibration.totals import Totals, uncalled_everywhere
from nullspace.distributed import Job
from nullspace.model.batches import (
    Call,
    calls,
    evaluating,
    forward_options,
    input_device,
    naming_batch,
    padded_batch,
    refuse_unreached,
)
from nullspace.model.sharded import gathers_weights
from nullspace.model.sites import Site, Targets
from nullspace.model.token_rows import TokenRows
from nullspace.moments.covariance import Covariance
from nullspace.moments.precision import precision_of
from nullspace.progress import Progress


def stream_resident(
    run: Run, targets: Targets, precision: str | Mapping[str, str], report: Progress
) -> Iterator[tuple[Site, Covariance]]:
    """One resident pass; arguments as of `nullspace.calibration.stream.one_pass`."""
    model, job = run.model, run.job
    rows = TokenRows(model, functools.cache(functools.partial(padded_batch, model, run.loader)))
    sums = InputSums(targets, precision, rows, pooled=run.pooled)
    options = forward_options(model, targets)
    share = job.share(run.loader)
    total, tokens = share.length, 0
    kept = run.partial_sums(targets, precision)
    before = 0 if kept is None else kept.batches
    job.enters("the forward pass")
    report("forward", before, total, 0)
    in_step = job.count > 1 and gathers_weights(model)
    later: list[Exception] | None = [] if in_step else None

    def begin(call: Call) -> None:
        sums.begin_batch(call.number, call.padding)

    own = calls(model, share)
    steps = _in_step(model, own, begin, job) if in_step else _one_by_one(own, begin)
    # A caller's inference mode would hide writes to an input, and its tensors could not be updated outside of it.
    with recording(model, targets, sums, later=later), evaluating(model), torch.inference_mode(False), torch.no_grad():
        for call, counts in steps:
            if call.number <= before:
                continue
            with _gathering(job) if in_step else contextlib.nullcontext(), naming_batch(model, call):
                model(*call.args, **{**options, **call.kwargs})
            for error in later or ():  # raised here, since the other processes go on to the next exchange
                raise error
            if counts:
                sums.end_batch()
                if tokens == before == 0:
                    refuse_unreached(model, run.loader, targets, sums.uncalled)
                tokens += call.padding.tokens
                report("forward", share.read, total, tokens)
            if kept is not None and kept.asked:
                break
    if kept is not None:
        for site, covariance in kept.load(
            input_device(model) or torch.device("cpu"), functools.partial(precision_of, precision=precision)
        ):
            sums.absorb(site, covariance)
        if kept.asked:
            kept.keep(share.read, sums.partial())
            return
    job.check_share(share)
    leave_out_uncalled(uncalled_everywhere(sums, job), targets)
    totals = Totals(job, run.loads)
    if kept is not None:
        yield from kept.until_asked(totals.add(sums), share.read)
        return
    yield from totals.add(sums)
    yield from totals.rest()


def _gathering(job: Job) -> contextlib.AbstractContextManager[None]:
    return job.naming_rank("a forward pass that gathers weights from all ranks")


def _one_by_one(own: Iterator[Call], begin: Callable[[Call], None]) -> Iterator[tuple[Call, bool]]:
    for call in own:
        begin(call)
        yield call, True


def _in_step(model: nn.Module, own: Iterator[Call], begin: Callable[[Call], None], job: Job) -> Iterator[tuple[Call, bool]]:
    """Yields this process's calls, then calls that do not count, until no process has calls left, so that all make equally many.

    A process that has run out of batches repeats its last call; one that never had any repeats the first call of another process.
    Errors of a batch must be raised before the exchange that begins the next forward pass.
    """
    spare: Call | None = None
    while True:
        call = next(own, None)
        if call is not None:
            begin(call)
        left = job.exchange(call is not None)
        if not any(left):
            return
        if spare is None and not all(left):  # the first time, and on all
            giver, there = left.index(True), input_device(model)
            sent = job.exchange(pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, call) if job.number == giver else None)[giver]
            assert sent is not None
            spare = pytree.tree_map_only(torch.Tensor, functools.partial(torch.Tensor.to, device=there), sent)
        spare = spare if call is None else call
        assert spare is not None
        yield spare, call is not None
