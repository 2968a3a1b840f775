"""The bottom of a spectrum on a GPU: the parts a solver is made of, the solvers against `torch.linalg.eigh`, several at once.

    python -m benchmarks.first_gpu.solvers --out FOLDER     # about 7 minutes; writes solvers.json

Workload: C in float64 with a real layer's spectrum along random directions, d = 4096, 11008, 14336; the bottom 128 pairs.

1. Parts, by order: Cholesky (the first time, and again), two triangular solves at widths from 16 to 288, the explicit inverse and a
   product with it at the same widths, QR and Cholesky-QR of d × w, a float64 product. Their ratio decides whether a step solves or
   multiplies (the table in `nullspace.solvers.cost`), and how wide a block is.
2. The small eigenproblem, 144 to 1440, on the GPU and on the host, copies included.
3. Whole solvers: `auto` and shift-invert against `torch.linalg.eigh`: seconds, excess leak ‖XU‖ / ‖XU_eigh‖ − 1, residual
   ‖CU − UΛ‖ / ‖C‖, orthogonality ‖UᵀU − I‖, peak memory in squares of 8 d² bytes. The first call of each is apart.
4. Several sites of d = 4096 at once, each in a thread and a stream of its own: seconds of n over n times one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.first_gpu.command import Command, options_of

ANSWERS = [
    "is shift-invert 20 times as fast as torch.linalg.eigh at d = 11008 and 14336, and as exact?",
    "what is faster, two triangular solves or a product with the inverse, and from which width on?",
    "is QR or Cholesky-QR faster; is a small eigenproblem faster on the host?",
    "do several sites at once take less time than one after the other?",
]
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "orders": (4096, 11008, 14336),
        "widths": (16, 36, 72, 144, 288),
        "small": (144, 288, 432, 720, 1440),
        "k": 128,
        "at once": (1, 2, 3, 4),
    },
    "cpu": {"orders": (192,), "widths": (8,), "small": (24,), "k": 4, "at once": (1, 2)},
}
SPECTRUM = "layer"


def matrix(d: int, device: Any) -> tuple[Any, Any]:
    """X and C = XᵀX with a real layer's spectrum."""
    from benchmarks.solvers import activations, second_moment

    x = activations(SPECTRUM, d, device)
    return x, second_moment(x)


def parts(c: Any, widths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Seconds of everything that a shift-invert is made of."""
    import torch

    from benchmarks.first_gpu.timing import timed

    d, device = len(c), c.device
    shifted = c.clone()
    shifted.diagonal().add_(float(c.diagonal().mean()) * 1e-6)
    first, _ = timed(lambda: torch.linalg.cholesky_ex(shifted), device)
    again, (factor, _) = timed(lambda: torch.linalg.cholesky_ex(shifted), device)
    product = min(timed(lambda: c @ shifted, device)[0] for _ in range(2))
    inverting, inverse = timed(lambda: torch.cholesky_inverse(factor), device)
    yield {
        "cholesky_first_s": first,
        "cholesky_s": again,
        "cholesky_tflops": d**3 / 3 / again / 1e12,
        "inverse_s": inverting,
        "product_tflops": 2 * d**3 / product / 1e12,
    }
    for width in widths:
        b = torch.randn(d, width, generator=torch.Generator(device).manual_seed(0), dtype=torch.float64, device=device)

        def solves(b: Any = b) -> Any:
            below = torch.linalg.solve_triangular(factor, b, upper=False)
            return torch.linalg.solve_triangular(factor.mT, below, upper=True)

        def cholesky_qr(b: Any = b) -> Any:
            upper = torch.linalg.cholesky_ex(b.mT @ b)[0].mT
            return torch.linalg.solve_triangular(upper, b, upper=True, left=False)

        runs: dict[str, Callable[[], Any]] = {
            "two_solves_s": solves,
            "inverse_product_s": lambda b=b: inverse @ b,
            "product_s": lambda b=b: c @ b,
            "qr_s": lambda b=b: torch.linalg.qr(b),
            "cholesky_qr_s": cholesky_qr,
        }
        yield {"width": width, **{name: _best(run, device) for name, run in runs.items()}}


def small_problems(sizes: tuple[int, ...], device: Any) -> Iterator[dict[str, Any]]:
    """Symmetric eigenproblems of a few hundred: on the device, and on the host with the copies there and back."""
    import torch

    for n in sizes:
        a = torch.randn(n, n, generator=torch.Generator(device).manual_seed(0), dtype=torch.float64, device=device)
        a = a @ a.mT

        def on_host(a: Any = a) -> Any:
            values, vectors = torch.linalg.eigh(a.cpu())
            return values.to(device), vectors.to(device)

        yield {"n": n, "device_s": _best(lambda a=a: torch.linalg.eigh(a), device), "host_s": _best(on_host, device)}


def _best(run: Callable[[], Any], device: Any) -> float:
    from benchmarks.first_gpu.timing import timed

    run()
    return min(timed(run, device)[0] for _ in range(3))


def whole(x: Any, c: Any, k: int) -> Iterator[dict[str, Any]]:
    """The solvers, the first call apart, `torch.linalg.eigh` last: a run that is cut has the others."""
    import torch

    from benchmarks.solvers import by_torch, quality
    from nullspace import solvers

    d, device = len(c), c.device
    rows: dict[str, dict[str, Any]] = {}
    methods: dict[str, Callable[[], Any]] = {
        **{name: lambda name=name: solvers.bottom_eigenpairs(c, k, method=name) for name in ("auto", "shift-invert")},
        "torch.linalg.eigh": lambda: by_torch(c, k),
    }
    for name, run in methods.items():
        rows[name] = {"d": d, "k": k, "method": name, **_twice(run, device, 8 * d * d)}
        values, vectors = rows[name].pop("pairs")
        figures = quality(x, c, values, vectors)
        rows[name] |= figures
        if name != "torch.linalg.eigh":
            yield rows[name]
        del values, vectors
        if device.type == "cuda":
            torch.cuda.empty_cache()
    reference = rows["torch.linalg.eigh"]
    yield reference
    for name, row in rows.items():
        if row is not reference:
            excess = row["leak"] / reference["leak"] - 1
            yield {"d": d, "method": name, "over eigh": reference["seconds"] / row["seconds"], "excess": excess}


def _twice(run: Callable[[], Any], device: Any, square: int) -> dict[str, Any]:
    """Seconds of the first call and of the second, and the second's peak memory above what was there, in squares."""
    import torch

    from benchmarks.first_gpu.timing import timed

    first, pairs = timed(run, device)
    del pairs
    memory: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    seconds, pairs = timed(run, device)
    if device.type == "cuda":
        memory["allocated_squares"] = (torch.cuda.max_memory_allocated() - before[0]) / square
        memory["reserved_squares"] = (torch.cuda.max_memory_reserved() - before[1]) / square
    return {"first_call_s": first, "seconds": seconds, **memory, "pairs": pairs}


def side_by_side(c: Any, k: int, counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Seconds of n solves at once, each in a thread and a stream of its own."""
    import torch

    from benchmarks.first_gpu.timing import timed
    from nullspace import solvers

    d, device = len(c), c.device

    def solve(stream: Any) -> Any:
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            return solvers.bottom_eigenpairs(c, k, method="shift-invert")

    alone = None
    with ThreadPoolExecutor(max(counts)) as pool:
        for count in counts:
            streams = [torch.cuda.Stream() if device.type == "cuda" else None for _ in range(count)]
            list(pool.map(solve, streams))  # handles and workspaces, a stream each
            seconds, _ = timed(lambda streams=streams: list(pool.map(solve, streams)), device)
            alone = alone or seconds
            yield {"d": d, "at once": count, "seconds": seconds, "over one after the other": seconds / (count * alone)}


def run(command: Command) -> None:
    """Small orders first; the whole solvers before the parts of the largest."""
    import torch

    device = torch.device(command.options.device)
    sizes = SIZES[device.type]
    for row in small_problems(sizes["small"], device):
        command.add(what="small eigenproblem", **row)
    for d in sizes["orders"]:
        # `eigh` and the matrix by flops at 1 TFLOP/s, unsure by a factor of two; shift-invert comes first.
        if not command.has_time(f"everything of d = {d}", 10 + 22 * d**3 / 1e12 if not command.dry else 0):
            continue
        x, c = matrix(d, device)
        for row in whole(x, c, sizes["k"]):
            command.add(what="solver", **row)
            judge(command)
        del x
        if d == sizes["orders"][0]:
            for row in side_by_side(c, sizes["k"], sizes["at once"]):
                command.add(what="several at once", **row)
        for row in parts(c, sizes["widths"]):
            command.add(what="part", d=d, **row)
        del c
        if device.type == "cuda":
            torch.cuda.empty_cache()


def judge(command: Command) -> None:
    """The figures of the goals: `auto`'s, which is what a calibration takes."""
    mine = [row for row in command.rows if row.get("method") == "auto"]
    for row in mine:
        if "over eigh" in row and row["d"] in (11008, 14336):
            command.measure(f"solver {row['d']}", row["over eigh"])
    for key, names in (("residual", ("residual", "orthogonality")), ("excess", ("excess",))):
        values = [row[name] for row in mine for name in names if name in row]
        if values:
            command.measure(key, max(values))


def main(argv: list[str] | None = None) -> None:
    with Command("solvers", ANSWERS, options_of("solvers", __doc__, argv)) as command:
        run(command)


if __name__ == "__main__":
    main()
