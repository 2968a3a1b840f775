"""The verdict of a report: sentences that follow from its numbers, each with the option that would tell more."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nullspace.analysis import INITIAL, Analysis, Row, adapter_summary
from nullspace.reporting.study import MEASURES, Study, at_equal_loss

# More leak on held-out text than this many times that on the calibration text: the basis fits the sample.
HELD_OUT_RATIO = 2.0
# A filter is named that keeps this share of the task's response.
KEPT_RESPONSE = 0.9


class Finding(NamedTuple):
    """One sentence or two of the verdict."""

    level: str
    """`good`, `look` (something to look at), `fact`, or `unknown`."""
    about: str
    text: str


def verdict(analysis: Analysis, filters: Mapping[str, Sequence[Row]] | None = None) -> list[Finding]:
    """What the numbers say: calibration, leak, drift, and what a filter would give back.

    Args:
        analysis: of `nullspace.analysis.analyse`.
        filters: adapter → rows of `strength`, `left`, `response` and `drift` (`nullspace.integrations.peft.filter_path`).
    """
    return [_calibration(analysis), *_held_out(analysis), _leak(analysis), *_drift(analysis), *_filter(analysis, filters or {})]


def study_verdict(study: Study) -> list[Finding]:
    """Which variant forgot least at the largest task gain that all of them reach."""
    found = []
    for measure in MEASURES:
        rows = at_equal_loss(study, measure)
        last = rows[-len(study.variants) :]
        known = sorted((row for row in last if row["forgetting"] is not None), key=lambda row: row["forgetting"].mean)
        if known:
            best, worst = known[0], known[-1]
            text = f"At a task loss of {best['task_loss']:.3f}, {best['variant']} lost least: {best['forgetting'].mean:.3g} nats"
            if len(known) > 1:
                text += f"; {worst['variant']} lost most, {worst['forgetting'].mean:.3g}"
            found.append(Finding("fact", f"Forgetting of {measure}", f"{text}."))
    return found


def _calibration(analysis: Analysis) -> Finding:
    """Whether every input has as many tokens as a basis of its rank needs."""
    about = "Calibration"
    rows = [row for row in analysis.inputs if row["tokens"] is not None]
    if not rows:
        return Finding("unknown", about, "Numbers of tokens are in --covariances DIR and --spaces DIR.")
    of_adapters: dict[str, int] = {}
    for row in analysis.adapters:
        of_adapters[row["layer"]] = max(row["rank"], of_adapters.get(row["layer"], 0))
    needed = {r["site"]: r["d_in"] + max(r["rank"] or 0, *(of_adapters.get(m, 0) for m in r["members"]), 0) for r in rows}
    least = min(rows, key=lambda row: row["tokens"] / needed[row["site"]])
    have, need = least["tokens"], needed[least["site"]]
    if have < need:
        short = sum(row["tokens"] < needed[row["site"]] for row in rows)
        more = f"about {math.ceil(need / have)} times as much text" if have else "text that reaches it"
        text = f"Too little at {short} of {len(rows)} inputs: {least['site']} has {have:,} tokens, and d_in + rank is {need:,}. "
        text += f"There, directions that no token has shown count as null. Calibrate with {more}."
        return Finding("look", about, text)
    text = f"Enough to determine the null spaces of all {len(rows)} inputs: each has at least {have / need:.1f} times d_in + rank "
    return Finding("good", about, f"{text}tokens (the fewest, {have:,} for {need:,}, at {least['site']}).")


def _held_out(analysis: Analysis) -> list[Finding]:
    """Whether the leak on other text is that on the calibration text."""
    about = "Held-out text"
    rows = [row for row in (*analysis.inputs, *_last(analysis)) if row.get("held_out_leak") is not None and row["leak"] is not None]
    if not rows:
        if not any(row["leak"] is not None for row in (*analysis.inputs, *analysis.adapters)):
            return []
        text = "Whether the calibration text stands for other text of its kind shows in the leak on text that was not in it: "
        return [Finding("unknown", about, text + "--held-out DIR, of `nullspace covariances`.")]
    seen = statistics.median(row["leak"] for row in rows)
    unseen = statistics.median(row["held_out_leak"] for row in rows)
    worst = max(rows, key=lambda row: row["held_out_leak"])
    text = f"The median leak is {unseen:.2e} on held-out text and {seen:.2e} on the calibration text"
    text += f", a ratio of {unseen / seen:.1f}" if seen > 0 else ""
    text += f"; the largest on held-out text, {worst['held_out_leak']:.2e}, is at {worst.get('layer') or worst['site']}."
    if unseen > HELD_OUT_RATIO * seen:
        return [Finding("look", about, f"{text} More calibration text, or more varied text, brings the two together.")]
    return [Finding("good", about, text)]


def _leak(analysis: Analysis) -> Finding:
    """Where the adapters' last states, or else the null spaces, leak most."""
    about = "Leak"
    rows = [row for row in _last(analysis) if row["leak"] is not None]
    of_adapters = bool(rows)
    rows = rows or [row for row in analysis.inputs if row["leak"] is not None]
    if not rows:
        return Finding("unknown", about, "It needs --spaces DIR; or --covariances DIR and --adapter NAME=DIR.")
    widths = {member: row["d_in"] for row in analysis.inputs for member in row["members"]}
    worst = max(rows, key=lambda row: row["leak"])
    where = f"{worst['layer']} ({worst['adapter']}, {worst['state']})" if of_adapters else worst["site"]
    text = f"Largest at {where}: {worst['leak']:.2e} of the input's norm; the median over {len(rows)} layers is "
    text = text if of_adapters else text.replace("layers", "inputs")
    text += f"{statistics.median(row['leak'] for row in rows):.2e}"
    width = widths.get(worst["layer"] if of_adapters else worst["site"])
    if not width:
        return Finding("fact", about, f"{text}.")
    random = math.sqrt(min(1.0, worst["rank"] / width))
    text += f". Random rows of rank {worst['rank']} would leak about {random:.2e} there."
    return Finding("look" if worst["leak"] >= random else "good", about, text)


def _drift(analysis: Analysis) -> list[Finding]:
    """How far training has moved the layers' outputs, an adapter a sentence."""
    found = []
    last = {row["adapter"]: row for row in adapter_summary(analysis) if row["state"] != INITIAL}
    for name, row in last.items():
        if row["drift"] is not None:
            text = (
                f"{name} ({row['state']}) changes the layers' outputs on the calibration text by {row['drift']:.2%} in the median "
            )
            found.append(Finding("fact", "Drift", f"{text}and at most by {row['worst_drift']:.2%}, at {row['worst_layer']}."))
        else:
            text = f"Training has changed A of {name} ({row['state']}) by {row['change']:.2e} of its norm in the median. "
            found.append(Finding("unknown", "Drift", f"{text}The drift of the outputs needs --covariances DIR and --model MODEL."))
    return found or [Finding("unknown", "Drift", "No trained adapter was given: --adapter NAME=INITIAL,TRAINED.")]


def _filter(analysis: Analysis, filters: Mapping[str, Sequence[Row]]) -> list[Finding]:
    """What the strongest filter that keeps most of the task's response would leave of the drift."""
    found = []
    for name, steps in filters.items():
        useful = [step for step in steps if step["strength"] > 0 and step["response"] >= KEPT_RESPONSE]
        if not useful:
            found.append(Finding("fact", "Filter", f"None of the path keeps {KEPT_RESPONSE:.0%} of the task's response of {name}."))
            continue
        step = useful[-1]
        text = (
            f"nullspace filter --strength {step['strength']:g} would take back {1 - step['left']:.0%} of the drift of {name} and "
        )
        text += f"keep {step['response']:.1%} of its response to the task"
        if step.get("drift") is not None and steps[0].get("drift") is not None:
            text += f": the median drift falls from {steps[0]['drift']:.2%} to {step['drift']:.2%}"
        found.append(
            Finding("fact", "Filter", f"{text}. That is a forecast from the second moments, in the median over the layers.")
        )
    if not found and any(row["state"] != INITIAL for row in analysis.adapters):
        found.append(Finding("unknown", "Filter", "What it would take back shows with --task DIR and --covariances DIR."))
    return found


def _last(analysis: Analysis) -> list[Row]:
    """The adapters' rows of their last states."""
    states = {row["adapter"]: row["state"] for row in analysis.adapters}
    return [row for row in analysis.adapters if row["state"] == states[row["adapter"]]]
