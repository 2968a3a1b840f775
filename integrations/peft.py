"""Null spaces into PEFT: `inject_adapters` or `write_init` before training, `export_lora` after it.

PEFT has no register of initialisers, so the factors are written after PEFT has made its layers. What is saved is plain PEFT: it
loads in a process that has never heard of nullspace.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from nullspace import factors, store
from nullspace.progress import Progress, reporter
from nullspace.sites import is_linear, weight_of
from nullspace.spaces import NullSpace, NullSpaces
from nullspace.weights import execution_device, tensor_of

METHODS = ("lora-null", "b-zero")
RESIDUAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_WEIGHTS = "model{suffix}.safetensors"
# What `save_pretrained` puts into one file at the most, by default.
SHARD_BYTES = 50 * 10**9


def inject_adapters(
    model: nn.Module,
    config: LoraConfig,
    spaces: NullSpaces,
    *,
    method: str = "lora-null",
    freeze_a: bool = False,
    sigma_scale: float = 1.0,
    adapter_name: str = "default",
) -> PeftModel:
    """Wrap a model in LoRA adapters that start in the null spaces of its own activations.

    With s the adapter's scaling (α/r, or α/√r with rsLoRA) and r its rank (`config.r`, `config.rank_pattern`):

    - `"lora-null"` (arXiv 2503.02659, eq. 8–11): s·BA = W₀ U Uᵀ (its best rank-r part if the basis has more than r columns), and
      the base weight becomes the residual W₀ − s·BA, taken from the factors as they are stored and rounded once. The model computes
      what it computed before. `freeze_a=True` is the paper's v2: A stays as it is, so every update s·(B − B₀)A stays in the
      null space, whatever training does.
    - `"b-zero"`: A = the r quietest directions, B = 0; the base weight is left alone.

    Args:
        model: the base model, on any device; it is changed in place, as `get_peft_model` does.
        config: PEFT's. `target_modules` may be None: then every layer that has a null space gets an adapter.
            `init_lora_weights` is ignored and saved as True, so that the adapter loads anywhere.
        spaces: of this very model, with bases of at least r columns.
        method: one of the above.
        freeze_a: train B alone. PEFT does not save this: call `freeze_a` again after loading an adapter to train it on.
        sigma_scale: see `nullspace.factors.lora_null`; only for `"lora-null"`.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The `PeftModel`. Save it with `save_init`, before training, for the sake of its base: with `"lora-null"` the adapter
        belongs to the residual base, not to the original one.

    Raises:
        ValueError: naming the layer, for a target without a null space, spaces of another model, a rank that a basis does not
            have, or a base weight that cannot take the residual (quantised, sharded, offloaded, or tied to another layer). The
            model is then as it was.
        TypeError: if the config is not a `LoraConfig`, or the model already is a `PeftModel`.
    """
    check_method(method, sigma_scale)
    config = _own_config(config, model, spaces)
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    try:
        layers = _lora_layers(peft_model, adapter_name)
        for name, layer in layers.items():
            _check_layer(name, layer, layer.get_base_layer(), adapter_name, spaces)
        check_servable(model, {name: layer.get_base_layer() for name, layer in layers.items()}, method)
    except Exception:
        peft_model.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        raise
    for name, layer in layers.items():
        _write_factors(layer, adapter_name, spaces[name], method, sigma_scale)
    if freeze_a:
        _freeze(layers, adapter_name)
    return peft_model


def freeze_a(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Train B alone from now on (LoRA-Null-v2), through `set_adapter` and whatever else PEFT does to `requires_grad`.

    PEFT saves the weights but not which of them were frozen: call this after `PeftModel.from_pretrained(..., is_trainable=True)`.

    Raises:
        ValueError: if the model has no LoRA layer with an adapter of that name.
    """
    layers = _lora_layers(peft_model, adapter_name)
    if not layers:
        raise ValueError(f"the model has no LoRA adapter named {adapter_name!r}")
    _freeze(layers, adapter_name)


def save_init(
    out: str | os.PathLike[str],
    peft_model: PeftModel,
    spaces: NullSpaces,
    *,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `inject_adapters` made, before it is trained: whole or not at all.

    `OUT/adapter` is a plain PEFT adapter, `OUT/base` the residual model as a plain transformers checkpoint, `OUT/spaces` the null
    spaces, `OUT/nullspace.json` the record. Where the base was left alone (`"b-zero"`) there is no `OUT/base`, and the adapter
    names the original model.

    Args:
        out: must not exist yet, or be empty.
        peft_model: fresh from `inject_adapters`; not changed.
        spaces: what it was made of.
        tokenizer: saved beside the base, if given.
        record: JSON-able facts to keep in `nullspace.json`: the model's name, the data, …
        overwrite: replace an earlier directory of ours.

    Raises:
        FileExistsError: if `out` is in the way.
        OSError: if it cannot be written; then nothing is left behind.
    """
    out = Path(out)
    base: Any = peft_model.get_base_model()
    adapter = peft_model.active_adapter
    residual = any(bool(weight_of(layer.lora_B[adapter]).any()) for layer in _lora_layers(peft_model, adapter).values())
    config = peft_model.peft_config[adapter]
    with store.new_directory(out, overwrite=overwrite) as part:
        spaces.write(part / "spaces")
        original = config.base_model_name_or_path
        if residual:
            config.base_model_name_or_path = str(out / "base")
        try:
            _save_adapter(peft_model, adapter, part / "adapter")
        finally:
            config.base_model_name_or_path = original
        if residual:
            weights = {
                name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items() if ".lora_" not in name
            }
            base.save_pretrained(part / "base", state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(part / "base")
        store.write_manifest(part, "init", {"model": original, **(record or {})})
    return out


def write_init(
    out: str | os.PathLike[str],
    model: nn.Module,
    config: LoraConfig,
    spaces: NullSpaces,
    *,
    method: str = "lora-null",
    sigma_scale: float = 1.0,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool | Progress = True,
) -> Path:
    """`inject_adapters` and `save_init` in one, tensor by tensor: the model is left alone, and may be offloaded to the disk.

    What is written is the same to the bit. In memory is one weight at a time, in its own dtype and once in float64. (Of a model
    whose checkpoint holds weights in another form than the model does, such as fused experts, all residuals at once.)

    Args:
        out: as in `save_init`: a directory that must not exist yet, or be empty.
        model: transformers' base model, on any device, or with weights that accelerate keeps on the disk
            (`nullspace.integrations.transformers.load_model(..., offload=True)`).
        config: as in `inject_adapters`.
        spaces: as in `inject_adapters`.
        method: as in `inject_adapters`.
        sigma_scale: as in `inject_adapters`.
        tokenizer: saved beside the base, if given.
        record: JSON-able facts to keep in `nullspace.json`.
        overwrite: replace an earlier directory of ours.
        max_shard_bytes: of one file of the base's weights; a larger tensor gets a file of its own.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).

    Raises:
        ValueError: as `inject_adapters`, before anything is written; and naming the tensor, if the model is offloaded and its
            checkpoint holds weights in another form than the model does (fused experts): load it whole; or if the configuration
            makes PEFT save more than A and B: use `inject_adapters` and `save_init`.
        TypeError: as `inject_adapters`; and if the model has no `save_pretrained`.
        FileExistsError: if `out` is in the way.
        OSError: if it cannot be written; then nothing is left behind.
    """
    out = Path(out)
    check_method(method, sigma_scale)
    config = _own_config(config, model, spaces)
    store.check_free(out, overwrite=overwrite)
    residual = method != "b-zero"
    report = reporter(progress)
    with tempfile.TemporaryDirectory() as folder:
        plans = Path(folder)
        shell = _without_weights(model)
        base = _plan_base(shell, plans / "base", strict=_on_disk(model)) if residual else None
        with torch.random.fork_rng(devices=[]):  # PEFT draws numbers that nobody will see
            peft_model = get_peft_model(shell, config)
        adapter = peft_model.active_adapter
        layers = _lora_layers(peft_model, adapter)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, layer in layers.items():
            _check_layer(name, layer, modules[name], adapter, spaces)
        check_servable(model, {name: modules[name] for name in layers}, method, offloaded=True)
        if base is not None:
            _check_base(model, base, layers)
        original = config.base_model_name_or_path
        if residual:
            config.base_model_name_or_path = str(out / "base")
        of_adapter = _plan_adapter(peft_model, adapter, layers, plans / "adapter")
        done = 0

        def adapt(name: str) -> torch.Tensor | None:
            nonlocal done
            report("adapters", done, len(layers), 0)
            stored = tensor_of(modules[name], "weight") if residual else weight_of(modules[name])
            a, b, rest = _factors(layers[name], stored, adapter, spaces[name], method, sigma_scale)
            adapter_file.write(of_adapter.keys[name, "lora_A"], a)
            adapter_file.write(of_adapter.keys[name, "lora_B"], b)
            done += 1
            return rest

        with store.new_directory(out, overwrite=overwrite) as part:
            spaces.write(part / "spaces")
            shutil.copytree(plans, part, dirs_exist_ok=True)
            with store.TensorFile(part / "adapter" / ADAPTER_WEIGHTS, of_adapter.tensors, of_adapter.metadata) as adapter_file:
                if base is None:
                    rests = {f"{name}.weight": adapt(name) for name in layers}
                    if residual:
                        shell.save_pretrained(
                            part / "base", state_dict={**model.state_dict(), **rests}, max_shard_size=max_shard_bytes
                        )
                else:
                    _write_base(part / "base", model, base, {f"{name}.weight": name for name in layers}, adapt, max_shard_bytes)
            if residual and tokenizer is not None:
                tokenizer.save_pretrained(part / "base")
            store.write_manifest(part, "init", {"model": original, **(record or {})})
        report("adapters", done, len(layers), 0)
    return out


class _BasePlan(NamedTuple):
    """What `save_pretrained` would write: every tensor under its name in the checkpoint, in the checkpoint's order."""

    names: dict[str, str]
    """In the checkpoint → in the model."""
    tensors: dict[str, torch.Tensor]
    """Name in the checkpoint → tensor on the meta device."""
    metadata: dict[str, str]
    total_parameters: int


class _AdapterPlan(NamedTuple):
    """What PEFT would write."""

    keys: dict[tuple[str, str], str]
    """(layer, "lora_A" or "lora_B") → name in the file."""
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def _on_disk(model: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in model.parameters())


def _without_weights(model: nn.Module) -> Any:
    """A copy of a model with its weights on the meta device and without accelerate's hooks: for transformers and PEFT to handle.

    Quantised weights and integers, which PEFT may look into, are the model's own: nobody writes to them.
    """
    memo: dict[int, Any] = {}
    twins: dict[Any, torch.Tensor] = {}
    for module in model.modules():
        if "_hf_hook" in module.__dict__:
            memo[id(module._hf_hook)] = None
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is None:
                continue
            if type(t) not in (nn.Parameter, torch.Tensor) or not t.is_floating_point():
                memo[id(t)] = t
                continue
            place = None if t.device.type == "meta" or t.numel() == 0 else (t.device, t.data_ptr(), t.shape, t.stride())
            empty = torch.empty(t.shape, dtype=t.dtype, device="meta")
            if isinstance(t, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=t.requires_grad)
            memo[id(t)] = twins.setdefault(place or id(t), empty)
    shell = copy.deepcopy(model, memo)
    for module in shell.modules():
        if module.__dict__.pop("_old_forward", None) is not None:
            module.__dict__.pop("forward", None)
        for name in ("_hf_hook", "hf_device_map", "to", "cuda"):
            module.__dict__.pop(name, None)
    return shell


def _plan_base(shell: Any, folder: Path, *, strict: bool = True) -> _BasePlan | None:
    """Let transformers save tiny stand-ins, to see which names and which order it gives to what.

    All that it does to a state dict is seen so: tied weights, names that differ between model and checkpoint, what is left out.
    A stand-in has two entries along every axis, all different: whatever is joined, divided or turned does not come out as it went
    in. What else `save_pretrained` writes (the configurations) stays in the folder.

    Returns:
        None if the weights are not saved one by one as they are, unless `strict`.

    Raises:
        ValueError: the same, if `strict`.
        TypeError: if the model has no `save_pretrained`.
    """
    if not hasattr(shell, "save_pretrained"):
        raise TypeError(f"{type(shell).__name__} is not a transformers model: it has no save_pretrained")
    known = dict((*shell.named_parameters(remove_duplicate=False), *shell.named_buffers(remove_duplicate=False)))
    names = {name: known[name] for name in shell.state_dict() if name in known}
    stand_ins: dict[str, torch.Tensor] = {}
    of: dict[int, torch.Tensor] = {}  # tied weights have one stand-in
    owners: dict[int, str] = {}  # by the first entry
    first = 0
    for name, t in names.items():
        if id(t) not in of:
            owners[first] = name
            of[id(t)] = torch.arange(first, first + 2**t.ndim).reshape((2,) * t.ndim)
            first += 2**t.ndim
        stand_ins[name] = of[id(t)]
    try:
        with _without_bars():
            shell.save_pretrained(folder, state_dict=dict(stand_ins), max_shard_size=1)
        plan = _read_plan(folder, stand_ins, owners, names)
        problem: Exception | None = None
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # whatever a conversion trips over
        problem = error
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    if problem is None:
        return plan._replace(total_parameters=sum({id(p): p.numel() for p in shell.parameters()}.values()))
    if strict:
        raise ValueError(f"{type(shell).__name__} has no weights that could be saved one by one ({problem}): {_WHOLE}") from problem
    return None


def _read_plan(
    folder: Path, stand_ins: Mapping[str, torch.Tensor], owners: Mapping[int, str], known: Mapping[str, torch.Tensor]
) -> _BasePlan:
    names: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for path in sorted(folder.glob(BASE_WEIGHTS.format(suffix="*"))):  # one a tensor, numbered
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                found = file.get_tensor(key)
                owner = owners.get(int(found.reshape(-1)[0]))
                if owner is None or not torch.equal(found, stand_ins[owner]):
                    raise ValueError(f"{key!r} is made of several, or of a part of one")
                names[key] = owner
    return _BasePlan(names, {key: known[name] for key, name in names.items()}, metadata, 0)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


_WHOLE = "load the model whole"


def _check_base(model: nn.Module, plan: _BasePlan, layers: Iterable[str]) -> None:
    lost = {f"{name}.weight" for name in layers}.difference(plan.names.values())
    if lost:
        raise ValueError(f"{min(lost)!r} is not saved with {type(model).__name__}, so it cannot become a residual")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in plan.names.values():
        module, _, tensor = name.rpartition(".")
        if getattr(modules[module], tensor).device.type == "meta" and execution_device(modules[module]) is None:
            raise ValueError(f"{name!r} is on the meta device: its values were never loaded")


def _plan_adapter(peft_model: PeftModel, adapter: str, layers: Mapping[str, LoraLayer], folder: Path) -> _AdapterPlan:
    """Let PEFT save stand-ins, to see under which names it saves what; its configuration and model card stay in the folder."""
    state = peft_model.state_dict()
    wanted: dict[str, tuple[str, str]] = {}
    for name in layers:
        for part in ("lora_A", "lora_B"):
            wanted[f"base_model.model.{name}.{part}.{adapter}.weight"] = (name, part)
    order = list(state)
    _save_adapter(peft_model, adapter, folder, {name: torch.tensor([index]) for index, name in enumerate(order)})
    keys: dict[tuple[str, str], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    path = folder / ADAPTER_WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118
            origin = order[int(file.get_tensor(key))]
            if origin not in wanted:
                raise ValueError(
                    f"with this LoraConfig PEFT saves {key!r}, which is neither an A nor a B: use inject_adapters and save_init"
                )
            keys[wanted[origin]], tensors[key] = key, state[origin]
    path.unlink()
    return _AdapterPlan(keys, tensors, metadata)


def _write_base(
    folder: Path,
    model: nn.Module,
    plan: _BasePlan,
    targets: Mapping[str, str],
    adapt: Callable[[str], torch.Tensor | None],
    max_shard_bytes: int,
) -> None:
    """The weights of the residual model, read, changed and written one by one; `targets` maps tensor names to layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    split = split_torch_state_dict_into_shards(plan.tensors, filename_pattern=BASE_WEIGHTS, max_shard_size=max_shard_bytes)
    for filename, keys in split.filename_to_tensors.items():
        with store.TensorFile(folder / filename, {key: plan.tensors[key] for key in keys}, plan.metadata) as file:
            for key in keys:
                name = plan.names[key]
                module, _, tensor = name.rpartition(".")
                value = adapt(targets[name]) if name in targets else tensor_of(modules[module], tensor)
                assert value is not None
                file.write(key, value)
                del value
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": plan.total_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        path = folder / f"{BASE_WEIGHTS.format(suffix='')}.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_method(method: str, sigma_scale: float = 1.0) -> None:
    """Raise `ValueError` for a method that does not exist or a scale that it does not take."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    if not 0.0 < sigma_scale < math.inf:
        raise ValueError(f"sigma_scale must be a positive number, not {sigma_scale}")
    if method == "b-zero" and sigma_scale != 1.0:
        raise ValueError("sigma_scale belongs to method 'lora-null'; 'b-zero' has no singular values to scale")


def check_servable(model: nn.Module, layers: Mapping[str, nn.Module], method: str, *, offloaded: bool = False) -> None:
    """Raise `ValueError`, naming the layer and the method that would do, if a base cannot be served. Cheap: ask it first.

    Args:
        model: the whole model, to see what else uses a weight.
        layers: module name → linear base layer.
        method: of `inject_adapters`.
        offloaded: weights that accelerate keeps on the disk will do: `write_init` reads them, `inject_adapters` cannot change them.
    """
    if method == "b-zero":
        return
    if offloaded and _on_disk(model):
        with tempfile.TemporaryDirectory() as folder:
            _plan_base(_without_weights(model), Path(folder))
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for name, layer in layers.items():
        weight = weight_of(layer)
        at_hand = store.fingerprint(weight) is not None or (offloaded and weight.device.type == "meta")
        if not at_hand or weight.dtype not in RESIDUAL_DTYPES:
            raise ValueError(
                f"the weight of {name!r} ({type(layer).__name__}, {weight.dtype}, {weight.device}) is quantised, sharded or "
                f"offloaded and cannot take the residual of method {method!r}; method 'b-zero' leaves the base alone"
            )
        if len(users.get(id(weight), [])) > 1:
            raise ValueError(
                f"the weight of {name!r} is tied ({' and '.join(users[id(weight)])} are one tensor), so it cannot become a "
                "residual; leave the layer out of target_modules, or use method 'b-zero', which leaves the base alone"
            )


def _own_config(config: LoraConfig, model: nn.Module, spaces: NullSpaces) -> LoraConfig:
    """A checked copy of a configuration, with our own choices in it."""
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a LoraConfig, not {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise TypeError("the model already is a PeftModel: merge or unload its adapters first")
    for name in ("target_parameters", "layer_replication", "use_qalora", "megatron_config"):
        if getattr(config, name, None):
            raise ValueError(f"LoraConfig.{name} is not supported: null spaces belong to whole linear layers")
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    if config.target_modules is None:
        config.target_modules = list(spaces)
    return config


def _lora_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """Name in the base model → LoRA layer."""
    base: Any = peft_model.base_model.model
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in (*module.lora_A, *module.lora_embedding_A)
    }


def _check_layer(name: str, layer: Any, base: nn.Module, adapter_name: str, spaces: NullSpaces) -> None:
    if not is_linear(base) or adapter_name not in layer.lora_A:
        raise ValueError(f"target {name!r} is {type(base).__name__}, not a linear layer")
    spaces.check(name, base)
    rank, columns = layer.r[adapter_name], spaces[name].rank
    limit = min(columns, layer.out_features)
    if rank > limit:
        raise ValueError(
            f"the adapter of {name!r} has rank {rank}, but its null space has {columns} directions and its weight "
            f"{layer.out_features} rows: use r ≤ {limit}, or compute the spaces with a larger rank"
        )


@torch.no_grad()
def _write_factors(layer: Any, adapter: str, space: NullSpace, method: str, sigma_scale: float) -> None:
    stored = layer.get_base_layer().weight
    a, b, residual = _factors(layer, stored, adapter, space, method, sigma_scale)
    layer.lora_A[adapter].weight.copy_(a)
    layer.lora_B[adapter].weight.copy_(b)
    if residual is not None:
        stored.copy_(residual)


@torch.no_grad()
def _factors(
    layer: Any, stored: torch.Tensor, adapter: str, space: NullSpace, method: str, sigma_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What an adapter starts with, and what is left of the weight.

    Args:
        layer: PEFT's; asked for rank, scaling, layout and dtypes, never for values.
        stored: the weight as the base layer stores it, (d_out, d_in) or the transpose of it (`layer.fan_in_fan_out`).

    Returns:
        A (r, d_in) and B (d_out, r) in the adapter's dtypes, and the residual in the layout and dtype of `stored`, or None where
        the base stays as it is.
    """
    rank, scaling = layer.r[adapter], layer.scaling[adapter]
    dtype_a, dtype_b = (each[adapter].weight.dtype for each in (layer.lora_A, layer.lora_B))
    if method == "b-zero":
        a, b = factors.b_zero(space.basis, layer.out_features, rank=rank)
        return a.to(dtype_a), b.to(dtype_b), None
    weight = (stored.T if layer.fan_in_fan_out else stored).to(torch.float64, copy=True)
    a, b = factors.lora_null(weight, space.basis, rank=rank, sigma_scale=sigma_scale)
    # s·BA is the product that counts, so each factor takes 1/√s; the residual is that of the factors as they are stored.
    a, b = (a / math.sqrt(scaling)).to(dtype_a), (b / math.sqrt(scaling)).to(dtype_b)
    residual = weight.addmm_(b.to(weight), a.to(weight), alpha=-scaling).to(stored.dtype)
    return a, b, residual.T if layer.fan_in_fan_out else residual


def _freeze(layers: Mapping[str, LoraLayer], adapter: str) -> None:
    for layer in layers.values():
        # PEFT's own record of what set_adapter must not switch on again; a new dictionary, since the default is the class's.
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: ("lora_A",)}
        layer.lora_A[adapter].requires_grad_(False)


def export_lora(
    trained: PeftModel | str | os.PathLike[str],
    initial: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """After training: a plain LoRA for the *untouched* base model, which does what the trained adapter does on the residual one.

    With W₀ = W_res + s·B₀A₀, the trained model is W_res + s·BA = W₀ + s·(BA − B₀A₀). Where A was frozen that is s·(B − B₀)A₀, of
    rank r; otherwise [B, −B₀][A; A₀], of rank 2r with α doubled (× √2 with rsLoRA), so that the scaling stays s.

    Args:
        trained: the trained model, or the directory of its adapter.
        initial: the directory of the adapter as `inject_adapters` made it (`OUT/adapter` of `nullspace init`).
        out: directory of the new adapter; written whole or not at all.
        base: name or path of the untouched base, written into the adapter's configuration.
        overwrite: replace an earlier export.

    Returns:
        The path of `out`.

    Raises:
        FileNotFoundError: if an adapter file is missing.
        ValueError: naming the file, if it is damaged, the two adapters do not belong together, or they use what has no plain
            LoRA form (DoRA magnitudes, LoRA biases).
        FileExistsError: if `out` is in the way.
    """
    store.check_free(out, overwrite=overwrite)
    if isinstance(trained, PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            _save_adapter(trained, trained.active_adapter, Path(folder))
            return export_lora(folder, initial, out, base=base, overwrite=overwrite)
    now, start = _read_adapter(Path(trained)), _read_adapter(Path(initial))
    _check_pair(now, start)
    pairs = [key.removesuffix(".lora_A.weight") for key in now.tensors if key.endswith(".lora_A.weight")]
    frozen = all(torch.equal(now.tensors[f"{p}.lora_A.weight"], start.tensors[f"{p}.lora_A.weight"]) for p in pairs)
    untouched = all(not start.tensors[f"{p}.lora_B.weight"].any() for p in pairs)
    tensors = dict(now.tensors)
    for p in pairs:
        key_a, key_b = f"{p}.lora_A.weight", f"{p}.lora_B.weight"
        a, b, a0, b0 = now.tensors[key_a], now.tensors[key_b], start.tensors[key_a], start.tensors[key_b]
        if frozen:
            tensors[key_b] = (b.double() - b0.double()).to(b.dtype)
        elif not untouched:
            tensors[key_a], tensors[key_b] = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    config = dict(now.config, base_model_name_or_path=base, init_lora_weights=True, inference_mode=True)
    if not (frozen or untouched):
        alpha_factor = math.sqrt(2) if config.get("use_rslora") else 2
        config["r"] = 2 * config["r"]
        config["lora_alpha"] = alpha_factor * config["lora_alpha"]
        config["rank_pattern"] = {k: 2 * v for k, v in (config.get("rank_pattern") or {}).items()}
        config["alpha_pattern"] = {k: alpha_factor * v for k, v in (config.get("alpha_pattern") or {}).items()}
    with store.new_directory(out, overwrite=overwrite) as part:
        (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        store.write_tensors(part / ADAPTER_WEIGHTS, tensors)
        store.write_manifest(part, "export", {"rank_factor": 1 if frozen or untouched else 2}, files=(ADAPTER_WEIGHTS,))
    return Path(out)


def _save_adapter(peft_model: PeftModel, adapter: str, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    peft_model.save_pretrained(str(directory), selected_adapters=[adapter], save_embedding_layers=False, state_dict=state_dict)
    if adapter != "default":  # to which alone PEFT gives no folder of its own
        for file in (directory / adapter).iterdir():
            file.rename(directory / file.name)
        (directory / adapter).rmdir()
    # PEFT keeps names in sets, whose order changes from process to process; two runs are to write the same bytes.
    path = directory / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


class _Adapter(NamedTuple):
    path: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def _read_adapter(directory: Path) -> _Adapter:
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} is not a PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} does not describe a LoRA adapter")
    return _Adapter(directory, config, store.load_tensors(directory / ADAPTER_WEIGHTS))


def _check_pair(now: _Adapter, start: _Adapter) -> None:
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if (now.config.get(name) or None) != (start.config.get(name) or None):
            raise ValueError(
                f"{now.path} and {start.path} do not belong together: {name} is {now.config.get(name)} and {start.config.get(name)}"
            )
    if now.config.get("use_dora") or now.config.get("lora_bias"):
        raise ValueError(f"{now.path} uses DoRA or LoRA biases, which have no plain LoRA form on the untouched base")
    for key, value in start.tensors.items():
        found = now.tensors.get(key)
        if ".lora_" in key and (found is None or found.shape != value.shape):
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(value.shape)}"
            raise ValueError(f"{now.path} and {start.path} do not belong together: {key} {what} in the trained adapter")
    extra = next((key for key in now.tensors if ".lora_" in key and key not in start.tensors), None)
    if extra is not None:
        raise ValueError(f"{now.path} and {start.path} do not belong together: {extra} is not in the initial adapter")
