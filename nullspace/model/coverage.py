"""Which share of a model's matrices some layers have, and why others are no layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from nullspace.model.experts import ExpertMatrix, holds_experts, is_fused, named_layers, stacks_of
from nullspace.model.linear import is_linear, output_head, weight_of, weight_shape
from nullspace.model.quantised import packed_experts
from nullspace.model.sharded_tensors import shape_of
from nullspace.model.wrappers import unwrap


def matrices(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> Iterator[tuple[str, int]]:
    """Name and number of entries of every linear layer's weight and every expert's matrix (by the layer's name), and of other
    parameters with two axes or more (by their own); embeddings and output head left out, tied ones once.

    `modules` are the model's `named_layers`, if they are known.
    """
    model = unwrap(model)
    head, seen = output_head(model), set[int]()
    linear: list[str] = []
    modules = named_layers(model) if modules is None else modules
    once = {id(module): name for name, module in reversed(modules.items())}
    for name, module in modules.items():
        if once[id(module)] != name:
            continue
        if isinstance(module, ExpertMatrix):
            yield name, math.prod(weight_shape(module))
            continue
        seen.update(id(getattr(module, stack)) for stack in (stacks_of(module) if is_fused(module) else ()))
        if isinstance(module, nn.Embedding) or module is head or any(name.startswith(f"{each}.") for each in linear[-1:]):
            seen.update(id(p) for p in module.parameters(recurse=False))
            continue
        if is_linear(module):
            linear.append(name)
            weight = weight_of(module)
            if id(weight) not in seen:
                yield name, math.prod(weight_shape(module))
            seen.add(id(weight))
            continue
        packed = packed_experts(module)
        yield from ((f"{name}.{own}", size) for own, size in packed.items())
        seen.update(id(p) for p in (module.parameters(recurse=False) if packed else ()))
        for own, parameter in module.named_parameters(recurse=False):
            shape = shape_of(parameter)
            if len(shape) > 1 and id(parameter) not in seen and not own.endswith("bias"):  # experts have one bias each
                yield f"{name}.{own}" if name else own, math.prod(shape)
            seen.add(id(parameter))


def matrix_parameters(model: nn.Module) -> int:
    """The number of parameters in the model's matrices, embeddings and output head aside."""
    return sum(size for _, size in matrices(model))


def covered_share(model: nn.Module, names: Iterable[str]) -> float:
    """The share of the parameters in the model's matrices (embeddings and output head aside) that these layers have."""
    sizes, wanted = dict(matrices(model)), set(names)
    return sum(size for name, size in sizes.items() if name in wanted) / max(sum(sizes.values()), 1)


def why_no_layer(holder: nn.Module) -> str:
    """Why a parameter of a module is no target."""
    kind = type(holder).__name__
    if packed_experts(holder):
        return f"is quantised in {kind}: load the model dequantised (dequantize=True in its quantization_config) for its experts"
    if holds_experts(holder):
        return f"is a parameter of {kind}, a class of experts whose forward pass cannot be replaced, so that they cannot be summed"
    return f"is a parameter of {kind}, not a linear layer"


def listed_by_kind(reasons: Mapping[str, str], most: int = 6) -> str:
    """The count, and the first of each kind (names that differ in numbers alone) with its reason."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        kinds.setdefault((re.sub(r"\d+", "", name), re.sub(r"'.*?'", "", why)), []).append(name)
    parts = []
    for names in list(kinds.values())[:most]:
        more = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        parts.append(f"{names[0]!r}{more} {reasons[names[0]]}")
    parts += ["…"] if len(kinds) > most else []
    what = "layer" if len(reasons) == 1 else "layers or parameters"
    return f"{len(reasons)} {what}: {'; '.join(parts)}"
