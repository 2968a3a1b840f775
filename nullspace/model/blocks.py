"""The chains of blocks of a model: an encoder's and a decoder's, a vision tower's and a language model's.

A layerwise pass goes through the blocks of one chain, one after the other, and runs the rest of the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from nullspace.errors import InputError
from nullspace.model.linear import is_linear, weight_shape
from nullspace.model.wrappers import named_modules, unwrapped


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has two inputs, of which one is generated."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def find_blocks(model: nn.Module, targets: Mapping[str, nn.Module] | None = None) -> dict[str, nn.Module]:
    """The blocks that a layerwise pass goes through, in order.

    They are the modules whose class descends from transformers' `GradientCheckpointingLayer`; where there are none, the modules of
    each `nn.ModuleList` (or `nn.Sequential`) of equal classes with linear layers inside. Of several chains, it is the one whose
    targets have the most parameters; a vision or audio tower's is taken only if the language model's has no targets.

    Args:
        model: any module.
        targets: module name → linear layer; all linear layers by default.

    Returns:
        Module name → block; never empty.

    Raises:
        ValueError: if there are no such modules. Whether they are called one after the other is seen only when the model runs.
    """
    with unwrapped(model):
        blocks = marked_blocks(model) or _equal_lists(model)
    if not blocks:
        raise InputError(_refusal(model, "has no list of blocks"))
    if targets is None:
        targets = {name: module for name, module in named_modules(model).items() if is_linear(module)}
    beside = {} if is_encoder_decoder(model) else split_towers(model, blocks)[1]
    sizes: dict[str, int] = {}
    for name in blocks:
        inside = (math.prod(weight_shape(m)) for n, m in targets.items() if n == name or n.startswith(f"{name}."))
        chain = name.rpartition(".")[0]
        sizes[chain] = sizes.get(chain, 0) + sum(inside)
    of_text = {name.rpartition(".")[0] for name in blocks.keys() - beside.keys()}
    # The last of several that are equal: an encoder is run as it is more easily than a decoder, whose blocks read its output.
    chosen = max(reversed(list(sizes)), key=lambda chain: (sizes[chain] > 0, chain in of_text, sizes[chain]))
    return {name: block for name, block in blocks.items() if name.rpartition(".")[0] == chosen}


def split_towers(model: nn.Module, blocks: Mapping[str, nn.Module]) -> tuple[str, dict[str, str]]:
    """The text's part of a model, and the towers beside it, such as a vision model's.

    The text's blocks lie in a list beside the token embeddings, or share the most of their path with them.

    Returns:
        The name of the part that the token embeddings and their blocks share ("" for the model itself), and the other blocks:
        block → name of its tower.
    """
    embedding = _embedding_name(model)
    paths = {name: tuple(name.split(".")) for name in blocks}
    shared = {name: _common(path, embedding) for name, path in paths.items()}
    depth = max(shared.values(), default=0)
    text = {name for name, path in paths.items() if path[:-2] == embedding[:-1]} or {
        name for name, common in shared.items() if common == depth
    }
    beside = {name: ".".join(path[: shared[name] + 1]) for name, path in paths.items() if name not in text}
    return ".".join(embedding[:depth]), beside


def marked_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that descend from transformers' `GradientCheckpointingLayer`, one chain or not; maybe none."""
    with unwrapped(model):
        marked = {name: m for name, m in model.named_modules() if _is_marked(m)}
    return {name: m for name, m in marked.items() if not any(name.startswith(f"{other}.") for other in marked)}


def refuse_chain(model: nn.Module, why: str) -> ValueError:
    """The error for blocks that turn out, while the model runs, not to be a chain."""
    return InputError(_refusal(model, why))


def _is_marked(module: nn.Module) -> bool:
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def _equal_lists(model: nn.Module) -> dict[str, nn.Module]:
    blocks: dict[str, nn.Module] = {}
    for name, parent in model.named_modules():
        children = dict(parent.named_children())
        inside = any(name == other or name.startswith(f"{other}.") for other in blocks)
        equal = len({type(child) for child in children.values()}) == 1
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) and len(children) > 1 and equal and not inside:
            prefix = f"{name}." if name else ""
            if all(any(is_linear(part) for part in child.modules()) and not is_linear(child) for child in children.values()):
                blocks.update({prefix + key: child for key, child in children.items()})
    return blocks


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _embedding_name(model: nn.Module) -> tuple[str, ...]:
    """The path of the token embeddings: those that the model names, or its largest."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        named = get() if callable(get) else None
    except NotImplementedError:
        named = None
    embeddings = {name: m for name, m in named_modules(model).items() if m is named or isinstance(m, nn.Embedding)}
    name = max(embeddings, key=lambda n: (embeddings[n] is named, getattr(embeddings[n], "num_embeddings", 0)), default="")
    return tuple(name.split(".")) if name else ()


def _refusal(model: nn.Module, why: str) -> str:
    return f"strategy='layerwise' cannot run {type(model).__name__}: it {why}. Use strategy='resident'."
