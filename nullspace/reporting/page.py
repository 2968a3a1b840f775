"""A report as one HTML file that refers to nothing outside of itself: a page is a list of `Section`s."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nullspace.artifacts import store
from nullspace.artifacts.shared_writes import written_once

# Identifies a page of ours.
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
    """A figure as SVG text, and its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        title: of the section.
        text: one or two sentences: what is shown, and how to read it.
        pictures: figures, in order.
        table: rows, column title → text; all with the same columns.
        details: a longer table, shown on request.
        missing: which inputs would add more.
    """

    title: str
    text: str
    pictures: Sequence[Picture] = ()
    table: Sequence[Mapping[str, str]] = ()
    details: Sequence[Mapping[str, str]] = ()
    missing: str | None = None


def is_page(path: Path) -> bool:
    """Whether a file is a page of ours."""
    return path.is_file() and GENERATOR.encode() in path.read_bytes()[:1000]


def write(out: str | os.PathLike[str], title: str, intro: str, parts: Iterable[Section], *, overwrite: bool = False) -> Path:
    """Write one HTML file, complete or not at all.

    Args:
        out: the file; must not exist yet.
        title: of the page.
        intro: a sentence below it: the sources of the numbers.
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
        # As an image, not inline, so that names inside one SVG file do not collide with those of another.
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


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
