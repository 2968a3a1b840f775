"""What the page calls the methods of the study (`methods.METHODS`) and its data. The page is made without torch."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.evidence.statistics import Way

KEEP, TASK = "kept text", "task data"


class Method(NamedTuple):
    """A method on the page.

    Attributes:
        label: its name.
        kind: `plain`, `start` (not LoRA's; A and B train), `frozen start` (B alone trains) or `held` (something acts
            on every step).
        needs: what is calibrated before training: `KEEP`, `TASK`.
        residual: whether it starts on a changed base, W₀ − s·BA.
    """

    label: str
    kind: str = "plain"
    needs: tuple[str, ...] = ()
    residual: bool = False


METHODS = {
    "lora": Method("LoRA"),
    "lora decay 0.3": Method("LoRA, weight decay 0.3"),
    "lora decay to start 0.3": Method("LoRA, decay 0.3 to its start"),
    "lora-mlp": Method("LoRA on the MLPs alone"),
    "lora-fa": Method("LoRA-FA"),
    "mica": Method("MiCA"),
    "oplora": Method("OPLoRA"),
    "milora": Method("MiLoRA", "start", residual=True),
    "pissa": Method("PiSSA", "start", residual=True),
    "lora-null v1": Method("LoRA-Null v1", "start", (KEEP,), True),
    "lora-null v1 split 8": Method("LoRA-Null v1, split 8", "start", (KEEP,), True),
    "lora-null v2": Method("LoRA-Null v2", "frozen start", (KEEP,)),
    "b-zero": Method("b-zero", "start", (KEEP,)),
    "corda-kpm": Method("CorDA-KPM", "start", (KEEP,), True),
    "sc-lora": Method("SC-LoRA", "start", (KEEP, TASK), True),
    "contrast": Method("contrast", "frozen start", (KEEP, TASK)),
    "confine": Method("confine", "held", (KEEP,)),
    "penalty": Method("penalty", "held", (KEEP,)),
}
POSTS = {"none": "", "filter": ", filtered", "intruder": ", intruders reduced"}
PROBES = {
    "nq": "NQ-open", "webq": "WebQuestions", "triviaqa": "TriviaQA", "nq, chat": "NQ in the chat template",
    "nq, template": "NQ in the task's template", "humaneval": "HumanEval", "alpaca": "Alpaca", "wikitext": "WikiText",
}  # fmt: skip
TASKS = {"gsm8k": "GSM8K", "code": "code (MBPP, CodeAlpaca)", "instructions": "instructions (Alpaca)"}
FORMS = {
    "text": "text", "prompt": "text and few-shot questions", "chat": "text and questions in the chat template",
    "wikitext": "WikiText", "mixed": "text, questions in all three forms and WikiText",
}  # fmt: skip


MODELS = {"smollm2-135m": "SmolLM2-135M-Instruct"}


def method(way: Way) -> Method:
    return METHODS.get(way.method, Method(way.method))


def label(way: Way) -> str:
    return method(way).label + POSTS.get(way.how, f", {way.how}")


def needs(way: Way) -> frozenset[str]:
    """What is calibrated, a filter's moments too."""
    return frozenset(method(way).needs) | (frozenset((KEEP, TASK)) if way.how == "filter" else frozenset())
