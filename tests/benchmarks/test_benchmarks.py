"""The benchmarks' own parts: shapes as published, sane activations, and a dry run of what is meant for a GPU."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("benchmarks.shapes", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import gpu_models, shapes

DRY = argparse.Namespace(
    model="tiny", blocks=2, samples=4, length=64, batch_size=2, rank=8, device="cpu", corda_blocks=1, corda_samples=2
)


@pytest.mark.parametrize("name", shapes.PARAMETERS)
def test_shapes_are_as_published(name: str) -> None:
    model = shapes.empty(name)
    assert sum(p.numel() for p in model.parameters()) == shapes.PARAMETERS[name]
    assert len(shapes.empty(name, blocks=2).model.layers) == 2


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="no shape 'Llama-9'"):
        shapes.config("Llama-9")
    with pytest.raises(ValueError, match="4 blocks, not 5"):
        shapes.config("tiny", blocks=5)


def inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    heard: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: heard.__setitem__(name, args[0]))
    with torch.no_grad():
        model(ids)
    return heard


def test_a_built_model_is_whole_and_its_activations_are_of_order_one() -> None:
    model = shapes.build("tiny", dtype=torch.float32)
    ids = torch.randint(1, 211, (2, 64))
    # Loading its weights into a model that was made the ordinary way, with its own rotary tables, changes nothing.
    other = transformers.LlamaForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
    assert all(0.2 < float(x.std()) < 5 for x in inputs(model, ids).values())


def test_planted_tokens_are_massive_and_others_are_not() -> None:
    model = shapes.build("tiny", dtype=torch.float32, massive=True)
    ids = torch.randint(1, 211, (2, 64))
    ids[:, 0] = 0
    x = inputs(model, ids)["model.layers.0.mlp.down_proj"].norm(dim=-1)
    assert float(x[:, 0].min()) > 6 * float(x[:, 1:].median())
    assert float(x[:, 1:].max()) < 4 * float(x[:, 1:].median())


@pytest.mark.parametrize("variant", ["forward", "sums", "resident", "corda"])
def test_dry_run(variant: str) -> None:
    result = gpu_models.run_variant(DRY, variant)
    assert result["seconds"] > 0
    assert result["blocks"] == (1 if variant == "corda" else 2)
    assert result["compile_s"] > 0
    assert result["startup_s"]["python and imports"] > 0
    if variant == "resident":
        assert result["on_device_s"]["solves"] > 0
        assert list(result["ends_s"])[-2:] == ["null spaces", "injection"]
        assert result["sites"] == 8
        assert 0 < result["leak"]["median"] <= result["leak"]["max"] < 1


def test_summary_marks_what_is_extrapolated() -> None:
    runs = [
        {"round": 0, "variant": "forward", "blocks": 2, "seconds": 1.0, "peak_gb": 1.0},
        {"round": 0, "variant": "sums", "blocks": 2, "seconds": 1.5, "peak_gb": 1.0},
        {"round": 0, "variant": "resident", "blocks": 2, "seconds": 3.0, "peak_gb": 2.0, "leak": {"median": 0.1, "max": 0.2}},
        {"round": 0, "variant": "layerwise-host", "failed": "not done in 3 s", "wall": 3.0},
    ]
    summary = gpu_models.summarise(runs, depth=8)
    assert summary["resident"]["time_over_forward"] == 3
    assert summary["resident"]["extrapolated_seconds_all_blocks"] == 12
    assert "layerwise-host" not in summary
    assert list(summary["resident"]["parts_s"].values()) == [1.0, 0.5, 1.5]


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nothing is interpreted")
def test_the_ways_to_sum_experts_agree_within_what_they_promise() -> None:
    pytest.importorskip("triton")
    from benchmarks.first_gpu import experts

    block = experts.BLOCKS["cpu"]
    routed = experts.route(block, 24, 40, torch.device("cpu"))
    assert torch.equal(routed.x, routed.unsorted[routed.rows])
    assert int(routed.offsets[-1]) == len(routed.x) == 24 * block.chosen
    errors = {name: row["error"] for name, row in experts.measured(routed, rounds=0).items()}
    assert all(errors[name] <= 1e-6 for name in (*experts.EXACT, "mm"))
    assert 1e-6 < errors["grouped_mm"] < 1e-2  # the error that is reported is one: bfloat16's
