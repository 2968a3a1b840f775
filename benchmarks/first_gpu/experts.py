"""The grouped second-moment kernel on the experts of a mixture: one launch for all, against a loop over them and against torch.

Part of `benchmarks.first_gpu.sums`. Workload: the experts of one block of Qwen3-30B-A3B (128 experts, width 2048, inner width 768,
8 experts a token). Tokens are drawn at random in bfloat16 and routed by random scores with a bias an expert, so that some experts
get many tokens and some few: the least, the median and the largest count are in the result. The rows of all token–expert pairs,
sorted by expert, are the input of `gate_up_proj` (width 2048) and of `down_proj` (width 768).

All variants take turns, round by round; a figure is the median of its rounds, measured on the device with the host's launches in
it. Left out: drawing, sorting, compiling, the first rounds. What a variant's result is differs, and stands beside it as an error:

- `grouped`: `syrk_accumulate_grouped`, added to float64 triangles; `grouped, listed`: the same of unsorted rows and their list;
- `loop`: `syrk_accumulate`, a launch an expert;
- `mm`: cuBLAS, a product an expert in float32, added to a float64 square;
- `baddbmm`: all experts padded to the longest, one batched product in bfloat16 (padding is left out of the time);
- `grouped_mm`: `torch.nn.functional.grouped_mm`, whose result is bfloat16.

"bytes" is the memory that a variant allocates beside its input and its sum, at its peak; "sum" are the bytes of its sum. The error
is the largest of an entry relative to √(g_ii g_jj), over all experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.first_gpu.inputs import cublas_float32
from benchmarks.first_gpu.timing import interleaved, synchronize
from nullspace import csrc_triton
from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle

SKEW = 1.0  # standard deviation of the experts' biases, in units of that of the scores
EXACT = ("grouped", "grouped, listed", "loop")
"""The variants that must be right to 1e-6."""


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


BLOCKS = {"cuda": Block(128, 2048, 768, 8), "cpu": Block(6, 80, 40, 2)}
TOKENS = {"cuda": (2048, 8192, 32768), "cpu": (24,)}


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


def route(block: Block, tokens: int, d: int, device: torch.device) -> Routed:
    """Random tokens at skewed random experts."""
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(tokens, block.experts, generator=generator, device=device)
    scores += SKEW * torch.randn(block.experts, generator=generator, device=device)
    expert = scores.topk(block.chosen, dim=1).indices.flatten()
    rows = expert.argsort(stable=True)
    offsets = torch.zeros(block.experts + 1, dtype=torch.int64, device=device)
    offsets[1:] = torch.bincount(expert, minlength=block.experts).cumsum(0)
    unsorted = torch.randn(len(expert), d, generator=generator, device=device).bfloat16()
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
            csrc_triton.syrk_accumulate(packed, x[start:stop], panel_rows=PANEL_ROWS)

    def mm(g: torch.Tensor) -> None:
        for square, (start, stop) in zip(g, bounds, strict=True):
            part = x[start:stop]
            square += cublas_float32(part)

    def zeros(*shape: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros(len(bounds), *shape, dtype=torch.float64, device=x.device)

    def unpacked(g: torch.Tensor) -> torch.Tensor:
        return torch.stack([_square(packed, d) for packed in g])

    def grouped(g: torch.Tensor) -> None:
        csrc_triton.syrk_accumulate_grouped(g, x, offsets, panel_rows=PANEL_ROWS)

    def listed(g: torch.Tensor) -> None:
        csrc_triton.syrk_accumulate_grouped(g, unsorted, offsets, rows=rows, panel_rows=PANEL_ROWS)

    packed, square, same = zeros(LowerTriangle(d).packed.numel()), zeros(d, d), lambda g: g
    return {
        "grouped": Variant(grouped, packed, unpacked),
        "grouped, listed": Variant(listed, packed, unpacked),
        "loop": Variant(loop, packed, unpacked),
        "mm": Variant(mm, square, same),
        "baddbmm": Variant(lambda g: g.add_(padded.mT @ padded), square, same),
        "grouped_mm": Variant(lambda g: g.add_(torch.nn.functional.grouped_mm(x.T, x, offs=ends)), square, same),
    }


def _square(packed: torch.Tensor, d: int) -> torch.Tensor:
    triangle = LowerTriangle(d, device=packed.device)
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


def measured(routed: Routed, *, rounds: int) -> dict[str, dict[str, Any]]:
    """Error of every variant and milliseconds; on a GPU bytes too."""
    device = routed.x.device
    result: dict[str, dict[str, Any]] = {}
    sums: dict[str, Callable[[], Any]] = {}
    for name, variant in variants_of(routed).items():
        try:
            g = variant.new_sum()
            row: dict[str, Any] = {"sum": g.untyped_storage().nbytes()}
            if device.type == "cuda":
                synchronize(device)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            variant.run(g)
            if device.type == "cuda":
                synchronize(device)
                row["bytes"] = torch.cuda.max_memory_allocated() - before
            row["error"] = largest_error(variant.products(g), routed)
        except (RuntimeError, NotImplementedError) as failure:  # out of memory, or a product that this device or version lacks
            result[name] = {"failed": str(failure)[:200]}
            continue
        result[name] = row
        sums[name] = lambda run=variant.run, g=g: run(g)
    times = interleaved(sums, device, rounds=rounds) if rounds else None
    for name in sums if times else ():
        result[name] |= {"ms": times.ms[name], "median_ms": times.median(name), "first_call_s": times.first_s[name]}
    return result


def rows_of(device: torch.device, *, rounds: int) -> Iterator[dict[str, Any]]:
    """Both widths at every number of tokens."""
    block = BLOCKS[device.type]
    for d, tokens in itertools.product((block.hidden, block.inner), TOKENS[device.type]):
        routed = route(block, tokens, d, device)
        counts = routed.offsets.diff().sort().values.tolist()
        spread = {"least": counts[0], "median": counts[len(counts) // 2], "largest": counts[-1]}
        for name, row in measured(routed, rounds=rounds).items():
            wrong = {"failed": "wrong"} if name in EXACT and row.get("error", 1.0) > 1e-6 else {}
            yield {"d": d, "tokens": tokens, "tokens an expert": spread, "variant": name, **wrong, **row}
