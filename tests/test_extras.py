"""Optional packages: where one is missing, an error names the command that installs it, and that extra brings the package."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

# Whole, before parts of it are made missing.
import peft as peft
import pytest

import nullspace
from nullspace.cli.demo import material
from nullspace.errors import MissingPackageError

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = {
    path: ast.parse(path.read_text())
    for each in ("nullspace", "integrations", "csrc_triton")
    for path in (ROOT / each).rglob("*.py")
}
LINE = re.compile(r"pip install (?:'nullspace-lora\[([a-z,]+)\]'|--no-deps ([a-z0-9-]+))")
# Modules whose distribution has another name.
NAMES = {"vl_convert": "vl-convert-python", "yaml": "transformers", "huggingface_hub": "transformers", "pyarrow": "datasets"}
# What PyTorch brings.
BROUGHT = {"jinja2", "typing_extensions"}
# Of a function in a file: it is only called after `nullspace.integrations` was imported, or what is needed was looked for.
LATER = {("init.py", "peft"), *(("demo", package) for package in material.NEEDED)}


def name_of(requirement: str) -> str:
    return re.split(r"[\s\[<>=;!~]", requirement)[0]


REQUIRED = {name_of(each).replace("-", "_") for each in PROJECT["dependencies"]}


def brings(extra: str) -> set[str]:
    """The distributions of an extra, and of those that it includes."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        inner = re.match(r"nullspace-lora\[(.+?)\]", requirement)
        found |= set().union(*map(brings, inner[1].split(","))) if inner else {name_of(requirement)}
    return found


def imported(tree: ast.AST, inside: tuple[ast.AST, ...] = ()) -> Iterator[tuple[str, tuple[ast.AST, ...]]]:
    """Each optional package that a module imports, and the nodes around the import."""
    for node in ast.iter_child_nodes(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        for top in {name.partition(".")[0] for name in names}:
            if top not in {*sys.stdlib_module_names, *REQUIRED, *BROUGHT, "nullspace"}:
                yield top, inside
        yield from imported(node, (*inside, node))


OPTIONAL = [(path, package, inside) for path, tree in SOURCES.items() for package, inside in imported(tree)]
# Importing any module in these imports the package first, which says what is missing.
GATES = ("csrc_triton", "integrations.peft", "integrations.transformers", "nullspace.cli")


def gate(path: Path) -> str:
    """The package of ours that is imported before a module, or the module itself."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return next((each for each in GATES if f"{module}.".startswith(f"{each}.")), module)


def is_in_a_function(inside: tuple[ast.AST, ...]) -> bool:
    return any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in inside)


AT_IMPORT = sorted({(gate(path), package) for path, package, inside in OPTIONAL if not is_in_a_function(inside)})


class Missing:
    """A finder that has a package not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a package missing; modules of ours are then imported anew, and forgotten after the test."""
    before = dict(sys.modules)

    def remove(package: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("nullspace", package)]:
            del sys.modules[name]
        # A class of its own would not be the one that the test looks for.
        sys.modules["nullspace.errors"] = before["nullspace.errors"]
        monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])

    yield remove
    for name in [name for name in sys.modules if name.partition(".")[0] == "nullspace"]:
        del sys.modules[name]
    sys.modules.update(before)


def check_line(text: str, package: str) -> None:
    """The text has an install line of an extra that brings the package."""
    line = LINE.search(text)
    assert line is not None, text
    assert line[1] in PROJECT["optional-dependencies"], text
    assert NAMES.get(package, package) in brings(line[1]), text


def qualified(name: str) -> str:
    top = name.partition(".")[0]
    return name if top == "nullspace" else f"nullspace.{name}"


@pytest.mark.parametrize(("module", "package"), AT_IMPORT)
def test_a_module_whose_package_is_missing_says_what_to_install(module: str, package: str, without: Any) -> None:
    without(package)
    if module == "csrc_triton":
        kernels = importlib.import_module("nullspace.csrc_triton")
        with pytest.raises(MissingPackageError) as raised:
            kernels.syrk_accumulate  # noqa: B018
    else:
        with pytest.raises(MissingPackageError) as raised:
            importlib.import_module(qualified(module))
    check_line(str(raised.value), package)
    assert f"No module named '{package}" in str(raised.value)


def test_what_is_imported_when_it_is_needed_says_it_too() -> None:
    seen = 0
    for path, package, inside in OPTIONAL:
        if not is_in_a_function(inside) or (path.name, package) in LATER or (path.parent.name, package) in LATER:
            continue
        seen += 1
        handlers = [handler for node in inside if isinstance(node, ast.Try) for handler in node.handlers]
        text = " ".join(ast.unparse(handler) for handler in handlers if "ImportError" in ast.unparse(handler))
        named = re.search(r"missing_package\(.+, '([a-z]+)', error\)", text)
        if named is not None:
            assert NAMES.get(package, package) in brings(named[1]), (path, package)
        else:
            assert (gate(path), package) in AT_IMPORT or LINE.search(text), (path, package)
    assert seen > 2


def test_every_install_line_in_the_code_is_one_of_an_extra() -> None:
    lines = {}
    for path, tree in SOURCES.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))):
            text = (
                node.value if isinstance(node, ast.Constant) else "".join(str(getattr(part, "value", "")) for part in node.values)
            )
            if isinstance(text, str) and "pip install" in text and path.name != "checks.py":
                lines[path.name, text] = LINE.findall(text)
    assert len(lines) > 2
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = {*re.findall(r"--no-deps ([a-z0-9-]+)", makefile)}.union(*map(brings, PROJECT["optional-dependencies"]))
    for (name, text), found in lines.items():
        assert len(found) == text.count("pip install"), (name, text)
        assert all(extra in PROJECT["optional-dependencies"] or package in known for extra, package in found), (name, text)


def test_extras_hold_what_they_need_and_no_other() -> None:
    packages = {NAMES.get(package, package) for _, package, _ in OPTIONAL}
    assert packages <= set().union(*map(brings, PROJECT["optional-dependencies"]))
    assert {"peft", "transformers"} <= brings("cli") & brings("quantised") & brings("gguf")
    assert brings("test") >= set().union(*map(brings, ("cli", "gguf", "quantised", "report", "triton")))


def test_the_command_without_its_packages_ends_with_one_line(without: Any) -> None:
    without("typer")
    main = importlib.import_module("nullspace.__main__").main
    with pytest.raises(SystemExit) as ended:
        main()
    check_line(str(ended.value.code), "typer")
    assert "\n" not in str(ended.value.code)
    module, _, function = PROJECT["scripts"]["nullspace"].partition(":")
    assert (module, function) == (main.__module__, main.__name__)


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_data_whose_reader_is_missing_say_it_and_text_files_need_none(package: str, without: Any, tmp_path: Path) -> None:
    without(package)
    rows = importlib.import_module("nullspace.integrations.transformers.rows")
    name = "somebody/rows" if package == "datasets" else str(tmp_path / "rows.parquet")
    with pytest.raises(MissingPackageError, match=re.escape(name)) as raised:
        next(rows.rows_of(name, "train"))
    check_line(str(raised.value), package)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert list(rows.rows_of(tmp_path / "rows.jsonl", "train")) == [{"text": "a"}]


def test_a_package_that_is_too_old_is_an_install_line_too(without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.core_model_loading as newer

    monkeypatch.delattr(newer, "revert_weight_conversion")
    without("nothing")
    with pytest.raises(MissingPackageError, match="cannot import name 'revert_weight_conversion'") as raised:
        importlib.import_module("nullspace.integrations.peft")
    check_line(str(raised.value), "transformers")


def test_the_package_itself_needs_none_of_them() -> None:
    assert nullspace.__version__
    assert {"peft", "transformers", "typer", "rich", "triton"}.isdisjoint(REQUIRED)
