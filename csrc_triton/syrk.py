"""`syrk_accumulate`: the lower triangle of `x.T @ x` at tensor-core speed, added to a float64 matrix.

Each program owns one tile of the triangle. Its sum has three levels:

1. tensor-core chains of `window` tokens, in float32 (Hopper's round toward zero: the error of a chain is a *bias* that grows
   faster than its length, so chains are short);
2. `kahan`: a pair of float32 numbers a tile entry, `high + low`, to which each chain is added by Kahan's compensated summation;
   or `plain`: one float32 number, whose additions round to nearest (`resolution` says what each loses);
3. the float64 matrix, read and written once a launch.

Kahan's next summand is "what the last addition lost, plus the next chain", so a chain *starts* from `low` instead of zero: the
tensor core itself adds the two, and the two levels need two float32 registers an entry, as many as a plain fused sum with a
separate accumulator. Nothing is atomic, and every tile has one owner: equal inputs give equal bits.

A `Tiling` names the variant. Its other three run by `hopper` (Gluon) and `gemm` (cuBLAS).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from nullspace.csrc_triton import gemm
from nullspace.csrc_triton.tiles import VARIANTS, Tiling, tiling_for, triangle_tiles
from nullspace.errors import InputError, InputTypeError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The oldest Triton whose Gluon has what `hopper` uses.
GLUON_VERSION = (3, 6)


@triton.jit
def _operand(
    x,
    listed,
    start,
    column,
    tokens,
    d,
    stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    GATHER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """(BLOCK_K, BLOCK) of x, or of its rows that are listed, from row `start` and `column` on; zero outside of it."""
    if DESCRIPTOR:
        tile = x.load([start, column])
    else:
        rows = start + tl.arange(0, BLOCK_K)
        columns = column + tl.arange(0, BLOCK)
        inside = (rows < tokens)[:, None] & (columns < d)[None, :]
        source = tl.load(listed + rows, mask=rows < tokens, other=0).to(tl.int64) if GATHER else rows.to(tl.int64)
        tile = tl.load(x + source[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 numbers as if they were integers
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _collect(high, low):
    """Kahan's step: adds low, a chain that started from the last step's error, to high; returns the sum and its error."""
    total = high + low
    return total, low - (total - high)


@triton.jit
def _add_chain(high, chain, INTERPRETED: tl.constexpr):
    """high + chain, rounded to float32. In assembly: the compiler would let the tensor core add high, as a chain's start."""
    if INTERPRETED:
        return high + chain
    return tl.inline_asm_elementwise("add.rn.f32 $0, $1, $2;", "=f,f,f", [high, chain], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _add(g, high, low, row, column, d, stride):
    """Add high + low to the part of g's triangle whose first entry is g[row, column]."""
    rows = tl.arange(0, high.shape[0])[:, None]
    columns = tl.arange(0, high.shape[1])[None, :]
    inside = (row + rows < d) & (column + columns <= row + rows)
    entries = g + rows * stride + columns
    tl.store(entries, tl.load(entries, mask=inside) + (high.to(tl.float64) + low.to(tl.float64)), mask=inside)


@triton.jit
def _add_tile(
    g,
    x,
    listed,
    tile,
    first,
    last,
    tokens,
    d,
    stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    VARIANT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    GATHER: tl.constexpr,
    PRODUCTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add one tile of the product of the rows `first` to `last` of x, or of its rows that are listed; `first` is a multiple of the
    window, and so is `last`, unless it is `tokens`."""
    row = tl.load(tile).to(tl.int32) * BLOCK
    column = tl.load(tile + 1).to(tl.int32) * BLOCK
    high = tl.zeros((BLOCK, BLOCK), tl.float32)
    low = tl.zeros((BLOCK, BLOCK), tl.float32)
    # One flat loop: a nested one would drain the pipeline at the end of every window. On Hopper a step is a whole window: under a
    # condition some versions of ptxas wait for every single product (test_compiled.py checks for that).
    for start in tl.range(first, last, BLOCK_K):
        left = _operand(x, listed, start, row, tokens, d, stride, BLOCK, BLOCK_K, DESCRIPTOR, GATHER, INTERPRETED)
        right = _operand(x, listed, start, column, tokens, d, stride, BLOCK, BLOCK_K, DESCRIPTOR, GATHER, INTERPRETED)
        if VARIANT == "plain" and WINDOW == BLOCK_K:
            high = _add_chain(high, tl.dot(left.T, right, input_precision=PRODUCTS), INTERPRETED)
        else:
            low = tl.dot(left.T, right, low, input_precision=PRODUCTS)
            if WINDOW == BLOCK_K:
                high, low = _collect(high, low)
            elif start % WINDOW == WINDOW - BLOCK_K:
                if VARIANT == "plain":
                    high = _add_chain(high, low, INTERPRETED)
                    low = tl.zeros((BLOCK, BLOCK), tl.float32)
                else:
                    high, low = _collect(high, low)
    # If the last window is incomplete, its chain is still in `low`: high + low includes it, and is exact enough.
    g += tl.load(tile + 2)
    stride_g = tl.load(tile + 3)
    # A quarter at a time: float64 entries and their addresses are six registers each.
    WIDTH: tl.constexpr = BLOCK // 4
    high_left, high_right = _halves(high)
    low_left, low_right = _halves(low)
    high_0, high_1 = _halves(high_left)
    low_0, low_1 = _halves(low_left)
    _add(g, high_0, low_0, row, column, d, stride_g)
    _add(g + WIDTH, high_1, low_1, row, column + WIDTH, d, stride_g)
    high_2, high_3 = _halves(high_right)
    low_2, low_3 = _halves(low_right)
    _add(g + 2 * WIDTH, high_2, low_2, row, column + 2 * WIDTH, d, stride_g)
    _add(g + 3 * WIDTH, high_3, low_3, row, column + 3 * WIDTH, d, stride_g)


@triton.jit(do_not_specialize=["tokens", "share"])
def _syrk(
    g,
    x,
    tiles,
    tokens,
    share,
    d,
    stride,
    part_stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    VARIANT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRODUCTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    g += tl.program_id(1).to(tl.int64) * part_stride
    _add_tile(
        g, x, x, tile, first, last, tokens, d, stride, BLOCK, BLOCK_K, WINDOW, VARIANT, DESCRIPTOR, False, PRODUCTS, INTERPRETED
    )


INTERPRETED = isinstance(_syrk, InterpretedFunction)


def syrk_accumulate(g: torch.Tensor, x: torch.Tensor, *, panel_rows: int | None = None, tiling: Tiling | None = None) -> None:
    """Add the lower triangle of `x.T @ x` into `g`, in place; the strict upper triangle is left as it is.

    16-bit inputs: every product is exact. float32 inputs: three TF32 products stand for each (`tf32x3`), which is float32's own
    accuracy. The sum is that of the module's docstring: against float64, what of its error is not proportional to the result is a
    few 1e-8 of ‖xᵀx‖_F (`nullspace.csrc_triton.resolution`: simulated, for each variant). The same input gives the same bits.

    Args:
        g: float64 on a CUDA device: (d, d) with a contiguous last axis, or, with `panel_rows`, the packed row panels of
            `LowerTriangle` (1-D, contiguous).
        x: (tokens, d) in bfloat16, float16 or float32, on the same device; rows may be strided, the last axis is contiguous.
            No row may hold NaN or Inf, or a norm whose square overflows float32.
        panel_rows: rows of a packed panel, a multiple of the tile.
        tiling: the shape and the variant of the work; None: the table's choice for this device and width
            (`nullspace.csrc_triton.tiles`). A variant that cannot run is replaced by the one of plain Triton whose sum has the
            same errors (`Tiling.in_triton`): Gluon's need compute capability 9.0, Triton ≥ 3.6, 16-bit inputs, and rows that a
            descriptor can address; `gemm` needs 16-bit inputs.

    Raises:
        ValueError: for a shape, stride, device or tiling that does not fit.
        TypeError: for another dtype.
    """
    check_single(g, x, panel_rows)
    tokens, d = x.shape
    chosen = tiling or tiling_for(x.dtype, x.device, d)
    check_tiling(chosen)
    if tokens == 0:
        return
    chosen = runnable(chosen, x)
    with _on(x.device):
        if chosen.variant == "gemm":
            gemm.add_products(g, x, chosen.window, panel_rows)
            return
        share = -(-tokens // (chosen.splits * chosen.window)) * chosen.window
        if share >= tokens:
            _launch(g, g, x, _tiles(g, d, chosen.block, panel_rows), share, chosen)
            return
        parts = g.new_zeros(-(-tokens // share), *g.shape)
        _launch(parts, parts[0], x, _tiles(parts[0], d, chosen.block, panel_rows), share, chosen)
        g += parts.sum(0)


def _launch(g: torch.Tensor, part: torch.Tensor, x: torch.Tensor, tiles: torch.Tensor, share: int, tiling: Tiling) -> None:
    """Add the products of `share` rows each to g: to one matrix, or to the parts that it stacks."""
    (tokens, d), part_stride = x.shape, 0 if part is g else g.stride(0)
    if tiling.variant.startswith("gluon"):
        from nullspace.csrc_triton import hopper

        variant = tiling.variant.removeprefix("gluon-")
        hopper.launch(g, x, tiles, share, part_stride, block_k=tiling.block_k, stages=tiling.stages, variant=variant)
        return
    descriptor = tiling.descriptor and _describable(x)
    _syrk[(len(tiles), -(-tokens // share))](
        g,
        TensorDescriptor.from_tensor(x, [tiling.block_k, tiling.block]) if descriptor else x,
        tiles,
        tokens,
        share,
        d,
        x.stride(0),
        part_stride,
        BLOCK=tiling.block,
        BLOCK_K=tiling.block_k,
        WINDOW=tiling.window,
        VARIANT=tiling.variant,
        DESCRIPTOR=descriptor,
        PRODUCTS="tf32x3" if x.dtype == torch.float32 else "ieee",
        INTERPRETED=INTERPRETED,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=False,
    )


def check_tiling(tiling: Tiling) -> None:
    """Raise `ValueError` unless the variant is known, a window is made of whole steps, and the shape is one that it can have."""
    if tiling.variant not in VARIANTS:
        raise InputError(f"a tiling's variant is one of {', '.join(VARIANTS)}, not {tiling.variant!r}")
    if tiling.window % tiling.block_k != 0:
        raise InputError(f"a window of {tiling.window} tokens is not made of whole steps of {tiling.block_k}")
    if tiling.splits < 1:
        raise InputError(f"a tile's tokens are split over 1 program or more, not {tiling.splits}")
    if tiling.variant.startswith("gluon") and (tiling.block, tiling.window, tiling.warps) != (128, tiling.block_k, 8):
        raise InputError(
            f"{tiling.variant} has tiles of 128 on 8 warps and windows of one step, not tiles of {tiling.block} on {tiling.warps} "
            f"warps and windows of {tiling.window} tokens in steps of {tiling.block_k}"
        )


def runnable(tiling: Tiling, x: torch.Tensor) -> Tiling:
    """The tiling, or, where its variant cannot run for x, its `in_triton`."""
    if tiling.variant == "gemm":
        return tiling.in_triton() if x.dtype == torch.float32 else tiling
    if tiling.variant.startswith("gluon") and (
        x.dtype == torch.float32 or not _describable(x) or gluon_obstacle(x.device) is not None
    ):
        return tiling.in_triton()
    return tiling


@functools.cache
def gluon_obstacle(device: torch.device) -> str | None:
    """Why Gluon's variants cannot run on a device, in a few words; None if they can. Compiles and launches both, once."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "Gluon's variants were written for compute capability 9.0"
    if triton_version() < GLUON_VERSION:
        return f"Triton {triton.__version__} is older than {GLUON_VERSION[0]}.{GLUON_VERSION[1]}"
    tokens = 8 * 128  # the ring of windows goes round
    x = torch.ones(tokens, 128, dtype=torch.bfloat16, device=device)
    try:
        from nullspace.csrc_triton import hopper

        for variant in ("kahan", "plain"):
            g = torch.zeros(128, 128, dtype=torch.float64, device=device)
            with _on(device):
                hopper.launch(g, x, _tiles(g, 128, 128, None), tokens, 0, block_k=128, stages=3, variant=variant)
            if not torch.equal(g, torch.full_like(g, tokens).tril()):
                return f"gluon-{variant} gives wrong sums"
    except Exception as error:  # Gluon's names and semantics change with versions
        return f"Gluon of Triton {triton.__version__}: {type(error).__name__}: {error}".splitlines()[0]
    return None


def triton_version() -> tuple[int, int]:
    """Triton's major and minor version."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def check_input(g: torch.Tensor, x: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError` for dtypes, devices or a shape or stride of x that the kernels do not take."""
    if x.dtype not in DTYPES:
        raise InputTypeError(f"x must be bfloat16, float16 or float32, not {x.dtype}")
    if g.dtype != torch.float64:
        raise InputTypeError(f"g must be float64, not {g.dtype}")
    if x.ndim != 2 or x.shape[1] < 1:
        raise InputError(f"x must be (tokens, d) with d ≥ 1, not {tuple(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise InputError(f"the last axis of x must be contiguous; its strides are {x.stride()}")
    if g.device != x.device:
        raise InputError(f"g is on {g.device} and x on {x.device}")


def check_single(g: torch.Tensor, x: torch.Tensor, panel_rows: int | None) -> None:
    """`check_input`, and the shape and strides of g."""
    check_input(g, x)
    d = x.shape[1]
    if panel_rows is None:
        if g.shape != (d, d) or (d > 1 and (g.stride(1) != 1 or g.stride(0) < d)):
            raise InputError(f"g must be ({d}, {d}) with a contiguous last axis; it is {tuple(g.shape)} with strides {g.stride()}")
    elif g.ndim != 1 or not g.is_contiguous() or len(g) != packed_size(d, panel_rows):
        raise InputError(
            f"g must be {packed_size(d, panel_rows)} numbers (d = {d}, {panel_rows} rows a panel), not {tuple(g.shape)}"
        )


def packed_size(d: int, panel_rows: int) -> int:
    """Entries of a lower triangle of order d, packed as row panels."""
    full = d // panel_rows
    return panel_rows**2 * (full * (full + 1) // 2) + (d - full * panel_rows) * d


def _tiles(g: torch.Tensor, d: int, block: int, panel_rows: int | None) -> torch.Tensor:
    if panel_rows is not None and panel_rows % block != 0:
        raise InputError(f"a panel of {panel_rows} rows is not made of whole tiles of {block}")
    return triangle_tiles(d, block, g.stride(0) if panel_rows is None else 0, panel_rows, g.device)


def _describable(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can address x: 16-byte steps from row to row, and rows that do not overlap."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0
    return aligned and x.stride(0) >= x.shape[1] and x.stride(1) == 1


def _on(device: torch.device) -> torch.cuda.device:
    """A context in which the device of the tensors is the current one, on which Triton launches."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
