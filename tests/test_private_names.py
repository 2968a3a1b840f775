"""Private names of other libraries: the page that lists them is complete, and the installed versions have them."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from scipy.linalg import cython_lapack
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.models.mixtral import modeling_mixtral

ROOT = Path(__file__).parents[1]
PACKAGES = ("nullspace", "integrations", "csrc_triton")
# Documented in spite of the underscore, or our own names in strings and on objects of others.
PUBLIC = {"_asdict", "_replace", "_fields"}
OURS = {"_lost", "_nullspace_was_shared"}
# Names that we define too.
SHARED = {"_modules", "_version"}
CONTRACT = "torch.distributed._composable.contract"


def listed() -> dict[str, str]:
    """Name → library, of the page."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs" / "private-names.md").read_text(), re.MULTILINE)
    return dict(rows)


def sources() -> dict[Path, ast.Module]:
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {file: ast.parse(file.read_text()) for file in files if not any(part.is_symlink() for part in file.parents)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def used(tree: ast.Module) -> Iterator[str]:
    """Private attributes, modules, and strings that look like either."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if is_private(node.attr) and ast.unparse(node.value) not in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("nullspace"):
            yield from filter(is_private, [*(node.module or "").split("."), *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            yield from filter(is_private, node.value.split("."))


def test_the_page_lists_every_private_name_and_no_other() -> None:
    trees = sources()
    own = {name for tree in trees.values() for name in defined(tree)} | PUBLIC | OURS
    names = {name for tree in trees.values() for name in used(tree)}
    missing = {name for name in names if name not in listed() and (name not in own or name in SHARED)}
    assert not missing, {name: [str(f) for f, tree in trees.items() if name in used(tree)] for name in missing}
    text = "\n".join(file.read_text() for file in trees)
    gone = [name for name in listed() if not (name in names if is_private(name) else re.search(rf"\b{name}\b", text))]
    assert not gone, f"the page lists names that are not used any more: {gone}"


def module_of(layer: nn.Module) -> nn.Module:
    add_hook_to_module(layer, ModelHook())
    return layer


def sharded() -> Any:
    return fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))._get_fsdp_state()


def said_in(package: str, pattern: str) -> bool:
    """Whether the files of a package, which is not imported, hold an expression."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    files = (file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.py"))
    return any(re.search(pattern, file.read_text(errors="replace")) for file in files)


def either(*names: str) -> Callable[[], bool]:
    return lambda: any(said_in("transformers.distributed", rf"\b{name}\b") for name in names)


EXISTS: dict[str, Callable[[], Any]] = {
    "_pytree": lambda: torch.utils._pytree.tree_map_only and torch.utils._pytree.tree_flatten,
    "_python_dispatch": lambda: torch.utils._python_dispatch.TorchDispatchMode,
    "_cdata": lambda: torch.empty(1).untyped_storage()._cdata,
    "_local_scalar_dense": lambda: torch.ops.aten._local_scalar_dense.default,
    "_overloadpacket": lambda: torch.ops.aten.mm.default._overloadpacket is torch.ops.aten.mm,
    "_experts_implementation": lambda: hasattr(MixtralConfig(), "_experts_implementation"),
    "_experts_implementation_internal": lambda: "_experts_implementation_internal" in vars(MixtralConfig()),
    "_tp_size": lambda: hasattr(PreTrainedModel, "_tp_size"),
    "_apply_gate": lambda: modeling_mixtral.MixtralExperts._apply_gate,
    "_version": lambda: torch.zeros(1).add_(1)._version == 1,
    "_forward_pre_hooks": lambda: isinstance(nn.Linear(1, 1)._forward_pre_hooks, dict),
    "_forward_hooks": lambda: isinstance(nn.Linear(1, 1)._forward_hooks, dict),
    "_modules": lambda: "0" in nn.Sequential(nn.Linear(1, 1))._modules,
    "_non_persistent_buffers_set": lambda: isinstance(nn.Linear(1, 1)._non_persistent_buffers_set, set),
    "_compiled_call_impl": lambda: nn.Linear(1, 1)._compiled_call_impl is None,
    "_orig_mod": lambda: "_orig_mod" in torch.compile(nn.Linear(1, 1))._modules,
    "_torchdynamo_orig_callable": lambda: torch.compile(nn.Linear(1, 1).forward)._torchdynamo_orig_callable,
    "_dynamo": lambda: importlib.util.find_spec("torch._dynamo"),
    "_get_default_store": lambda: dist.distributed_c10d._get_default_store(),
    "_composable": lambda: all(hasattr(sys.modules[CONTRACT], key) for key in ("STATE_KEY", "REGISTRY_KEY")),
    "_get_fsdp_state": sharded,
    "_mp_policy": lambda: sharded()._mp_policy.cast_forward_inputs,
    "_fsdp_param_groups": lambda: sharded_mesh(sharded()),
    "_fsdp_param_group": lambda: sharded_mesh(sharded()),
    "_hf_hook": lambda: module_of(nn.Linear(1, 1))._hf_hook,
    "_old_forward": lambda: module_of(nn.Linear(1, 1))._old_forward,
    "_from_config": lambda: PreTrainedModel._from_config,
    "_model_mapping": lambda: AutoModelForCausalLM._model_mapping,
    "_device_mesh": either("_device_mesh"),
    "_mesh_manager": either("_mesh_manager", "_device_mesh"),
    **{
        name: lambda name=name: said_in("deepspeed", rf"\b(param|tensor|self\.__param)\.{name} =")
        for name in ("ds_status", "ds_tensor", "ds_shape", "ds_process_group")
    },
    "ds_numel": lambda: said_in("deepspeed", r"\bds_tensor\.ds_numel ="),
    "packing_format_for_cpu": lambda: said_in("bitsandbytes", r"\bpacking_format_for_cpu\b"),
    "__pyx_capi__": lambda: "dsytrd" in cython_lapack.__pyx_capi__,
    "_context": lambda: hasattr(filelock.FileLock("unused")._context, "lock_file_fd"),
}


def sharded_mesh(state: Any) -> Any:
    """Either name, by the version of torch."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return (state._fsdp_param_group if groups is None else groups[0]).mesh_info.mesh


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", listed())
def test_the_installed_version_has_it(name: str) -> None:
    assert EXISTS[name]() not in (None, False)
