"""`inject_adapters`: adapters into a model in memory, whose base becomes a residual; or nothing, on any error."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from nullspace.artifacts import residual as residual_base
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.residual import Change
from nullspace.artifacts.spaces import NullSpaces
from nullspace.distributed import Job
from nullspace.errors import InputError, InputTypeError, ResourceUseWarning
from nullspace.factors import DAMPING, SHARE
from nullspace.integrations.peft.budget import patterns_of_parameters, within_budget
from nullspace.integrations.peft.experts.checks import refuse_sharded_experts, warn_of_two
from nullspace.integrations.peft.layers import (
    ONE_AT_A_TIME,
    check_layers,
    check_servable,
    freeze_layers,
    lora_layers,
    stored_weight,
    zero_factor,
)
from nullspace.integrations.peft.save import record_init
from nullspace.integrations.peft.start import random_seed, residual_of, start_of, with_spaces
from nullspace.integrations.peft.subtracted import refuse_settings, subtract
from nullspace.integrations.peft.targets import own_config
from nullspace.integrations.peft.watch import warn_of_dropout, watch
from nullspace.methods import METHODS, Sources, check_method, check_sources, frozen_factor
from nullspace.model.linear import weight_of
from nullspace.model.sharded import (
    has_deepspeed_engine,
    is_model_sharded,
    is_tensor_parallel,
    placeholder_weights,
    prepare_to_gather,
)
from nullspace.model.sharded_tensors import local_parts, write
from nullspace.model.wrappers import unwrap, unwrapped
from nullspace.planning.memory import free_on_host


def inject_adapters(
    model: nn.Module,
    config: LoraConfig,
    spaces: NullSpaces | None = None,
    *,
    method: str = "lora-null",
    covariances: Covariances | None = None,
    preserve: Covariances | None = None,
    freeze_a: bool | None = None,
    freeze_b: bool | None = None,
    residual: str = "auto",
    sigma_scale: float = 1.0,
    beta: float = 0.5,
    damping: float = DAMPING,
    share: float = SHARE,
    split: float = 1.0,
    window: float | None = None,
    rank_budget: int | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Add LoRA adapters that a method initialises. The model's outputs stay what they were.

    With s the adapter's scaling (α/r, or α/√r with rsLoRA) and r its rank (`config.r`, `config.rank_pattern`), the factors are
    those of `nullspace.factors`, and A and B each take 1/√s of them where B A is not zero:

    | method | factors | made of | base |
    |---|---|---|---|
    | `"lora-null"` | `lora_null` (arXiv 2503.02659): s·BA = W₀ U Uᵀ, U the null space | `spaces` or `covariances` | W₀ − s·BA |
    | `"b-zero"` | `b_zero`: A = the r directions of the smallest inputs, B = 0 | `spaces` or `covariances` | W₀ |
    | `"contrast"` | `contrast`: A = directions of the task, not of `preserve`; B = 0 | `covariances` of the task, `preserve` | W₀ |
    | `"inflora"` | `inflora` (arXiv 2404.00228): as `"contrast"`, A orthogonal to the inputs of `preserve`; B = 0 | the same | W₀ |
    | `"corda-kpm"`, `"corda-ipm"` | `corda` (arXiv 2406.05223) | `covariances` | W₀ − s·BA |
    | `"corda-exact"` | `corda_exact`, kpm: the optimum that CorDA approximates | `covariances` | W₀ − s·BA |
    | `"astra"` | `astra` (arXiv 2602.19111) | `covariances` of the task | W₀ − s·BA |
    | `"sc-lora"` | `sc_lora` (arXiv 2505.23724) | `covariances` of the task, `preserve` | W₀ − s·BA |
    | `"milora"`, `"pissa"` | `milora` (arXiv 2406.09044), `pissa` (arXiv 2404.02948) | the weight | W₀ − s·BA |
    | `"olora-tail"` | `olora_tail` (arXiv 2606.02437) | the weight | W₀ − s·BA |
    | `"mica"` | `mica` (arXiv 2604.01694): B = the smallest left singular vectors, frozen; A = 0 | the weight | W₀ |
    | `"mica-data"` | `mica_data`: B = the directions of the smallest outputs, frozen; A = 0 | the weight, `covariances` | W₀ |
    | `"eva"` | `eva` (arXiv 2410.07170), all layers of rank r, B = 0 | `covariances` of the task | W₀ |
    | `"orthogonal"` | `orthogonal`: random, B A = 0 | nothing | W₀ |

    A residual base is computed from the factors as they are stored, and rounded once.

    With `freeze_a=True` A does not change (for `"lora-null"` the paper's v2): every update stays in the row space of A. For all
    methods B then starts at zero on the untouched base: as (W₀ − s·B₀A) + s·BA = W₀ + s·(B − B₀)A, B and B − B₀ have the same
    gradients, and training takes the same steps. Decoupled weight decay differs: here it draws the update to zero; on a residual
    base it draws B to zero, and so takes s·B₀A out of the model. With `freeze_b=True` the factors change places: every update stays
    in the column space of B, and A starts at zero.

    Args:
        model: the base model, on any device; it is changed in place, as `get_peft_model` does. If it is sharded over the processes
            of the default group (FSDP2's `fully_shard`; ZeRO-3, before `deepspeed.initialize`), all of them have to call this:
            weights are gathered one at a time, and A and B are the same on all. These are ordinary parameters, not sharded,
            and their gradients are not averaged (`fully_shard` their layers; or call `write_init`, and shard the loaded model).
        config: PEFT's. `target_modules` may be None: then every layer of `spaces` or `covariances` gets an adapter, or every linear
            one but the output head. `init_lora_weights` is ignored and saved as True, so that the adapter loads anywhere. Experts
            that are one tensor are layers by themselves (`….experts.gate_up_proj[17]`); all experts of a parameter get an adapter,
            or none. `target_parameters` names such parameters, and is filled in where `target_modules` is None or `"all-linear"`,
            from which `exclude_modules` takes away.
        spaces: null spaces of this very model, with bases of at least r columns.
        method: one of the above.
        covariances: second moments of this very model's inputs (`nullspace.compute_covariances`).
        preserve: the same, of the data that are to be preserved, for `"contrast"`, `"inflora"` and `"sc-lora"`.
        freeze_a: train B alone; by default for `"contrast"` and `"inflora"`, and for no other method. The adapter's configuration
            records it, but PEFT does not act on that: call `freeze_a` after loading an adapter to train it on.
        freeze_b: train A alone; by default for `"mica"` and `"mica-data"`, and for no other method. The same holds with `freeze_b`.
        residual: what subtracts s·BA again. `"base"`: the weight. `"adapter"`: a second, frozen adapter
            (`{adapter_name}_subtracted`, −B₀A₀), which leaves all weights as they are, quantised or tied ones too, and is active
            beside the first; `attach_subtracted` loads it again, `export_lora` makes one plain adapter of both. `"auto"`: neither
            with `freeze_a` or `freeze_b`, as B or A starts at zero; otherwise the base where it can be changed, else the second
            adapter. (Do not merge two adapters into a quantised base, where PEFT rounds the sum to the base's grid after each:
            merge what `export_lora` makes, into a base that is not quantised. With two active adapters of experts, PEFT computes
            the changes of all experts of a parameter at every call.)
        sigma_scale: see `nullspace.factors.lora_null`; only for `"lora-null"`.
        beta: see `nullspace.factors.sc_lora`; only for `"sc-lora"`.
        damping: see `nullspace.factors.corda` and `nullspace.factors.contrast`; only for `"corda-kpm"`, `"corda-ipm"` (≥ 0) and
            `"contrast"` (> 0).
        share: see `nullspace.factors.inflora`; only for `"inflora"`.
        split: A takes `split` times its share of the product and B 1 / `split` of its own, which leaves B A as it is; for methods
            whose product is not zero. With a larger one, steps of A move B A less, relative to those of B: with Adam, whose steps
            do not depend on the size of a factor, the relative change of A a step falls by `split`, and that of B rises by it.
        window: which singular triples are taken, between 0 (the largest) and 1 (the smallest): see `nullspace.factors.skipped`; for
            `"milora"`, `"corda-exact"` (1 by default) and `"astra"` (0).
        rank_budget: a rank, at most `config.r`. Layers then get ranks of their own, from 1 to `config.r` (to that of `rank_pattern`
            for them, or to what their weight or null space has), that together train at most as many parameters as this rank in
            every layer, and are worth most in the method's objective (`nullspace.factors.allocated`): never less than uniform
            ranks. They become `rank_pattern`, and `alpha_pattern` with the scaling s that the configuration gives each layer. A
            null space of more columns is cut to the layer's rank first. Not for `"orthogonal"`, nor with a window.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The `PeftModel`. Save it with `save_init` before training: if the base is a residual, the adapter belongs to it and not to
        the original model.

    Raises:
        ValueError: naming the option, for what PEFT has not for experts (`lora_dropout`, DoRA, `lora_bias`, …), and the parameter,
            if only some of its experts are wanted; naming the layer, for a target that the spaces or covariances do not have,
            those of another model, a rank that is too large, a weight that cannot be read or changed (with the method or
            `residual` to use) or holds NaN or Inf, or inputs from which the method cannot start. An error on one process is raised
            on all. For a model that is split by tensor parallelism, or in a DeepSpeed engine.
        TypeError: if the config is not a `LoraConfig`, or the model already is a `PeftModel`.
        RuntimeError, MemoryError: naming the layer, if memory runs out.

    On any error, and on `KeyboardInterrupt`, the model is as it was: all factors are computed and checked before the first weight
    changes, and the original weights are kept in host memory, if there is room, until the last one has changed.

    Warns:
        UserWarning: naming layers whose data (`covariances`, `preserve`) span fewer directions than the method needs; for
            `lora_dropout` with a product that does not start at zero. And later, where a residual base computes without its adapter
            (another one alone is active, `disable_adapter()`, `unload()`).
    """
    model = unwrap(model)
    job = Job() if is_model_sharded(model) else Job.alone()
    given = Sources(spaces, covariances, preserve, sigma_scale, beta, damping, share, split, window, random_seed(method))
    with job.sharing_errors(), unwrapped(model):
        check_method(method, given)
        check_sources(method, given)
        frozen = frozen_factor(method, freeze_a, freeze_b)
        check_adapter_name(adapter_name)
        check_model(model, config, job)
        own = own_config(config, model, given, job)
        budget: dict[str, Any] = {"rank_budget": rank_budget, "frozen": frozen, "residual": residual}
        own, given = within_budget(own, model, given, method, **budget, job=job)
        return adapt(model, own, given, method=method, frozen=frozen, residual=residual, adapter_name=adapter_name, job=job)


def check_adapter_name(name: str) -> None:
    """Raise `TypeError` or `ValueError` for what PyTorch does not take as the name of a module."""
    if not isinstance(name, str):
        raise InputTypeError(f"adapter_name must be a string, not {type(name).__name__}")
    if not name or "." in name:
        raise InputError(f"adapter_name must be the name of a module, without dots, not {name!r}")


def check_model(model: nn.Module, config: LoraConfig, job: Job) -> None:
    """Raise `ValueError` for a model that is in a DeepSpeed engine, or split by tensor parallelism, and for DoRA of a sharded one.

    Collective, if the model is sharded.
    """
    if has_deepspeed_engine(model):
        raise InputError(
            f"{type(model).__name__} is in a DeepSpeed engine, whose optimizer would not know the adapters: call inject_adapters "
            "before deepspeed.initialize"
        )
    if prepare_to_gather(model, job) and is_tensor_parallel(model):
        raise InputError(
            f"{type(model).__name__} is split by tensor parallelism, and an adapter beside a part of a layer is not the layer's: "
            "call write_init, which gathers the weights, and load what it writes, or shard the model with fully_shard (FSDP2)"
        )
    if getattr(config, "use_dora", False) and is_model_sharded(model):
        raise InputError("use_dora asks for the norms of weights that are spread over several ranks: load the model whole for it")


def adapt(
    model: nn.Module,
    config: LoraConfig,
    given: Sources,
    *,
    method: str,
    frozen: str | None,
    residual: str,
    adapter_name: str,
    job: Job,
) -> PeftModel:
    """`inject_adapters` with a configuration of `exact_config`, and sources that were checked."""
    with as_it_was_on_error(model):
        own = {id(p) for p in model.parameters()}
        with placeholder_weights(model), patterns_of_parameters():
            peft_model: Any = get_peft_model(model, config, adapter_name=adapter_name)
        _freeze_base(peft_model, own, config)
        start_adapter(peft_model, adapter_name, given, method=method, frozen=frozen, residual=residual, job=job)
    return peft_model


def start_adapter(
    peft_model: PeftModel, adapter_name: str, given: Sources, *, method: str, frozen: str | None, residual: str, job: Job
) -> None:
    """Write A and B of a method into an adapter that PEFT has made, and what subtracts their product.

    Inside `as_it_was_on_error`: weights of the base are restored on an error, A and B are not.

    Args:
        peft_model: with the adapter, whose product is zero.
        adapter_name: PEFT's name for it.
        given: checked sources.
        method, residual: as in `inject_adapters`.
        frozen: as `frozen_factor` returns it.
        job: the processes that share the weights.
    """
    model: Any = peft_model.get_base_model()
    config: Any = peft_model.peft_config[adapter_name]
    layers = lora_layers(peft_model, adapter_name)
    given = with_spaces(method, given, max((layer.r[adapter_name] for layer in layers.values()), default=1))
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    refuse_sharded_experts(bases)
    check_layers(bases, {name: layer.r[adapter_name] for name, layer in layers.items()}, method, given, job)
    residual = check_servable(model, bases, method, residual=residual, freeze_a=frozen == "A", freeze_b=frozen == "B")
    refuse_settings(config, residual, frozen)
    for name, layer in layers.items():
        _write_factors(name, layer, adapter_name, method, given, job, zero=zero_factor(residual, frozen))
    if residual == "adapter":
        subtract(peft_model, config, layers, adapter_name)
    if frozen:
        freeze_layers(layers, adapter_name, frozen)
    job.exchange(None)  # as in `_stored`: what follows gathers
    record_init(peft_model, model, adapter_name, method, residual, given)
    watch(peft_model, adapter_name, residual)
    if job.first:
        given.directions.warn(f"method {method!r}", stacklevel=4)
        warn_of_dropout(config, method, residual, stacklevel=4)
        if residual == "adapter":
            warn_of_two(bases, stacklevel=4)
    job.exchange(None)  # an error on any rank must be known while all can still restore the model
    if residual == "base":
        residual_base.mark(model, method, peft_model.nullspace_model, _subtract(layers, adapter_name, job))


@contextlib.contextmanager
def as_it_was_on_error(model: nn.Module, *others: object) -> Iterator[None]:
    """Context manager: restores modules, hooks, attributes, flags and the configuration on any error. Weights: see `_subtract`.

    PEFT's `unload` is not enough: it leaves everything frozen, and copies in place of the modules to be saved whole.

    Args:
        model: with all its modules.
        others: further objects whose attributes are restored.
    """
    objects = (*model.modules(), getattr(model, "config", None), *others)
    attributes = [vars(each) for each in objects if hasattr(each, "__dict__")]
    before = [
        {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in own.items()} for own in attributes
    ]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for own, was in zip(attributes, before, strict=True):
            own.clear()
            for name, (value, content) in was.items():
                if content is not None:  # in place, since the handles of hooks refer to their dictionary
                    value.clear()
                    value.update(content)
                own[name] = value
        for parameter, flag in trainable:
            parameter.requires_grad = flag
        raise


def _freeze_base(peft_model: PeftModel, own: set[int], config: LoraConfig) -> None:
    """Freeze the base. PEFT leaves parameters trainable that have "lora_" in their names, as a module of the base may have."""
    for name, parameter in peft_model.named_parameters():
        if id(parameter) in own and parameter.requires_grad and (config.bias == "none" or not name.endswith("bias")):
            parameter.requires_grad_(False)


@torch.no_grad()
def _write_factors(name: str, layer: Any, adapter: str, method: str, given: Sources, job: Job, *, zero: str | None) -> None:
    """Compute and write A and B; `zero` is the one that starts at zero. The base does not change."""
    stored = weight_of(layer.get_base_layer())
    if METHODS[method].reads_weight:
        stored = _stored(layer, job)
    a, b = start_of(name, layer, stored, adapter, method, given)
    job.exchange(None)
    for parameter, factor in ((layer.lora_A[adapter].weight, a), (layer.lora_B[adapter].weight, b)):
        # Those of the first process: the results of several may differ by rounding, and adapters must not.
        parameter.copy_(factor if job.count == 1 else job.broadcast(factor.contiguous(), 0).to(factor.device))
    if zero:
        getattr(layer, f"lora_{zero}")[adapter].weight.zero_()


def _stored(layer: Any, job: Job) -> torch.Tensor:
    """The base layer's weight as it stores it; of a sharded one it is gathered."""
    base = layer.get_base_layer()
    job.exchange(None)  # an error on any rank must be known before the others wait for it in a gather
    return stored_weight(base)


@torch.no_grad()
def _subtract(layers: Mapping[str, Any], adapter: str, job: Job) -> Change:
    """Replace W₀ by W₀ − s·BA in every base layer, or in none. Returns the clearest change, for the mark."""
    changes = []
    originals = Originals([weight_of(layer.get_base_layer()) for layer in layers.values()])
    try:
        for name, layer in layers.items():
            weight = weight_of(layer.get_base_layer())
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            stored = _stored(layer, job)
            residual = residual_of(name, layer, stored, adapter, a, b)
            changes.append(residual_base.change_of(name, stored, residual))
            originals.keep(weight)
            job.exchange(None)
            write(weight, residual)
        job.exchange(None)
        return residual_base.clearest(changes)
    except BaseException:
        originals.put_back()
        raise


class Originals:
    """The original weights, in host memory, to restore them on an error.

    W₀ cannot be recomputed from W₀ − s·BA to the bit, so it is kept. If the host has less than twice the memory for that, nothing
    is kept, and `put_back` warns.

    Args:
        weights: that are to be changed.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        room, needed = free_on_host(), sum(part.nbytes for weight in weights for part in local_parts(weight))
        self._fits = room is None or 2 * needed <= room
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, weight: torch.Tensor) -> None:
        """Call it before the weight is changed."""
        for part in local_parts(weight):
            self._kept.append((part, part.to("cpu", copy=True) if self._fits else part))

    def put_back(self) -> None:
        for part, was in self._kept:
            part.copy_(was)
        if self._kept and not self._fits:
            warnings.warn(
                f"{len(self._kept)} weights of the base are residuals now, and the host's memory was too small to keep what they "
                f"were: load the model again (write_init needs less memory: {ONE_AT_A_TIME})",
                ResourceUseWarning,
                stacklevel=2,
            )
