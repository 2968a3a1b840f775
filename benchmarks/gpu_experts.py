"""The grouped second-moment kernel on the experts of a mixture: one launch for all, against a loop over them and against torch.

    python -m benchmarks.gpu_experts    # about 3 minutes on one GPU; writes benchmarks/results/gpu_experts-<device>.json

Workload: the experts of one block of Qwen3-30B-A3B (128 experts, width 2048, inner width 768, 8 experts a token). Tokens are drawn
at random in bfloat16 and routed by random scores with a bias an expert, so that some experts get many tokens and some few: the
least, the median and the largest count are in the result. The rows of all token–expert pairs, sorted by expert, are the input of
`gate_up_proj` (width 2048) and of `down_proj` (width 768).

All variants take turns, round by round; a figure is the median of its rounds, measured on the device with the host's launches in
it. Left out: drawing, sorting, compiling, the first rounds. What a variant's result is differs, and stands beside it as an error:

- `grouped`: `syrk_accumulate_grouped`, added to float64 triangles; `grouped, listed`: the same of unsorted rows and their list;
- `loop`: `syrk_accumulate`, a launch an expert;
- `mm`: cuBLAS, a product an expert in float32, added to a float64 square;
- `baddbmm`: all experts padded to the longest, one batched product in bfloat16 (padding is left out of the time);
- `grouped_mm`: `torch.nn.functional.grouped_mm`, whose result is bfloat16.

"bytes" is the memory that a variant allocates beside its input and its sum, at its peak; "sum" are the bytes of its sum. The error
is the largest of an entry relative to √(g_ii g_jj), over all experts.

Without a GPU the variants are checked at a small size through Triton's interpreter, and nothing is timed or written.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.environment import RESULTS, write_result  # noqa: E402
from benchmarks.gpu_syrk import interleaved, slug  # noqa: E402
from nullspace import csrc_triton  # noqa: E402
from nullspace.csrc_triton import syrk_accumulate, syrk_accumulate_grouped  # noqa: E402
from nullspace.csrc_triton.syrk import packed_size  # noqa: E402
from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
SKEW = 1.0  # standard deviation of the experts' biases, in units of that of the scores


class Block(NamedTuple):
    """A block's experts.

    Attributes:
        experts: how many.
        hidden: width of the input of `gate_up_proj`.
        inner: width of the input of `down_proj`.
        chosen: experts a token.
    """

    experts: int
    hidden: int
    inner: int
    chosen: int


BLOCK = Block(128, 2048, 768, 8) if GPU else Block(6, 80, 40, 2)
TOKENS = (2048, 8192, 32768) if GPU else (90,)


class Routed(NamedTuple):
    """The rows of all token–expert pairs at one width.

    Attributes:
        x: (tokens · chosen, d) bfloat16, sorted by expert.
        offsets: (experts + 1,) int64: where each expert's rows begin and end.
        unsorted: the same rows in another order.
        rows: (tokens · chosen,) int64: row k of x is row `rows[k]` of `unsorted`.
    """

    x: torch.Tensor
    offsets: torch.Tensor
    unsorted: torch.Tensor
    rows: torch.Tensor


def route(tokens: int, d: int) -> Routed:
    """Random tokens at skewed random experts."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    scores = torch.randn(tokens, BLOCK.experts, generator=generator, device=DEVICE)
    scores += SKEW * torch.randn(BLOCK.experts, generator=generator, device=DEVICE)
    expert = scores.topk(BLOCK.chosen, dim=1).indices.flatten()
    rows = expert.argsort(stable=True)
    offsets = torch.zeros(BLOCK.experts + 1, dtype=torch.int64, device=DEVICE)
    offsets[1:] = torch.bincount(expert, minlength=BLOCK.experts).cumsum(0)
    unsorted = torch.randn(len(expert), d, generator=generator, device=DEVICE).bfloat16()
    return Routed(unsorted[rows], offsets, unsorted, rows)


class Variant(NamedTuple):
    """A way to the sums.

    Attributes:
        run: adds to the sum once.
        new_sum: an empty sum.
        products: the sum as (experts, d, d); of a triangle, the whole matrix.
    """

    run: Callable[[torch.Tensor], Any]
    new_sum: Callable[[], torch.Tensor]
    products: Callable[[torch.Tensor], torch.Tensor]


def variants_of(routed: Routed) -> dict[str, Variant]:
    """All variants at one width."""
    x, offsets, unsorted, rows = routed
    d, bounds = x.shape[1], list(itertools.pairwise(offsets.tolist()))
    longest = max(stop - start for start, stop in bounds)
    padded = x.new_zeros(len(bounds), longest, d)
    for e, (start, stop) in enumerate(bounds):
        padded[e, : stop - start] = x[start:stop]
    ends = offsets[1:].int()

    def loop(g: torch.Tensor) -> None:
        for packed, (start, stop) in zip(g, bounds, strict=True):
            syrk_accumulate(packed, x[start:stop], panel_rows=PANEL_ROWS)

    def mm(g: torch.Tensor) -> None:
        for square, (start, stop) in zip(g, bounds, strict=True):
            part = x[start:stop]
            square += torch.mm(part.T, part, out_dtype=torch.float32) if GPU else part.float().T @ part.float()

    def zeros(*shape: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros(len(bounds), *shape, dtype=torch.float64, device=DEVICE)

    def unpacked(g: torch.Tensor) -> torch.Tensor:
        return torch.stack([_square(packed, d) for packed in g])

    packed, square, same = zeros(packed_size(d, PANEL_ROWS)), zeros(d, d), lambda g: g
    return {
        "grouped": Variant(lambda g: syrk_accumulate_grouped(g, x, offsets, panel_rows=PANEL_ROWS), packed, unpacked),
        "grouped, listed": Variant(
            lambda g: syrk_accumulate_grouped(g, unsorted, offsets, rows=rows, panel_rows=PANEL_ROWS), packed, unpacked
        ),
        "loop": Variant(loop, packed, unpacked),
        "mm": Variant(mm, square, same),
        "baddbmm": Variant(lambda g: g.add_(padded.mT @ padded), square, same),
        "grouped_mm": Variant(lambda g: g.add_(torch.nn.functional.grouped_mm(x.T, x, offs=ends)), square, same),
    }


def _square(packed: torch.Tensor, d: int) -> torch.Tensor:
    triangle = LowerTriangle(d, device=DEVICE)
    triangle.packed.copy_(packed)
    return triangle.square()


def largest_error(products: torch.Tensor, routed: Routed) -> float:
    """Of an entry of a lower triangle, relative to √(g_ii g_jj), over all experts."""
    worst = 0.0
    for g, (start, stop) in zip(products, itertools.pairwise(routed.offsets.tolist()), strict=True):
        part = routed.x[start:stop].double()
        exact = part.T @ part
        scale = exact.diagonal().sqrt().clamp(min=1e-300)
        worst = max(
            worst, float(((g - exact).tril().abs() / (scale[:, None] * scale)).max()) if stop > start else float(g.tril().norm())
        )
    return worst


def measured(routed: Routed) -> dict[str, dict[str, Any]]:
    """Error of every variant and, on a GPU, bytes and milliseconds."""
    result: dict[str, dict[str, Any]] = {}
    timed: dict[str, Callable[[], Any]] = {}
    for name, variant in variants_of(routed).items():
        try:
            g = variant.new_sum()
            if GPU:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            variant.run(g)
            row: dict[str, Any] = {"sum": g.untyped_storage().nbytes()}
            if GPU:
                torch.cuda.synchronize()
                row["bytes"] = torch.cuda.max_memory_allocated() - before
            row["error"] = largest_error(variant.products(g), routed)
        except (RuntimeError, NotImplementedError) as failure:  # out of memory, or a product that this device or version lacks
            result[name] = {"failed": str(failure)[:200]}
            continue
        result[name] = row
        timed[name] = lambda run=variant.run, g=g: run(g)
    if GPU:
        for name, runs in interleaved(timed, slow=set()).items():
            result[name] |= {"ms": runs, "median_ms": statistics.median(runs)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="tokens of a batch, before routing")
    arguments = parser.parse_args()
    if GPU and (obstacle := csrc_triton.unavailable(DEVICE)):
        sys.exit(f"the kernels cannot run here: {obstacle}")
    started = time.perf_counter()
    result: dict[str, Any] = {"block": BLOCK._asdict(), "skew": SKEW, "rows": []}
    for d, tokens in itertools.product((BLOCK.hidden, BLOCK.inner), arguments.tokens):
        routed = route(tokens, d)
        counts = routed.offsets.diff().sort().values.tolist()
        spread = {"least": counts[0], "median": counts[len(counts) // 2], "largest": counts[-1]}
        rows = measured(routed)
        result["rows"].append({"d": d, "tokens": tokens, "tokens an expert": spread, "variants": rows})
        for name, row in rows.items():
            figures = "  ".join(f"{key} {row[key]:.3g}" for key in ("median_ms", "error", "bytes", "sum") if key in row)
            print(f"d {d:5} tokens {tokens:6} {name:16} {figures or row['failed']}", flush=True)
        if GPU:
            torch.cuda.empty_cache()
            write_result(f"gpu_experts-{slug()}", result, arguments.out)
    result["seconds"] = time.perf_counter() - started
    wrong = [
        f"{name} at d = {rows['d']}"
        for rows in result["rows"]
        for name in ("grouped", "grouped, listed", "loop")
        if rows["variants"][name].get("error", 1.0) > 1e-6
    ]
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")
    if GPU:
        print(f"wrote {write_result(f'gpu_experts-{slug()}', result, arguments.out)} after {result['seconds']:.0f} s")
    else:
        print(f"no GPU here: checked through the interpreter in {result['seconds']:.0f} s; nothing timed, nothing written")


if __name__ == "__main__":
    main()
