"""CorDA's door in PEFT: `preprocess_corda` with PEFT's signature, and its two files.

    from nullspace.integrations.peft import preprocess_corda        # instead of peft.tuners.lora.corda

    preprocess_corda(model, lora_config, run_model=run_model)
    peft_model = get_peft_model(model, lora_config)                 # PEFT's own, with init_lora_weights="corda"

For CorDA without PEFT's door (16-bit bases whose residual is rounded once, quantised bases, several methods from one pass) there is
`inject_adapters(..., method="corda-kpm")`.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from nullspace import solvers
from nullspace.artifacts import records, store
from nullspace.artifacts.locks import locked
from nullspace.calibration.input_sums import InputSums, leave_out_uncalled, recording
from nullspace.factors import CORDA_MODES, DAMPING, ZERO
from nullspace.integrations.peft.fit import refuse_other_layers
from nullspace.integrations.peft.layers import RESIDUAL_DTYPES, check_scaling, chosen_layers, rank_of
from nullspace.methods import spared
from nullspace.model.batches import evaluating, parameter_names
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

# What a tensor in one of the two files may be.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest entry: what a covariance that was summed in 16 bits may be off by from being symmetric.
ASYMMETRY = 2e-2


@dataclass
class CordaEigens:
    """What PEFT's `corda_init` reads from a layer, and deletes.

    Attributes:
        S_WC: (r,) float32 singular values of W C, descending.
        U_WC: (d_out, r) float32, their left singular vectors.
        V_WC: (d_in, r) float32, C⁻¹ times the right ones, which is Wᵀ U_WC / S_WC.
    """

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


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
    inverse. What differs from PEFT:

    - Every token counts once. PEFT divides each call's input by the absolute value of its largest entry, so that a sample counts
      more the smaller its extremes are; it counts padding; and it takes one sample a call. Here padding is left out where
      the model is given an `attention_mask`, and samples may come in batches. `parity=True` weighs and counts as PEFT does.
    - C has the trace that it has in PEFT (`Covariance.peft_trace`), on which it depends how BA is divided between A and B, and
      with it what a learning rate comes to.
    - Layers that are handed the same tensor share one sum: short float32 chains into float64, outlier tokens in float64 (precision
      `"mixed"` of `nullspace.Covariance`; under `parity` every product is in float64). `use_float16_for_covariance` is ignored. The
      damping is never doubled: PEFT does so when its float32 inverse fails.
    - `target_modules="all-linear"` is understood, and becomes the names of the layers that are adapted: those that are smaller than
      r, that `run_model` does not reach, or whose output is not W x + b, are left out with a warning. A configuration without
      `target_modules` is read as PEFT's other initialisers do.
    - What cannot work is said before the model runs. Hooks are removed, and the model's mode restored, whatever happens.
    - Both files are read with `weights_only=True`, checked, and written whole or not at all; they are PEFT's format, in both
      directions.

    Args:
        model: the base model, of floating-point weights; `nn.Linear` and transformers' `Conv1D` layers are adapted.
        lora_config: with `corda_config`; `rank_pattern` counts.
        run_model: runs the model on the data, in one or many calls. Not needed if one of the two files exists.
        hooked_model: what `run_model` runs, if it is not `model`; with the same names of layers.
        parity: weigh tokens as PEFT does, to get its factors.

    Raises:
        ValueError: naming the layer or file: without a `corda_config`, for targets that match nothing, a rank that a weight does
            not have, weights that are quantised or not at hand, no `run_model` and no file, layers that were never called, NaN or
            Inf, and files that are damaged, or of other layers.

    Warns:
        UserWarning: naming layers whose data span too few directions.
    """
    model, hooked = unwrap(model), unwrap(model if hooked_model is None else hooked_model)
    options = lora_config.corda_config
    if options is None:
        raise ValueError("lora_config.corda_config is None: give LoraConfig(corda_config=CordaConfig(corda_method='kpm'))")
    check_scaling(lora_config)
    targets = chosen_layers(model, lora_config)
    ranks = {name: rank_of(name, lora_config) for name in targets}
    for name, layer in targets.items():
        _check_layer(name, layer, ranks[name])
    refuse_other_layers(lora_config, model, targets)
    cache, sums = _path(options.cache_file), _path(options.covariance_file)
    if cache is not None and _is_there(cache):
        for name, eigens in _read_cache(cache, targets, ranks).items():
            _attach(targets[name], eigens)
        return
    mode = options.corda_method
    if mode not in CORDA_MODES:
        raise ValueError(f"corda_method must be 'kpm' or 'ipm' where there is no cache_file, not {mode!r}")
    from_file = sums is not None and _is_there(sums)
    if not from_file and run_model is None:
        raise ValueError("run_model is needed: there is neither a covariance_file nor a cache_file yet")
    for path in (cache, sums):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    report = reporter(bool(options.verbose))
    calls: Counter[str] = Counter()
    moments = (
        _read_covariances(sums, targets)
        if from_file and sums is not None
        else _run(targets, lora_config, run_model, hooked, parity, calls)
    )
    done, directions = 0, Directions()
    kept: dict[str, torch.Tensor] = {}
    report("corda", 0, len(targets), 0)

    def solve(site: Site, covariance: Covariance) -> tuple[dict[str, CordaEigens], torch.Tensor | None]:
        c = covariance.matrix()
        for name in site.members:
            rest = spared(mode, *weight_shape(targets[name]), ranks[name])
            directions.look_at(name, covariance, ranks[name], c, spared=rest)
        if not from_file:
            c /= covariance.tokens
        if not from_file and not parity and covariance.peft_trace is not None:
            c *= covariance.peft_trace / c.diagonal().sum()
        wanted = (not from_file and sums is not None) or not options.prune_temporary_fields
        as_found = c.float() if wanted else None
        c.diagonal().add_(DAMPING * c.diagonal().mean())
        return {name: _eigens(targets[name], c, ranks[name], mode) for name in site.members}, as_found

    # The last site's results lie with its members: nothing but the wanted columns is kept.
    for found, as_found in decompose(moments, solve):
        for name, eigens in found.items():
            _attach(targets[name], eigens)
            if as_found is not None:
                kept[name] = as_found
        done += len(found)
        report("corda", done, len(targets), 0)
    targets.settle(model)
    if targets.optional:
        lora_config.target_modules = list(targets)
    directions.warn(f"corda_method={mode!r}", stacklevel=3)
    if not options.prune_temporary_fields:
        for name, layer in targets.items():
            fields: Any = layer
            fields.covariance_matrix, fields.rank, fields.corda_method = kept[name], ranks[name], mode
            if not from_file:
                fields.sample_count = calls[name]
    if sums is not None and not from_file:
        _save(sums, {name: kept[name] for name in targets})
    if cache is not None:
        _save(
            cache,
            {
                f"{name}.eigens.{field}": getattr(layer.eigens, field)
                for name, layer in targets.items()
                for field in ("S_WC", "U_WC", "V_WC")
            },
        )


def _check_layer(name: str, layer: nn.Module, rank: int) -> None:
    weight, (d_out, d_in) = weight_of(layer), weight_shape(layer)
    if weight.dtype not in RESIDUAL_DTYPES or weight.device.type == "meta":
        raise ValueError(
            f"the weight of {name!r} ({type(layer).__name__}, {weight.dtype}, {weight.device}) cannot become a residual, which "
            'PEFT\'s CorDA needs; inject_adapters(..., method="corda-kpm", residual="adapter") leaves it alone'
        )
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(f"the adapter of {name!r} has rank {rank}, but its weight is {d_out} × {d_in}: use r ≤ {min(d_out, d_in)}")


def _run(
    targets: Targets,
    config: LoraConfig,
    run_model: Callable[[], Any] | None,
    hooked: nn.Module,
    parity: bool,
    calls: Counter[str],
) -> Iterator[tuple[Site, Covariance]]:
    """Second moments of the targets' inputs while `run_model` runs, whose calls of each target are counted in `calls`."""
    assert run_model is not None
    refuse_meta(hooked)
    modules = named_modules(hooked)
    missing = next((name for name in targets if name not in modules or not is_linear(modules[name])), None)
    if missing is not None:
        raise ValueError(f"hooked_model has no linear layer {missing!r}, which is a target in model")

    def weigh(name: str, x: torch.Tensor) -> torch.Tensor:
        return x.double() / x.max().abs()  # in float32 the quotient's rounding would be what the sum loses most by

    layers = targets.of_twin(modules)
    sums = _CountingSums(layers, "mixed", None if parity else TokenRows(hooked), weigh=weigh if parity else None)
    with torch.inference_mode(False), evaluating(hooked), recording(hooked, layers, sums):
        with _batches(hooked, sums), without_graphs():  # it may run a compiled model
            run_model()
        sums.end_batch()
    leave_out_uncalled(sums.uncalled, targets)
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
    """Every call of the whole model is a batch, with its own padding; calls of its parts alone have none."""
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


@torch.no_grad()
def _eigens(layer: nn.Module, c: torch.Tensor, rank: int, mode: str) -> CordaEigens:
    """The wanted singular triples of W C, with C⁻¹ times the right vectors, as PEFT keeps them."""
    stored = weight_of(layer).detach()
    weight = (stored.T if is_conv1d(layer) else stored).to(torch.float64)
    sigma, u = solvers.left_singular(weight @ c.to(weight.device), rank, end="bottom" if mode == "kpm" else "top")
    # Where W is singular itself, the triple has no part in W at all.
    inverse = torch.where(sigma > ZERO * sigma[0], 1 / sigma, 0.0)
    v = (weight.T @ u) * inverse
    return CordaEigens(*(t.to(stored.device, torch.float32).contiguous() for t in (sigma, u, v)))


def _attach(layer: nn.Module, eigens: CordaEigens) -> None:
    holder: Any = layer  # nn.Module's type says that attributes are tensors or modules
    holder.eigens = eigens


def _path(name: str | os.PathLike[str] | None) -> Path | None:
    return None if name is None else Path(name)


def _is_there(path: Path) -> bool:
    if path.exists():
        records.check_regular(path)
    return path.exists() and path.stat().st_size > 0


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, of the archive's reader and of the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged, or holds something else than tensors: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors")
    return found


def _check_values(tensor: torch.Tensor, what: str) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{what} is {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} holds NaN or Inf")


def _read_covariances(path: Path, targets: Mapping[str, nn.Module]) -> Iterator[tuple[Site, Covariance]]:
    """PEFT's `covariance_file`: module name → (d_in, d_in)."""
    found = _load(path)
    by_storage: dict[tuple[int, ...], list[str]] = {}
    for name, layer in targets.items():
        d_in = weight_shape(layer)[1]
        if name not in found:
            raise ValueError(f"{path} has no covariance of {name!r}; it was made for other target_modules")
        if found[name].shape != (d_in, d_in):
            raise ValueError(f"{path}: the covariance of {name!r} is {tuple(found[name].shape)}, not ({d_in}, {d_in})")
        c = found[name]
        _check_values(c, f"{path}: the covariance of {name!r}")
        if not bool((c.diagonal() >= 0).all()) or not bool(c.diagonal().float().mean() > 0):
            raise ValueError(f"{path}: the covariance of {name!r} is zero or negative")
        if not float((c - c.mT).abs().max()) <= ASYMMETRY * float(c.abs().max()):
            raise ValueError(f"{path}: the covariance of {name!r} is not symmetric")
        by_storage.setdefault((c.data_ptr(), *c.stride()), []).append(name)
    for names in by_storage.values():
        d_in, device = len(found[names[0]]), weight_of(targets[names[0]]).device
        yield (
            Site(tuple(names), d_in),
            Covariance.from_matrix(found[names[0]].to(device), tokens=d_in),
        )  # how many, the file does not say


def _read_cache(path: Path, targets: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> dict[str, CordaEigens]:
    """PEFT's `cache_file`: "{name}.eigens.S_WC" and so on."""
    found = _load(path)
    eigens: dict[str, CordaEigens] = {}
    for name, layer in targets.items():
        d_out, d_in = weight_shape(layer)
        r = ranks[name]
        parts = []
        for field, shape in (("S_WC", (r,)), ("U_WC", (d_out, r)), ("V_WC", (d_in, r))):
            key = f"{name}.eigens.{field}"
            if key not in found:
                raise ValueError(f"{path} has no {key!r}; it was made for other target_modules")
            if found[key].shape != shape:
                raise ValueError(
                    f"{path}: {key!r} is {tuple(found[key].shape)}, not {shape}: it was made for another rank or model"
                )
            _check_values(found[key], f"{path}: {key!r}")
            if field == "S_WC" and bool((found[key] < 0).any()):
                raise ValueError(f"{path}: {key!r} holds singular values, and one is negative")
            parts.append(found[key].to(weight_of(layer).device, copy=True))
        eigens[name] = CordaEigens(*parts)
    return eigens


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """`torch.save`, whole or not at all; what another process has written in the meantime is left alone."""
    with locked(path, wait=True):
        if not _is_there(path):
            with store.new_file(path, overwritable=lambda _: False) as part:
                torch.save(dict(tensors), part)
