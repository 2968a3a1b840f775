"""`stream_covariances`: runs the model, yields `(site, covariance)`, and drops its reference.

All that needs second moments is a loop over this generator, which decides what to keep. The strategy decides how the model is run,
and how much is in memory at once (`nullspace.calibration.resident`, `nullspace.calibration.layerwise`).
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
    experts: str = "auto",
    progress: bool | Progress = True,
    job: Job | None = None,
) -> Iterator[tuple[Site, Covariance]]:
    """Run the model over the loader and yield the second moment of every site's input, one at a time.

    In an initialised `torch.distributed` process group of n > 1 processes, all of them must call this, with the same model and
    arguments. Each reads its share of the loader. A site, summed over all processes, is yielded by its owner only
    (`nullspace.calibration.totals.deal`). A loop over the stream that ends early must end early on all processes.

    Args:
        model: any module; it is run in eval mode, without gradients and key-value caches, and restored afterwards. Wrappers of
            `torch.compile`, `DataParallel` and `DistributedDataParallel` are bypassed (`nullspace.model.wrappers`).
        loader: an iterable of mappings that the model takes as keyword arguments (`input_ids`, `attention_mask`, …), or of tensors
            or tuples of tensors that it takes as positional ones. Tokens with a zero in `attention_mask` (batch, tokens) are
            padding and not counted; with a mask of pairs, (batch, 1, tokens, tokens), or a mapping to such masks, those that no
            token attends to. `nullspace.model.token_rows` locates their rows in a layer's input; a decoder's tokens have
            `decoder_attention_mask` or labels, and patches and frames the masks of their towers.
            With several processes, process k reads batches k, k + n, … of a loader that is the same for all, and all batches of a
            `DataLoader` that is a share already. Samples that PyTorch's `DistributedSampler` or accelerate's `BatchSamplerShard`
            repeat to make shares even are left out; those that other samplers repeat count twice.
        targets: the linear layers: see `nullspace.model.sites.find_targets`. `"all-linear"` leaves out, with one warning at the
            end, layers that these data do not reach and layers whose output is not W x + b. Given by name, they are errors.
        exclude: layers to remove from `targets`: a list of name endings, or a regular expression.
        strategy: `"resident"`: one ordinary forward pass a batch, all sums in memory at once (4 · d_in² bytes a site; on a
            GPU up to as much again for staged tokens).
            `"layerwise"`: block by block, with the weights and sums of one block in memory at a time; the loader is read once. For
            models whose blocks are a chain (`nullspace.model.blocks.find_blocks`, `nullspace.calibration.chain`); other chains,
            such as a vision tower or an encoder, run as they are. Other models are refused before the first site, by two more
            forward passes of the first batch.
            `"auto"`: layerwise for a model that is offloaded, or that leaves no room for all sums on its device
            (`nullspace.planning.choice.choose_strategy`); otherwise resident.
            With weights sharded by FSDP2 or ZeRO-3, a layerwise run gathers each block once. A resident run gathers them for every
            batch, by the model's own hooks, and the processes keep in step: one without batches left runs one that does not count.
        precision: `"auto"`, `"mixed"`, `"fp64"` or `"qr"`: see `Covariance`. Or a mapping from regular expressions to these: the
            first one that matches a layer's whole name counts; `"auto"` if none does. The first layer of a site decides for a
            shared input.
        device: where a layerwise pass computes, by default where the weights are. A model in host memory is copied there block by
            block.
        hidden_states: where a layerwise pass keeps the hidden states between two blocks: `"device"`, `"host"`, `"disk"`, or
            `"auto"`, the first of these with room for them.
        experts: routed experts that are stored as one tensor (`nullspace.model.experts`), from the tokens that are routed to them:
            `"each"`: a sum for every expert's matrix. `"pooled"`: one sum for all that the experts of a layer receive, so that its
            null space serves all of their `gate_up_proj`, and a sum for each `down_proj`. `"auto"`: `"each"` if an expert can
            expect d_in + rank tokens or more and the sums take at most half of the free memory
            (`nullspace.planning.experts.should_pool`); otherwise `"pooled"`. An expert that gets few tokens, or none, has a small
            `Covariance.tokens` and a `Covariance.pool` (`Covariance.completed`).
        progress: True for a bar (of the first process), False for none, or a callable (`nullspace.progress.Progress`).
        job: the processes that work together; by default those of the default process group, if one is initialised. `Job.alone()`
            for this process alone in spite of its group. A job must include all processes that share a sharded weight, and only one
            of those that compute together (tensor parallelism); layers are then summed only where their inputs are whole.

    Yields:
        `(Site, Covariance)`, in the order of the sites' first calls. The consumer holds the only reference to the covariance. With
        several processes, each yields its own sites; in a layerwise run, once each has about as much to solve as one block.

    Raises:
        ValueError: before the forward pass, for a bad argument or a weight on the meta device; during it, naming the layer and the
            batch, for NaN or Inf, an input that is shared in one batch and not in the next, or padding that cannot be located in a
            layer's input; after it, for a target that was never called, was replaced or lost its hook, and for a loader
            that is empty, ends early or holds padding only. An error of one process is raised in all, naming its rank; so are
            models, arguments or loaders that differ between processes, and an input that is shared in one and not in the other.
        RuntimeError: if a process has died, or the group's timeout has passed; if the forward pass gathers weights, also after an
            error within it, which only the failing process names.

    Warns:
        UserWarning: if the model is the residual base of an adapter (`nullspace.artifacts.residual`).
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
            experts=experts,
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
        run: prepared by `prepare`.
        targets: a selection of the run's targets; all by default.
        precision: of this pass; by default that of the run.
        report: gets the progress; by default that of the run.
    """
    targets, precision, report = targets or run.targets, precision or run.precision, report or run.report
    if run.strategy == "resident":
        return _sharing_errors(run, stream_resident(run, targets, precision, report))
    return _sharing_errors(run, stream_by_block(run, targets, precision, report, find_blocks(run.model, targets)))


def _sharing_errors(run: Run, stream: Iterator[tuple[Site, Covariance]]) -> Iterator[tuple[Site, Covariance]]:
    with run.job.sharing_errors():
        yield from stream
        if run.is_sharded:
            reshard_model(run.model)


def _settled(run: Run, stream: Iterator[tuple[Site, Covariance]]) -> Iterator[tuple[Site, Covariance]]:
    yield from stream
    with run.job.sharing_errors():
        run.targets.settle(run.model, warn=run.job.first)
