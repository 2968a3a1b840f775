"""`preprocess_corda` against PEFT's function of this name: time, peak memory, and distance from a float64 reference.

    python -m benchmarks.corda [--rounds 3] [--mode kpm]      # writes benchmarks/results/corda-cpu.json

Time and memory: the workload of `benchmarks.peers` (SmolLM2-135M in float32, 16 × 512 tokens, all 210 linear layers, rank 32, on
the CPU), one sample a call, which is all that PEFT's function takes; the same `run_model` for all. One fresh process a run, the
variants taking turns within a round, ratios within a round, medians. Loading and tokenising are not timed.

- `forward`: `run_model` and nothing else.
- `nullspace`, `peft`: `preprocess_corda` of either.

Accuracy, with PEFT's weighting (`parity=True`): BA of both against SVD(W C) C⁻¹ in float64 from the inputs themselves, in four
layers of three blocks, and for random W and inputs.
"""

from __future__ import annotations

import json
import time
from typing import Any

from benchmarks.children import peak_bytes, show_summary, take_turns
from benchmarks.environment import write_result
from benchmarks.peers import (
    RANK,
    WORKLOAD,
    checkpoint_of_demo_model,
    corda_config,
    parser_of,
    sample_by_sample,
    setup,
    summarise,
)

VARIANTS = ["forward", "nullspace", "peft"]
BLOCKS = (1, 15, 28)
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def function(variant: str) -> Any:
    if variant == "peft":
        from peft.tuners.lora.corda import preprocess_corda

        return preprocess_corda
    from nullspace.integrations.peft import preprocess_corda as ours

    return ours


def run_variant(variant: str, mode: str, checkpoint: str) -> dict[str, Any]:
    from nullspace.model.sites import find_targets

    model, batches = setup(checkpoint)
    config, run_model = corda_config(mode, list(find_targets(model))), sample_by_sample(model, batches)
    preprocess = function(variant)
    loaded = peak_bytes()
    began = time.perf_counter()
    if variant == "forward":
        run_model()
    else:
        preprocess(model, config, run_model=run_model)
    seconds = time.perf_counter() - began
    peak = peak_bytes()
    return {"variant": variant, "seconds": seconds, "peak_gb": peak / 1e9, "loaded_gb": loaded / 1e9}


def literal(w: Any, c: Any, mode: str) -> Any:
    """BA by CorDA's definition, in float64."""
    import torch

    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(w @ c, full_matrices=False)
    part = slice(-RANK, None) if mode == "kpm" else slice(RANK)
    return torch.linalg.solve(c, (u[:, part] * s[part] @ vt[part]).T).T  # C is symmetric


def distances(model: Any, names: list[str], inputs: Any, mode: str, run_model: Any) -> list[dict[str, Any]]:
    """Of every layer: how far either BA is from the reference, and the two from each other, relatively."""
    import torch

    config = corda_config(mode, names)
    product: dict[str, dict[str, Any]] = {}
    for variant in ("nullspace", "peft"):
        options = {"parity": True} if variant == "nullspace" else {}
        function(variant)(model, config, run_model=run_model, **options)
        product[variant] = {}
        for name in names:
            eigens = model.get_submodule(name).eigens
            product[variant][name] = (eigens.U_WC * eigens.S_WC).double() @ eigens.V_WC.double().T
            del model.get_submodule(name).eigens
    rows = []
    for name in names:
        parts = [x.double() / x.max().abs().double() for x in inputs[name]]
        c = sum(x.T @ x for x in parts) / len(parts)
        wanted = literal(model.get_submodule(name).weight.detach().double(), c, mode)
        ours, theirs = product["nullspace"][name], product["peft"][name]
        damped = torch.linalg.eigvalsh(c) + 0.01 * c.diagonal().mean()
        rows.append(
            {
                "layer": name,
                "mode": mode,
                "condition": float(damped[-1] / damped[0]),
                "nullspace": float((ours - wanted).norm() / wanted.norm()),
                "peft": float((theirs - wanted).norm() / wanted.norm()),
                "apart": float((ours - theirs).norm() / wanted.norm()),
            }
        )
    return rows


def accuracy(checkpoint: str) -> list[dict[str, Any]]:
    import torch

    model, batches = setup(checkpoint)
    names = [f"model.layers.{block}.{layer}" for block in BLOCKS for layer in LAYERS]
    inputs: dict[str, list[Any]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, kept=inputs[name]: kept.append(args[0][0].clone()))
        for name in names
    ]
    run_model = sample_by_sample(model, batches)
    run_model()
    for handle in handles:
        handle.remove()
    rows = [row for mode in ("kpm", "ipm") for row in distances(model, names, inputs, mode, run_model)]
    torch.manual_seed(0)
    random = torch.nn.ModuleDict(
        {"wide": torch.nn.Linear(600, 400), "tall": torch.nn.Linear(400, 600), "square": torch.nn.Linear(500, 500)}
    )
    samples = {name: [torch.randn(512, layer.in_features) for _ in range(8)] for name, layer in random.items()}

    def run_random() -> None:
        for name, layer in random.items():
            for x in samples[name]:
                layer(x[None])

    return rows + [row for mode in ("kpm", "ipm") for row in distances(random, list(random), samples, mode, run_random)]


def main() -> None:
    parser = parser_of(__doc__, VARIANTS)
    parser.add_argument("--mode", choices=("kpm", "ipm"), default="kpm")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_variant(options.run, options.mode, str(options.checkpoint))))
        return
    checkpoint = checkpoint_of_demo_model(options.checkpoint)
    rows = accuracy(checkpoint)
    for row in rows:
        print(
            f"{row['layer']:32} {row['mode']}  C: {row['condition']:.0e}  nullspace {row['nullspace']:.1e}  peft {row['peft']:.1e}"
        )
    runs = take_turns("benchmarks.corda", VARIANTS, options.rounds, ["--mode", options.mode, "--checkpoint", checkpoint])
    summary = summarise(runs, VARIANTS)
    show_summary(summary)
    speed = summary["peft"]["time_over_forward"] / summary["nullspace"]["time_over_forward"]
    print(f"{speed:.2f} x faster than PEFT (ratio of medians)")
    content = {"workload": {**WORKLOAD, "mode": options.mode}, "summary": summary, "accuracy": rows, "runs": runs}
    print(f"\nwrote {write_result('corda-cpu', content)}")


if __name__ == "__main__":
    main()
