"""`gradient_covariances`: second moments of inputs in which a token counts by the gradient of a loss at the layer's output.

Plain second moments show where the task's inputs are large; these, where they are large at tokens at which the loss asks for a
change. With g_t = ∂loss/∂y_t the gradient of the column of B that belongs to a row a of A is Σ_t g_t aᵀx_t, and its norm at most
√n · (Σ_t ‖g_t‖² (aᵀx_t)²)^½ for n tokens: the quadratic form of this moment.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nullspace.artifacts.covariances import Covariances
from nullspace.calibration.input_sums import InputSums, leave_out_uncalled
from nullspace.calibration.recording import recording
from nullspace.calibration.run import prepare
from nullspace.distributed import Job
from nullspace.errors import InputError
from nullspace.model.batches import Call, calls, evaluating, forward_options, naming_batch, padded_batch
from nullspace.model.blocks import is_encoder_decoder
from nullspace.model.coverage import matrix_parameters
from nullspace.model.experts import ExpertMatrix
from nullspace.model.padding import IGNORED
from nullspace.model.routing import Routed
from nullspace.model.sharded import is_model_sharded
from nullspace.model.sharded_tensors import version_of
from nullspace.model.token_rows import TokenRows
from nullspace.model.towers import Regions
from nullspace.model.wrappers import unwrap
from nullspace.moments.sums import TokenMask
from nullspace.progress import Progress


def gradient_covariances(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] | None = None,
    precision: str | Mapping[str, str] = "fp64",
    progress: bool | Progress = True,
) -> Covariances:
    """Σ_t ‖∂loss/∂y_t‖² x_t x_tᵀ of every site: x_t its inputs, y_t the outputs of all of its layers, loss summed over the labels.

    One forward and one backward pass a batch, for the activations alone: parameters get no gradients, so they may be frozen or
    quantised. What it returns saves, loads and merges as any `Covariances`, and takes their place, as of the task for
    `inject_adapters(method="contrast")`. Its `tokens` are those that have a gradient; `mean()` is that of ‖∂loss/∂y_t‖ x_t.

    In a process group each process computes the sums of its own loader; `Covariances.merge` adds what they save.

    Args:
        model: transformers' model, or one that returns an object with a `loss`. It is run in eval mode and restored afterwards.
        loader: of mappings with `labels`, as for training. A few batches are enough. In memory are the activations of one batch,
            and all sums.
        targets, exclude, precision, progress: as in `nullspace.stream_covariances`.

    Raises:
        ValueError: as `nullspace.stream_covariances` for a resident run; naming the batch, if the model returns no loss for it or
            all of its labels are ignored; naming the layer, if no token has a gradient there (of a vision or audio tower,
            `"all-linear"` leaves it out with a warning), or its input is overwritten before
            the backward pass; for a model that is sharded over several processes.
    """
    model, job = unwrap(model), Job.alone()
    if is_model_sharded(model):
        raise InputError("the model is sharded over several processes: gradient_covariances needs it whole")
    run = prepare(
        model,
        loader,
        targets=targets,
        exclude=exclude,
        strategy="resident",
        precision=precision,
        device=None,
        hidden_states="auto",
        progress=progress,
        job=job,
    )
    for name in [name for name, layer in run.targets.items() if isinstance(layer, ExpertMatrix)]:
        run.targets.leave_out(name, "is an expert's matrix, whose outputs have no hooks for gradients")
    run.targets.refuse_empty()
    batch = _Batch(TokenRows(model, functools.cache(functools.partial(padded_batch, model, loader))))
    sums = batch.sums = _Sums(run.targets, precision, batch, weigh=batch.weigh)
    options = forward_options(model, run.targets)
    options.pop("logits_to_keep", None)
    share = job.share(loader)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        _for_activations(model),
        recording(model, run.targets, batch),
        batch.watching(run.targets),
    ):
        for call in calls(model, share, labels=True):
            sums.begin_batch(call.number, call.padding)
            with naming_batch(model, call):
                _loss(call, model(*call.args, **{**options, **call.kwargs}), shifted=not is_encoder_decoder(model)).backward()
            batch.add()
            run.report("forward and backward", share.read, share.length, call.padding.tokens)
    job.check_share(share)
    leave_out_uncalled(sums.uncalled, run.targets)
    if run.targets.optional:
        towers = Regions(model)  # of a vision tower, the output of a block before the last one may be used
        unused = [site for site, covariance in sums.partial() if covariance.tokens == 0 and towers.tower(site.name) is not None]
        for name in (name for site in unused for name in site.members):
            sums.leave_out(name, "has no gradient: the loss does not depend on it")
        run.targets.refuse_empty()
    weights = {name: run.weights[name] for name in run.targets}
    result = Covariances(sums.release(), weights, matrix_parameters=matrix_parameters(model))
    run.targets.settle(model)
    return result


def _loss(call: Call, output: Any, *, shifted: bool) -> torch.Tensor:
    """The sum over the labels; transformers' models return the mean, without the first label where they shift them."""
    loss, labels = getattr(output, "loss", None), call.kwargs.get("labels")
    if loss is None or labels is None:
        raise InputError(f"batch {call.number}: the model returns no loss. Give batches with 'labels'")
    if not loss.requires_grad:
        raise InputError(f"batch {call.number}: its loss does not depend on any target")
    count = int((labels[..., int(shifted) :] != IGNORED).sum())
    if not count:
        raise InputError(f"batch {call.number}: all of its labels are {IGNORED}, so there is no loss. Leave it out")
    return loss * count


@contextlib.contextmanager
def _for_activations(model: nn.Module) -> Iterator[None]:
    """Context manager: no parameter gets a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Sums(InputSums):
    MASKED = "none of them has a gradient"


@dataclass
class _Input:
    """An input of one or more targets."""

    x: torch.Tensor
    version: int | None
    squares: torch.Tensor | None = None
    """(rows,) ‖∂loss/∂y‖², summed over the layers that got it."""


class _Batch:
    """The inputs of one batch and the gradients at the outputs: what `recording` hands them to, and the rows of `InputSums`.

    Args:
        rows: which rows of an input are tokens.

    Attributes:
        sums: gets the weighted inputs after the backward pass.
    """

    sums: InputSums

    def __init__(self, rows: TokenRows) -> None:
        self._rows = rows
        self._inputs: dict[int, _Input] = {}  # by id: they are held until the batch ends
        self._calls: dict[tuple[str, int], _Input] = {}
        self._last: dict[str, _Input] = {}

    @property
    def paused(self) -> bool:
        return self.sums.paused

    def receive(self, name: str, x: torch.Tensor) -> None:
        """Keep the input of a target that is about to be called."""
        each = self._inputs.setdefault(id(x), _Input(x, version_of(x)))
        self._calls[name, id(x)] = self._last[name] = each

    def receive_routed(self, routed: Routed) -> None:
        """Never called: experts are left out."""

    def check_output(self, name: str, x: Any, output: Any) -> None:
        self.sums.check_output(name, x, output)

    @contextlib.contextmanager
    def watching(self, targets: Mapping[str, nn.Module]) -> Iterator[None]:
        """Context manager: adds up the gradients at the outputs of targets, by hooks."""
        handles = [module.register_forward_hook(functools.partial(self._watch, name)) for name, module in targets.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # no leaf, which the model could not change in place
        output.register_hook(functools.partial(_add, self._last[name]))
        return output

    def add(self) -> None:
        """Add the batch to the sums, after the backward pass."""
        for (name, _), each in self._calls.items():
            if version_of(each.x) != each.version:
                raise InputError(f"{name}: its input was overwritten before the backward pass: leave the layer out of targets")
            self.sums.receive(name, each.x)
        self.sums.end_batch()
        for kept in (self._inputs, self._calls, self._last):
            kept.clear()

    def reading_masks(self) -> contextlib.AbstractContextManager[None]:
        return self._rows.reading_masks()

    def begin(self, batch: int, padding: Any) -> None:
        self._rows.begin(batch, padding)

    def of(self, name: str, x: torch.Tensor) -> TokenMask:
        """The rows that are tokens and have a gradient."""
        tokens, counts = self._rows.of(name, x), self._squares(x) != 0
        return TokenMask(counts if tokens is None else counts & tokens.keep(counts.device))

    def weigh(self, name: str, x: torch.Tensor) -> torch.Tensor:
        squares = self._squares(x)
        return x.to(squares.dtype) * squares.sqrt().view(*x.shape[:-1], 1)

    def _squares(self, x: torch.Tensor) -> torch.Tensor:
        squares = self._inputs[id(x)].squares
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.zeros(x.shape[:-1].numel(), dtype=wide, device=x.device) if squares is None else squares.to(x.device, wide)


def _add(each: _Input, gradient: torch.Tensor) -> None:
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    squares = gradient.detach().to(wide).square().sum(-1).flatten()
    each.squares = squares if each.squares is None else each.squares + squares.to(each.squares)
