"""The bottom of a spectrum on a GPU: the parts a solver is made of, the solvers against `torch.linalg.eigh`, several at once.

    python -m benchmarks.first_gpu.solvers --out FOLDER     # about 7 minutes; writes solvers.json

Workload: C in float64 with a real layer's spectrum along random directions, d = 4096, 11008, 14336; the bottom 128 pairs.

1. Parts, by order: Cholesky (the first time, and again), the factor's application to 12 to 144 columns by triangular solves and by
   products with inverted blocks of 256 columns up to the whole inverse, QR and CholeskyQR of as many columns, a float64 product.
   Whole solves by width and block of the factor: the best is a row of `INVERT_ON_CUDA` in `nullspace.solvers.cost`.
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
    "what is faster, triangular solves, inverted blocks or the whole inverse, and with how many columns at a time?",
    "is QR or CholeskyQR faster; is a small eigenproblem faster on the host?",
    "do several sites at once take less time than one after the other?",
]
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "orders": (4096, 11008, 14336),
        "widths": (12, 24, 36, 72, 144),
        "tuned": (18, 24, 36, 72),
        "blocks": (0, 512, 1024, 2048),
        "small": (144, 288, 432, 720, 1440),
        "k": 128,
        "at once": (1, 2, 3, 4),
    },
    "cpu": {"orders": (240,), "widths": (8,), "tuned": (10,), "blocks": (0, 64), "small": (24,), "k": 4, "at once": (1, 2)},
}
SPECTRUM = "layer"


def matrix(d: int, device: Any) -> tuple[Any, Any]:
    """X and C = XᵀX with a real layer's spectrum."""
    from benchmarks.solvers import activations, second_moment

    x = activations(SPECTRUM, d, device)
    return x, second_moment(x)


def parts(c: Any, widths: tuple[int, ...], blocks: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Seconds of everything that a shift-invert is made of."""
    import torch

    from benchmarks.first_gpu.timing import timed
    from nullspace.solvers.krylov import cholesky_qr
    from nullspace.solvers.triangular import Factor, shifted_cholesky

    d, device = len(c), c.device

    def new_factor() -> Any:
        return shifted_cholesky(c, 1.0, float(c.diagonal().mean()) * 1e-6, 0)[0]

    first, _ = timed(new_factor, device)
    again, lower = timed(new_factor, device)
    product = min(timed(lambda: c @ c, device)[0] for _ in range(2))
    yield {
        "cholesky_first_s": first,
        "cholesky_s": again,
        "cholesky_tflops": d**3 / 3 / again / 1e12,
        "product_tflops": 2 * d**3 / product / 1e12,
    }
    columns = {
        width: torch.randn(d, width, generator=torch.Generator(device).manual_seed(0), dtype=torch.float64, device=device)
        for width in widths
    }
    for width, b in columns.items():
        runs: dict[str, Callable[[], Any]] = {
            "product_s": lambda b=b: c @ b,
            "qr_s": lambda b=b: torch.linalg.qr(b),
            "cholesky_qr_s": lambda b=b: cholesky_qr(b),
        }
        yield {"width": width, **{name: _best(run, device) for name, run in runs.items()}}
    for block in blocks:
        seconds, factor = timed(lambda block=block: Factor(lower.clone(), min(block, d)), device)
        for width, b in columns.items():
            solving = _best(lambda factor=factor, b=b: factor.solve(b), device)
            yield {"block": min(block, d), "width": width, "inverting_s": seconds, "solve_s": solving}
        del factor


def tunings(c: Any, k: int, widths: tuple[int, ...], blocks: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Seconds of whole solves by width and block of the factor; last the row for `INVERT_ON_CUDA` in `nullspace.solvers.cost`."""
    from benchmarks.first_gpu.timing import timed
    from nullspace.solvers.krylov import GUARD, Tuning, shift_invert

    seconds: dict[tuple[int, int], float] = {}
    for width in widths:
        for block in blocks:
            tuning = Tuning(width, min(block, len(c)), cholesky=True)
            if shift_invert(c, k, tuning) is None:
                yield {"tuning": tuple(tuning), "failed": "it does not converge"}
                continue
            seconds[width, block], _ = timed(lambda tuning=tuning: shift_invert(c, k, tuning), c.device)
            yield {"tuning": tuple(tuning), "tuned_s": seconds[width, block]}
    if seconds:
        width, block = min(seconds, key=lambda key: seconds[key])
        yield {"table row": {len(c): ((k + GUARD) // width, block)}, "tuned_s": seconds[width, block]}


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
        if command.has_time(f"tunings, d = {d}", 15 if not command.dry else 0):
            for row in tunings(c, sizes["k"], sizes["tuned"], (*sizes["blocks"], d)):
                command.add(what="tuning", d=d, **row)
        if command.has_time(f"parts, d = {d}", 10 if not command.dry else 0):
            for row in parts(c, sizes["widths"], (*sizes["blocks"], d)):
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
