"""Second moments as the engine sums them: what staging and outliers cost beside the kernel, and what rounding does to a basis.

    python -m benchmarks.first_gpu.sums --out FOLDER     # about 5 minutes; writes sums.json

Workload: x of (tokens, d) in bfloat16, drawn at random; `syrk_accumulate` adds the lower triangle of xᵀx to a float64 matrix that
it reads and writes. Beside it, on the same x: `Covariance.update` (of which a figure is the mean of its rounds, since it launches
only now and then), the staging pass alone, cuBLAS bfloat16 `mm` with a float32 result (the full square), the same and its addition
to a float64 matrix, cuBLAS float64 and cuBLAS float32 (no TF32). All take turns, round by round; other figures are medians.

Then the error, at some widths: of the bottom-128 space of rows with a real layer's spectrum, stretched so that λ_128 / λ_max =
1e-6, (a) as they are and (b) with 32 rows scaled by 1e3, the *excess leak* ‖XU‖ / ‖XU_fp64‖ − 1 of the eigenvectors U of each sum
(float64 `eigh` for all); and the *resolution* δ = ‖E − αG‖ / ‖G‖ on (a), the α that makes it least left out.

Last the experts of a mixture, one launch for all: `benchmarks.first_gpu.experts`. Left out of all times: drawing, compiling, the
first rounds; the first call of each is in its row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.first_gpu.command import Command, options_of

ANSWERS = [
    "what does Covariance.update cost beside the kernel alone, and what does staging?",
    "what does a launch cost the host?",
    "what does rounding do to the bottom of a real spectrum, with and without outlier tokens?",
    "is one launch for all experts of a mixture faster than a launch each, and than torch's products?",
]
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "widths": (4096, 11008, 14336, 28672),
        "tokens": (2048, 8192, 16384),
        "error widths": (4096,),
        "chunk": 8192,
        "rank": 128,
        "rounds": 10,
    },
    "cpu": {"widths": (40,), "tokens": (48,), "error widths": (64,), "chunk": 128, "rank": 8, "rounds": 1},
}
SLOW = ("cuBLAS fp64", "cuBLAS fp32", "kernel, fp32 input")


def speeds(d: int, tokens: int, device: Any, rounds: int) -> Iterator[dict[str, Any]]:
    """Everything that takes turns on one x, a row a variant."""
    import torch

    from benchmarks.first_gpu.inputs import draw
    from benchmarks.first_gpu.timing import interleaved
    from nullspace.moments.sums_torch import full_precision_matmul

    x = draw(tokens, d, device)
    variants = variants_of(x)
    with full_precision_matmul(device.type):
        times = interleaved(variants, device, rounds=rounds, slow=SLOW)
    host = [host_milliseconds(variants["kernel"], device) for _ in range(rounds)]
    full = 2 * tokens * d**2
    for name in variants:
        mean = name == "Covariance.update"
        ms = statistics.fmean(times.ms[name]) if mean else times.median(name)
        yield {
            "d": d,
            "tokens": tokens,
            "variant": name,
            "ms": ms,
            "rounds_ms": times.ms[name],
            "first_call_s": times.first_s[name],
            "tflops_full": full / ms / 1e9,
            "over the kernel": ms / times.median("kernel"),
            **({"host_ms": statistics.median(host)} if name == "kernel" else {}),
        }
    if device.type == "cuda":
        torch.cuda.empty_cache()


def variants_of(x: Any) -> dict[str, Callable[[], Any]]:
    """Name → what is timed, on rows x in bfloat16."""
    import torch

    from benchmarks.first_gpu.inputs import cublas_float32, new_covariance
    from nullspace import csrc_triton
    from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle

    d, device = x.shape[1], x.device
    triangle, covariance = LowerTriangle(d, device=device), new_covariance(d, device)
    wide, single, staged = x.double(), x.float(), torch.empty_like(x)
    square = torch.zeros(d, d, dtype=torch.float64, device=device)
    return {
        "kernel": lambda: csrc_triton.syrk_accumulate(triangle.packed, x, panel_rows=PANEL_ROWS),
        "Covariance.update": lambda: covariance.update(x),
        "staging alone": lambda: csrc_triton.stage_rows(x, staged),
        "cuBLAS bf16": lambda: cublas_float32(x),
        "cuBLAS bf16, added to float64": lambda: square.add_(cublas_float32(x)),
        "cuBLAS fp64": lambda: wide.T @ wide,
        "cuBLAS fp32": lambda: single.T @ single,
        "kernel, fp32 input": lambda: csrc_triton.syrk_accumulate(triangle.packed, single, panel_rows=PANEL_ROWS),
    }


def host_milliseconds(run: Callable[[], Any], device: Any) -> float:
    """What a launch costs the host: checks, descriptor, dispatch."""
    from benchmarks.first_gpu.timing import synchronize

    synchronize(device)
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def errors(d: int, device: Any, *, chunk: int, rank: int) -> Iterator[dict[str, Any]]:
    """Excess leak and resolution at one width, of the engine's sum and of cuBLAS."""
    import torch

    from benchmarks.first_gpu import inputs
    from benchmarks.first_gpu.timing import timed

    def bottom(g: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigh(g)[1][:, :rank].clone()

    plain = inputs.activations(max(2 * chunk, round(2.5 * d)), d, chunk, device, rank=rank)
    for name, chunks in (("as they are", plain), ("32 massive rows", inputs.with_massive_rows(plain))):
        exact = inputs.float64_sum(chunks)
        seconds, basis = timed(lambda exact=exact: bottom(exact), device)
        optimum = inputs.leak(basis, chunks)
        yield {"d": d, "tokens": sum(map(len, chunks)), "rows": name, "variant": "fp64", "leak": optimum, "eigh_s": seconds}
        for variant, sum_of in (("Covariance", inputs.covariance_sum), ("cuBLAS bf16", inputs.float32_sum)):
            g = sum_of(chunks)
            excess = inputs.leak(bottom(g), chunks) / optimum - 1
            delta = inputs.resolution(g, exact) if name == "as they are" else None
            yield {"d": d, "rows": name, "variant": variant, "excess": excess, "delta": delta}
            del g


def run(command: Command) -> None:
    """Speeds, experts, errors; what matters most first."""
    import torch

    from benchmarks.first_gpu import experts

    device = torch.device(command.options.device)
    sizes = SIZES[device.type]
    for d in sizes["widths"]:
        for tokens in sizes["tokens"]:
            # An H100's float64 products take the longest: two of 2 · tokens · d² flops at 50 TFLOP/s a round, three rounds.
            if not command.has_time(f"speeds, d = {d}, {tokens} tokens", 5 + 12 * tokens * d**2 / 5e13 if not command.dry else 0):
                continue
            try:
                for row in speeds(d, tokens, device, sizes["rounds"]):
                    command.add(what="speed", **row)
            except torch.OutOfMemoryError as error:
                command.leave_out(f"speeds, d = {d}, {tokens} tokens", str(error)[:120])
    if command.has_time("experts", 40 if not command.dry else 0):
        for row in experts.rows_of(device, rounds=sizes["rounds"]):
            command.add(what="experts", **row)
    for d in sizes["error widths"]:
        if command.has_time(f"errors, d = {d}", 60 if not command.dry else 0):
            for row in errors(d, device, chunk=sizes["chunk"], rank=sizes["rank"]):
                command.add(what="error", **row)


def main(argv: list[str] | None = None) -> None:
    with Command("sums", ANSWERS, options_of("sums", __doc__, argv)) as command:
        run(command)


if __name__ == "__main__":
    main()
