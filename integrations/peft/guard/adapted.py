"""The layers of a live adapter, and what they were at its start."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from nullspace.artifacts.identity import weights_of
from nullspace.artifacts.residual import residual_mark
from nullspace.artifacts.sitewise import Sitewise
from nullspace.errors import AdapterWarning, InputError, InputTypeError, OtherModelError
from nullspace.factors import LowRank
from nullspace.integrations.peft.experts.adapters import ExpertAdapter, adapted_by
from nullspace.integrations.peft.files import adapter_in, init_around, located, read_factors
from nullspace.integrations.peft.layers import PEFT_RESIDUALS, SUBTRACTED, computed_weight, expert_layers, lora_layers
from nullspace.integrations.peft.made_for import warn_of_base
from nullspace.integrations.peft.origin import recorded
from nullspace.model.linear import is_linear, weight_shape
from nullspace.model.sharded_tensors import whole
from nullspace.model.sites import Site
from nullspace.model.wrappers import unwrap
from nullspace.moments.covariance import Covariance

FACTORS = ("lora_A", "lora_B")


class Adapted(NamedTuple):
    """One layer of an adapter. Parameters are looked up at every access, since FSDP2 and others replace them."""

    name: str
    layer: Any
    """PEFT's."""
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """A (r, d_in)."""
        return self.factor("lora_A")

    @property
    def b(self) -> nn.Parameter:
        """B (d_out, r)."""
        return self.factor("lora_B")

    def factor(self, name: str) -> nn.Parameter:
        """One of `FACTORS`."""
        weight: nn.Parameter = getattr(self.layer, name)[self.adapter].weight
        return weight

    @property
    def scaling(self) -> float:
        """s: the layer adds s·B A x."""
        return float(self.layer.scaling[self.adapter])

    def freezes(self, name: str) -> bool:
        """Whether one of `FACTORS` does not train (A: `freeze_a`), also where the adapter is not active at the moment."""
        if name in self.layer.frozen_peft_weight_names.get(self.adapter, ()):
            return True
        # A view of the stacked A of experts needs no gradient under no_grad.
        weight = getattr(adapted_by(self.layer), name)[self.adapter].weight
        return self.adapter in self.layer.active_adapters and not weight.requires_grad


def adapted_layers(
    peft_model: PeftModel, adapter_name: str | None, *, dora: bool = False, experts: bool = False
) -> tuple[Adapted, ...]:
    """The layers of the named adapter, or of the active one; with `dora`, those of DoRA's directions too.

    Of experts that are one tensor, A and B are views of PEFT's parameters: with `experts`, for what reads or writes them and keeps
    no track of parameters by their identity.

    Raises:
        TypeError: if this is no `PeftModel`.
        ValueError: if there is no such adapter, or it is not active alone; naming the layer, if it is not linear, adds something
            else than a product B A (DoRA), or has the adapter merged into its weight.
    """
    model = unwrap(peft_model)
    if not isinstance(model, PeftModel):
        raise InputTypeError(f"a PeftModel is needed, not {type(model).__name__}")
    name = adapter_name if adapter_name is not None else _active(model)
    layers = tuple(Adapted(layer, module, name) for layer, module in lora_layers(model, name).items())
    if not layers:
        raise InputError(f"the model has no LoRA adapter named {name!r}; it has {', '.join(map(repr, model.peft_config))}")
    for each in layers:
        base = each.layer.get_base_layer()
        if isinstance(each.layer, ExpertAdapter) and not experts:
            raise InputError(
                f"adapter {name!r} is on {each.name!r}, one of several experts in one parameter: such a parameter can be measured "
                "(Gauge, penalty, clora) and filtered, but not confined or decayed. Freeze A (freeze_a), or leave the experts out"
            )
        if not is_linear(base) or name not in each.layer.lora_A or type(each.layer).__name__ == "ParamWrapper":
            raise InputError(
                f"adapter {name!r} is on {each.name!r}, a {type(base).__name__}: only those of linear layers can be held"
            )
        if not dora and name in each.layer.lora_magnitude_vector:
            raise InputError(f"adapter {name!r} uses DoRA: what it adds to the weight of {each.name!r} is no product B A")
        if name in each.layer.merged_adapters:
            raise InputError(f"adapter {name!r} is merged into the weight of {each.name!r}: call unmerge_adapter() first")
    return layers


def _active(model: PeftModel) -> str:
    active: list[str] = list(model.active_adapters)
    second = {SUBTRACTED.format(name) for name in active}
    own = [name for name in active if name not in second]
    if len(own) != 1:
        raise InputError(f"the active adapters are {', '.join(map(repr, active)) or 'none'}: say which one is meant, adapter_name=")
    return own[0]


class Start(NamedTuple):
    """What an adapter started as."""

    factors: Mapping[str, LowRank]
    """Layer → A₀ and B₀ as PEFT stores them, without the scaling, float32. Empty where the model without the adapter is the
    original one."""
    residual: bool
    """Whether the base's weights are W₀ − s·B₀A₀."""

    def of(self, each: Adapted) -> LowRank | None:
        """A₀ and B₀ on the device of the layer's A."""
        factors = self.factors.get(each.name)
        return None if factors is None else LowRank(*(factor.to(each.a.device) for factor in factors))


Initial = Mapping[str, LowRank] | str | os.PathLike[str] | Start | None


def start_of(peft_model: PeftModel, layers: tuple[Adapted, ...], initial: Initial = None) -> Start:
    """What ΔW = s·(B A − B₀A₀) is counted from. Collective if the adapter is sharded.

    If nothing subtracts the initial product, that is zero: ΔW = s·B A, also for an adapter that is trained on. If the base is a
    residual, or a second adapter subtracts the product, A₀ and B₀ are those of the second adapter, of `OUT/adapter` beside the base
    (as `save_init` wrote them; where the adapter names it, or where the model was loaded from), or else the present ones.

    Args:
        peft_model: with the adapter.
        layers: of `adapted_layers`.
        initial: the adapter before training: a directory of PEFT or of `save_init`, what `read_factors` returns, or what this
            function has returned. Needed only for a trained adapter on a residual base that was moved without it.

    Raises:
        FileNotFoundError: if a file of `initial` is missing.
        ValueError: naming the layer, if `initial` does not have it, or in another shape.

    Warns:
        UserWarning: if the adapter was made for another base, or needs a second one that is not loaded; if the present factors are
            taken for the first ones of an adapter that was loaded.
    """
    model = unwrap(peft_model)
    config = model.peft_config[layers[0].adapter]
    made_by_peft = str(config.init_lora_weights).startswith(PEFT_RESIDUALS)
    residual = (
        residual_mark(model.get_base_model()) is not None or getattr(model, "nullspace_residual", None) == "base" or made_by_peft
    )
    second = [each._replace(adapter=SUBTRACTED.format(each.adapter)) for each in layers]
    subtracted = all(each.adapter in each.layer.lora_A for each in second)
    if isinstance(initial, Start):
        return initial
    record = recorded(config)
    warn_of_base(model, layers[0].adapter, record, stacklevel=3)
    if initial is None and not residual and not subtracted:
        return Start({}, False)
    if initial is not None:
        return Start(_unscaled(initial, layers), residual)
    if subtracted:
        return Start({each.name: LowRank(_copy(each.a), -_copy(each.b)) for each in second}, False)
    for base in map(located, (config.base_model_name_or_path, getattr(model.get_base_model(), "name_or_path", None))):
        if base is not None and os.path.isabs(base) and init_around(Path(base)) is not None:
            return Start(_unscaled(adapter_in(Path(base).parent), layers), True)
    if record.get("factors") and not hasattr(model, "nullspace_residual"):
        warnings.warn(
            f"what adapter {layers[0].adapter!r} started as is not beside its base ({config.base_model_name_or_path}): changes are "
            "counted from its present state. If it was trained before, give the folder that it started in: initial=",
            AdapterWarning,
            stacklevel=3,
        )
    return Start({each.name: LowRank(_copy(each.a), _copy(each.b)) for each in layers}, True)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return whole(tensor).detach().to(torch.float32, copy=True)


def _unscaled(initial: Any, layers: tuple[Adapted, ...]) -> dict[str, LowRank]:
    factors = initial if isinstance(initial, Mapping) else read_factors(adapter_in(Path(initial)))
    found = {}
    for each in layers:
        if each.name not in factors:
            raise OtherModelError(f"initial: there is no adapter of {each.name!r} in it")
        a, b = factors[each.name]
        d_out, d_in = weight_shape(each.layer.get_base_layer())
        rank = each.layer.r[each.adapter]
        if a.shape != (rank, d_in) or b.shape != (d_out, rank):
            raise OtherModelError(
                f"initial: A {tuple(a.shape)} and B {tuple(b.shape)} of {each.name!r} are not what A ({rank}, {d_in}) and "
                f"B ({d_out}, {rank}) were before training"
            )
        found[each.name] = LowRank(a.to(torch.float32), (b / each.scaling).to(torch.float32))
    return found


def check_known(known: Sitewise[Any], layers: tuple[Adapted, ...], start: Start) -> dict[Site, list[Adapted]]:
    """The layers by their sites. Collective if the base is sharded.

    Raises:
        ValueError: naming the layer, if it is not in `known`, or that was made for another model. The values of a residual base's
            weights are not compared.
    """
    of_layer = {name: site for site in known.sites for name in site.members}
    sites: dict[Site, list[Adapted]] = {}
    bases = {each.name: each.layer.get_base_layer() for each in layers}
    weights = {} if start.residual else weights_of(expert_layers(bases))  # read once for all experts of a parameter
    for each in layers:
        base = bases[each.name]
        known.check(each.name, base, (weight_shape(base), None) if start.residual else weights.get(each.name))
        sites.setdefault(of_layer[each.name], []).append(each)
    return sites


def inputs_of(known: Sitewise[Any], site: Site) -> Covariance:
    """The second moment of a site's inputs; of an expert with few tokens, completed.

    Raises:
        TypeError: if `known` has something else than second moments.
        ValueError: naming the site, if its inputs are all zero.
    """
    covariance = known[site.members[0]]
    if not isinstance(covariance, Covariance):
        raise InputTypeError(f"Covariances are needed (nullspace.compute_covariances), not {type(known).__name__}")
    covariance = covariance.completed(site.d_in)
    check_reached(site, covariance)
    return covariance


def check_reached(site: Site, covariance: Covariance) -> None:
    """Raise `ValueError` naming the site if its inputs are all zero."""
    if not covariance.trace > 0:
        raise InputError(
            f"site {site.name!r}: its calibration inputs are all zero. Leave its layers out, or add data that reach it"
        )


def original_weight(each: Adapted, start: Start) -> torch.Tensor:
    """W₀, (d_out, d_in) float32, on the device of the layer's A. Collective if it is sharded.

    Raises:
        ValueError: naming the layer, if its values cannot be read.
    """
    base = each.layer.get_base_layer()
    weight = computed_weight(each.name, base).to(each.a.device, torch.float32)
    factors = start.of(each) if start.residual else None
    return weight if factors is None else weight + each.scaling * (factors.B @ factors.A)
