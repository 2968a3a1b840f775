"""What can be done to a trained change afterwards, beside filters: PEFT's reduction of intruder dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.intruders import reduce_intruder_dimension

from benchmarks.holding_parts import factors_of, with_adapters
from nullspace.factors import LowRank

REDUCED = "reduced"


def intruder(model: Any, change: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """PEFT's `reduce_intruder_dimension` (arXiv 2410.21228) of a change, with PEFT's own settings.

    Among the 10 leading left singular vectors of W₀ + ΔW, those with a cosine below 0.5 to every one of W₀ are intruders. 0.75 of
    their part of W₀ + ΔW is left, and what this makes of ΔW is cut to the adapter's rank.

    Args:
        model: the base, whose weights no change was added to. It is as it was afterwards, but for `requires_grad`.
        change: layer → A (r, d_in) and B (d_out, r), of one rank in all layers.

    Returns:
        layer → A and B of the reduced adapter, of the same shapes; those of a layer without intruders are as they were.

    Cost: three whole SVDs a layer.
    """
    peft_model: Any = with_adapters(model, {"default": change})
    try:
        reduce_intruder_dimension(peft_model, new_adapter_name=REDUCED, logging_sink=None)
        return factors_of(peft_model, REDUCED)
    finally:
        peft_model.unload()
