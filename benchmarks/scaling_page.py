"""The page on what n GPUs cost (`benchmarks/results/scaling.md`): the model's tables, and beside them what was measured."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.scaling_model import Chain, Cluster, Cost, cost, h100, site_bytes, worth_having
from nullspace.moments.triangle import PANEL_ROWS
from nullspace.planning.forecast import forecast
from nullspace.planning.plan import Workload
from nullspace.planning.survey import Survey

RANKS = (8, 64, 1024)
WORK = Workload(samples=256, length=2048, batch_size=1, rank=128)
# Shape, strategy, where its weights are.
CASES = (
    ("Llama-3-8B", "resident", "device"),
    ("Llama-3-8B", "layerwise", "device"),
    ("Llama-3-70B", "layerwise", "host"),
    ("Llama-3.1-405B", "layerwise", "host"),
)
ALL_BLOCKS = 10**6


@functools.cache
def surveyed(name: str) -> tuple[Survey, dict[str, Any]]:
    """Of a shape: its survey, and the forecasts of its memory by strategy."""
    from benchmarks import shapes

    model = shapes.empty(name, blocks=2)
    survey = deepened(Survey(model, batch_size=WORK.batch_size, length=WORK.length), shapes.config(name).num_hidden_layers)
    plans = {}
    for plan in forecast(model, WORK, survey=survey):
        weights, between = ("host", "host") if plan.strategy == "layerwise" else ("device", "device")
        if (plan.weights, plan.hidden_states) == (weights, between):
            plans[plan.strategy] = plan
    return survey, plans


def deepened(survey: Survey, blocks: int) -> Survey:
    """A survey of so many blocks, made of one of a few: all are as the last."""
    deep, few = copy.copy(survey), len(survey.block_flops)
    for index in range(few, blocks):
        deep.sites = [*deep.sites, *(site._replace(block=index) for site in survey.sites if site.block == few - 1)]
    more = blocks - few
    for name in ("block_weights", "block_activations", "block_flops"):
        setattr(deep, name, [*getattr(survey, name), *[getattr(survey, name)[-1]] * more])
    deep.weights = survey.weights + more * survey.block_weights[-1]
    deep.flops = survey.flops + more * survey.block_flops[-1]
    return deep


def calibrated(case: tuple[str, str, str], ranks: int, cluster: Cluster | None = None, **more: Any) -> Cost:
    name, strategy, weights = case
    return cost(surveyed(name)[0], WORK, ranks, cluster or h100(), strategy=strategy, weights=weights, **more)


def page(result: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        result: the content of `scaling-cpu.json`.
    """
    parts = [_head(), *map(_case, CASES), _worth(), _what_if(), _weights(), _measured(result), _assumptions(result)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _head() -> str:
    def gain(case: tuple[str, str, str], ranks: int, **more: Any) -> float:
        return calibrated(case, 1, **more).total_seconds / calibrated(case, ranks, **more).total_seconds

    resident, _, large, huge = CASES
    few, many = gain(resident, 8), gain(resident, 64)
    now = gain(large, 8), gain(large, 64), gain(huge, 8), gain(huge, 64)
    then = gain(large, 64, together=1), gain(huge, 64, together=1)
    largest = calibrated(huge, 64)
    solving = largest.seconds["eigenproblems"] / largest.total_seconds
    return f"""
# What n GPUs cost, and whether they help

Made by `python -m benchmarks.scaling --page` from the model in `benchmarks/scaling_model.py` and from `scaling-cpu.json`. **No
figure for a GPU on this page was measured.** Bytes are counted; seconds follow from data sheets and guesses, which the last section
names. What was checked is the model: against 1, 2 and 4 processes over gloo on one machine without GPUs.

The work: `compute_null_spaces` on {WORK.samples} sequences of {WORK.length:,} tokens in batches of one, all linear layers, rank
{WORK.rank}. Nodes of eight H100 with NVLink, and between nodes 400 Gb/s a GPU.

In short:

- Where the model and its sums fit a GPU (`resident`), 8 GPUs calibrate the 8B shape {_times(few)} times as fast as one, and 64
  {_times(many)} times: then a single eigenproblem of the widest layer is what all wait for.
- Block by block (`layerwise`) 8 GPUs are {_times(now[0])} times as fast for the 70B shape, and 64 {_times(now[1])} times; for the
  405B shape {_times(now[2])} and {_times(now[3])} times. Each GPU puts its sites aside until all have as much as one block; were
  every block's eigenproblems solved before the next block is run, 64 GPUs would give {_times(then[0])} and {_times(then[1])}
  times, as that of `down_proj` is nearly all there is to solve in a block.
- The network hardly matters: with 64 GPUs {solving:.0%} of the 405B shape's time is eigenproblems.
- With {WORK.samples} batches, no more than {WORK.samples} GPUs have anything to read.
"""


def _case(case: tuple[str, str, str]) -> str:
    name, strategy, weights = case
    survey, plans = surveyed(name)
    plan = plans[strategy]
    widths = sorted({site.d_in for site in survey.sites})
    held = {"device": "weights on the device", "host": "weights in host memory"}[weights]
    rows = []
    for ranks in (1, *RANKS):
        costs = calibrated(case, ranks)
        seconds = costs.seconds
        rows.append(
            [
                f"{ranks:,}",
                _n(costs.reduced / 1e9),
                *(_n(1e3 * costs.site_seconds[d]) for d in widths),
                _n(seconds["reductions"]),
                _n(costs.hidden),
                _n(seconds["eigenproblems"]),
                _n(seconds["forward"] + seconds["sums"]),
                _n(seconds["weights"] + seconds["exchanges"] + seconds["bases"]),
                _n(costs.total_seconds),
                f"{calibrated(case, 1).total_seconds / costs.total_seconds:.1f} ×",
            ]
        )
    head = [
        "GPUs",
        "GB reduced",
        *(f"ms a site, d = {d:,}" for d in widths),
        "s reducing",
        "s hidden",
        "s solving",
        "s forward and sums",
        "s other",
        "s in all",
        "over 1 GPU",
    ]
    cluster = h100()
    gigabytes = plan.device_bytes / 1e9 if weights != "device" or strategy == "resident" else None
    memory = f"Device memory, by `nullspace.planning`: {_n(gigabytes)} GB" if gigabytes else ""
    if gigabytes and plan.device_bytes > cluster.memory:
        most = max(plan.device_parts, key=lambda part: plan.device_parts[part])
        memory += (
            f", **more than the {_n(cluster.memory / 1e9)} GB of an H100** ({most}: {_n(plan.device_parts[most] / 1e9)} GB): "
            "as it is, this shape wants a larger GPU, or `targets` without `down_proj`; times are given as if it had one"
        )
    return "\n\n".join(
        [
            f"## {name}, {strategy}, {held}",
            f"{len(survey.sites)} sites: " + _each(survey, widths) + "." + (f" {memory}." if memory else ""),
            _table(head, rows),
        ]
    )


def _each(survey: Survey, widths: Sequence[int]) -> str:
    def one(d: int) -> str:
        return f"{sum(s.d_in == d for s in survey.sites)} of width {d:,} ({_n(site_bytes(d) / 1e6)} MB each)"

    return " and ".join(one(d) for d in widths)


def _worth() -> str:
    head = ["", "as it is", "if each block were solved by itself"]
    rows = []
    for case in CASES:
        name, strategy, _ = case
        counts = [
            worth_having(lambda n, case=case, together=together: calibrated(case, n, together=together).total_seconds)
            for together in (None, 1)
        ]
        rows.append([f"{name}, {strategy}", str(counts[0]), str(counts[1]) if strategy == "layerwise" else ""])
    return f"""
## How many are worth having

The largest power of two to which doubling still took a tenth off the time:

{_table(head, rows)}
"""


def _changed(cluster: Cluster, **fields: Any) -> Cluster:
    """With other figures, whichever part of the cluster they belong to."""
    network, rates = cluster.network, cluster.rates
    ours = {k: v for k, v in fields.items() if hasattr(network, k)}
    theirs = {k: v for k, v in fields.items() if hasattr(rates, k)}
    rest = {k: v for k, v in fields.items() if k not in ours and k not in theirs}
    return replace(cluster, network=replace(network, **ours), rates=replace(rates, **theirs), **rest)  # type: ignore[type-var]


def _what_if() -> str:
    base = h100()
    assert isinstance(base.network, Chain)
    rates = base.rates

    def worse(*names: str) -> Cluster:
        def figure(name: str) -> float:
            holder = next(part for part in (base.network, rates, base) if hasattr(part, name))
            value = float(getattr(holder, name))
            return value * 2 if name in ("start", "hop_within", "hop_between", "panel", "exchange", "exchange_site") else value / 2

        return _changed(base, **{name: figure(name) for name in names})

    changes: list[tuple[str, Cluster, dict[str, Any]]] = [
        ("as assumed", base, {}),
        ("each block solved by itself", base, {"together": 1}),
        ("all blocks solved at the end", base, {"together": ALL_BLOCKS}),
        ("eigenproblems 8 times as fast", _changed(base, decomposition=8 * rates.decomposition), {}),
        ("reductions not hidden", base, {"overlapped": False}),
        ("one 400 Gb/s card a node, not eight", h100(links=1), {}),
        ("NVLink and network at half the bandwidth", worse("within", "between"), {}),
        ("hops and starts at twice the time", worse("start", "hop_within", "hop_between"), {}),
        ("forward and sums at half the rate", worse("forward", "sums"), {}),
        ("eigenproblems at half the rate", worse("decomposition"), {}),
        ("PCIe at half the rate", worse("transfer"), {}),
        ("a panel at twice the time", worse("panel"), {}),
        ("memory at half the rate", worse("copy"), {}),
        ("exchanges at twice the time", worse("exchange", "exchange_site"), {}),
    ]
    rows = [[what, *(_n(calibrated(case, 64, cluster, **more).total_seconds) for case in CASES)] for what, cluster, more in changes]
    kept = max(sum(site_bytes(s.d_in) for s in surveyed(name)[0].sites if s.block == 0) / 1e9 for name, *_ in CASES)
    return f"""
## What the totals hang on

Seconds with 64 GPUs, if something were otherwise:

{_table(["", *(f"{name}, {strategy}" for name, strategy, _ in CASES)], rows)}

Sites that are put aside are about as much as one block's sums, {_n(kept)} GB a GPU at most in this table.
"""


def _weights() -> str:
    base, rows = h100(), []
    network = base.network
    assert isinstance(network, Chain)
    for name in ("Llama-3-70B", "Llama-3.1-405B"):
        survey, plans = surveyed(name)
        case = next(c for c in CASES if c[0] == name)
        size, count = max(survey.block_weights), len(survey.block_weights)
        holders = network.ranks_a_node
        costs = {ranks: calibrated(case, ranks) for ranks in (8, 64, 1024)}
        rows.append(
            [
                name,
                _n(survey.weights / 1e9),
                _n(size / 1e9),
                _n(1e3 * size / base.rates.transfer),
                _n(1e3 * (network.latency(holders) + size * (holders - 1) / holders / network.within)),
                *(_n(1e3 * (cost.seconds["forward"] + cost.seconds["sums"]) / count) for cost in costs.values()),
                _n(costs[1024].seconds["weights"]),
                _n(plans["layerwise"].host_bytes / 1e9),
            ]
        )
    head = [
        "",
        "GB of weights",
        "GB a block",
        "ms a block over PCIe",
        "ms gathered from 8 GPUs",
        *(f"ms of forward a block, {n:,} GPUs" for n in (8, 64, 1024)),
        "s waited, 1,024 GPUs",
        "GB of host memory a process",
    ]
    return f"""
## Weights that do not fit

A GPU cannot hold the 70B or the 405B shape. Layerwise, each process brings one block after the other from host memory, the next
one while this one computes; what is waited for is in "s other" above. Eight processes a node have the weights in host memory once
only if they map the checkpoint's files (`load_model(..., offload=True)`). The other way is that each GPU of a node holds its part
and a block is gathered when it is needed: a model that `fully_shard` (FSDP2) has sharded is calibrated like that, but the next
block is not gathered while this one computes; the column is what a block takes.

{_table(head, rows)}
"""


def _measured(result: Mapping[str, Any]) -> str:
    summary, where = result["summary"], result["environment"]
    sites = [
        [
            str(part["ranks"]),
            f"{part['d']:,}",
            _n(part["bytes"] / 1e6),
            "fitted" if part["fitted"] else "predicted",
            *(
                text
                for name in ("reduce", "site")
                for text in (_n(1e3 * part["measured"][name]), _n(1e3 * part["model"][name]), f"{part['error'][name]:+.0%}")
            ),
        ]
        for part in summary["reductions"]
    ]
    whole = [
        [
            f"`{part['call']}`",
            part["strategy"],
            str(part["ranks"]),
            _n(part["measured"]),
            _n(part["model"]),
            "fitted" if part["fitted"] else f"{part['error']:+.0%}",
            f"{part['speedup']:.2f} ×",
            _n(part["bytes_model"] / 1e6),
            "the same" if part["bytes_counted"] == [part["bytes_model"]] else f"**{part['bytes_counted']} bytes**",
        ]
        for part in summary["calibrations"]
    ]
    memory = [
        [part["strategy"], str(part["ranks"]), _n(part["peak_bytes"] / 1e6), f"{part['over_single']:.2f} ×"]
        for part in summary["memory"]
    ]
    predicted = [part for part in summary["reductions"] if not part["fitted"]]
    errors = [part["error"]["reduce"] for part in predicted], [part["error"]["site"] for part in predicted]
    others = [part["error"] for part in summary["calibrations"] if not part["fitted"]]
    triangles = all(p["bytes"] == p["bytes_sent"] for p in summary["reductions"])
    messages, work = summary["messages"], result["workload"]
    counted = "as many as counted" if triangles else "**not as many as counted**"
    commit = where["commit"][:10] + (" with uncommitted changes" if where["uncommitted_changes"] else "")
    return f"""
## The model beside measurements

{where["cpu"]}, {work["cores"]} cores, one thread a process, gloo over one machine; medians of {work["rounds"]} rounds; commit
{commit}, PyTorch {where["versions"]["torch"]}. {_crowded(work["cores"])}

One site's reduction, ms. "reduce" is `dist.reduce` alone, "site" with packing and unpacking. Latency and bandwidths are fitted to
every other width. Where they are predicted, "reduce" is off by {_range(errors[0])}, "site" by {_range(errors[1])}.
Bytes of the vectors: {counted}.

{_table(["processes", "d", "MB", "", "reduce", "model", "error", "site", "model", "error"], sites)}

One message from one process to another: {_n(1e6 * messages["latency"])} µs and {_rate(messages["bandwidth"])}, off by
{_range(messages["errors"])}.

Whole calibrations of a Llama of random weights (`{work["model"]}` in `benchmarks/shapes.py`), {work["samples"]} sequences of
{work["length"]} tokens, seconds. The rates come from one process; 2 and 4 are predicted, off by {_range(others)}.
"MB reduced" is what the model says that each process gives to `dist.reduce`; "counted", what it gave.

{_table(["", "strategy", "processes", "measured", "model", "error", "over 1", "MB reduced", "counted"], whole)}

Memory, of `compute_null_spaces` on `{work["memory_model"]}`: the largest peak of any process above what it held before, MB, and
over that of a single process. What the allocator keeps for itself makes runs differ by about 5 %.

{_table(["strategy", "processes", "MB", "over 1"], memory)}
"""


def _crowded(cores: int) -> str:
    if cores >= 4:
        return ""
    return (
        f"4 processes share the {cores} cores, which the model takes into account: they cannot be faster than {cores} there, and "
        "are in the tables for what they cost and for their memory."
    )


def _assumptions(result: Mapping[str, Any]) -> str:
    base = h100()
    network, rates = base.network, base.rates
    assert isinstance(network, Chain)
    here = result["summary"]["cluster"]
    rows = [
        [
            "`network.within`",
            f"{_n(network.within / 1e9)} GB/s",
            "NVLink 4: 450 GB/s a direction (data sheet), 0.8 of it reached (guess)",
        ],
        [
            "`network.between`",
            f"{_n(network.between / 1e9)} GB/s a node",
            "eight cards of 400 Gb/s (data sheet), a ring through each, 0.8 reached (guess)",
        ],
        ["`network.start`", f"{_n(1e6 * network.start)} µs", "NCCL's tuner, ring, simple protocol"],
        ["`network.hop_within`", f"{_n(1e6 * network.hop_within)} µs", "the same, NVLink"],
        ["`network.hop_between`", f"{_n(1e6 * network.hop_between)} µs", "the same, network"],
        *(
            [
                f"`rates.{name}`",
                f"{_n(getattr(rates, name) / scale)} {unit}",
                f"{what}: the middle of the range in [cost.md](cost.md)",
            ]
            for name, scale, unit, what in (
                ("forward", 1e12, "TFLOP/s", "bf16"),
                ("sums", 1e12, "TFLOP/s", "n · d² for n tokens, the Triton kernel at d = 8,192"),
                (
                    "decomposition",
                    1e12,
                    "TFLOP/s",
                    "full `eigh` counted as 9 d³; other solvers by the flops of it that take as long",
                ),
                ("transfer", 1e9, "GB/s", "PCIe 5 from pinned memory"),
            )
        ),
        [
            "`panel`",
            f"{_n(1e6 * base.panel)} µs",
            f"about ten launches for {PANEL_ROWS} rows (guess; measured on this CPU: {_n(1e6 * here['panel'])} µs)",
        ],
        [
            "`copy`",
            f"{_n(base.copy / 1e12)} TB/s",
            f"half of what [cost.md](cost.md) says is read and written (measured on this CPU: {_rate(here['copy'])})",
        ],
        [
            "`exchange`",
            f"{_n(1e3 * base.exchange)} ms",
            f"Python objects from all to all (guess; measured over gloo: {_n(1e3 * here['exchange'])} ms)",
        ],
        [
            "`exchange_site`",
            f"{_n(1e6 * base.exchange_site)} µs",
            f"a site of a rank in an exchange (guess; measured: {_n(1e6 * here['exchange_site'])} µs)",
        ],
        ["`memory`", f"{_n(base.memory / 1e9)} GB", "data sheet"],
    ]
    fits = [
        ["start of a reduction", f"{_n(1e6 * here['network']['start'])} µs"],
        ["step of the ring", f"{_n(1e6 * here['network']['hop'])} µs"],
        ["through a rank: received, added, sent", _rate(here["network"]["ring"])],
        ["into the root", _rate(here["network"]["gather"])],
        *(
            [f"{kind}, {strategy}", f"{_n(value / 1e9)} GFLOP/s"]
            for strategy, rates in result["summary"]["rates"].items()
            for kind, value in rates.items()
        ),
    ]
    return f"""
## What is assumed, and what was measured

Assumed, of the GPUs (`benchmarks.scaling_model.h100`):

{_table(["", "", "from"], rows)}

A site's bytes: 8 · (d (d + 1) / 2 + d + 7). A reduction over n GPUs in m nodes: start + (n − m) hops within + (m − 1) hops
between + bytes / the narrower bandwidth. Reductions travel one after the other, hidden as far as may be behind the packing of
the next ones and, layerwise, behind the next block's forward pass; packing itself is seen, and unpacking at the owner.
Eigenproblems are dealt by `nullspace.distributed.deal`. Not in the model: reading and tokenising data, loading the model, second
passes in float64 or by QR, GPUs that are slower than others, other traffic on the network, memory bandwidth that processes share.

Fitted here, and used for the comparison alone:

{_table(["", ""], fits)}
"""


# ---- text


def _n(value: float) -> str:
    """Three digits."""
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return "< 0.001"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.3f}"


def _rate(value: float | None) -> str:
    return "no time found" if value is None else f"{_n(value / 1e9)} GB/s"


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"


def _range(errors: Sequence[float]) -> str:
    low, high = min(errors), max(errors)
    return f"{low:+.0%} to {high:+.0%}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
