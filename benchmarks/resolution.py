"""What the variants of the second-moment kernel lose by rounding, simulated: no GPU is needed, and none was asked.

    python -m benchmarks.resolution          # half an hour on one core; writes benchmarks/results/resolution-simulated.json

Workload: inputs in bfloat16, 48 columns: Gaussian ("random"); Gaussian with singular values falling to 1e-3 along directions that
are no axes ("steep"); and of SmolLM2-135M, 16,384 tokens of English, 48 columns spread over the width, outlier tokens (8 × the
median norm) left out as they are in a run. Tensor cores round as `tests/tensor_core.py` models them (Hopper's: 16 products, 25
places; Ampere's: 8 and 24; arXiv 2511.10909); everything else rounds as IEEE 754 says.

Figure: δ = ‖E − αG‖_F / ‖G‖_F, where G + E is what a number of launches of so many tokens come to, added in float64, and α makes δ
least: an error proportional to G moves no eigenvector. `nullspace.csrc_triton.resolution` holds constants above all of these, and
`tests/csrc_triton/test_resolution.py` compares the two.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import RESULTS, write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tensor_core
from inputs import activations, randn

CORES = {"Hopper": (tensor_core.HOPPER, 128), "Ampere": (tensor_core.AMPERE, 64)}  # with the window of the tile table
LAUNCHES = (1, 4, 16, 32)
COLUMNS = 48
SITES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.15.self_attn.o_proj",
    "model.layers.29.mlp.down_proj",
)


def smollm2_inputs(checkpoint: Path, samples: int) -> dict[str, torch.Tensor]:
    """Inputs of some layers for 512 tokens a sample, outliers zero, 48 of their columns."""
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
        result[name] = x[:, torch.linspace(0, x.shape[1] - 1, COLUMNS).long()].bfloat16()
    return result


def sums_of(core: tensor_core.TensorCore, x_lnd: np.ndarray, window: int) -> dict[str, np.ndarray]:
    """The sum of every launch, (launches, d, d) float64, by each variant."""
    launches, tokens, d = x_lnd.shape
    chains = x_lnd.reshape(launches, tokens // window, window, d)
    zero = np.zeros((tokens // window, d, d), dtype=np.float32)
    products = np.stack([core.dot(x.swapaxes(-1, -2), x, zero) for x in chains])  # (launches, windows, d, d)
    plain = np.zeros((launches, d, d), dtype=np.float32)
    high, low = plain.copy(), plain.copy()
    for number in range(tokens // window):
        plain = plain + products[:, number]
        x = chains[:, number]
        low = core.dot(x.swapaxes(-1, -2), x, low)
        total = high + low
        low = low - (total - high)
        high = total
    return {
        "kahan": high.astype(np.float64) + low,
        "plain": plain.astype(np.float64),
        "gemm": products.sum(axis=1, dtype=np.float64),
    }


def delta(total: np.ndarray, exact: np.ndarray) -> float:
    error = total - exact
    rest = error - (error * exact).sum() / (exact**2).sum() * exact
    return float(np.linalg.norm(rest) / np.linalg.norm(exact))


def measured(name: str, x_nd: torch.Tensor, tokens: int, windows: dict[int, int], core: str) -> Iterator[dict[str, Any]]:
    """A row a variant, window and number of launches. `windows`: so many launches at most for each window."""
    for window, most in windows.items():
        launches = min(len(x_nd) // tokens, most)
        x = x_nd[: launches * tokens].double().numpy().reshape(launches, tokens, -1)
        exact = x.swapaxes(-1, -2) @ x
        sums = sums_of(CORES[core][0], x, window)
        energy = (x**2).sum()
        for variant, parts in sums.items():
            for count in LAUNCHES:
                if count <= launches:
                    g = exact[:count].sum(0)
                    yield {
                        "core": core,
                        "input": name,
                        "variant": variant,
                        "window": window,
                        "tokens": tokens,
                        "launches": count,
                        "delta": delta(parts[:count].sum(0), g),
                        # The account counts relative to the energy, which bounds ‖G‖_F from above.
                        "norm_of_energy": float(np.linalg.norm(g) / energy * launches / count),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(".venv") / "smollm2-135m", help="made if it is not there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--samples", type=int, default=32, help="of 512 tokens, through SmolLM2; 0: synthetic inputs alone")
    parser.add_argument("--launches", type=int, default=LAUNCHES[-1], help="at most so many")
    arguments = parser.parse_args()
    inputs = {
        "random": randn(8192 * arguments.launches, COLUMNS).bfloat16(),
        "steep": activations(8192 * arguments.launches, COLUMNS, quietest=1e-3).bfloat16(),
    }
    if arguments.samples:
        inputs |= smollm2_inputs(arguments.checkpoint, arguments.samples)
    started, rows = time.perf_counter(), []
    for tokens in (512, 2048, 8192):
        for name, x in inputs.items():
            if len(x) < tokens or (tokens == 2048 and name in ("random", "steep")):
                continue
            for core, (_, own) in CORES.items():
                few = min(4, arguments.launches)
                windows = {own: arguments.launches, own // 2: few, 2 * own: few, 512: few}
                for row in measured(name, x, tokens, windows, core):
                    rows.append(row)
                print(f"{time.perf_counter() - started:6.0f} s  {core} {name} {tokens} tokens", flush=True)
        write_result("resolution-simulated", {"simulated": True, "columns": COLUMNS, "rows": rows}, arguments.out)
    for row in rows:
        print(
            f"{row['core']:6} {row['input']:34} {row['variant']:6} window {row['window']:4} tokens {row['tokens']:5} "
            f"launches {row['launches']:3}  {row['delta']:.2e}"
        )


if __name__ == "__main__":
    main()
