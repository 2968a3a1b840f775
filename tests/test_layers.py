"""The layers of the package: no module imports from above, none stands outside, and there is no circle."""

from __future__ import annotations

import ast
import graphlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the ground up. A module may import from its own package and from those before it. `nullspace` is the public interface.
LAYERS = (
    *("errors", "checks", "progress", "tables", "devices"),
    *("csrc_triton", "solvers", "distributed", "moments", "model", "planning", "artifacts"),
    *("factors", "methods", "analysis", "calibration", "reporting", "integrations", "nullspace", "cli", "__main__"),
)
# What importing a module may import of other distributions: what `nullspace` is always installed with, and for some packages more.
CORE = {"filelock", "numpy", "safetensors", "scipy", "threadpoolctl", "torch", "tqdm"}
MORE = {
    "csrc_triton": {"triton"},
    "reporting": {"vl_convert"},
    "integrations": {"huggingface_hub", "peft", "transformers", "yaml"},
    "cli": {"rich", "typer"},
    "__main__": {"rich", "typer"},
}


def read_modules(root: Path) -> dict[str, ast.Module]:
    """Every module under `root`/nullspace by its name, which begins with `nullspace`."""
    modules = {}
    for folder, _, files in os.walk(root / "nullspace", followlinks=True):
        for file in (Path(folder, name) for name in files if name.endswith(".py")):
            parts = file.relative_to(root).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = ast.parse(file.read_text())
    return modules


def imports(node: ast.AST, *, typing: bool) -> Iterator[str]:
    """Names that importing a module imports; with `typing` also those of `if TYPE_CHECKING` and of functions."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif typing or not (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_typing_block(node)):
        for child in ast.iter_child_nodes(node):
            yield from imports(child, typing=typing)


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def own(names: set[str], modules: dict[str, ast.Module]) -> set[str]:
    """The modules of the package among imported names. Its version is written at the root and belongs to no layer."""
    names = {name for name in names if name.split(".")[0] == "nullspace" and name != "nullspace.__version__"}
    return {name if name in modules else name.rpartition(".")[0] or name for name in names}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def violations(root: Path) -> list[str]:
    """What is wrong with the imports of the package under `root`, a line each."""
    modules = read_modules(root)
    graph = {name: own(set(imports(tree, typing=True)), modules) - {name} for name, tree in modules.items()}
    runs = {name: set(imports(tree, typing=False)) for name, tree in modules.items()}
    texts = [f"{name} belongs to no layer" for name in modules if layer(name) not in LAYERS]
    for name in (name for name in modules if layer(name) in LAYERS):
        higher = LAYERS[LAYERS.index(layer(name)) + 1 :]
        texts += [f"{name} imports {each}, which is above it" for each in sorted(graph[name]) if layer(each) in higher]
        loaded: set[str] = set()
        todo = {name}
        while todo:
            each = todo.pop()
            loaded.add(each)
            todo |= (own(runs.get(each, set()), modules) | {each.rpartition(".")[0]} - {""}) - loaded
        for each in sorted(loaded & runs.keys()):
            others = {foreign.split(".")[0] for foreign in runs[each]} - {"nullspace", *sys.stdlib_module_names}
            texts += [f"{name} imports {other} in {each}" for other in sorted(others - CORE - MORE.get(layer(name), set()))]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        texts.append(f"a circle of imports: {' <- '.join(error.args[1])}")
    return texts


def test_the_package_keeps_its_layers() -> None:
    root = Path(__file__).parents[1]
    assert {"nullspace.csrc_triton.syrk", "nullspace.integrations.peft.inject"} <= set(read_modules(root))
    assert violations(root) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "solvers/eigen.py",
            "from nullspace.model import sites",
            "nullspace.solvers.eigen imports nullspace.model.sites, which is above it",
        ),
        ("checks.py", "def f():\n    import nullspace.tables", "nullspace.checks imports nullspace.tables, which is above it"),
        ("model/sites.py", "if TYPE_CHECKING:\n    from nullspace.model.linear import x", "a circle of imports: nullspace.model."),
        ("model/linear.py", "import nullspace", "nullspace.model.linear imports nullspace, which is above it"),
        (
            "model/linear.py",
            "from nullspace import __version__, NullSpace",
            "nullspace.model.linear imports nullspace, which is above it",
        ),
        ("odd.py", "", "nullspace.odd belongs to no layer"),
        (
            "model/linear.py",
            "try:\n    import peft.tuners\nexcept ImportError:\n    pass",
            "nullspace.model.linear imports peft in nullspace.model.linear",
        ),
        (
            "model/linear.py",
            "from nullspace.csrc_triton.syrk import x",
            "nullspace.model.linear imports triton in nullspace.csrc_triton.syrk",
        ),
    ],
)
def test_the_contract_sees_what_breaks_it(tmp_path: Path, file: str, text: str, expected: str) -> None:
    sound = {
        "__init__.py": "from nullspace.model.linear import x",
        "checks.py": "from nullspace import __version__",
        "tables.py": "import json",
        "csrc_triton/syrk.py": "import triton",
        "solvers/eigen.py": "def f():\n    import transformers",
        "model/linear.py": "import torch.nn\nfrom nullspace.model.sites import y\nif TYPE_CHECKING:\n    import peft",
        "model/sites.py": "from nullspace.checks import z",
        "integrations/peft.py": "import peft\nfrom nullspace.model import sites",
    }
    for name, content in sound.items():
        (tmp_path / "nullspace" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nullspace" / name).write_text(content)
    assert violations(tmp_path) == []
    (tmp_path / "nullspace" / file).write_text(f"{sound.get(file, '')}\n{text}")
    assert any(line.startswith(expected) for line in violations(tmp_path)), violations(tmp_path)
