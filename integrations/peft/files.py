"""PEFT's adapter directories: written with the same bytes in every run, and read with checks."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from nullspace.analysis import Course, State
from nullspace.artifacts import records
from nullspace.artifacts.residual import name_start_in_file
from nullspace.artifacts.spaces import NullSpaces
from nullspace.checks import an_object, check_fields, finite, flag, list_of, map_of, optional, or_none, text, whole
from nullspace.distributed import Job
from nullspace.errors import DamagedFileError, InputError, MissingFileError, OtherModelError
from nullspace.factors import LowRank
from nullspace.integrations.peft import origin
from nullspace.integrations.peft.experts.adapters import expert_adapters
from nullspace.integrations.peft.experts.layout import Place, part_of_a, pattern_name, places
from nullspace.integrations.peft.origin import Adapter
from nullspace.model.linear import weight_of
from nullspace.model.sharded import class_of, is_model_sharded, prepare_to_gather
from nullspace.model.sharded_tensors import whole as gathered
from nullspace.model.wrappers import named_modules, unwrap

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The fields of its configuration that are used here.
_CONFIG_FIELDS = {
    "r": whole(1),
    "lora_alpha": finite(),
    "rank_pattern": optional(or_none(map_of(whole(1)))),
    "alpha_pattern": optional(or_none(map_of(finite()))),
    "use_rslora": optional(or_none(flag())),
    "use_dora": optional(or_none(flag())),
    "target_parameters": optional(or_none(list_of(text()))),
    "peft_version": optional(or_none(text())),
    "base_model_name_or_path": optional(or_none(text())),
    origin.FIELD: optional(or_none(an_object())),
}
# The fields of an init's record that are used here.
_INIT_FIELDS = {name: optional(or_none(text())) for name in ("model", "method", "residual", "architecture")}
_INIT_FIELDS |= {"leak": optional(or_none(an_object())), "freeze_a": optional(flag()), "freeze_b": optional(flag())}
_LEAK_FIELDS = {"median": finite(0), "worst": finite(0), "worst_site": text()}
# Folders that transformers' Trainer saves during training.
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

PREFIX = "base_model.model."
A_WEIGHT, B_WEIGHT = ".lora_A.weight", ".lora_B.weight"


def save_adapter(peft_model: PeftModel, adapter: str, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Save one adapter by PEFT, into the directory itself.

    Args:
        peft_model: with the adapter. If it is sharded over several ranks, the saved weights are gathered: all ranks have to call
            this.
        adapter: its name.
        directory: where to.
        state_dict: saved in place of the model's state.
    """
    if state_dict is None and is_model_sharded(peft_model):
        prepare_to_gather(peft_model, Job())
        state_dict = _gathered(peft_model, adapter)
    peft_model.save_pretrained(str(directory), selected_adapters=[adapter], save_embedding_layers=False, state_dict=state_dict)
    if adapter != "default":  # PEFT saves any other in a subfolder
        for file in (directory / adapter).iterdir():
            file.rename(directory / file.name)
        (directory / adapter).rmdir()
    # PEFT keeps names in sets, whose order differs between processes; the bytes of two runs must be equal.
    path = directory / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "target_parameters", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    _write_config(path, config)


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def record_start(part: Path, facts: Mapping[str, Any], revision: str | None, base: Mapping[str, str]) -> None:
    """Write the record of the start (`origin.recorded`) into the folders of an init, whose manifest the facts are."""
    digest = origin.digest_of(records.load_tensors(part / "adapter" / ADAPTER_WEIGHTS))
    record = {name: facts[name] for name in ("freeze_a", "freeze_b", "model", "residual") if name in facts}
    record |= {"revision": revision, "base": dict(base), "factors": digest}
    for path in part.glob(f"*/{ADAPTER_CONFIG}"):
        _write_config(path, origin.with_record(records.read_json(path), record))
    if (part / "base").is_dir():
        name_start_in_file(part / "base" / "config.json", digest)


def _gathered(peft_model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """The state of a sharded model, with the tensors that PEFT saves gathered and all others as they are."""
    own: dict[str, torch.Tensor] = {
        **dict(peft_model.named_parameters(remove_duplicate=False)),
        **dict(peft_model.named_buffers(remove_duplicate=False)),
    }
    saved = get_peft_model_state_dict(peft_model, state_dict=own, adapter_name=adapter, save_embedding_layers=False)
    chosen = {id(tensor) for tensor in saved.values()}
    return {name: gathered(tensor).detach() if id(tensor) in chosen else tensor for name, tensor in own.items()}


def read_adapter(directory: Path) -> Adapter:
    """A LoRA adapter's configuration and tensors, all of them finite.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming the file, if it is damaged or no LoRA adapter; naming the tensor, if it holds NaN or Inf.
    """
    path = directory / ADAPTER_CONFIG
    if not path.exists():
        hint = "of a hub name, give the folder that hf download prints"
        raise MissingFileError(f"{path} is missing: {directory} is not a PEFT adapter ({hint})")
    config = records.read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise DamagedFileError(f"{path} does not describe a LoRA adapter")
    check_fields(config, _CONFIG_FIELDS, path)
    for pattern in (*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())):
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{path}: {pattern!r} in a pattern is no regular expression: {error}") from error
    tensors = records.load_tensors(directory / ADAPTER_WEIGHTS)
    _check_tensors(tensors, directory / ADAPTER_WEIGHTS)
    return Adapter(directory, config, tensors)


def _check_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise `ValueError`, naming the tensor, for NaN or Inf, a factor of no floating dtype, and an A and a B that do not fit."""
    for key, tensor in tensors.items():
        values = tensor.float() if tensor.element_size() == 1 else tensor  # PyTorch does not look for NaN in 8 bits
        if not bool(values.isfinite().all()):
            raise DamagedFileError(f"{path} holds NaN or Inf in {key!r}")
        factor = (".lora_A." in key or ".lora_B." in key) and not key.endswith(".bias")
        if factor and not (tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0):
            raise DamagedFileError(f"{path}: {key!r} is {tuple(tensor.shape)} {tensor.dtype}, which is no factor of an adapter")
        b = tensors.get(key.replace(".lora_A.", ".lora_B."), tensor)
        if ".lora_A." in key and b is not tensor and (b.ndim != tensor.ndim or b.shape[1] != len(tensor)):
            shapes = f"the A {tuple(tensor.shape)} of {layer_of(key)!r}: its B is {tuple(b.shape)}"
            raise DamagedFileError(f"{path} has no B that fits {shapes}")


def scaling_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """PEFT's factor of B A: α/r, or α/√r with rsLoRA, with the α that `alpha_pattern` has for the layer.

    Args:
        config: the content of the adapter's configuration file.
        layer: its name in the base model.
        rank: rows of its A; of one expert's, for an expert's matrix.
    """
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), pattern_name(layer)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def init_record(
    model: nn.Module,
    original: str | None,
    method: str,
    config: LoraConfig,
    residual: str,
    frozen: str | None,
    spaces: NullSpaces | None,
    record: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of an init's manifest.

    Args:
        model: the base model.
        original: its name, before it became a residual.
        method: of `inject_adapters`.
        config: of the adapter.
        residual: as `check_servable` returns it.
        frozen: the factor that is to stay as it is, if there is one.
        spaces: that the adapter is made of, if any.
        record: further facts of the caller, which take precedence.
    """
    leaks = [] if spaces is None else sorted((spaces[site.name].leak, site.name) for site in spaces.sites)
    facts = {
        "model": original,
        "architecture": class_of(model).__name__,
        "method": method,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "residual": residual,
        **origin.frozen_entries(frozen),
        "leak": {"median": leaks[len(leaks) // 2][0], "worst": leaks[-1][0], "worst_site": leaks[-1][1]} if leaks else None,
        **(record or {}),
    }
    return {**facts, "model": located(facts["model"] or original)}


def adapter_in(directory: Path) -> Path:
    """The adapter's directory in what `save_init` wrote, or the directory itself."""
    inner = directory / "adapter"
    return inner if (inner / ADAPTER_CONFIG).is_file() else directory


def init_around(directory: Path) -> dict[str, Any] | None:
    """The record of `save_init` in the parent of its `adapter`, `base` or `subtracted`; None if there is none.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    parent = Path(os.path.abspath(directory)).parent
    return read_init(parent) if records.kind_of(parent) == "init" else None


def read_init(directory: Path) -> dict[str, Any]:
    """The record that `save_init` wrote.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    init = records.read_manifest(directory, "init", _INIT_FIELDS)
    if init.get("leak") is not None:
        check_fields(init["leak"], _LEAK_FIELDS, f"{directory / records.MANIFEST}: leak")
    return init


def located(name: str | None) -> str | None:
    """A model's name, valid in any working directory: paths that exist are made absolute, hub names stay."""
    return os.path.abspath(name) if name and os.path.exists(name) else name or None


def row_spaces(*adapters: str | os.PathLike[str] | PeftModel) -> dict[str, torch.Tensor]:
    """The A of adapters that were trained before, for `avoid=`: a new adapter must not read these directions (O-LoRA, arXiv
    2310.14152).

    Args:
        adapters: directories of PEFT's LoRA adapters, or models with one (all of its adapters). Of a model that is sharded over
            several ranks they are gathered: all ranks have to call this.

    Returns:
        Name of the layer in the base model → (m, d_in) float32, the rows of all A of this layer, concatenated.

    Raises:
        FileNotFoundError: if an adapter's file is missing.
        ValueError: naming it, if it is damaged or no LoRA adapter.
    """
    rows_of: dict[str, list[torch.Tensor]] = {}
    for adapter in map(unwrap, adapters):
        for name, rows in _rows_in_model(adapter) if isinstance(adapter, PeftModel) else _rows_in(Path(adapter)):
            known = rows_of.setdefault(name, [])
            if rows.ndim != 2 or (known and rows.shape[1] != known[0].shape[1]):
                width = known[0].shape[1] if known else "d_in"
                raise InputError(f"{adapter}: the A of {name!r} should be (rank, {width}), not {tuple(rows.shape)}")
            known.append(rows.to("cpu", torch.float32))
    return {name: torch.cat(rows) for name, rows in rows_of.items()}


def _rows_in_model(peft_model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    prepare_to_gather(peft_model, Job() if is_model_sharded(peft_model) else Job.alone())
    for name, layer in named_modules(peft_model.get_base_model()).items():
        if isinstance(layer, LoraLayer):
            experts = expert_adapters(name, layer)
            for factor in layer.lora_A.values():
                rows = gathered(weight_of(factor)).detach()
                for index, each in enumerate(experts or (name,)):
                    yield each, part_of_a(rows, len(experts), index) if experts else rows


def _rows_in(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    adapter = read_adapter(directory)
    for name, place in places_in(adapter).items():
        yield name, place.of_a(adapter.tensors[f"{PREFIX}{place.path}{A_WEIGHT}"])


def read_factors(directory: str | os.PathLike[str]) -> dict[str, LowRank]:
    """A and B of every layer of a saved LoRA adapter.

    Args:
        directory: of a PEFT adapter.

    Returns:
        Name of the layer in the base model → `LowRank(A (r, d_in), B (d_out, r))`, float64, with PEFT's scaling (α/r, or α/√r with
        rsLoRA; `rank_pattern` and `alpha_pattern` as they are) in B: B A is what the adapter adds to the weight. Experts that are
        one tensor are layers by themselves (`….experts.gate_up_proj[17]`).

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming it, if it is damaged or no LoRA adapter, or if it adds something else than a product B A (DoRA, adapters
            of embeddings and convolutions alone).
    """
    return factors_of(_plain(Path(directory)))


def _plain(directory: Path) -> Adapter:
    """An adapter that adds a product B A; `ValueError` for DoRA."""
    adapter = read_adapter(directory)
    if adapter.config.get("use_dora"):
        raise InputError(f"{adapter.path} uses DoRA: what it adds to a weight is no product B A")
    return adapter


def factors_of(adapter: Adapter) -> dict[str, LowRank]:
    """`read_factors` of an adapter that was read; of DoRA, the factors of its direction.

    Raises:
        ValueError: naming the file, if an A has no B that fits, or there are no factors of a linear layer.
    """
    factors = {}
    for name, place in places_in(adapter).items():
        key = f"{PREFIX}{place.path}"
        a, b = adapter.tensors[key + A_WEIGHT], adapter.tensors.get(key + B_WEIGHT)
        if a.ndim != 2:
            continue
        if b is None or b.ndim != 2 or b.shape[1] != a.shape[0]:
            raise DamagedFileError(f"{adapter.path / ADAPTER_WEIGHTS} has no B that fits the A {tuple(a.shape)} of {name!r}")
        a, b = place.of_a(a), place.of_b(b)
        factors[name] = LowRank(a.to(torch.float64), scaling_of(adapter.config, name, len(a)) * b.to(torch.float64))
    if not factors:
        raise InputError(f"{adapter.path} has no LoRA factors of a linear layer")
    return factors


def read_course(name: str, initial: str | os.PathLike[str], *trained: str | os.PathLike[str]) -> Course:
    """An adapter from its start through training, for `nullspace.analysis.analyse`.

    Args:
        name: for tables and figures.
        initial: what `nullspace init` or `save_init` wrote, or the adapter directory in it.
        trained: directories of the trained adapter, in order. A folder with Trainer's `checkpoint-N` in it stands for all of them.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: as `read_factors`; and naming the layer, if a trained adapter has others than the initial one, or other shapes;
            if their configurations record different starts.

    Warns:
        UserWarning: if a configuration records no start, so that names and shapes alone were compared.
    """
    initial = Path(initial)
    first = _plain(adapter_in(initial))
    start = factors_of(first)
    states: list[State] = []
    for directory in [each for folder in trained for each in _checkpoints(Path(folder))]:
        now = _plain(directory)
        factors = factors_of(now)
        for layer in (*start, *factors):
            if layer not in factors or layer not in start:
                where = directory if layer in factors else initial
                raise OtherModelError(
                    f"adapter {name!r}: {directory} is not what {initial} was trained to: only {where} has {layer!r}"
                )
            shapes = [[tuple(t.shape) for t in each[layer]] for each in (start, factors)]
            if shapes[0] != shapes[1]:
                raise OtherModelError(
                    f"adapter {name!r}: {directory} is not what {initial} was trained to: A and B of {layer!r} are {shapes[1]}, "
                    f"and were {shapes[0]}"
                )
        origin.check_origin(now, first, stacklevel=2)
        step = _CHECKPOINT.fullmatch(directory.name)
        states.append(State(f"step {step[1]}" if step else directory.name, int(step[1]) if step else None, factors))
    names = [state.label for state in states]
    states = [
        state._replace(label=f"{state.label} ({i})") if names.count(state.label) > 1 else state for i, state in enumerate(states, 1)
    ]
    return Course(name, start, tuple(states))


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a directory")
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(steps)] or [folder]


def layer_of(key: str) -> str:
    """The name that a tensor of an adapter's file has in front of `.lora_A` or `.lora_B`."""
    return key.removeprefix(PREFIX).rpartition(".lora_")[0]


def places_in(adapter: Adapter) -> dict[str, Place]:
    """Name of the layer in the base model → where the file has its factors. Those of experts are in one tensor.

    Raises:
        ValueError: naming the module, if the experts of the file are not those of the configuration.
    """
    rows = {layer_of(key): len(tensor) for key, tensor in adapter.tensors.items() if key.endswith(A_WEIGHT)}
    return places(adapter.config, rows, adapter.path)
