"""What `inject_adapters` and `write_init` share: which layers a base offers, whether they can be served, what they start with."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.integrations import dequantize_bnb_weight
from peft.utils.other import get_pattern_key
from torch import nn

from nullspace.artifacts import identity
from nullspace.artifacts.identity import Weight, weights_of
from nullspace.artifacts.locks import temporary_folder
from nullspace.artifacts.residual import described, residual_mark
from nullspace.artifacts.sitewise import Sitewise
from nullspace.artifacts.spaces import NullSpaces
from nullspace.checks import check_integer, check_real
from nullspace.distributed import Job
from nullspace.integrations.peft.fit import fit_config
from nullspace.integrations.peft.shell import on_disk, plan_base, without_weights
from nullspace.methods import METHODS, Layer, Sources, check_rank
from nullspace.model.linear import is_conv1d, is_linear, unlike_linear, weight_of, weight_shape
from nullspace.model.sharded_tensors import is_sharded, shape_of
from nullspace.model.sites import Targets, find_targets
from nullspace.model.weights import restore_layout
from nullspace.model.wrappers import unwrapped

RESIDUAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Where the product that an adapter starts with is taken away again.
RESIDUALS = ("auto", "base", "adapter")
# The second adapter, which does that where the base cannot.
SUBTRACTED = "{}_subtracted"
ONE_AT_A_TIME = "it holds one weight at a time, and the model may be offloaded"


def check_servable(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    method: str,
    *,
    residual: str = "base",
    freeze_a: bool = False,
    offloaded: bool = False,
) -> str:
    """Where the residual goes, or `ValueError`, naming the layer and what would do. Cheap: ask it first.

    Args:
        model: the whole model, to see what else uses a weight.
        layers: module name → linear base layer.
        method: of `inject_adapters`.
        residual: of `inject_adapters`.
        freeze_a: of `inject_adapters`.
        offloaded: weights that accelerate keeps on the disk will do: `write_init` reads them, `inject_adapters` cannot change them.

    Returns:
        `"none"` (the method leaves the base alone), `"base"`, `"adapter"`, or `"zero"` (B starts at zero, where A is frozen).
    """
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(map(repr, RESIDUALS))}, not {residual!r}")
    mark = residual_mark(model)
    if mark is not None:
        raise ValueError(
            f"{type(model).__name__} {described(mark)}: start from that, or merge the adapter into the residual first (PEFT's "
            "merge_and_unload)"
        )
    if not METHODS[method].changes_base:
        return "none"
    untouched = [name for name, each in METHODS.items() if not each.changes_base]
    for name, layer in layers.items():
        if not _is_readable(layer, offloaded):
            raise ValueError(
                f"the weight of {name!r} ({_described(layer)}) is quantised or offloaded so that its values are not at hand; "
                f"{_listed(untouched)} do not ask for them"
            )
    if residual == "adapter":
        return "adapter"
    obstacle = _obstacle(model, layers, offloaded)
    if obstacle is None:
        if offloaded and on_disk(model):
            with temporary_folder() as folder:
                plan_base(without_weights(model), folder)
        return "base"
    if residual == "auto":
        return "zero" if freeze_a else "adapter"
    raise ValueError(
        f"{obstacle}, so it cannot become the residual of method {method!r}: let a second, frozen adapter take the product away "
        f'(inject_adapters(..., residual="adapter")), leave the layer out of target_modules, or use {_listed(untouched)}, '
        "which leave the base alone"
    )


def _obstacle(model: nn.Module, layers: Mapping[str, nn.Module], offloaded: bool) -> str | None:
    """Why a weight cannot be changed; None if all can."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for name, layer in layers.items():
        weight = weight_of(layer)
        at_hand = _has_values(layer) or (offloaded and weight.device.type == "meta")
        if not at_hand or weight.dtype not in RESIDUAL_DTYPES:
            return f"the weight of {name!r} ({_described(layer)}) is quantised or offloaded"
        if len(users.get(id(weight), [])) > 1:
            return f"the weight of {name!r} is tied ({' and '.join(users[id(weight)])} are one tensor)"
    if getattr(model, "hf_quantizer", None) is not None:
        return f"{next(iter(layers), '')!r} is part of a quantised model, which transformers saves with no weights but its own"
    return None


def _is_readable(layer: nn.Module, offloaded: bool) -> bool:
    weight = weight_of(layer)
    if _is_bitsandbytes(layer) or (offloaded and weight.device.type == "meta"):
        return True
    return _has_values(layer) and weight.dtype in RESIDUAL_DTYPES


def _has_values(layer: nn.Module) -> bool:
    """Whether a weight's values are at hand, or can be gathered."""
    weight = weight_of(layer)
    if is_sharded(weight):  # quantised ones are packed
        return weight.is_floating_point() and sorted(shape_of(weight)) == sorted(weight_shape(layer))
    return identity.fingerprint(weight) is not None


def _is_bitsandbytes(layer: nn.Module) -> bool:
    return type(weight_of(layer)).__name__ in ("Params4bit", "Int8Params")


def _described(layer: nn.Module) -> str:
    weight = weight_of(layer)
    return f"{type(layer).__name__}, {weight.dtype}, {weight.device}"


def _listed(methods: list[str]) -> str:
    return f"{', '.join(map(repr, methods[:-1]))} and {methods[-1]!r}"


def stored_weight(layer: nn.Module) -> torch.Tensor:
    """The weight as the layer stores it, (d_out, d_in) or the transpose of it (`Conv1D`); a quantised one as it computes."""
    restore_layout(layer)
    weight: Any = weight_of(layer)
    # Not `dequantize_module_weight`, which puts a copy of an 8-bit weight on a CPU into the layer and loses the scales.
    return dequantize_bnb_weight(weight, state=getattr(layer, "state", None)).detach() if _is_bitsandbytes(layer) else weight


def own_config(config: LoraConfig, model: nn.Module, given: Sources, job: Job) -> LoraConfig:
    """A checked copy of a configuration, with our own choices in it, for which PEFT wraps exactly the layers that are meant.

    Warns:
        UserWarning: naming the layers that `"all-linear"` leaves out, and what PEFT would have taken the targets for.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a LoraConfig, not {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise TypeError("the model already is a PeftModel: merge its adapters first, or start from the base model again")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TypeError("the model already has adapters: merge them first, or start from the base model again")
    for name in ("target_parameters", "layer_replication", "use_qalora", "megatron_config"):
        if getattr(config, name, None):
            raise ValueError(f"LoraConfig.{name} is not supported: factors belong to whole linear layers")
    check_scaling(config)
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    sources = list(given.of_model())
    named = config.target_modules is not None and not _is_all_linear(config)
    if named:
        layers = chosen_layers(model, config)
    elif config.target_modules is None and sources:
        layers = _known_layers(model, sources[0])
    else:
        layers = chosen_layers(model, config if _is_all_linear(config) else replace(config, target_modules="all-linear"))
        for name in [name for name in layers if not all(name in each for each in sources)]:
            layers.leave_out(name, "is not among the layers of the spaces or covariances")
        if not sources:
            _leave_out_odd(layers)
    layers.refuse_empty()
    if not named:
        config.target_modules = list(layers)
    fitted = fit_config(config, model, layers)
    if layers.left_out or not (named or sources):
        layers.settle(model, warn=job.first, stacklevel=5)
    if named and fitted.target_modules != config.target_modules:
        _check_named(config, model, layers, warn=job.first)
    return fitted


def _is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _known_layers(model: nn.Module, known: Sitewise[Any]) -> Targets:
    """All layers that something was computed for."""
    modules = dict(model.named_modules(remove_duplicate=False))
    strange = next((name for name in known if name not in modules or not is_linear(modules[name])), None)
    if strange is not None:
        raise ValueError(f"{strange!r} is no linear layer of {type(model).__name__}: the {known.WHAT}s are of another model")
    return Targets({name: module for name, module in modules.items() if name in known}, optional=True)


def _leave_out_odd(layers: Targets) -> None:
    """Layers of a class with a `forward` of its own that does not return W x + b, where no calibration has looked at outputs."""
    for name, layer in list(layers.items()):
        weight = weight_of(layer)
        plain = type(layer).forward is nn.Linear.forward or is_conv1d(layer)
        if plain or is_sharded(weight) or not weight.is_floating_point() or weight.device.type == "meta":
            continue
        d_in = weight_shape(layer)[1]
        x = torch.linspace(-1, 1, 3 * d_in, device=weight.device).reshape(1, 3, d_in).to(weight.dtype)
        try:
            with torch.no_grad():
                why = unlike_linear(layer, x, layer(x))
        except Exception as error:  # whatever a forward does with an input of another shape than it knows
            why = f"({type(layer).__name__}) does not take inputs (batch, tokens, d_in): {error}"
        if why is not None:
            layers.leave_out(name, why)


def _check_named(config: LoraConfig, model: nn.Module, layers: Targets, *, warn: bool) -> None:
    """Say where PEFT reads the user's targets otherwise than we do, unless they name layers in full."""
    if not isinstance(config.target_modules, str):
        entries = set(config.target_modules or ())
        nothing = next((e for e in sorted(entries) if not any(n == e or n.endswith(f".{e}") for n in layers)), None)
        if nothing is not None:
            raise ValueError(
                f"target_modules: {nothing!r} matches no linear layer of {type(model).__name__}, and the parameters of its experts "
                "are not supported"
            )
        if entries == set(layers):
            return
    if warn:
        warnings.warn(
            f"PEFT takes target_modules={config.target_modules!r} of {type(model).__name__} for parameters of its experts too, "
            f"which are not supported: only the {len(layers)} linear layers of these names get adapters.",
            stacklevel=5,
        )


def check_scaling(config: LoraConfig) -> None:
    """Raise `TypeError` or `ValueError`, naming the field, for ranks and alphas that give no finite, positive scaling."""
    patterns: Mapping[str, Mapping[str, Any]] = {name: getattr(config, name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for where, rank in {"r": config.r, **_entries("rank_pattern", patterns)}.items():
        check_integer(f"LoraConfig.{where}", rank)
    for where, alpha in {"lora_alpha": config.lora_alpha, **_entries("alpha_pattern", patterns)}.items():
        check_real(f"LoraConfig.{where}", alpha)


def _entries(name: str, patterns: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}[{key!r}]": value for key, value in patterns[name].items()}


def chosen_layers(model: nn.Module, config: LoraConfig) -> Targets:
    """The linear layers that a configuration means: name → layer, in the model's order.

    `"all-linear"` is that of `find_targets`, for `config.r`, without `exclude_modules`.

    Raises:
        ValueError: if there are none, or something is named that is not a linear layer.
    """
    own: Any = copy.deepcopy(config)
    if own.target_modules is None:
        own.target_modules = LoraModel.target_module_mapping.get(getattr(getattr(model, "config", None), "model_type", ""))
    if own.target_modules is None:
        raise ValueError("the configuration names no target_modules, and PEFT knows none for this kind of model")
    if _is_all_linear(own):
        found = find_targets(model, rank=own.r)
        own.target_modules = list(found)
        return Targets(
            {name: module for name, module in found.items() if check_target_module_exists(own, name)},
            optional=True,
            excluded=[name for name in found if not check_target_module_exists(own, name)],
            left_out=found.left_out,
        )
    with unwrapped(model):
        matched = {name: module for name, module in model.named_modules() if name and check_target_module_exists(own, name)}
    linear = {name: module for name, module in matched.items() if is_linear(module)}
    if not linear:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer of {type(model).__name__}")
    other = next((n for n, m in matched.items() if n not in linear and _has_matrix(m) and not _is_inside(n, linear)), None)
    if other is not None:
        raise ValueError(f"target {other!r} is {type(matched[other]).__name__}, not a linear layer")
    return Targets(linear)


def _has_matrix(module: nn.Module) -> bool:
    return any(len(shape_of(parameter)) > 1 for parameter in module.parameters(recurse=False))


def _is_inside(name: str, layers: Mapping[str, nn.Module]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def rank_of(name: str, config: LoraConfig) -> int:
    """Of a layer's adapter: `rank_pattern`, or r."""
    patterns: Any = config.rank_pattern or {}
    return check_integer(f"the rank of {name!r}", patterns.get(get_pattern_key(patterns.keys(), name), config.r))


def random_seed(method: str) -> int:
    """From PyTorch's generator, for a method that draws numbers: the same after the same `torch.manual_seed`."""
    draws = method in METHODS and METHODS[method].draws  # an unknown one is refused later
    return int(torch.randint(2**62, ())) if draws else 0


def with_spaces(method: str, given: Sources, layers: Mapping[str, LoraLayer], adapter: str) -> Sources:
    """The same with null spaces, if the method asks for them and there are only covariances to find them in."""
    if "spaces" not in METHODS[method].needs or given.spaces is not None:
        return given
    assert given.covariances is not None
    rank = max((layer.r[adapter] for layer in layers.values()), default=1)
    spaces = NullSpaces.from_covariances(given.covariances, rank=rank, progress=False)
    return replace(given, spaces=spaces, covariances=None)


def lora_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """Name in the base model → LoRA layer."""
    base: Any = peft_model.base_model.model
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in (*module.lora_A, *module.lora_embedding_A)
    }


def check_layers(
    layers: Mapping[str, Any], bases: Mapping[str, nn.Module], adapter_name: str, method: str, given: Sources, job: Job
) -> None:
    """Raise `ValueError`, naming the layer, for one that cannot have what it is to start with."""
    job.exchange(None)
    weights = weights_of(bases) if job.count > 1 else {}  # where they are sharded, a collective, and what follows may fail on one
    for name, layer in layers.items():
        _check_layer(name, layer, bases[name], adapter_name, method, given, weights.get(name))


def _check_layer(
    name: str, layer: Any, base: nn.Module, adapter_name: str, method: str, given: Sources, weight: Weight | None
) -> None:
    if not is_linear(base) or adapter_name not in layer.lora_A:
        raise ValueError(f"target {name!r} is {type(base).__name__}, not a linear layer")
    for known in given.of_model():
        known.check(name, base, weight)
    check_rank(method, given, name, base, layer.r[adapter_name])


@torch.no_grad()
def start_of(
    name: str, layer: Any, stored: torch.Tensor, adapter: str, method: str, given: Sources
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an adapter starts with.

    Args:
        name: of the layer, in the base model.
        layer: PEFT's; asked for rank, scaling, layout and dtypes, never for values.
        stored: the weight as the base layer stores it, (d_out, d_in) or the transpose of it (`layer.fan_in_fan_out`).
        adapter: PEFT's name for it.
        method: of `inject_adapters`.
        given: what it needs.

    Returns:
        A (r, d_in) and B (d_out, r) in the adapter's dtypes.

    Raises:
        ValueError, RuntimeError, MemoryError: naming the layer.
    """
    scaling = layer.scaling[adapter]
    dtype_a, dtype_b = (each[adapter].weight.dtype for each in (layer.lora_A, layer.lora_B))
    with _naming(name):
        weight = _exact(layer, stored) if METHODS[method].changes_base else None
        if weight is not None and not bool(weight.isfinite().all()):
            raise ValueError("the weight holds NaN or Inf: load an undamaged model, or leave the layer out of target_modules")
        device = torch.device("cpu") if stored.device.type == "meta" else stored.device
        target = Layer(name, weight, layer.out_features, layer.in_features, layer.r[adapter], device)
        a, b = METHODS[method].start(target, given)
        # s·BA is the product that counts, so where it is not zero each factor takes 1/√s.
        root = 1.0 if weight is None else math.sqrt(scaling)
        a, b = (a / root).to(dtype_a), (b / root).to(dtype_b)
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"A or B holds NaN or Inf in {dtype_a}: check lora_alpha and sigma_scale")
        return a, b


@torch.no_grad()
def residual_of(name: str, layer: Any, stored: torch.Tensor, adapter: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """W₀ − s·BA of the factors as they are stored, rounded once.

    Args:
        name: of the layer, in the base model.
        layer: PEFT's; asked for scaling and layout.
        stored: as in `start_of`.
        adapter: PEFT's name for it.
        a: (r, d_in), as `start_of` returned it.
        b: (d_out, r), likewise.

    Returns:
        A new tensor in the layout and dtype of `stored`.

    Raises:
        ValueError, RuntimeError, MemoryError: naming the layer.
    """
    with _naming(name):
        weight = _exact(layer, stored)
        rest = weight.addmm_(b.to(weight), a.to(weight), alpha=-layer.scaling[adapter]).to(stored.dtype)
        if not bool(rest.isfinite().all()):
            raise ValueError(f"W₀ − s·BA is beyond the range of {stored.dtype}: load the model in another dtype")
        return rest.T if layer.fan_in_fan_out else rest


def _exact(layer: Any, stored: torch.Tensor) -> torch.Tensor:
    """(d_out, d_in) float64, a copy."""
    return (stored.T if layer.fan_in_fan_out else stored).to(torch.float64, copy=True)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of what is computed for a layer name it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        more = "" if isinstance(error, torch.linalg.LinAlgError) else f" (write_init needs less memory: {ONE_AT_A_TIME})"
        raise type(error)(f"layer {name!r}: {error}{more}") from error


def freeze_layers(layers: Mapping[str, LoraLayer], adapter: str, names: tuple[str, ...] = ("lora_A",)) -> None:
    for layer in layers.values():
        # PEFT's own record of what set_adapter must not switch on again; a new dictionary, since the default is the class's.
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: names}
        for name in names:
            getattr(layer, name)[adapter].requires_grad_(False)
