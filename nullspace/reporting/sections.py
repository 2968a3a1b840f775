"""The sections of a report: what `nullspace.analysis` computes, and what a preservation study measures.

`sections` makes those of an `Analysis`; a section whose inputs were not given names the options that add them. `study_sections`
makes those of a study (`nullspace.reporting.study`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import scipy.stats

from nullspace.analysis import ALL, ATTENTION, INITIAL, Analysis, Row, adapter_summary, rank_summary
from nullspace.errors import InputError
from nullspace.reporting import figures
from nullspace.reporting.charts import BEFORE, HELD_OUT
from nullspace.reporting.page import Section, Table
from nullspace.reporting.study import MEASURES, Study, at_equal_loss, over_seeds


def sections(analysis: Analysis) -> list[Section]:
    """All sections of an analysis, in the order of the page."""
    return [build(analysis) for build in SECTIONS]


def effective_ranks(analysis: Analysis) -> Section:
    """Effective ranks of X and W₀ (arXiv 2503.02659, eq. 2–3, Tables 2 and 6)."""
    inputs = [row for row in analysis.inputs if row["effective_rank"] is not None]
    summary = rank_summary(analysis)
    text = (
        "The effective rank exp(−Σ pᵢ log pᵢ), pᵢ = σᵢ / Σσ, counts the directions over which a matrix is spread. Where that of "
        "the calibration input X is low, many directions of the layer's input are unused: look for panels where X lies below W₀."
    )
    if summary:
        groups = {ATTENTION: "in attention", ALL: "in all"}
        counts = [f"{row['below']} of {row['count']} layers {groups[row['layers']]}" for row in summary if row["layers"] in groups]
        text += (
            f" Here X's effective rank is below W₀'s at {', and at '.join(counts)}; as a share of the largest possible (d_in for "
            f"X, min(d_out, d_in) for W₀), at {summary[-1]['below_share']} of all."
        )
    table = [
        {
            "layers": row["layers"],
            "number": row["count"],
            "X, mean": row["x"],
            "W₀, mean": row["w"],
            "X below W₀": row["below"],
            "X / d_in": row["x_share"],
            "W₀ / min(d_out, d_in)": row["w_share"],
            "share below": row["below_share"],
        }
        for row in summary
    ]
    shares, ranks = dict.fromkeys(("X / d_in", "W₀ / min(d_out, d_in)"), ".1%"), dict.fromkeys(("X, mean", "W₀, mean"), ".1f")
    details = [
        {"input": row["site"], "d_in": row["d_in"], "effective rank": row["effective_rank"], "tokens": row["tokens"]}
        for row in inputs
    ]
    return Section(
        "Effective rank of inputs and weights",
        text,
        [figures.effective_ranks(inputs, analysis.weights)] if inputs else [],
        Table("effective-ranks", table, {**ranks, **shares}),
        Table("effective-ranks-of-inputs", details, {"effective rank": ".1f"}),
        _needed(
            "--covariances DIR, or --spaces DIR computed with --spectrum" if not inputs else None,
            "--model MODEL, for the weights" if not analysis.weights else None,
        ),
    )


def spectra(analysis: Analysis) -> Section:
    """Normalised singular values of X and W₀ (Figure 2)."""
    inputs = [row for row in analysis.inputs if row["spectrum"]]
    return Section(
        "Spectra",
        "Singular values relative to the largest. A steep fall at the left means a few dominant directions; a fall at the right "
        "end is a null space: directions that the input hardly takes. The further X's right end lies below W₀'s, the more room "
        "there is.",
        [figures.spectra(inputs, analysis.weights)] if inputs else [],
        missing=_needed(
            "--covariances DIR" if not inputs else None, "--model MODEL, for the weights" if not analysis.weights else None
        ),
    )


def directions(analysis: Analysis) -> Section:
    """What the A of each adapter reads of the input's directions (Figure 4, eq. 12–13)."""
    rows = [row for row in analysis.adapters if row["read"]]
    return Section(
        "Which directions each adapter reads",
        "The share of A in each direction of the calibration input. An adapter that preserves has small shares on the left, where "
        "the input is large; shares that grow there in training disturb what the model does with the input.",
        [figures.directions(rows)] if rows else [],
        missing=_needed(
            "--covariances DIR" if not analysis.inputs or not analysis.inputs[0]["spectrum"] else None,
            "--adapter NAME=DIR" if not analysis.adapters else None,
        ),
    )


def changes(analysis: Analysis) -> Section:
    """The relative change of A through training (Figure 1)."""
    rows = _trained(analysis)
    drawn = []
    if rows:
        label = "‖A − A₀‖ / ‖A₀‖"
        drawn.append(figures.by_layer(rows, "change", label, caption=f"{label} of the last state by layer."))
    if len({row["state"] for row in rows}) > 2:
        fields = {"change of A: ‖A − A₀‖ / ‖A₀‖": "change", "part of A outside of A₀'s rows": "outside"}
        if any(row["drift"] is not None for row in rows):
            fields["drift: ‖ΔW X‖ / ‖W₀X‖"] = "drift"
        drawn.append(figures.over_steps(rows, fields))
    table = [
        {
            "adapter": row["adapter"],
            "state": row["state"],
            "layers": row["layers"],
            "change of A, median": row["change"],
            "outside of A₀'s rows, median": row["outside"],
        }
        for row in adapter_summary(analysis)
        if row["state"] != INITIAL
    ]
    return Section(
        "How far training moves A",
        "LoRA-Null rests on A staying near where it began: small values mean that the adapter still reads the directions it was "
        "given. Only the part of a change outside of A₀'s row space can raise the leak.",
        drawn,
        Table("change", table, dict.fromkeys(("change of A, median", "outside of A₀'s rows, median"), ".2e")),
        missing=_needed("--adapter NAME=INITIAL,TRAINED" if not rows else None),
    )


def leaks(analysis: Analysis) -> Section:
    """Leak and gap of the null spaces, and the leak of every A before and after training, on calibration and held-out text."""
    spaces = [row for row in analysis.inputs if row["leak"] is not None]
    adapters = [row for row in analysis.adapters if row["leak"] is not None]
    held_out = any(row.get("held_out_leak") is not None for row in (*spaces, *adapters))
    drawn = [figures.null_spaces(spaces)] if spaces else []
    if adapters:
        caption = "Leak of A's row space by layer: of the last state, and before training (thin dots, open marks)."
        caption += " Dashed, open marks: the last state's on held-out text." if held_out else ""
        more = {BEFORE: "leak", HELD_OUT: "held_out_leak"}
        drawn.append(figures.by_layer(adapters, "leak", "leak ‖QᵀX‖ / ‖X‖", caption=caption, more=more))
    named = {"leak": "leak", "held-out leak": "held_out_leak"} if held_out else {"leak": "leak"}
    table = [
        {"adapter": row["adapter"], "state": row["state"], "layers": row["layers"]}
        | {f"{title}, median": row[field] for title, field in named.items()}
        for row in adapter_summary(analysis)
        if row["leak"] is not None
    ]
    details = [
        {"input": row["site"], "rank": row["rank"], "tokens": row["tokens"]}
        | {title: row.get(field) for title, field in named.items()}
        | {"gap": row["gap"]}
        for row in spaces
    ]
    formats = {f"{title}{end}": ".2e" for title in named for end in ("", ", median")} | {"gap": ".1%"}
    return Section(
        "Leak and gap",
        "The leak is the part of the calibration input's norm that an adapter reads: 0 for a true null space, and about "
        "√(r / d_in) for random rows. Lines that rise from initial to trained are layers where A has left its null space. The leak "
        "on held-out text, which the basis was not made from, is what counts in use.",
        drawn,
        Table("leaks", table, formats),
        Table("null-spaces", details, formats),
        _needed(
            "--spaces DIR, for the null spaces' own" if not spaces else None,
            "--covariances DIR and --adapter NAME=DIR, for the adapters'" if not adapters else None,
        ),
    )


def drifts(analysis: Analysis) -> Section:
    """How far training has moved each layer's output on the calibration input."""
    rows = [row for row in _trained(analysis) if row["drift"] is not None]
    label = "‖ΔW X‖ / ‖W₀X‖"
    table = [
        {
            "adapter": row["adapter"],
            "state": row["state"],
            "drift, median": row["drift"],
            "largest": row["worst_drift"],
            "at": row["worst_layer"],
        }
        for row in adapter_summary(analysis)
        if rows and row["drift"] is not None and row["state"] != INITIAL
    ]
    return Section(
        "Drift of the layers' outputs",
        "How much the trained update ΔW = BA − B₀A₀ changes a layer's output on the calibration input, relative to that output "
        "before. Forgetting comes from such changes: compare adapters at equal quality on the new task.",
        [figures.by_layer(rows, "drift", label, caption=f"{label} of the last state by layer.")] if rows else [],
        Table("drift", table, dict.fromkeys(("drift, median", "largest"), ".2e")),
        missing=_needed("--covariances DIR, --model MODEL and --adapter NAME=INITIAL,TRAINED" if not rows else None),
    )


def outliers(analysis: Analysis) -> Section:
    """Tokens with massive activations."""
    rows = [row for row in analysis.inputs if row["outliers"] is not None]
    massive = sorted((row for row in rows if row["outliers"]), key=lambda row: -row["outliers"])
    text = (
        "Tokens whose norm exceeds 8 × the median. They are few, and carry most of the norm where they occur: there, a small leak "
        "means less than elsewhere."
    )
    if rows:
        text += f" They occur at {len(massive)} of {len(rows)} inputs."
    table = [
        {"input": row["site"], "tokens": row["tokens"], "outliers": row["outliers"], "share": row["outlier_share"]}
        for row in massive
    ]
    return Section(
        "Tokens with massive activations",
        text,
        [figures.outliers(rows)] if massive else [],
        Table("outliers", table[:8], {"share": ".3%"}),
        Table("all-outliers", table if len(table) > 8 else [], {"share": ".3%"}),
        _needed("--covariances DIR or --spaces DIR" if not rows else None),
    )


def by_layer(analysis: Analysis) -> Section:
    """All numbers of every adapter's last state, a row a layer."""
    fields = {"leak": "leak", "held-out leak": "held_out_leak", "drift": "drift", "change of A": "change", "outside": "outside"}
    last = {row["adapter"]: row["state"] for row in analysis.adapters}
    rows = [row for row in analysis.adapters if row["state"] == last[row["adapter"]]]
    known = {title: field for title, field in fields.items() if any(row.get(field) is not None for row in rows)}
    table = [
        {"adapter": row["adapter"], "layer": row["layer"], "rank": row["rank"]} | {t: row.get(field) for t, field in known.items()}
        for row in rows
    ]
    worst = next((title for title in ("drift", "leak", "change of A") if title in known), None)
    top = sorted(table, key=lambda row: -(row[worst] or 0.0))[:10] if worst else []
    return Section(
        "Layer by layer",
        f"The ten layers of the largest {worst}, of every adapter's last state; all layers are below."
        if worst
        else "Adapters' layers.",
        table=Table("worst-layers", top, dict.fromkeys(known, ".2e")),
        details=Table("layers", table, dict.fromkeys(known, ".2e")),
        missing=_needed("--adapter NAME=DIR" if not rows else None),
    )


def filter_section(steps: Mapping[str, Sequence[Row]]) -> Section:
    """What filters of rising strength would leave of each adapter's drift.

    Args:
        steps: adapter → rows of `nullspace.integrations.peft.filter_path`.
    """
    titles = {"strength": "strength", "drift": "median drift", "worst_drift": "largest drift", "left": "drift left"}
    titles |= {"response": "task's response", "worst_layer": "worst layer"}
    table = [{"adapter": name} | {title: row[f] for f, title in titles.items()} for name, rows in steps.items() for row in rows]
    formats = {"strength": "g", "median drift": ".2e", "largest drift": ".2e", "drift left": ".1%", "task's response": ".1%"}
    return Section(
        "What a filter would give back",
        "nullspace filter takes back, in closed form, what a training has changed on the calibration text, and keeps what it "
        "does on the task's. A forecast from the second moments of both; the stronger, the less of either is left.",
        [figures.filters(steps)],
        Table("filter", table, formats),
    )


def study_sections(study: Study) -> list[Section]:
    """What each method forgot at equal task loss, and what its base has lost without BA.

    Raises:
        ValueError: if the study has no base or no run yet.
    """
    if study.base is None or not study.runs:
        raise InputError("the study has no finished run yet")
    parts = [_forgotten(study, study.base)]
    if any(run.get("layers") for run in study.runs):
        parts.append(_forgotten_against_drift(study, study.base))
    if study.dropped:
        parts.append(_left_without_adapters(study, study.base))
    return parts


def _forgotten(study: Study, base: Mapping[str, Any]) -> Section:
    seeds = len({run["seed"] for run in study.runs})
    starts = [abs(scores["task"]["loss"] - base["task"]["loss"]) for scores in study.start.values()]
    text = (
        "Methods move at different speeds for one learning rate, so each runs at several, and they are compared at equal task "
        f"loss. Lower is better. Means over {seeds} seed{'s' if seeds > 1 else ''}, ± one standard deviation."
    )
    if starts:
        text += (
            f" Before training, every variant's task loss is within {max(starts):.0e} of the base's, {base['task']['loss']:.3f}."
        )
    by_measure = {measure: at_equal_loss(study, measure) for measure in MEASURES}
    table = [
        {"variant": variant}
        | {
            f"{measure} at {row['task_loss']:.3f}": row["forgetting"]
            for measure, rows in by_measure.items()
            for row in rows
            if row["variant"] == variant
        }
        for variant in study.variants
    ]
    rows = over_seeds(study)
    titles = list(dict.fromkeys(title for row in rows for title in row if title not in ("variant", "learning_rate")))
    details = [
        {"variant": row["variant"], "learning rate": row["learning_rate"]}
        | {title.replace("_", " "): row.get(title) for title in titles}
        for row in rows
    ]
    drawn, formats = [figures.forgetting(study)], {"learning rate": "g"}
    tables = Table("forgetting-at-equal-loss", table), Table("forgetting-by-rate", details, formats)
    return Section("What was forgotten, where as much was learned", text, drawn, *tables)


def _forgotten_against_drift(study: Study, base: Mapping[str, Any]) -> Section:
    runs = [run for run in study.runs if run.get("layers")]
    lost = {f"{measure} lost": [lost_by(run["scores"], base) for run in runs] for measure, lost_by in MEASURES.items()}
    correlations = []
    for name in runs[0]["layers"]:
        values = [run["layers"][name] for run in runs]
        row = {title: _rank_correlation(values, those) for title, those in lost.items()}
        correlations.append({"over all runs": name.replace("_", " "), **row})
    return Section(
        "What forgetting goes with",
        "The drift of the layers' outputs on the calibration input, and what each run forgot. A method below the others at the "
        "same drift changes outputs that the questions do not depend on; one above them also changes outputs that the calibration "
        "data do not show. The table has Spearman's rank correlation of what was lost with each number of the layers.",
        [figures.against_drift(study)],
        Table("correlations", correlations, dict.fromkeys(lost, ".2f")),
    )


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; nan if one of them does not vary."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return float(scipy.stats.spearmanr(a, b).statistic)


def _left_without_adapters(study: Study, base: Mapping[str, Any]) -> Section:
    """Figure 5."""
    rows = [
        {"variant": name}
        | {f"{measure} lost": lost(scores, base) for measure, lost in MEASURES.items()}
        | {"task loss": scores["task"]["loss"]}
        for name, scores in study.dropped.items()
    ]
    return Section(
        "What is left when BA is dropped",
        "Methods that subtract their product BA from the base put a part of the model into the adapter. The less the base alone "
        "has lost, the less of the model's knowledge training can change.",
        [figures.without_adapters(study)],
        Table("without-adapters", rows, dict.fromkeys((*(f"{measure} lost" for measure in MEASURES), "task loss"), ".4f")),
    )


SECTIONS: tuple[Callable[[Analysis], Section], ...] = (
    effective_ranks,
    spectra,
    directions,
    changes,
    leaks,
    drifts,
    outliers,
    by_layer,
)


def _trained(analysis: Analysis) -> list[Row]:
    """The rows of trained adapters, their first states included."""
    trained = {row["adapter"] for row in analysis.adapters if row["state"] != INITIAL}
    return [row for row in analysis.adapters if row["adapter"] in trained]


def _needed(*inputs: str | None) -> str | None:
    """Which inputs the parts that were left out need; None if there are no such."""
    missing = [each for each in inputs if each is not None]
    return f"Left out here: it needs {', and '.join(missing)}." if missing else None
