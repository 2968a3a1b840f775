"""What a calibration of a published shape takes on one GPU, priced part by part: a forecast, until first_gpu has measured it.

`price` counts what is done and divides by what the machine does in a second. Counted: flops of the forward pass, tiles and windows
of the kernel, bytes that staging and launches move, launches of small kernels, columns that the solver solves, dense problems.
Every rate is a `Figure`: a range, where it comes from, and whether it was measured. `H100` is a forecast throughout; `measured_on`
replaces what the result files of `benchmarks.first_gpu` know. `benchmarks.cost_page` sets the model beside measurements.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from nullspace.moments.sums_triton import launch_tokens
from nullspace.planning.plan import Rates
from nullspace.solvers import krylov
from nullspace.solvers.cost import tuning

TILE, WINDOW = 128, 128
"""Rows of a tile and tokens of a window, on Hopper."""
# Of an update: masks and indices, staging, norms. Of a launch besides: outliers, their order and count, their kernels, counters.
LAUNCHES_AN_UPDATE, LAUNCHES_A_LAUNCH = 4, 16
# Of a step of shift-invert besides the factor's application, whose every inverted block takes four: products, Cholesky, QR.
LAUNCHES_A_STEP = 30
# Of a tridiagonal reduction: a guess.
LAUNCHES_A_COLUMN = 4


class Figure(NamedTuple):
    """A rate.

    Attributes:
        low, high: its range; the same where it was measured.
        origin: where it comes from.
        measured: whether on the device itself.
    """

    low: float
    high: float
    origin: str
    measured: bool = False

    @property
    def middle(self) -> float:
        """The geometric mean."""
        return (self.low * self.high) ** 0.5

    @property
    def status(self) -> str:
        """`"forecast"` or `"measured"`."""
        return "measured" if self.measured else "forecast"


class Seconds(NamedTuple):
    """A time, from the fastest to the slowest that the figures allow, and whether all of these were measured."""

    low: float
    high: float
    measured: bool

    @property
    def status(self) -> str:
        """`"forecast"` or `"measured"`."""
        return "from measured rates" if self.measured else "forecast"

    def plus(self, *others: Seconds) -> Seconds:
        """One after the other."""
        every = (self, *others)
        return Seconds(sum(s.low for s in every), sum(s.high for s in every), all(s.measured for s in every))

    def times(self, number: float) -> Seconds:
        """As often."""
        return Seconds(number * self.low, number * self.high, self.measured)


def at(amount: float, rate: Figure) -> Seconds:
    """Seconds of so much work."""
    return Seconds(amount / rate.high, amount / rate.low, rate.measured)


@dataclass(frozen=True)
class Gpu:
    """A GPU and its host.

    Attributes:
        name: for the page.
        multiprocessors, clock: how many, and their hertz under load.
        memory: bytes.
        forward: flops a second of a model's own bf16 products.
        cycles: of a multiprocessor for one tile and window of the kernel; here `low` is the fastest.
        copy: bytes a second read and written in its memory.
        launch: small kernels a second, one after the other.
        cholesky: float64 flops a second, counted as d³ / 3.
        solves: float64 flops a second of two triangular solves, counted as 2 d² a column, where they do not wait for memory.
        eigh: float64 flops a second of `torch.linalg.eigh`, counted as 9 d³.
        small: columns a second in a symmetric eigenproblem of some hundred of them.
        transfer: bytes a second from pinned host memory.
        side_by_side: how many times as fast several sites are solved at once.
    """

    name: str
    multiprocessors: int
    clock: float
    memory: float
    forward: Figure
    cycles: Figure
    copy: Figure
    launch: Figure
    cholesky: Figure
    solves: Figure
    eigh: Figure
    small: Figure
    transfer: Figure
    side_by_side: Figure

    def figures(self) -> dict[str, Figure]:
        """All rates by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Figure)}

    def kernel_seconds(self, d: int, tokens: int) -> Seconds:
        """The fast kernel over so many tokens: whole waves of tiles, and the float64 triangle read and written at each launch."""
        windows = _waves(d, self) * tokens / WINDOW
        arithmetic = Seconds(windows * self.cycles.low / self.clock, windows * self.cycles.high / self.clock, self.cycles.measured)
        launches = max(1.0, tokens / launch_tokens(d))
        return arithmetic.plus(at(launches * 16 * d * (d + 1) / 2, self.copy))

    def staging_seconds(self, d: int, tokens: int, updates: int) -> Seconds:
        """Rows read and written once more, and the small kernels of so many updates and of their launches."""
        small = LAUNCHES_AN_UPDATE * updates + LAUNCHES_A_LAUNCH * max(1.0, tokens / launch_tokens(d))
        return at(4.0 * d * tokens, self.copy).plus(at(small, self.launch))

    def solve_seconds(self, d: int, k: int) -> Seconds:
        """Shift-invert by `nullspace.solvers.cost.tuning`.

        Cholesky, the steps of the space and of the search for what was missed, products of the columns among themselves, one small
        problem. A step multiplies or reads the factor twice, whichever takes longer, and launches its small kernels.
        """
        wanted, chosen = k + krylov.GUARD, tuning(d, k, "cuda")
        columns = krylov.first_check(wanted, chosen.width)
        steps = -(-columns // chosen.width) + krylov.PROBE_STEPS
        block = min(chosen.block, d) or d
        step = _longer(at(2.0 * d * d * chosen.width, self.solves), at(8.0 * d * d, self.copy))
        step = step.plus(at(LAUNCHES_A_STEP + 4 * -(-d // block), self.launch))
        products = at(2 / 3 * d * block**2 + 2.0 * d * d * wanted + 4.0 * d * columns**2, self.solves)
        return at(d**3 / 3, self.cholesky).plus(step.times(steps), products, at(columns, self.small))

    def eigh_seconds(self, d: int) -> Seconds:
        """`torch.linalg.eigh`: its flops, and the launches that each column of the tridiagonal reduction waits for."""
        return at(9.0 * d**3, self.eigh).plus(at(LAUNCHES_A_COLUMN * d, self.launch))

    def rates(self) -> Rates:
        """For `nullspace.planning`: the middle of each range, sums as n · d² flops by the kernel at d = 8192."""
        d, tokens = 8192, 2.0**18
        sums = self.kernel_seconds(d, int(tokens))
        return Rates(
            forward=self.forward.middle,
            sums=tokens * d**2 / (sums.low * sums.high) ** 0.5,
            decomposition=self.eigh.middle,
            transfer=self.transfer.middle,
            disk=2e9,
            estimated=not self.forward.measured,
        )


def _longer(one: Seconds, other: Seconds) -> Seconds:
    """Two that go on together."""
    return Seconds(max(one.low, other.low), max(one.high, other.high), one.measured and other.measured)


H100 = Gpu(
    name="H100 SXM",
    multiprocessors=132,
    clock=1.755e9,
    memory=80e9,
    forward=Figure(350e12, 460e12, "35 to 47 % of the data sheet's 989e12"),
    cycles=Figure(1750, 2700, "counted in the compiled loop; the upper end where the L2 cache binds"),
    copy=Figure(2.2e12, 3.0e12, "two thirds to nine tenths of the data sheet's 3.35e12"),
    launch=Figure(1 / 6e-6, 1 / 3e-6, "guess: 3 to 6 µs each"),
    cholesky=Figure(10e12, 25e12, "guess, from 67e12 of the float64 tensor cores (data sheet)"),
    solves=Figure(4e12, 10e12, "guess: triangular solves of a hundred columns are no large products"),
    eigh=Figure(2e12, 4.5e12, "guess: below 3 % of the float64 peak are reported (arXiv 2410.02170)"),
    small=Figure(5e4, 1e5, "guess: a column of the tridiagonal form waits for a few launches"),
    transfer=Figure(20e9, 50e9, "guess, from PCIe 5's 64e9 (data sheet)"),
    side_by_side=Figure(1.5, 3.0, "guess: three or four sites on streams of their own"),
)


@dataclass(frozen=True)
class Work:
    """A calibration.

    Attributes:
        shape: a key of `benchmarks.shapes.SHAPES`, of Llama's kind.
        samples, length, batch_size, rank: as in `nullspace.planning.plan.Workload`.
        blocks: how many of the shape's; None for all.
        weights: `"device"`, or `"host"`: every block is brought once, while the one before computes.
    """

    shape: str
    samples: int = 256
    length: int = 1024
    batch_size: int = 4
    rank: int = 128
    blocks: int | None = None
    weights: str = "device"

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.samples * self.length

    @property
    def updates(self) -> int:
        """Batches."""
        return -(-self.samples // self.batch_size)

    def counts(self) -> tuple[int, list[int], float, float]:
        """Blocks; widths of a block's sites; flops of a block's forward pass over all tokens; bytes of its weights in bf16."""
        from benchmarks import shapes

        config = shapes.config(self.shape, blocks=self.blocks)
        hidden, inner = config.hidden_size, config.intermediate_size
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
        weights = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
        flops = 2.0 * self.tokens * weights + 2.0 * self.tokens * self.length * queries  # causal: half of both products
        return config.num_hidden_layers, [hidden, queries, hidden, inner], flops, 2.0 * weights


@dataclass(frozen=True)
class Price:
    """Seconds of a calibration.

    Attributes:
        parts: forward, kernel, staging, solves (one after the other), weights (their transfer, before anything hides it).
        total: one part after the other, transfers of weights hidden behind the block before.
        overlapped: several sites solved at once, beside the next block's forward pass.
        eigh: `torch.linalg.eigh` in the place of the solves.
    """

    parts: Mapping[str, Seconds]
    total: Seconds
    overlapped: Seconds
    eigh: Seconds


def price(work: Work, gpu: Gpu = H100) -> Price:
    """The forecast of a calibration, block by block; reading data, loading, the output head and injection are left out."""
    count, widths, flops, weights = work.counts()
    zero = Seconds(0.0, 0.0, True)
    block = {
        "forward": at(flops, gpu.forward),
        "kernel": zero.plus(*(gpu.kernel_seconds(d, work.tokens) for d in widths)),
        "staging": zero.plus(*(gpu.staging_seconds(d, work.tokens, work.updates) for d in widths)),
        "solves": zero.plus(*(gpu.solve_seconds(d, work.rank) for d in widths)),
    }
    parts = {name: seconds.times(count) for name, seconds in block.items()}
    running = block["forward"].plus(block["kernel"], block["staging"])
    coming = at(weights if work.weights == "host" else 0.0, gpu.transfer)
    waited = _beyond(coming, running).times(count - 1).plus(coming)
    total = running.times(count).plus(parts["solves"], waited)
    solving = Seconds(
        block["solves"].low / gpu.side_by_side.high, block["solves"].high / gpu.side_by_side.low, block["solves"].measured
    )
    # Each block's solves go on beside the next block's forward pass; those of the last are waited for.
    overlapped = running.times(count).plus(_beyond(solving, running).times(count - 1), solving, waited)
    return Price(
        parts={**parts, "weights": coming.times(count)},
        total=total,
        overlapped=overlapped,
        eigh=zero.plus(*(gpu.eigh_seconds(d) for d in widths)).times(count),
    )


def _beyond(hidden: Seconds, behind: Seconds) -> Seconds:
    """What is seen of one thing beside another."""
    return Seconds(max(0.0, hidden.low - behind.low), max(0.0, hidden.high - behind.high), hidden.measured and behind.measured)


# ---- what first_gpu has measured


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of `benchmarks.first_gpu` in a folder, by command; dry runs are left out."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in read.items() if result.get("command") == name and not result.get("dry_run")}


def measured_on(results: Mapping[str, Mapping[str, Any]], gpu: Gpu = H100) -> Gpu:
    """The GPU with every figure that the results know."""
    rows = [row for result in results.values() for row in result["rows"]]
    device = next((result["environment"]["gpu"] for result in results.values()), gpu.name)
    found: dict[str, Figure] = {}

    def know(name: str, values: list[float], origin: str) -> None:
        if values:
            found[name] = Figure(statistics.median(values), statistics.median(values), origin, measured=True)

    ceilings = {row["ceiling"]: row["value"] for row in rows if "ceiling" in row}
    know("copy", [v * 1e12 for n, v in ceilings.items() if n.startswith("copy of 1 GiB")], "kernels: a copy of 1 GiB")
    know("transfer", [v * 1e9 for n, v in ceilings.items() if n.startswith("from pinned")], "kernels: a pinned copy")
    windows = [
        row["ms"] / 1e3 * gpu.clock / (_waves(row["d"], gpu) * row["tokens"] / WINDOW)
        for row in rows
        if row.get("variant") == "default" and row.get("d", 0) >= 4096 and "cublas_ms" in row
    ]
    know("cycles", windows, "kernels: the default variant, at the nominal clock, the triangle's traffic included")
    know("cholesky", [row["cholesky_tflops"] * 1e12 for row in rows if "cholesky_tflops" in row], "solvers: parts")
    wide = [row for row in rows if row.get("width", 0) >= 72 and "solve_s" in row]
    solves = [max(2.0 * d * d * row["width"] / row["solve_s"] for row in wide if row["d"] == d) for d in {row["d"] for row in wide}]
    know("solves", solves, "solvers: the fastest application of the factor to 72 columns or more")
    eighs = [9.0 * row["d"] ** 3 / row["seconds"] for row in rows if row.get("method") == "torch.linalg.eigh" and "seconds" in row]
    know("eigh", eighs, "solvers: torch.linalg.eigh")
    small = [row["n"] / row["device_s"] for row in rows if row.get("n", 0) >= 432 and "device_s" in row]
    know("small", small, "solvers: small eigenproblems on the device")
    gains = [1 / row["over one after the other"] for row in rows if row.get("at once", 0) >= 3]
    know("side_by_side", gains, "solvers: three and four at once")
    forward = [
        Work("Llama-3-8B", blocks=row["blocks"]).counts() for row in rows if row.get("variant") == "forward" and "seconds" in row
    ]
    seconds = [row["seconds"] for row in rows if row.get("variant") == "forward" and "seconds" in row]
    know("forward", [c * f / s for (c, _, f, _), s in zip(forward, seconds, strict=True)], "job: the bare forward pass")
    return replace(gpu, name=device or gpu.name, **found)


def _waves(d: int, gpu: Gpu) -> int:
    blocks = -(-d // TILE)
    return -(-blocks * (blocks + 1) // 2 // gpu.multiprocessors)
