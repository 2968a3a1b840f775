"""Models of published shapes on one GPU: the bare forward pass, ours, and PEFT's CorDA preprocessing; time and peak device memory.

    python -m benchmarks.gpu_models [--model Llama-3-8B] [--blocks 4] [--seconds 540]
    python -m benchmarks.gpu_models --model tiny --device cpu --samples 4 --length 64 --rank 8     # a dry run, for tests

Workload: random weights in bf16 (`benchmarks.shapes`, massive activations planted), 256 × 1024 tokens in batches of 4, all seven
projections, rank 128. The depth is cut to `--blocks`, since all blocks are alike and a decomposition of 14,336 columns in float64
takes many seconds; figures for the whole depth are extrapolated by block, and marked so. Not timed: making the model.

A run is one fresh process, the variants take turns within a round, and no process outlives `--seconds`: what does not fit is left
out and named. Peak memory is `torch.cuda.max_memory_allocated`, the model's weights included (on a CPU, anonymous memory
above that before the model).

- `forward`: the model over the batches, nothing else.
- `resident`, `layerwise-device`, `-host`, `-disk`: `compute_null_spaces`; where the weights are. Hidden states in pinned host
  memory, but for `layerwise-device`, which keeps them on the device.
- `corda`: PEFT's `preprocess_corda`, one sample a call (it takes nothing else), on `--corda-blocks` blocks and `--corda-samples`
  samples.
- `capped`, `capped-six`: the Llama-3-70B shape, two blocks, layerwise from the host, with 24 GB of device memory; all seven
  projections, and without down_proj, whose 28,672 columns want 26 GB for a full `eigh`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.children import PeakMemory, run_child
from benchmarks.environment import RESULTS, write_result

OURS = {
    "resident": ("resident", "device", "device"),
    "layerwise-device": ("layerwise", "device", "device"),
    "layerwise-host": ("layerwise", "host", "host"),
    "layerwise-disk": ("layerwise", "disk", "host"),
    "capped": ("layerwise", "host", "host"),
    "capped-six": ("layerwise", "host", "host"),
}
VARIANTS = ["forward", *list(OURS)[:4], "corda", "capped", "capped-six"]
ONCE = ("corda", "capped", "capped-six")
CAP = 24e9
CAPPED_MODEL, CAPPED_BLOCKS = "Llama-3-70B", 2


def make_model(options: argparse.Namespace, variant: str, folder: str) -> Any:
    """With its weights where the variant wants them; always made on the device that computes, where that is quick."""
    import torch

    from benchmarks import shapes

    name, blocks = options.model, options.blocks
    if variant == "corda":
        blocks = options.corda_blocks
    elif variant.startswith("capped") and options.device == "cuda":
        name, blocks = CAPPED_MODEL, CAPPED_BLOCKS
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = shapes.build(name, device=options.device, dtype=dtype, blocks=blocks, massive=True)
    place = OURS.get(variant, ("", "device", ""))[1]
    if place != "device":
        model = model.to("cpu")
    if place == "disk":
        from accelerate import disk_offload

        disk_offload(model, folder, execution_device=torch.device(options.device))
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return model


def make_batches(options: argparse.Namespace, model: Any, samples: int) -> list[dict[str, Any]]:
    """Random tokens; the first one of every sequence is the one with massive activations."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (samples, options.length), generator=generator)
    ids[:, 0] = 0
    return [{"input_ids": part} for part in ids.split(options.batch_size)]


def forward(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        for batch in make_batches(options, model, options.samples):
            model(input_ids=batch["input_ids"].to(options.device), use_cache=False, logits_to_keep=1)
    return {}


def ours(options: argparse.Namespace, model: Any, variant: str) -> dict[str, Any]:
    from benchmarks.shapes import PROJECTIONS
    from nullspace import compute_null_spaces

    strategy, _, hidden_states = OURS[variant]
    wanted: dict[str, Any] = {"device": options.device, "hidden_states": hidden_states} if strategy == "layerwise" else {}
    targets = [name for name in PROJECTIONS if variant != "capped-six" or name != "down_proj"]
    marks: dict[str, float] = {}

    def mark(stage: str, done: int, total: int | None, tokens: int) -> None:
        marks[stage] = time.perf_counter()

    began = time.perf_counter()
    spaces = compute_null_spaces(
        model,
        make_batches(options, model, options.samples),
        rank=options.rank,
        targets=targets,
        strategy=strategy,
        progress=mark,
        tolerance=float("inf"),  # the fast sums alone: a second pass would be another measurement
        **wanted,
    )
    each = [spaces[site.name] for site in spaces.sites]
    return {
        "stages": {stage: at - began for stage, at in marks.items()},
        "sites": len(each),
        "leak": {"median": statistics.median(s.leak for s in each), "max": max(s.leak for s in each)},
        "excess_estimate_max": max(s.excess_estimate for s in each),
        "precisions": sorted({s.precision for s in each}),
    }


def corda(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    from benchmarks.shapes import PROJECTIONS

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        init_lora_weights="corda",
        target_modules=PROJECTIONS,
        corda_config=CordaConfig(corda_method="kpm"),
    )
    batches = make_batches(options, model, options.corda_samples)
    marks: dict[str, float] = {}

    def run_model() -> None:
        with torch.no_grad():
            for batch in batches:
                for sample in batch["input_ids"].split(1):
                    model(input_ids=sample.to(options.device), use_cache=False, logits_to_keep=1)
        if options.device == "cuda":
            torch.cuda.synchronize()
        marks["forward and sums"] = time.perf_counter() - began

    began = time.perf_counter()
    preprocess_corda(model, config, run_model=run_model)
    return {"stages": marks, "samples": options.corda_samples}


def run_variant(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """One variant in this process."""
    import torch

    from nullspace.artifacts.locks import temporary_folder

    cuda = options.device == "cuda"
    with temporary_folder() as folder, PeakMemory() as peak:
        model = make_model(options, variant, str(folder))
        if cuda and variant.startswith("capped"):
            torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(0).total_memory))
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result: dict[str, Any]
        try:
            if variant == "forward":
                result = forward(options, model)
            elif variant == "corda":
                result = corda(options, model)
            else:
                result = ours(options, model, variant)
        except torch.OutOfMemoryError as error:
            result = {"out_of_memory": str(error).splitlines()[0][:300]}
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    used = torch.cuda.max_memory_allocated() if cuda else peak.bytes
    blocks = model.config.num_hidden_layers
    return {"variant": variant, "blocks": blocks, "seconds": seconds, "peak_gb": used / 1e9, **result}


def forecasts(options: argparse.Namespace) -> dict[str, float]:
    """The forecast of `nullspace.planning` for each variant's peak, in GB."""
    import torch

    from benchmarks import shapes
    from nullspace.planning.forecast import forecast
    from nullspace.planning.plan import Workload

    forecast_gb: dict[str, float] = {}
    for variant, (strategy, weights, hidden) in OURS.items():
        capped = variant.startswith("capped") and options.device == "cuda"
        name, blocks = (CAPPED_MODEL, CAPPED_BLOCKS) if capped else (options.model, options.blocks)
        work = Workload(
            samples=options.samples,
            length=options.length,
            batch_size=options.batch_size,
            rank=options.rank,
            targets=[p for p in shapes.PROJECTIONS if variant != "capped-six" or p != "down_proj"],
            device=options.device,
        )
        empty = shapes.empty(name, blocks=blocks, dtype=torch.bfloat16 if options.device == "cuda" else torch.float32)
        if options.device == "cpu":
            weights, hidden = ("disk" if weights == "disk" else "host"), "host"
        for plan in forecast(empty, work):
            if (plan.strategy, plan.weights) == (strategy, weights) and hidden == plan.hidden_states:
                forecast_gb[variant] = (plan.device_bytes or plan.host_bytes) / 1e9
    return forecast_gb


def summarise(runs: list[dict[str, Any]], depth: int) -> dict[str, dict[str, Any]]:
    """Medians over the rounds; time over the forward pass within a round; the whole depth by extrapolation."""
    good = [run for run in runs if "failed" not in run and "out_of_memory" not in run]
    bare = {run["round"]: run["seconds"] for run in good if run["variant"] == "forward"}
    summary: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        mine = [run for run in good if run["variant"] == variant]
        if not mine:
            continue
        seconds = statistics.median(run["seconds"] for run in mine)
        ratios = [run["seconds"] / bare[run["round"]] for run in mine if run["round"] in bare]
        summary[variant] = {
            "seconds": seconds,
            "time_over_forward": statistics.median(ratios) if ratios and variant not in ONCE else None,
            "peak_gb": statistics.median(run["peak_gb"] for run in mine),
            "leak": mine[0].get("leak"),
        }
        if not variant.startswith("capped"):
            whole = seconds * depth / mine[0]["blocks"]
            summary[variant]["extrapolated_seconds_all_blocks"] = whole
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3-8B")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=530.0, help="after which nothing runs any more")
    parser.add_argument("--corda-blocks", type=int, default=1)
    parser.add_argument("--corda-samples", type=int, default=256)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_variant(options, options.run)))
        return
    ends = time.perf_counter() + options.seconds
    names = ("model", "blocks", "samples", "length", "batch_size", "rank", "device", "corda_blocks", "corda_samples")
    arguments = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    runs: list[dict[str, Any]] = []
    left_out: list[str] = []
    walls: dict[str, float] = {}
    # What is run once comes after the first round, so that a short budget has one of each before it has two of any.
    order = [(r, v) for r in range(options.rounds) for v in options.variants if r == 0 or v not in ONCE]
    for round_number, variant in order:
        left = ends - time.perf_counter()
        if left < walls.get(variant, 10.0):
            left_out.append(f"{variant}, round {round_number}: {left:.0f} s were left")
            continue
        done = run_child("benchmarks.gpu_models", ["--run", variant, *arguments], timeout=left)
        runs.append({"round": round_number, "variant": variant, **done})
        walls[variant] = done["wall"]
        if "failed" in done:
            left_out.append(f"{variant}, round {round_number}: {done['failed']}")
        elif "out_of_memory" in done:
            left_out.append(f"{variant}, round {round_number}: out of memory after {done['seconds']:.0f} s")
        else:
            print(f"round {round_number}  {variant:16} {done['seconds']:8.1f} s  peak {done['peak_gb']:.2f} GB", flush=True)
    from benchmarks import shapes

    depth = shapes.config(options.model).num_hidden_layers
    summary, forecast_gb = summarise(runs, depth), forecasts(options)
    for variant, figures in summary.items():
        ratio = f"{figures['time_over_forward']:6.2f} x" if figures["time_over_forward"] else "       –"
        leak = f"  leak {figures['leak']['median']:.2e}" if figures["leak"] else ""
        forecast = f" (forecast {forecast_gb[variant]:.2f})" if variant in forecast_gb else ""
        print(f"{variant:16} {figures['seconds']:8.1f} s {ratio}  peak {figures['peak_gb']:6.2f} GB{forecast}{leak}")
        if "extrapolated_seconds_all_blocks" in figures:
            print(f"{'':16} {figures['extrapolated_seconds_all_blocks']:8.0f} s for all {depth} blocks, EXTRAPOLATED")
    for line in left_out:
        print(f"left out: {line}")
    device = environment_name(options.device)
    content = {
        "workload": {name: getattr(options, name) for name in names},
        "extrapolated": "extrapolated_seconds_all_blocks is seconds · depth / blocks; nobody has measured it",
        "summary": summary,
        "forecast_gb": forecast_gb,
        "left_out": left_out,
        "runs": runs,
    }
    print(f"wrote {write_result(f'gpu-models-{options.model}-{device}', content, options.results)}")


def environment_name(device: str) -> str:
    """Of the device, for a file's name."""
    import torch

    return torch.cuda.get_device_name().replace(" ", "-") if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
