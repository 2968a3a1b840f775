"""Resident against layerwise: time and peak memory, against the bare forward pass, on a real model.

    python -m benchmarks.layerwise [--rounds 3]      # writes benchmarks/results/layerwise-cpu.json

Workload and method are those of `benchmarks.peers`: SmolLM2-135M in float32, 16 × 512 tokens in batches of 4, all 210 linear
layers, rank 32, on the CPU; one fresh process a run, the variants taking turns within a round, ratios within a round, medians.
Measured is `compute_null_spaces` without injection; loading and tokenising are not timed.

- `forward`: the model over the batches, nothing else.
- `resident`, `layerwise`: `compute_null_spaces` with this strategy; `layerwise` keeps hidden states in the host's memory.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from benchmarks.children import peak_bytes, show_summary, take_turns
from benchmarks.environment import write_result
from benchmarks.peers import RANK, WORKLOAD, checkpoint_of_demo_model, forward, parser_of, setup, summarise

VARIANTS = ["forward", "resident", "layerwise"]


def calibrate(model: Any, batches: Any, strategy: str) -> dict[str, Any]:
    from nullspace import compute_null_spaces

    options: dict[str, Any] = {"hidden_states": "host"} if strategy == "layerwise" else {}
    began = time.perf_counter()
    spaces = compute_null_spaces(model, batches, rank=RANK, strategy=strategy, progress=False, **options)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "leak": statistics.median(spaces[site.name].leak for site in spaces.sites)}


def run_variant(variant: str, checkpoint: str) -> dict[str, Any]:
    model, batches = setup(checkpoint)
    loaded = peak_bytes()
    if variant == "forward":
        result: dict[str, Any] = {"seconds": forward(model, batches)["forward"]}
    else:
        result = calibrate(model, batches, variant)
    peak = peak_bytes()
    return {"variant": variant, **result, "peak_gb": peak / 1e9, "loaded_gb": loaded / 1e9}


def main() -> None:
    options = parser_of(__doc__, VARIANTS).parse_args()
    if options.run:
        print(json.dumps(run_variant(options.run, str(options.checkpoint))))
        return
    checkpoint = checkpoint_of_demo_model(options.checkpoint)
    runs = take_turns("benchmarks.layerwise", VARIANTS, options.rounds, ["--checkpoint", checkpoint])
    summary = summarise(runs, VARIANTS)
    show_summary(summary)
    print(f"\nwrote {write_result('layerwise-cpu', {'workload': WORKLOAD, 'summary': summary, 'runs': runs})}")


if __name__ == "__main__":
    main()
