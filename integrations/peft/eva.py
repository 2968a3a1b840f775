"""EVA (Paischer et al., arXiv 2410.07170) from exact second moments, behind PEFT's own two functions.

    from nullspace.integrations.peft import get_eva_state_dict, initialize_lora_eva_weights  # instead of: from peft import …

A = the top right singular vectors of a layer's *centred* inputs, B = 0, and the ranks go to the layers where they explain most
variance; the base stays as it is, so that it may be quantised.

What differs from PEFT: it reads the data again and again, updates an approximate SVD in float32 batch by batch, and stops once
the vectors turn by less than `EvaConfig.tau` from one batch to the next. Here the data are read once, every token counts the same,
and the components are those of all tokens together, whatever the size and order of the batches. Small data are read to their
end; of a long loader, no more than it takes until the components are, to `tau`, those of half the data. The price is memory:
4 · d_in² bytes for each input of the model, on the device where the layer runs, until the pass is over.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora import eva as peft_eva
from peft.tuners.lora.eva import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)

# By this name: where ours is put in the place of PEFT's, PEFT's own must still be found.
from peft.tuners.lora.eva import initialize_lora_eva_weights as initialize_by_peft
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from nullspace import factors, solvers
from nullspace.calibration.input_sums import InputSums, leave_out_uncalled, recording
from nullspace.distributed.loaders import length
from nullspace.integrations.peft.layers import check_scaling, chosen_layers, rank_of
from nullspace.model.batches import evaluating
from nullspace.model.linear import is_linear
from nullspace.model.padding import Padding, PaddingReader
from nullspace.model.sites import Site, Targets
from nullspace.model.token_rows import TokenRows
from nullspace.model.weights import refuse_meta
from nullspace.model.wrappers import unwrap
from nullspace.moments.covariance import Covariance
from nullspace.moments.directions import Directions, noise_of
from nullspace.progress import Progress, reporter

# Layers that PEFT adapts and EVA does not start.
NOT_STARTED = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What a `PeftModel` has in front of the names of its base.
PREFIX = "base_model.model."
# More of Σ‖x‖² than rounding leaves of equal inputs without their mean, by `Covariance.products`: below it nothing varies.
NO_VARIANCE = {"fp64": 1e-12, "mixed": 1e-6}
# From so many tokens for every direction of an input on, components are looked at whenever the data have doubled.
EARLIEST = 32


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., torch.Tensor]
    | Mapping[str, Callable[..., torch.Tensor]]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """EVA's A for every layer that gets an adapter (arXiv 2410.07170), from one pass over the data. Stands in for PEFT's.

    With λ_1 ≥ λ_2 ≥ … the eigenvalues of Σ (x − μ)(x − μ)ᵀ over all tokens x of a layer's input, component i explains
    λ_i / Σ_j λ_j of the variance. Of all layers' first round(r · `rho`) components, those that explain most are taken, as many as
    the layers' ranks add up to (a layer that is handed the same tensor as another one competes with the same numbers; ties go
    to the one that comes first in the model).

    Args:
        model: a `PeftModel`, whose adapters are switched off during the pass, or a bare model. Run in eval mode, left as it was.
        dataloader: any iterable of batches, read once; moved to the model's device. It is read to its end, or until, beyond 32
            tokens for every direction of every input, all components that are given out agree with those of half the data, to a
            cosine of `tau`.
        peft_config: of `LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(…))`; needed for a bare model. r,
            `rank_pattern`, `target_modules` and `eva_config` count. For a bare model, no `target_modules` means every linear
            layer, the output head too, as in PEFT's function.
        forward_fn: called with the model and a batch; `model(**batch)` by default.
        prepare_model_inputs_fn: called with a batch and the configuration, once a batch, for the functions below.
        prepare_layer_inputs_fn: called with a tuple that holds the layer's input, with what the function above returned (a copy of
            the batch if that is None) and with the layer's name; returns the rows that count, (n, d_in). Or a mapping from layers'
            names to such functions. None, and layers that the mapping leaves out: all rows. With both defaults the rows that
            count are the tokens whose `attention_mask` is not zero and, under `use_label_mask`, whose label is not
            `label_mask_value`.
        adapter_name: of the `PeftModel`.
        gather_distributed_inputs: where torch.distributed is initialised, add up the second moments of all ranks.
        show_progress_bar: a bar, on rank 0.

    Returns:
        Layer name → (rank, d_in) float32, orthonormal rows by descending variance, positive in the entry of largest magnitude, on
        the model's device; divided by √σ = λ^¼ under `whiten`. No rows for a layer that gets no adapter. Nothing, without a pass,
        if all targets are embeddings or convolutions, which EVA does not start. Names are those of
        `model.named_modules()`, with `base_model.model.` in front for a `PeftModel`.

    Raises:
        ValueError: before the pass, for a configuration that is missing, not of EVA or matches no layer, and for names in
            `prepare_layer_inputs_fn` that the model does not have; in it, naming the layer and the batch, for NaN or Inf and for
            padding that cannot be located; after it, for an empty dataloader, and naming the layer, if it was never called, if
            all its tokens are masked, if it had too few tokens for its components, and if its inputs do not vary.
        TypeError: with the defaults, for a batch that is no mapping.

    Warns:
        UserWarning: naming layers that get more components than their data have.
    """
    model = unwrap(model)
    config, eva = _config_of(model, peft_config, adapter_name)
    check_scaling(config)
    adapters = [m for m in model.modules() if isinstance(m, LoraLayer)]  # on the meta device, under low_cpu_mem_usage
    refuse_meta(model, [getattr(m, name) for m in adapters for name in m.adapter_layer_names])
    layers = _layers_of(model, config, adapter_name)
    if not layers:
        return {}
    device = peft_eva.get_device_with_meta_params(model)
    # On a CPU float64 costs little beside the forward pass, on many a GPU it would cost hours.
    precision = "auto" if any(p.device.type == "cuda" for p in model.parameters()) else "fp64"
    if (
        prepare_model_inputs_fn is prepare_model_inputs_fn_language_modeling
        and prepare_layer_inputs_fn is prepare_layer_inputs_fn_language_modeling
    ):
        sums: _Tokens | _PreparedRows = _Tokens(layers, precision, eva, model)
    else:
        sums = _PreparedRows(layers, precision, config, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    distributed = dist.is_available() and dist.is_initialized()
    bar = show_progress_bar and not (distributed and dist.get_rank() > 0)
    ranks = {name: rank_of(name, config) for name in layers}
    _run(model, dataloader, layers, sums, forward_fn, device, _Settled(layers, ranks, eva), reporter(bar))

    layers.settle(model)
    ranks = {name: ranks[name] for name in layers}
    sites = _in_order(sums.release(), layers)
    gather = distributed and gather_distributed_inputs
    if gather:
        _check_same_everywhere([site for site, _ in sites])
    of = _components_of_layers(sites, ranks, eva, gather)
    given = _distribute(of, ranks)
    directions = Directions()
    for name, components in of.items():
        directions.add(name, components.varying, given[name], components.vectors.shape[1])
    directions.warn("EVA", stacklevel=3)
    return {name: _factor(name, of[name], given[name], whiten=eva.whiten, device=device) for name in layers}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., torch.Tensor]
    | Mapping[str, Callable[..., torch.Tensor]]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start a `PeftModel`'s adapter as EVA does: `get_eva_state_dict`, loaded by PEFT's own function. Stands in for PEFT's.

    A = EVA's components (rank, d_in), B = 0, so that the model computes what its base does. `rank_pattern`, `alpha_pattern` (with
    `EvaConfig.adjust_scaling_factors`) and `target_modules` of the model's configuration become those of the new ranks; a layer of
    rank 0 loses its adapter.

    Args:
        model: from `get_peft_model`, with `low_cpu_mem_usage=True` or without; changed in place.
        dataloader: as of `get_eva_state_dict`; not needed with a state dict.
        eva_state_dict: what `get_eva_state_dict` returned, for the `PeftModel` or for its bare base; it is not changed. (PEFT finds
            no layer under the bare names, and starts all of them as LoRA does.) A layer that is not in it, such as an embedding,
            starts as LoRA does, with a warning of PEFT's.

    The other arguments are those of `get_eva_state_dict`.

    Raises:
        ValueError: for a model that is no `PeftModel`, more than one active adapter, an adapter that is not of
            `init_lora_weights="eva"`, neither data nor state dict, a state dict of another model, or an adapter that cannot be
            changed without another one; and as `get_eva_state_dict`. The model's weights are then as they were.
    """
    model = unwrap(model)
    if not isinstance(model, PeftModel):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config, _ = _config_of(model, None, adapter_name)
    if config.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    # A copy, as PEFT empties the dictionary that it is given.
    state = _with_names_of(model, eva_state_dict)
    _check_loadable(model, state, adapter_name)
    initialize_by_peft(model, eva_state_dict=state, adapter_name=adapter_name)


def _run(
    model: nn.Module,
    dataloader: Iterable[Any],
    layers: Mapping[str, nn.Module],
    sums: _Tokens | _PreparedRows,
    forward: Callable[[nn.Module, Any], Any],
    device: torch.device | None,
    settled: _Settled,
    report: Progress,
) -> None:
    number, total = 0, length(dataloader)
    adapters_off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with adapters_off, recording(model, layers, sums), evaluating(model), torch.inference_mode(False), torch.no_grad():
        for number, batch in enumerate(dataloader, start=1):
            inputs = batch if device is None else peft_eva.move_inputs_to_device(batch, device)
            sums.begin(number, inputs)
            forward(model, inputs)
            sums.end_batch()
            report("eva", number, total, 0)
            if settled(number, sums):
                break
    if number == 0:
        raise ValueError("dataloader is empty")
    leave_out_uncalled(sums.uncalled, layers)


class _Tokens(InputSums):
    """Hears the inputs of a language model, without padding and without the tokens that labels leave out."""

    MASKED = "every token is masked, as padding or by its label: EvaConfig(use_label_mask=False) counts the latter"

    def __init__(self, layers: Mapping[str, nn.Module], precision: str, eva: EvaConfig, model: nn.Module) -> None:
        super().__init__(layers, precision, TokenRows(model))
        self._eva, self._model, self._reader = eva, model, PaddingReader(model)

    def begin(self, number: int, inputs: Any) -> None:
        if not isinstance(inputs, Mapping):
            raise TypeError(
                f"batch {number} is {type(inputs).__name__}, not a mapping, in which the default functions would look for "
                "attention_mask and labels: give prepare_model_inputs_fn and prepare_layer_inputs_fn"
            )
        padding = self._reader.read(number, inputs)
        self._reader.check_positions(self._model, inputs, padding)
        labels = inputs.get("labels") if self._eva.use_label_mask else None
        if labels is not None:
            labelled = labels != self._eva.label_mask_value
            if padding.shape != labelled.shape:
                raise ValueError(
                    f"batch {number}: labels {tuple(labelled.shape)} cannot be lined up with the tokens {padding.shape}: use "
                    "EvaConfig(use_label_mask=False)"
                )
            padding = padding.keep(labelled)
        self.begin_batch(number, padding)


class _PreparedRows(InputSums):
    """Hears, in place of a layer's input, the rows that a function makes of it."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        precision: str,
        config: LoraConfig,
        prepare_model_inputs: Callable[[Any, LoraConfig], Any] | None,
        prepare_layer_inputs: Callable[..., torch.Tensor] | Mapping[str, Callable[..., torch.Tensor]] | None,
    ) -> None:
        super().__init__(layers, precision)
        self._config, self._prepare_model_inputs = config, prepare_model_inputs
        if isinstance(prepare_layer_inputs, Mapping):
            self._functions = {name: prepare_layer_inputs.get(name, _every_row) for name in layers}
            unknown = [name for name in prepare_layer_inputs if name not in layers]
            if unknown:
                raise ValueError(
                    "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
                    + ", ".join(map(repr, unknown))
                )
        else:
            self._functions = dict.fromkeys(layers, prepare_layer_inputs or _every_row)
        self._model_inputs: Any = None
        self._latest: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def begin(self, number: int, inputs: Any) -> None:
        prepare = self._prepare_model_inputs
        self._model_inputs = copy.deepcopy(inputs) if prepare is None else prepare(inputs, self._config)
        self.begin_batch(number, Padding())

    def receive(self, name: str, x: torch.Tensor) -> None:
        rows = self._functions[name]((x,), self._model_inputs, name)
        if not isinstance(rows, torch.Tensor) or rows.ndim != 2:
            what = f"a tensor of shape {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ValueError(f"{name}: prepare_layer_inputs_fn must return a tensor (n, d_in), not {what}")
        # Layers that were handed one tensor share a sum if the function, which knows their names, makes equal rows of it.
        if self._latest is None or self._latest[0] is not x:
            self._latest = (x, [])
        known = self._latest[1]
        equal = next((each for each in known if torch.equal(each, rows)), None)
        if equal is None:
            known.append(rows)
        super().receive(name, rows if equal is None else equal)

    def end_batch(self) -> None:
        self._latest = None
        super().end_batch()


def _every_row(layer_input: tuple[torch.Tensor], model_input: Any, layer_name: str) -> torch.Tensor:
    return layer_input[0].reshape(-1, layer_input[0].shape[-1])


class _Components(NamedTuple):
    """The first k principal components of one input."""

    vectors: torch.Tensor
    """(k, d_in), orthonormal rows."""
    eigenvalues: torch.Tensor
    """(k,), descending."""
    shares: torch.Tensor
    """(k,), of the whole variance."""
    varying: int
    """How many of them vary by more than rounding."""


class _Settled:
    """Whether every component that is given out agrees with that of half the data, by `EvaConfig.tau`.

    Small data are read to their end; of a loader over a whole corpus, no more than the components need.
    """

    def __init__(self, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], eva: EvaConfig) -> None:
        self._layers, self._ranks, self._eva = layers, ranks, eva
        self._next = 1
        self._before: dict[str, _Components] = {}

    def __call__(self, number: int, sums: InputSums) -> bool:
        if number < self._next:
            return False
        self._next = 2 * number
        sites = sums.partial()
        if sum(len(site.members) for site, _ in sites) < len(self._layers):
            return False
        if any(covariance.tokens < EARLIEST * site.d_in for site, covariance in sites):
            return False
        before, self._before = self._before, _components_of_layers(_in_order(sites, self._layers), self._ranks, self._eva, False)
        given = _distribute(self._before, self._ranks)
        return bool(before) and all(
            bool(((now.vectors[: given[name]] * before[name].vectors[: given[name]]).sum(1).abs() >= self._eva.tau).all())
            for name, now in self._before.items()
        )


def _components_of_layers(
    sites: list[tuple[Site, Covariance]], ranks: Mapping[str, int], eva: EvaConfig, gather: bool
) -> dict[str, _Components]:
    """Of every layer, in PEFT's order, in which equal shares are dealt out: the first layer of every input, then the others.

    The list is emptied: each sum is free as soon as it is used.
    """
    found: dict[tuple[str, ...], _Components] = {}
    while sites:
        site, covariance = sites.pop(0)
        wanted = max(round(ranks[name] * eva.rho) for name in site.members)
        found[site.members] = _components_of(site, covariance, wanted, gather)
        del covariance
    first = {members[0]: components for members, components in found.items()}
    return {**first, **{name: components for members, components in found.items() for name in members[1:]}}


def _components_of(site: Site, covariance: Covariance, wanted: int, gather: bool) -> _Components:
    c, mean, tokens = covariance.matrix(), covariance.mean(), covariance.mass
    if gather:
        total = torch.cat([mean * tokens, mean.new_tensor([tokens])])
        dist.all_reduce(c)
        dist.all_reduce(total)
        tokens = float(total[-1])
        mean = total[:-1] / tokens
    k = min(wanted, site.d_in)
    if tokens < k + 1:
        raise ValueError(
            f"{site.name!r} heard {tokens:.0f} tokens, which have at most {max(tokens - 1, 0):.0f} principal components, but "
            f"r · rho asks for {k}: give it more tokens, or a smaller rank or rho"
        )
    c_centred = factors.centred(c, mean, tokens)
    variance = c_centred.trace()
    if not bool(variance > NO_VARIANCE[covariance.products] * c.trace()):
        raise ValueError(f"the inputs of {site.name!r} are all the same: there is no variance to explain")
    noise = max(noise_of(covariance), solvers.ZERO_EIGENVALUE * float(c.trace()))
    del c
    values, vectors = solvers.top_eigenpairs(c_centred, k)
    values = values.clamp(min=0)
    return _Components(vectors.mT, values, values / variance, int((values > noise).sum()))


def _distribute(components: Mapping[str, _Components], ranks: Mapping[str, int]) -> dict[str, int]:
    """How many of the largest shares are each layer's, as many as the ranks add up to. Equal ones go to the first layer."""
    every = [(share, name) for name, each in components.items() for share in each.shares.tolist()]
    every.sort(key=lambda pair: -pair[0])  # stable
    counts = Counter(name for _, name in every[: sum(ranks.values())])
    return {name: counts[name] for name in components}


def _factor(name: str, components: _Components, rank: int, *, whiten: bool, device: torch.device | None) -> torch.Tensor:
    a, values = components.vectors[:rank], components.eigenvalues[:rank]
    if whiten and rank:
        if not bool(values[-1] > NO_VARIANCE["fp64"] * values[0]):
            raise ValueError(f"component {rank} of {name!r} explains nothing, and cannot be whitened: use a smaller rank")
        a = a / values.pow(0.25)[:, None]
    return a.to(device or a.device, torch.float32, copy=True, memory_format=torch.contiguous_format)


def _config_of(model: nn.Module, config: LoraConfig | None, adapter_name: str) -> tuple[LoraConfig, EvaConfig]:
    if config is None:
        if not isinstance(model, PeftModel):
            raise ValueError("peft_config is required if model is not a PeftModel")
        if adapter_name not in model.peft_config:
            raise ValueError(f"the model has no adapter named {adapter_name!r}, but {', '.join(map(repr, model.peft_config))}")
        config = cast(LoraConfig, model.peft_config[adapter_name])
    eva: EvaConfig | None = getattr(config, "eva_config", None)
    if eva is None:
        raise ValueError("peft_config has no eva_config: it must be a LoraConfig with init_lora_weights='eva'")
    return config, eva


def _layers_of(model: nn.Module, config: LoraConfig, adapter_name: str) -> Targets:
    """Name → linear layer, in the model's order: those that have the adapter, or would get it.

    Empty if the adapter is on embeddings and convolutions alone.
    """
    found: dict[str, nn.Module]
    if isinstance(model, PeftModel):
        unsupported = (*peft_eva.UNSUPPORTED_LORA_MODULES, ParamWrapper)
        found = {
            name: module.get_base_layer()
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and adapter_name in module.lora_A and not isinstance(module, unsupported)
        }
        if not found and not any(isinstance(module, peft_eva.UNSUPPORTED_LORA_MODULES) for module in model.modules()):
            raise ValueError(f"the model has no linear layer with an adapter named {adapter_name!r}")
        other = next((name for name, module in found.items() if not is_linear(module)), None)
        if other is not None:
            raise ValueError(
                f"{other!r} is a {type(found[other]).__name__}: only nn.Linear, its subclasses and Conv1D are supported"
            )
        return Targets(found)
    if config.target_modules is None:
        return Targets({name: module for name, module in model.named_modules() if is_linear(module)}, optional=True)
    targets = [module for name, module in model.named_modules() if check_target_module_exists(config, name)]
    if targets and all(isinstance(module, NOT_STARTED) for module in targets):
        return Targets({})
    return chosen_layers(model, config)


def _in_order(pairs: Iterable[tuple[Site, Covariance]], layers: Mapping[str, nn.Module]) -> list[tuple[Site, Covariance]]:
    """Sites, and the members of each, in the order of the layers in the model rather than of their calls."""
    place = {name: number for number, name in enumerate(layers)}
    found = [(Site(tuple(sorted(site.members, key=place.__getitem__)), site.d_in), sums) for site, sums in pairs]
    return sorted(found, key=lambda pair: place[pair[0].name])


def _check_same_everywhere(sites: list[Site]) -> None:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, sites)
    other = next((rank for rank, each in enumerate(every) if each != every[0]), None)
    if other is not None:
        raise ValueError(f"ranks 0 and {other} found different layers to share their inputs: their sums cannot be added up")


def _with_names_of(model: PeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict; that of a bare model under the names of the `PeftModel`."""
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if layers.isdisjoint(state):
        prefixed = {PREFIX + name: a for name, a in state.items()}
        if not layers.isdisjoint(prefixed):
            return prefixed
    return dict(state)


def _check_loadable(model: PeftModel, state: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Raise `ValueError` for what PEFT's loader would trip over halfway, or do to other adapters."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if state and not any(name in layers for name in state):
        raise ValueError(
            f"eva_state_dict has none of this model's layers, such as {next(iter(layers), None)!r}, but such as "
            f"{next(iter(state), None)!r}: name them as this model or its base does"
        )
    for name, layer in layers.items():
        adapters, a = {*layer.lora_A, *layer.lora_embedding_A}, state.get(name)
        others = ", ".join(map(repr, sorted(adapters - {adapter_name})))
        if adapter_name not in adapters:
            raise ValueError(
                f"{name!r} has only {others}, but PEFT would give it {adapter_name!r} too: load other adapters afterwards"
            )
        if a is not None and (a.ndim != 2 or a.shape[1] != layer.in_features):
            raise ValueError(f"eva_state_dict is another model's: {name!r} needs (rank, {layer.in_features}), not {tuple(a.shape)}")
        if a is not None and len(a) == 0 and others:
            raise ValueError(f"{name!r} gets rank 0, and PEFT would remove {others} there too: load other adapters afterwards")
