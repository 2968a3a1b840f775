"""The reference pages have every public name, and every public name has a docstring."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nullspace

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PAGES = sorted(REFERENCE.glob("*.md"))
# For other modules of the package, and not for its users.
HELPERS = {
    "column_signs",
    "decompose",
    "decomposition_cost",
    "deflated",
    "deflated_root",
    "drop_quantizer",
    "make_room",
    "one_thread_each",
    "side_by_side",
    "spared",
    "takers",
}


def title(page: Path) -> str:
    """The module that a page is of."""
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def is_code(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value)


def public_names(module: Any) -> set[str]:
    """Functions and classes of a module's `__all__`; without one, those that it defines."""
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    names = getattr(module, "__all__", None) or own
    return {name for name in names if not name.startswith("_") and is_code(getattr(module, name))} - HELPERS


def documented(page: Path) -> list[tuple[str, Any]]:
    """(name, object) of a page's `:::` lines; objects of a lazy module may be named in the submodule that defines them."""
    found = []
    for identifier in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        place, _, name = identifier.rpartition(".")
        found.append((name, getattr(importlib.import_module(place), name)))
    return found


def with_members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A function, or a class with its public methods and properties, those of our own base classes among them."""
    if not is_code(value):
        return
    yield name, value
    for base in inspect.getmro(value) if inspect.isclass(value) else ():
        if not base.__module__.startswith(nullspace.__name__):
            continue
        for member, each in vars(base).items():
            each = getattr(each, "__func__", each)  # of class and static methods
            if not member.startswith("_") and (inspect.isroutine(each) or isinstance(each, property)):
                yield f"{name}.{member}", each


ENTRIES = {page: documented(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_public_name_of_a_module_is_in_the_reference_and_has_a_docstring(page: Path) -> None:
    anywhere = {name for entries in ENTRIES.values() for name, _ in entries}
    assert public_names(importlib.import_module(title(page))) <= anywhere
    bare = [name for entry in ENTRIES[page] for name, value in with_members(*entry) if not (value.__doc__ or "").strip()]
    assert bare == []
