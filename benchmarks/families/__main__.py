"""`python -m benchmarks.families`: survey every architecture, keep a row of each, and write the page that shows them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path

from benchmarks.children import forked
from benchmarks.environment import RESULTS, environment
from benchmarks.families.build import architectures
from benchmarks.families.page import page_of
from benchmarks.families.records import read, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "families.jsonl", help="JSON Lines, a row an architecture")
    parser.add_argument("--page", type=Path, help="the page to write of all rows")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=(), help="families or classes")
    parser.add_argument("--again", action="store_true", help="survey also those that the file has")
    parser.add_argument("--at-once", type=int, default=2, help="architectures at the same time, one thread each")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds an architecture")
    given = parser.parse_args()
    rows = {row["class"]: row for row in read(given.out)[1]} if given.out.exists() else {}
    names = [name for name in chosen(given.only) if given.again or name not in rows]
    made_by = environment()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, row in forked("benchmarks.families.survey", "survey", names, at_once=given.at_once, timeout=given.limit):
        rows[name] = {"class": name, **row, "commit": made_by["commit"]}
        write(given.out, made_by, (rows[known] for known in architectures() if known in rows))
        print(f"{name}: {in_short(row)}", flush=True)
    if given.page is not None:
        given.page.write_text(page_of(*read(given.out)), encoding="utf-8")


def chosen(only: Collection[str]) -> list[str]:
    """Class names of all architectures, or of those that are named, or whose family is."""
    known = architectures()
    unknown = [name for name in only if not any(name in (each.name, each.family) for each in known.values())]
    if unknown:
        raise SystemExit(f"no such family or class: {', '.join(unknown)}")
    return [name for name, each in known.items() if not only or name in only or each.family in only]


def in_short(row: dict[str, object]) -> str:
    """One line."""
    if "failed" in row or not row["built"]:
        return str(row.get("failed") or f"not built: {row['message']}")[:160]
    steps = {key: value for key, value in row.items() if isinstance(value, dict) and "result" in value}
    parts = [f"{name} {step['result']}" for name, step in steps.items()]
    return f"{row.get('share', 0.0):.2%} of {row.get('reached', 0.0):.0%}, {', '.join(parts)}, {row['seconds']} s"


if __name__ == "__main__":
    main()
