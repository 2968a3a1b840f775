"""What the evidence study declares before it measures: splits, sizes, experiments. Learning rates stand with the methods.

Nothing is chosen on what is reported. Training examples, the examples and questions on which rates, strengths and scales are chosen
(*validation*), and those that are reported (*test*) are disjoint; so are the questions that calibrate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Part(NamedTuple):
    """Rows of a data source."""

    source: str
    rows: range


class Task(NamedTuple):
    """What is learned: its parts, each of one or more sources."""

    train: tuple[Part, ...]
    validation: tuple[Part, ...]
    test: tuple[Part, ...]


TASKS = {
    # The learning rates of `methods` come from earlier studies, which looked at examples among the first 100 of GSM8K's test part.
    "gsm8k": Task(
        (Part("gsm8k-train", range(1500)),), (Part("gsm8k-train", range(1500, 2000)),), (Part("gsm8k-test", range(100, 500)),)
    ),
    # MBPP's authors test on tasks 11 to 510; a row's number is its task's less one.
    "code": Task(
        (Part("mbpp", range(510, 874)), Part("codealpaca", range(1500))),
        (Part("mbpp", range(874, 974)), Part("codealpaca", range(1500, 1750))),
        (Part("mbpp", range(10, 510)), Part("codealpaca", range(1750, 2015))),
    ),
    "instructions": Task(
        (Part("alpaca", range(1500)),), (Part("alpaca", range(1500, 1750)),), (Part("alpaca", range(1750, 2000)),)
    ),
}  # fmt: skip

# Rows of NQ-open's train part: solved examples before a question, questions that calibrate, questions on which is chosen.
SHOTS = Part("nq-train", range(3))
CALIBRATION = Part("nq-train", range(3, 1500))
CHOICE = Part("nq-train", range(1600, 2048))
# Sets of questions that are reported. TriviaQA is asked on request.
QUESTIONS = {"nq": "nq", "webq": "webq"}

# The form of a calibration: the components of what must be kept, with equal trace.
FORMS = {
    "text": ("text",),
    "prompt": ("text", "shots"),
    "chat": ("text", "chat"),
    "wikitext": ("wikitext",),
    "mixed": ("text", "shots", "chat", "template", "wikitext"),
}
FORM = "prompt"

SCALES = (0.5, 1.0, 1.2)
"""of what training has changed; between them is interpolated, and the chosen one is measured"""
SCALES_AFTER = (0.6, 1.2)
"""the same for a change that was filtered"""
STRENGTHS = (1.0, 10.0)
"""of a filter"""
LEVEL = 0.9
"""the share of what plain LoRA learns at best, over its first two rates and scales, at which methods are compared"""


@dataclass(frozen=True)
class Sizes:
    """How much calibrates, trains and measures; by default what two CPU cores do for a model of 135M parameters.

    A calibration of n samples has n sequences of each of its components: windows of `length` tokens of running text, or questions.
    """

    samples: int = 256
    length: int = 80
    of_task: int = 16
    """training examples for the second moments of the task"""
    batch_size: int = 4
    max_length: int = 128
    """tokens of an example, at most"""
    validation_examples: int = 20
    validation_questions: int = 60
    examples: int = 40
    questions: int = 1000
    """of NQ-open"""
    other_questions: int = 250
    """of every other set"""
    answered: int = 0
    """questions a set that greedy decoding answers"""
    forms_of_asking: int = 60
    """questions in the chat template, and in the template of the task"""
    abilities: int = 10
    """solutions of HumanEval, and instructions of Alpaca"""
    windows: int = 2
    window: int = 256
    fewer_questions: int = 250
    """of NQ-open, in all experiments but the first"""


class Experiment(NamedTuple):
    """Runs that are compared with each other. A method is compared by `form` and `samples` only if it takes a calibration."""

    methods: tuple[str, ...] = ()
    """all by default"""
    tasks: tuple[str, ...] = ("gsm8k",)
    steps: tuple[int, ...] = (10,)
    ranks: tuple[int, ...] = (16,)
    forms: tuple[str, ...] = (FORM,)
    samples: tuple[int, ...] = (0,)
    """0: those of `Sizes`"""
    rates: int = 2
    """so many of the methods' learning rates"""
    rate_factor: float = 1.0
    """of the methods' learning rates"""


_LEADING = ("lora", "contrast", "corda-kpm", "lora-null v2")
EXPERIMENTS = {
    "main": Experiment(rates=3),
    "forms": Experiment(_LEADING, forms=("text", "chat", "wikitext", "mixed")),
    "tasks": Experiment(_LEADING, tasks=("code", "instructions")),
    "longer": Experiment(_LEADING, steps=(100,), rate_factor=0.5),
    "samples": Experiment(_LEADING, samples=(16, 64)),
    "ranks": Experiment(_LEADING, ranks=(8, 64)),
    "budget": Experiment(
        ("lora", "contrast", "contrast budget", "lora-null v2", "lora-null v2 budget", "eva", "eva budget", "eva rho 2", "adalora"),
        rates=2,
    ),
}
