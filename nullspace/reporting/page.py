"""A report as one HTML file that requests nothing from outside of itself: a head with findings, and a list of `Section`s.

`page.css` is its style, light and dark. `page.js` draws the figures by the embedded Vega-Lite, and sorts the tables. The page's
content security policy forbids all requests.
"""

from __future__ import annotations

import base64
import csv
import gzip
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nullspace.artifacts import store
from nullspace.artifacts.shared_writes import written_once
from nullspace.reporting.charts import Figure, library
from nullspace.reporting.study import Spread
from nullspace.reporting.verdict import Finding

# Identifies a page of ours.
GENERATOR = '<meta name="generator" content="nullspace">'
# Only what is in the page itself may run or be shown.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_HERE = Path(__file__).parent
_LEVELS = {"good": "good", "look": "look here", "fact": "measured", "unknown": "not known"}


@dataclass(frozen=True)
class Table:
    """Rows of values, shown with a format a column, and offered as CSV with all digits.

    Attributes:
        name: of the CSV file, without `.csv`.
        rows: column title → text, number, `Spread` or None; all with the same columns.
        formats: column title → format specification of its numbers; by default `.4g`, and all digits for integers.
    """

    name: str
    rows: Sequence[Mapping[str, Any]] = ()
    formats: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        title: of the section.
        text: one or two sentences: what is shown, and how to read it.
        figures: in order.
        table: the main one, if any.
        details: a longer one, shown on request.
        missing: which inputs would add more.
    """

    title: str
    text: str
    figures: Sequence[Figure] = ()
    table: Table | None = None
    details: Table | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Head:
    """What stands above the sections.

    Attributes:
        title: of the page.
        facts: name → text: model, method, date, versions, command.
        findings: the verdict, sentence by sentence.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    findings: Sequence[Finding] = ()


def is_page(path: Path) -> bool:
    """Whether a file is a page of ours."""
    return path.is_file() and GENERATOR.encode() in path.read_bytes()[:1000]


def write(out: str | os.PathLike[str], head: Head, parts: Iterable[Section], *, overwrite: bool = False) -> Path:
    """Write one HTML file, complete or not at all.

    Args:
        out: the file; must not exist yet.
        head: title, facts and findings.
        parts: the sections, in order.
        overwrite: replace an earlier page of ours.

    Raises:
        FileExistsError: if `out` is in the way, or another run is writing it.
        OSError: if it cannot be written; then nothing is left behind.
    """
    out = Path(os.path.abspath(out))

    def write_page() -> None:
        with store.new_file(out, overwritable=is_page, overwrite=overwrite) as part:
            part.write_text(page(head, parts), encoding="utf-8")

    written_once(out, write_page)
    return out


def page(head: Head, parts: Iterable[Section]) -> str:
    """The page as text."""
    parts = list(parts)
    links = [("verdict", "Verdict")] if head.findings else []
    links += [(f"s{i}", part.title) for i, part in enumerate(parts)]
    entries = "".join(f'<li><a href="#{target}">{_escaped(title)}</a></li>' for target, title in links)
    drawn: list[Figure] = []
    body = "".join(_section(i, part, drawn) for i, part in enumerate(parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_escaped(head.title)}</title>\n'
        f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f'<nav aria-label="Sections"><ul>{entries}</ul></nav>\n<main>\n{_head(head)}{body}</main>\n'
        f"{_scripts(drawn)}</body>\n</html>\n"
    )


def _scripts(drawn: Sequence[Figure]) -> str:
    """The figures as data, and what draws them; a page without figures needs no library."""
    figures = [{"series": list(each.series), "panels": [panel.spec for panel in each.panels]} for each in drawn]
    text = json.dumps(figures, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Of a large model there are megabytes of it, a tenth of that compressed. Without a date, for equal pages from equal numbers.
    data = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    scripts = [library(), _asset("page.js")] if drawn else [_asset("page.js")]
    shown = "".join(f'<script type="module">{_inline(script)}</script>\n' for script in scripts)
    without = '<noscript><p class="missing">The figures need JavaScript; the tables do not.</p></noscript>\n' if drawn else ""
    return f'{without}<script type="application/gzip" id="figures">{data}</script>\n{shown}'


def _head(head: Head) -> str:
    facts = "".join(f"<dt>{_escaped(name)}</dt><dd>{_escaped(text)}</dd>" for name, text in head.facts.items() if text)
    findings = "".join(
        f'<li class="{each.level}"><span>{_LEVELS[each.level]}</span>'
        f"<p><strong>{_escaped(each.about)}.</strong> {_escaped(each.text)}</p></li>\n"
        for each in head.findings
    )
    verdict = f'<section id="verdict" class="verdict"><h2>Verdict</h2><ul>\n{findings}</ul></section>\n' if findings else ""
    return f"<header>\n<h1>{_escaped(head.title)}</h1>\n" + (f"<dl>{facts}</dl>\n" if facts else "") + f"</header>\n{verdict}"


def _section(number: int, part: Section, drawn: list[Figure]) -> str:
    """One section; its figures are added to those drawn so far."""
    shown = [f'<section id="s{number}">\n<h2>{_escaped(part.title)}</h2>\n<p>{_escaped(part.text)}</p>\n']
    for figure in part.figures:
        shown.append(_figure(len(drawn), figure))
        drawn.append(figure)
    if part.table is not None and part.table.rows:
        shown.append(_table(part.table))
    if part.details is not None and part.details.rows:
        count = len(part.details.rows)
        shown.append(f"<details><summary>all {count} rows</summary>{_table(part.details)}</details>\n")
    if part.missing:
        shown.append(f'<p class="missing">{_escaped(part.missing)}</p>\n')
    return "".join([*shown, "</section>\n"])


def _figure(number: int, figure: Figure) -> str:
    """Where `page.js` draws the figure: a legend of buttons, and a place for each panel."""
    panels = "".join(
        f'<div class="panel"><h3>{_escaped(panel.title)}</h3><div class="plot" data-panel="{number} {i}"></div></div>'
        for i, panel in enumerate(figure.panels)
    )
    return (
        f'<figure data-figure="{number}"><div class="legend" role="group" aria-label="Show or hide"></div>'
        f'<div class="panels{" wide" if figure.wide else ""}">{panels}</div>'
        f"<figcaption>{_escaped(figure.caption)}</figcaption></figure>\n"
    )


def _table(table: Table) -> str:
    titles = list(table.rows[0])
    texts = {title for title in titles if any(isinstance(row[title], str) for row in table.rows)}
    head = "".join(
        f'<th scope="col"{" class=text" if title in texts else ""}><button type="button">{_escaped(title)}</button></th>'
        for title in titles
    )
    lines = "".join(
        "<tr>" + "".join(_cell(row[title], table.formats.get(title), title in texts) for title in titles) + "</tr>\n"
        for row in table.rows
    )
    data = base64.b64encode(as_csv(table).encode()).decode()
    link = f'<a class="csv" download="{_escaped(table.name)}.csv" href="data:text/csv;charset=utf-8;base64,{data}">CSV</a>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>{link}\n'


def _cell(value: Any, spec: str | None, is_text: bool) -> str:
    """A cell; `data-value` is what the column is sorted by, if that is a number."""
    number = value.mean if isinstance(value, Spread) else value
    sorted_by = f' data-value="{number:.12g}"' if isinstance(number, int | float) and math.isfinite(number) else ""
    return f"<td{' class=text' if is_text else ''}{sorted_by}>{_escaped(shown(value, spec))}</td>"


def shown(value: Any, spec: str | None = None) -> str:
    """A value as a cell's text: – for None, and of a `Spread` the mean to two digits of the deviation."""
    if value is None:
        return "–"
    if isinstance(value, Spread):
        if not value.deviation > 0:
            return f"{value.mean:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(value.deviation)))
        return f"{value.mean:.{decimals}f} ± {value.deviation:.{decimals}f}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(value, spec if spec is not None else "," if isinstance(value, int) else ".4g")
    return str(value)


def as_csv(table: Table) -> str:
    """The table with all digits: a `Spread` takes two columns; None and the deviation of one seed are empty."""
    out = io.StringIO()
    titles = list(table.rows[0])
    spreads = {title for title in titles if any(isinstance(row[title], Spread) for row in table.rows)}
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow([name for title in titles for name in ([title, f"{title}, deviation"] if title in spreads else [title])])
    for row in table.rows:
        cells: list[Any] = []
        for title in titles:
            value = row[title]
            if title in spreads:
                cells += [value.mean, "" if math.isnan(value.deviation) else value.deviation] if value is not None else ["", ""]
            else:
                cells.append("" if value is None else value)
        writer.writerow(cells)
    return out.getvalue()


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """A script that cannot end its element: both sequences occur in strings and comments alone."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
