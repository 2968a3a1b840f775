"""How often the host waits for a simulated GPU: counted as what each further batch adds."""

from __future__ import annotations

import collections
from typing import Any

import pytest

pytest.importorskip("simulated.runtime", exc_type=ImportError)

from simulated.kernels import simulated_kernels
from simulated.references import batches_of, model_of
from simulated.runtime import simulated_cuda

from nullspace import stream_covariances

# The mask, and the device that it is on.
MASKS = {
    "no mask": (None, False, "cpu"),
    "nothing is padding": (None, True, "cpu"),
    "padding left": ("left", True, "cpu"),
    "padding right": ("right", True, "cpu"),
    "padding left, already on the device": ("left", True, "cuda"),
}


def waits_a_batch(masks: str, *, family: str = "llama", **options: Any) -> collections.Counter[tuple[str, str, str]]:
    """(kind, line, operation) → waits that each batch adds, those of the model's own code left out."""
    padding, masked, place = MASKS[masks]
    counts = []
    for number in (2, 4):
        with simulated_cuda() as simulation, simulated_kernels(simulation):
            model = model_of(family).to("cuda")
            batches = [{name: value.to(place) for name, value in batch.items()} for batch in batches_of(padding, masked=masked)]
            simulation.waits.clear()
            for _ in stream_covariances(model, batches[:number], progress=False, **options):
                pass
            counts.append(collections.Counter((w.kind, w.line, w.why) for w in simulation.waits if w.kind != "model"))
    added = counts[1] - counts[0]
    return collections.Counter({what: count / 2 for what, count in added.items()})


def check(waits: collections.Counter[tuple[str, str, str]], reads: int) -> None:
    """So many waits for a result, and none for a copy to the device."""
    assert sum(count for (kind, *_), count in waits.items() if kind == "read") == reads, waits
    assert all(kind == "read" for kind, *_ in waits), waits


@pytest.mark.parametrize("masks", MASKS)
def test_resident(masks: str) -> None:
    """One: the check for NaN and Inf, a batch later. One more for a mask that only the device has."""
    check(waits_a_batch(masks, strategy="resident"), 1 + ("already" in masks))


@pytest.mark.parametrize("hidden_states", ["device", "host", "disk"])
@pytest.mark.parametrize("masks", ["nothing is padding", "padding left", "padding left, already on the device"])
def test_layerwise(masks: str, hidden_states: str) -> None:
    """One a batch and block, of three. On the way to the disk, one for each tensor, the one before, which has arrived."""
    waits = waits_a_batch(masks, strategy="layerwise", hidden_states=hidden_states)
    stored = sum(count for (_, line, _), count in waits.items() if "hidden_states" in line)
    assert stored <= 6 * (hidden_states == "disk")
    check(waits, 3 + stored + ("already" in masks))


@pytest.mark.parametrize(
    ("experts", "masks", "a_layer"),
    [
        ("each", "nothing is padding", 1),
        ("each", "padding left", 3),
        ("pooled", "nothing is padding", 2),
        ("pooled", "padding left", 3),
    ],
)
def test_fused_experts(experts: str, masks: str, a_layer: int) -> None:
    """One, and in each of two layers: one for how many tokens each expert has, and others for which of them count."""
    waits = waits_a_batch(masks, family="qwen3_moe", strategy="resident", experts=experts)
    check(waits, 1 + 2 * a_layer)
