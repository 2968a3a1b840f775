"""`stream_covariances`: runs the model, yields `(site, covariance)`, and drops its reference.

Everything that needs second moments is a loop over this generator, and decides what to keep. How the model is run, and how much is
in memory at once, depends on the strategy (`nullspace.calibration.resident`, `nullspace.calibration.layerwise`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nullspace.calibration.layerwise import stream_by_block
from nullspace.calibration.resident import stream_resident
from nullspace.calibration.run import Run, prepare
from nullspace.distributed import Job
from nullspace.model.blocks import find_blocks
from nullspace.model.sharded import reshard_model
from nullspace.model.sites import Site, Targets
from nullspace.moments.covariance import Covariance
from nullspace.progress import Progress


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
            none of them sees. Which rows of a layer's input that concerns: `nullspace.model.token_rows`.
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
        )
        return _settled(run, one_pass(run))


def one_pass(
    run: Run,
    targets: Targets | None = None,
    *,
    precision: str | Mapping[str, str] | None = None,
    report: Progress | None = None,
) -> Iterator[tuple[Site, Covariance]]:
    """One pass over the loader of a run: yields what `stream_covariances` yields.

    Args:
        run: prepared.
        targets: a selection of the run's targets; all by default.
        precision: of this pass; that of the run by default.
        report: gets the progress; that of the run by default.
    """
    targets, precision, report = targets or run.targets, precision or run.precision, report or run.report
    if run.strategy == "resident":
        return _sharing_errors(run, stream_resident(run, targets, precision, report))
    return _sharing_errors(run, stream_by_block(run, targets, precision, report, find_blocks(run.model)))


def _sharing_errors(run: Run, stream: Iterator[tuple[Site, Covariance]]) -> Iterator[tuple[Site, Covariance]]:
    with run.job.sharing_errors():
        yield from stream
        if run.is_sharded:
            reshard_model(run.model)


def _settled(run: Run, stream: Iterator[tuple[Site, Covariance]]) -> Iterator[tuple[Site, Covariance]]:
    yield from stream
    with run.job.sharing_errors():
        run.targets.settle(run.model, warn=run.job.first)
