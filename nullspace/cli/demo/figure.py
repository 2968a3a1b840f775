"""The demo's figure: two panels of bars, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from nullspace.cli.demo.measure import Scores

COLORS = ("#8a8f98", "#d1495b", "#edae49", "#00798c")
WIDTH, ROW, TOP, NAMES_END, BAR = 760, 34, 56, 120, 200
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
    'font-family="system-ui, sans-serif" font-size="14" fill="#1f2328">\n<title>{title}</title>\n'
    '<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
)
TITLE = "What was learned, and how far the model has moved on text to be kept"


def draw(base_loss: float, scores: Mapping[str, Scores]) -> str:
    """The task loss as trained, and the KL to the base at equal learning (as trained, if there is none), a bar each.

    Args:
        base_loss: of the task, before.
        scores: shown name → what was measured.
    """
    is_equal = all(each.equal is not None for each in scores.values())
    loss = [base_loss, *(each.full.loss for each in scores.values())]
    kl = [0.0, *((each.equal or each.full).kl for each in scores.values())]
    names = ["base", *scores]
    parts = [_text(NAMES_END - 10, TOP + ROW * row + 20, name, anchor="end") for row, name in enumerate(names)]
    parts += _panel(NAMES_END, "learned: task loss (lower is better)", loss, [f"{each:.2f}" for each in loss])
    where = "at equal learning" if is_equal else "as trained"
    parts += _panel(WIDTH // 2 + 70, f"kept: KL to the base, {where}", kl, ["0", *(f"{each:.4f}" for each in kl[1:])])
    return SVG.format(width=WIDTH, height=TOP + ROW * len(names) + 16, title=TITLE, body="\n".join(parts))


def _panel(left: int, title: str, values: Sequence[float], labels: Sequence[str]) -> list[str]:
    """Horizontal bars from `left` on, with their labels behind them."""
    parts, largest = [_text(left, 30, title, weight="600")], max(*values, 1e-12)
    for row, (value, label) in enumerate(zip(values, labels, strict=True)):
        top, long = TOP + ROW * row, BAR * max(value, 0.0) / largest
        parts.append(f'<rect x="{left}" y="{top + 5}" width="{max(long, 1):.1f}" height="{ROW - 12}" fill="{COLORS[row]}"/>')
        parts.append(_text(left + max(long, 1) + 8, top + 20, label))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
