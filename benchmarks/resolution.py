"""What the variants of the second-moment kernel lose by rounding, simulated: no GPU is needed, and none was asked.

    python -m benchmarks.resolution          # half an hour on one core; writes benchmarks/results/resolution-simulated.json

Workload: inputs in bfloat16: Gaussian, 48 columns ("random"); Gaussian with singular values falling to 1e-3 along directions that
are no axes, 48 columns ("steep"); and of SmolLM2-135M, 16,384 tokens of English, whole width, outlier tokens (8 × the median norm)
left out as they are in a run. 512 entries of the sum are drawn with replacement, larger ones with a greater chance, and weighted
by its inverse, so that a norm over them estimates that over all entries. Tensor cores round as `tests/tensor_core.py`
models them (Hopper's: 16 products, 25 places; Ampere's: 8 and 24; arXiv 2511.10909); everything else rounds as IEEE 754 says.

Figures, where G + E is what a number of launches of so many tokens come to, added in float64: "delta", δ = ‖E − αG‖_F / ‖G‖_F with
the α that makes δ least (an error proportional to G moves no eigenvector); and "rest", the same with a weight α_p for the tokens of
each step p of the chains, G = Σ_p G_p. A chain's early tokens lose more than its late ones. That loss gives tokens weights between
1 − 4e-7 and 1: it changes no quadratic form, and so no leak, by more than 4e-7 of itself, however small that is. "rest" is what can
hide the bottom of a spectrum. `nullspace.csrc_triton.resolution` holds the constants that were derived from it, and
`tests/csrc_triton/test_resolution.py` compares the two.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.environment import RESULTS, write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tensor_core
from inputs import activations, randn

CORES = {"Hopper": (tensor_core.HOPPER, 128), "Ampere": (tensor_core.AMPERE, 64)}  # with the window of the tile table
LAUNCHES = (1, 4, 16, 32)
COLUMNS = 48
ENTRIES = 512
SITES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.15.self_attn.o_proj",
    "model.layers.29.mlp.down_proj",
)


class Input(NamedTuple):
    """Pairs of columns, (tokens, entries) float32, and how much an entry of the sum stands for, (entries,)."""

    left: np.ndarray
    right: np.ndarray
    weights: np.ndarray


def drawn_entries(x_nd: torch.Tensor) -> Input:
    """Entries with a chance that grows with the square of the entry, or of the geometric mean of the diagonal's."""
    x = x_nd.bfloat16().float().numpy()
    g = x.T.astype(np.float64) @ x
    diagonal = np.diag(g)
    chance = g**2 / (g**2).sum() + np.outer(diagonal, diagonal) / diagonal.sum() ** 2
    chance = chance.ravel() / chance.sum()
    drawn = np.random.default_rng(0).choice(chance.size, ENTRIES, p=chance)
    i, j = np.divmod(drawn, len(g))
    return Input(x[:, i], x[:, j], 1 / (ENTRIES * chance[drawn]))


def smollm2_inputs(checkpoint: Path, samples: int) -> dict[str, Input]:
    """Inputs of some layers for 512 tokens a sample, outliers zero."""
    from benchmarks.peers import checkpoint_of_demo_model
    from nullspace.cli import demo
    from nullspace.integrations.transformers import PackedBatches, load_model
    from nullspace.moments.sums import find_outliers
    from reference import recorded_inputs

    model, tokenizer = load_model(checkpoint_of_demo_model(checkpoint), device="cpu")
    batches = PackedBatches(demo.python_prose(), tokenizer, samples=samples, length=512)
    result = {}
    for name, x in recorded_inputs(model, batches, SITES).items():
        outlier = find_outliers(torch.linalg.vector_norm(x, dim=1))[0]
        x[outlier] = 0.0
        result[name] = drawn_entries(x)
    return result


def sums_of(core: tensor_core.TensorCore, left: np.ndarray, right: np.ndarray, window: int, kahan: bool) -> dict[str, np.ndarray]:
    """Each launch's sum by each variant, (launches, entries) float64, of factors (launches, tokens, entries)."""
    launches, tokens, entries = left.shape
    # A product of one row and one column an entry.
    rows = left.reshape(launches, tokens // window, window, entries).swapaxes(-1, -2)[..., None, :]
    columns = right.reshape(launches, tokens // window, window, entries).swapaxes(-1, -2)[..., None]
    zero = np.zeros((tokens // window, entries, 1, 1), dtype=np.float32)
    chains = np.stack([core.dot(a, b, zero)[..., 0, 0] for a, b in zip(rows, columns, strict=True)])
    plain = np.zeros((launches, entries), dtype=np.float32)
    for number in range(tokens // window):
        plain = plain + chains[:, number]
    result = {"plain": plain.astype(np.float64), "gemm": chains.sum(axis=1, dtype=np.float64)}
    if kahan:
        high, low = np.zeros((2, launches, entries), dtype=np.float32)
        for number in range(tokens // window):
            low = core.dot(rows[:, number], columns[:, number], low[..., None, None])[..., 0, 0]
            total = high + low
            low = low - (total - high)
            high = total
        result["kahan"] = high.astype(np.float64) + low
    return result


def delta(error: np.ndarray, parts: np.ndarray, weights: np.ndarray) -> float:
    """‖E − Σ_p α_p G_p‖ / ‖Σ_p G_p‖ with the α that make it least, of `error` (entries,) and `parts` (p, entries)."""
    scale = np.sqrt(weights)
    alpha = np.linalg.lstsq((parts * scale).T, error * scale, rcond=None)[0]
    return float(np.linalg.norm((error - alpha @ parts) * scale) / np.linalg.norm(parts.sum(axis=0) * scale))


def measured(name: str, x: Input, tokens: int, windows: dict[int, int], core: str) -> Iterator[dict[str, Any]]:
    """A row a variant, window and number of launches. `windows`: so many launches at most for each window."""
    for window, most in windows.items():
        launches = min(len(x.left) // tokens, most)
        left, right = (part[: launches * tokens].reshape(launches, tokens, -1) for part in (x.left, x.right))
        shape = (-1, window // CORES[core][0].step, CORES[core][0].step, left.shape[-1])
        exact = np.stack(
            [
                np.einsum("wpts,wpts->ps", a.reshape(shape), b.reshape(shape), dtype=np.float64)
                for a, b in zip(left, right, strict=True)
            ]
        )
        for variant, parts in sums_of(CORES[core][0], left, right, window, kahan=window < 512).items():
            for count in LAUNCHES:
                if count <= launches:
                    by_step = exact[:count].sum(axis=0)
                    error = parts[:count].sum(axis=0) - by_step.sum(axis=0)
                    yield {
                        "core": core,
                        "input": name,
                        "variant": variant,
                        "window": window,
                        "tokens": tokens,
                        "launches": count,
                        "delta": delta(error, by_step.sum(axis=0, keepdims=True), x.weights),
                        "rest": delta(error, by_step, x.weights),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(".venv") / "smollm2-135m", help="made if it is not there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--samples", type=int, default=32, help="of 512 tokens, through SmolLM2; 0: synthetic inputs alone")
    parser.add_argument("--launches", type=int, default=LAUNCHES[-1], help="at most so many")
    arguments = parser.parse_args()
    inputs = {
        "random": drawn_entries(randn(8192 * arguments.launches, COLUMNS)),
        "steep": drawn_entries(activations(8192 * arguments.launches, COLUMNS, quietest=1e-3)),
    }
    if arguments.samples:
        inputs |= smollm2_inputs(arguments.checkpoint, arguments.samples)
    started, rows = time.perf_counter(), []
    for tokens in (512, 2048, 8192):
        for name, x in inputs.items():
            if len(x.left) < tokens or (tokens == 2048 and name in ("random", "steep")):
                continue
            for core, (_, own) in CORES.items():
                few = min(4, arguments.launches)
                windows = {own: arguments.launches, own // 2: few, 2 * own: few, 512: few}
                for row in measured(name, x, tokens, windows, core):
                    rows.append(row)
                print(f"{time.perf_counter() - started:6.0f} s  {core} {name} {tokens} tokens", flush=True)
        write_result("resolution-simulated", {"simulated": True, "entries": ENTRIES, "rows": rows}, arguments.out)
    for row in rows:
        print(
            f"{row['core']:6} {row['input']:34} {row['variant']:6} window {row['window']:4} tokens {row['tokens']:5} "
            f"launches {row['launches']:3}  {row['delta']:.2e}  rest {row['rest']:.2e}"
        )


if __name__ == "__main__":
    main()
