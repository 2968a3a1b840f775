"""The second-moment kernel against cuBLAS: right first, then fast.

    python -m benchmarks.gpu_syrk            # under 8 minutes on one GPU; writes benchmarks/results/gpu_syrk-<device>.json
    python -m benchmarks.gpu_syrk --sweep    # the tile table: every candidate at two widths, nothing written but its own file

Workload: x of (tokens, d) in bfloat16, drawn at random; `syrk_accumulate` adds the lower triangle of xᵀx to a float64 matrix that
it reads and writes. Beside it, on the same x: cuBLAS bfloat16 `mm` with a float32 result (the full square, in float32 sums), the
same and its addition to a float64 matrix, cuBLAS float64 and cuBLAS float32 (no TF32). All variants take turns, round by round; a
figure is the median of its rounds (of `Covariance.update`, which launches only now and then, the mean). Left out of the times:
drawing x, compiling, the first rounds.

"TFLOP/s, full" counts 2 · tokens · d², what a full product takes, for every variant; "executed" counts what a variant's tiles
really multiply.

Beside each width the error: of the bottom-128 space of activations with a real layer's spectrum, stretched so that λ_128 / λ_max =
1e-6, (a) as they are and (b) with 32 rows scaled by 1e3, the *excess leak* ‖XU‖ / ‖XU_fp64‖ − 1 of the eigenvectors U of each sum
(float64 eigensolver for all); and the *resolution* δ = ‖E − αG‖ / ‖G‖ of the kernel on (a), the α that makes it least left out.

Without a GPU the checks and the errors run at small sizes through Triton's interpreter, and nothing is timed or written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.environment import RESULTS, write_result  # noqa: E402
from nullspace import Covariance, csrc_triton  # noqa: E402
from nullspace.csrc_triton import naive, syrk_accumulate  # noqa: E402
from nullspace.csrc_triton.tiles import Tiling, tiling_for  # noqa: E402
from nullspace.moments.sums_torch import full_precision_matmul  # noqa: E402
from nullspace.moments.sums_triton import TritonSums  # noqa: E402
from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
WIDTHS = (4096, 11008, 14336, 28672) if GPU else (96, 300)
TOKENS = (2048, 8192, 16384) if GPU else (256,)
RANK = 128 if GPU else 16
WINDOWS = (64, 128, 256, 512)
ROUNDS, SLOW_ROUNDS, WARM_UP = 20, 3, 3
MASSIVE_ROWS, MASSIVE_SCALE = 32, 1e3
STEEPNESS = 1e-6
# log10 of λ / λ_max of the inputs of SmolLM2-135M's layer 15 o_proj (5,120 tokens of English, float64), at fractions of the
# spectrum counted from the top.
FRACTIONS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 1.0)
LOG_SPECTRUM = (0.0, -1.46, -2.07, -2.92, -3.47, -3.94, -4.30, -4.59, -4.76, -5.31)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ data


def draw(tokens: int, d: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, d, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def activations(tokens: int, d: int, chunk: int) -> list[torch.Tensor]:
    """bfloat16 rows with the stretched spectrum, along directions that are no axes."""
    logs = np.interp(np.linspace(0, 1, d), FRACTIONS, LOG_SPECTRUM)
    logs *= np.log10(STEEPNESS) / logs[d - RANK]
    generator = torch.Generator(DEVICE).manual_seed(1)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator, device=DEVICE)).Q
    directions *= torch.tensor(10 ** (logs / 2), dtype=torch.float32, device=DEVICE)
    with full_precision_matmul(DEVICE.type):
        return [
            (torch.randn(chunk, d, generator=generator, device=DEVICE) @ directions.T).bfloat16()
            for _ in range(-(-tokens // chunk))
        ]


def with_massive_rows(chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    rows = torch.randperm(sum(map(len, chunks)), generator=torch.Generator().manual_seed(0))[:MASSIVE_ROWS]
    scaled = [chunk.clone() for chunk in chunks]
    for row in rows.tolist():
        scaled[row // len(chunks[0])][row % len(chunks[0])] *= MASSIVE_SCALE
    return scaled


# ------------------------------------------------------------------------------------------------ sums that are compared


def cublas_float32(x: torch.Tensor) -> torch.Tensor:
    """The full product of 16-bit inputs, in float32 sums, as a float32 matrix."""
    return torch.mm(x.T, x, out_dtype=torch.float32) if GPU else x.float().T @ x.float()


def float64_sum(chunks: list[torch.Tensor]) -> torch.Tensor:
    d = chunks[0].shape[1]
    g = torch.zeros(d, d, dtype=torch.float64, device=DEVICE)
    for chunk in chunks:
        for part in chunk.split(4096):
            wide = part.double()
            g.addmm_(wide.T, wide)
    return g


def float32_sum(chunks: list[torch.Tensor]) -> torch.Tensor:
    """cuBLAS over each chunk, the chunks added in float64."""
    d = chunks[0].shape[1]
    g = torch.zeros(d, d, dtype=torch.float64, device=DEVICE)
    for chunk in chunks:
        g += cublas_float32(chunk)
    return g


def kernel_sum(chunks: list[torch.Tensor], tiling: Tiling | None = None) -> torch.Tensor:
    triangle = LowerTriangle(chunks[0].shape[1], device=DEVICE)
    for chunk in chunks:
        syrk_accumulate(triangle.packed, chunk, panel_rows=PANEL_ROWS, tiling=tiling)
    return triangle.square()


def covariance_sum(chunks: list[torch.Tensor]) -> torch.Tensor:
    """The kernel as the engine uses it: outlier tokens apart."""
    covariance = Covariance(chunks[0].shape[1], device=DEVICE)
    if not GPU:
        covariance._sums = TritonSums(covariance.d_in, DEVICE)
    for chunk in chunks:
        covariance.update(chunk)
    return covariance.matrix()


# ------------------------------------------------------------------------------------------------ right


def check() -> None:
    """Stop if the kernel is wrong: exact on small integers for every dtype and many shapes, close on reals, the same twice."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, d in ((1, 1), (7, 3), (130, 127), (128, 128), (129, 300), (1000, 1000) if GPU else (60, 130)):
            x = torch.randint(-8, 9, (tokens, d + 8), generator=generator, device=DEVICE).to(dtype)[:, 8:]
            g = torch.zeros(d, d, dtype=torch.float64, device=DEVICE)
            expected = g.clone()
            syrk_accumulate(g, x)
            naive.syrk_accumulate(expected, x)
            if not torch.equal(g, expected):
                raise SystemExit(f"wrong: {dtype}, {tokens} × {d}: {(g - expected).abs().max().item():.3g} off at most")
        for d in (1500, 1504) if GPU else (130, 136):  # rows that a descriptor cannot address, and rows that it can
            error = error_on_reals(draw(4096 if GPU else 300, d, dtype))
            if error > 1e-6:
                raise SystemExit(f"wrong: {dtype}, width {d}: error {error:.2g}, or not the same twice")
        print(f"checked {dtype!s:15} exact on integers, largest error {error:.1e} on reals, the same bits twice", flush=True)


def error_on_reals(x: torch.Tensor, tiling: Tiling | None = None) -> float:
    """The largest error of an entry, relative to √(g_ii g_jj); infinite if two runs differ."""
    sums = []
    for _ in range(2):
        g = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=DEVICE)
        syrk_accumulate(g, x, tiling=tiling)
        sums.append(g)
    exact = x.double().T @ x.double()
    scale = exact.diagonal().sqrt()
    error = float(((sums[0] - exact.tril()).tril().abs() / (scale[:, None] * scale)).max())
    return error if torch.equal(*sums) else float("inf")


def resolution(g: torch.Tensor, exact: torch.Tensor) -> float:
    error = g - exact
    alpha = (error * exact).sum() / exact.square().sum()
    return float(error.sub_(exact, alpha=float(alpha)).norm() / exact.norm())


def leak(basis: torch.Tensor, chunks: list[torch.Tensor]) -> float:
    """‖XU‖_F, from X itself."""
    return sum(float((part.double() @ basis).square().sum()) for chunk in chunks for part in chunk.split(4096)) ** 0.5


def tiling_with(window: int) -> Tiling:
    base = tiling_for(torch.bfloat16, DEVICE)
    return base._replace(window=window, block_k=min(window, base.block_k))


def bottom(g: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigh(g)[1][:, :RANK].clone()


def errors(d: int, windows: tuple[int, ...], *, cublas: bool = True) -> dict[str, Any]:
    """Excess leak and resolution at one width, of the kernel and, if wanted, of cuBLAS."""
    chunk = 8192 if GPU else 512
    plain = activations(max(2 * chunk, round(2.5 * d)), d, chunk)
    result: dict[str, Any] = {"tokens": sum(map(len, plain))}
    for name, chunks in (("a", plain), ("b", with_massive_rows(plain))):
        exact = float64_sum(chunks)
        started = time.perf_counter()
        optimum = leak(bottom(exact), chunks)
        synchronize()
        result[f"eigh_s_{name}"] = time.perf_counter() - started
        variants: dict[str, Callable[[], torch.Tensor]] = {
            "ours": lambda c=chunks: covariance_sum(c),
            "cublas": lambda c=chunks: float32_sum(c),
        }
        if name == "a":
            for window in windows:
                variants[f"window {window}"] = lambda c=chunks, w=window: kernel_sum(c, tiling_with(w))
        for variant, sum_of in variants.items():
            if variant == "cublas" and not cublas:
                continue
            g = sum_of()
            result[f"excess_{name} {variant}"] = leak(bottom(g), chunks) / optimum - 1
            if name == "a":
                result[f"delta {variant}"] = resolution(g, exact)
            del g
    return result


# ------------------------------------------------------------------------------------------------ fast


def interleaved(variants: dict[str, Callable[[], Any]], slow: set[str]) -> dict[str, list[float]]:
    """Milliseconds of every round of every variant, on the device: a sleep before each gives the host time to queue it."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name, run in variants.items():
        for _ in range(1 if name in slow else WARM_UP):
            run()
    for number in range(ROUNDS):
        for name, run in variants.items():
            if name in slow and number >= SLOW_ROUNDS:
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(2_000_000)  # about a millisecond
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def executed(tokens: int, d: int, block: int) -> int:
    blocks = -(-d // block)
    return blocks * (blocks + 1) * block**2 * tokens


def timings(d: int, tokens: int) -> dict[str, Any]:
    x = draw(tokens, d)
    triangle = LowerTriangle(d, device=DEVICE)
    covariance = Covariance(d, device=DEVICE)
    base = tiling_for(x.dtype, DEVICE)
    wide = x.double()
    single = x.float()

    def mm_and_add() -> None:
        square.add_(cublas_float32(x))

    square = torch.zeros(d, d, dtype=torch.float64, device=DEVICE)
    variants: dict[str, Callable[[], Any]] = {
        "ours": lambda: syrk_accumulate(triangle.packed, x, panel_rows=PANEL_ROWS),
        "cublas bf16": lambda: cublas_float32(x),
        "cublas bf16, added to float64": mm_and_add,
        "Covariance.update": lambda: covariance.update(x),
        "cublas fp64": lambda: wide.T @ wide,
        "cublas fp32": lambda: single.T @ single,
        "ours, fp32 input": lambda: syrk_accumulate(triangle.packed, single, panel_rows=PANEL_ROWS),
    }
    for window in WINDOWS:
        if window != base.window:
            variants[f"window {window}"] = lambda w=window: syrk_accumulate(
                triangle.packed, x, panel_rows=PANEL_ROWS, tiling=tiling_with(w)
            )
    with full_precision_matmul(DEVICE.type):
        times = interleaved(variants, slow={"cublas fp64", "cublas fp32", "ours, fp32 input"})
        host = [host_milliseconds(variants["ours"]) for _ in range(ROUNDS)]
    full = 2 * tokens * d**2
    rows = {}
    for name, runs in times.items():
        median = statistics.fmean(runs) if name == "Covariance.update" else statistics.median(runs)
        kernel = name.startswith(("ours", "window"))
        done = (
            executed(tokens, d, base.block if "fp32" not in name else tiling_for(torch.float32, DEVICE).block) if kernel else full
        )
        rows[name] = {
            "ms": runs,
            "median_ms": median,
            "tflops_full": full / median / 1e9,
            "tflops_executed": done / median / 1e9,
            "against cublas bf16": statistics.median(times["cublas bf16"]) / median,
        }
    rows["ours"]["host_ms"] = statistics.median(host)
    return rows


def host_milliseconds(run: Callable[[], Any]) -> float:
    """What a launch costs the host: checks, descriptor, dispatch."""
    synchronize()
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def sweep(out: Path) -> None:
    """Every candidate tiling at two widths: what the tile table should hold."""
    rows: list[dict[str, Any]] = []
    for d in (4096, 14336):
        x = draw(16384, d)
        triangle = LowerTriangle(d, device=DEVICE)
        sample = draw(2048, 1024)
        variants: dict[str, Callable[[], Any]] = {"cublas bf16": lambda x=x: cublas_float32(x)}
        for block, warps in ((128, 8), (64, 4)):
            for block_k in (32, 64, 128):
                for stages in (2, 3, 4, 5):
                    for window in WINDOWS:
                        for descriptor in (True, False):
                            bytes_shared = stages * 2 * block * block_k * 2
                            if bytes_shared > 220 * 1024 or window < block_k or (window != 128 and stages not in (3, 4)):
                                continue
                            if block == 64 and (window != 128 or not descriptor):
                                continue
                            tiling = Tiling(block, block_k, window, warps, stages, descriptor)
                            run = lambda t=tiling, x=x, g=triangle: syrk_accumulate(g.packed, x, panel_rows=PANEL_ROWS, tiling=t)  # noqa: E731
                            try:
                                error = error_on_reals(sample, tiling)
                            except Exception as failure:  # too large for the device: not a candidate
                                print(f"{tiling}: {str(failure)[:80]}", flush=True)
                                continue
                            if error > 2e-6:
                                print(f"{tiling}: wrong by {error:.1e}", flush=True)
                                continue
                            variants[str(tuple(tiling))] = run
        times = interleaved(variants, slow=set())
        reference = statistics.median(times["cublas bf16"])
        for name, runs in sorted(times.items(), key=lambda item: statistics.median(item[1])):
            rows.append(
                {
                    "d": d,
                    "tiling": name,
                    "median_ms": statistics.median(runs),
                    "against cublas bf16": reference / statistics.median(runs),
                }
            )
            print(f"d {d:6} {name:45} {rows[-1]['median_ms']:8.3f} ms {rows[-1]['against cublas bf16']:6.3f} ×", flush=True)
    print(f"wrote {write_result(f'gpu_syrk_sweep-{slug()}', {'fields': Tiling._fields, 'rows': rows}, out)}")


# ------------------------------------------------------------------------------------------------ report


def slug() -> str:
    return torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")


def table(result: dict[str, Any]) -> str:
    """Markdown, for the README."""
    lines = [
        "| d_in | tokens | kernel, TFLOP/s full (executed) | cuBLAS bf16 | ratio | excess (a), kernel / cuBLAS | (b) | δ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for d, by_tokens in result["timings"].items():
        e = result["errors"].get(d, {})
        for tokens, rows in by_tokens.items():
            ours, theirs = rows["ours"], rows["cublas bf16"]
            cells = [
                " / ".join(f"{e[f'excess_{name} {who}']:.0e}" for who in ("ours", "cublas") if f"excess_{name} {who}" in e) or "–"
                for name in "ab"
            ]
            error = " | ".join([*cells, f"{e['delta ours']:.0e}" if "delta ours" in e else "–"])
            lines.append(
                f"| {d} | {tokens} | {ours['tflops_full']:.0f} ({ours['tflops_executed']:.0f}) | {theirs['tflops_full']:.0f} | "
                f"{ours['against cublas bf16']:.2f} × | {error} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--error-widths", type=int, nargs="*", help="widths at which errors are taken (default: all)")
    parser.add_argument("--seconds", type=float, default=240, help="after this no further width's errors are begun")
    parser.add_argument("--sweep", action="store_true", help="time every candidate of the tile table instead")
    arguments = parser.parse_args()
    if GPU and (obstacle := csrc_triton.unavailable(DEVICE)):
        sys.exit(f"the kernels cannot run here: {obstacle}")
    started = time.perf_counter()
    check()
    if arguments.sweep:
        sweep(arguments.out)
        return
    result: dict[str, Any] = {"rank": RANK, "tiling": tiling_for(torch.bfloat16, DEVICE)._asdict(), "timings": {}, "errors": {}}
    for d in arguments.widths:
        if GPU:
            result["timings"][d] = {}
            for tokens in TOKENS:
                try:
                    rows = timings(d, tokens)
                except torch.OutOfMemoryError as error:
                    print(f"d {d:6} tokens {tokens:6} {str(error)[:120]}", flush=True)
                    continue
                result["timings"][d][tokens] = rows
                for name, row in rows.items():
                    print(
                        f"d {d:6} tokens {tokens:6} {name:30} {row['median_ms']:9.3f} ms  full {row['tflops_full']:7.1f}  executed "
                        f"{row['tflops_executed']:7.1f} TFLOP/s  {row['against cublas bf16']:5.2f} ×",
                        flush=True,
                    )
                torch.cuda.empty_cache()
            write_result(f"gpu_syrk-{slug()}", result, arguments.out)
    for d in arguments.widths if arguments.error_widths is None else arguments.error_widths:
        if time.perf_counter() - started > arguments.seconds:
            print(f"d {d:6} no time left for its errors: --error-widths {d}", flush=True)
            continue
        try:
            # At the largest width one `eigh` takes tens of seconds, and what cuBLAS loses is known from the others.
            result["errors"][d] = measured_errors = errors(d, WINDOWS if d <= 4096 else (), cublas=d <= 20_000)
        except RuntimeError as error:  # cuSOLVER has failed above 25,000; the speeds are worth keeping
            result["errors"][d] = measured_errors = {"failed": str(error)[:300]}
        print(
            f"d {d:6} " + ", ".join(f"{k} {v:.2e}" if isinstance(v, float) else f"{k} {v}" for k, v in measured_errors.items()),
            flush=True,
        )
        if GPU:
            torch.cuda.empty_cache()
            write_result(f"gpu_syrk-{slug()}", result, arguments.out)
    if not GPU:
        seconds = time.perf_counter() - started
        print(f"no GPU here: checked and measured through the interpreter in {seconds:.0f} s; nothing timed, nothing written")
        return
    result["seconds"] = time.perf_counter() - started
    print(f"\n{table(result)}\n\nwrote {write_result(f'gpu_syrk-{slug()}', result, arguments.out)} after {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
