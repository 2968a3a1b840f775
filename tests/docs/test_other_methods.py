"""docs/other-methods.md has every method of the list below; the tests, functions and methods that its tables name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nullspace
from nullspace import factors, solvers
from nullspace.integrations import peft
from nullspace.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
NAMES = """
LoRA, QLoRA, LoftQ, LQ-LoRA, QA-LoRA, DoRA, rsLoRA, LoRA+, LoRA-FA, AFLoRA, AdaLoRA, SoRA, DyLoRA, ALoRA, AutoLoRA,
PRILoRA, LoRA-drop, LoRA-prune, PiSSA, MiLoRA, CorDA, EVA, OLoRA, LoRA-GA, LoRA-XS, SC-LoRA, LoRA-Null, VeRA, VB-LoRA,
NOLA, Tied-LoRA, HRA, Delta-LoRA, ReLoRA, MELoRA, FLoRA, FLORA, XGBLoRA, TriLoRA, BiLoRA, LongLoRA, O-LoRA, AM-LoRA,
Online-LoRA, RoseLoRA, L-LoRA, BYOM-LoRA, LoRAHub, X-LoRA, MixLoRA, HydraLoRA, MaLoRA, AlphaEdit, SVD-LLM, ASVD
"""
SERVED, COMPOSES, OUT = "served", "composes", "out of scope"


class Row(NamedTuple):
    method: str
    here: str
    by: list[str]
    short: str


def rows() -> Iterator[Row]:
    for line in (ROOT / "docs" / "other-methods.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ["):
            method, here, by, short = (cell.strip() for cell in line.strip("|").split("|"))
            named = re.fullmatch(r"\[([^]]+)\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", method)
            assert named is not None, method
            names = re.findall(r"`([^`]+)`", by)
            assert by == ", ".join(f"`{name}`" for name in names), by
            yield Row(named[1], here, names, short)


def functions_of_tests() -> dict[str, str]:
    """The name of every test → the text of its file, in which its cases are named."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    return {name: text for text in texts for name in re.findall(r"^def (test_\w+)\(", text, flags=re.MULTILINE)}


def test_every_method_has_a_row() -> None:
    assert sorted(row.method for row in rows()) == sorted(NAMES.replace("\n", " ").strip().split(", "))


def test_what_the_tables_name_exists() -> None:
    known = functions_of_tests()
    ours = {*METHODS, *(name for module in (nullspace, factors, solvers, peft) for name in module.__all__)}
    for row in rows():
        of_tests = [name for name in row.by if name.startswith("test_")]
        assert set(row.by) - set(of_tests) <= ours, row
        for name, _, case in (name.rstrip("]").partition("[") for name in of_tests):
            assert name in known, (row.method, name)
            assert not case or f'"{case}"' in known[name], (row.method, name, case)
        if row.here == OUT:
            assert row.short, row
            assert not row.by, row
        else:
            assert row.here in (SERVED, COMPOSES), row
            assert of_tests if row.here == COMPOSES else row.by, row
