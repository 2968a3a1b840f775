"""`initialize_lora_nullspace_weights`: a start from data for an adapter that PEFT has made already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from nullspace.distributed import Job
from nullspace.errors import InputError, InputTypeError
from nullspace.integrations.peft.experts.adapters import adapted_by
from nullspace.integrations.peft.from_data.calibration import Calibration, calibrated, check_spaces_rank, read_arguments
from nullspace.integrations.peft.inject import Originals, as_it_was_on_error, check_model, start_adapter
from nullspace.integrations.peft.layers import (
    PEFT_RESIDUALS,
    SUBTRACTED,
    check_layers,
    check_servable,
    lora_layers,
    unfreeze_layers,
    without_adapters,
)
from nullspace.integrations.peft.start import random_seed
from nullspace.integrations.peft.subtracted import refuse_settings
from nullspace.integrations.peft.targets import check_fields
from nullspace.methods import METHODS, frozen_factor
from nullspace.model.experts import named_layers
from nullspace.model.sharded import is_model_sharded
from nullspace.model.sharded_tensors import is_sharded
from nullspace.model.sites import Targets
from nullspace.model.wrappers import unwrap, unwrapped
from nullspace.progress import Progress


def initialize_lora_nullspace_weights(
    peft_model: nn.Module,
    tokenizer: Any = None,
    *,
    task: Any = None,
    keep: Any = None,
    method: str = "contrast",
    samples: int = 256,
    length: int | None = None,
    batch_size: int = 4,
    strategy: str = "auto",
    precision: str | Mapping[str, str] = "auto",
    experts: str = "auto",
    device: torch.device | str | None = None,
    freeze_a: bool | None = None,
    freeze_b: bool | None = None,
    residual: str = "auto",
    adapter_name: str = "default",
    progress: bool | Progress = True,
    **numbers: float,
) -> None:
    """Start an adapter that PEFT has made already: after `get_peft_model`, or where a trainer of TRL has called it.

    >>> trainer = SFTTrainer(model, train_dataset=train, peft_config=LoraConfig(r=16))                   # doctest: +SKIP
    >>> initialize_lora_nullspace_weights(                                                               # doctest: +SKIP
    ...     trainer.model, trainer.processing_class, task=trainer.get_train_dataloader(), keep=["…"]
    ... )
    >>> trainer.train()                                                                                  # doctest: +SKIP

    A and B of the adapter are overwritten, with what `nullspace.prepare` gives the base model; its rank, scaling and layers stay.
    While the model is calibrated its own modules are in the places of PEFT's layers, so that no adapter takes part. Other adapters
    stay as they are. Call it before the optimizer is made (TRL makes it in `train`), as it decides which of A and B are trained.

    Args:
        peft_model: with the adapter; changed in place.
        adapter_name: PEFT's name for the adapter.
        tokenizer, task, keep, method, samples, length, batch_size: see `nullspace.prepare`.
        strategy, precision, experts, device, freeze_a, freeze_b, progress, numbers: see `nullspace.prepare`. Layers of the adapter
            that the data do not reach are errors.
        residual: see `inject_adapters`. A base that other adapters use too is not changed: `"auto"` then adds the second adapter.

    Raises:
        TypeError: for a model that is no `PeftModel`, and an adapter that is not LoRA.
        ValueError: for an adapter that does not exist, is merged, was started by `inject_adapters` with a second one, has its A and
            B on the meta device or spread over several ranks, or another layer than linear ones; for a base that PEFT has made a
            residual (`init_lora_weights="pissa"`, …); for DoRA whose magnitudes are of another product than zero; and as
            `nullspace.prepare`.

    On any error the model is as it was.

    Warns:
        UserWarning: as `nullspace.prepare`.
    """
    adapted, job = unwrap(peft_model), Job()
    how = Calibration(samples, length, batch_size, strategy, precision, experts, device, progress)
    with job.sharing_errors():
        config, adapters = _checked(adapted, adapter_name)
        given = read_arguments(method, task, keep, numbers, seed=random_seed(method))
        frozen = frozen_factor(method, freeze_a, freeze_b)
        residual = _residual_beside_others(adapted, adapter_name, method, residual, frozen)
        base = adapted.get_base_model()
        weights_job = job if is_model_sharded(base) else Job.alone()
        with unwrapped(adapted), contextlib.ExitStack() as held:
            with without_adapters(base):
                how.check(base)
                check_model(base, config, weights_job)
                modules = named_layers(base)
                layers = Targets({name: modules[name] for name in adapters})
                ranks = {name: layer.r[adapter_name] for name, layer in adapters.items()}
                check_layers(layers, ranks, method, given.sources, weights_job)
                freeze: dict[str, Any] = {"freeze_a": frozen == "A", "freeze_b": frozen == "B"}
                refuse_settings(config, check_servable(base, layers, method, residual=residual, **freeze), frozen)
                if "spaces" in given.data:
                    check_spaces_rank(layers, max(ranks.values()))
                loaders = given.loaders(how, tokenizer, base)
                sources = held.enter_context(calibrated(base, layers, given, loaders, how, max(ranks.values()), job))
            with as_it_was_on_error(adapted, config), _factors_kept(adapters, adapter_name):
                unfreeze_layers(adapters, adapter_name)
                config.init_lora_weights = True
                how_to_start: dict[str, Any] = {"method": method, "frozen": frozen, "residual": residual}
                start_adapter(adapted, adapter_name, sources, **how_to_start, job=weights_job)


def _checked(peft_model: Any, adapter_name: str) -> tuple[LoraConfig, dict[str, Any]]:
    """The adapter's configuration and layers, if it can be started anew."""
    if not isinstance(peft_model, PeftModel):
        raise InputTypeError(f"peft_model must be a PeftModel, not {type(peft_model).__name__}, which nullspace.prepare takes")
    config: Any = peft_model.peft_config.get(adapter_name)
    if config is None:
        raise InputError(f"the model has no adapter named {adapter_name!r}, but {', '.join(map(repr, peft_model.peft_config))}")
    if not isinstance(config, LoraConfig):
        raise InputTypeError(f"adapter {adapter_name!r} is of {type(config).__name__}: a LoraConfig is needed")
    check_fields(config)
    for name, each in peft_model.peft_config.items():
        init = getattr(each, "init_lora_weights", None)
        if isinstance(init, str) and init.startswith(PEFT_RESIDUALS):
            raise InputError(
                f"adapter {name!r} has init_lora_weights={init!r}, with which PEFT has changed the base: wrap the original model "
                "with init_lora_weights=True"
            )
    if SUBTRACTED.format(adapter_name) in peft_model.peft_config:
        raise InputError(
            f"adapter {adapter_name!r} was started together with a second one, which subtracts its product: load the model again"
        )
    layers = lora_layers(peft_model, adapter_name)
    if not layers:
        raise InputError(f"adapter {adapter_name!r} has no LoRA layer")
    for name, layer in layers.items():
        if layer.merged_adapters:
            raise InputError(f"{', '.join(map(repr, layer.merged_adapters))} is merged into {name!r}: call unmerge_adapter first")
        if adapter_name not in layer.lora_A:
            raise InputError(f"target {name!r} is {type(layer.get_base_layer()).__name__}, not a linear layer")
        factors: list[Any] = [each[adapter_name].weight for each in (layer.lora_A, layer.lora_B)]
        if any(map(is_sharded, factors)):
            raise InputError(f"A and B of {name!r} are spread over several ranks: call this before the model is sharded")
        if any(factor.device.type == "meta" for factor in factors):
            raise InputError(f"A and B of {name!r} are on the meta device: wrap the model without low_cpu_mem_usage")
        if config.use_dora and bool(factors[1].any()):
            raise InputError(
                f"B of {name!r} is not zero, and DoRA's magnitudes belong to its product: wrap the original model again, with "
                "init_lora_weights=True"
            )
    return config, layers


def _residual_beside_others(peft_model: PeftModel, adapter_name: str, method: str, residual: str, frozen: str | None) -> str:
    """`residual`, for a base that other adapters may use too."""
    others = [name for name in peft_model.peft_config if name != adapter_name]
    if not others or method not in METHODS or not METHODS[method].changes_base:
        return residual
    if residual == "base":
        raise InputError(
            f"residual='base' would change what adapter {others[0]!r} was made for: use residual='adapter', or delete that adapter"
        )
    return "adapter" if residual == "auto" and frozen is None else residual


@contextlib.contextmanager
@torch.no_grad()
def _factors_kept(layers: Mapping[str, Any], adapter_name: str) -> Iterator[None]:
    """Context manager: restores A and B on any error. Where B has a bias (`lora_bias`), it is set to zero."""
    holders = {id(module): module for module in map(adapted_by, layers.values())}.values()
    linear: list[Any] = [each[adapter_name] for module in holders for each in (module.lora_A, module.lora_B)]
    parameters = [parameter for module in linear for parameter in module.parameters()]
    originals = Originals(parameters)
    for parameter in parameters:
        originals.keep(parameter)
    try:
        for module in linear:
            if module.bias is not None:
                module.bias.zero_()
        yield
    except BaseException:
        originals.put_back()
        raise
