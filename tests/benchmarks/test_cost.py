"""The model of the cost of one GPU: what it counts, what it does with measurements, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("benchmarks.cost_model", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import cost_model, cost_page, shapes
from benchmarks.cost_model import H100, Work, measured_on, price, results_in
from benchmarks.environment import RESULTS
from nullspace.planning.plan import Rates
from nullspace.planning.survey import Survey
from nullspace.solvers.cost import EIGH_COLUMN, INVERT_MIN_D_ON_CUDA, decomposition_cost


def test_counts_are_those_of_the_planner() -> None:
    work = Work("tiny", samples=6, length=32, batch_size=2)
    survey = Survey(shapes.empty("tiny"), batch_size=2, length=32)
    count, widths, flops, weights = work.counts()
    assert count == len(survey.block_flops)
    assert widths == [site.d_in for site in survey.sites_of(0)]
    assert flops == survey.block_flops[0] * work.updates
    assert weights == pytest.approx(survey.block_weights[0], rel=0.01)  # but for the norms


def test_the_planner_counts_with_what_an_h100_took() -> None:
    assumed, measured = Rates.of("cuda", torch.bfloat16), RESULTS / "first_gpu-h100"
    found = measured_on(results_in(measured))
    for name in ("forward", "transfer"):
        assert getattr(assumed, name) == pytest.approx(getattr(found, name).middle, rel=0.1), name
    job = json.loads((measured / "job.json").read_text())["rows"]
    seconds = {row["variant"]: row["seconds"] for row in job if row.get("blocks") == 2 and "seconds" in row}
    sums = 256 * 1024 * 2 * (3 * 4096**2 + 14336**2)
    assert assumed.sums == pytest.approx(sums / (seconds["sums-layerwise"] - seconds["forward"]), rel=0.1)
    more = json.loads((measured / "more.json").read_text())
    for row in more["second"]:
        if row["what"] == "whole" and row["d"] >= INVERT_MIN_D_ON_CUDA[9, 0]:
            inverting = decomposition_cost(row["d"], 128, "cuda", assumed.decomposition)[2] / assumed.decomposition
            assert inverting == pytest.approx(row["seconds"], rel=0.2)
            every = 9 * row["d"] ** 3 / assumed.decomposition + EIGH_COLUMN * row["d"]
            assert every == pytest.approx(row["eigh"], rel=0.15)
    assert assumed.estimated  # for another card, and another model
    assert H100.rates().estimated


def test_the_kernel_is_no_faster_than_its_tensor_cores() -> None:
    for d, tokens in ((4096, 8192), (14336, 16384), (100, 128)):
        seconds = H100.kernel_seconds(d, tokens)
        assert 0 < seconds.low < seconds.high
        assert d * d * tokens / seconds.low < 989e12


def test_totals_are_made_of_their_parts() -> None:
    found = price(Work("Llama-3-8B"))
    parts = [found.parts[name] for name in ("forward", "kernel", "staging", "solves")]
    assert found.total.low == pytest.approx(sum(part.low for part in parts))
    assert sum(part.low for part in parts[:3]) < found.overlapped.low < found.total.low < found.eigh.low
    one = price(Work("Llama-3-8B", blocks=1))
    assert found.parts["solves"].high == pytest.approx(32 * one.parts["solves"].high)
    assert price(Work("Llama-3-70B", weights="host")).parts["weights"].low > 0


def test_every_figure_of_the_page_says_what_it_is_and_the_page_is_the_one_that_is_kept() -> None:
    text = cost_page.page(cost_page.kept())
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line and "| status |" not in line]
    assert len(rows) > 40
    assert all(line.split("|")[-2].split(",")[0].strip() in ("forecast", "measured", "from measured rates") for line in rows)
    kept = (RESULTS / "cost.md").read_text()
    assert text == kept, "the model or a result has changed: python -m benchmarks.cost_page"


# Made up: everything takes what these figures say.
ROWS: dict[str, list[dict[str, Any]]] = {
    "kernels": [
        {"ceiling": "copy of 1 GiB, TB/s read and written", "value": 2.5},
        {"variant": "default", "d": 14336, "tokens": 16384, "ms": 9.0, "cublas_ms": 12.0},
        {"variant": "default", "exact": True},
    ],
    "solvers": [
        {"what": "part", "d": 4096, "cholesky_tflops": 20.0},
        {"what": "part", "d": 4096, "width": 72, "solve_s": 2 * 4096**2 * 72 / 5e12},
        {"method": "torch.linalg.eigh", "d": 4096, "k": 128, "seconds": 9 * 4096**3 / 4e12},
        {"method": "shift-invert", "d": 4096, "k": 128, "seconds": 1.0},
        {"n": 720, "host_s": 0.1},
        {"at once": 3, "over one after the other": 0.5},
    ],
    "job": [{"variant": "forward", "blocks": 2, "seconds": 1.0}, {"variant": "corda", "blocks": 1, "failed": "not done"}],
}


def test_what_first_gpu_has_measured_replaces_the_forecast(tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        result = {"command": name, "dry_run": False, "environment": {"gpu": "a GPU"}, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "sums.json").write_text(json.dumps({"command": "sums", "dry_run": True, "rows": []}))
    results = results_in(tmp_path)
    assert set(results) == set(ROWS)
    gpu = measured_on(results)
    assert gpu.name == "a GPU"
    assert {name for name, figure in gpu.figures().items() if not figure.measured} == {"launch", "transfer", "small"}
    assert (gpu.cholesky.middle, gpu.eigh.middle, gpu.side_by_side.middle) == pytest.approx((20e12, 4e12, 2.0))
    assert gpu.solves.middle == pytest.approx(5e12)
    _, _, flops, _ = Work("Llama-3-8B").counts()
    assert gpu.forward.middle == pytest.approx(2 * flops)
    assert not gpu.rates().estimated
    assert gpu.kernel_seconds(4096, 8192).status == "from measured rates"
    text = cost_page.page({"first_gpu-a": results})
    assert "| shift-invert, d = 4,096 | 1 | " in text
    assert "Nothing on this page was measured" not in text


def test_other_files_and_other_shapes_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert results_in(tmp_path) == {}
    with pytest.raises(ValueError, match="no shape 'Llama-9'"):
        Work("Llama-9").counts()
    assert cost_model.Figure(1.0, 4.0, "").middle == 2.0
