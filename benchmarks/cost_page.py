"""The page on what one GPU takes (`benchmarks/results/cost.md`): the model's forecast, its rates, and measurements beside it.

    python -m benchmarks.cost_page                   # writes cost.md from the model and the files in benchmarks/results
    python -m benchmarks.cost_page --gpu FOLDER      # prints it, with the results of benchmarks.first_gpu in FOLDER beside it

Every line says whether its figure is a forecast or was measured. Results of `benchmarks.first_gpu` that are kept are in folders
`benchmarks/results/first_gpu-<device>`. On a CPU the model is checked against what is measured there: rates are fitted to one file,
and others are predicted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost_model import H100, Gpu, Price, Seconds, Work, measured_on, price, results_in
from benchmarks.environment import RESULTS
from nullspace.solvers import decomposition_cost

WORKS = (Work("Llama-3-8B"), Work("Qwen3-8B"), Work("Llama-3-70B", weights="host"))
WIDTHS = (4096, 11008, 14336, 28672)
TOKENS = 16384
Row = Sequence[str]


def page(gpus: Mapping[str, Mapping[str, Any]], results: Path = RESULTS) -> str:
    """The whole page.

    Args:
        gpus: name of a folder → the results of `benchmarks.first_gpu` in it.
        results: the folder with the results of the CPU.
    """
    measured = "".join(f"\n\n{_beside(name, found)}" for name, found in gpus.items())
    nothing = "**Nothing on this page was measured on a GPU yet**: the six commands of `benchmarks/first_gpu` will do that."
    return f"""# What a calibration takes on one GPU

Made by `python -m benchmarks.cost_page` from the model in `benchmarks/cost_model.py`. Every line says what its figure is:
**forecast** (from data sheets, compiled code and guesses, which the second section names), **fitted** or **measured**.
{"What was measured on a GPU is at the end." if gpus else nothing}

## Forecasts

{chr(10).join(_priced(work) for work in WORKS)}
One site, seconds:

{_table(["d", "what", "seconds", "status"], [row for d in WIDTHS for row in _site(d, H100)])}

## Rates

{_rates(H100)}

Counted: flops of the model's products and of causal attention; whole waves of tiles of 128 over {H100.multiprocessors}
multiprocessors, windows of 128 tokens at {H100.clock / 1e9:g} GHz; the float64 triangle read and written once a launch; rows copied
once; the columns of shift-invert's space at its first check. Not in the model: reading and tokenising data, loading, the output
head, injection, compiling. "× forward" is over the middle of the forward pass's range.

## The model beside measurements on a CPU

The same counts (flops of the model, n · d² of sums, `nullspace.solvers.decomposition_cost`), over rates that are fitted to the
lines marked so. What is predicted is off by what stands beside it.

{_table(["file", "what", "measured, s", "model, s", "status"], _cpu(results))}{measured}
"""


def _priced(work: Work) -> str:
    found = price(work)
    where = "all weights on the device" if work.weights == "device" else "weights brought from the host block by block"
    head = f"{work.shape}, {work.samples} × {work.length:,} tokens, rank {work.rank}, layerwise, {where}:"
    return f"{head}\n\n{_table(['', 'seconds', '× forward', 'status'], _price_rows(found))}\n"


def _price_rows(found: Price) -> list[Row]:
    lines = {
        **{name: seconds for name, seconds in found.parts.items() if seconds.high},
        "one part after the other": found.total,
        "several sites at once, beside the next block": found.overlapped,
        "full `eigh` in the place of the solves": found.eigh,
    }
    forward = (found.parts["forward"].low * found.parts["forward"].high) ** 0.5
    return [[name, _range(s), _range(s.times(1 / forward)), s.status] for name, s in lines.items()]


def _site(d: int, gpu: Gpu) -> list[Row]:
    lines = {
        f"kernel, {TOKENS:,} tokens": gpu.kernel_seconds(d, TOKENS),
        "bottom 128 by shift-invert": gpu.solve_seconds(d, 128),
        "`torch.linalg.eigh`": gpu.eigh_seconds(d),
    }
    return [[f"{d:,}", name, _range(seconds), seconds.status] for name, seconds in lines.items()]


def _rates(gpu: Gpu) -> str:
    rows = [
        [
            f"`{name}`",
            f"{figure.low:.3g}" if figure.low == figure.high else f"{figure.low:.3g} to {figure.high:.3g}",
            figure.origin,
            figure.status,
        ]
        for name, figure in gpu.figures().items()
    ]
    return _table(["", gpu.name, "from", "status"], rows)


# ---- a CPU


def _cpu(results: Path) -> list[Row]:
    def read(name: str) -> dict[str, Any]:
        return json.loads((results / f"{name}.json").read_text())

    return [*_whole_jobs(read("peers-cpu"), read("layerwise-cpu")), *_solvers(read("solvers-cpu"))]


def _whole_jobs(peers: Mapping[str, Any], layerwise: Mapping[str, Any]) -> list[Row]:
    """SmolLM2-135M: rates from the stages of `peers`, strategies of `layerwise` predicted. Both run on the same machine."""
    work = _smollm2(peers["workload"])
    count, widths, block_flops, _ = work.counts()
    blocks, head = count * block_flops, 2.0 * work.tokens * 576 * 49152
    sums, solves = _sum_flops(work), count * sum(decomposition_cost(d, work.rank, "cpu")[2] for d in widths)

    def seconds(result: Mapping[str, Any], variant: str, stage: str | None = None) -> float:
        runs = [run for run in result["runs"] if run["variant"] == variant]
        return statistics.median(run["stages"][stage] if stage else run["seconds"] for run in runs)

    forward = seconds(peers, "forward")
    model = blocks / (blocks + head) * forward  # a calibration asks for no logits
    summing, solving = seconds(peers, "nullspace", "forward and sums") - model, seconds(peers, "nullspace", "eigenvectors")
    fitted = [
        ("bare forward pass", forward, (blocks + head) / forward),
        ("sums", summing, sums / summing),
        ("null spaces", solving, solves / solving),
    ]
    predicted = {"forward": forward, "resident": model + summing + solving, "layerwise": model + summing + solving}
    return [
        *(["`peers-cpu.json`", name, _n(s), f"{rate / 1e9:.3g} GFLOP/s", "measured, fitted"] for name, s, rate in fitted),
        *(_compared("`layerwise-cpu.json`", name, seconds(layerwise, name), s) for name, s in predicted.items()),
    ]


def _smollm2(workload: Mapping[str, Any]) -> Work:
    return Work("SmolLM2-135M", **{name: workload[name] for name in ("samples", "length", "batch_size", "rank")})


def _sum_flops(work: Work) -> float:
    count, widths, _, _ = work.counts()
    return float(count * sum(d * d for d in widths) * work.tokens)


def _solvers(result: Mapping[str, Any]) -> list[Row]:
    """Shift-invert and `eigh`: rates from d = 4096, other orders predicted."""
    rows: list[Row] = []
    k, fitted_at = result["k"], 4096
    for method, flops in (
        ("shift-invert", lambda d: decomposition_cost(d, k, "cpu")[1]),
        ("torch.linalg.eigh", lambda d: 9.0 * d**3),
    ):
        each: dict[int, list[float]] = {}
        for run in result["runs"]:
            if run["d"] >= fitted_at or method == "torch.linalg.eigh":  # below that `auto` takes another method
                each.setdefault(run["d"], []).append(run["methods"][method]["median_s"])
        seconds = {d: statistics.median(values) for d, values in sorted(each.items())}
        rate = flops(fitted_at) / seconds[fitted_at]
        for d, measured in seconds.items():
            what = f"{method}, d = {d:,}"
            if d == fitted_at:
                rows.append(["`solvers-cpu.json`", what, _n(measured), f"{rate / 1e9:.3g} GFLOP/s", "measured, fitted"])
            else:
                rows.append(_compared("`solvers-cpu.json`", what, measured, flops(d) / rate))
    return rows


def _compared(file: str, what: str, measured: float, model: float) -> Row:
    return [file, what, _n(measured), _n(model), f"measured, predicted {model / measured - 1:+.0%}"]


# ---- a GPU


def _beside(name: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """What first_gpu has measured beside the forecast, and the forecast with its rates."""
    gpu = measured_on(results)
    rows: list[Row] = []
    for row in results.get("kernels", {}).get("rows", ()):
        if row.get("variant") == "default" and "cublas_ms" in row:
            what = f"kernel, d = {row['d']:,}, {row['tokens']:,} tokens"
            rows.append(_against(what, row["ms"] / 1e3, H100.kernel_seconds(row["d"], row["tokens"])))
    for row in results.get("solvers", {}).get("rows", ()):
        if row.get("method") in ("shift-invert", "torch.linalg.eigh") and "seconds" in row:
            forecast = H100.eigh_seconds(row["d"]) if "eigh" in row["method"] else H100.solve_seconds(row["d"], row["k"])
            rows.append(_against(f"{row['method']}, d = {row['d']:,}", row["seconds"], forecast))
    for row in results.get("job", {}).get("rows", ()):
        if row.get("variant") in ("forward", "sums-layerwise", "layerwise-device") and "seconds" in row:
            found = price(Work("Llama-3-8B", blocks=row["blocks"]))
            forward, sums = found.parts["forward"], found.parts["forward"].plus(found.parts["kernel"], found.parts["staging"])
            whole = Seconds(found.overlapped.low, found.total.high, False)
            forecast = {"forward": forward, "sums-layerwise": sums, "layerwise-device": whole}[row["variant"]]
            rows.append(_against(f"{row['variant']}, {row['blocks']} blocks of Llama-3-8B", row["seconds"], forecast))
    return f"""## {name}

{_table(["what", "measured, s", "forecast, s", "status"], rows)}

Its rates, where they were measured:

{_rates(gpu)}

Llama-3-8B with these rates:

{_table(["", "seconds", "× forward", "status"], _price_rows(price(WORKS[0], gpu)))}"""


def _against(what: str, measured: float, forecast: Seconds) -> Row:
    within = forecast.low <= measured <= forecast.high
    nearest = min((forecast.low, forecast.high), key=lambda end: abs(end - measured))
    return [
        what,
        _n(measured),
        _range(forecast),
        "measured, as forecast" if within else f"measured, {measured / nearest:.2f} × the forecast",
    ]


# ---- text


def _n(value: float) -> str:
    return f"{value:.3g}" if value < 1e3 else f"{value:,.0f}"


def _range(seconds: Seconds) -> str:
    low, high = _n(seconds.low), _n(seconds.high)
    return low if low == high else f"{low} to {high}"


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def kept(results: Path = RESULTS) -> dict[str, dict[str, dict[str, Any]]]:
    """The results of GPUs that are kept, by folder."""
    return {folder.name: results_in(folder) for folder in sorted(results.glob("first_gpu-*")) if folder.is_dir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=Path, help="a folder with results of benchmarks.first_gpu: print the page with them")
    options = parser.parse_args()
    if options.gpu:
        print(page({options.gpu.name: results_in(options.gpu)}))
        return
    path = RESULTS / "cost.md"
    path.write_text(page(kept()))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
