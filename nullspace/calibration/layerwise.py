"""Block by block: all batches go through one block before any goes through the next.

The model's own forward runs up to the blocks, once a batch, with stand-ins in their place: what it hands them is kept (hidden
states, masks, rotary embeddings). Then every block is called by hand. So a block's weights, and the sums of its sites, are in
memory only while it is at work.

That is right only for a chain: every block is called once, in order, with what the one before it returned, untouched, and with
nothing else that depends on hidden states. `nullspace.chain` checks it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nullspace.calibration.chain import Chain
from nullspace.calibration.hidden_states import Arguments, Shelf, choose_place
from nullspace.calibration.input_sums import InputSums, leave_out_uncalled, recording
from nullspace.calibration.totals import Totals, uncalled_everywhere
from nullspace.distributed import Job
from nullspace.model.batches import calls, evaluating, forward_options, padded_batch
from nullspace.model.blocks import refuse_chain
from nullspace.model.linear import output_head
from nullspace.model.padding import Padding, TokenRows
from nullspace.model.sharded import is_model_sharded, without_gather_hooks
from nullspace.model.sites import Site, Targets
from nullspace.model.weights import Loaded
from nullspace.moments.covariance import Covariance
from nullspace.progress import Progress

logger = logging.getLogger(__name__)


def stream_by_block(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Targets,
    blocks: Mapping[str, nn.Module],
    precision: str | Mapping[str, str],
    report: Progress,
    *,
    device: torch.device | None = None,
    hidden_states: str = "auto",
    folder: str | None = None,
    job: Job | None = None,
) -> Iterator[tuple[Site, Covariance]]:
    """The layerwise strategy of `stream_covariances`.

    Args:
        blocks: `nullspace.blocks.find_blocks`.
        device: where the blocks compute; by default where their weights are, or where accelerate would bring them.
        hidden_states: `"device"`, `"host"`, `"disk"`, or `"auto"`: the first of these with room for them.
        folder: where hidden states on disk go.
        job: the processes that work together: all are in the same block at the same time. This one alone by default.
        others: as in `stream_covariances`.
    """
    outside, inside = _divide(targets, blocks)
    chain = Chain(model, blocks, outside, device)
    paddings: dict[int, Padding] = {}
    later = functools.cache(lambda: padded_batch(model, loader))
    rows = TokenRows(model, lambda: next((n for n, each in paddings.items() if each.hides), None) or later())
    ahead = InputSums(outside, precision, rows)
    shelf: Shelf | None = None
    arguments: Arguments | None = None  # None if all batches are other processes'
    job = job or Job.alone()
    tokens = 0
    head = output_head(model)
    options = forward_options(model, dict(targets))
    unused = (*chain.blocks, *(() if head is None or outside else (head,)))
    needed = 1 + max((index for index, own in enumerate(inside) if own), default=0)
    spread = is_model_sharded(model)
    first = Loaded(chain.blocks[0], chain.device_of(0), within=model)
    ready: Loaded | None = first
    try:
        share = job.share(loader)
        total = share.length
        around = Loaded(model, chain.device_of(0), skip=unused)
        if spread:  # before weights are gathered, whoever has failed must have told it
            job.exchange(None)
            first.gather()
        with (
            contextlib.closing(around),
            around,
            without_gather_hooks(model),
            recording(model, outside, ahead),
            evaluating(model),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            for call in calls(model, share, device):
                ahead.begin_batch(call.number, call.padding)
                if shelf is None:
                    ahead.paused = True
                    chain.rehearse(call, options, first, needed)
                    ahead.paused = False
                handed = chain.prepare(call, options)
                ahead.end_batch()
                if shelf is None or arguments is None:
                    place = choose_place(hidden_states, handed.bytes() * (total or 1), chain.device_of(0))
                    shelf = Shelf(place, folder)
                    arguments = Arguments(shelf)
                arguments.keep(call.number, handed.blocks, handed.hidden)
                paddings[call.number] = call.padding
                tokens += call.padding.tokens
                del handed
        rewritten = None if shelf is None else shelf.find_rewritten()
        if rewritten is not None:
            raise refuse_chain(model, f"writes again to a tensor that it handed its blocks in batch {rewritten}")
        job.check_share(share)
        behind = outside.only(uncalled_everywhere(ahead, job))
        totals = Totals(job)
        yield from totals.add(ahead)
        needed = len(chain.blocks) if behind else needed if any(inside) else 0
        steps = needed * len(paddings)
        report("forward", 0, steps, 0)
        for index in range(needed):
            began = time.perf_counter()
            job.enters(f"the forward pass of {chain.names[index]!r}")
            sums = InputSums(inside[index], precision, rows)
            loaded = ready or Loaded(chain.blocks[index], chain.device_of(index), within=model)
            ready = Loaded(chain.blocks[index + 1], chain.device_of(index + 1), within=model) if index + 1 < needed else None
            if spread:
                job.exchange(None)
            with (
                contextlib.closing(loaded),
                loaded,
                without_gather_hooks(chain.blocks[index]),
                recording(model, inside[index], sums),
                evaluating(model),
                torch.inference_mode(False),
                torch.no_grad(),
            ):
                for done, (number, padding) in enumerate(paddings.items(), start=1):
                    assert arguments is not None
                    sums.begin_batch(number, padding)
                    chain.advance(index, number, arguments)
                    sums.end_batch()
                    step = index * len(paddings) + done
                    report("forward", step, steps, tokens * step // steps)
            leave_out_uncalled(uncalled_everywhere(sums, job), inside[index])
            _log(chain.names[index], time.perf_counter() - began, tokens, chain.device_of(index))
            yield from totals.add(sums)
        if behind:
            around = Loaded(model, chain.device_of(-1), skip=tuple(chain.blocks))
            if spread:
                job.exchange(None)
            with contextlib.closing(around):
                yield from _tail(model, chain, arguments, paddings, options, behind, around, precision, rows, job, totals)
        yield from totals.rest()
    finally:
        if ready is not None:
            ready.close()
        if shelf is not None:
            shelf.close()


def _tail(
    model: nn.Module,
    chain: Chain,
    arguments: Arguments | None,
    paddings: Mapping[int, Padding],
    options: Mapping[str, Any],
    behind: Targets,
    weights: Loaded,
    precision: str | Mapping[str, str],
    rows: TokenRows,
    job: Job,
    totals: Totals,
) -> Iterator[tuple[Site, Covariance]]:
    """What the model does behind its blocks, for the targets that were not called ahead of them."""
    sums = InputSums(behind, precision, rows)
    with (
        weights,
        without_gather_hooks(model),
        recording(model, behind, sums),
        evaluating(model),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        for number, padding in paddings.items():
            assert arguments is not None
            sums.begin_batch(number, padding)
            chain.finish(number, arguments, options)
            sums.end_batch()
    leave_out_uncalled(uncalled_everywhere(sums, job), behind)
    yield from totals.add(sums)


def _divide(targets: Targets, blocks: Mapping[str, nn.Module]) -> tuple[Targets, list[Targets]]:
    """The targets outside all blocks, and those inside each."""
    inside = [targets.only(n for n in targets if n == block or n.startswith(f"{block}.")) for block in blocks]
    return targets.only(targets.keys() - {name for own in inside for name in own}), inside


def _log(name: str, seconds: float, tokens: int, device: torch.device) -> None:
    memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at most" if device.type == "cuda" else ""
    logger.info("%s: %.1f s, %s tokens/s%s", name, seconds, f"{tokens / max(seconds, 1e-9):,.0f}", memory)
