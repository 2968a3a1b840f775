"""A calibration of a mixture of 64 experts: time against its bare forward pass, and peak memory against the forecast.

    python -m benchmarks.experts [--rounds 3]      # writes benchmarks/results/experts-cpu.json

A Qwen3-MoE of random weights in float32: 4 blocks of width 512 with 64 experts of inner width 256, 8 experts a token; 16 × 512
random tokens in batches of 4, so that an expert gets 1,024 on average; rank 32; on the CPU. One fresh process a run, the variants
taking turns within a round, ratios within a round, medians. A first batch, not timed, warms every process up.

- `forward`: the model over the batches, nothing else, by transformers' own function for experts.
- `sums-each`, `sums-pooled`: `stream_covariances` with this choice for experts: the calibration, without the eigenproblems.
- `spaces-each`, `spaces-pooled`: `compute_null_spaces`, with them: 64 + 64 of experts a block, or 1 + 64. Their memory is
  compared with the plan's: the peak of anonymous memory above that before the model was made, looked at every 2 ms; 15 % either
  way is wanted.

Ratios are of processor seconds of this process (one thread with `OMP_NUM_THREADS=1`) and of the clock; on a machine with other work
the former say more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

from benchmarks.children import PeakMemory, take_turns
from benchmarks.environment import write_result

VARIANTS = ["forward", "sums-each", "sums-pooled", "spaces-each", "spaces-pooled"]
SHAPE = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2000,
    "max_position_embeddings": 2048,
}
RANK, LENGTH, BATCH_SIZE = 32, 512, 4


def model_of(shape: dict[str, int]) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape)).eval()


def batches_of(samples: int, shape: dict[str, int], length: int = LENGTH) -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    size = min(BATCH_SIZE, samples)
    return [
        {"input_ids": torch.randint(0, shape["vocab_size"], (size, length), generator=generator)} for _ in range(samples // size)
    ]


def run_variant(variant: str, samples: int, shape: dict[str, int] = SHAPE, length: int = LENGTH) -> dict[str, Any]:
    """Seconds, and bytes measured and forecast, of one variant in this process."""
    import torch

    from nullspace import compute_null_spaces, stream_covariances

    batches = batches_of(samples, shape, length)
    with PeakMemory() as peak:
        model = model_of(shape)
        with torch.no_grad():
            model(**batches[0])
        what, _, experts = variant.partition("-")
        began, processor = time.perf_counter(), time.process_time()
        if what == "forward":
            with torch.no_grad():
                for batch in batches:
                    model(**batch, logits_to_keep=1)
        elif what == "sums":
            for _ in stream_covariances(model, batches, experts=experts, strategy="resident", progress=False):
                pass
        else:
            compute_null_spaces(model, batches, rank=RANK, experts=experts, strategy="resident", progress=False)
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
    result = {"variant": variant, "seconds": seconds, "processor_seconds": processor}
    result |= {"measured_bytes": peak.bytes, "peak_gb": peak.bytes / 1e9}
    if what == "spaces":
        result["forecast_bytes"] = forecast_bytes(model, batches, experts)
        result["forecast_over_measured"] = result["forecast_bytes"] / peak.bytes
    return result


def forecast_bytes(model: Any, batches: list[dict[str, Any]], experts: str) -> float:
    """Host memory by the plan of a resident run."""
    import torch

    from nullspace.planning.forecast import forecast
    from nullspace.planning.plan import Rates, Workload

    size, length = batches[0]["input_ids"].shape
    workload = Workload(samples=size * len(batches), length=length, batch_size=size, rank=RANK, device="cpu", weights="host")
    rates = replace(Rates.of("cpu", torch.float32), estimated=True)
    plans = forecast(model, replace(workload, rates=rates, experts=experts))
    return next(plan for plan in plans if plan.strategy == "resident").host_bytes


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, of the time against that of the round's own forward pass."""
    bare = {run["round"]: run for run in runs if run["variant"] == "forward"}
    summary = {}
    for variant in VARIANTS:
        own = [run for run in runs if run["variant"] == variant]
        summary[variant] = {
            "seconds": statistics.median(run["seconds"] for run in own),
            "time_over_forward": statistics.median(run["seconds"] / bare[run["round"]]["seconds"] for run in own),
            "processor_over_forward": statistics.median(
                run["processor_seconds"] / bare[run["round"]]["processor_seconds"] for run in own
            ),
            "peak_gb": statistics.median(run["peak_gb"] for run in own),
        }
        if variant.startswith("spaces"):
            summary[variant]["forecast_over_measured"] = statistics.median(run["forecast_over_measured"] for run in own)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_variant(options.run, options.samples)))
        return
    runs = take_turns("benchmarks.experts", VARIANTS, options.rounds, ["--samples", str(options.samples)])
    summary = summarise(runs)
    for variant, row in summary.items():
        print(f"{variant:14} " + "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    workload = {"shape": SHAPE, "samples": options.samples, "length": LENGTH, "batch_size": BATCH_SIZE, "rank": RANK}
    print(f"\nwrote {write_result('experts-cpu', {'workload': workload, 'summary': summary, 'runs': runs})}")


if __name__ == "__main__":
    main()
