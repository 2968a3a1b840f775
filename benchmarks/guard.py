"""What a constraint, a gauge and a penalty cost: a training step with each against one without, on a real model.

    python -m benchmarks.guard [--rounds 20]      # writes benchmarks/results/guard-cpu.json

SmolLM2-135M in float32, plain LoRA of rank 16 on all 210 linear layers, AdamW, 4 × 128 tokens a step, on the CPU. Second moments
are of 16 × 512 tokens. One process of one thread, and seconds of the processor, not of the clock: what else runs on the machine
hardly counts. In every round each variant takes one step, in an order of its own. Ratios are within a round; shown are their
medians and quartiles.

- `plain`: forward, backward, clipping, step.
- `confine`: the same, then `Confinement.project` (leak 0.1: some 25 % of the directions).
- `damping`: the same with damping=0.1.
- `gauge`: the same as `plain`, then a reading of `Gauge`; a user who logs every ten steps pays a tenth.
- `penalty`: the penalty is added to the loss.

`step` is the whole step over that of `plain`, less 1; `share`, measured inside of the same step, is the guard's part over the rest,
and varies less. Of a penalty only `step` can be measured.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.peers import checkpoint_of_demo_model, setup

RANK, LEAK, TAU, SAMPLES, LENGTH = 16, 0.1, 0.1, 4, 128
VARIANTS = ("plain", "confine", "damping", "gauge", "penalty")
WORKLOAD = {"rank": RANK, "leak": LEAK, "damping": TAU, "samples": SAMPLES, "length": LENGTH, "calibration_tokens": 16 * 512}


class Runs:
    """One model, and a step of every variant."""

    def __init__(self, checkpoint: str, kept: Path) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from nullspace import Covariances, stream_covariances
        from nullspace.artifacts.identity import weights_of
        from nullspace.integrations.peft import Gauge, confine, penalty
        from nullspace.model.sites import find_targets

        torch.set_num_threads(1)
        model, batches = setup(checkpoint)
        batches = list(batches)
        if not kept.exists():
            pairs = stream_covariances(model, batches, progress=False)
            Covariances(pairs, weights_of(find_targets(model))).save(kept)
        covariances = Covariances.load(kept)
        torch.manual_seed(0)
        self.model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        ids = torch.cat([batch["input_ids"] for batch in batches])
        self.ids = ids.reshape(-1, LENGTH)[: 8 * SAMPLES].split(SAMPLES)
        took: dict[str, float] = {}
        began = time.process_time()
        confinement = confine(self.model, covariances, LEAK)
        took["confine"] = time.process_time() - began
        damped = confine(self.model, covariances, damping=TAU)
        began = time.process_time()
        gauge = Gauge(self.model, covariances)
        took["gauge"] = time.process_time() - began
        self.guards: dict[str, Callable[[], Any]] = {"confine": confinement.project, "damping": damped.project, "gauge": gauge}
        self.before: dict[str, Callable[[], None]] = {"confine": confinement.rebase, "damping": damped.rebase}
        self.penalty = penalty(self.model, covariances)
        self.setup_seconds = took
        self.directions = {str(d): sorted(a.directions for a in confinement.allowed.values() if a.d_in == d) for d in (576, 1536)}

    def step(self, variant: str, number: int) -> dict[str, Any]:
        import torch

        ids = self.ids[number % len(self.ids)]
        self.before.get(variant, lambda: None)()
        began = time.process_time()
        loss = self.model(input_ids=ids, labels=ids).loss
        (loss + self.penalty() if variant == "penalty" else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        between = time.process_time()
        self.guards.get(variant, lambda: None)()
        ended = time.process_time()
        return {"variant": variant, "seconds": ended - began, "guard_seconds": ended - between}


def quartiles(values: list[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4)
    return {"median": median, "first_quartile": first, "third_quartile": third}


def summarise(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Variant → `step` − 1 (whole steps over plain ones) and `share` (the guard over the rest of its step)."""
    summary: dict[str, Any] = {"plain_seconds": statistics.median(each["plain"]["seconds"] for each in rounds)}
    for variant in VARIANTS[1:]:
        runs = [(each[variant], each["plain"]) for each in rounds]
        summary[variant] = {"step": quartiles([run["seconds"] / plain["seconds"] - 1 for run, plain in runs])}
        if variant != "penalty":
            shares = [run["guard_seconds"] / (run["seconds"] - run["guard_seconds"]) for run, _ in runs]
            summary[variant]["share"] = quartiles(shares)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, default=Path(".venv") / "smollm2-135m", help="made if it is not there")
    parser.add_argument("--covariances", type=Path, default=Path(".venv") / "guard-covariances", help="made if it is not there")
    options = parser.parse_args()
    runs = Runs(checkpoint_of_demo_model(options.checkpoint), options.covariances)
    order = random.Random(0)
    for variant in VARIANTS:  # what is allocated once
        runs.step(variant, 0)
    rounds = []
    for number in range(options.rounds):
        rounds.append({variant: runs.step(variant, number) for variant in order.sample(VARIANTS, len(VARIANTS))})
        print({variant: round(run["seconds"], 3) for variant, run in rounds[-1].items()}, flush=True)
    summary = summarise(rounds)
    for variant in VARIANTS[1:]:
        print(variant, {kind: f"{100 * value['median']:.2f} %" for kind, value in summary[variant].items()})
    content = {"workload": WORKLOAD, "summary": summary, "setup_seconds": runs.setup_seconds, "directions": runs.directions}
    print(f"\nwrote {write_result('guard-cpu', {**content, 'rounds': rounds})}")


if __name__ == "__main__":
    main()
