"""Whether padding on the left moves the positions of the tokens behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nullspace.devices import upload
from nullspace.model.blocks import marked_blocks
from nullspace.model.sharded_tensors import is_sharded


def positions_move(model: nn.Module, inputs: Mapping[str, Any], mask: torch.Tensor) -> bool:
    """Whether padding on the left moves the positions of the tokens behind it: absolute ones, counted from the padding on.

    Compares the inputs of the first block for one padded text and for the same text alone. The model runs no further.

    Args:
        model: in eval mode; gradients are off.
        inputs: of one batch, as the model takes them.
        mask: (sequences, tokens) bool, with padding on the left in at least one sequence.
    """
    ids, kinds = inputs.get("input_ids"), inputs.get("token_type_ids")
    others = set(inputs) - {
        "input_ids",
        "attention_mask",
        "decoder_attention_mask",
        "token_type_ids",
        "labels",
        "decoder_input_ids",
    }
    if not isinstance(ids, torch.Tensor) or ids.shape != mask.shape or others or any(map(is_sharded, model.parameters())):
        return False
    row = int(((~mask[:, 0]) & mask.any(dim=1)).to(torch.int8).argmax())
    counts = upload(mask[row], ids.device)
    padded = {"input_ids": ids[row][None], "attention_mask": counts[None].to(ids.dtype)}
    if isinstance(kinds, torch.Tensor):
        padded["token_type_ids"] = kinds[row][None]
    alone = {name: value[:, counts] for name, value in padded.items()}
    with_padding, without = _first_hidden_states(model, padded), _first_hidden_states(model, alone)
    if with_padding is None or without is None or with_padding.shape[:2] != (1, len(counts)):
        return False
    with_padding, scale = with_padding[:, counts], float(without.abs().max())
    return with_padding.shape == without.shape and not torch.allclose(with_padding, without, rtol=1e-2, atol=1e-2 * scale)


def _first_hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The input of a model's first block, (sequences, tokens, d); None if there is no such block or input."""
    hidden: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        hidden.extend(value for value in values[:1] if isinstance(value, torch.Tensor) and value.ndim == 3)
        raise _Reached

    handles = [block.register_forward_pre_hook(stop, with_kwargs=True) for block in marked_blocks(model).values()]
    try:
        if handles:
            model(**inputs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return hidden[0] if hidden else None


class _Reached(BaseException):
    """The first block was called. Not an `Exception`, which the model might catch."""
