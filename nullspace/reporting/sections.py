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
from nullspace.reporting.page import Picture, Section
from nullspace.reporting.panels import svg
from nullspace.reporting.study import MEASURES, Spread, Study, at_equal_loss, over_seeds


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
    pictures = []
    if inputs:
        caption = "Effective rank over the blocks, as a share of the largest possible: one panel for each input that layers share."
        pictures.append(Picture(svg(figures.effective_ranks(inputs, analysis.weights)), caption))
    return Section(
        "Effective rank of inputs and weights",
        text,
        pictures,
        [
            {
                "layers": row["layers"],
                "number": str(row["count"]),
                "X, mean": f"{row['x']:.1f}",
                "W₀, mean": f"{row['w']:.1f}",
                "X below W₀": str(row["below"]),
                "X / d_in": f"{row['x_share']:.1%}",
                "W₀ / min(d_out, d_in)": f"{row['w_share']:.1%}",
                "share below": str(row["below_share"]),
            }
            for row in summary
        ],
        [
            {"input": row["site"], "d_in": str(row["d_in"]), "effective rank": f"{row['effective_rank']:.1f}"}
            | ({"tokens": f"{row['tokens']:,}"} if row["tokens"] is not None else {})
            for row in inputs
        ],
        _needed(
            "--covariances DIR, or --spaces DIR computed with --spectrum" if not inputs else None,
            "--model MODEL, for the weights" if not analysis.weights else None,
        ),
    )


def spectra(analysis: Analysis) -> Section:
    """Normalised singular values of X and W₀ (Figure 2)."""
    inputs = [row for row in analysis.inputs if row["spectrum"]]
    pictures = []
    if inputs:
        caption = "Median over the blocks; for X, 80 % of the blocks lie in the band. Below some 1e-8, σ is rounding."
        pictures.append(Picture(svg(figures.spectra(inputs, analysis.weights)), caption))
    return Section(
        "Spectra",
        "Singular values relative to the largest. A steep fall at the left means a few dominant directions; a fall at the right "
        "end is a null space: directions that the input hardly takes. The further X's right end lies below W₀'s, the more room "
        "there is.",
        pictures,
        missing=_needed(
            "--covariances DIR" if not inputs else None, "--model MODEL, for the weights" if not analysis.weights else None
        ),
    )


def directions(analysis: Analysis) -> Section:
    """What the A of each adapter reads of the input's directions (Figure 4, eq. 12–13)."""
    rows = [row for row in analysis.adapters if row["read"]]
    pictures = []
    if rows:
        caption = (
            "Root mean square over layers and, in each of 100 bins, directions. 1 is the value of a random A; directions uⱼ are "
            "the eigenvectors of C by falling eigenvalue. Values below the frame are rounding."
        )
        pictures.append(Picture(svg(figures.directions(rows)), caption))
    return Section(
        "Which directions each adapter reads",
        "The share of A in each direction of the calibration input. An adapter that preserves has small shares on the left, where "
        "the input is large; shares that grow there in training disturb what the model does with the input.",
        pictures,
        missing=_needed(
            "--covariances DIR" if not analysis.inputs or not analysis.inputs[0]["spectrum"] else None,
            "--adapter NAME=DIR" if not analysis.adapters else None,
        ),
    )


def changes(analysis: Analysis) -> Section:
    """The relative change of A through training (Figure 1)."""
    rows = _trained(analysis)
    pictures = []
    if rows:
        caption = "‖A − A₀‖ / ‖A₀‖ of the last state by layer."
        pictures.append(Picture(svg(figures.by_layer(rows, "change", "‖A − A₀‖ / ‖A₀‖")), caption))
    if len({row["state"] for row in rows}) > 2:
        fields = {"change of A: ‖A − A₀‖ / ‖A₀‖": "change", "part of A outside of A₀'s rows": "outside"}
        if any(row["drift"] is not None for row in rows):
            fields["drift: ‖ΔW X‖ / ‖W₀X‖"] = "drift"
        caption = "Through training: medians over the layers; 80 % of them lie in the bands."
        pictures.append(Picture(svg(figures.over_steps(rows, fields)), caption))
    return Section(
        "How far training moves A",
        "LoRA-Null rests on A staying near where it began: small values mean that the adapter still reads the directions it was "
        "given. Only the part of a change outside of A₀'s row space can raise the leak.",
        pictures,
        [
            {
                "adapter": row["adapter"],
                "state": row["state"],
                "layers": str(row["layers"]),
                "change of A, median": f"{row['change']:.2e}",
                "outside of A₀'s rows, median": f"{row['outside']:.2e}",
            }
            for row in adapter_summary(analysis)
            if row["state"] != INITIAL
        ],
        missing=_needed("--adapter NAME=INITIAL,TRAINED" if not rows else None),
    )


def leaks(analysis: Analysis) -> Section:
    """Leak and gap of the null spaces, and the leak of every A before and after training."""
    spaces = [row for row in analysis.inputs if row["leak"] is not None]
    adapters = [row for row in analysis.adapters if row["leak"] is not None]
    pictures = []
    if spaces:
        rank = sorted({row["rank"] for row in spaces})
        caption = f"The null spaces themselves (rank {', '.join(map(str, rank))}): their leak, and the gap behind them."
        pictures.append(Picture(svg(figures.null_spaces(spaces)), caption))
    if adapters:
        caption = "Leak of A's row space by layer: before training (thin lines, open markers), and of the last trained state."
        label = "leak ‖QᵀX‖ / ‖X‖"
        pictures.append(Picture(svg(figures.by_layer(adapters, "leak", label, start=True)), caption))
    return Section(
        "Leak and gap",
        "The leak is the part of the calibration input's norm that an adapter reads: 0 for a true null space, and about "
        "√(r / d_in) for random rows. Lines that rise from initial to trained are layers where A has left its null space.",
        pictures,
        [
            {"adapter": row["adapter"], "state": row["state"], "layers": str(row["layers"]), "leak, median": f"{row['leak']:.2e}"}
            for row in adapter_summary(analysis)
            if row["leak"] is not None
        ],
        [
            {"input": row["site"], "rank": str(row["rank"]), "leak": f"{row['leak']:.2e}", "gap": f"{row['gap']:.1%}"}
            for row in spaces
        ],
        _needed(
            "--spaces DIR, for the null spaces' own" if not spaces else None,
            "--covariances DIR and --adapter NAME=DIR, for the adapters'" if not adapters else None,
        ),
    )


def drifts(analysis: Analysis) -> Section:
    """How far training has moved each layer's output on the calibration input."""
    rows = [row for row in _trained(analysis) if row["drift"] is not None]
    pictures = []
    if rows:
        caption = "‖ΔW X‖ / ‖W₀X‖ of the last state by layer."
        pictures.append(Picture(svg(figures.by_layer(rows, "drift", "‖ΔW X‖ / ‖W₀X‖")), caption))
    return Section(
        "Drift of the layers' outputs",
        "How much the trained update ΔW = BA − B₀A₀ changes a layer's output on the calibration input, relative to that output "
        "before. Forgetting comes from such changes: compare adapters at equal quality on the new task.",
        pictures,
        [
            {
                "adapter": row["adapter"],
                "state": row["state"],
                "drift, median": f"{row['drift']:.2e}",
                "largest": f"{row['worst_drift']:.2e}",
                "at": row["worst_layer"],
            }
            for row in adapter_summary(analysis)
            if rows and row["drift"] is not None and row["state"] != INITIAL
        ],
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
    pictures = [Picture(svg(figures.outliers(rows)), "Share of tokens that are outliers; grey: none.")] if massive else []
    return Section(
        "Tokens with massive activations",
        text,
        pictures,
        [
            {
                "input": row["site"],
                "tokens": f"{row['tokens']:,}",
                "outliers": f"{row['outliers']:,}",
                "share": f"{row['outlier_share']:.3%}",
            }
            for row in massive[:8]
        ],
        missing=_needed("--covariances DIR or --spaces DIR" if not rows else None),
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
            f"{measure} at {row['task_loss']:.3f}": _spread(row["forgetting"])
            for measure, rows in by_measure.items()
            for row in rows
            if row["variant"] == variant
        }
        for variant in study.variants
    ]
    rows = over_seeds(study)
    titles = list(dict.fromkeys(title for row in rows for title in row if title not in ("variant", "learning_rate")))
    details = [
        {"variant": row["variant"], "learning rate": f"{row['learning_rate']:g}"}
        | {title.replace("_", " "): _spread(row.get(title)) for title in titles}
        for row in rows
    ]
    caption = (
        "Each line begins at the base model, where nothing is learned and nothing forgotten, goes through the learning rates, and "
        "ends at the lowest task loss: higher rates forget more and learn less, and are in the table alone."
    )
    pictures = [Picture(svg(figures.forgetting(study)), caption)]
    return Section("What was forgotten, where as much was learned", text, pictures, table, details)


def _forgotten_against_drift(study: Study, base: Mapping[str, Any]) -> Section:
    runs = [run for run in study.runs if run.get("layers")]
    lost = {f"{measure} lost": [lost_by(run["scores"], base) for run in runs] for measure, lost_by in MEASURES.items()}
    correlations = []
    for name in runs[0]["layers"]:
        values = [run["layers"][name] for run in runs]
        row = {title: f"{_rank_correlation(values, those):.2f}" for title, those in lost.items()}
        correlations.append({"over all runs": name.replace("_", " "), **row})
    caption = "A point a run: every variant, learning rate and seed. Runs that forgot nothing have no place on a logarithmic axis."
    return Section(
        "What forgetting goes with",
        "The drift of the layers' outputs on the calibration input, and what each run forgot. A method below the others at the "
        "same drift changes outputs that the questions do not depend on; one above them also changes outputs that the calibration "
        "data do not show. The table has Spearman's rank correlation of what was lost with each number of the layers.",
        [Picture(svg(figures.against_drift(study)), caption)],
        correlations,
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
        | {f"{measure} lost": f"{lost(scores, base):.4f}" for measure, lost in MEASURES.items()}
        | {"task loss": f"{scores['task']['loss']:.4f}"}
        for name, scores in study.dropped.items()
    ]
    caption = "What the base of the adapters has lost against the original model, before any training."
    return Section(
        "What is left when BA is dropped",
        "Methods that subtract their product BA from the base put a part of the model into the adapter. The less the base alone "
        "has lost, the less of the model's knowledge training can change.",
        [Picture(svg(figures.without_adapters(study)), caption)],
        rows,
    )


def _spread(spread: Spread | None) -> str:
    """The mean, to two digits of the deviation."""
    if spread is None:
        return "–"
    if not spread.deviation > 0:
        return f"{spread.mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(spread.deviation)))
    return f"{spread.mean:.{decimals}f} ± {spread.deviation:.{decimals}f}"


SECTIONS: tuple[Callable[[Analysis], Section], ...] = (effective_ranks, spectra, directions, changes, leaks, drifts, outliers)


def _trained(analysis: Analysis) -> list[Row]:
    """The rows of trained adapters, their first states included."""
    trained = {row["adapter"] for row in analysis.adapters if row["state"] != INITIAL}
    return [row for row in analysis.adapters if row["adapter"] in trained]


def _needed(*inputs: str | None) -> str | None:
    """Which inputs the parts that were left out need; None if there are no such."""
    missing = [each for each in inputs if each is not None]
    return f"Left out here: it needs {', and '.join(missing)}." if missing else None
