"""The sentences of `benchmarks.evidence.page` whose wording follows from the numbers.

Two ways are told apart if the 95 % interval of the ratio of their KL, questions and seeds resampled, leaves out 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from benchmarks.evidence.fronts import most_learned
from benchmarks.evidence.names import FORMS, KEEP, PROBES, TASKS, label, method, needs
from benchmarks.evidence.statistics import LORA, Cell, Comparison, Evidence, Way, drift_correlation, geometric_mean, resolution
from benchmarks.evidence.tables import ELSEWHERE, Table, between, part, signed, significant, with_interval

FILTERED = Way("lora", "filter")
CORDA = Way("corda-kpm")


def listed(names: Iterable[str]) -> str:
    """`a, b and c`."""
    *first, last = list(names)
    return f"{', '.join(first)} and {last}" if first else last


def _against(compared: Comparison, way: Way, to: Way, name: str) -> str:
    """`1/6 of CorDA-KPM's (95 %: 1/7 to 1/5)`; nothing, if there is nothing to compare."""
    ratio = compared.ratio(way, to) if way != to and to in compared.points else None
    return f"{part(ratio.value)} of {name} (95 %: {part(ratio.questions[0])} to {part(ratio.questions[1])})" if ratio else ""


def apart(compared: Comparison, way: Way, other: Way) -> int:
    """−1 if the KL of `way` is smaller, 1 if it is larger, 0 if that cannot be told."""
    ratio = compared.ratio(way, other)
    if ratio is None or ratio.both[0] <= 1 <= ratio.both[1]:
        return 0
    return -1 if ratio.both[1] < 1 else 1


def answer(compared: Comparison) -> str:
    """Which way holds most, filtered LoRA against the starts, what the gold answers lose, and what was not calibrated: a sentence
    each."""
    sentences = (_least(compared), _filtered(compared), _lost(compared), _uncalibrated(compared))
    return "\n\n".join(sentence for sentence in sentences if sentence)


def _least(compared: Comparison) -> str:
    ranked = compared.whole()
    best = ranked[0]
    if best == LORA:
        return f"None of {_learning(compared)} moves the model less than plain LoRA that is scaled down."
    parts = [
        _against(compared, best, LORA, "plain LoRA's, scaled to the same learning"),
        _against(compared, best, CORDA, "CorDA-KPM's"),
    ]
    same = [label(way) for way in ranked[1:] if not apart(compared, best, way)]
    close = f"; {listed(same)} cannot be told apart from it" if same else ""
    return (
        f"Of {_learning(compared)}, **{label(best)}** moves the model least on what it knew: KL(base "
        f"‖ model) at the gold answers of {listed(PROBES[name] for name in compared.questions)} is "
        f"{significant(compared.kl(best).value, 2)} nats a token, {listed(text for text in parts if text)}{close}."
    )


def _learning(compared: Comparison) -> str:
    """How many methods learn how much."""
    task = TASKS.get(compared.cell.task, compared.cell.task)
    number = f"{len(compared.whole())} methods, filtered ones counted apart,"
    return f"{number} that learn {100 * compared.level:g} % of what plain LoRA can learn of {task}"


def _filtered(compared: Comparison) -> str:
    """Plain LoRA, filtered, against every start and constraint as it is trained."""
    if FILTERED not in compared.points:
        return "Plain LoRA, filtered after training, does not reach this learning." if FILTERED in compared.missed else ""
    others = [way for way in compared.whole() if way.how == "none" and method(way).kind != "plain"]
    groups = {sign: listed([label(way) for way in others if apart(compared, FILTERED, way) == sign] or [""]) for sign in (-1, 0, 1)}
    words = {-1: "less than {}", 1: "more than {}", 0: "and it cannot be told apart from {}"}
    shown = [words[sign].format(groups[sign]) for sign in (-1, 1, 0) if groups[sign]]
    beside = f": {', '.join(shown)}" if shown else ""
    left = _against(compared, FILTERED, LORA, "LoRA's KL")
    return f"**Plain LoRA, filtered after training**, leaves {left}{beside}."


def _lost(compared: Comparison) -> str:
    """What the gold answers lose with LoRA, and how much less with the way with the least KL, over the seeds that both have."""
    best = next((way for way in compared.whole() if way != LORA), None)
    less = compared.forgotten_less(best) if best else None
    if best is None or less is None:
        return f"The gold answers become {_likely(compared.forgotten(LORA).value)} with LoRA."
    own = compared.forgotten(best).value
    told = "" if less.both[0] > 0 or less.both[1] < 0 else ", which questions and seeds together do not tell from no difference"
    return (
        f"The gold answers become {_likely(own + less.value)} with LoRA, on average, and {_likely(own)} with {label(best)}: a "
        f"difference of {signed(less.value, 3)} (95 %: {_signed(less.questions)}){told}."
    )


def _uncalibrated(compared: Comparison) -> str:
    """Of the way with the least KL: what it leaves of LoRA's KL where nothing was calibrated."""
    best = compared.whole()[0]
    ratios = _elsewhere(compared, best)
    if best == LORA or not ratios:
        return ""
    less, more = ([name for name in ratios if (ratios[name] < 1) == own] for own in (True, False))
    over = f", but has more than LoRA on {listed(f'{PROBES[name]} ({part(ratios[name])})' for name in more)}" if more else ""
    gains = f"leaves of LoRA's KL {_parts(ratios, less)}" if less else "is not ahead of LoRA anywhere"
    return f"Where nothing was calibrated, {label(best)} {gains}{over}."


def _elsewhere(compared: Comparison, way: Way) -> dict[str, float]:
    """Probe → KL over LoRA's."""
    ratios = {name: geometric_mean(each) for name in ELSEWHERE if (each := compared.probe_ratio(way, name))}
    return dict(sorted(ratios.items(), key=lambda item: item[1]))


def _parts(ratios: Mapping[str, float], names: Iterable[str]) -> str:
    return listed(f"{part(ratios[name])} on {PROBES[name]}" for name in names)


def wider(compared: Comparison, forms: Mapping[Cell, Comparison]) -> str:
    """Whether another form of the calibration takes the way with the least KL further where it is furthest behind."""
    best = compared.whole()[0]
    own = _elsewhere(compared, best)
    found = {cell: _elsewhere(each, best) for cell, each in forms.items() if best in each.points and best != LORA}
    better = {cell: ratios for cell, ratios in found.items() if ratios and max(ratios.values()) < max(own.values(), default=0)}
    if not better:
        return ""
    cell = min(better, key=lambda cell: max(better[cell].values()))
    ratio = forms[cell].ratio(best)
    questions = f", {part(ratio.value)} on the questions above" if ratio else ""
    return f"Calibrated on {FORMS.get(cell.form, cell.form)}, it leaves {_parts(better[cell], better[cell])}{questions}."


def _likely(forgotten: float) -> str:
    return f"{abs(forgotten):.3f} nats {'less' if forgotten >= 0 else 'more'} likely"


def _signed(interval: tuple[float, float]) -> str:
    return " to ".join(signed(value, 3) for value in interval)


def resolved(compared: Comparison) -> str:
    """How wide the interval of the main difference is."""
    found = resolution(compared)
    if found is None:
        return ""
    return (
        f"KL of LoRA − KL of {label(found.best)} is {significant(found.difference.value)} nats a token. Its 95 % interval over "
        f"questions ({between(found.difference.questions)}) is {significant(found.questions, 2)} of it wide (wanted: at most "
        f"0.2); with the seeds resampled too ({between(found.difference.both)}), {significant(found.both, 2)}."
    )


Allowed = Callable[[Way], bool]
SITUATIONS: dict[str, Allowed] = {
    "an adapter is trained already": lambda way: way.method == LORA.method,
    "a run to come; text that stands for what must be kept, and examples of the task": lambda way: True,
    "the same, and the base's weights must stay as they are (quantised, tied, shared)": lambda way: not method(way).residual,
    "a run to come; the text, but no examples of the task before training": lambda way: needs(way) <= {KEEP},
    "nothing to calibrate on": lambda way: not needs(way),
}


def whom(compared: Comparison) -> Table:
    """The way with the least KL in each situation, and the next."""
    table = [["what there is", "least KL", "KL ÷ LoRA's", "next", "KL ÷ LoRA's"]]
    ranked = compared.whole()
    for situation, allowed in SITUATIONS.items():
        row = [situation]
        for way in [way for way in ranked if allowed(way)][:2]:
            row += [label(way), "1" if way == LORA else with_interval(compared.ratio(way), 2)]
        table.append(row + [""] * (len(table[0]) - len(row)))
    return table


def starts(compared: Comparison) -> list[str]:
    """What a start does by itself, what freezing A and holding it while it trains add, and what a filter takes from each."""
    kinds = {
        "start": "Starts after which A and B train leave",
        "frozen start": "Starts that freeze A leave",
        "held": "What acts on every step leaves",
    }
    sentences = []
    for kind, what in kinds.items():
        ways = [way for way in compared.whole() if way.how == "none" and method(way).kind == kind]
        shown = [f"{label(way)} {part(ratio.value)}" for way in ways if (ratio := compared.ratio(way))]
        if shown:
            sentences.append(f"{what}, of LoRA's KL: {listed(shown)}.")
    filtered = []
    for way in (way for way in compared.whole() if way.how == "filter"):
        ratio = compared.ratio(way, way._replace(how="none")) if way._replace(how="none") in compared.points else None
        if ratio:
            filtered.append(f"{label(way._replace(how='none'))} {part(ratio.value)} ({between(ratio.questions, 2)})")
    if filtered:
        sentences.append(f"A filter after training leaves, of the KL of the same method without it: {listed(filtered)}.")
    return sentences


def drifts(compared: Comparison) -> str:
    """How well the drift on the calibrated inputs orders models by their KL, probe by probe."""
    points = [point for seeds in compared.points.values() for point in seeds.values()]
    found = {name: drift_correlation(points, name) for name in (*compared.questions, *ELSEWHERE)}
    shown = [f"{PROBES[name]} {significant(each, 2)}" for name, (each, number) in found.items() if number > 2]
    if not shown:
        return ""
    number = max(number for _, number in found.values())
    return (
        f"The drift on the calibrated inputs orders these {number} models (all methods and seeds, at equal learning) by their KL "
        f"with a rank correlation of: {listed(shown)}. Where it is low, holding the calibrated inputs does not hold what is asked."
    )


def slow(found: Evidence, compared: Comparison) -> str:
    """Ways that are calibrated and learn less than plain LoRA at its best, whatever they are allowed to move."""
    short = {way: shares for way, shares in most_learned(found, compared.cell).items() if needs(way) and np.mean(shares) < 0.995}
    if not short:
        return ""
    shown = [
        f"{label(way)} {100 * np.mean(shares):.0f} %" for way, shares in sorted(short.items(), key=lambda item: -np.mean(item[1]))
    ]
    return f"At the rates and scales that were run, these learn at most so much of what plain LoRA learns at best: {listed(shown)}."


def behind(compared: Comparison) -> Table:
    """Probe by probe: the way with the least KL, the best without calibration, and what is calibrated and has more than LoRA."""
    table = [["", "least KL", "÷ LoRA's", "least without calibration", "÷ LoRA's", "calibrated, and more KL than LoRA's"]]
    for name in (*compared.questions, *ELSEWHERE):
        ratios = {way: geometric_mean(each) for way in compared.whole() if (each := compared.probe_ratio(way, name))}
        if len(ratios) < 2:
            continue
        ranked = sorted(ratios, key=lambda way: (ratios[way], way))
        free = next((way for way in ranked if not needs(way)), None)
        worse = [f"{label(way)} ({significant(ratios[way], 2)})" for way in reversed(ranked) if needs(way) and ratios[way] > 1]
        row = [PROBES[name], label(ranked[0]), significant(ratios[ranked[0]], 2)]
        row += [label(free), significant(ratios[free], 2)] if free else ["", ""]
        table.append([*row, ", ".join(worse) or "none"])
    return table


def no_intruders(compared: Comparison) -> str:
    """Whether PEFT's reduction of intruder dimensions has changed anything: it leaves a change alone in which it finds none."""
    own, plain = compared.points.get(Way("lora", "intruder"), {}), compared.points[LORA]
    same = all(seed in plain and each.scores == plain[seed].scores for seed, each in own.items())
    return "PEFT's `reduce_intruder_dimension` found nothing to reduce in these changes: its row is LoRA's." if own and same else ""


def rates(found: Evidence, cell: Cell) -> str:
    """How many learning rates were run a method: `two`, `two or three`, …"""
    tried: dict[str, set[float]] = {}
    for point in found.within(cell, "validation"):
        tried.setdefault(point.way.method, set()).add(point.rate)
    words = ("no", "one", "two", "three")
    return " or ".join(
        words[number] if number < len(words) else str(number) for number in sorted({len(each) for each in tried.values()})
    )


def unequal(compared: Comparison) -> str:
    """How equal the learning is on the test split, for which nothing was chosen."""
    losses = {way: statistics.fmean(compared.values(way, "task", "loss")) for way in compared.points}
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    return f"{losses[low]:.3f} ({label(low)}) to {losses[high]:.3f} ({label(high)}) nats a token"
