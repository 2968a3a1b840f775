"""Models of published shapes on one GPU: the bare forward pass, ours, and PEFT's CorDA preprocessing; time and peak device memory.

    python -m benchmarks.gpu_models [--model Llama-3-8B] [--blocks 4] [--seconds 540]
    python -m benchmarks.gpu_models --model tiny --device cpu --samples 4 --length 64 --rank 8     # a dry run, for tests

Workload: random weights in bf16 (`benchmarks.shapes`, massive activations planted), 256 × 1024 tokens in batches of 4, all seven
projections, rank 128. The depth is cut to `--blocks`, since all blocks are alike; figures for the whole depth are extrapolated by
block, and marked so.

A run is one fresh process, the variants take turns within a round, and no process outlives `--seconds`: what does not fit is left
out and named. The result is written after every run. `seconds` is the work alone. Apart from it stand, of every run:

- `startup_s`: python and imports, the CUDA context, cuBLAS and cuSOLVER;  `build_s`: making the model;
- `compile_s`: a warm-up that compiles the kernels and gives the libraries their workspaces: a batch through the model, and for each
  width a launch's worth of random rows, summed and solved;
- `on_device_s`: what the sums and the solves take on their streams, by events (side by side with other work, where they are);
- `peak_gb` (`torch.cuda.max_memory_allocated`), `reserved_gb` (`max_memory_reserved`), and both above the weights, without
  the warm-up (on a CPU, anonymous memory above that before the model).

Variants:

- `forward`: the model over the batches, nothing else.
- `sums`, `sums-layerwise`: `stream_covariances`, which sums and solves nothing; less `forward` that is what recording costs.
- `resident`, `layerwise-device`, `-host`, `-disk`: `compute_null_spaces`; where the weights are. Hidden states in pinned host
  memory, but for `layerwise-device`, which keeps them on the device; `layerwise` keeps the weights on the device and them in host
  memory. Where the weights are on the device, `inject_adapters` follows, and counts.
- `corda`: PEFT's `preprocess_corda`, one sample a call (it takes nothing else), on `--corda-blocks` blocks and `--corda-samples`
  samples.
- `capped`, `capped-six`: the Llama-3-70B shape, two blocks, layerwise from the host, with 24 GB of device memory; all seven
  projections, and without down_proj, whose 28,672 columns a full `eigh` would want 26 GB for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.children import PeakMemory, run_child, seconds_since_start
from benchmarks.environment import RESULTS, write_result
from benchmarks.first_gpu.command import start_device
from benchmarks.gpu_variants import (
    CAP,
    CAPPED_BLOCKS,
    CAPPED_MODEL,
    ONCE,
    OURS,
    SUMS,
    VARIANTS,
    make_model,
    synchronize,
    warm_up,
    work_of,
)
from benchmarks.spans import Spans

WORKLOAD = ("model", "blocks", "samples", "length", "batch_size", "rank", "device", "corda_blocks", "corda_samples")


@contextlib.contextmanager
def peak_memory(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Of what is run inside, into the mapping that is yielded; on a GPU also above what was there before."""
    import torch

    figures: dict[str, float] = {}
    if options.device != "cuda":
        with PeakMemory() as peak:
            yield figures
        figures["peak_gb"] = peak.bytes / 1e9
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    yield figures
    torch.cuda.synchronize()
    figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    figures["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    figures["peak_above_weights_gb"] = figures["peak_gb"] - before[0] / 1e9
    figures["reserved_above_weights_gb"] = figures["reserved_gb"] - before[1] / 1e9


def run_variant(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """One variant in this process."""
    import torch

    from nullspace import Covariance, solvers
    from nullspace.artifacts.locks import temporary_folder

    startup = {"python and imports": seconds_since_start(), **start_device(options.device)}
    # On a CPU the model is counted too: its memory is what the host's plans forecast.
    with temporary_folder() as folder, PeakMemory() as whole:
        build, model = timed(options, lambda: make_model(options, variant, str(folder)))
        if options.device == "cuda" and variant.startswith("capped"):
            torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(0).total_memory))
        seconds, compiling, result = 0.0, 0.0, dict[str, Any]()
        memory, spans = dict[str, float](), dict[str, float]()
        try:
            compiling, _ = timed(options, lambda: warm_up(options, model, variant))
            with peak_memory(options) as memory, Spans(sums=(Covariance, "update"), solves=(solvers, "partial_eigh")) as watch:
                seconds, result = timed(options, lambda: work_of(options, model, variant))
            spans = watch.seconds()
        except torch.OutOfMemoryError as error:
            result = {"out_of_memory": str(error).splitlines()[0][:300]}
    if options.device != "cuda":
        memory["peak_gb"] = whole.bytes / 1e9
    return {
        "variant": variant,
        "blocks": model.config.num_hidden_layers,
        "seconds": seconds,
        "startup_s": startup,
        "build_s": build,
        "compile_s": compiling,
        "on_device_s": spans,
        **memory,
        **result,
    }


def timed(options: argparse.Namespace, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done, and the result."""
    synchronize(options)
    began = time.perf_counter()
    result = run()
    synchronize(options)
    return time.perf_counter() - began, result


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
    bare = {(run["round"], run["blocks"]): run["seconds"] for run in good if run["variant"] == "forward"}
    summary: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        mine = [run for run in good if run["variant"] == variant]
        if not mine:
            continue
        seconds = statistics.median(run["seconds"] for run in mine)
        ratios = [run["seconds"] / bare[run["round"], run["blocks"]] for run in mine if (run["round"], run["blocks"]) in bare]
        summary[variant] = {
            "seconds": seconds,
            "time_over_forward": statistics.median(ratios) if ratios and variant not in ONCE else None,
            "leak": mine[0].get("leak"),
            **{key: max(run[key] for run in mine) for key in mine[0] if key.endswith("_gb")},
        }
        if not variant.startswith("capped"):
            whole = seconds * depth / mine[0]["blocks"]
            summary[variant]["extrapolated_seconds_all_blocks"] = whole
    for variant, (strategy, weights, hidden) in OURS.items():
        recorded = next((name for name, way in SUMS.items() if way == (strategy, weights, hidden)), None)
        if {variant, recorded, "forward"} <= summary.keys():
            parts = [summary[name]["seconds"] for name in ("forward", recorded, variant)]  # type: ignore[index]
            summary[variant]["parts_s"] = {
                "forward": parts[0],
                "sums": parts[1] - parts[0],
                "solves and injection, beyond what is hidden": parts[2] - parts[1],
            }
    return summary


def run_in_turn(
    options: argparse.Namespace, order: Iterable[tuple[int, str]], until: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Each (round, variant) in a process of its own; what did not fit into the time or the memory says so.

    Args:
        options: of the command line, with the workload.
        order: what to run.
        until: on `time.perf_counter`'s clock.
        keep: gets every run as soon as it is done, or why there is none: `left_out`.
    """
    arguments = [text for name in WORKLOAD for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    walls: dict[str, float] = {}
    for number, variant in order:
        left = until - time.perf_counter()
        if left < walls.get(variant, 10.0):
            keep({"round": number, "variant": variant, "blocks": options.blocks, "left_out": f"{left:.0f} s were left"})
            continue
        done = run_child("benchmarks.gpu_models", ["--run", variant, *arguments], timeout=left)
        walls[variant] = done["wall"]
        keep({"round": number, "variant": variant, "blocks": options.blocks, **done})


def parser_of() -> argparse.ArgumentParser:
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
    return parser


def main() -> None:
    options = parser_of().parse_args()
    if options.run:
        print(json.dumps(run_variant(options, options.run)))
        return
    from benchmarks import shapes

    depth, forecast_gb = shapes.config(options.model).num_hidden_layers, forecasts(options)
    name = f"gpu-models-{options.model}-{environment_name(options.device)}"
    runs: list[dict[str, Any]] = []

    def keep(run: dict[str, Any]) -> None:
        runs.append(run)
        path = write_result(name, content_of(options, runs, depth, forecast_gb), options.results)
        print(f"{described(run)}  ({path})", flush=True)

    # What is run once comes after the first round, so that a short budget has one of each before it has two of any.
    order = [(r, v) for r in range(options.rounds) for v in options.variants if r == 0 or v not in ONCE]
    run_in_turn(options, order, time.perf_counter() + options.seconds, keep)
    for variant, figures in summarise(runs, depth).items():
        ratio = f"{figures['time_over_forward']:6.2f} x" if figures["time_over_forward"] else "       –"
        forecast = f" (forecast {forecast_gb[variant]:.2f})" if variant in forecast_gb else ""
        print(f"{variant:16} {figures['seconds']:8.1f} s {ratio}  peak {figures['peak_gb']:6.2f} GB{forecast}")
        if "extrapolated_seconds_all_blocks" in figures:
            print(f"{'':16} {figures['extrapolated_seconds_all_blocks']:8.0f} s for all {depth} blocks, EXTRAPOLATED")


def content_of(
    options: argparse.Namespace, runs: list[dict[str, Any]], depth: int, forecast_gb: dict[str, float]
) -> dict[str, Any]:
    """The result so far."""
    done = [run for run in runs if "left_out" not in run]
    return {
        "workload": {name: getattr(options, name) for name in WORKLOAD},
        "extrapolated": "extrapolated_seconds_all_blocks is seconds · depth / blocks; nobody has measured it",
        "summary": summarise(done, depth),
        "forecast_gb": forecast_gb,
        "left_out": [described(run) for run in runs if not done or run not in done],
        "runs": done,
    }


def described(run: dict[str, Any]) -> str:
    """A run in a line."""
    what = f"round {run['round']}  {run['variant']:16}"
    if "left_out" in run or "failed" in run:
        return f"{what} {run.get('left_out') or run['failed']}"
    if "out_of_memory" in run:
        return f"{what} out of memory: {run['out_of_memory']}"
    return f"{what} {run['seconds']:8.1f} s  peak {run['peak_gb']:.2f} GB  compiled in {run['compile_s']:.1f} s"


def environment_name(device: str) -> str:
    """Of the device, for a file's name."""
    import torch

    return torch.cuda.get_device_name().replace(" ", "-") if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
