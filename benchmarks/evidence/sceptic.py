"""What is weak in the evidence, the command that would settle it, and what was left out."""

from __future__ import annotations

import numpy as np

from benchmarks.evidence.findings import rates, unequal
from benchmarks.evidence.fronts import fronts, learned
from benchmarks.evidence.names import MODELS, PROBES, TASKS
from benchmarks.evidence.statistics import LORA, Comparison, Evidence
from benchmarks.evidence.tables import Table, significant

STUDY = "python -m benchmarks.evidence --out OUT --data FOLDER"
LEFT_OUT = (
    "Models that were trained whole, and merging: [Holding on through training](results.md#holding-on-through-training) has both, "
    "with one seed.",
    "Other methods of the same aim: OSF, CLoRA, KeepLoRA, Null-LoRA, InfLoRA, Astra. `eva` and `corda-ipm`, which start from the "
    "task's inputs to learn it better and not to keep anything.",
    "Hyperparameters beside rate, strength and t: the leak of `confine`, the factor of `penalty`, the damping of CorDA and "
    "contrast, SC-LoRA's β, OPLoRA's k, the decays of 0.3. Their values stand in `benchmarks/evidence/methods.py`.",
    "Replay of kept text in training, and distillation from the base: both see the kept text at every step.",
    "Time and memory: [Results](results.md#time-and-memory).",
)


def _worth(found: Evidence, main: Comparison) -> str:
    """What so much learning is worth in KL, along LoRA's own front on the validation split."""
    losses = [np.mean(main.values(way, "task", "loss")) for way in main.points]
    share = (max(losses) - min(losses)) / learned(found, main.cell)
    front = fronts(found, main.cell, [main.level - share, main.level])[LORA]
    return f"Along LoRA's own front so much is worth a factor of {significant(front[1] / front[0], 2)} in KL."


def few(found: Evidence) -> str:
    """How much is scored beside the questions."""
    sizes = found.settings["sizes"]
    return (
        f"Scored are {sizes['forms_of_asking']} questions in each other form, {sizes['abilities']} solutions of HumanEval, as many "
        f"instructions of Alpaca, and {sizes['windows'] * sizes['window']:,} tokens of WikiText."
    )


def weaknesses(found: Evidence, main: Comparison) -> Table:
    """A row each, with the command."""
    settings, cell = found.settings, main.cell
    place = "a CPU" if settings.get("device", "cpu") == "cpu" else settings["device"]
    seeds, sizes = len(main.points[LORA]), settings["sizes"]
    rows = [
        (
            f"One model of one family, {MODELS.get(settings['model'], settings['model'])}.",
            f"`{STUDY} --model meta-llama/Llama-3.2-3B --device cuda --dtype bfloat16`, the same with `Qwen/Qwen3-4B`",
        ),
        (f"{settings.get('dtype', 'float32')} on {place}: no rounding of bfloat16, no quantised base.", "the same command"),
        (
            f"{cell.steps} steps in the main table; a fine-tuning has thousands.",
            f"`{STUDY} --experiments longer`; PEFT's own benchmark (Llama-3.2-3B, 5,000 steps): "
            "`python -m benchmarks.method_comparison write --out OUT`, then `run --peft CHECKOUT EXPERIMENT` for each",
        ),
        (
            "The base is small and knows little. KL says how far a model has moved, not whether what it lost was worth keeping; "
            "where few answers are right, exact match shows nothing.",
            "the first command with `--answered 500`: larger models answer, and exact match is scored",
        ),
        (f"{seeds} seeds: a bootstrap sees little of what others would do.", f"`{STUDY} --seeds 0 1 2 3 4 5 6 7`"),
        (
            f"Learning is equal on the validation split; on the test split task losses are {unequal(main)}. Part of that is "
            f"sampling of the task's examples; a method that learned less has kept more. {_worth(found, main)}",
            f"`{STUDY} --examples 400 --validation-examples 300`",
        ),
        (
            f"{rates(found, cell).capitalize()} learning rates a method, and a choice on {sizes['validation_examples']} examples "
            f"and {sizes['validation_questions']} questions. A method whose best rate lies elsewhere is wronged, although t "
            "makes up for much of it.",
            f"`{STUDY} --validation-examples 300 --validation-questions 400`; more `rates` in `benchmarks/evidence/methods.py`",
        ),
        (
            "What must be kept is calibrated on questions of the same source, and in the main table in the same form, as the test "
            f"questions of {PROBES['nq']}. Methods that calibrate gain most there.",
            f"`{STUDY} --experiments forms`, and the columns of what was not calibrated",
        ),
        (
            f"What is asked beside the questions is little. {few(found)} Small differences there mean nothing.",
            f"`{STUDY} --forms-of-asking 500 --abilities 100 --windows 50`",
        ),
        (
            "Rate, strength and t are chosen by KL on questions. For code or running text another choice would be best.",
            "records of the validation split, of every point (`split` `validation`)",
        ),
        (
            "Knowledge is short answers here. Long generation, safety training and other languages are not scored.",
            "`lm_eval` on exported adapters: [whole benchmarks](results.md#whole-benchmarks)",
        ),
        (
            "All methods are run by this repository's code, and PEFT's where it has them, not by their authors'.",
            "`make test` compares them with PEFT's and with independent computations",
        ),
    ]
    if not main.values(LORA, "triviaqa", "kl"):
        rows.append(("TriviaQA, further from the calibration, was not at hand.", f"`{STUDY} --triviaqa mandarjoshi/trivia_qa`"))
    if len({each.task for each in found.cells()}) < 2:
        rows.append((f"One task, {TASKS.get(cell.task, cell.task)}.", f"`{STUDY} --experiments tasks`"))
    return [["weakness", "what would settle it"], *map(list, rows)]
