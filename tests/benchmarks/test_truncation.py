"""What `benchmarks.truncation` measures, against dense matrices."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("benchmarks.truncation", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import truncation
from nullspace import Covariance
from nullspace.factors import LowRank


def test_errors_are_those_of_the_outputs_and_the_summary_finds_the_worst_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    change = {
        name: LowRank(torch.randn(24, 40, generator=generator), torch.randn(30, 24, generator=generator))
        for name in ("first", "last")
    }
    x = {text: torch.randn(90, 40, generator=generator).double() * torch.logspace(0, -2, 40) for text in truncation.TEXTS}
    moments = {text: dict.fromkeys(change, Covariance.from_matrix(rows.T @ rows)) for text, rows in x.items()}
    layers = list(truncation.measured(change, moments))
    for row in layers:
        delta, rows = (change[row["layer"]].B @ change[row["layer"]].A).double(), x["calibration"]
        values = torch.linalg.svdvals(delta @ rows.T)
        by_c, frobenius = row["errors"]["8"]["calibration"]
        assert by_c == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-5)
        assert by_c < frobenius
    summary = truncation.summarise(layers)
    worst = summary["16"]["held-out"]
    ratios = {row["layer"]: row["errors"]["16"]["held-out"][0] / row["errors"]["16"]["held-out"][1] for row in layers}
    assert worst["worst_ratio"] == ratios[worst["worst_layer"]] == max(ratios.values())
    assert summary["4"]["calibration"]["above_1"] == 0
    assert len(truncation.table(summary, 2)) == 2 + 9
