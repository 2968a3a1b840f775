"""The whole job against the bare forward pass and against PEFT's CorDA preprocessing: time and peak memory.

    python -m benchmarks.peers [--rounds 3] [--without corda]

Workload: SmolLM2-135M in float32, 16 × 512 tokens in batches of 4, all 210 linear layers, rank 32, on the CPU. A run is one fresh
process, so that its peak memory is its own; loading the model and tokenising are not timed. The variants take turns within a
round, so that a slow period of the machine affects all of them; ratios are taken within a round, and their median is reported.

- `forward`: the model over the batches, nothing else.
- `nullspace`: `compute_null_spaces` and `inject_adapters`.
- `corda`: PEFT's `preprocess_corda` and `get_peft_model(init_lora_weights="corda")` on the same tokens, one sample a call, as its
  documentation does (it takes nothing else).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.children import peak_bytes, show_summary, take_turns
from benchmarks.environment import write_result

SAMPLES, LENGTH, BATCH_SIZE, RANK = 16, 512, 4, 32
WORKLOAD = {"model": "SmolLM2-135M float32", "samples": SAMPLES, "length": LENGTH, "batch_size": BATCH_SIZE, "rank": RANK}
VARIANTS = ("forward", "nullspace", "corda")


def setup(checkpoint: str) -> tuple[Any, Any]:
    """Model and batches: the same for every variant."""
    from nullspace.cli.demo import python_prose
    from nullspace.integrations.transformers import PackedBatches, load_model

    model, tokenizer = load_model(checkpoint, device="cpu")
    return model, PackedBatches(python_prose(), tokenizer, samples=SAMPLES, length=LENGTH, batch_size=BATCH_SIZE)


def forward(model: Any, batches: Any) -> dict[str, float]:
    import torch

    began = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    return {"forward": time.perf_counter() - began}


def nullspace(model: Any, batches: Any) -> dict[str, float]:
    from peft import LoraConfig

    from nullspace import compute_null_spaces
    from nullspace.integrations.peft import inject_adapters

    marks: dict[str, float] = {}

    def mark(stage: str, done: int, total: int | None, tokens: int) -> None:
        marks[stage] = time.perf_counter()

    began = time.perf_counter()
    spaces = compute_null_spaces(model, batches, rank=RANK, progress=mark)
    computed = time.perf_counter()
    inject_adapters(model, LoraConfig(r=RANK, lora_alpha=RANK), spaces)
    return {
        "forward and sums": marks["forward"] - began,
        "eigenvectors": computed - marks["forward"],
        "injection": time.perf_counter() - computed,
    }


def corda_config(mode: str, targets: list[str]) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig

    corda: Any = CordaConfig(corda_method=mode)  # type: ignore[arg-type]
    return LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="corda", target_modules=targets, corda_config=corda)


def sample_by_sample(model: Any, batches: Any) -> Callable[[], None]:
    """The `run_model` of PEFT's CorDA, which takes one sample a call."""
    import torch

    def run_model() -> None:
        with torch.no_grad():
            for batch in batches:
                for sample in batch["input_ids"].split(1):
                    model(input_ids=sample, use_cache=False)

    return run_model


def corda(model: Any, batches: Any) -> dict[str, float]:
    from peft import get_peft_model
    from peft.tuners.lora.corda import preprocess_corda

    from nullspace.model.sites import find_targets

    config = corda_config("kpm", list(find_targets(model)))
    began = time.perf_counter()
    preprocess_corda(model, config, run_model=sample_by_sample(model, batches))
    computed = time.perf_counter()
    get_peft_model(model, config)
    return {"preprocess_corda": computed - began, "injection": time.perf_counter() - computed}


def run_variant(variant: str, checkpoint: str) -> dict[str, Any]:
    """One variant in this process: seconds a stage, peak memory, and peak memory after loading."""
    model, batches = setup(checkpoint)
    loaded = peak_bytes()
    stages = {"forward": forward, "nullspace": nullspace, "corda": corda}[variant](model, batches)
    peak = peak_bytes()
    return {"variant": variant, "seconds": sum(stages.values()), "stages": stages, "peak_gb": peak / 1e9, "loaded_gb": loaded / 1e9}


def checkpoint_of_demo_model(folder: Path) -> str:
    """SmolLM2-135M as a float32 checkpoint: loading GGUF would raise the peak memory above that of any variant."""
    from nullspace.artifacts import store
    from nullspace.cli import demo
    from nullspace.integrations.transformers import load_model

    if not folder.exists():
        model, tokenizer = load_model(demo.find_model(), device="cpu")
        with store.new_directory(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return str(folder)


def parser_of(description: str | None, variants: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every benchmark of this workload."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, default=Path(".venv") / "smollm2-135m", help="made if it is not there")
    parser.add_argument("--run", choices=variants, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = parser_of(__doc__, VARIANTS)
    parser.add_argument("--without", nargs="*", default=[], choices=VARIANTS[1:])
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_variant(options.run, str(options.checkpoint))))
        return
    checkpoint = checkpoint_of_demo_model(options.checkpoint)
    variants = [v for v in VARIANTS if v not in options.without]
    runs = take_turns("benchmarks.peers", variants, options.rounds, ["--checkpoint", checkpoint])
    summary = summarise(runs, variants)
    show_summary(summary)
    print(f"\nwrote {write_result('peers-cpu', {'workload': WORKLOAD, 'summary': summary, 'runs': runs})}")


def summarise(runs: list[dict[str, Any]], variants: list[str]) -> dict[str, dict[str, float]]:
    """Median over the rounds of time against the forward pass, and of peak memory above it."""

    def of(variant: str, key: str) -> list[float]:
        return [run[key] for run in runs if run["variant"] == variant]

    return {
        variant: {
            "time_over_forward": statistics.median(
                mine / bare for mine, bare in zip(of(variant, "seconds"), of("forward", "seconds"), strict=True)
            ),
            "gb_above_forward": statistics.median(
                mine - bare for mine, bare in zip(of(variant, "peak_gb"), of("forward", "peak_gb"), strict=True)
            ),
        }
        for variant in variants
        if variant != "forward"
    }


if __name__ == "__main__":
    main()
