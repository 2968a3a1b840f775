"""A small mixed corpus made of what every Python carries, for those who give no text of their own.

English prose (the help texts of the language reference), questions with answers (docstrings), as plain text and as conversations,
and code (modules of the standard library). Nothing is downloaded, and no file is added. It is the same for all runs of one version
of Python, and differs a little between versions.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from nullspace.errors import InputError
from nullspace.integrations.transformers.chat import Conversation
from nullspace.integrations.transformers.packing import Mixture, Text

# Modules whose import does nothing else. Those that an installation lacks are left out.
MODULES = (
    *("argparse", "ast", "base64", "bisect", "builtins", "calendar", "cmath", "codecs", "collections", "colorsys", "configparser"),
    *("contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "email.message", "enum", "fractions"),
    *("ftplib", "functools", "gettext", "glob", "heapq", "html", "http.client", "imaplib", "inspect", "io", "ipaddress"),
    *("itertools", "json", "locale", "logging", "math", "mimetypes", "operator", "os", "pathlib", "pickle", "platform", "pprint"),
    *("queue", "random", "re", "sched", "secrets", "shelve", "shutil", "smtplib", "socket", "statistics", "string", "struct"),
    *("subprocess", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback", "types"),
    *("unittest", "unittest.mock", "urllib.parse", "urllib.request", "uuid", "warnings", "wave", "weakref", "zipfile"),
)
SHORTEST = 80  # characters of an answer
# Of the tokens. With these, every part lasts for 256 samples of 1024 tokens.
SHARES = {"prose": 3, "questions": 2, "conversations": 2, "code": 3}


def default_corpus(tokenizer: Any) -> Mixture:
    """Prose, code, and questions with answers.

    Half of the questions are conversations, for a tokenizer with a chat template; all of them are plain text for one without.

    Args:
        tokenizer: transformers'.

    Raises:
        ValueError: if this Python carries no documentation.
    """
    questions = _shuffled(_questions())
    chat = bool(getattr(tokenizer, "chat_template", None))
    asked = questions[: len(questions) // 2] if chat else questions
    parts: dict[str, list[Text]] = {
        "prose": [*_shuffled(_prose())],
        "questions": [f"Question: {question}\nAnswer: {answer}" for question, answer in asked],
        "conversations": [_conversation(*each) for each in questions[len(asked) :]],
        "code": [*_shuffled(_code())],
    }
    if not parts["prose"] and not questions:
        raise InputError("this Python carries no documentation to make a default of: give text that must be kept (keep=)")
    parts = {name: texts for name, texts in parts.items() if texts}
    shares = {**SHARES, **({} if chat else {"questions": SHARES["questions"] + SHARES["conversations"]})}
    return Mixture(parts, [shares[name] for name in parts])


def _conversation(question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, where="the default corpus")


def _shuffled(texts: list[Any]) -> list[Any]:
    """In an order without a meaning, so that the first texts are as mixed as all."""
    return random.Random(0).sample(texts, len(texts))


def _prose() -> list[str]:
    """The help texts of Python's language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a package of its own in some distributions
        return []
    return [topics[name] for name in sorted(topics)]


def _questions() -> list[tuple[str, str]]:
    """Question and answer for every public function, class and method of the modules that has a docstring."""
    documented: dict[str, str] = {}
    for name, module in _modules():
        prefix = "" if name == "builtins" else f"{name}."
        for member, value in _public(module, lambda each: inspect.isclass(each) or inspect.isroutine(each)):
            if getattr(value, "__module__", None) in (name, f"_{name}"):
                documented[prefix + member] = inspect.getdoc(value) or ""
                methods = _public(value, inspect.isroutine) if inspect.isclass(value) else []
                documented |= {f"{prefix}{member}.{method}": inspect.getdoc(each) or "" for method, each in methods}
    of_answer = {answer: name for name, answer in documented.items() if len(answer) >= SHORTEST}  # methods inherit docstrings
    return [(f"What is {name} in Python?", answer) for answer, name in of_answer.items()]


def _public(holder: Any, wanted: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in sorted(vars(holder).items()) if not name.startswith("_") and wanted(value)]


def _code() -> list[str]:
    """The source text of the modules that are written in Python."""
    files = (Path(getattr(module, "__file__", None) or "") for _, module in _modules())
    return [file.read_text(encoding="utf-8") for file in files if file.suffix == ".py" and file.is_file()]


def _modules() -> Iterator[tuple[str, ModuleType]]:
    for name in MODULES:
        try:
            yield name, importlib.import_module(name)
        except ImportError:
            continue
