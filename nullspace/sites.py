"""Which linear layers, and which of them share one input.

A *target* is a linear layer that the user asked for, under its name in `model.named_modules()`. A *site* is one input: its
*members* are the targets that are handed the very same tensor (q, k and v; gate and up), so one sum serves them all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from nullspace.parts import shape_of
from nullspace.wrappers import named_modules, unwrap


@dataclass(frozen=True)
class Site:
    """One input of the model and the linear layers that hear it.

    Attributes:
        members: names of the layers, in the order in which they were called.
        d_in: width of the input.
    """

    members: tuple[str, ...]
    d_in: int

    @property
    def name(self) -> str:
        """The first member's name, which stands for the site."""
        return self.members[0]

    def __str__(self) -> str:
        return self.name


def find_targets(model: nn.Module, targets: str | Iterable[str] = "all-linear") -> dict[str, nn.Module]:
    """The linear layers (`nn.Linear` and its subclasses, transformers' `Conv1D`) that `targets` names.

    Args:
        model: any module; wrappers are left out, of it and of its parts (`nullspace.wrappers`).
        targets: `"all-linear"`: every linear layer but the output head. Another string: a regular expression that must match
            a whole module name. A list: names, or endings of names behind a dot (`"q_proj"`), as PEFT's `target_modules`.

    Returns:
        Module name → layer, in the model's own order; never empty.

    Raises:
        ValueError: if an entry, or the expression, matches nothing or a module that is not linear, if one layer is
            registered under two names, or if the model carries an adapter of PEFT's.
    """
    model = unwrap(model)
    modules = named_modules(model)  # a layer's second name is no typing error
    adapter = next((name for name, module in modules.items() if _carries_adapter(module)), None)
    if adapter is not None:
        raise ValueError(f"the model already carries a LoRA adapter or another of PEFT's ({adapter!r}); merge or unload it first")
    if targets == "all-linear":
        head = output_head(model)
        found = {name: m for name, m in modules.items() if name and is_linear(m) and m is not head}
        if not found:
            raise ValueError(f"'all-linear': {type(model).__name__} has no linear layer")
    elif isinstance(targets, str):
        found = _match_expression(modules, targets)
    else:
        found = _match_endings(modules, list(targets))
    _refuse_repeated(model, found)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes y = W x (+ b): `nn.Linear` or transformers' `Conv1D`, or a subclass of one."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D`, which stores its weight as (d_in, d_out)."""
    return _is_a(module, "Conv1D", "transformers.pytorch_utils")


def _carries_adapter(module: nn.Module) -> bool:
    return _is_a(module, "BaseTunerLayer", "peft.tuners.tuners_utils")


def _is_a(module: nn.Module, name: str, defined_in: str) -> bool:
    """Whether a module is of a class of another library, which is not imported for the question."""
    return any(c.__name__ == name and c.__module__ == defined_in for c in type(module).__mro__)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, whatever the layout of its storage (quantised layers included)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    d_in, d_out = shape_of(weight_of(module))
    return d_out, d_in


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight as the layer stores it: (d_out, d_in), or (d_in, d_out) for `Conv1D`; packed if it is quantised."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to the vocabulary or to classes, where the model says which one that is."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None and hasattr(model, "config") and "Classification" in type(model).__name__:
        # transformers' convention for classification heads, which are new and have nothing to preserve.
        head = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    return head


def _match_expression(modules: dict[str, nn.Module], expression: str) -> dict[str, nn.Module]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(f"targets={expression!r} is not a regular expression ({error}); for one name, use a list") from None
    matched = {name: m for name, m in modules.items() if name and pattern.fullmatch(name)}
    found = {name: m for name, m in matched.items() if is_linear(m)}
    if not found:
        what = f"matches only modules that are not linear, such as {next(iter(matched))!r}" if matched else "matches no module"
        raise ValueError(
            f"targets={expression!r} {what}. A string is a regular expression for whole module names, "
            f"such as {_example(modules)!r}; for endings of names, use a list. {_names(modules)}"
        )
    return found


def _match_endings(modules: dict[str, nn.Module], endings: list[str]) -> dict[str, nn.Module]:
    if not endings:
        raise ValueError("targets is empty")
    wanted: set[str] = set()
    for ending in endings:
        matched = [name for name in modules if name and (name == ending or name.endswith(f".{ending}"))]
        if not matched:
            last_parts = {name.rpartition(".")[2] for name, m in modules.items() if is_linear(m)}
            close = difflib.get_close_matches(ending.rpartition(".")[2], sorted(last_parts), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"target {ending!r} matches no module.{hint} {_names(modules)}")
        wrong = next((name for name in matched if not is_linear(modules[name])), None)
        if wrong is not None:
            raise ValueError(f"target {ending!r} matches {wrong!r}, which is {type(modules[wrong]).__name__}, not a linear layer")
        wanted.update(matched)
    return {name: m for name, m in modules.items() if name in wanted}


def _refuse_repeated(model: nn.Module, found: dict[str, nn.Module]) -> None:
    first = {id(module): name for name, module in reversed(found.items())}
    for name, module in named_modules(model).items():
        if first.get(id(module), name) != name:
            raise ValueError(
                f"{first[id(module)]!r} and {name!r} are the same layer registered twice: an adapter would replace only one of "
                "them. Leave it out of targets, or give each place its own layer."
            )


def _names(modules: dict[str, nn.Module]) -> str:
    last_parts = list(dict.fromkeys(name.rpartition(".")[2] for name, m in modules.items() if name and is_linear(m)))
    return f"Linear layers here end in: {', '.join(last_parts[:20])}."


def _example(modules: dict[str, nn.Module]) -> str:
    last = next((name.rpartition(".")[2] for name, m in modules.items() if name and is_linear(m)), "q_proj")
    return rf".*\.{last}"
