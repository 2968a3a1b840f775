"""Forecast against measurement: peak memory of `compute_null_spaces` on the CPU, and what `nullspace.planning` says of it.

    python -m benchmarks.plan_check [--model half-gigabyte] [--blocks N]     # writes benchmarks/results/plan-check-cpu.json

Each strategy in a fresh process: a model of random weights in float32, 2 batches of 4 × 512 tokens, rank 64. Measured: the peak of
anonymous memory above that before the model was made, looked at every 2 ms. 15 % either way is wanted. What no forecast knows: what
the C library keeps of freed memory.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

from benchmarks.children import PeakMemory, run_child
from benchmarks.environment import write_result

STRATEGIES = ("resident", "layerwise")


def run(strategy: str, name: str, blocks: int | None, batch_size: int, length: int, rank: int) -> dict[str, Any]:
    import torch

    from benchmarks import shapes
    from nullspace import compute_null_spaces
    from nullspace.planning.forecast import forecast
    from nullspace.planning.plan import Rates, Workload

    workload = Workload(samples=2 * batch_size, length=length, batch_size=batch_size, rank=rank, device="cpu", weights="host")
    empty = shapes.empty(name, blocks=blocks, dtype=torch.float32)
    rates = replace(Rates.of("cpu", torch.float32), estimated=True)
    plans = forecast(empty, replace(workload, rates=rates))
    plan = next(p for p in plans if p.strategy == strategy and p.hidden_states == "host")
    generator = torch.Generator().manual_seed(0)
    vocabulary = empty.config.vocab_size
    loader = [{"input_ids": torch.randint(1, vocabulary, (batch_size, length), generator=generator)} for _ in range(2)]
    # PyTorch's and LAPACK's own buffers are there before: they are no part of any plan but as `libraries`.
    options: dict[str, Any] = {"hidden_states": "host"} if strategy == "layerwise" else {}
    with PeakMemory() as peak:
        model = shapes.build(name, blocks=blocks, dtype=torch.float32)
        began = time.perf_counter()
        compute_null_spaces(model, loader, rank=rank, strategy=strategy, progress=False, tolerance=float("inf"), **options)
        seconds = time.perf_counter() - began
    return {
        "strategy": strategy,
        "forecast_bytes": plan.host_bytes,
        "measured_bytes": peak.bytes,
        "forecast_over_measured": plan.host_bytes / peak.bytes,
        "parts": dict(plan.host_parts),
        "forecast_seconds": plan.total_seconds,
        "measured_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="half-gigabyte")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--run", choices=STRATEGIES, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="write no result")
    options = parser.parse_args()
    settings = (options.model, options.blocks, options.batch_size, options.length, options.rank)
    if options.run:
        print(json.dumps(run(options.run, *settings)))
        return
    arguments = ["--model", options.model, "--batch-size", str(options.batch_size)]
    arguments += ["--length", str(options.length), "--rank", str(options.rank)]
    arguments += ["--blocks", str(options.blocks)] if options.blocks else []
    runs = []
    for strategy in STRATEGIES:
        runs.append({"strategy": strategy, **run_child("benchmarks.plan_check", ["--run", strategy, *arguments])})
        print(strategy, {k: v for k, v in runs[-1].items() if k != "strategy"}, flush=True)
    if not options.dry_run:
        print(f"wrote {write_result('plan-check-cpu', {'workload': vars(options), 'runs': runs})}")


if __name__ == "__main__":
    main()
