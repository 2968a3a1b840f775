"""The cost of n ranks: `benchmarks.scaling_model` beside measurements with 1, 2 and 4 processes on one machine, over gloo.

    python -m benchmarks.scaling [--rounds 3]       # writes benchmarks/results/scaling-cpu.json and scaling.md
    python -m benchmarks.scaling --page             # scaling.md alone, from the json that is there
    python -m benchmarks.scaling --quick            # a dry run: tiny sizes, nothing is written

Every process computes with one thread; more processes than cores share them, which the model takes into account.

- reductions: one site's, as `Job` does it (packed, `dist.reduce`, unpacked at the owner), of several widths; also from one process
  to one other, and an exchange of Python objects. Latencies and bandwidths are fitted to every other width; the widths between are
  predicted.
- calibrations: `stream_covariances` and `compute_null_spaces`, resident and layerwise, of a Llama with random weights in float32.
  The rates of forward, sums and eigenproblems come from the runs with one process; those with 2 and 4 are predicted. The bytes that
  go into `dist.reduce` are counted.
- memory: the largest peak of anonymous memory of any process above that before `compute_null_spaces`, in fresh processes; of a
  wider model, most of whose sums exceed the 32 MiB below which the C library keeps what is freed.

Process counts take turns within a round. Times are from a barrier to the last process's end. Not timed: imports, making the model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import PeakMemory, run_together
from benchmarks.environment import RESULTS, write_result

COUNTS = (1, 2, 4)
STRATEGIES = ("resident", "layerwise")
CALLS = ("stream_covariances", "compute_null_spaces")
FULL: dict[str, Any] = {
    "model": "forty-million",
    "samples": 16,
    "length": 128,
    "rank_of_bases": 64,
    "memory_model": "wide",
    "widths": [256, 576, 1024, 1536, 2816, 4096],
    "repeats": 5,
    "sites": 512,
}
QUICK: dict[str, Any] = {
    **FULL,
    "model": "tiny",
    "memory_model": "tiny",
    "samples": 8,
    "length": 32,
    "rank_of_bases": 8,
    "widths": [64, 128, 192, 256],
}
Runs = list[dict[str, Any]]


# ---- one process


def reductions(rank: int, ranks: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of this process in each part of a reduction, of a message, and of an exchange."""
    import torch
    import torch.distributed as dist

    from nullspace import Covariance, Site
    from nullspace.distributed import Job

    job, rows = Job(), []
    generator = torch.Generator().manual_seed(rank)
    covariances = {}
    for d in settings["widths"]:
        covariances[d] = Covariance(d, precision="fp64")
        covariances[d].update(torch.randn(4, d, generator=generator, dtype=torch.float64))
    for repeat in range(settings["repeats"] + 1):
        for d, covariance in covariances.items():
            owner = repeat % ranks
            dist.barrier()
            began = time.perf_counter()
            vector = covariance.compress()
            packed = time.perf_counter()
            dist.barrier()
            ready = time.perf_counter()
            dist.reduce(vector, owner)
            reduced = time.perf_counter()
            own = {"pack": packed - began, "reduce": reduced - ready, "unpack": 0.0}
            if rank == owner:
                covariance.expand()
                own["unpack"] = time.perf_counter() - reduced
                vector = covariance.compress()
            dist.barrier()
            began = time.perf_counter()
            if rank < 2:
                dist.send(vector, 1) if rank == 0 else dist.recv(vector, 0)
                own["message"] = time.perf_counter() - began
            if repeat:  # the first one opens connections and fetches memory
                rows.append({"d": d, "bytes": vector.numel() * vector.element_size(), **own})
            vector.zero_()  # or the numbers would grow from repeat to repeat
            covariance.expand()
        for count in (0, settings["sites"]):
            sites = [(Site((f"model.layers.{i}.mlp.down_proj",), 4096), 1000, "cpu") for i in range(count)]
            dist.barrier()
            began = time.perf_counter()
            job.exchange(sites)
            if repeat:
                rows.append({"sites": count, "exchange": time.perf_counter() - began})
    return {"rows": rows}


@contextmanager
def counting() -> Iterator[list[int]]:
    """Inside, the list gets the bytes of every vector that this process gives to `dist.reduce`."""
    import torch.distributed as dist

    plain, counted = dist.reduce, []

    def reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(tensor.numel() * tensor.element_size())
        return plain(tensor, *args, **kwargs)

    dist.reduce = reduce
    try:
        yield counted
    finally:
        dist.reduce = plain


def prepared(name: str, settings: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The model, and batches of one sequence each."""
    import torch

    from benchmarks import shapes

    model = shapes.build(name, dtype=torch.float32)
    shape, generator = (settings["samples"], settings["length"]), torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, shape, generator=generator)
    return model, [{"input_ids": part} for part in ids.split(1)]


def calibrate(call: str, strategy: str, settings: Mapping[str, Any], model: Any, batches: Any) -> None:
    from nullspace import compute_null_spaces, stream_covariances

    more: dict[str, Any] = {"hidden_states": "host"} if strategy == "layerwise" else {}
    if call == "stream_covariances":
        for _ in stream_covariances(model, batches, strategy=strategy, progress=False, **more):
            pass
    else:  # the fast sums alone: a second pass would be another measurement
        more |= {"rank": settings["rank_of_bases"], "tolerance": float("inf")}
        compute_null_spaces(model, batches, strategy=strategy, progress=False, **more)


def calibrations(rank: int, ranks: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and reduced bytes of every way to calibrate."""
    model, batches = prepared(settings["model"], settings)
    rows = []
    for strategy in STRATEGIES:
        calibrate(CALLS[0], strategy, settings, model, batches[:ranks])  # what is made once, is made
        for call in CALLS:
            together(ranks)
            with counting() as counted:
                began = time.perf_counter()
                calibrate(call, strategy, settings, model, batches)
                seconds = time.perf_counter() - began
            rows.append({"strategy": strategy, "call": call, "seconds": seconds, "reductions": len(counted), "bytes": sum(counted)})
    return {"rows": rows}


def memory(rank: int, ranks: int, settings: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """The peak of a calibration, the first thing that this process computes."""
    model, batches = prepared(settings["memory_model"], settings)
    together(ranks)
    with PeakMemory() as peak:
        calibrate("compute_null_spaces", strategy, settings, model, batches)
    return {"rows": [{"strategy": strategy, "peak_bytes": peak.bytes}]}


def together(ranks: int) -> None:
    import torch.distributed as dist

    if ranks > 1:
        dist.barrier()


def run_rank(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if options.ranks > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{options.meet}",
            rank=options.rank,
            world_size=options.ranks,
            timeout=datetime.timedelta(minutes=5),
        )
    settings = json.loads(options.settings)
    what, _, strategy = options.run.partition(":")
    if what == "memory":
        return memory(options.rank, options.ranks, settings, strategy)
    return {"reductions": reductions, "calibrations": calibrations}[what](options.rank, options.ranks, settings)


# ---- all of them


def measure(settings: Mapping[str, Any], rounds: int) -> Runs:
    """Every run: its kind, and the results over its processes."""
    runs: Runs = []

    def run(what: str, ranks: int, number: int) -> None:
        began = time.perf_counter()
        outputs = run_together("benchmarks.scaling", ranks, ["--run", what, "--settings", json.dumps(settings)])
        # The slowest process counts; a message has two ends.
        rows = [
            {name: max(part[name] for part in parts if name in part) for name in parts[0]}
            for parts in zip(*(each["rows"] for each in outputs), strict=True)
        ]
        runs.extend({"what": what.partition(":")[0], "round": number, "ranks": ranks, **each} for each in rows)
        print(f"round {number}  {what:18} {ranks} ranks  {time.perf_counter() - began:6.1f} s", flush=True)

    for number in range(rounds):
        for ranks in COUNTS:
            if ranks > 1:
                run("reductions", ranks, number)
            run("calibrations", ranks, number)
        for strategy in STRATEGIES:
            for ranks in COUNTS:
                run(f"memory:{strategy}", ranks, number)
    return runs


def median(runs: Runs, name: str, **of: Any) -> float:
    """Over the runs that are these."""
    return statistics.median(run[name] for run in runs if name in run and all(run.get(k) == v for k, v in of.items()))


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients, none below zero, that make the relative errors of the sums least in squares."""
    from scipy.optimize import nnls

    weight = 1 / np.asarray(seconds)
    a = np.asarray(rows) * weight[:, None]
    scale = np.maximum(np.abs(a).max(axis=0), 1e-300)  # seconds and bytes are many orders apart
    solution, _ = nnls(a / scale, np.ones(len(weight)))
    return [float(x) for x in solution / scale]


def rate(seconds_a_byte: float) -> float:
    return 1 / seconds_a_byte if seconds_a_byte > 0 else float("inf")


def fitted(runs: Runs, settings: Mapping[str, Any], cores: int) -> Any:
    """The machine as a `Cluster`, of every other width; forward, sums and eigenproblems are not in it yet."""
    from benchmarks.scaling_model import Cluster, Gloo, site_bytes
    from nullspace.moments.triangle import PANEL_ROWS
    from nullspace.planning.plan import Rates

    widths, several = settings["widths"][::2], [n for n in COUNTS if n > 1]
    points = [(n, max(1.0, n / cores), d, site_bytes(d)) for n in several for d in widths]
    rows = [[1.0, (n - 1) * crowd, size * (n - 1) / n * crowd, size * (n - 1) / n] for n, crowd, _, size in points]
    start, hop, ring, gather = fit(rows, [median(runs, "reduce", ranks=n, d=d) for n, _, d, _ in points])
    network = Gloo(start, hop, rate(ring), rate(gather))
    once = [[-(-d // PANEL_ROWS), 2 * size] for *_, d, size in points]
    rows = [[x * crowd for x in own] for own, (_, crowd, *_) in zip(once, points, strict=True)] + once
    panel, copy = fit(rows, [median(runs, name, ranks=n, d=d) for name in ("pack", "unpack") for n, _, d, _ in points])
    bare = {n: median(runs, "exchange", ranks=n, sites=0) for n in several}
    full = {n: median(runs, "exchange", ranks=n, sites=settings["sites"]) for n in several}
    crowds = {n: max(1.0, n / cores) for n in several}
    exchange = statistics.mean(max(0.0, bare[n] - 2 * network.latency(n, crowds[n])) / crowds[n] for n in several)
    exchange_site = statistics.mean(max(0.0, full[n] - bare[n]) / (crowds[n] * n * settings["sites"]) for n in several)
    return Cluster(
        name="this machine",
        network=network,
        rates=Rates(forward=1.0, sums=1.0, decomposition=1.0, transfer=float("inf"), disk=1e9, estimated=False),
        memory=float("inf"),
        panel=panel,
        copy=rate(copy),
        exchange=exchange,
        exchange_site=exchange_site,
        cores=cores,
        measured=True,
    )


def summarise(runs: Runs, settings: Mapping[str, Any], cores: int) -> dict[str, Any]:
    """What was fitted, and what the model says beside each median."""
    import torch

    from benchmarks import shapes
    from benchmarks.scaling_model import cost, site_bytes
    from nullspace.planning.plan import Workload
    from nullspace.planning.survey import Survey
    from nullspace.solvers import decomposition_cost

    cluster = fitted(runs, settings, cores)
    network = cluster.network
    beside = []
    for n in (n for n in COUNTS if n > 1):
        for d in settings["widths"]:
            size, crowd = site_bytes(d), cluster.crowd(n)
            measured = {name: median(runs, name, ranks=n, d=d) for name in ("pack", "reduce", "unpack", "message")}
            model = {
                "pack": cluster.packing_seconds(d, n),
                "reduce": network.reduce_seconds(size, n, crowd),
                "unpack": cluster.unpacking_seconds(d, n),
            }
            measured["site"] = sum(measured[name] for name in model)
            model["site"] = sum(model.values())
            beside.append(
                {
                    "ranks": n,
                    "d": d,
                    "bytes": size,
                    "bytes_sent": int(median(runs, "bytes", ranks=n, d=d)),
                    "fitted": d in settings["widths"][::2],
                    "measured": measured,
                    "model": model,
                    "error": {name: model[name] / measured[name] - 1 for name in model},
                }
            )
    sent = [(site_bytes(d), median(runs, "message", ranks=2, d=d)) for d in settings["widths"]]
    latency, second = fit([[1.0, size] for size, _ in sent[::2]], [seconds for _, seconds in sent[::2]])
    messages = {
        **_finite({"latency": latency, "bandwidth": rate(second)}),
        "errors": [(latency + size * second) / seconds - 1 for size, seconds in sent],
    }

    workload = Workload(
        samples=settings["samples"], length=settings["length"], batch_size=1, rank=settings["rank_of_bases"], device="cpu"
    )
    empty = shapes.empty(settings["model"], dtype=torch.float32)
    survey = Survey(empty, batch_size=1, length=workload.length, device="cpu")
    whole, peaks, rates = [], [], {}
    for strategy in STRATEGIES:
        alone = {call: median(runs, "seconds", ranks=1, strategy=strategy, call=call) for call in CALLS}
        one_pass = sum(survey.block_flops) if strategy == "layerwise" else survey.flops
        flops = one_pass * workload.batches + sum(float(s.d_in) ** 2 for s in survey.sites) * workload.samples * workload.length
        solving = sum(decomposition_cost(s.d_in, workload.rank, "cpu")[2] for s in survey.sites)
        speed = flops / alone[CALLS[0]]
        eigh = solving / max(1e-9, alone[CALLS[1]] - alone[CALLS[0]])
        rates[strategy] = {"forward and sums": speed, "decomposition": eigh}
        here = replace(cluster, rates=replace(cluster.rates, forward=speed, sums=speed, decomposition=eigh))
        for call in CALLS:
            for n in COUNTS:
                predicted = cost(survey, workload, n, here, strategy=strategy, solved=call == CALLS[1])
                seconds = median(runs, "seconds", ranks=n, strategy=strategy, call=call)
                counted = {r["bytes"] for r in runs if (r.get("strategy"), r.get("call"), r["ranks"]) == (strategy, call, n)}
                whole.append(
                    {
                        "strategy": strategy,
                        "call": call,
                        "ranks": n,
                        "measured": seconds,
                        "speedup": alone[call] / seconds,
                        "model": predicted.total_seconds,
                        "parts": dict(predicted.seconds),
                        "error": predicted.total_seconds / seconds - 1,
                        "fitted": n == 1,
                        "bytes_counted": sorted(counted),
                        "bytes_model": predicted.reduced,
                    }
                )
        single = median(runs, "peak_bytes", ranks=1, strategy=strategy)
        for n in COUNTS:
            peak = median(runs, "peak_bytes", ranks=n, strategy=strategy)
            peaks.append({"strategy": strategy, "ranks": n, "peak_bytes": peak, "over_single": peak / single})
    return {
        "cluster": _finite({name: value for name, value in asdict(cluster).items() if name not in ("rates", "memory")}),
        "rates": rates,
        "messages": messages,
        "reductions": beside,
        "calibrations": whole,
        "memory": peaks,
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which has no infinity: None, where the fit attributes no time to the bytes."""
    return {
        name: _finite(value) if isinstance(value, Mapping) else None if value == float("inf") else value
        for name, value in values.items()
    }


def show(summary: Mapping[str, Any]) -> None:
    """In a terminal."""
    for part in summary["reductions"]:
        kind = "fitted" if part["fitted"] else "predicted"
        print(
            f"site d = {part['d']:5} {part['ranks']} ranks  {1e3 * part['measured']['site']:8.1f} ms  "
            f"reduce {1e3 * part['measured']['reduce']:8.1f} ms  model {1e3 * part['model']['reduce']:8.1f} ms "
            f"({part['error']['reduce']:+.0%}, {kind})"
        )
    for part in summary["calibrations"]:
        print(
            f"{part['strategy']:10} {part['call']:20} {part['ranks']} ranks  {part['measured']:7.2f} s  "
            f"model {part['model']:7.2f} s ({part['error']:+.0%})  {part['speedup']:.2f} x  "
            f"bytes {part['bytes_counted']} of {part['bytes_model']}"
        )
    for part in summary["memory"]:
        print(f"{part['strategy']:10} {part['ranks']} ranks  {part['peak_bytes'] / 1e6:7.1f} MB  {part['over_single']:.2f} x one's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written")
    parser.add_argument("--page", action="store_true", help="write the page of the results that are there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for both")
    for name in ("run", "settings", "rank", "ranks", "meet"):
        parser.add_argument(f"--{name}", type=int if name in ("rank", "ranks") else str, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_rank(options)))
        return
    from benchmarks.scaling_page import page

    if not options.page:
        settings, cores = (QUICK if options.quick else FULL), len(os.sched_getaffinity(0))
        runs = measure(settings, 1 if options.quick else options.rounds)
        summary = summarise(runs, settings, cores)
        show(summary)
        if options.quick:
            return
        workload = {**settings, "rounds": options.rounds, "cores": cores}
        content = {"workload": workload, "summary": summary, "runs": runs}
        print(f"\nwrote {write_result('scaling-cpu', content, options.results)}")
    path = options.results / "scaling.md"
    path.write_text(page(json.loads((options.results / "scaling-cpu.json").read_text())))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
