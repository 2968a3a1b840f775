"""The whole job on models of published shapes: null spaces and adapters against the bare forward pass, time and memory.

    python -m benchmarks.first_gpu.job --out FOLDER     # 8 to 9 minutes; writes job.json

`benchmarks.gpu_models` says what a run is and what its figures mean: each is a process of its own, in which start-up, making the
model, compiling and the work are timed apart; memory is reported as allocated and as reserved. In this order, as time permits:

1. two blocks of the Llama-3-8B shape, 256 × 1024 tokens, rank 128: the bare forward pass, the same with sums, and the whole job
   (layerwise with all weights on the device): forward, sums and solves apart;
2. all 32 blocks: the bare forward pass and the whole job. If the first step says that this takes too long, it is left out, and the
   ratio of the first step stands for it, marked as extrapolated;
3. two blocks of the 70B shape with all seven projections, layerwise from host memory, under a cap of 24 GB;
4. two blocks resident, with the weights in host memory, and PEFT's CorDA on one block.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks import gpu_models
from benchmarks.first_gpu.command import Command, options_of

ANSWERS = [
    "does the whole job take at most 2 forward passes, and 5 GB above the weights?",
    "what of it are forward, sums and solves, and what is start-up and compiling?",
    "do two blocks of the 70B shape fit 24 GB, down_proj included?",
]
JOB = "layerwise-device"
WHOLE = 32
STEPS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, ("forward", "sums-layerwise", JOB)),
    (WHOLE, ("forward", JOB)),
    (2, ("capped",)),
    (2, ("resident", "layerwise-host", "corda")),
)
DRY_STEPS: tuple[tuple[int, tuple[str, ...]], ...] = ((2, ("forward", "sums-layerwise", JOB, "capped")), (WHOLE, (JOB,)))
TINY = ["--model", "tiny", "--samples", "2", "--length", "32", "--batch-size", "1", "--rank", "4", "--corda-samples", "1"]


def workload(device: str, blocks: int) -> argparse.Namespace:
    """The options of `benchmarks.gpu_models`."""
    return gpu_models.parser_of().parse_args([*(TINY if device == "cpu" else []), "--device", device, "--blocks", str(blocks)])


def run(command: Command) -> None:
    """All steps, as time permits."""
    until = time.perf_counter() + command.left
    for blocks, variants in DRY_STEPS if command.dry else STEPS:
        options = workload(command.options.device, min(blocks, 4) if command.dry else blocks)
        if blocks == WHOLE and not command.has_time(f"all {WHOLE} blocks", estimate(command)):
            continue
        gpu_models.run_in_turn(options, ((0, variant) for variant in variants), until, lambda done: keep(command, done))
    command.add(summary=gpu_models.summarise([row for row in command.rows if row.get("blocks") == 2], depth=WHOLE))


def keep(command: Command, done: dict[str, Any]) -> None:
    """A run of `benchmarks.gpu_models`, or why there is none."""
    if "left_out" in done:
        command.leave_out(f"{done['variant']}, {done['blocks']} blocks", done["left_out"])
    else:
        command.add(**done)
    judge(command)


def estimate(command: Command) -> float:
    """Seconds of all blocks, from those of two: both runs' work and their start-ups (24 s each on an H100)."""
    work = sum(row["seconds"] for row in command.rows if row["variant"] in ("forward", JOB) and "seconds" in row)
    return 1.0 if command.dry else work * WHOLE / 2 + 50


def judge(command: Command) -> None:
    """The figures of the goals: of all blocks where those were run, else of two."""
    good = [row for row in command.rows if row.get("seconds")]
    for blocks in (2, WHOLE):
        runs = {row["variant"]: row for row in good if row["blocks"] == blocks and row["variant"] != "capped"}
        if {"forward", JOB} <= runs.keys():
            command.measure("job", runs[JOB]["seconds"] / runs["forward"]["seconds"])
        if "peak_above_weights_gb" in runs.get(JOB, {}):
            command.measure("peak", runs[JOB]["peak_above_weights_gb"])
    for row in good:
        if row["variant"] == "capped" and "reserved_gb" in row:
            command.measure("capped", row["reserved_gb"])
    if any(row.get("variant") == "capped" and "out_of_memory" in row for row in command.rows):
        command.measure("capped", float("inf"))


def main(argv: list[str] | None = None) -> None:
    with Command("job", ANSWERS, options_of("job", __doc__, argv)) as command:
        run(command)


if __name__ == "__main__":
    main()
