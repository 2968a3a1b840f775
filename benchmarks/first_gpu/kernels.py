"""Every variant of the SYRK kernel: is it exact, what does it lose to rounding, and how fast is it beside cuBLAS?

    python -m benchmarks.first_gpu.kernels --out FOLDER             # about 5 minutes; writes kernels.json
    python -m benchmarks.first_gpu.kernels --out FOLDER --sweep     # candidates for the tile table instead

A variant runs in a process of its own with a time limit: a kernel with a wrong barrier hangs. One that this device or Triton
cannot run, so that another would take its place, is skipped. First a variant must be exact on small integers, else it is not timed.
Then its resolution δ = ‖E − αG‖ / ‖G‖ against float64 on rows with a real layer's spectrum (λ_128 / λ_max = 1e-6), in one launch
and in four. Then its speed at d = 4096 and 14336 with 8k and 16k tokens in turns with cuBLAS bf16 `mm` (the full square, float32
result) on the same rows, round by round, medians.

"full" counts 2 · tokens · d², what a full product takes; "executed" what the tiles really multiply. "cycles a window" are the
device's clock over the windows that one multiprocessor computes. "operands GB/s" is what all tiles together ask of the L2 cache. If
the small width, whose rows fit L2, takes as many cycles a window as the large one, main memory does not bind; if operands GB/s is
near what L2 gives a copy, L2 does. Left out of the times: drawing, compiling, the first rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from benchmarks.children import lines_of, seconds_since_start
from benchmarks.first_gpu.command import Command, options_of, start_device

ANSWERS = [
    "does each variant of the kernel run, and is it exact?",
    "what does each lose to rounding on real tensor cores?",
    "which is the fastest, and is it 1.5 times as fast as cuBLAS at δ ≤ 3e-8?",
    "what binds it: arithmetic, the L2 cache or main memory?",
]
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "widths": (4096, 14336),
        "tokens": (8192, 16384),
        "error": (16384, 1024),
        "exact": (1000, 1000),
        "rounds": 10,
        "rank": 128,
    },
    "cpu": {"widths": (96,), "tokens": (160,), "error": (512, 64), "exact": (130, 136), "rounds": 1, "rank": 8},
}
# Of the sweep: widths from a small model's to a large one's, and tokens of a launch (a run stages 512 to 8,192).
SWEPT: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"widths": (512, 1024, 2048, 4096, 14336), "tokens": (1024, 8192)},
    "cpu": {"widths": (40, 96), "tokens": (160,)},
}
CEILINGS = "ceilings"
VARIANT_SECONDS = 75.0
SWEEP_SECONDS = 400.0


def candidates(device: str) -> dict[str, Any]:
    """Name → tiling (None: the table's choice): the variants, and other windows of the table's."""
    import torch

    from nullspace.csrc_triton import tiles

    base = tiles.tiling_for(torch.bfloat16, torch.device(device), max(SIZES[device]["widths"]))
    named: dict[str, Any] = {"default": None}
    for variant in tiles.VARIANTS:
        if variant != base.variant:
            named[variant] = base._replace(variant=variant, window=512 if variant == "gemm" else base.window)
            if variant.startswith("gluon"):  # windows of one step
                named[variant] = named[variant]._replace(window=128, block_k=128, stages=3)
    for window in sorted({64, 128, 256, 512} - {base.window}):
        named[f"window {window}"] = base._replace(window=window, block_k=min(window, base.block_k))
    if base.descriptor:
        named["pointers"] = base._replace(descriptor=False)
    return named


# ---- in a child process: one variant


def rows_of(name: str, device: str) -> Iterator[dict[str, Any]]:
    """What a child measures of one variant, a row at a time."""
    import torch

    where, sizes = torch.device(device), SIZES[device]
    yield {"startup": {"python and imports": seconds_since_start(), **start_device(device)}}
    if name == CEILINGS:
        yield from ceilings(where, sizes)
        return
    tiling = candidates(device)[name]
    if tiling is not None and (ran := ran_as(tiling, where, sizes["exact"])) != tiling.variant:
        yield {"skipped": f"it would run as {ran}"}
        return
    exact = exactness(tiling, where, sizes["exact"])
    yield exact
    if not exact["exact"]:
        return
    yield resolutions(tiling, where, sizes)
    for d in sizes["widths"]:
        for tokens in sizes["tokens"]:
            yield speed({name: tiling}, d, tokens, where, sizes["rounds"])[0]


def ran_as(tiling: Any, device: Any, shape: tuple[int, int]) -> str:
    """The variant that a tiling really runs as: another takes the place of what this device or Triton cannot run."""
    from benchmarks.first_gpu.inputs import draw
    from nullspace.csrc_triton.syrk import runnable

    return runnable(tiling, draw(*shape, device)).variant


def exactness(tiling: Any, device: Any, shape: tuple[int, int]) -> dict[str, Any]:
    """Whether the sum of small integers is exact; seconds of the first call, which compiles."""
    import torch

    from benchmarks.first_gpu.inputs import kernel_sum
    from benchmarks.first_gpu.timing import timed

    tokens, d = shape
    x = torch.randint(-8, 9, (tokens, d), generator=torch.Generator(device).manual_seed(0), device=device).bfloat16()
    seconds, g = timed(lambda: kernel_sum([x], tiling), device)
    return {"exact": torch.equal(g, x.double().T @ x.double()), "first_call_s": seconds}


def resolutions(tiling: Any, device: Any, sizes: dict[str, Any]) -> dict[str, float]:
    """δ of one launch and of four, on the same rows."""
    from benchmarks.first_gpu.inputs import activations, float64_sum, kernel_sum, resolution

    tokens, d = sizes["error"]
    (rows,) = activations(tokens, d, tokens, device, rank=sizes["rank"])
    exact = float64_sum([rows])
    return {f"delta, {launches} launches": resolution(kernel_sum(list(rows.chunk(launches)), tiling), exact) for launches in (1, 4)}


def speed(variants: dict[str, Any], d: int, tokens: int, device: Any, rounds: int) -> list[dict[str, Any]]:
    """Of some tilings in turns with cuBLAS; the fastest first."""
    import torch

    from benchmarks.first_gpu.inputs import cublas_float32, draw
    from benchmarks.first_gpu.timing import interleaved
    from nullspace import csrc_triton
    from nullspace.csrc_triton.syrk import runnable
    from nullspace.csrc_triton.tiles import tiling_for
    from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle

    x, triangle = draw(tokens, d, device), LowerTriangle(d, device=device)

    def ours(tiling: Any) -> Any:
        return lambda: csrc_triton.syrk_accumulate(triangle.packed, x, panel_rows=PANEL_ROWS, tiling=tiling)

    runs = {"cuBLAS": lambda: cublas_float32(x), **{name: ours(tiling) for name, tiling in variants.items()}}
    times = interleaved(runs, device, rounds=rounds)
    clock = clock_hz(device)
    rows = []
    for name, tiling in variants.items():
        chosen = runnable(tiling or tiling_for(torch.bfloat16, device, d), x)
        is_full = chosen.variant == "gemm"
        ms, blocks = times.median(name), -(-d // chosen.block)
        tiles = blocks * (blocks + 1) // 2
        waves = -(-tiles // torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else tiles
        rows.append(
            {
                "d": d,
                "tokens": tokens,
                "tiling": tuple(chosen),  # what ran: Gluon may have been replaced
                "ms": ms,
                "rounds_ms": times.ms[name],
                "cublas_ms": times.median("cuBLAS"),
                "over cuBLAS": times.median("cuBLAS") / ms,
                "tflops_full": 2 * tokens * d**2 / ms / 1e9,
                "tflops_executed": 2 * (d**2 if is_full else tiles * chosen.block**2) * tokens / ms / 1e9,
                "operands_gb_s": None if is_full else 4 * tiles * chosen.block * tokens / ms / 1e6,
                "cycles a window": clock * ms / 1e3 / waves / (tokens / chosen.window) if clock and not is_full else None,
            }
        )
    return sorted(rows, key=lambda row: row["ms"])


def clock_hz(device: Any) -> float | None:
    """The multiprocessors' clock now; None where it cannot be read."""
    import torch

    try:
        return torch.cuda.clock_rate() * 1e6 if device.type == "cuda" else None
    except Exception:  # the management library is absent, or may not be asked
        return None


def ceilings(device: Any, sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the device reaches: bf16 and float64 products, copies within L2 and within main memory, to and from the host."""
    import torch

    from benchmarks.first_gpu.inputs import draw
    from benchmarks.first_gpu.timing import interleaved

    cuda = device.type == "cuda"
    n, m = (8192, 4096) if cuda else (64, 64)
    half, double = draw(n, n, device), draw(m, m, device, torch.float64)
    single = draw(m, m, device, torch.float32)
    small, large = (torch.empty(size, dtype=torch.uint8, device=device) for size in ((2**23, 2**30) if cuda else (2**12, 2**16)))
    pinned = torch.empty(2**28 if cuda else 2**16, dtype=torch.uint8, pin_memory=cuda)
    runs = {
        "bf16 product, TFLOP/s": (lambda: half.T @ half, 2 * n**3 / 1e12),
        "float64 product, TFLOP/s": (lambda: double.T @ double, 2 * m**3 / 1e12),
        "float32 product, TFLOP/s": (lambda: single.T @ single, 2 * m**3 / 1e12),
        "copy of 8 MiB, TB/s read and written": (small.clone, 2 * small.nbytes / 1e12),
        "copy of 1 GiB, TB/s read and written": (large.clone, 2 * large.nbytes / 1e12),
        "from pinned memory, GB/s": (lambda: large[: len(pinned)].copy_(pinned, non_blocking=True), pinned.nbytes / 1e9),
    }
    times = interleaved({name: run for name, (run, _) in runs.items()}, device, rounds=sizes["rounds"])
    for name, (_, amount) in runs.items():
        yield {"ceiling": name, "value": amount / (times.median(name) / 1e3), "first_call_s": times.first_s[name]}


def sweep(device: str) -> Iterator[dict[str, Any]]:
    """All candidates for the tile table, at every width and number of tokens, wrong ones left out; then the table's rows."""
    import torch

    from nullspace.csrc_triton.tiles import Tiling
    from nullspace.csrc_triton.tiles import candidates as tilings_for

    where, sizes = torch.device(device), SWEPT[device]
    checked: dict[Tiling, bool] = {}
    best = {}
    for d in sizes["widths"]:
        for tiling in tilings_for(torch.bfloat16, where, d):
            if tiling in checked:
                continue
            try:
                checked[tiling] = exactness(tiling, where, SIZES[device]["exact"])["exact"]
                failure = "wrong"
            except Exception as error:  # too large for the device: no candidate
                checked[tiling], failure = False, str(error)[:120]
            if not checked[tiling]:
                yield {"tiling": tuple(tiling), "failed": failure}
        good = {str(tuple(t)): t for t in tilings_for(torch.bfloat16, where, d) if checked[t]}
        for tokens in sizes["tokens"]:
            rows = speed(good, d, tokens, where, SIZES[device]["rounds"])
            yield from rows
            best[d, tokens] = rows[0]
    for (d, tokens), row in best.items():
        yield {"table row": {d: repr(Tiling(*row["tiling"]))}, "tokens": tokens, "over cuBLAS": row["over cuBLAS"]}


# ---- the command


def run(command: Command, *, sweeping: bool = False) -> None:
    """All variants, each in its child."""
    device = command.options.device
    if sweeping:
        for row in lines_of(__spec__.name, child_arguments(command.options, "sweep"), timeout=min(SWEEP_SECONDS, command.left)):
            command.add(what="sweep", **row)
        return
    for name in (CEILINGS, *candidates(device)):
        if not command.has_time(name, 30.0 if not command.dry else 1.0):
            continue
        for row in lines_of(__spec__.name, child_arguments(command.options, name), timeout=min(VARIANT_SECONDS, command.left)):
            command.add(variant=name, **row)
    judge(command)


def child_arguments(options: argparse.Namespace, name: str) -> list[str]:
    """Of the child that runs one variant."""
    return ["--out", str(options.out), "--device", options.device, "--run", name]


def judge(command: Command) -> None:
    """The figures of the goals, from the rows: only variants that are exact and lose little count."""
    deltas: dict[str, float] = {}
    for row in command.rows:
        losses = [value for key, value in row.items() if key.startswith("delta")]
        if losses:
            deltas[row["variant"]] = max(losses)
    if "default" in deltas:
        command.measure("resolution", deltas["default"])
    for d in SIZES["cuda"]["widths"]:
        ratios = [
            row["over cuBLAS"]
            for row in command.rows
            if row.get("d") == d and row["tokens"] == 16384 and deltas.get(row["variant"], 1.0) <= 3e-8
        ]
        if ratios:
            command.measure(f"kernel {d}", max(ratios))


def main(argv: list[str] | None = None) -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sweep", action="store_true", help="time candidates for the tile table instead")

    options = options_of("kernels", __doc__, argv, more=more)
    if options.run:
        for row in sweep(options.device) if options.run == "sweep" else rows_of(options.run, options.device):
            print(json.dumps(row), flush=True)
        return
    with Command("kernels", ANSWERS, options) as command:
        run(command, sweeping=options.sweep)


if __name__ == "__main__":
    main()
