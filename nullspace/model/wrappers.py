"""A model without the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`, around it or its parts.

A graph that was compiled before a hook was registered does not call it, and wrappers put `_orig_mod.` and `module.` in front of the
names of layers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: Any) -> Any:
    """The model inside of all wrappers around it. Anything that is no wrapper is returned as it is."""
    while isinstance(model, nn.Module):
        if isinstance(model, _PARALLEL):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile(model)
            model = model._orig_mod
        else:
            break
    return model


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Context manager: no part of a model is wrapped or compiled. The exit restores the wrappers."""
    children: list[tuple[dict[str, Any], str, nn.Module, nn.Module]] = []
    entries: list[tuple[nn.Module, str, Any]] = []
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and unwrap(child) is not child:
                children.append((module._modules, key, child, unwrap(child)))
        if module.__dict__.get("_compiled_call_impl") is not None:  # module.compile()
            entries.append((module, "_compiled_call_impl", None))
        original = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
        if original is not None and "_orig_mod" not in module._modules:  # module.forward = torch.compile(module.forward)
            entries.append((module, "forward", original))
    before = [module.__dict__[name] for module, name, _ in entries]
    for of, key, _, inner in children:
        of[key] = inner
    for module, name, value in entries:
        module.__dict__[name] = value
    try:
        yield
    finally:
        for (module, name, _), value in zip(entries, before, strict=True):
            module.__dict__[name] = value
        for of, key, child, inner in children:
            if of.get(key) is inner:  # not replaced meanwhile
                of[key] = child


def without_graphs() -> contextlib.AbstractContextManager[Any]:
    """Context manager: compiled functions run uncompiled, also those that other libraries call."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, as `nn.Module.named_modules` with repeated modules; names are those without wrappers."""
    with unwrapped(model):
        return dict(model.named_modules(remove_duplicate=False))
