"""What a variant of `benchmarks.gpu_models` runs: the model, its batches, the warm-up and the work."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

OURS = {
    "resident": ("resident", "device", "device"),
    "layerwise-device": ("layerwise", "device", "device"),
    "layerwise": ("layerwise", "device", "host"),
    "layerwise-host": ("layerwise", "host", "host"),
    "layerwise-disk": ("layerwise", "disk", "host"),
    "capped": ("layerwise", "host", "host"),
    "capped-six": ("layerwise", "host", "host"),
}
SUMS = {"sums": OURS["resident"], "sums-layerwise": OURS["layerwise-device"]}
VARIANTS = ["forward", *SUMS, *list(OURS)[:5], "corda", "capped", "capped-six"]
ONCE = ("corda", "capped", "capped-six")
CAP = 24e9
CAPPED_MODEL, CAPPED_BLOCKS = "Llama-3-70B", 2


def make_model(options: argparse.Namespace, variant: str, folder: str) -> Any:
    """With its weights where the variant wants them; always made on the device that computes, where that is quick."""
    import torch

    from benchmarks import shapes

    name, blocks = options.model, options.blocks
    if variant == "corda":
        blocks = options.corda_blocks
    elif variant.startswith("capped") and options.device == "cuda":
        name, blocks = CAPPED_MODEL, CAPPED_BLOCKS
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = shapes.build(name, device=options.device, dtype=dtype, blocks=blocks, massive=True, steep=True)
    place = (OURS | SUMS).get(variant, ("", "device", ""))[1]
    if place != "device":
        model = model.to("cpu")
    if place == "disk":
        from accelerate import disk_offload

        disk_offload(model, folder, execution_device=torch.device(options.device))
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return model


def make_batches(options: argparse.Namespace, model: Any, samples: int) -> list[dict[str, Any]]:
    """Random tokens; the first one of every sequence is the one with massive activations."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (samples, options.length), generator=generator)
    ids[:, 0] = 0
    return [{"input_ids": part} for part in ids.split(options.batch_size)]


def work_of(options: argparse.Namespace, model: Any, variant: str) -> dict[str, Any]:
    """All that is timed."""
    if variant == "forward":
        return forward(options, model)
    if variant == "corda":
        return corda(options, model)
    return (sums if variant in SUMS else ours)(options, model, variant)


def forward(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        for batch in make_batches(options, model, options.samples):
            model(input_ids=batch["input_ids"].to(options.device), use_cache=False, logits_to_keep=1)
    return {}


def targets_of(variant: str) -> list[str]:
    from benchmarks.shapes import PROJECTIONS

    return [name for name in PROJECTIONS if variant != "capped-six" or name != "down_proj"]


def strategy_of(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """The arguments that choose how the model is run."""
    strategy, _, hidden_states = (OURS | SUMS)[variant]
    if strategy == "resident":
        return {"strategy": strategy}
    if options.device == "cpu":
        hidden_states = "host"
    return {"strategy": strategy, "device": options.device, "hidden_states": hidden_states}


def sums(options: argparse.Namespace, model: Any, variant: str) -> dict[str, Any]:
    """Every sum is made and read, and nothing is solved."""
    from nullspace import stream_covariances

    batches = make_batches(options, model, options.samples)
    tokens = [
        covariance.tokens
        for _, covariance in stream_covariances(
            model, batches, targets=targets_of(variant), progress=False, **strategy_of(options, variant)
        )
    ]
    return {"sites": len(tokens)}


def ours(options: argparse.Namespace, model: Any, variant: str) -> dict[str, Any]:
    from nullspace import compute_null_spaces

    marks: dict[str, float] = {}

    def mark(stage: str, done: int, total: int | None, tokens: int) -> None:
        marks[stage] = time.perf_counter()

    began = time.perf_counter()
    spaces = compute_null_spaces(
        model,
        make_batches(options, model, options.samples),
        rank=options.rank,
        targets=targets_of(variant),
        progress=mark,
        tolerance=float("inf"),  # the fast sums alone: a second pass would be another measurement
        **strategy_of(options, variant),
    )
    synchronize(options)
    marks["null spaces"] = time.perf_counter()
    if OURS[variant][1] == "device":
        inject(options, model, spaces)
        marks["injection"] = time.perf_counter()
    each = [spaces[site.name] for site in spaces.sites]
    return {
        "ends_s": {stage: at - began for stage, at in marks.items()},
        "sites": len(each),
        "leak": {"median": statistics.median(s.leak for s in each), "max": max(s.leak for s in each)},
        "excess_estimate_max": max(s.excess_estimate for s in each),
        "precisions": sorted({s.precision for s in each}),
    }


def inject(options: argparse.Namespace, model: Any, spaces: Any) -> None:
    """The adapters into the model, in place."""
    from peft import LoraConfig

    from nullspace.integrations.peft import inject_adapters

    inject_adapters(model, LoraConfig(r=options.rank, lora_alpha=options.rank), spaces)
    synchronize(options)


def synchronize(options: argparse.Namespace) -> None:
    """Wait for the device."""
    import torch

    if options.device == "cuda":
        torch.cuda.synchronize()


def corda(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    from benchmarks.shapes import PROJECTIONS

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        init_lora_weights="corda",
        target_modules=PROJECTIONS,
        corda_config=CordaConfig(corda_method="kpm"),
    )
    batches = make_batches(options, model, options.corda_samples)
    marks: dict[str, float] = {}

    def run_model() -> None:
        with torch.no_grad():
            for batch in batches:
                for sample in batch["input_ids"].split(1):
                    model(input_ids=sample.to(options.device), use_cache=False, logits_to_keep=1)
        if options.device == "cuda":
            torch.cuda.synchronize()
        marks["forward and sums"] = time.perf_counter() - began

    began = time.perf_counter()
    preprocess_corda(model, config, run_model=run_model)
    return {"stages": marks, "samples": options.corda_samples}


def warm_up(options: argparse.Namespace, model: Any, variant: str) -> None:
    """Compile what the variant launches, and let the libraries take their workspaces, on random rows of the model's widths."""
    import torch

    from nullspace import Covariance
    from nullspace.model.sites import find_targets
    from nullspace.moments.sums_triton import launch_tokens
    from nullspace.solvers import bottom_eigenpairs

    device = torch.device(options.device)
    if variant in ("forward", "corda", "sums", "resident"):  # the model is in one piece where it computes
        with torch.no_grad():
            model(input_ids=make_batches(options, model, 1)[0]["input_ids"].to(device), use_cache=False, logits_to_keep=1)
    if variant in ("forward", "corda"):
        return
    if variant in OURS and OURS[variant][1] == "device":
        import nullspace.integrations.peft  # noqa: F401 (PEFT takes seconds to import)
    layers = find_targets(model, targets_of(variant)).values()
    for d in sorted({layer.in_features for layer in layers}):
        rows = torch.randn(launch_tokens(d), d, generator=torch.Generator(device).manual_seed(0), device=device)
        rows[::64] *= 100  # outliers, which take kernels of their own
        covariance = Covariance(d, device=device)
        covariance.update(rows.to(next(model.parameters()).dtype))
        c = covariance.matrix()
        if variant not in SUMS:
            bottom_eigenpairs(c, min(options.rank, d - 1), overwrite=True)
