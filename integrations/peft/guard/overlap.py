"""`overlap`: how far an adapter reads the directions that earlier ones read, as a term of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from peft import PeftModel

from nullspace import factors
from nullspace.errors import InputError
from nullspace.integrations.peft.guard.adapted import adapted_layers
from nullspace.integrations.peft.guard.gauge import values_of


def overlap(
    peft_model: PeftModel, rows: Mapping[str, torch.Tensor], *, adapter_name: str | None = None
) -> Callable[[], torch.Tensor]:
    """A function that returns Σ |A A_iᵀ| over the adapter's layers, O-LoRA's term (arXiv 2310.14152): `loss + 0.5 * apart()`.

    0.5 is λ in the authors' scripts. For an A that is orthogonal from the start, and stays so because it is frozen, give the rows
    as `avoid=` to `compute_null_spaces` (`lora-null` and `b-zero`).

    Args:
        peft_model: with the adapter that trains.
        rows: module name → (m, d_in), the rows of the A of earlier adapters (`row_spaces`). Layers without any add nothing.
        adapter_name: of the adapter that trains; needed where the earlier ones are active beside it.

    Returns:
        A function without arguments. Its value is a float32 scalar on the device of the first layer, with the gradient of A; it is
        collective if the adapter is sharded.

    Cost: 2 · m · r · d_in flops a layer, and twice as much for the gradient.

    Raises:
        TypeError: if the model is no `PeftModel`.
        ValueError: if no layer of the adapter has rows; naming the layer, if its rows are of another width; as `Gauge` for the
            adapter.
    """
    layers = [each for each in adapted_layers(peft_model, adapter_name, dora=True, experts=True) if each.name in rows]
    if not layers:
        raise InputError(f"rows: none of their layers has an adapter here; their names are like {next(iter(rows), None)!r}")
    for each in layers:
        if rows[each.name].ndim != 2 or rows[each.name].shape[1] != each.a.shape[1]:
            raise InputError(f"rows: those of {each.name!r} should be (m, {each.a.shape[1]}), not {tuple(rows[each.name].shape)}")
    earlier = [rows[each.name].detach().to(each.a.device, torch.float32) for each in layers]

    def apart() -> torch.Tensor:
        with torch.autocast(layers[0].a.device.type, enabled=False):
            terms = [factors.overlap(values_of(each.a), before) for each, before in zip(layers, earlier, strict=True)]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    return apart
