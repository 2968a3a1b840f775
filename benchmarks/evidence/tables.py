"""The tables of `benchmarks.evidence.page`, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.evidence.names import FORMS, PROBES, TASKS, label
from benchmarks.evidence.statistics import ASKED, LORA, Cell, Comparison, Estimate, Way, geometric_mean

Table = list[list[str]]


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent and with a true minus sign."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}".replace("-", "−")


def signed(value: float, digits: int) -> str:
    """With a sign, unless it is rounded to 0."""
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", "−")


def part(ratio: float) -> str:
    """A ratio in words: `1/25`, `0.84`, `2.1 times`."""
    if ratio < 0.5:
        return f"1/{significant(1 / ratio, 2).removesuffix('.0')}"
    return significant(ratio, 2) if ratio < 1 else f"{significant(ratio, 2)} times"


def between(interval: tuple[float, float], digits: int = 3) -> str:
    return " to ".join(significant(value, digits) for value in interval)


def with_interval(each: Estimate | None, digits: int = 3) -> str:
    return "" if each is None else f"{significant(each.value, digits)} ({between(each.questions, digits)})"


def over_seeds(each: Estimate, digits: int = 2) -> str:
    """From the least to the largest, and the standard deviation."""
    if len(each.seeds) < 2:
        return ""
    ends = between((min(each.seeds), max(each.seeds)), digits)
    return f"{ends} (SD {significant(each.deviation, digits)})"


def markdown(table: Table) -> str:
    """Columns without any content are left out."""
    kept = [number for number, title in enumerate(table[0]) if number == 0 or any(row[number] for row in table[1:])]
    rows = ["| " + " | ".join(row[number] for number in kept) + " |" for row in table]
    return "\n".join([rows[0], "|" + "---|" * len(kept), *rows[1:]])


def _each(values: Sequence[float], form: str = "g") -> str:
    """One value, if all seeds have it; otherwise that of each."""
    shown = [f"{value:{form}}" for value in values]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _losses(values: Sequence[float]) -> str:
    """The mean over seeds, and the standard deviation."""
    return " ± ".join(
        f"{each:.3f}" for each in (statistics.fmean(values), *([statistics.stdev(values)] if len(values) > 1 else []))
    )


def _geometric(ratios: Sequence[float]) -> str:
    """The geometric mean, and the least and the largest."""
    if not ratios:
        return ""
    ends = f" ({between((min(ratios), max(ratios)), 2)})" if len(ratios) > 1 else ""
    return significant(geometric_mean(ratios), 2) + ends


def named(compared: Comparison, way: Way) -> str:
    """With the number of seeds, where not all of LoRA's have a point."""
    seeds, wanted = len(compared.points[way]), len(compared.points[LORA])
    return label(way) + (f" ({seeds} of {wanted} seeds)" if seeds < wanted else "")


def main(compared: Comparison) -> Table:
    """What each way costs at equal learning."""
    table = [["method", "rate", "strength", "t", "task loss, test", "KL, nats a token", "over seeds", "KL ÷ LoRA's", "each seed"]]
    for way in compared.ranked():
        points = list(compared.points[way].values())
        kl, ratio = compared.kl(way), compared.ratio(way)
        strengths = [point.strength for point in points]
        row = [
            named(compared, way),
            _each([point.rate for point in points]),
            _each(strengths) if any(strengths) else "",
            _each([point.t for point in points], ".2f"),
            _losses(compared.values(way, "task", "loss")),
            with_interval(kl),
            over_seeds(kl),
            "1" if way == LORA else with_interval(ratio, 2),
            ", ".join(significant(value, 2) for value in ratio.seeds) if ratio and way != LORA else "",
        ]
        table.append(row)
    return table


def forgotten(compared: Comparison) -> Table:
    """How much less likely the gold answers are, nats an answer; the share that greedy decoding gives, where it was scored."""
    sets = [PROBES[name] for name in compared.questions]
    matches = [f"exact match, {name}" for name in sets]
    table = [["forgotten, nats an answer", *(text for name in sets for text in (name, f"{name}, over seeds")), *matches]]
    for way in compared.ranked():
        row = [named(compared, way)]
        for name in compared.questions:
            lost = compared.forgotten(way, (name,))
            low, high = (signed(value, 3) for value in lost.questions)
            least, most = (signed(value, 3) for value in (min(lost.seeds), max(lost.seeds)))
            row += [f"{signed(lost.value, 3)} ({low} to {high})", f"{least} to {most}" if len(lost.seeds) > 1 else ""]
        for name in compared.questions:
            right = compared.values(way, name, "exact_match")
            row.append(f"{100 * statistics.fmean(right):.1f} %" if right else "")
        table.append(row)
    return table


def missing(compared: Comparison) -> Table:
    """Ways that do not reach the level with every seed."""
    table = [["method", "seeds", "share of LoRA's learning that it reaches"]]
    for way, reached in sorted(compared.missed.items(), key=lambda item: (-statistics.fmean(item[1].values()), item[0])):
        seeds = ", ".join(str(seed) for seed in sorted(reached))
        table.append([label(way), seeds, ", ".join(f"{reached[seed]:.2f}" for seed in sorted(reached))])
    return table


ELSEWHERE = ("triviaqa", "nq, chat", "nq, template", "humaneval", "alpaca", "wikitext")


def elsewhere(compared: Comparison) -> Table:
    """KL over LoRA's where nothing was calibrated and in other forms of asking, from the least to the largest seed; the drift."""
    table = [["KL ÷ LoRA's", *(PROBES[name] for name in ELSEWHERE), "drift"]]
    for way in compared.ranked():
        row = [named(compared, way)]
        for name in ELSEWHERE:
            ratios = compared.probe_ratio(way, name)
            row.append("1" if way == LORA and ratios else _geometric(ratios))
        drifts = [point.drift["median"] for point in compared.points[way].values() if "median" in point.drift]
        table.append([*row, significant(statistics.fmean(drifts), 2) if drifts else ""])
    return table


def abilities(compared: Comparison) -> Table:
    """The change of losses that the base does not answer with KL alone."""
    table = [["change", "HumanEval, nats a token", "Alpaca, nats a token", "WikiText, perplexity"]]
    for way in compared.ranked():
        row = [named(compared, way)]
        for name in ("humaneval", "alpaca", "wikitext"):
            losses = compared.values(way, name, "loss")
            if not losses or name not in compared.base:
                row.append("")
                continue
            change = statistics.fmean(losses) - compared.base[name]["loss"]
            row.append(f"{signed(100 * math.expm1(change), 1)} %" if name == "wikitext" else signed(change, 3))
        table.append(row)
    return table


def named_cell(cell: Cell, among: Sequence[Cell]) -> str:
    """What sets a cell apart from others."""
    words = {
        "task": TASKS.get(cell.task, cell.task),
        "steps": f"{cell.steps} steps",
        "rank": f"rank {cell.rank}",
        "form": FORMS.get(cell.form, cell.form),
        "samples": f"{cell.samples} samples",
    }
    return ", ".join(words[field] for field in Cell._fields if len({getattr(each, field) for each in among}) > 1)


def across(reference: Comparison, others: Mapping[Cell, Comparison]) -> Table:
    """KL of each way in several cells; over LoRA's there, and that of each seed."""
    comparisons = dict(sorted({reference.cell: reference, **others}.items()))
    cells = list(comparisons)
    table = [
        [
            "KL; ÷ LoRA's (each seed)",
            *(named_cell(cell, cells) + _fewer(compared, reference) for cell, compared in comparisons.items()),
        ]
    ]
    for way in _in_several(reference, others):
        row = [label(way)]
        for compared in comparisons.values():
            if way in compared.points:
                ratio = compared.ratio(way) if way != LORA else None
                against = f"; {_with_seeds(ratio)}" if ratio else ""
                row.append(significant(compared.kl(way).value) + against + _missed(compared, way))
            else:
                row.append("missed" if way in compared.missed else "")
        table.append(row)
    return table


def _with_seeds(ratio: Estimate) -> str:
    return f"{significant(ratio.value, 2)} ({', '.join(significant(value, 2) for value in ratio.seeds)})"


def _fewer(compared: Comparison, reference: Comparison) -> str:
    """How many seeds a cell has, where they are fewer than the reference's."""
    seeds = len(compared.points.get(LORA, ()))
    return f" ({seeds} seed{'s' * (seeds > 1)})" if seeds < len(reference.points.get(LORA, ())) else ""


def _missed(compared: Comparison, way: Way) -> str:
    seeds = sorted(compared.missed.get(way, ()))
    return f"; missed with seed {', '.join(map(str, seeds))}" if seeds else ""


def _in_several(reference: Comparison, others: Mapping[Cell, Comparison]) -> list[Way]:
    """Ways of the reference that other cells have too, by rising KL."""
    return [way for way in reference.ranked() if any(way in each.points or way in each.missed for each in others.values())]


def factors(reference: Comparison, others: Mapping[Cell, Comparison]) -> Table:
    """KL with another calibration over KL with that of the reference: the geometric mean, and each seed."""
    cells = [reference.cell, *others]
    table = [["method", f"KL, {named_cell(reference.cell, cells)}", *(f"÷, {named_cell(cell, cells)}" for cell in others)]]
    for way in _in_several(reference, others):
        if any(point.cell.form for point in reference.points[way].values()):
            row = [label(way), with_interval(reference.kl(way))]
            for compared in others.values():
                ratio = compared.ratio(way, way, other=reference)
                row.append(_with_seeds(ratio) + _missed(compared, way) if ratio else "missed" if way in compared.missed else "")
            table.append(row)
    return table


ASKING = (*ASKED, "nq, chat", "nq, template", "humaneval", "alpaca", "wikitext")


def kept_forms(reference: Comparison, others: Mapping[Cell, Comparison]) -> Table:
    """Which form of asking is kept by which form of calibration: KL over LoRA's."""
    comparisons = {reference.cell: reference, **others}
    table = [["KL ÷ LoRA's", "calibrated on", *(PROBES[name] for name in ASKING)]]
    for way in _in_several(reference, others):
        for cell, compared in comparisons.items():
            if way in compared.points and any(point.cell.form for point in compared.points[way].values()):
                ratios = [_geometric(compared.probe_ratio(way, name)) for name in ASKING]
                table.append([label(way), named_cell(cell, list(comparisons)), *ratios])
    return table
