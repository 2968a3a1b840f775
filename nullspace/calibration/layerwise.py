"""The layerwise strategy: all batches go through one block before any goes through the next.

The model's own forward pass runs up to the blocks, once a batch, with stand-ins in their place. The arguments of the blocks
(hidden states, masks, rotary embeddings) are kept. Then each block is called with those of all batches. A block's weights, and the
sums of its sites, are in memory only while it computes.

Of a model with several chains (a vision tower and a language model, an encoder and a decoder) one is run block by block: see
`nullspace.model.blocks.find_blocks`. The others run as they are, once a batch, with the sums of their targets in memory at once.

This is correct only if the blocks are a chain; `nullspace.calibration.chain` and `nullspace.calibration.rehearsal` check it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from nullspace.calibration.chain import BlockCalls, Chain
from nullspace.calibration.hidden_states import Arguments, Shelf, choose_place
from nullspace.calibration.input_sums import InputSums, leave_out_uncalled
from nullspace.calibration.recording import recording
from nullspace.calibration.rehearsal import rehearse
from nullspace.calibration.run import Run
from nullspace.calibration.totals import Totals, uncalled_everywhere
from nullspace.distributed.loaders import Share
from nullspace.model.batches import Call, calls, evaluating, forward_options, padded_batch, refuse_unreached
from nullspace.model.blocks import refuse_chain
from nullspace.model.linear import is_linear, weight_of, weight_shape
from nullspace.model.padding import Padding
from nullspace.model.sharded import without_gather_hooks
from nullspace.model.sites import Site, Targets, output_head
from nullspace.model.token_rows import TokenRows
from nullspace.model.weights import Loaded, size_to_load
from nullspace.moments.covariance import Covariance
from nullspace.progress import Progress
from nullspace.solvers import make_room

logger = logging.getLogger(__name__)

Sums = Iterator[tuple[Site, Covariance]]


def stream_by_block(
    run: Run, targets: Targets, precision: str | Mapping[str, str], report: Progress, blocks: Mapping[str, nn.Module]
) -> Sums:
    """One layerwise pass.

    Args:
        run, targets, precision, report: as of `nullspace.calibration.stream.one_pass`. All processes work on the same block.
        blocks: `nullspace.model.blocks.find_blocks`.
    """
    one_pass = _Pass(run, targets, precision, report, blocks)
    try:
        yield from one_pass.before_blocks()
        yield from one_pass.through_blocks()
        yield from one_pass.after_blocks()
        yield from one_pass.totals.rest()
    finally:
        one_pass.close()


class _Pass:
    """One layerwise pass, in the order of its methods."""

    def __init__(
        self,
        run: Run,
        targets: Targets,
        precision: str | Mapping[str, str],
        report: Progress,
        blocks: Mapping[str, nn.Module],
    ) -> None:
        self._run, self._precision, self._report = run, precision, report
        self._inside = {block: targets.only(n for n in targets if n == block or n.startswith(f"{block}.")) for block in blocks}
        self._outside = targets.only(targets.keys() - {name for own in self._inside.values() for name in own})
        self._chain = Chain(run.model, blocks, self._outside, run.device)
        self._paddings: dict[int, Padding] = {}
        later = functools.cache(functools.partial(padded_batch, run.model, run.loader))
        self._rows = TokenRows(
            run.model, lambda part: next((n for n, each in self._paddings.items() if each.hides(part)), None) or later(part)
        )
        self._options = forward_options(run.model, dict(targets))
        self._shelf: Shelf | None = None
        self._arguments: Arguments | None = None  # None if this process has no batch
        self._tokens = 0
        self._uncalled = self._outside  # the targets outside of the blocks that are called after them
        self._loaded: dict[str, Loaded] = {}  # by block
        self._sums_bytes = 0  # of the largest block so far
        self.totals = Totals(run.job, run.loads)

    def before_blocks(self) -> Sums:
        """Run the model up to its blocks, batch by batch, and keep their arguments; yields the sums of targets ahead of them."""
        run, chain, job = self._run, self._chain, self._run.job
        sums = InputSums(self._outside, self._precision, self._rows, pooled=self._run.pooled)
        head = output_head(run.model)
        unused = (*chain.blocks, *(() if head is None or self._outside else (head,)))
        first = self._load(0)  # read while the batches are prepared
        share = job.share(run.loader)
        around = Loaded(run.model, chain.devices[0], skip=unused)
        if run.is_sharded:  # errors so far are raised on all processes, before any waits for weights
            job.exchange(None)
            first.gather()
        with contextlib.closing(around), self._computing(run.model, around, self._outside, sums):
            for call in calls(run.model, share, run.device):
                sums.begin_batch(call.number, call.padding)
                if self._shelf is None:
                    sums.paused = True
                    rehearse(chain, call, self._options, self._load, self._needed)
                    sums.paused = False
                made = chain.prepare(call, self._options)
                sums.end_batch()
                if self._shelf is None:
                    refuse_unreached(run.model, run.loader, self._outside, sums.uncalled)
                self._keep(call, made, share)
                del made
        rewritten = None if self._shelf is None else self._shelf.find_rewritten()
        if rewritten is not None:
            raise refuse_chain(run.model, f"writes again to a tensor that it handed its blocks in batch {rewritten}")
        self._leave_out_skipped()
        job.check_share(share)
        self._uncalled = self._outside.only(uncalled_everywhere(sums, job))
        yield from self.totals.add(sums)

    def through_blocks(self) -> Sums:
        """Call the blocks, one after the other, with all batches; yields the sums of the targets inside."""
        chain, job = self._chain, self._run.job
        needed = len(chain.blocks) if self._uncalled else self._needed() if any(self._inside.values()) else 0
        numbers = list(self._paddings)
        steps = needed * len(numbers)
        self._report("forward", 0, steps, 0)
        for index in range(needed):
            began = time.perf_counter()
            job.enters(f"the forward pass of {chain.names[index]!r}")
            own = self._inside[chain.names[index]]
            sums = InputSums(own, self._precision, self._rows, pooled=self._run.pooled)
            loaded = self._load(index)
            if chain.devices[index].type == "cuda":  # where sites of the block before are still being solved
                make_room(chain.devices[index], self._bytes_ahead(index, needed))
            if index + 1 < needed:
                self._load(index + 1)  # copied while this one computes
            if self._run.is_sharded:
                job.exchange(None)
            with contextlib.closing(loaded), self._computing(chain.blocks[index], loaded, own, sums):
                for done, number in enumerate(numbers, start=1):
                    assert self._arguments is not None
                    sums.begin_batch(number, self._paddings[number])
                    chain.advance(index, number, self._arguments, following=next(iter(numbers[done:]), None))
                    sums.end_batch()
                    step = index * len(numbers) + done
                    self._report("forward", step, steps, self._tokens * step // steps)
            del self._loaded[chain.names[index]]
            leave_out_uncalled(uncalled_everywhere(sums, job), own)
            self._sums_bytes = max(self._sums_bytes, sums.size())
            _log(chain.names[index], time.perf_counter() - began, self._tokens, chain.devices[index])
            yield from self.totals.add(sums)

    def after_blocks(self) -> Sums:
        """Run the model behind its blocks, if targets are called there; yields their sums."""
        if not self._uncalled:
            return
        run, chain = self._run, self._chain
        sums = InputSums(self._uncalled, self._precision, self._rows, pooled=self._run.pooled)
        around = Loaded(run.model, chain.devices[-1], skip=(*chain.blocks, *chain.skipped.values()))
        if run.is_sharded:
            run.job.exchange(None)
        with contextlib.closing(around), self._computing(run.model, around, self._uncalled, sums):
            for number, padding in self._paddings.items():
                assert self._arguments is not None
                sums.begin_batch(number, padding)
                chain.finish(number, self._arguments, self._options)
                sums.end_batch()
        leave_out_uncalled(uncalled_everywhere(sums, run.job), self._uncalled)
        yield from self.totals.add(sums)

    def close(self) -> None:
        """Free the weights and hidden states that are still held."""
        for loaded in self._loaded.values():
            loaded.close()
        if self._shelf is not None:
            self._shelf.close()

    @contextlib.contextmanager
    def _computing(self, part: nn.Module, weights: Loaded, targets: Targets, sums: InputSums) -> Iterator[None]:
        """Context manager: loads weights, and sums the inputs of targets."""
        with (
            weights,
            without_gather_hooks(part),
            recording(self._run.model, targets, sums),
            evaluating(self._run.model),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield

    def _load(self, index: int) -> Loaded:
        name = self._chain.names[index]
        if name not in self._loaded:
            self._loaded[name] = Loaded(self._chain.blocks[index], self._chain.devices[index], within=self._run.model)
        return self._loaded[name]

    def _bytes_ahead(self, index: int, needed: int) -> int:
        """What a block is about to take on its device: its sums, as large as another block's, activations, and the next weights.

        Activations are estimated by the inputs and outputs of all of its linear layers.
        """
        chain = self._chain
        tokens = max(padding.tokens if padding.shape is None else math.prod(padding.shape) for padding in self._paddings.values())
        layers = [module for module in chain.blocks[index].modules() if is_linear(module)]
        rows = sum(sum(weight_shape(layer)) * weight_of(layer).element_size() for layer in layers)
        weights = sum(map(size_to_load, chain.blocks[index + 1 : min(index + 2, needed)], chain.devices[index + 1 :]))
        return self._sums_bytes + tokens * rows + weights

    def _needed(self) -> int:
        """How many blocks of the chain are to be called for the targets inside."""
        return 1 + max((index for index, name in enumerate(self._chain.names) if self._inside[name]), default=0)

    def _leave_out_skipped(self) -> None:
        """Leave out the targets in blocks that the first batch does not reach, which are the same blocks on all processes."""
        job, chain = self._run.job, self._chain
        called = [names for names in job.exchange(None if self._shelf is None else chain.names) if names is not None]
        if any(names != called[0] for names in called):
            raise refuse_chain(self._run.model, "calls other blocks in one process than in another")
        if called:
            chain.leave_out(set(chain.names) - set(called[0]))
        for name in chain.skipped:
            leave_out_uncalled(dict(self._inside[name]), self._inside[name])

    def _keep(self, call: Call, made: BlockCalls, share: Share) -> None:
        """Keep the arguments of the blocks in one batch."""
        if self._shelf is None or self._arguments is None:
            size = made.bytes() * (share.length or 1)
            self._shelf = Shelf(choose_place(self._run.hidden_states, size, self._chain.devices[0]), size)
            self._arguments = Arguments(self._shelf)
        self._arguments.keep(call.number, made.arguments, made.hidden)
        self._paddings[call.number] = call.padding
        self._tokens += call.padding.tokens


def _log(name: str, seconds: float, tokens: int, device: torch.device) -> None:
    memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at most" if device.type == "cuda" else ""
    logger.info("%s: %.1f s, %s tokens/s%s", name, seconds, f"{tokens / max(seconds, 1e-9):,.0f}", memory)
