"""The bottom of a spectrum: how fast, and how well, each solver finds it.

    python -m benchmarks.solvers                      # writes benchmarks/results/solvers-<cpu or device>.json
    python -m benchmarks.solvers --widths 1024 2048   # other orders

Workload: C = XᵀX in float64 with a known spectrum: `layer` (that of SmolLM2-135M's layer 15 o_proj, stretched to size), `steep`
(log-uniform from 1 to 1e-12) and `massive` (`layer` with its four largest eigenvalues 1e7 times larger); the bottom 128 pairs. The
methods of `nullspace.solvers` take turns with SciPy's subset driver, `torch.linalg.eigh` and, up to 1,024, `torch.lobpcg` (200
iterations, which is far from enough: that is the point). Left out of the times: making C.

Figures: seconds (the median of the rounds); excess leak ‖XU‖ / ‖XU_eigh‖ − 1, from X itself; ‖CU − UΛ‖ / ‖C‖ and ‖UᵀU − I‖.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

from benchmarks.environment import RESULTS, write_result
from nullspace import solvers

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WIDTHS = (4096, 11008, 14336) if GPU else (1024, 2048, 4096, 8192)
SPECTRA = ("layer", "steep", "massive")
K = 128
LARGE = 5000  # from here on one spectrum and one round, on a CPU
LOBPCG_LIMIT = 1024
# log10 of λ / λ_max of the inputs of SmolLM2-135M's layer 15 o_proj (5,120 tokens of English, float64), at fractions of the
# spectrum counted from the top.
FRACTIONS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 1.0)
LOG_SPECTRUM = (0.0, -1.46, -2.07, -2.92, -3.47, -3.94, -4.30, -4.59, -4.76, -5.31)


def activations(spectrum: str, d: int, device: torch.device = DEVICE) -> torch.Tensor:
    """X (d, d) whose second moment has the spectrum, along random directions."""
    values = 10 ** (np.linspace(0, -12, d) if spectrum == "steep" else np.interp(np.linspace(0, 1, d), FRACTIONS, LOG_SPECTRUM))
    if spectrum == "massive":
        values[:4] *= 1e7
    generator = torch.Generator(device).manual_seed(0)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64, device=device)).Q
    return torch.tensor(values, device=device).sqrt()[:, None] * directions.mT


def second_moment(x: torch.Tensor) -> torch.Tensor:
    c = x.mT @ x
    return (c + c.mT) / 2


Pairs = tuple[torch.Tensor, torch.Tensor]


def by_scipy(c: torch.Tensor, k: int) -> Pairs:
    values, vectors = scipy.linalg.eigh(c.numpy(), subset_by_index=(0, k - 1))
    return torch.from_numpy(values), torch.from_numpy(vectors)


def by_torch(c: torch.Tensor, k: int) -> Pairs:
    values, vectors = torch.linalg.eigh(c)
    return values[:k], vectors[:, :k]


def by_lobpcg(c: torch.Tensor, k: int) -> Pairs:
    torch.manual_seed(0)
    return torch.lobpcg(c, k=k, niter=200, largest=False)


def methods(d: int) -> dict[str, Callable[[torch.Tensor, int], Pairs]]:
    """The reference last: it takes longest."""

    def ours(method: str) -> Callable[[torch.Tensor, int], Pairs]:
        return lambda c, k: solvers.bottom_eigenpairs(c, k, method=method)

    chosen = {"auto": ours("auto"), "shift-invert": ours("shift-invert")}
    if not GPU:
        chosen |= {"lapack-subset": ours("lapack-subset"), "scipy subset": by_scipy}
    if d <= LOBPCG_LIMIT:
        chosen["torch.lobpcg"] = by_lobpcg
    return {**chosen, "torch.linalg.eigh": by_torch}


def timed(run: Callable[[], Pairs]) -> tuple[float, Pairs]:
    if GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def quality(x: torch.Tensor, c: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> dict[str, float]:
    """‖XU‖, ‖CU − UΛ‖ / ‖C‖ and ‖UᵀU − I‖."""
    identity = torch.eye(vectors.shape[1], dtype=c.dtype, device=c.device)
    return {
        "leak": float((x @ vectors).norm()),
        "residual": float((c @ vectors - vectors * values).norm() / c.norm()),
        "orthogonality": float((vectors.mT @ vectors - identity).norm()),
    }


def measure(spectrum: str, d: int, k: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Every method on one matrix."""
    x = activations(spectrum, d)
    c = second_moment(x)
    seconds: dict[str, list[float]] = {name: [] for name in methods(d)}
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, method in methods(d).items():
            elapsed, (values, vectors) = timed(lambda method=method: method(c, k))
            seconds[name].append(elapsed)
            rows[name] = quality(x, c, values, vectors)
    reference = "torch.linalg.eigh"
    for name, row in rows.items():
        row["seconds"] = seconds[name]
        row["median_s"] = statistics.median(seconds[name])
        row["eigh / this"] = statistics.median(seconds[reference]) / row["median_s"]
        row["excess"] = row.pop("leak") / rows[reference].get("leak", float("nan")) - 1 if name != reference else 0.0
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--spectra", nargs="*", default=SPECTRA, choices=SPECTRA)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    name = f"solvers-{torch.cuda.get_device_name().lower().replace(' ', '-') if GPU else 'cpu'}"
    result: dict[str, Any] = {"k": K, "threads": torch.get_num_threads(), "runs": []}
    for d in arguments.widths:
        large = d > LARGE and not GPU
        for spectrum in arguments.spectra[:1] if large else arguments.spectra:
            rows = measure(spectrum, d, K, 1 if large else arguments.rounds)
            result["runs"].append({"d": d, "spectrum": spectrum, "methods": rows})
            for method, row in rows.items():
                print(
                    f"d {d:6} {spectrum:8} {method:18} {row['median_s']:8.2f} s  {row['eigh / this']:6.2f} ×  "
                    f"excess {row['excess']:9.1e}  residual {row['residual']:.1e}  orthogonality {row['orthogonality']:.1e}",
                    flush=True,
                )
            path = write_result(name, result, arguments.out)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
