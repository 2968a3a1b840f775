"""`write_init`: `inject_adapters` and `save_init` in one, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from nullspace.artifacts import records, store
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.locks import temporary_folder
from nullspace.artifacts.residual import Change, change_of, mark_file
from nullspace.artifacts.shared_writes import written_once
from nullspace.artifacts.spaces import NullSpaces
from nullspace.distributed import Job
from nullspace.factors import DAMPING
from nullspace.integrations.peft.cards import write_cards
from nullspace.integrations.peft.files import ADAPTER_WEIGHTS, init_record, located, save_adapter
from nullspace.integrations.peft.layers import (
    check_layers,
    check_servable,
    lora_layers,
    own_config,
    random_seed,
    residual_of,
    start_of,
    with_spaces,
)
from nullspace.integrations.peft.shell import BASE_WEIGHTS, BasePlan, on_disk, plan_base, saving_here, without_weights
from nullspace.integrations.peft.watch import warn_of_dropout
from nullspace.methods import METHODS, Sources, check_method, check_sources
from nullspace.model.linear import weight_of
from nullspace.model.sharded import is_model_sharded, prepare_to_gather
from nullspace.model.weights import execution_device, tensor_of
from nullspace.model.wrappers import unwrap, unwrapped
from nullspace.progress import Progress, reporter

# What `save_pretrained` puts into one file at the most, by default.
SHARD_BYTES = 50 * 10**9


def write_init(
    out: str | os.PathLike[str],
    model: nn.Module,
    config: LoraConfig,
    spaces: NullSpaces | None = None,
    *,
    method: str = "lora-null",
    covariances: Covariances | None = None,
    preserve: Covariances | None = None,
    sigma_scale: float = 1.0,
    beta: float = 0.5,
    damping: float = DAMPING,
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
            (`nullspace.integrations.transformers.load_model(..., offload=True)`). If they are spread over the processes of the
            default group (FSDP2, ZeRO-3, DTensors of tensor parallelism), all of them have to call this with the same arguments:
            weights are gathered one at a time, and the first process writes.
        config: as in `inject_adapters`.
        spaces, method, covariances, preserve, sigma_scale, beta, damping: as in `inject_adapters`.
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
        FileExistsError: if `out` is in the way, or another run is writing to it.
        OSError: if it cannot be written; then nothing is left behind.
    """
    model = unwrap(model)
    job = Job() if is_model_sharded(model) else Job.alone()
    with job.sharing_errors(), unwrapped(model):
        given = Sources(spaces, covariances, preserve, sigma_scale, beta, damping, seed=random_seed(method))

        def write() -> None:
            _write(Path(out), model, config, given, method, tokenizer, record or {}, overwrite, max_shard_bytes, progress, job)

        if job.count == 1:
            written_once(out, write)
        else:
            write()
    if job.first:
        warn_of_dropout(config, method, "base" if METHODS[method].changes_base else "none", stacklevel=2)
    return Path(out)


def _write(
    out: Path,
    model: nn.Module,
    config: LoraConfig,
    given: Sources,
    method: str,
    tokenizer: Any,
    record: Mapping[str, Any],
    overwrite: bool,
    max_shard_bytes: int,
    progress: bool | Progress,
    job: Job,
) -> None:
    check_method(method, given)
    check_sources(method, given)
    resolved = store.resolved(out)
    spread = prepare_to_gather(model, job)
    config = own_config(config, model, given, job)
    residual = METHODS[method].changes_base
    report = reporter(progress, bars=job.first)
    reserved = store.reserved(resolved, overwrite=overwrite) if job.first else contextlib.nullcontext()
    with reserved, temporary_folder() as plans:
        with torch.random.fork_rng(devices=[]):  # PEFT draws numbers that nobody will see
            peft_model = get_peft_model(without_weights(model), config)
        adapter = peft_model.active_adapter
        layers = lora_layers(peft_model, adapter)
        modules = dict(model.named_modules(remove_duplicate=False))
        given = with_spaces(method, given, layers, adapter)
        check_layers(layers, {name: modules[name] for name in layers}, adapter, method, given, job)
        place = check_servable(model, {name: modules[name] for name in layers}, method, offloaded=True)
        shell = without_weights(model)
        # Of several processes, transformers saves something in the first one alone.
        base = plan_base(shell, plans / "base", strict=spread or on_disk(model)) if residual and job.first else None
        base = job.exchange(base)[0]
        if base is not None:
            _check_base(model, base, layers)
        original = config.base_model_name_or_path
        place_of_base = os.path.abspath(out / "base") if residual else located(original)
        config.base_model_name_or_path = place_of_base
        of_adapter = _plan_adapter(peft_model, adapter, layers, plans / "adapter")
        done = 0
        changes: list[Change] = []

        def fetch(name: str) -> torch.Tensor:
            job.exchange(None)  # before a weight is gathered, whoever has failed must have told it
            module, _, tensor = name.rpartition(".")
            return tensor_of(modules[module], tensor)

        def adapt(name: str) -> torch.Tensor | None:
            nonlocal done
            report("adapters", done, len(layers), 0)
            stored = fetch(f"{name}.weight") if residual else weight_of(modules[name])
            a, b = start_of(name, layers[name], stored, adapter, method, given)
            adapter_file.write(of_adapter.keys[name, "lora_A"], a)
            adapter_file.write(of_adapter.keys[name, "lora_B"], b)
            done += 1
            if place != "base":
                return None
            rest = residual_of(name, layers[name], stored, adapter, a, b)
            changes.append(change_of(name, stored, rest))
            return rest

        if not job.first:  # one writes, and the others help to gather
            if base is not None:
                for keys in _files(base, max_shard_bytes).filename_to_tensors.values():
                    for key in keys:
                        fetch(base.names[key])
            job.exchange(None)
            return
        with store.new_directory(resolved, overwrite=overwrite) as part:
            if given.spaces is not None:
                given.spaces.write(part / "spaces")
            shutil.copytree(plans, part, dirs_exist_ok=True)
            with records.TensorFile(part / "adapter" / ADAPTER_WEIGHTS, of_adapter.tensors, of_adapter.metadata) as adapter_file:
                if base is None:
                    rests = {f"{name}.weight": adapt(name) for name in layers}
                    if residual:
                        state = {**model.state_dict(), **rests}
                        with saving_here(shell):
                            shell.save_pretrained(part / "base", state_dict=state, max_shard_size=max_shard_bytes)
                else:
                    _write_base(part / "base", base, {f"{name}.weight": name for name in layers}, adapt, fetch, max_shard_bytes)
            if changes:
                mark_file(part / "base" / "config.json", method, located(original), max(changes, key=lambda change: change.ratio))
            if residual and tokenizer is not None:
                tokenizer.save_pretrained(part / "base")
            facts = init_record(model, original, method, config, place, given.spaces, record)
            write_cards(part, facts)
            records.write_manifest(part, "init", facts)
        report("adapters", done, len(layers), 0)
    given.directions.warn(f"method {method!r}", stacklevel=3)
    job.exchange(None)


class _AdapterPlan(NamedTuple):
    """What PEFT would write."""

    keys: dict[tuple[str, str], str]
    """(layer, "lora_A" or "lora_B") → name in the file."""
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def _check_base(model: nn.Module, plan: BasePlan, layers: Iterable[str]) -> None:
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
    save_adapter(peft_model, adapter, folder, {name: torch.tensor([index]) for index, name in enumerate(order)})
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


def _files(plan: BasePlan, max_shard_bytes: int) -> Any:
    """Which tensors go into which file."""
    return split_torch_state_dict_into_shards(plan.tensors, filename_pattern=BASE_WEIGHTS, max_shard_size=max_shard_bytes)


def _write_base(
    folder: Path,
    plan: BasePlan,
    targets: Mapping[str, str],
    adapt: Callable[[str], torch.Tensor | None],
    fetch: Callable[[str], torch.Tensor],
    max_shard_bytes: int,
) -> None:
    """The weights of the residual model, read, changed and written one by one; `targets` maps tensor names to layers."""
    split = _files(plan, max_shard_bytes)
    for filename, keys in split.filename_to_tensors.items():
        with records.TensorFile(folder / filename, {key: plan.tensors[key] for key in keys}, plan.metadata) as file:
            for key in keys:
                name = plan.names[key]
                value = adapt(targets[name]) if name in targets else fetch(name)
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
