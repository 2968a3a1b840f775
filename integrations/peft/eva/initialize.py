"""`get_eva_state_dict` and `initialize_lora_eva_weights`, with PEFT's signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, cast

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

# Under another name, so that it is still PEFT's own where a user has put ours in its place.
from peft.tuners.lora.eva import initialize_lora_eva_weights as initialize_by_peft
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from nullspace.devices import upload
from nullspace.distributed.loaders import length
from nullspace.errors import InputError, OtherModelError
from nullspace.integrations.peft.eva.components import Settled, components_of_layers, distribute, factor, in_order
from nullspace.integrations.peft.eva.inputs import PreparedRows, PrepareLayerInputs, Tokens
from nullspace.integrations.peft.experts.checks import leave_out_experts
from nullspace.integrations.peft.passes import summing
from nullspace.integrations.peft.targets import check_scaling, chosen_layers, rank_of
from nullspace.model.linear import is_linear
from nullspace.model.sites import Site, Targets
from nullspace.model.weights import refuse_meta
from nullspace.model.wrappers import unwrap
from nullspace.moments.directions import Directions
from nullspace.progress import Progress, reporter

# Layers that PEFT adapts and EVA does not start.
NOT_STARTED = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Before the names of the base's modules in a `PeftModel`.
PREFIX = "base_model.model."


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayerInputs = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """EVA's A for every layer that gets an adapter (arXiv 2410.07170), from one pass over the data. Replaces PEFT's function.

    With λ_1 ≥ λ_2 ≥ … the eigenvalues of Σ (x − μ)(x − μ)ᵀ over all tokens x of a layer's input, component i explains
    λ_i / Σ_j λ_j of the variance. Of all layers' first round(r · `rho`) components, those that explain most are taken, as many as
    the layers' ranks add up to (a layer that shares another one's input competes with the same numbers; ties go to the one that
    comes first in the model).

    Args:
        model: a `PeftModel`, whose adapters are switched off during the pass, or a bare model. Run in eval mode; not changed.
        dataloader: any iterable of batches, read once; moved to the model's device. It is read to its end, or until, beyond 32
            tokens for every direction of every input, all components that are used agree with those of half the data, to a cosine
            of `tau`.
        peft_config: of `LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(…))`; needed for a bare model. r,
            `rank_pattern`, `target_modules` and `eva_config` count. For a bare model, no `target_modules` means every linear
            layer, the output head too, as in PEFT's function.
        forward_fn: called with the model and a batch; `model(**batch)` by default.
        prepare_model_inputs_fn: called with a batch and the configuration, once a batch, for the functions below.
        prepare_layer_inputs_fn: called with a tuple that holds the layer's input, with the result of the function above (a copy of
            the batch if that is None) and with the layer's name; returns the rows that count, (n, d_in). Or a mapping from layers'
            names to such functions. None, and layers that the mapping leaves out: all rows. With both defaults the rows that
            count are the tokens whose `attention_mask` is not zero and, under `use_label_mask`, whose label is not
            `label_mask_value`.
        adapter_name: of the `PeftModel`.
        gather_distributed_inputs: where torch.distributed is initialised, add up the second moments of all ranks.
        show_progress_bar: a bar, on rank 0.

    Returns:
        Layer name → (rank, d_in) float32, orthonormal rows by descending variance, positive in the entry of largest magnitude, on
        the model's device; divided by √σ = λ^¼ under `whiten`. No rows for a layer that gets no adapter. Empty, without a pass,
        if all targets are embeddings or convolutions, which EVA does not start. Names are those of `model.named_modules()`, with
        `base_model.model.` in front for a `PeftModel`.

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
    # On a CPU float64 costs little beside the forward pass; on many GPUs it would take hours.
    precision = "auto" if any(p.device.type == "cuda" for p in model.parameters()) else "fp64"
    if (
        prepare_model_inputs_fn is prepare_model_inputs_fn_language_modeling
        and prepare_layer_inputs_fn is prepare_layer_inputs_fn_language_modeling
    ):
        sums: Tokens | PreparedRows = Tokens(layers, precision, eva, model)
    else:
        sums = PreparedRows(layers, precision, config, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    distributed = dist.is_available() and dist.is_initialized()
    report = reporter(show_progress_bar and not (distributed and dist.get_rank() > 0))
    ranks = {name: rank_of(name, config) for name in layers}
    _run(model, dataloader, layers, sums, forward_fn, device, Settled(layers, ranks, eva), report)

    layers.settle(model)
    ranks = {name: ranks[name] for name in layers}
    sites = in_order(sums.release(), layers)
    gather = distributed and gather_distributed_inputs
    if gather:
        _check_same_everywhere([site for site, _ in sites])
    components_of = components_of_layers(sites, ranks, eva, gather)
    new_ranks = distribute(components_of, ranks)
    directions = Directions()
    for name, components in components_of.items():
        directions.add(name, components.varying, new_ranks[name], components.vectors.shape[1])
    directions.warn("EVA", stacklevel=3)
    return {name: factor(name, components_of[name], new_ranks[name], whiten=eva.whiten, device=device) for name in layers}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayerInputs = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start a `PeftModel`'s adapter as EVA does: `get_eva_state_dict`, loaded by PEFT's own function. Replaces PEFT's function.

    A = EVA's components (rank, d_in), B = 0, so that the model computes what its base does. `rank_pattern`, `alpha_pattern` (with
    `EvaConfig.adjust_scaling_factors`) and `target_modules` of the model's configuration become those of the new ranks; a layer of
    rank 0 loses its adapter.

    Args:
        model: from `get_peft_model`, with `low_cpu_mem_usage=True` or without; changed in place.
        dataloader: as of `get_eva_state_dict`; not needed with a state dict.
        eva_state_dict: what `get_eva_state_dict` returned, for the `PeftModel` or for its bare base; it is not changed. (PEFT
            matches no layer with the bare names, and starts all of them as LoRA does.) A layer that is not in it, such as an
            embedding, starts as LoRA does, with a warning of PEFT's.

    The other arguments are those of `get_eva_state_dict`.

    Raises:
        ValueError: for a model that is no `PeftModel`, more than one active adapter, an adapter that is not of
            `init_lora_weights="eva"`, neither data nor state dict, a state dict of another model, or an adapter that cannot be
            changed without another one; and as `get_eva_state_dict`. The model's weights are then as they were.
    """
    model = unwrap(model)
    if not isinstance(model, PeftModel):
        raise InputError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise InputError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config, _ = _config_of(model, None, adapter_name)
    if config.init_lora_weights != "eva":
        raise InputError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise InputError("dataloader is required if eva_state_dict is not provided")
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
    sums: Tokens | PreparedRows,
    forward: Callable[[nn.Module, Any], Any],
    device: torch.device | None,
    settled: Settled,
    report: Progress,
) -> None:
    number, total = 0, length(dataloader)
    adapters_off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with adapters_off, summing(model, layers, sums, layers):
        for number, batch in enumerate(dataloader, start=1):
            inputs = batch if device is None else _moved(batch, device)
            sums.begin(number, batch, inputs)
            forward(model, inputs)
            sums.end_batch()
            report("eva", number, total, 0)
            if settled(number, sums):
                break
        if number == 0:
            raise InputError("dataloader is empty")


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device; the host does not wait for the tensors of a plain dictionary."""
    if type(batch) is not dict or not all(isinstance(value, torch.Tensor) for value in batch.values()):
        return peft_eva.move_inputs_to_device(batch, device)
    return {name: upload(value, device) for name, value in batch.items()}


def _config_of(model: nn.Module, config: LoraConfig | None, adapter_name: str) -> tuple[LoraConfig, EvaConfig]:
    if config is None:
        if not isinstance(model, PeftModel):
            raise InputError("peft_config is required if model is not a PeftModel")
        if adapter_name not in model.peft_config:
            raise InputError(f"the model has no adapter named {adapter_name!r}, but {', '.join(map(repr, model.peft_config))}")
        config = cast(LoraConfig, model.peft_config[adapter_name])
    eva: EvaConfig | None = getattr(config, "eva_config", None)
    if eva is None:
        raise InputError("peft_config has no eva_config: it must be a LoraConfig with init_lora_weights='eva'")
    return config, eva


def _layers_of(model: nn.Module, config: LoraConfig, adapter_name: str) -> Targets:
    """Name → linear layer, in the model's order: those that have the adapter, or would get it.

    Empty if the adapter is on embeddings and convolutions alone.
    """
    if isinstance(model, PeftModel):
        unsupported = (*peft_eva.UNSUPPORTED_LORA_MODULES, ParamWrapper)
        bases: dict[str, nn.Module] = {
            name: module.get_base_layer()
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and adapter_name in module.lora_A and not isinstance(module, unsupported)
        }
        if not bases and not any(isinstance(module, peft_eva.UNSUPPORTED_LORA_MODULES) for module in model.modules()):
            raise InputError(f"the model has no linear layer with an adapter named {adapter_name!r}")
        other = next((name for name, module in bases.items() if not is_linear(module)), None)
        if other is not None:
            raise InputError(
                f"{other!r} is a {type(bases[other]).__name__}: only nn.Linear, its subclasses and Conv1D are supported"
            )
        return Targets(bases)
    if config.target_modules is None:
        return Targets({name: module for name, module in model.named_modules() if is_linear(module)}, optional=True)
    targets = [module for name, module in model.named_modules() if check_target_module_exists(config, name)]
    if targets and all(isinstance(module, NOT_STARTED) for module in targets):
        return Targets({})
    chosen = chosen_layers(model, config)
    leave_out_experts(chosen, "is an expert's matrix in a tensor of all experts, for which PEFT has no EVA: use inject_adapters")
    return chosen


def _check_same_everywhere(sites: list[Site]) -> None:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, sites)
    other = next((rank for rank, each in enumerate(every) if each != every[0]), None)
    if other is not None:
        raise InputError(f"ranks 0 and {other} have different layers that share their inputs: their sums cannot be added up")


def _with_names_of(model: PeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict; that of a bare model under the names of the `PeftModel`."""
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if layers.isdisjoint(state):
        prefixed = {PREFIX + name: a for name, a in state.items()}
        if not layers.isdisjoint(prefixed):
            return prefixed
    return dict(state)


def _check_loadable(model: PeftModel, state: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Raise `ValueError` for what would make PEFT's loader fail halfway, or change other adapters."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if state and not any(name in layers for name in state):
        raise InputError(
            f"eva_state_dict has none of this model's layers, such as {next(iter(layers), None)!r}, but such as "
            f"{next(iter(state), None)!r}: name them as this model or its base does"
        )
    for name, layer in layers.items():
        adapters, a = {*layer.lora_A, *layer.lora_embedding_A}, state.get(name)
        others = ", ".join(map(repr, sorted(adapters - {adapter_name})))
        if adapter_name not in adapters:
            raise InputError(
                f"{name!r} has only {others}, but PEFT would give it {adapter_name!r} too: load other adapters afterwards"
            )
        if a is not None and (a.ndim != 2 or a.shape[1] != layer.in_features):
            raise OtherModelError(
                f"eva_state_dict is another model's: {name!r} needs (rank, {layer.in_features}), not {tuple(a.shape)}"
            )
        if a is not None and len(a) == 0 and others:
            raise InputError(f"{name!r} gets rank 0, and PEFT would remove {others} there too: load other adapters afterwards")
