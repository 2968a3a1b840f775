"""`stream_covariances`: runs the model, yields `(site, covariance)`, and frees it.

The generator is the hinge of the engine: whoever needs second moments is a loop over it and decides what to keep. How the model
was run, and how much was in memory at once, is the generator's business (its *strategy*).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nullspace.artifacts.identity import weights_of
from nullspace.artifacts.residual import warn_of_residual
from nullspace.calibration.hidden_states import PLACES
from nullspace.calibration.input_sums import InputSums, leave_out_uncalled, recording
from nullspace.calibration.layerwise import stream_by_block
from nullspace.calibration.totals import Totals, uncalled_everywhere
from nullspace.checks import check_device
from nullspace.distributed import Job
from nullspace.distributed.loaders import digest_of, example_of, length
from nullspace.model.batches import Call, calls, evaluating, forward_options, input_device, naming_batch, padded_batch
from nullspace.model.blocks import find_blocks
from nullspace.model.padding import TokenRows
from nullspace.model.sharded import gathers_weights, is_model_sharded, prepare_sharded, sharded_strategy
from nullspace.model.sites import Site, Targets, find_targets
from nullspace.model.weights import refuse_meta
from nullspace.model.wrappers import unwrap
from nullspace.moments.covariance import PRECISIONS, Covariance
from nullspace.planning.choice import choose_strategy
from nullspace.progress import Progress, reporter

STRATEGIES = ("auto", "resident", "layerwise")


def stream_covariances(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] | None = None,
    strategy: str = "auto",
    precision: str | Mapping[str, str] = "auto",
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    progress: bool | Progress = True,
    job: Job | None = None,
) -> Iterator[tuple[Site, Covariance]]:
    """Run the model over the loader and yield the second moment of every site's input, one at a time.

    Under an initialised `torch.distributed` process group of n > 1 processes, all of them have to call this, with the same model
    and the same arguments. Each reads its share of the loader, and a site, summed over all of them, is yielded by one process
    alone: that which `nullspace.distributed.deal` makes its owner. A loop over the stream that ends early has to end early on all.

    Args:
        model: any module; it is run in eval mode, without gradients and key-value caches, and left as it was found. What
            `torch.compile`, `DataParallel` or `DistributedDataParallel` put around it or its parts stands aside
            (`nullspace.wrappers`).
        loader: an iterable of mappings that the model takes as keyword arguments (`input_ids`, `attention_mask`, …), or of tensors
            or tuples of tensors that it takes as positional ones. Where `attention_mask` (batch, tokens) is zero, a token is
            padding and is not counted; of one over pairs of tokens, (batch, 1, tokens, tokens), or a mapping to such, a token that
            none of them sees. Which rows of a layer's input that concerns: `nullspace.padding`.
            Of several processes, process k takes batches k, k + n, … of a loader that all have alike;
            of a `DataLoader` that is a share already, all. What PyTorch's `DistributedSampler` and accelerate's
            `BatchSamplerShard` repeat to make shares even is left out; what another such sampler repeats counts twice.
        targets: which linear layers: see `nullspace.sites.find_targets`. `"all-linear"` leaves out, with one warning at the end,
            those that these data do not reach, and those whose output is not W x + b; otherwise they are an error.
        exclude: what to take away from `targets`: a list of name endings, or a regular expression.
        strategy: `"resident"`: one ordinary forward pass a batch, all sums in memory at once (4 · d_in² bytes a site; on a
            GPU up to as much again for tokens on their way).
            `"layerwise"`: block by block: the weights and the sums of one block at a time, whatever the depth; the loader is read
            once. For models whose blocks are one chain (`nullspace.blocks.find_blocks`, `nullspace.chain`): anything else is
            refused by name before the first site. That takes two more forward passes of the first batch.
            `"auto"`: layerwise for a model that is not whole where it computes, or that leaves no room there for all sums
            (`nullspace.planning.choice.choose_strategy`); resident otherwise.
            Of weights that FSDP2 or ZeRO-3 spread over the processes, a layerwise run gathers a block at a time, once; a resident
            one gathers them for every batch, through the model's own hooks, and the processes keep in step: who has no batch left
            runs one that does not count.
        precision: `"auto"`, `"mixed"`, `"fp64"` or `"qr"`: see `Covariance`. Or a mapping from regular expressions to these: the
            first one that matches a layer's whole name counts, `"auto"` where none does. A shared input is summed as
            its first layer says.
        device: where a layerwise pass computes, if not where the weights are: a model in host memory is then brought there block by
            block.
        hidden_states: where a layerwise pass keeps what lies between two blocks: `"device"`, `"host"`, `"disk"`, or `"auto"`, the
            first of these with room for it.
        progress: True for a bar (of the first process), False for none, or a callable (`nullspace.progress.Progress`).
        job: which processes work together; by default those of the default process group, if one is initialised. `Job.alone()`
            for a process that works for itself in spite of its group. It must have all processes that share a sharded weight,
            and not two that compute together (tensor parallelism), whose layers are only heard where their inputs are whole.

    Yields:
        `(Site, Covariance)`, in the order in which the sites were first called. Nothing else holds the covariance any more. Of
        several processes, each yields its own sites: layerwise, not before all have been given about as much as one block has.

    Raises:
        ValueError: before the forward pass for a bad argument, or a weight on the meta device; during it, naming the layer and the
            batch, for NaN or Inf, an input that is shared in one batch and not in the next, or padding that cannot be located in a
            layer's input; after it for a target that was never called, or was replaced or lost our hook meanwhile, and for a loader
            that is empty, ends early or holds padding only. What goes wrong in one process is raised in all, naming its rank; so
            are models, arguments or loaders that are not the same in all, and an input that is shared in one process and not in
            the other.
        RuntimeError: if a process has died, or the group's time has run out; where weights are gathered in the forward pass, also
            after an error in the midst of one of them, which only that process can name.

    Warns:
        UserWarning: if the model is the residual base of an adapter (`nullspace.residual`).
    """
    job = job or Job()
    with job.sharing_errors():
        check_options(strategy, precision, hidden_states, device)
        model = unwrap(model)
        chosen = find_targets(model, targets, exclude=exclude)
        refuse_meta(model)
        warn_of_residual(model)
        spread = prepare_sharded(model, chosen, job, strategy)
        if strategy == "auto":
            strategy, hidden_states = resolve_strategy(model, loader, chosen, device=device, hidden_states=hidden_states, job=job)
            device = None if strategy == "resident" else device
        elif strategy == "resident" and (device is not None or hidden_states != "auto"):
            raise ValueError("device and hidden_states belong to strategy='layerwise'")
        if job.count > 1:
            if spread:  # fingerprints of sharded weights are collectives
                job.exchange(None)
            weights = digest_of([{name: mark for name, (_, mark) in weights_of(chosen).items()}])
            exact = precision if isinstance(precision, str) else dict(precision)
            job.check_same(strategy=strategy, precision=exact, targets=list(chosen), weights=weights)
        report = reporter(progress, bars=job.first)
        if strategy == "resident":
            stream = _resident(model, loader, chosen, precision, report, job)
        else:
            where = None if device is None else torch.device(device)
            blocks = find_blocks(model)
            stream = stream_by_block(
                model, loader, chosen, blocks, precision, report, device=where, hidden_states=hidden_states, job=job
            )
        return _told(stream if chosen is targets else _settled(stream, model, chosen, job), job)


def check_options(
    strategy: str, precision: str | Mapping[str, str], hidden_states: str, device: torch.device | str | None = None
) -> None:
    """Raise `ValueError` for what `stream_covariances` does not know."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, not {strategy!r}")
    for value in precision.values() if isinstance(precision, Mapping) else [precision]:
        if value not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, not {value!r}")
    if hidden_states not in PLACES:
        raise ValueError(f"hidden_states must be one of {', '.join(map(repr, PLACES))}, not {hidden_states!r}")
    if device is not None:
        check_device(device)


def resolve_strategy(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Targets,
    *,
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    rank: int = 128,
    job: Job | None = None,
) -> tuple[str, str]:
    """What `strategy="auto"` comes to for this model, as it lies in memory: a strategy, and a place for hidden states.

    Where one of several processes has no room for a resident run, all go block by block.

    Args: as of `stream_covariances` and `compute_null_spaces`.
    """
    if is_model_sharded(model):
        return sharded_strategy(model, lambda: find_blocks(model)), hidden_states
    choice = choose_strategy(
        model,
        targets=targets,
        batch=example_of(loader),
        batches=length(loader),
        device=device,
        hidden_states=hidden_states,
        rank=rank,
    )
    chosen = (job or Job.alone()).exchange(choice.strategy)
    if choice.strategy == "resident" and "layerwise" in chosen:
        return "layerwise", hidden_states
    return choice.strategy, choice.hidden_states


def _told(stream: Iterator[tuple[Site, Covariance]], job: Job) -> Iterator[tuple[Site, Covariance]]:
    with job.sharing_errors():
        yield from stream


def _settled(
    stream: Iterator[tuple[Site, Covariance]], model: nn.Module, chosen: Targets, job: Job
) -> Iterator[tuple[Site, Covariance]]:
    yield from stream
    chosen.settle(model, quiet=not job.first, stacklevel=4)


def _resident(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Targets,
    precision: str | Mapping[str, str],
    report: Progress,
    job: Job,
) -> Iterator[tuple[Site, Covariance]]:
    rows = TokenRows(model, functools.cache(lambda: padded_batch(model, loader)))
    sums = InputSums(targets, precision, rows)
    options = forward_options(model, targets)
    share = job.share(loader)
    total, tokens = share.length, 0
    job.enters("the forward pass")
    report("forward", 0, total, 0)
    in_step = job.count > 1 and gathers_weights(model)
    later: list[Exception] | None = [] if in_step else None
    own = calls(model, share)

    def begin(call: Call) -> None:
        sums.begin_batch(call.number, call.padding)

    steps = _in_step(model, own, begin, job) if in_step else _one_by_one(own, begin)
    # Inference mode, if the caller is in it, would hide writes to an input and tie the sums to that mode.
    with recording(model, targets, sums, later=later), evaluating(model), torch.inference_mode(False), torch.no_grad():
        for call, counts in steps:
            gathering = (
                job.naming_rank("a forward pass that gathers weights from all ranks") if in_step else contextlib.nullcontext()
            )
            with gathering, naming_batch(call):
                model(*call.args, **{**options, **call.kwargs})
            for error in later or ():  # the others are at their next exchange by now, or on their way to it
                raise error
            if counts:
                sums.end_batch()
                tokens += call.padding.tokens
                report("forward", share.read, total, tokens)
    job.check_share(share)
    leave_out_uncalled(uncalled_everywhere(sums, job), targets)
    totals = Totals(job)
    yield from totals.add(sums)
    yield from totals.rest()


def _one_by_one(own: Iterator[Call], begin: Callable[[Call], None]) -> Iterator[tuple[Call, bool]]:
    for call in own:
        begin(call)
        yield call, True


def _in_step(model: nn.Module, own: Iterator[Call], begin: Callable[[Call], None], job: Job) -> Iterator[tuple[Call, bool]]:
    """This process's calls, and more that do not count, for as long as any process has calls left: all make equally many.

    Who has no batch left calls the model with the last one that it had; who never had any, with one of another process's. What is
    wrong with a batch is to be found before the exchange, by which all begin the next forward pass.
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
