"""`inject_adapters` before training, and `save_init`, which writes what it made."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from nullspace.artifacts import records, store
from nullspace.artifacts import residual as residual_base
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.residual import Change
from nullspace.artifacts.shared_writes import written_once
from nullspace.artifacts.spaces import NullSpaces
from nullspace.distributed import Job
from nullspace.factors import DAMPING
from nullspace.integrations.peft.cards import CARD, name_base, write_card, write_cards
from nullspace.integrations.peft.files import init_record, located, read_adapter, save_adapter
from nullspace.integrations.peft.layers import (
    ONE_AT_A_TIME,
    SUBTRACTED,
    check_layers,
    check_servable,
    freeze_layers,
    lora_layers,
    own_config,
    random_seed,
    residual_of,
    start_of,
    stored_weight,
    with_spaces,
)
from nullspace.integrations.peft.shell import saving_here
from nullspace.integrations.peft.watch import warn_of_dropout, watch
from nullspace.methods import METHODS, Sources, check_method, check_sources
from nullspace.model.linear import weight_of
from nullspace.model.sharded import (
    has_deepspeed_engine,
    is_model_sharded,
    is_tensor_parallel,
    placeholder_weights,
    prepare_to_gather,
)
from nullspace.model.sharded_tensors import is_sharded, local_parts, whole, write
from nullspace.model.wrappers import unwrap, unwrapped
from nullspace.planning.memory import free_on_host

# In the place of the base's name, as nothing that could be loaded.
UNSAVED = "(residual of {}: call save_init)"
# Where PEFT's wrappers keep what they wrap.
WRAPPED = ("base_layer", "original_module", "token_adapter")


def inject_adapters(
    model: nn.Module,
    config: LoraConfig,
    spaces: NullSpaces | None = None,
    *,
    method: str = "lora-null",
    covariances: Covariances | None = None,
    preserve: Covariances | None = None,
    freeze_a: bool = False,
    residual: str = "auto",
    sigma_scale: float = 1.0,
    beta: float = 0.5,
    damping: float = DAMPING,
    adapter_name: str = "default",
) -> PeftModel:
    """Wrap a model in LoRA adapters that start where a method says, the model computing what it computed before.

    With s the adapter's scaling (α/r, or α/√r with rsLoRA) and r its rank (`config.r`, `config.rank_pattern`), the factors are
    those of `nullspace.factors`, and A and B each take 1/√s of them:

    | method | factors | made of | base |
    |---|---|---|---|
    | `"lora-null"` | `lora_null` (arXiv 2503.02659): s·BA = W₀ U Uᵀ, U the null space | `spaces` or `covariances` | W₀ − s·BA |
    | `"b-zero"` | `b_zero`: A = the r quietest directions, B = 0 | `spaces` or `covariances` | W₀ |
    | `"corda-kpm"`, `"corda-ipm"` | `corda` (arXiv 2406.05223) | `covariances` | W₀ − s·BA |
    | `"corda-exact"` | `corda_exact`, kpm: the optimum that CorDA approximates | `covariances` | W₀ − s·BA |
    | `"sc-lora"` | `sc_lora` (arXiv 2505.23724) | `covariances` of the task, `preserve` | W₀ − s·BA |
    | `"milora"`, `"pissa"` | `milora` (arXiv 2406.09044), `pissa` (arXiv 2404.02948) | the weight | W₀ − s·BA |
    | `"eva"` | `eva` (arXiv 2410.07170), all layers of rank r, B = 0 | `covariances` of the task | W₀ |
    | `"orthogonal"` | `orthogonal`: random, B A = 0 | nothing | W₀ |

    Where the base becomes a residual, it is taken from the factors as they are stored and rounded once. With `freeze_a=True` A
    stays as it is (for `"lora-null"` the paper's v2): every update s·(B − B₀)A then stays in the row space of A, whatever training
    does.

    Args:
        model: the base model, on any device; it is changed in place, as `get_peft_model` does. If its weights are spread over the
            processes of the default group (FSDP2's `fully_shard`; ZeRO-3, before `deepspeed.initialize`), all of them have to call
            this: weights are gathered one at a time, and A and B are the same on all. These are ordinary parameters: nobody shards
            them or averages their gradients yet (`fully_shard` their layers; or call `write_init`, and shard what is loaded).
        config: PEFT's. `target_modules` may be None: then every layer of `spaces` or `covariances` gets an adapter, or every linear
            one but the output head. `init_lora_weights` is ignored and saved as True, so that the adapter loads anywhere.
        spaces: null spaces of this very model, with bases of at least r columns.
        method: one of the above.
        covariances: second moments of this very model's inputs (`nullspace.compute_covariances`).
        preserve: the same, of the data that are to be preserved, for `"sc-lora"`.
        freeze_a: train B alone. PEFT does not save this: call `freeze_a` again after loading an adapter to train it on.
        residual: where s·BA is taken away again. `"base"`: from the weight. `"adapter"`: by a second, frozen adapter
            (`{adapter_name}_subtracted`, −B₀A₀), which leaves every weight alone, whether it is quantised, tied or neither, and is
            active beside the first; `attach_subtracted` loads it again, `export_lora` makes one plain adapter of both. `"auto"`:
            the base where it can be changed; otherwise the second adapter, or with `freeze_a` neither: B then starts at zero,
            which trains the same. (Do not merge two adapters into a quantised base, where PEFT rounds the sum to the base's grid
            after each: merge what `export_lora` makes, into a base that is not quantised.)
        sigma_scale: see `nullspace.factors.lora_null`; only for `"lora-null"`.
        beta: see `nullspace.factors.sc_lora`; only for `"sc-lora"`.
        damping: see `nullspace.factors.corda`; only for `"corda-kpm"` and `"corda-ipm"`.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The `PeftModel`. Save it with `save_init`, before training, for the sake of its base: where that is a residual, the adapter
        belongs to it and not to the original one.

    Raises:
        ValueError: naming the layer, for a target that the spaces or covariances do not know, those of another model, a rank that
            is out of reach, a weight that cannot be read or changed (and which method or `residual` would do) or holds NaN or Inf,
            or inputs that give it no start. Of several processes all raise what is wrong on one. For a model that is split by
            tensor parallelism, or in a DeepSpeed engine.
        TypeError: if the config is not a `LoraConfig`, or the model already is a `PeftModel`.
        RuntimeError, MemoryError: naming the layer, if memory runs out.

    On any error, and on `KeyboardInterrupt`, the model is as it was: all starts are computed and checked before the first weight
    changes, and until the last one has changed, what they were is kept in host memory (where that has the room).

    Warns:
        UserWarning: naming layers whose data (`covariances`, `preserve`) span fewer directions than the method needs; for
            `lora_dropout` with a product that does not start at zero. And later, where a residual base computes without its adapter
            (another one alone is active, `disable_adapter()`, `unload()`).
    """
    model = unwrap(model)
    job = Job() if is_model_sharded(model) else Job.alone()
    with job.sharing_errors(), unwrapped(model):
        return _inject(
            model,
            config,
            Sources(spaces, covariances, preserve, sigma_scale, beta, damping, seed=random_seed(method)),
            method=method,
            freeze_a=freeze_a,
            residual=residual,
            adapter_name=adapter_name,
            job=job,
        )


def _inject(
    model: nn.Module,
    config: LoraConfig,
    given: Sources,
    *,
    method: str,
    freeze_a: bool,
    residual: str,
    adapter_name: str,
    job: Job,
) -> PeftModel:
    check_method(method, given)
    check_sources(method, given)
    if has_deepspeed_engine(model):
        raise ValueError(
            f"{type(model).__name__} is in a DeepSpeed engine, whose optimizer would not know the adapters: call inject_adapters "
            "before deepspeed.initialize"
        )
    spread = prepare_to_gather(model, job)
    config = own_config(config, model, given, job)
    if spread and is_tensor_parallel(model):
        raise ValueError(
            f"{type(model).__name__} is split by tensor parallelism, and an adapter beside a part of a layer is not the layer's: "
            "call write_init, which gathers the weights, and load what it writes, or shard the model with fully_shard (FSDP2)"
        )
    if config.use_dora and is_model_sharded(model):
        raise ValueError("use_dora asks for the norms of weights that are spread over several ranks: load the model whole for it")
    with _as_it_was_on_error(model):
        own = {id(p) for p in model.parameters()}
        with placeholder_weights(model):
            peft_model: Any = get_peft_model(model, config, adapter_name=adapter_name)
        _freeze_base(peft_model, own, config)
        layers = lora_layers(peft_model, adapter_name)
        given = with_spaces(method, given, layers, adapter_name)
        bases = {name: layer.get_base_layer() for name, layer in layers.items()}
        check_layers(layers, bases, adapter_name, method, given, job)
        place = check_servable(model, bases, method, residual=residual, freeze_a=freeze_a)
        if place == "adapter" and config.use_dora:
            raise ValueError("DoRA's magnitudes do not add up over two adapters: use_dora needs a base that can be changed")
        if place == "adapter" and config.trainable_token_indices:
            raise ValueError("PEFT saves no second adapter beside trainable_token_indices: they need a base that can be changed")
        for name, layer in layers.items():
            _write_factors(name, layer, adapter_name, method, given, place, job)
        if place == "adapter":
            _subtract(peft_model, config, layers, adapter_name)
        if freeze_a:
            freeze_layers(layers, adapter_name)
        _record(peft_model, model, adapter_name, method, place, given)
        watch(peft_model, adapter_name, place)
        if job.first:
            given.directions.warn(f"method {method!r}", stacklevel=3)
            warn_of_dropout(config, method, place, stacklevel=3)
        job.exchange(None)  # what is wrong on one must be known while all can go back
        if place == "base":
            residual_base.mark(model, method, peft_model.nullspace_model, _take_away(layers, adapter_name, job))
    return peft_model


def attach_subtracted(peft_model: PeftModel, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Load the second adapter of `inject_adapters(..., residual="adapter")` beside the first, frozen and active.

    For training on: `PeftModel.from_pretrained(base, OUT/adapter, is_trainable=True)`, then this with `OUT/subtracted`.

    Args:
        peft_model: with the first adapter loaded.
        directory: `OUT/subtracted`, as `save_init` wrote it.
        adapter_name: of the first adapter.

    Raises:
        FileNotFoundError: if a file of it is missing.
        ValueError: if the model has no LoRA layer with an adapter of that name, or is a residual base; naming the file, if it is
            damaged.
    """
    peft_model = unwrap(peft_model)
    layers = lora_layers(peft_model, adapter_name)
    if not layers:
        raise ValueError(f"the model has no LoRA adapter named {adapter_name!r}")
    mark = residual_base.residual_mark(peft_model.get_base_model())
    if mark is not None:
        raise ValueError(f"the base {residual_base.described(mark)}: load the adapters on the original model")
    read_adapter(Path(directory))  # PEFT would leave an adapter with random factors where it cannot read them
    second = SUBTRACTED.format(adapter_name)
    peft_model.load_adapter(str(directory), adapter_name=second)
    _activate_both(peft_model, layers, adapter_name)


def freeze_a(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Train B alone from now on (LoRA-Null-v2), through `set_adapter` and whatever else PEFT does to `requires_grad`.

    PEFT saves the weights but not which of them were frozen: call this after `PeftModel.from_pretrained(..., is_trainable=True)`.

    Raises:
        ValueError: if the model has no LoRA layer with an adapter of that name, or is in a DeepSpeed engine that trains A.
    """
    layers = lora_layers(unwrap(peft_model), adapter_name)
    if not layers:
        raise ValueError(f"the model has no LoRA adapter named {adapter_name!r}")
    if has_deepspeed_engine(peft_model) and any(layer.lora_A[adapter_name].weight.requires_grad for layer in layers.values()):
        raise ValueError("A is a parameter of a DeepSpeed engine's optimizer already: call freeze_a before deepspeed.initialize")
    freeze_layers(layers, adapter_name)
    if residual_base.residual_mark(peft_model.get_base_model()) is not None:
        watch(peft_model, adapter_name, "base")


def save_init(
    out: str | os.PathLike[str],
    peft_model: PeftModel,
    spaces: NullSpaces | None = None,
    *,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `inject_adapters` made, before it is trained: whole or not at all.

    `OUT/adapter` is a plain PEFT adapter, `OUT/base` the residual model as a plain transformers checkpoint, `OUT/spaces` the null
    spaces, if there are any, `OUT/nullspace.json` the record. Each model folder has a card. Where the base was left alone there is
    no `OUT/base`, and the adapter names the original model; a second adapter that takes the first one's product away is in
    `OUT/subtracted`.

    In a process group, one process may call this, or all of them: then one writes, and the others return when it has.

    Args:
        out: must not exist yet, or be empty.
        peft_model: fresh from `inject_adapters`. Not changed, but that its adapter's configuration names `OUT/base` from now on,
            by its absolute path, and so do the cards that it writes: whatever saves the adapter after training names the base it
            belongs to.
        spaces: what it was made of, to be kept beside it.
        tokenizer: saved beside the base, if given.
        record: JSON-able facts to keep in `nullspace.json`: the model's name, the data, …
        overwrite: replace an earlier directory of ours.

    Raises:
        ValueError: if the model does not come from `inject_adapters`; if its base is spread over several ranks.
        FileExistsError: if `out` is in the way, or another run is writing to it.
        OSError: if it cannot be written; then nothing is left behind. All errors of one process are raised by all that call.
    """
    out, peft_model = Path(out), unwrap(peft_model)
    place = getattr(peft_model, "nullspace_residual", None)
    if is_model_sharded(peft_model):
        raise ValueError("the base is spread over several ranks: call write_init on it instead, before it gets its adapters")
    if place is None:
        raise ValueError("the model does not come from inject_adapters: what its base was before is not known")
    residual = place == "base"
    base: Any = peft_model.get_base_model()
    adapter = peft_model.active_adapter
    config: Any = peft_model.peft_config[adapter]
    original = located(config.base_model_name_or_path)
    place_of_base = os.path.abspath(out / "base") if residual else original
    facts = init_record(base, getattr(base, "name_or_path", None), peft_model.nullspace_method, config, place, spaces, record)

    def write() -> None:
        with store.new_directory(out, overwrite=overwrite) as part, unwrapped(peft_model):
            if spaces is not None:
                spaces.write(part / "spaces")
            config.base_model_name_or_path = place_of_base
            try:
                save_adapter(peft_model, adapter, part / "adapter")
            finally:
                config.base_model_name_or_path = original
            if place == "adapter":
                save_adapter(peft_model, SUBTRACTED.format(adapter), part / "subtracted")
            if residual:
                with saving_here(base):
                    base.save_pretrained(part / "base", state_dict=_base_state(base))
                if tokenizer is not None:
                    tokenizer.save_pretrained(part / "base")
            write_cards(part, facts)
            records.write_manifest(part, "init", facts)

    written_once(out, write)
    config.base_model_name_or_path = place_of_base
    _keep_card(peft_model, facts, place_of_base)
    return out


def _record(peft_model: Any, model: nn.Module, adapter: str, method: str, place: str, given: Sources) -> None:
    """What was made of which model, for `save_init` and for whatever saves the adapter."""
    peft_model.nullspace_residual, peft_model.nullspace_method = place, method
    config = peft_model.peft_config[adapter]
    original = peft_model.nullspace_model = located(config.base_model_name_or_path)
    # A residual base has no name before save_init gives it one, and must not go by that of the model that it was.
    config.base_model_name_or_path = UNSAVED.format(original or "a model without a name") if place == "base" else original
    _keep_card(peft_model, init_record(model, original, method, config, place, given.spaces, None), config.base_model_name_or_path)


def _keep_card(peft_model: PeftModel, facts: Mapping[str, Any], base: str | None) -> None:
    """Let whatever saves the adapter from now on write a card that names its base, and says what that is."""
    write = functools.partial(_card_in_training, peft_model, facts, base)
    peft_model.create_or_update_model_card = write  # type: ignore[method-assign]


def _card_in_training(peft_model: PeftModel, facts: Mapping[str, Any], base: str | None, output_dir: str) -> None:
    """`PeftModel.create_or_update_model_card`, which would name the model that the base was made of."""
    if (Path(output_dir) / CARD).exists():
        type(peft_model).create_or_update_model_card(peft_model, output_dir)
        if base is not None:
            name_base(Path(output_dir), facts, base)
    else:
        write_card(Path(output_dir), "trained", facts, base)


@contextlib.contextmanager
def _as_it_was_on_error(model: nn.Module) -> Iterator[None]:
    """Put back modules, hooks, attributes, flags and the configuration on any error; weights are `_take_away`'s business.

    PEFT's `unload` is not enough: it leaves everything frozen, and copies in place of the modules to be saved whole.
    """
    attributes = [vars(each) for each in (*model.modules(), getattr(model, "config", None)) if hasattr(each, "__dict__")]
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
    """PEFT freezes all that has no "lora_" in its name, which a module of the base may have."""
    for name, parameter in peft_model.named_parameters():
        if id(parameter) in own and parameter.requires_grad and (config.bias == "none" or not name.endswith("bias")):
            parameter.requires_grad_(False)


def _base_state(base: nn.Module) -> dict[str, torch.Tensor]:
    """The base's weights under its own names: what PEFT has added is left out, what it has wrapped is unwrapped."""
    modules = dict(base.named_modules(remove_duplicate=False))
    named = ((_own_name(key, modules), tensor) for key, tensor in base.state_dict().items())
    return {name: tensor for name, tensor in named if name is not None}


def _own_name(key: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of a tensor in the base without adapters; None for a tensor that PEFT has added."""
    path, own = "", []
    for part in key.split("."):
        if not isinstance(modules.get(path), (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            own.append(part)
        elif part not in WRAPPED:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(own)


@torch.no_grad()
def _write_factors(name: str, layer: Any, adapter: str, method: str, given: Sources, place: str, job: Job) -> None:
    """A and B into the adapter. The base stays as it is."""
    stored = weight_of(layer.get_base_layer())
    if METHODS[method].changes_base:
        stored = _stored(layer, job)
    a, b = start_of(name, layer, stored, adapter, method, given)
    job.exchange(None)
    for parameter, factor in ((layer.lora_A[adapter].weight, a), (layer.lora_B[adapter].weight, b)):
        # The first process's: what several have computed alike may differ by rounding, and what they train must not.
        parameter.copy_(factor if job.count == 1 else job.broadcast(factor.contiguous(), 0).to(factor.device))
    if place == "zero":
        layer.lora_B[adapter].weight.zero_()


def _stored(layer: Any, job: Job) -> torch.Tensor:
    """The base layer's weight as it stores it; of a sharded one it is gathered."""
    base = layer.get_base_layer()
    job.exchange(None)  # before weights are gathered, whoever has failed must have told it
    return whole(weight_of(base)) if is_sharded(weight_of(base)) else stored_weight(base)


@torch.no_grad()
def _take_away(layers: Mapping[str, Any], adapter: str, job: Job) -> Change:
    """W₀ − s·BA in place of W₀ in every base layer, or in none; by which of them it shows best."""
    changes = []
    originals = _Originals([weight_of(layer.get_base_layer()) for layer in layers.values()])
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
        return max(changes, key=lambda change: change.ratio)
    except BaseException:
        originals.put_back()
        raise


class _Originals:
    """What weights were before they were changed, in host memory.

    W₀ does not follow from W₀ − s·BA to the bit, so it has to be kept. Where the host has not twice the room for that, nothing is
    kept, and `put_back` warns.

    Args:
        weights: those that are to be changed.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        room, needed = free_on_host(), sum(part.nbytes for weight in weights for part in local_parts(weight))
        self._fits = room is None or 2 * needed <= room
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, weight: torch.Tensor) -> None:
        """Before it is changed."""
        for part in local_parts(weight):
            self._kept.append((part, part.to("cpu", copy=True) if self._fits else part))

    def put_back(self) -> None:
        for part, was in self._kept:
            part.copy_(was)
        if self._kept and not self._fits:
            warnings.warn(
                f"{len(self._kept)} weights of the base are residuals now, and the host's memory was too small to keep what they "
                f"were: load the model again (write_init needs less memory: {ONE_AT_A_TIME})",
                stacklevel=2,
            )


def _subtract(peft_model: PeftModel, config: LoraConfig, layers: Mapping[str, Any], adapter: str) -> None:
    """A second adapter with −B₀ and A₀."""
    second = SUBTRACTED.format(adapter)
    config = copy.deepcopy(config)
    config.lora_dropout, config.bias, config.lora_bias = 0.0, "none", False
    config.modules_to_save = None
    with placeholder_weights(peft_model):
        peft_model.add_adapter(second, config)
    for layer in layers.values():
        with torch.no_grad():
            layer.lora_A[second].weight.copy_(layer.lora_A[adapter].weight)
            layer.lora_B[second].weight.copy_(-layer.lora_B[adapter].weight)
    _activate_both(peft_model, layers, adapter)


def _activate_both(peft_model: PeftModel, layers: Mapping[str, Any], adapter: str) -> None:
    second = SUBTRACTED.format(adapter)
    freeze_layers(layers, second, ("lora_A", "lora_B"))
    set_adapter = functools.partial(_set_adapter, peft_model)
    peft_model.set_adapter = set_adapter  # type: ignore[method-assign]
    set_adapter(adapter)
    watch(peft_model, adapter, "adapter")


def _set_adapter(peft_model: PeftModel, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.set_adapter`, but an adapter never goes without the one that subtracts what it starts with.

    transformers' Trainer calls this when it goes on from a checkpoint, with the name of the first active adapter.
    """
    type(peft_model).set_adapter(peft_model, adapter_name, *args, **kwargs)
    second = SUBTRACTED.format(adapter_name)
    if second in peft_model.peft_config:
        tuner: Any = peft_model.base_model
        tuner.set_adapter([adapter_name, second], *args, **kwargs)
