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


def waits_a_batch(masks: str, **options: Any) -> collections.Counter[tuple[str, str, str]]:
    """(kind, line, operation) → waits that each batch adds, those of the model's own code left out."""
    padding, masked, place = MASKS[masks]
    counts = []
    for number in (2, 4):
        with simulated_cuda() as simulation, simulated_kernels(simulation):
            model = model_of("llama").to("cuda")
            batches = [{name: value.to(place) for name, value in batch.items()} for batch in batches_of(padding, masked=masked)]
            simulation.waits.clear()
            for _ in stream_covariances(model, batches[:number], progress=False, **options):
                pass
            counts.append(collections.Counter((w.kind, w.line, w.why) for w in simulation.waits if w.kind != "model"))
    added = counts[1] - counts[0]
    return collections.Counter({what: count / 2 for what, count in added.items()})


def reads(waits: collections.Counter[tuple[str, str, str]]) -> float:
    return sum(count for (kind, *_), count in waits.items() if kind == "read")


@pytest.mark.parametrize("masks", MASKS)
def test_resident(masks: str) -> None:
    waits = waits_a_batch(masks, strategy="resident")
    assert reads(waits) == (2 if "already" in masks else 1), waits


@pytest.mark.parametrize("hidden_states", ["device", "host"])
@pytest.mark.parametrize("masks", MASKS)
def test_layerwise(masks: str, hidden_states: str) -> None:
    waits = waits_a_batch(masks, strategy="layerwise", hidden_states=hidden_states)
    assert reads(waits) == (4 if "already" in masks else 3), waits
