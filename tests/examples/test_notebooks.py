"""The notebooks: a valid format, and their cells, executed in order in one namespace with a tiny model. Jupyter is not needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from material import EXAMPLES, Material

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
named = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@named
def test_format(notebook: Path) -> None:
    """nbformat 4.5, without outputs; one cell has the tag by which papermill and others replace values."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in ids)
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert [cell["id"] for cell in code if "parameters" in cell["metadata"].get("tags", ())] == [code[0]["id"]]
    assert notebook.read_text(encoding="utf-8").endswith("\n")
    nbformat = pytest.importorskip("nbformat", reason="the format was looked at without nbformat, which is not installed")
    nbformat.validate(nbformat.reads(notebook.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::nullspace.errors.DataWarning")
@named
def test_cells_run_in_order(
    notebook: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = {"model_name": material.model, "task_data": material.questions, "keep_data": material.keep}
    tiny |= {"rows": 8, "samples": 2, "length": 128, "rank": 4, "steps": 3}
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    for cell in code:
        exec(compile(source(cell), f"{notebook.name}:{cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert tiny.keys() <= names.keys()
            names |= tiny
    table = capsys.readouterr().out.splitlines()
    numbers = [float(number) for line in table[-2:] for number in re.findall(r" (\d+\.\d+)", line)]
    assert len(numbers) == 4  # losses and divergences of two adapters
    if "results" in names:
        assert names["results"]["before"][1] == 0.0
        assert all(names["results"][each][1] > 0 for each in ("plain LoRA", "contrast"))
    else:
        assert names["done"].after.left < 1
        assert numbers[3] < numbers[1]  # the repaired adapter changes the kept text less
