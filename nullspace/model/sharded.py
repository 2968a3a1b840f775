"""Models whose weights are sharded over several ranks by FSDP2, ZeRO-3 or tensor parallelism.

- FSDP2 (`torch.distributed.fsdp.fully_shard`) and DeepSpeed's ZeRO-3 keep a part of every weight on each rank. Hooks on modules
  gather the weights for a forward pass.
- Tensor parallelism (`parallelize_module`, transformers' `tp_plan`) computes with the parts. All ranks must read the same batches,
  and a layer whose weight is split along d_in receives only a part of its input.

A gather is a collective: all ranks that share a weight must gather the same weights in the same order. So an exchange
(`Job.exchange`) precedes every gather and raises the error of one rank on all, and nothing that can fail on one rank lies between.

A layerwise run calls blocks by hand, as often as a rank has batches. FSDP2's `unshard` and `set_reshard_after_forward` do not serve
there: FSDP2's hooks take a block that is called by hand for the root of the model and then refuse the root, a forward prefetch
gathers in calls that not all ranks make, and no public method reads `reshard_after_forward`, which could not be restored.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from nullspace.errors import InputError
from nullspace.model.experts import ExpertMatrix
from nullspace.model.linear import is_conv1d, weight_of
from nullspace.model.sharded_tensors import is_dtensor, is_sharded, is_zero

if TYPE_CHECKING:
    from nullspace.distributed import Job

# Modules in which the hooks that gather weights are defined.
_GATHER_HOOKS = ("torch.distributed.fsdp", "deepspeed")
INSTEAD = (
    "Choose targets whose inputs are whole (targets=['q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj']), or shard the weights "
    "without splitting inputs: fully_shard (FSDP2) or a device_map"
)


def class_of(module: nn.Module) -> type:
    """A module's original class: `fully_shard` replaces it by a subclass."""
    kind = _fsdp_kind("FSDPModule")
    return next(c for c in type(module).__mro__ if kind is None or (c is not kind and kind not in c.__bases__))


def _fsdp_kind(name: str) -> Any:
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, None)


def _is_a(module: nn.Module, name: str) -> bool:
    kind = _fsdp_kind(name)
    return kind is not None and isinstance(module, kind)


def _states(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Every module that `fully_shard` was called with, and its FSDP2 state. A module precedes its submodules."""
    for module in model.modules():
        if _is_a(module, "FSDPModule"):
            yield module, module._get_fsdp_state()  # type: ignore[operator]


def compute_dtypes(model: nn.Module) -> dict[int, torch.dtype]:
    """`id(module)` → `param_dtype` of FSDP2's mixed-precision policy, for the modules that have one."""
    dtypes: dict[int, torch.dtype | None] = {}
    for module, state in _states(model):
        dtypes.update({id(part): state._mp_policy.param_dtype for part in module.modules()})
    return {key: dtype for key, dtype in dtypes.items() if dtype is not None}


@contextlib.contextmanager
def without_gather_hooks(model: nn.Module) -> Iterator[None]:
    """Context manager: removes FSDP2's and ZeRO-3's gather hooks and emulates FSDP2's mixed-precision casts."""
    before = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            theirs = [key for key, hook in hooks.items() if (getattr(hook, "__module__", None) or "").startswith(_GATHER_HOOKS)]
            if theirs:
                before.append((hooks, dict(hooks), theirs))
    handles = []
    for hooks, _, theirs in before:
        for key in theirs:
            del hooks[key]
    for module, state in _states(model):
        policy = state._mp_policy
        if policy.cast_forward_inputs and policy.param_dtype is not None:
            cast = functools.partial(_cast, policy.param_dtype)
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, cast=cast: cast((args, kwargs)), prepend=True, with_kwargs=True
                )
            )
        if policy.output_dtype is not None:
            cast = functools.partial(_cast, policy.output_dtype)
            handles.append(module.register_forward_hook(lambda _, args, output, cast=cast: cast(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for hooks, was, theirs in before:
            now = dict(hooks)
            hooks.clear()  # in place, as handles refer to it; in the order in which they were
            hooks.update({key: hook for key, hook in was.items() if key in now or key in theirs})
            hooks.update(now)


def _cast(dtype: torch.dtype, value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)


@contextlib.contextmanager
def without_fsdp_classes(model: nn.Module) -> Iterator[None]:
    """Context manager: modules have their original classes and no FSDP2 state, so that they can be copied."""
    before: list[tuple[nn.Module, type, dict[str, Any]]] = []
    for module, _ in list(_states(model)):
        contract: Any = sys.modules["torch.distributed._composable.contract"]
        known = (getattr(contract, name, None) for name in ("STATE_KEY", "REGISTRY_KEY"))
        keys = [key for key in known if key in module.__dict__]
        before.append((module, type(module), {key: module.__dict__.pop(key) for key in keys}))
        module.__class__ = class_of(module)
    try:
        with without_gather_hooks(model):
            yield
    finally:
        for module, kind, state in before:
            module.__class__ = kind
            module.__dict__.update(state)


@contextlib.contextmanager
def placeholder_weights(model: nn.Module) -> Iterator[None]:
    """Context manager: replaces linear layers' DTensor weights by placeholders of the whole shape that take no memory.

    PEFT makes adapters in the shape of the weight, and takes FSDP2 for tensor parallelism unless it knows the name of the mesh.
    """
    before = []
    for module in model.modules():
        own: Any = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
        if isinstance(own, nn.Parameter) and is_dtensor(own):
            shape = torch.empty(1, dtype=own.dtype, device=own.device).expand(own.shape)
            module.weight = nn.Parameter(shape, requires_grad=own.requires_grad)
            before.append((module, own))
    try:
        yield
    finally:
        for module, own in before:
            own.requires_grad_(module.weight.requires_grad)
            module.weight = own


def gathers_weights(model: nn.Module) -> bool:
    """Whether a forward pass gathers weights from several ranks (FSDP2, ZeRO-3)."""
    return any(True for _ in _states(model)) or any(map(is_zero, model.parameters()))


def is_model_sharded(model: nn.Module) -> bool:
    """Whether any parameter or buffer is one rank's part of a larger tensor."""
    return any(True for _ in _states(model)) or any(map(is_sharded, (*model.parameters(), *model.buffers())))


def has_deepspeed_engine(model: nn.Module) -> bool:
    """Whether `deepspeed.initialize` was called with the model: its engine has registered hooks."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any((getattr(hook, "__module__", None) or "").startswith("deepspeed") for hook in hooks)


def reshard_model(model: nn.Module) -> None:
    """Reshard weights that FSDP2 still holds whole since the last forward pass, so that all ranks see the same sharding."""
    for module, _ in _states(model):
        module.reshard()  # type: ignore[operator]


def prepare_sharded(model: nn.Module, targets: Mapping[str, nn.Module], job: Job, strategy: str = "auto") -> bool:
    """Check that the covariances of a sharded model can be computed, and reshard it. Collective if it is sharded.

    Args:
        model: any.
        targets: name → linear layer.
        job: the processes that work together.
        strategy: of `nullspace.stream_covariances`.

    Returns:
        Whether the model is sharded. All ranks are then synchronised: a gather may follow.

    Raises:
        ValueError: naming the layer or the ranks, and what would work, if a target's input is split, or if the job's processes
            cannot compute together.
    """
    _refuse_wrappers(model)
    if not is_model_sharded(model) and not _cut_by_hand(model):
        return False
    reshard_model(model)
    gathered, together = _groups(model)
    for name, layer in targets.items():
        if _is_cut_along_input(name, layer, gathered):
            raise InputError(
                f"{name!r} receives only a part of its input on each rank (tensor parallelism, split along d_in). {INSTEAD}."
            )
    _refuse_absent(gathered, job)
    members = set(job.ranks)
    both = next((sorted(ranks & members) for ranks in together if len(ranks & members) > 1), None)
    if both is not None:
        raise InputError(
            f"ranks {_listed(both)} compute the same layers together (tensor parallelism) and have to read the same batches, but a "
            "job of both splits the batches between them: use job=Job.alone(), with which each does all of it, or "
            "job=Job(group), the group of the mesh's data-parallel dimension (mesh['dp'].get_group())"
        )
    if strategy == "resident":
        _refuse_without_hooks(model)
    if strategy == "layerwise" and together and gathered:
        raise InputError(
            "strategy='layerwise' gathers weights whole, and some of these are split by tensor parallelism too: use "
            "strategy='resident'"
        )
    job.check_same(targets=list(targets))
    return True


def prepare_to_gather(model: nn.Module, job: Job) -> bool:
    """Check that the weights of a sharded model can be gathered, and reshard it. Collective if it is sharded.

    Returns:
        Whether the model is sharded. All ranks are then synchronised: a gather may follow.

    Raises:
        ValueError: saying what would work, for weights that cannot be gathered.
    """
    _refuse_wrappers(model)
    if not is_model_sharded(model) and not _cut_by_hand(model):
        return False
    reshard_model(model)
    _refuse_cut_by_hand(model)
    _refuse_absent(set.union(*map(set, _groups(model))), job)
    job.exchange(None)
    return True


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether ranks compute with parts of weights."""
    return bool(_groups(model)[1])


def sharded_strategy(model: nn.Module, check_chain: Callable[[], object]) -> str:
    """The strategy that `"auto"` chooses for a sharded model.

    Args:
        model: checked by `prepare_sharded`.
        check_chain: raises `ValueError` if the model's blocks are not a chain.
    """
    gathered, together = _groups(model)
    if not gathered or together:
        return "resident"
    try:
        check_chain()
    except ValueError:
        _refuse_without_hooks(model)
        return "resident"
    return "layerwise"


def layer_input(name: str, before: Any, after: Any) -> torch.Tensor:
    """A layer's input as a plain tensor; `before` itself where hooks have only made a new tensor of the same memory.

    Hooks of tensor parallelism and of ZeRO-3 do so for each of the layers that share one input, which share it by identity.

    Args:
        name: of the layer.
        before: its argument ahead of the hooks of others.
        after: its argument behind them.

    Raises:
        ValueError: naming the layer, if `after` is only a part of the input.
    """
    x = after
    if is_dtensor(after):
        if not all(p.is_replicate() for p in after.placements):
            raise InputError(f"{name!r} receives only a part of its input on each rank ({after.placements}). {INSTEAD}.")
        with torch.no_grad():
            x = after.to_local()
        if type(x) is not torch.Tensor:  # the result of a collective that may still run
            x = x.contiguous()
    same = (
        isinstance(before, torch.Tensor)
        and not is_dtensor(before)
        and (before.data_ptr(), before.shape, before.stride(), before.dtype) == (x.data_ptr(), x.shape, x.stride(), x.dtype)
    )
    return before if same else x


def _groups(model: nn.Module) -> tuple[set[frozenset[int]], set[frozenset[int]]]:
    """Groups of ranks that gather weights from each other, and groups that compute with parts; without groups of one rank."""
    of_fsdp: set[frozenset[int]] = set()
    for _, state in _states(model):
        groups = getattr(state, "_fsdp_param_groups", None)
        for each in [state._fsdp_param_group] if groups is None else groups:
            mesh = None if each is None else each.mesh_info.mesh
            of_fsdp |= set() if mesh is None else {_ranks(mesh.get_group(dim)) for dim in range(mesh.ndim)}
    gathered: set[frozenset[int]] = set()
    together: set[frozenset[int]] = set()
    for parameter in model.parameters():
        if is_zero(parameter):
            gathered.add(_ranks(parameter.ds_process_group))  # type: ignore[attr-defined]
        elif is_dtensor(parameter):
            for dim, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
                ranks = _ranks(parameter.device_mesh.get_group(dim))  # type: ignore[attr-defined]
                if not placement.is_replicate():
                    (gathered if ranks in of_fsdp else together).add(ranks)
    if _cut_by_hand(model):
        together.add(frozenset(range(dist.get_world_size())) if dist.is_initialized() else frozenset())
    return {ranks for ranks in gathered if len(ranks) > 1}, {ranks for ranks in together if len(ranks) > 1}


def _ranks(group: Any) -> frozenset[int]:
    return frozenset(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))


def _is_cut_along_input(name: str, layer: nn.Module, gathered: set[frozenset[int]]) -> bool:
    if isinstance(layer, ExpertMatrix):  # along E too: expert parallelism
        placed: Any = layer.stack
        groups = range(len(placed.placements)) if is_dtensor(placed) else ()
        cut = [i for i in groups if placed.placements[i].is_shard()]
        return any(len(r := _ranks(placed.device_mesh.get_group(i))) > 1 and r not in gathered for i in cut)
    weight: Any = weight_of(layer)
    along = 0 if is_conv1d(layer) else 1
    if is_dtensor(weight):
        cut = [i for i, p in enumerate(weight.placements) if p.is_shard() and p.dim % weight.ndim == along]
        return any(len(r := _ranks(weight.device_mesh.get_group(i))) > 1 and r not in gathered for i in cut)
    return _is_plain_part(layer) and weight.shape[1] != layer.in_features


def _cut_by_hand(model: nn.Module) -> bool:
    """Whether plain tensors are parts of weights: earlier versions of transformers shard so for tensor parallelism."""
    return (getattr(model, "tp_size", None) or 1) > 1 and any(map(_is_plain_part, model.modules()))


def _is_plain_part(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear) or type(layer.weight) is not nn.Parameter or is_zero(layer.weight):
        return False
    return layer.weight.is_floating_point() and layer.weight.shape != (layer.out_features, layer.in_features)


def _refuse_wrappers(model: nn.Module) -> None:
    if any(_is_a(module, "FullyShardedDataParallel") for module in model.modules()):
        raise InputError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which keeps weights in flat parameters that are no layer's: "
            "use fully_shard (FSDP2; accelerate: fsdp_version=2), or load the model with a device_map or in host memory, for "
            "strategy='layerwise'"
        )
    if type(model).__name__ == "DeepSpeedEngine":
        raise InputError("this is a DeepSpeedEngine: give its model, engine.module")


def _refuse_absent(gathered: set[Any], job: Job) -> None:
    members = set(job.ranks)
    missing = next((ranks for ranks in gathered if not ranks <= members), None)
    if missing is not None:
        raise InputError(
            f"the weights are sharded over ranks {_listed(missing)}, and {_listed(missing - members)} is not in this job: it would "
            "not take part in gathering them. Let all of them work together (without job=, or a Job of a group that has all), or "
            "give each process an unsharded model"
        )


def _refuse_cut_by_hand(model: nn.Module) -> None:
    if _cut_by_hand(model):
        raise InputError(
            "the model's weights are split between ranks (tensor parallelism) as plain tensors, which cannot be gathered: load it "
            "whole or with a device_map, or shard it with fully_shard (FSDP2)"
        )


def _refuse_without_hooks(model: nn.Module) -> None:
    if any(map(is_zero, model.parameters())) and not has_deepspeed_engine(model):
        raise InputError(
            "the weights are partitioned (ZeRO-3), and without an engine nothing gathers them in a forward pass: call "
            "deepspeed.initialize and give engine.module, or use strategy='layerwise'"
        )


def _listed(ranks: Any) -> str:
    return ", ".join(map(str, sorted(ranks)))
