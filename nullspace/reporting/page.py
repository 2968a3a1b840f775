"""`nullspace report`: what `nullspace.analysis` and a preservation study find, as one HTML file that needs nothing else.

A page is a list of `Section`s. Each builder in `SECTIONS` makes one from an `Analysis`, whether its numbers are there or not: where
they are not, the section says what they ask for. `study_sections` makes those of a study (`nullspace.reporting.study`).
"""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats

from nullspace import analysis
from nullspace.analysis import INITIAL, Analysis, Row
from nullspace.artifacts import store
from nullspace.artifacts.together import written_once
from nullspace.reporting import figures
from nullspace.reporting import study as fronts

# By which a page of ours is known.
GENERATOR = '<meta name="generator" content="nullspace">'
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1152px; padding: 24px 32px 64px; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 16px 0 4px; }
h2 { font-size: 21px; margin: 48px 0 8px; border-top: 1px solid #ddd; padding-top: 20px; }
p { max-width: 82ch; margin: 8px 0; }
nav ul { padding-left: 20px; }
a { color: #00598c; }
img { width: 100%; height: auto; display: block; }
figure { margin: 16px 0; }
figcaption { font-size: 14px; color: #444; max-width: 92ch; }
.missing { color: #7a3d00; background: #fff6ea; border-left: 3px solid #e69f00; padding: 6px 12px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { border-bottom: 1px solid #999; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
summary { cursor: pointer; font-size: 14px; color: #00598c; }
"""


@dataclass(frozen=True)
class Picture:
    """A figure as SVG text, and what there is to see in it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        title: of the section.
        text: one or two sentences: what is shown, and what to look at.
        pictures: figures, in order.
        table: rows, column title → text; all with the same columns.
        details: a longer table, shown on request.
        missing: what more there would be, and which input it asks for.
    """

    title: str
    text: str
    pictures: Sequence[Picture] = ()
    table: Sequence[Mapping[str, str]] = ()
    details: Sequence[Mapping[str, str]] = ()
    missing: str | None = None


def sections(found: Analysis) -> list[Section]:
    """All sections of an analysis, in the order of the page."""
    return [build(found) for build in SECTIONS]


def effective_ranks(found: Analysis) -> Section:
    """Effective ranks of X and W₀ (arXiv 2503.02659, eq. 2–3, Tables 2 and 6)."""
    inputs = [row for row in found.inputs if row["effective_rank"] is not None]
    summary = analysis.rank_summary(found)
    text = (
        "The effective rank exp(−Σ pᵢ log pᵢ), pᵢ = σᵢ / Σσ, says over how many directions a matrix is spread. Where that of the "
        "calibration input X is low, there is much room that the layer does not hear: look for panels where X lies below W₀."
    )
    if summary:
        groups = {analysis.ATTENTION: "in attention", analysis.ALL: "in all"}
        counts = [f"{row['below']} of {row['count']} layers {groups[row['layers']]}" for row in summary if row["layers"] in groups]
        text += (
            f" Here X's effective rank is below W₀'s at {', and at '.join(counts)}; as a share of the largest possible (d_in for "
            f"X, min(d_out, d_in) for W₀), at {summary[-1]['below_share']} of all."
        )
    pictures = []
    if inputs:
        caption = "Effective rank over the blocks, as a share of the largest possible: one panel for each input that layers share."
        pictures.append(Picture(figures.svg(figures.effective_ranks(inputs, found.weights)), caption))
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
            "--model MODEL, for the weights" if not found.weights else None,
        ),
    )


def spectra(found: Analysis) -> Section:
    """Normalised singular values of X and W₀ (Figure 2)."""
    inputs = [row for row in found.inputs if row["spectrum"]]
    pictures = []
    if inputs:
        caption = "Median over the blocks; for X, 80 % of the blocks lie in the band. Below some 1e-8, σ is rounding."
        pictures.append(Picture(figures.svg(figures.spectra(inputs, found.weights)), caption))
    return Section(
        "Spectra",
        "Singular values relative to the largest. A steep fall at the left is a few loud directions; a fall at the right end is a "
        "null space: directions that the input hardly takes. The further X's right end lies below W₀'s, the more there is to gain.",
        pictures,
        missing=_needed(
            "--covariances DIR" if not inputs else None, "--model MODEL, for the weights" if not found.weights else None
        ),
    )


def directions(found: Analysis) -> Section:
    """What the A of each adapter reads of the input's directions (Figure 4, eq. 12–13)."""
    rows = [row for row in found.adapters if row["read"]]
    pictures = []
    if rows:
        caption = (
            "Root mean square over layers and, in each of 100 bins, directions. 1 is an A without a preference; directions uⱼ are "
            "the eigenvectors of C by falling eigenvalue. What lies below the frame is rounding."
        )
        pictures.append(Picture(figures.svg(figures.directions(rows)), caption))
    return Section(
        "Which directions each adapter reads",
        "How loudly A answers to each direction of the calibration input. An adapter that preserves is quiet on the left, where "
        "the input is loud; what rises there in training is what it may disturb.",
        pictures,
        missing=_needed(
            "--covariances DIR" if not found.inputs or not found.inputs[0]["spectrum"] else None,
            "--adapter NAME=DIR" if not found.adapters else None,
        ),
    )


def changes(found: Analysis) -> Section:
    """The relative change of A through training (Figure 1)."""
    rows = _trained(found)
    pictures = []
    if rows:
        caption = "‖A − A₀‖ / ‖A₀‖ of the last state by layer."
        pictures.append(Picture(figures.svg(figures.by_layer(rows, "change", "‖A − A₀‖ / ‖A₀‖")), caption))
    if len({row["state"] for row in rows}) > 2:
        fields = {"change of A: ‖A − A₀‖ / ‖A₀‖": "change", "part of A outside of A₀'s rows": "outside"}
        if any(row["drift"] is not None for row in rows):
            fields["drift: ‖ΔW X‖ / ‖W₀X‖"] = "drift"
        caption = "Through training: medians over the layers; 80 % of them lie in the bands."
        pictures.append(Picture(figures.svg(figures.over_steps(rows, fields)), caption))
    return Section(
        "How far training moves A",
        "LoRA-Null rests on A staying near where it began: small values mean that the adapter still reads the directions it was "
        "given. Of a change, only the part outside of A₀'s row space can make it hear more.",
        pictures,
        [
            {
                "adapter": row["adapter"],
                "state": row["state"],
                "layers": str(row["layers"]),
                "change of A, median": f"{row['change']:.2e}",
                "outside of A₀'s rows, median": f"{row['outside']:.2e}",
            }
            for row in analysis.adapter_summary(found)
            if row["state"] != INITIAL
        ],
        missing=_needed("--adapter NAME=INITIAL,TRAINED" if not rows else None),
    )


def leaks(found: Analysis) -> Section:
    """Leak and gap of the null spaces, and the leak of every A before and after training."""
    spaces = [row for row in found.inputs if row["leak"] is not None]
    adapters = [row for row in found.adapters if row["leak"] is not None]
    pictures = []
    if spaces:
        rank = sorted({row["rank"] for row in spaces})
        caption = f"The null spaces themselves (rank {', '.join(map(str, rank))}): what they hear, and how clear the cut is."
        pictures.append(Picture(figures.svg(figures.null_spaces(spaces)), caption))
    if adapters:
        caption = "Leak of A's row space by layer: before training (thin lines, open markers), and of the last trained state."
        label = "leak ‖QᵀX‖ / ‖X‖"
        pictures.append(Picture(figures.svg(figures.by_layer(adapters, "leak", label, start=True)), caption))
    return Section(
        "Leak and gap",
        "The leak is the part of the calibration input's norm that an adapter hears: 0 for a true null space, and about "
        "√(r / d_in) for random rows. Lines that rise from initial to trained are layers where A has left its null space.",
        pictures,
        [
            {"adapter": row["adapter"], "state": row["state"], "layers": str(row["layers"]), "leak, median": f"{row['leak']:.2e}"}
            for row in analysis.adapter_summary(found)
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


def drifts(found: Analysis) -> Section:
    """How far training has moved each layer's output on the calibration input."""
    rows = [row for row in _trained(found) if row["drift"] is not None]
    pictures = []
    if rows:
        caption = "‖ΔW X‖ / ‖W₀X‖ of the last state by layer."
        pictures.append(Picture(figures.svg(figures.by_layer(rows, "drift", "‖ΔW X‖ / ‖W₀X‖")), caption))
    return Section(
        "Drift of the layers' outputs",
        "How much the trained update ΔW = BA − B₀A₀ changes what a layer says to the calibration input, relative to what it said "
        "before. This is what forgetting is made of: compare adapters at equal quality on the new task.",
        pictures,
        [
            {
                "adapter": row["adapter"],
                "state": row["state"],
                "drift, median": f"{row['drift']:.2e}",
                "largest": f"{row['worst_drift']:.2e}",
                "at": row["worst_layer"],
            }
            for row in analysis.adapter_summary(found)
            if rows and row["drift"] is not None and row["state"] != INITIAL
        ],
        missing=_needed("--covariances DIR, --model MODEL and --adapter NAME=INITIAL,TRAINED" if not rows else None),
    )


def outliers(found: Analysis) -> Section:
    """Tokens with massive activations."""
    rows = [row for row in found.inputs if row["outliers"] is not None]
    loud = sorted((row for row in rows if row["outliers"]), key=lambda row: -row["outliers"])
    text = (
        "Tokens whose norm exceeds 8 × the median. There are few, and they carry most of the norm where they occur, so that a "
        "small leak there says less than elsewhere."
    )
    if rows:
        text += f" They occur at {len(loud)} of {len(rows)} inputs."
    pictures = [Picture(figures.svg(figures.outliers(rows)), "Share of tokens that are outliers; grey: none.")] if loud else []
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
            for row in loud[:8]
        ],
        missing=_needed("--covariances DIR or --spaces DIR" if not rows else None),
    )


def study_sections(study: fronts.Study) -> list[Section]:
    """What each method forgot where it had learned as much as the others, and what its base knows without BA.

    Raises:
        ValueError: if the study has no base or no run yet.
    """
    if study.base is None or not study.runs:
        raise ValueError("the study has no finished run yet")
    parts = [_forgotten(study, study.base)]
    if any(run.get("layers") for run in study.runs):
        parts.append(_forgotten_against_drift(study, study.base))
    if study.dropped:
        parts.append(_left_without_adapters(study, study.base))
    return parts


def _forgotten(study: fronts.Study, base: Mapping[str, Any]) -> Section:
    seeds = len({run["seed"] for run in study.runs})
    starts = [abs(scores["task"]["loss"] - base["task"]["loss"]) for scores in study.start.values()]
    text = (
        "Methods move at different speeds for one learning rate, so each runs at several, and they are compared where they have "
        f"learned as much. Lower is better. Means over {seeds} seed{'s' if seeds > 1 else ''}, ± one standard deviation."
    )
    if starts:
        text += (
            f" Before training, every variant's task loss is within {max(starts):.0e} of the base's, {base['task']['loss']:.3f}."
        )
    by_measure = {measure: fronts.at_equal_loss(study, measure) for measure in fronts.MEASURES}
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
    rows = fronts.over_seeds(study)
    titles = list(dict.fromkeys(title for row in rows for title in row if title not in ("variant", "learning_rate")))
    details = [
        {"variant": row["variant"], "learning rate": f"{row['learning_rate']:g}"}
        | {title.replace("_", " "): _spread(row.get(title)) for title in titles}
        for row in rows
    ]
    caption = (
        "Each line begins at the base model, where nothing is learned and nothing forgotten, goes through the learning rates, and "
        "ends where its method learned most: higher rates forget more for less, and are in the table alone."
    )
    pictures = [Picture(figures.svg(figures.forgetting(study)), caption)]
    return Section("What was forgotten, where as much was learned", text, pictures, table, details)


def _forgotten_against_drift(study: fronts.Study, base: Mapping[str, Any]) -> Section:
    runs = [run for run in study.runs if run.get("layers")]
    lost = {f"{measure} lost": [found(run["scores"], base) for run in runs] for measure, found in fronts.MEASURES.items()}
    correlations = []
    for name in runs[0]["layers"]:
        values = [run["layers"][name] for run in runs]
        found = {title: f"{_rank_correlation(values, those):.2f}" for title, those in lost.items()}
        correlations.append({"over all runs": name.replace("_", " "), **found})
    caption = "A point a run: every variant, learning rate and seed. Runs that forgot nothing have no place on a logarithmic axis."
    return Section(
        "What forgetting goes with",
        "How far a run has moved the layers' outputs on the calibration input, and what it forgot. A method below the others at "
        "the same drift moves what the questions do not ask for; one above them has also moved what calibration did not see. The "
        "table has Spearman's rank correlation of what was lost with each number of the layers.",
        [Picture(figures.svg(figures.against_drift(study)), caption)],
        correlations,
    )


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; nan if one of them does not vary."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return float(scipy.stats.spearmanr(a, b).statistic)


def _left_without_adapters(study: fronts.Study, base: Mapping[str, Any]) -> Section:
    """Figure 5."""
    rows = [
        {"variant": name}
        | {f"{measure} lost": f"{lost(scores, base):.4f}" for measure, lost in fronts.MEASURES.items()}
        | {"task loss": f"{scores['task']['loss']:.4f}"}
        for name, scores in study.dropped.items()
    ]
    caption = "What the base of the adapters has lost against the original model, before any training."
    return Section(
        "What is left when BA is dropped",
        "Methods that take their product BA out of the base put a part of the model into the adapter. The less the base alone has "
        "lost, the less of what the model knows is exposed to training.",
        [Picture(figures.svg(figures.without_adapters(study)), caption)],
        rows,
    )


def _spread(found: fronts.Spread | None) -> str:
    """To two digits of its deviation."""
    if found is None:
        return "–"
    if not found.deviation > 0:
        return f"{found.mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(found.deviation)))
    return f"{found.mean:.{decimals}f} ± {found.deviation:.{decimals}f}"


SECTIONS: tuple[Callable[[Analysis], Section], ...] = (effective_ranks, spectra, directions, changes, leaks, drifts, outliers)


def check_free(out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise what `write` would raise of `out`: to be asked before the work, not after."""
    store.check_free(out, is_page, overwrite=overwrite)


def is_page(path: Path) -> bool:
    """Whether a file is a page of ours."""
    return path.is_file() and GENERATOR.encode() in path.read_bytes()[:1000]


def write(out: str | os.PathLike[str], title: str, intro: str, parts: Iterable[Section], *, overwrite: bool = False) -> Path:
    """One HTML file, whole or not at all. It refers to nothing outside of itself.

    Args:
        out: the file; must not exist yet.
        title: of the page.
        intro: a sentence below it: what the numbers were taken from.
        parts: the sections, in order.
        overwrite: replace an earlier page of ours.

    Raises:
        FileExistsError: if `out` is in the way, or another run is writing it.
        OSError: if it cannot be written; then nothing is left behind.
    """
    out = Path(os.path.abspath(out))

    def write_page() -> None:
        with store.new_file(out, overwritable=is_page, overwrite=overwrite) as part:
            part.write_text(page(title, intro, parts), encoding="utf-8")

    written_once(out, write_page)
    return out


def page(title: str, intro: str, parts: Iterable[Section]) -> str:
    """The page as text."""
    parts = list(parts)
    entries = "".join(f'<li><a href="#s{i}">{_escaped(part.title)}</a></li>' for i, part in enumerate(parts))
    body = "".join(_section(i, part) for i, part in enumerate(parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_escaped(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_escaped(title)}</h1>\n<p>{_escaped(intro)}</p>\n"
        f"<nav><ul>{entries}</ul></nav>\n{body}</body>\n</html>\n"
    )


def _section(number: int, part: Section) -> str:
    shown = [f'<section>\n<h2 id="s{number}">{_escaped(part.title)}</h2>\n<p>{_escaped(part.text)}</p>\n']
    for picture in part.pictures:
        # As an image, not in line: names inside one SVG file then never meet those of another.
        data = base64.b64encode(picture.svg.encode()).decode()
        caption = _escaped(picture.caption)
        shown.append(
            f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}"><figcaption>{caption}</figcaption></figure>\n'
        )
    shown.append(_table(part.table))
    if part.details:
        shown.append(f"<details><summary>all {len(part.details)} rows</summary>{_table(part.details)}</details>\n")
    if part.missing:
        shown.append(f'<p class="missing">{_escaped(part.missing)}</p>\n')
    return "".join([*shown, "</section>\n"])


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_escaped(title)}</th>" for title in rows[0])
    lines = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row.values()) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>\n'


def _trained(found: Analysis) -> list[Row]:
    """Rows, the first state's among them, of the adapters that were trained."""
    trained = {row["adapter"] for row in found.adapters if row["state"] != INITIAL}
    return [row for row in found.adapters if row["adapter"] in trained]


def _needed(*inputs: str | None) -> str | None:
    lacking = [each for each in inputs if each is not None]
    return f"Left out here: it needs {', and '.join(lacking)}." if lacking else None


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
