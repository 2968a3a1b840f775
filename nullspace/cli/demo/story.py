"""The demo: calibrate, start, train, filter, measure, and load the result elsewhere.

Learning rates are those that the evidence study (docs/evidence.md) declares first for each method, on another task; nothing was
chosen on what is measured here. Both trainings see the same examples in the same order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nullspace import Covariances, stream_covariances
from nullspace.artifacts import records, store
from nullspace.cli import console
from nullspace.cli.demo import figure, fresh, material, measure, training
from nullspace.errors import RunError
from nullspace.progress import Progress

LORA, FILTERED, CONTRAST = "plain-lora", "plain-lora-filtered", "contrast"
NAMES = {LORA: "plain LoRA", FILTERED: "LoRA, filtered", CONTRAST: "contrast"}
RATES = {LORA: 2e-3, CONTRAST: 4e-3}
STRENGTH = 10.0  # of the filter, one of the study's two
EXCLUDE = ["down_proj"]  # its inputs are the widest, and would cost the most time
EXAMPLE = "→"
PROBE = "The quick brown fox jumps over the lazy dog. Water boils at a temperature of"
# The original model's own float32 logits are 2e-6 of the largest one away from its float64 logits.
FLOAT32_NOISE = 1e-5


@dataclass(frozen=True)
class Sizes:
    """How much calibrates, trains and measures; by default what two CPU cores do in less than two minutes."""

    samples: int = 16
    length: int = 256
    """samples of the text to be kept that calibrate, and their tokens"""
    steps: int = 20
    batch_size: int = 6
    examples: int = 16
    """of the task, held out"""
    texts: int = 6
    text_tokens: int = 64
    """texts that are held out, and tokens read of each"""


@dataclass
class _Prepared:
    """What the parts of the story share."""

    model: Any
    tokenizer: Any
    rank: int
    sizes: Sizes
    bars: console.Bars
    keep: Covariances
    task: Covariances
    train: list[dict[str, str]]
    held_out: list[dict[str, str]]
    texts: list[str]


def run(
    out: Path, base: Path, *, rank: int, overwrite: bool, bars: console.Bars, sizes: Sizes = Sizes()
) -> dict[str, measure.Scores]:
    """Train by both methods, filter one, write the adapters and a figure, and print what has been learned and kept.

    Args:
        out: directory for the result.
        base: the model: a checkpoint folder or a GGUF file.
        rank: of the adapters.
        overwrite: replace an earlier result.
        bars: of the terminal.
        sizes: how much of everything.

    Returns:
        adapter → what was measured.

    Raises:
        FileExistsError: if `out` is in the way.
        RuntimeError: if the fresh process fails, or its logits are not the trained model's.
    """
    began = time.perf_counter()
    with store.new_directory(out, overwrite=overwrite) as part:
        ready = _calibrate(base, rank, sizes, bars)
        peft_model = _train(ready, part)
        scores = _measure(ready, peft_model, out, part)
        peft_model.set_adapter(CONTRAST)
        probe = ready.tokenizer(PROBE, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = peft_model(probe).logits
        records.write_manifest(part, "demo", {"base": str(base), "rank": rank, "scores": _as_json(scores)})
    _load_elsewhere(ready, peft_model.unload(), out, probe, logits)
    seconds = time.perf_counter() - began
    bars.say(f"Done in {seconds:.0f} s. Next: what was written, and the same with your own model and data.\n")
    _print_next(out)
    return scores


def _calibrate(base: Path, rank: int, sizes: Sizes, bars: console.Bars) -> _Prepared:
    """Load the model, and sum the second moments of what is to be kept and of the task."""
    from nullspace.integrations.transformers import PackedBatches, load_model

    bars.say(
        f"A language model learns a task: “{EXAMPLE}” is called {material.name_of(EXAMPLE)}. What it knows is to be kept; Python's "
        "documentation stands for that.\n"
    )
    bars("model", 0, 1, 0)
    model, tokenizer = load_model(base, dtype="float32", device="cpu")
    bars("model", 1, 1, 0)
    rows = material.characters()
    train, held_out = rows[: sizes.steps * sizes.batch_size], rows[-sizes.examples :]
    known, texts = material.knowledge(sizes.texts)
    learned = [row["prompt"] + row["completion"] for row in train]
    keep = PackedBatches(known, tokenizer, samples=sizes.samples, length=sizes.length)
    task = PackedBatches(learned, tokenizer, samples=max(1, len("".join(learned)) // (4 * sizes.length)), length=sizes.length)
    moments = {
        name: Covariances(stream_covariances(model, batches, exclude=EXCLUDE, strategy="resident", progress=_as(name, bars)))
        for name, batches in (("keep", keep), ("task", task))
    }
    bars.say(
        f"Calibrated: the inputs of {len(moments['keep'])} layers on {keep.tokens:,} tokens of what is to be kept, and on "
        f"{task.tokens:,} of the task.\n"
    )
    return _Prepared(model, tokenizer, rank, sizes, bars, **moments, train=train, held_out=held_out, texts=texts)


def _train(ready: _Prepared, part: Path) -> Any:
    """Train both adapters, filter one of them, and write all three. Returns the model with the three."""
    from peft import LoraConfig

    from nullspace.integrations.peft import export_lora, filter_adapter, inject_adapters, save_init
    from nullspace.integrations.peft.files import save_adapter

    config = LoraConfig(r=ready.rank, lora_alpha=ready.rank, task_type="CAUSAL_LM")
    given: Any = {"method": "contrast", "covariances": ready.task, "preserve": ready.keep, "adapter_name": CONTRAST}
    ready.bars("start", 0, 1, 0)
    peft_model: Any = inject_adapters(ready.model, config, **given)
    ready.bars("start", 1, 1, 0)
    save_init(part / "start", peft_model)
    trained, total = peft_model.get_nb_trainable_parameters()
    ready.bars.say(
        f"contrast starts where the task's inputs are large and those to be kept are small: A is frozen, B is zero, and no base is "
        f"written. It trains {trained:,} of {total:,} parameters.\n"
    )
    _fit(ready, peft_model, CONTRAST, part)
    export_lora(peft_model, part / "start", part / CONTRAST)

    torch.manual_seed(0)
    targets = peft_model.peft_config[CONTRAST].target_modules
    peft_model.add_adapter(LORA, LoraConfig(r=ready.rank, lora_alpha=ready.rank, target_modules=targets, task_type="CAUSAL_LM"))
    peft_model.set_adapter(LORA)
    _fit(ready, peft_model, LORA, part)
    save_adapter(peft_model, LORA, part / LORA)
    filter_adapter(part / LORA, ready.task, ready.keep, part / FILTERED, strength=STRENGTH, progress=ready.bars)
    peft_model.load_adapter(part / FILTERED, FILTERED)
    return peft_model


def _fit(ready: _Prepared, peft_model: Any, adapter: str, part: Path) -> None:
    from nullspace.artifacts.locks import temporary_folder

    with temporary_folder() as folder:
        training.train(
            peft_model,
            ready.tokenizer,
            ready.train,
            rate=RATES[adapter],
            steps=ready.sizes.steps,
            batch_size=ready.sizes.batch_size,
            folder=Path(folder),
            stage=NAMES[adapter],
            progress=ready.bars,
        )


def _measure(ready: _Prepared, peft_model: Any, out: Path, part: Path) -> dict[str, measure.Scores]:
    """Measure, print the table, and draw the figure."""
    steps = 2 * len(NAMES)
    done = iter(range(1, steps + 1))
    ready.bars("held out", 0, steps, 0)
    judge = measure.Judge(peft_model, ready.tokenizer, ready.held_out, ready.texts, ready.sizes.text_tokens)
    scores = measure.compare(judge, list(NAMES), lambda: ready.bars("held out", next(done), steps, 0))
    ready.bars.say(
        f"\nAfter {ready.sizes.steps} steps of TRL's SFTTrainer, on {len(ready.held_out)} names and {judge.text_tokens} tokens of "
        "text that were not seen before, in nats a token:\n"
    )
    console.print_table(_rows(judge.base_loss, scores))
    ready.bars.say(f"\n{reading(scores)}\n")
    (part / "figure.svg").write_text(
        figure.draw(judge.base_loss, {NAMES[name]: each for name, each in scores.items()}), encoding="utf-8"
    )
    ready.bars.say(f"Drawn in {out / 'figure.svg'}.\n")
    return scores


def _rows(base_loss: float, scores: Mapping[str, measure.Scores]) -> list[dict[str, str]]:
    """The table. It fits into forty columns."""
    titles = ("", "task\nloss", "KL to\nbase", "KL, equal\nlearning")
    rows = [("base", f"{base_loss:.2f}", "0", "")]
    for name, (full, equal) in scores.items():
        rows.append((NAMES[name], f"{full.loss:.2f}", f"{full.kl:.4f}", "" if equal is None else f"{equal.kl:.4f}"))
    return [dict(zip(titles, row, strict=True)) for row in rows]


def reading(scores: Mapping[str, measure.Scores]) -> str:
    """What the table says, as measured."""
    equal = {name: each.equal for name, each in scores.items() if each.equal is not None}
    if not equal:
        return "An adapter has learned nothing in these steps, so that there is no equal learning to compare at."
    loss = max(each.full.loss for each in scores.values())
    least = max(scores, key=lambda name: scores[name].full.loss)
    moved = " and ".join(f"{NAMES[name]} {_times(equal[LORA].kl, equal[name].kl)}" for name in (FILTERED, CONTRAST))
    return (
        f"Equal learning: a task loss of {loss:.2f}, as {NAMES[least]} has; the changes of the others are scaled down to it. There "
        f"plain LoRA moves the model {equal[LORA].kl:.2g} nats a token away from what it said of text to be kept; {moved}."
    )


def _times(of_lora: float, kl: float) -> str:
    """A divergence beside plain LoRA's."""
    if not 0 < kl < of_lora:
        return f"{kl:.2g}"
    return f"1/{of_lora / kl:.0f} of that" if of_lora / kl >= 2 else f"{kl / of_lora:.0%} of that"


def _load_elsewhere(ready: _Prepared, base: Any, out: Path, probe: torch.Tensor, logits: torch.Tensor) -> None:
    """Load the adapter of `contrast` in another process, and print whether it computes the same there."""
    ready.bars("other process", 0, 1, 0)
    error = fresh.error_elsewhere(base, out / CONTRAST, probe, logits)
    ready.bars("other process", 1, 1, 0)
    size = float(logits.abs().max())
    if error > FLOAT32_NOISE * size:
        raise RunError(f"{out / CONTRAST} does not reproduce the trained model: its logits differ by {error:.1e}")
    ready.bars.say(
        f"\nA process with PEFT and without nullspace loads {out / CONTRAST} onto the untouched base: its logits are the trained "
        f"model's (the largest difference is {error:.1g}, the largest logit {size:.0f}).\n"
    )


def _print_next(out: Path) -> None:
    """What to do next: commands, which no line is broken in."""
    command = sys.argv[0] if Path(sys.argv[0]).name == "nullspace" else "nullspace"
    for line in (
        f"inspect {out / CONTRAST}",
        "covariances MODEL --data facts.jsonl --out keep",
        "init MODEL --data task.jsonl --method contrast \\\n      --preserve keep --out out",
    ):
        console.print_line(f"  {command} {line}")


def _as(name: str, progress: Progress) -> Progress:
    """The same, for steps of one stage of this name."""
    return lambda _, done, total, tokens: progress(name, done, total, tokens)


def _as_json(scores: Mapping[str, measure.Scores]) -> dict[str, Any]:
    return {
        name: {at: None if point is None else point._asdict() for at, point in each._asdict().items()}
        for name, each in scores.items()
    }
