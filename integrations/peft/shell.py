"""A copy of a model without its weights, on which transformers and PEFT show what they would save, and under which names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from nullspace.errors import InputError, InputTypeError
from nullspace.integrations.peft.experts.layout import parameter_name
from nullspace.model.experts import expert_matrices
from nullspace.model.quantised import is_quantised_layer
from nullspace.model.sharded import without_fsdp_classes
from nullspace.model.sharded_tensors import is_sharded, shape_of
from nullspace.model.weights import own_tensors

BASE_WEIGHTS = "model{suffix}.safetensors"
# Where transformers keeps the device mesh of a sharded model.
_MESHES = ("_device_mesh", "_mesh_manager")


class BasePlan(NamedTuple):
    """The tensors that `save_pretrained` would write, in the checkpoint's order."""

    names: dict[str, str]
    """In the checkpoint → in the model."""
    tensors: dict[str, torch.Tensor]
    """Name in the checkpoint → tensor on the meta device."""
    metadata: dict[str, str]
    total_parameters: int
    experts: frozenset[str] = frozenset()
    """Tensors in the model that hold all experts of a layer: `in_checkpoint` says what the checkpoint has in their place."""

    def owners(self, keys: Iterable[str]) -> list[str]:
        """The tensors in the model that these of the checkpoint are made of, in the order in which they are first needed."""
        return list(dict.fromkeys(self.names[key] for key in keys))


def on_disk(model: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in model.parameters())


def without_weights(model: nn.Module) -> Any:
    """A copy of a model with its weights on the meta device, without accelerate's hooks and without sharding.

    Quantised weights with their scales, and integers, which PEFT may read, are shared with the model: they are not written to.
    """
    memo: dict[int, Any] = {}
    twins: dict[Any, torch.Tensor] = {}
    for module in model.modules():
        if "_hf_hook" in module.__dict__:
            memo[id(module._hf_hook)] = None
        for name, value in module.__dict__.items():
            if name in _MESHES:
                memo[id(value)] = None
            if type(value).__module__.startswith("bitsandbytes."):  # a layer's scales, and its weight once more
                memo[id(value)] = value
            if isinstance(value, dict) and is_quantised_layer(module):  # HQQ's scales
                memo.update((id(t), t) for t in value.values() if isinstance(t, torch.Tensor))
        for t in own_tensors(module).values():
            if not (type(t) in (nn.Parameter, torch.Tensor) or is_sharded(t)) or not t.is_floating_point():
                memo[id(t)] = t
                continue
            elsewhere = t.device.type == "meta" or t.numel() == 0 or is_sharded(t)
            key = None if elsewhere else (t.device, t.data_ptr(), t.shape, t.stride())
            empty = torch.empty(shape_of(t), dtype=t.dtype, device="meta")
            if isinstance(t, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=t.requires_grad)
            memo[id(t)] = twins.setdefault(key or id(t), empty)
    with without_fsdp_classes(model):
        shell = copy.deepcopy(model, memo)
    for module in shell.modules():
        if module.__dict__.pop("_old_forward", None) is not None:
            module.__dict__.pop("forward", None)
        for name in ("_hf_hook", "hf_device_map", "to", "cuda", *_MESHES):
            module.__dict__.pop(name, None)
    config = getattr(shell, "config", None)
    getattr(config, "__dict__", {}).pop("distributed_config", None)  # or transformers would gather
    return shell


def plan_base(shell: Any, folder: Path, *, strict: bool = True) -> BasePlan | None:
    """Let `save_pretrained` save tiny stand-ins, which shows the names and the order of the tensors in its checkpoint.

    This covers all that it does to a state dict: tied weights, other names in the checkpoint than in the model, tensors that it
    leaves out. A stand-in has two entries along every axis, all different, so that joined, divided or transposed tensors are
    detected. The other files of `save_pretrained` (the configurations) stay in the folder. Experts that are one tensor are divided
    by transformers' own conversion, each parameter by itself.

    Returns:
        None if weights are not saved one by one as they are, unless `strict`.

    Raises:
        ValueError: the same, if `strict`.
        TypeError: if the model has no `save_pretrained`.
    """
    if not hasattr(shell, "save_pretrained"):
        raise InputTypeError(f"{type(shell).__name__} is not a transformers model: it has no save_pretrained")
    known = dict((*shell.named_parameters(remove_duplicate=False), *shell.named_buffers(remove_duplicate=False)))
    state = shell.state_dict()
    stacks = {f"{matrix.experts_name}.{matrix.parameter}" for matrix in expert_matrices(shell).values()}
    experts = {name: known[name] for name in state if name in stacks}
    names = {name: known[name] for name in state if name in known and name not in experts}
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
        with without_bars(), saving_here(shell):
            shell.save_pretrained(folder, state_dict=dict(stand_ins), max_shard_size=1)
        plan = _read_plan(folder, stand_ins, owners, names)
        plan = _with_experts(plan, shell, experts) if experts else plan
        problem: Exception | None = None
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # of a conversion that fails on stand-ins
        problem = error
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    if problem is None:
        return plan._replace(total_parameters=sum({id(p): p.numel() for p in shell.parameters()}.values()))
    if strict:
        raise InputError(f"{type(shell).__name__} has no weights that could be saved one by one ({problem}): {WHOLE}") from problem
    return None


def _read_plan(
    folder: Path, stand_ins: Mapping[str, torch.Tensor], owners: Mapping[int, str], known: Mapping[str, torch.Tensor]
) -> BasePlan:
    names: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for path in sorted(folder.glob(BASE_WEIGHTS.format(suffix="*"))):  # one per tensor, numbered
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                saved = file.get_tensor(key)
                owner = owners.get(int(saved.reshape(-1)[0]))
                if owner is None or not torch.equal(saved, stand_ins[owner]):
                    raise InputError(f"{key!r} is made of several, or of a part of one")
                names[key] = owner
    return BasePlan(names, {key: known[name] for key, name in names.items()}, metadata, 0)


def _with_experts(plan: BasePlan, shell: Any, experts: Mapping[str, torch.Tensor]) -> BasePlan:
    """The plan, and the tensors that the checkpoint has in the place of those of experts, in the checkpoint's order."""
    names, tensors = dict(plan.names), dict(plan.tensors)
    for name, stack in experts.items():
        pieces = in_checkpoint(shell, name, stack)
        if sum(piece.numel() for piece in pieces.values()) != stack.numel() or not names.keys().isdisjoint(pieces):
            raise InputError(f"{name!r} is not divided into parts of its own")
        names.update(dict.fromkeys(pieces, name))
        tensors.update(pieces)
    whole = {name: torch.empty(shape_of(t), dtype=t.dtype, device="meta") for name, t in shell.state_dict().items()}
    order = {key: index for index, key in enumerate(revert_weight_conversion(shell, whole))}
    keys = sorted(names, key=lambda key: order.get(key, len(order)))
    return plan._replace(
        names={key: names[key] for key in keys}, tensors={key: tensors[key] for key in keys}, experts=frozenset(experts)
    )


def in_checkpoint(shell: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a checkpoint of transformers has in the place of one tensor of the model: name → tensor. On the meta device too."""
    converted: dict[str, torch.Tensor] = revert_weight_conversion(shell, {name: tensor})
    return converted


def parts_in_checkpoint(shell: Any, layers: Iterable[str]) -> set[str]:
    """Names of the tensors that a checkpoint of transformers has in the place of these layers' weights, experts' too."""
    state = shell.state_dict()
    weights = {name: state[name] for name in map(parameter_name, layers) if name in state}
    return set(revert_weight_conversion(shell, weights))


@contextlib.contextmanager
def saving_here(model: nn.Module) -> Iterator[None]:
    """Context manager: `save_pretrained` writes weights in this process. In a process group, transformers has only rank 0 do so."""
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del vars(model)["should_save_on_this_rank"]


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


WHOLE = "load the model whole"
