"""`preprocess_corda` with PEFT's signature.

    from nullspace.integrations.peft import preprocess_corda        # instead of peft.tuners.lora.corda

    preprocess_corda(model, lora_config, run_model=run_model)
    peft_model = get_peft_model(model, lora_config)                 # PEFT's own, with init_lora_weights="corda"

`inject_adapters(..., method="corda-kpm")` is CorDA without PEFT's function: for 16-bit bases whose residual is rounded once, for
quantised bases, and for several methods from one pass.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from nullspace import solvers
from nullspace.calibration.input_sums import InputSums
from nullspace.errors import InputError
from nullspace.factors import CORDA_MODES, DAMPING, ZERO
from nullspace.integrations.peft.corda.files import CordaEigens, is_filled, path_of, read_covariances, read_eigens, save
from nullspace.integrations.peft.experts.checks import leave_out_experts
from nullspace.integrations.peft.fit import refuse_other_layers
from nullspace.integrations.peft.layers import RESIDUAL_DTYPES
from nullspace.integrations.peft.passes import summing
from nullspace.integrations.peft.targets import check_scaling, chosen_layers, rank_of
from nullspace.methods import Sources, check_rank, spared
from nullspace.model.batches import parameter_names
from nullspace.model.linear import is_conv1d, is_linear, weight_of, weight_shape
from nullspace.model.padding import Padding, PaddingReader
from nullspace.model.sites import Site, Targets
from nullspace.model.token_rows import TokenRows
from nullspace.model.weights import refuse_meta
from nullspace.model.wrappers import named_modules, unwrap, without_graphs
from nullspace.moments.covariance import Covariance
from nullspace.moments.directions import Directions
from nullspace.progress import reporter
from nullspace.solvers import decompose


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
    *,
    parity: bool = False,
) -> None:
    """PEFT's function of this name, from our second moments: sets `eigens` on every target layer, for `get_peft_model`.

    BA is CorDA's (arXiv 2406.05223): the last r (`corda_method="kpm"`) or first r (`"ipm"`) singular triples of W C, times C⁻¹,
    with C damped by 0.01 of the mean of its diagonal, as in PEFT and in the paper's code. It is computed as U_r U_rᵀ W, without an
    inverse. Differences from PEFT:

    - Every token counts once. PEFT divides each call's input by the absolute value of its largest entry, so that a sample counts
      more the smaller its extremes are; it counts padding; and it takes one sample a call. Here padding is left out if the model
      gets an `attention_mask`, and samples may come in batches. `parity=True` weighs and counts as PEFT does.
    - C has the trace that it has in PEFT (`Covariance.peft_trace`). The trace decides how BA is divided between A and B, and with
      it the effect of a learning rate.
    - Layers that get the same tensor share one sum: short float32 chains into float64, outlier tokens in float64 (precision
      `"mixed"` of `nullspace.Covariance`; under `parity` every product is in float64). `use_float16_for_covariance` is ignored. The
      damping is never doubled, as PEFT does when its float32 inverse fails.
    - `target_modules="all-linear"` is accepted, and becomes the names of the layers that are adapted. Layers are left out, with a
      warning, that are smaller than r, that `run_model` does not reach, or whose output is not W x + b. A configuration without
      `target_modules` is read as PEFT's other initialisers do.
    - Errors come before the model runs where possible. Hooks are removed and the model's mode restored in all cases.
    - Both files are read with `weights_only=True`, checked, and written whole or not at all. Their format is PEFT's.

    Args:
        model: the base model, of floating-point weights; `nn.Linear` and transformers' `Conv1D` layers are adapted.
        lora_config: with `corda_config`; `rank_pattern` counts.
        run_model: runs the model on the data, in one or many calls. Not needed if one of the two files exists.
        hooked_model: what `run_model` runs, if it is not `model`; with the same names of layers.
        parity: weigh tokens as PEFT does, to get its factors.

    Raises:
        ValueError: naming the layer or file: without a `corda_config`, for targets that match nothing, a rank that a weight does
            not have, weights that are quantised or not available, no `run_model` and no file, layers that were never called, NaN or
            Inf, and files that are damaged, or of other layers.

    Warns:
        UserWarning: naming layers whose data span too few directions.
    """
    model, hooked = unwrap(model), unwrap(model if hooked_model is None else hooked_model)
    options = lora_config.corda_config
    if options is None:
        raise InputError("lora_config.corda_config is None: give LoraConfig(corda_config=CordaConfig(corda_method='kpm'))")
    check_scaling(lora_config)
    targets = chosen_layers(model, lora_config)
    leave_out_experts(targets, "is an expert's matrix in a tensor of all experts, for which PEFT has no CorDA: use inject_adapters")
    targets.refuse_empty()
    ranks = {name: rank_of(name, lora_config) for name in targets}
    for name, layer in targets.items():
        _check_layer(name, layer, ranks[name])
    refuse_other_layers(lora_config, model, targets)
    cache, sums = path_of(options.cache_file), path_of(options.covariance_file)
    if cache is not None and is_filled(cache):
        for name, eigens in read_eigens(cache, targets, ranks).items():
            _attach(targets[name], eigens)
        return
    if options.corda_method not in CORDA_MODES:
        raise InputError(f"corda_method must be 'kpm' or 'ipm' where there is no cache_file, not {options.corda_method!r}")
    from_file = sums is not None and is_filled(sums)
    calls: Counter[str] = Counter()
    if from_file and sums is not None:
        moments = read_covariances(sums, targets)
    elif run_model is not None:
        moments = _sums(targets, run_model, hooked, parity, calls)
    else:
        raise InputError("run_model is needed: there is neither a covariance_file nor a cache_file yet")
    for path in filter(None, (cache, sums)):
        path.parent.mkdir(parents=True, exist_ok=True)
    keep = not options.prune_temporary_fields
    solve = _Solver(targets, ranks, options.corda_method, from_file, parity, keep or (sums is not None and not from_file))
    report = reporter(bool(options.verbose))
    report("corda", 0, len(targets), 0)
    done, kept = 0, dict[str, torch.Tensor]()
    for eigens_of, c in decompose(moments, solve):
        for name, eigens in eigens_of.items():
            _attach(targets[name], eigens)
            kept |= {} if c is None else {name: c}
        done += len(eigens_of)
        report("corda", done, len(targets), 0)
    targets.settle(model)
    if targets.optional:
        lora_config.target_modules = list(targets)
    solve.directions.warn(f"corda_method={options.corda_method!r}", stacklevel=3)
    for name, layer in targets.items() if keep else ():
        holder: Any = layer
        holder.covariance_matrix, holder.rank, holder.corda_method = kept[name], ranks[name], options.corda_method
        if not from_file:
            holder.sample_count = calls[name]
    if sums is not None and not from_file:
        save(sums, {name: kept[name] for name in targets})
    if cache is not None:
        parts = ("S_WC", "U_WC", "V_WC")
        save(cache, {f"{name}.eigens.{part}": getattr(layer.eigens, part) for name, layer in targets.items() for part in parts})


def _check_layer(name: str, layer: nn.Module, rank: int) -> None:
    weight = weight_of(layer)
    if weight.dtype not in RESIDUAL_DTYPES or weight.device.type == "meta":
        raise InputError(
            f"the weight of {name!r} ({type(layer).__name__}, {weight.dtype}, {weight.device}) cannot become a residual, which "
            'PEFT\'s CorDA needs; inject_adapters(..., method="corda-kpm", residual="adapter") leaves it alone'
        )
    check_rank("corda-kpm", Sources(), name, layer, rank)  # the same for both modes


def _sums(
    targets: Targets, run_model: Callable[[], Any], hooked: nn.Module, parity: bool, calls: Counter[str]
) -> Iterator[tuple[Site, Covariance]]:
    """Yields the second moments of the targets' inputs while `run_model` runs. Adds the number of each one's calls to `calls`."""
    refuse_meta(hooked)
    modules = named_modules(hooked)
    missing = next((name for name in targets if name not in modules or not is_linear(modules[name])), None)
    if missing is not None:
        raise InputError(f"hooked_model has no linear layer {missing!r}, which is a target in model")

    def weigh(name: str, x: torch.Tensor) -> torch.Tensor:
        return x.double() / x.max().abs()  # a float32 quotient's rounding would dominate the error of the sum

    layers = targets.of_twin(modules)
    sums = _CountingSums(layers, "mixed", None if parity else TokenRows(hooked), weigh=weigh if parity else None)
    with summing(hooked, layers, sums, targets):
        with _batches(hooked, sums), without_graphs():  # it may run a compiled model
            run_model()
        sums.end_batch()
    calls.update(sums.calls)
    for site, covariance in sums.release():
        if parity:
            covariance.scale(covariance.tokens / calls[site.name])  # divided by the tokens later: C over the calls
        yield site, covariance
        del covariance


class _CountingSums(InputSums):
    """Counts the calls of every target, PEFT's `sample_count`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: Counter[str] = Counter()

    def receive(self, name: str, x: torch.Tensor) -> None:
        super().receive(name, x)
        self.calls[name] += 1


@contextlib.contextmanager
def _batches(model: nn.Module, sums: InputSums) -> Iterator[None]:
    """Context manager: every call of the whole model is a batch with its own padding; calls of its submodules alone have none."""
    number, reader = 0, PaddingReader(model)
    sums.begin_batch(number, Padding())

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal number
        number += 1
        names, _ = parameter_names(model, len(args))
        sums.begin_batch(number, reader.read(number, {**dict(zip(names, args, strict=False)), **kwargs}))

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sums.end_batch()
        sums.begin_batch(number, Padding())

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Solver:
    """(site, covariance) → eigens of the site's members, and C in float32 as the file has it, if it is to be kept."""

    targets: Mapping[str, nn.Module]
    ranks: Mapping[str, int]
    mode: str
    from_file: bool
    parity: bool
    keep: bool
    directions: Directions = field(default_factory=Directions)

    def __call__(self, site: Site, covariance: Covariance) -> tuple[dict[str, CordaEigens], torch.Tensor | None]:
        c = covariance.matrix()
        for name in site.members:
            rest = spared(CORDA_MODES[self.mode], *weight_shape(self.targets[name]), self.ranks[name])
            self.directions.look_at(name, covariance, self.ranks[name], c, spared=rest)
        if not self.from_file:
            c /= covariance.tokens
            if not self.parity and covariance.peft_trace is not None:
                c *= covariance.peft_trace / c.diagonal().sum()
        kept = c.float() if self.keep else None
        c.diagonal().add_(DAMPING * c.diagonal().mean())
        return {name: _eigens(self.targets[name], c, self.ranks[name], self.mode) for name in site.members}, kept


@torch.no_grad()
def _eigens(layer: nn.Module, c: torch.Tensor, rank: int, mode: str) -> CordaEigens:
    """The wanted singular triples of W C, with C⁻¹ times the right vectors, as PEFT keeps them."""
    stored = weight_of(layer).detach()
    weight = (stored.T if is_conv1d(layer) else stored).to(torch.float64)
    sigma, u = solvers.left_singular(weight @ c.to(weight.device), rank, end="bottom" if mode == "kpm" else "top")
    # A zero singular value of W C is one of W: the triple is no part of W.
    inverse = torch.where(sigma > ZERO * sigma[0], 1 / sigma, 0.0)
    v = (weight.T @ u) * inverse
    return CordaEigens(*(t.to(stored.device, torch.float32).contiguous() for t in (sigma, u, v)))


def _attach(layer: nn.Module, eigens: CordaEigens) -> None:
    holder: Any = layer  # nn.Module's type says that attributes are tensors or modules
    holder.eigens = eigens
