"""The chain of blocks of a transformer: which modules a layerwise pass goes through, one after the other."""

from __future__ import annotations

from torch import nn

from nullspace.errors import InputError
from nullspace.model.linear import is_linear
from nullspace.model.wrappers import unwrapped


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has two inputs, of which one is generated."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a model passes its hidden states through, in order.

    They are the modules whose class descends from transformers' `GradientCheckpointingLayer`; where there are none, the modules of
    the one `nn.ModuleList` (or `nn.Sequential`) of equal classes with linear layers inside.

    Returns:
        Module name → block; never empty.

    Raises:
        ValueError: if there are no such modules, or they are not one chain: encoder–decoder models, vision towers beside a language
            model. Whether they are called one after the other is seen only when the model runs.
    """
    if is_encoder_decoder(model):
        raise InputError(_refusal(model, "is an encoder–decoder model, whose decoder reads the encoder's output in every block"))
    with unwrapped(model):
        outer = marked_blocks(model) or _equal_lists(model)
    if not outer:
        raise InputError(_refusal(model, "has no list of blocks"))
    chains = list(dict.fromkeys(name.rpartition(".")[0] for name in outer))
    if len(chains) > 1:
        raise InputError(_refusal(model, f"has {len(chains)} chains of blocks ({', '.join(map(repr, chains[:4]))})"))
    return outer


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


def _refusal(model: nn.Module, why: str) -> str:
    return f"strategy='layerwise' cannot run {type(model).__name__}: it {why}. Use strategy='resident'."
