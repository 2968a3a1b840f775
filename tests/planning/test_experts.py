"""Experts in forecasts: each or pooled, and what a pass that routes tokens evenly sees."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from torch import nn
from typer.testing import CliRunner

from nullspace.cli import app
from nullspace.model.sites import find_targets
from nullspace.planning.experts import should_pool, tokens_an_expert
from nullspace.planning.forecast import forecast, is_pooled, survey_of
from nullspace.planning.plan import Rates, Workload

TINY: dict[str, Any] = {"samples": 64, "length": 24, "batch_size": 2, "rank": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def qwen() -> nn.Module:
    return mixture("qwen3_moe")


def test_one_sum_where_tokens_memory_or_time_are_short(qwen: nn.Module) -> None:
    targets = find_targets(qwen)
    experts = qwen.get_submodule("model.layers.0.mlp.experts")
    assert tokens_an_expert(experts, 72) == 36  # 2 of 4 experts
    rates = Rates.of("cpu", torch.float32, threads=2)
    enough: dict[str, Any] = {"tokens": 72.0, "rank": 4, "device": "cpu", "rates": rates}
    layers, bytes_of_a_layer = 2, 4 * 4 * 32 * 32
    assert not should_pool(targets, **enough)
    assert should_pool(targets, **{**enough, "tokens": 71.0})
    assert not should_pool(targets, **enough, free=2 * bytes_of_a_layer)
    assert should_pool(targets, **enough, free=2 * bytes_of_a_layer - 1)
    assert should_pool(targets, **enough, free=2 * bytes_of_a_layer, resident=True)
    assert not should_pool(targets, **enough, free=2 * layers * bytes_of_a_layer, resident=True)
    assert should_pool(targets, **{**enough, "rates": replace(rates, decomposition=1.0)})
    assert not should_pool(targets, **{**enough, "tokens": None})


def test_a_forecast_has_the_sites_of_a_run(qwen: nn.Module) -> None:
    for experts, expected in (("each", 4), ("pooled", 1)):
        survey = survey_of(qwen, Workload(**TINY, experts=experts))
        assert survey.tracked
        counts = Counter(site.name.partition("[")[0] for site in survey.sites)
        assert counts["model.layers.1.mlp.experts.gate_up_proj"] == expected
        assert counts["model.layers.1.mlp.experts.down_proj"] == 4
        shares = {site.name: site.share for site in survey.sites}
        assert shares["model.layers.1.mlp.experts.down_proj[2]"] == 0.5
        assert shares["model.layers.1.mlp.experts.gate_up_proj[0]"] == (0.5 if experts == "each" else 1.0)
        assert survey.reached == set(find_targets(qwen))
        assert {site.block for site in survey.sites if "experts" in site.name} == {0, 1}
    assert is_pooled(find_targets(qwen), Workload(**{**TINY, "samples": 2}))
    assert not is_pooled(find_targets(qwen), Workload(**TINY))
    plans = [forecast(qwen, Workload(**TINY, experts=experts)) for experts in ("each", "pooled")]
    each, pooled = (next(plan for plan in some if plan.strategy == "resident").host_parts["sums"] for some in plans)
    assert each > pooled


def test_the_plan_of_a_configuration_says_how_experts_are_summed(qwen: nn.Module, tmp_path: Path) -> None:
    config: Any = qwen.config
    config.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--rank", "4", "--length", "64", "--samples", "64", "--device", "cpu", "--json"]
    for options, experts in (
        (["--experts", "pooled"], "pooled"),
        ([], "each"),
        (["--batch-size", "1", "--samples", "1"], "pooled"),
    ):
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["experts"] == experts
        assert document["covered_share"] > 0.98
