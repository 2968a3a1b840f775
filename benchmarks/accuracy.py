"""The excess leak of the bases, at every site of SmolLM2-135M, and at some with massive activations planted.

    python -m benchmarks.accuracy

Workload: 4,096 tokens of English, rank 32, all 120 inputs of linear layers. Reference: the float64 singular values of the
materialised activations. Figure: excess leak, ‖UᵀX‖ over the optimum, minus 1, for both precisions and, beside them, for one
float32 product with a float64 eigensolver (what one writes without thinking). The massive activations are planted: 32 of the
tokens are scaled by 1e3 and by 1e4, at the inputs of layers 0, 1, 15 and 29.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import write_result
from benchmarks.peers import RANK, checkpoint_of_demo_model
from nullspace import Covariance, NullSpace
from nullspace.cli import demo
from nullspace.integrations.transformers import PackedBatches, load_model
from nullspace.model.sites import find_targets

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference import leak, optimal_leak, recorded_inputs

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")  # one member of each shared input
PLANTED_LAYERS = (0, 1, 15, 29)


def streamed(precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A basis by `Covariance`, in batches of 2,048 tokens."""

    def basis(x_nd: torch.Tensor) -> torch.Tensor:
        covariance = Covariance(x_nd.shape[1], precision=precision)
        for part in x_nd.split(2048):
            covariance.update(part)
        return NullSpace.from_covariance(covariance, RANK).basis

    return basis


def one_float32_product(x_nd: torch.Tensor) -> torch.Tensor:
    """A basis by the obvious code."""
    return torch.linalg.eigh((x_nd.T @ x_nd).double())[1][:, :RANK]


METHODS = {"auto": streamed("auto"), "fp64": streamed("fp64"), "one float32 product": one_float32_product}


def measure(x_nd: torch.Tensor) -> dict[str, float]:
    """Excess leak of every method on one input."""
    optimum = optimal_leak(x_nd, RANK)
    return {name: leak(basis(x_nd), x_nd) / optimum - 1 for name, basis in METHODS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(".venv") / "smollm2-135m", help="made if it is not there")
    model, tokenizer = load_model(checkpoint_of_demo_model(parser.parse_args().checkpoint), device="cpu")
    names = [name for name in find_targets(model) if name.endswith(KINDS)]
    batches = PackedBatches(demo.python_prose(), tokenizer, samples=8, length=512)
    inputs = recorded_inputs(model, batches, names)
    rows: list[dict[str, Any]] = []
    for name in names:
        rows.append({"site": name, "scale": 1.0, **measure(inputs[name])})
        if int(name.split(".")[2]) in PLANTED_LAYERS:
            massive = torch.randperm(len(inputs[name]), generator=torch.Generator().manual_seed(0))[:32]
            for scale in (1e3, 1e4):
                x = inputs[name].clone()
                x[massive] *= scale
                rows.append({"site": name, "scale": scale, **measure(x)})
        del inputs[name]
    summary = {
        f"x{scale:g}": {
            method: {"worst": max(worst), "at": worst[max(worst)], "sites": len(worst)}
            for method in METHODS
            for worst in [{row[method]: row["site"] for row in rows if row["scale"] == scale}]
        }
        for scale in (1.0, 1e3, 1e4)
    }
    for scale, methods in summary.items():
        for method, figure in methods.items():
            print(f"{scale:8} {method:20} worst of {figure['sites']:3} sites {figure['worst']:9.1e}  {figure['at']}")
    print(f"\nwrote {write_result('accuracy-cpu', {'rank': RANK, 'tokens': 4096, 'summary': summary, 'sites': rows})}")


if __name__ == "__main__":
    main()
