"""What the package raises and warns of has classes of its own, which are also the builtin ones."""

from __future__ import annotations

import ast
import builtins
import inspect
import pickle
from pathlib import Path

import pytest

import nullspace
from nullspace import errors
from nullspace.distributed.errors import described, rebuilt

PACKAGE = Path(nullspace.__file__).parent
SOURCES = [path for each in ("nullspace", "integrations", "csrc_triton") for path in sorted((PACKAGE.parent / each).rglob("*.py"))]
CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
RAISED = [each for each in CLASSES if issubclass(each, nullspace.NullspaceError)]
WARNED = [each for each in CLASSES if issubclass(each, nullspace.NullspaceWarning)]
# Which Python's protocols ask for, and those that end a program.
PROTOCOL = {"AttributeError", "IndexError", "KeyError", "NotImplementedError", "StopIteration", "SystemExit"}


def is_builtin(name: str) -> bool:
    value = getattr(builtins, name, None)
    return isinstance(value, type) and issubclass(value, BaseException) and name not in PROTOCOL


def foreign(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and text of errors that are made of a builtin class, and of warnings without a category of ours.

    An OSError with several arguments is the operating system's, named again with its path.
    """
    bare = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name)]
    builtin = [(name.lineno, name.id) for name in bare if is_builtin(name.id)]
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(node.func)
        category = ast.unparse(node.args[1]) if len(node.args) > 1 else ""
        of_the_system = category and is_builtin(called) and issubclass(getattr(builtins, called), OSError)
        uncategorised = called in ("warnings.warn", "warn") and category not in {each.__name__ for each in WARNED}
        if (is_builtin(called) and not of_the_system) or uncategorised:
            builtin.append((node.lineno, ast.unparse(node)))
    return builtin


def test_every_raise_and_every_warning_has_a_class_of_ours() -> None:
    assert [(path.name, *each) for path in SOURCES for each in foreign(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("raise ValueError(f'{x}') from error", 1),
        ("raise TypeError", 1),
        ("def refusal(): return ValueError('no')", 1),
        ("raise OSError(error.errno, error.strerror, str(place)) from error", 0),
        ("raise AttributeError(name)", 0),
        ("raise InputError('no')", 0),
        ("raise type(error)(f'{name}: {error}')", 0),
        ("warnings.warn('careful', stacklevel=2)", 1),
        ("warnings.warn('careful', UserWarning, stacklevel=2)", 1),
        ("warnings.warn('careful', DataWarning, stacklevel=2)", 0),
        ("self.warn('careful')", 0),
    ],
)
def test_the_check_sees_builtin_classes(text: str, count: int) -> None:
    assert len(foreign(ast.parse(text))) == count


@pytest.mark.parametrize("kind", RAISED)
def test_an_error_is_caught_by_its_builtin_and_survives_other_processes(kind: type[nullspace.NullspaceError]) -> None:
    error = kind("layer 'a': no")
    builtin = [base for base in kind.mro() if base.__module__ == "builtins" and base not in (Exception, BaseException, object)]
    assert builtin or kind is nullspace.NullspaceError
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "layer 'a': no"
    if kind not in (nullspace.NullspaceError, errors.RankLost):  # RankLost is raised on all processes as it is
        assert type(rebuilt(*described(error))) is kind


def test_warnings_are_user_warnings() -> None:
    assert len(WARNED) > 2
    assert all(issubclass(each, UserWarning) for each in WARNED)
