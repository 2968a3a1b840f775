"""Forecasts: their parts against the things themselves, how they grow, and what is chosen."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import models
from models import random_batches, tiny
from nullspace import compute_null_spaces
from nullspace.calibration.stream import stream_covariances
from nullspace.cli import app
from nullspace.moments.triangle import LowerTriangle
from nullspace.planning.choice import choose, choose_strategy, closest, fit
from nullspace.planning.forecast import forecast
from nullspace.planning.memory import pinned_bytes, power_of_two
from nullspace.planning.meta_run import LiveBytes, watch
from nullspace.planning.plan import MARGIN, Plan, Rates, Workload
from nullspace.planning.survey import Survey
from nullspace.planning.units import parse_size

HIDDEN, INNER, ITEM = 64, 176, 4
WORK = Workload(samples=8, length=32, batch_size=2, rank=8)
RATES = Rates(forward=1e12, sums=1e12, decomposition=1e11, transfer=1e10, disk=1e9, estimated=False)


def llama(blocks: int = 3, *, device: str = "meta", **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=211,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).eval()


def find(plans: list[Plan], strategy: str, weights: str, hidden_states: str | None = None) -> Plan:
    return next(p for p in plans if (p.strategy, p.weights) == (strategy, weights) and hidden_states in (None, p.hidden_states))


def block_sums(model: nn.Module) -> int:
    inputs = (HIDDEN, HIDDEN, HIDDEN, INNER)  # q/k/v, o, gate/up, down
    return sum(LowerTriangle(d).packed.nbytes + 8 * d for d in inputs)


def staging() -> int:
    """The kernels' buffers of one block's sites: 512 rows, float32."""
    return 512 * (3 * HIDDEN + INNER) * ITEM


def test_sums_weights_and_hidden_states_are_exact() -> None:
    model = llama()
    # With so many tokens a batch that the forward pass is the peak, not a decomposition.
    plans = forecast(model, Workload(samples=8, length=2048, batch_size=2, rank=8))
    resident = find(plans, "resident", "device")
    layerwise = find(plans, "layerwise", "device", "device")
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert resident.device_parts["weights"] == layerwise.device_parts["weights"] == weights
    assert resident.device_parts["sums"] == 3 * (block_sums(model) + staging())
    assert layerwise.device_parts["sums"] == block_sums(model) + staging()
    assert layerwise.device_parts["hidden states"] == 8 * 2048 * HIDDEN * ITEM
    assert resident.host_parts["bases"] == 3 * (3 * HIDDEN + INNER) * 8 * 8
    disk = find(plans, "layerwise", "host", "disk")
    tables = 2048 * (2 * (HIDDEN // 4) * ITEM + 8)  # cos, sin and positions of each of 4 batches
    assert disk.disk_bytes == 8 * 2048 * HIDDEN * ITEM + 4 * tables
    host = find(plans, "layerwise", "host", "host")
    largest = max(p.nbytes for p in model.parameters())
    assert host.host_parts["weights"] == weights + 2 * power_of_two(largest)
    assert host.host_parts["hidden states"] == pinned_bytes(2 * 2048 * HIDDEN * ITEM + tables, 4)
    assert disk.host_parts["hidden states"] == 2 * (power_of_two(2 * 2048 * HIDDEN * ITEM) + power_of_two(tables))
    # The rehearsal is the peak: some copies of one batch's hidden states, two blocks' weights, and those outside of the blocks.
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
    assert disk.device_parts["hidden states"] == 5 * 2 * 2048 * HIDDEN * ITEM
    assert disk.device_parts["weights"] == weights - sum(blocks) + 2 * blocks[0]
    assert all(plan.tracked for plan in plans)


def test_flops_are_those_of_the_products() -> None:
    model = llama()
    plan = find(forecast(model, WORK), "resident", "device")
    tokens = WORK.samples * WORK.length
    linear = sum(m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head")
    attention = 3 * 2 * tokens * WORK.length * HIDDEN  # QKᵀ and PV, 4 flops a pair and channel, half of them under a causal mask
    head = 2 * WORK.samples * 211 * HIDDEN  # the last token's logits
    assert plan.flops["forward"] == pytest.approx(2 * tokens * linear + attention + head, rel=0.01)
    assert plan.flops["sums"] == 3 * tokens * (3 * HIDDEN**2 + INNER**2)


@pytest.mark.parametrize("make", models.FAMILIES.values(), ids=models.FAMILIES)
def test_sites_are_those_that_the_stream_finds(make: Any) -> None:
    model = make().eval()
    ids = torch.randint(0, models.VOCABULARY, (2, 16))
    survey = Survey(model, device="cpu", batch={"input_ids": ids})
    if not survey.tracked:
        pytest.skip("needs data to run")
    found = [(site.name, c.d_in) for site, c in stream_covariances(model, [{"input_ids": ids}], progress=False)]
    assert [(site.name, site.d_in) for site in survey.sites] == found


def test_live_bytes_of_known_tensors() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000, device="meta")
        view = a[:10]
        b = a + 1  # 8000 at once
        assert live.live == live.peak == 8000
        del a, b
        assert live.live == 4000  # the view keeps all of it
        del view
        assert (live.live, live.peak) == (0, 8000)
        live.restart()
        live.held(100)
        assert live.peak == 100


def test_live_bytes_of_a_block_agree_with_a_count_by_hand() -> None:
    wide = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(inplace=True), nn.Linear(1000, 10))
    with watch(wide) as (live, run):
        out = run(torch.zeros(8, 10, device="meta"))
        assert out.device.type == "meta"
        assert live.peak == 4 * 8 * (1000 + 10 + 10)  # the input was made inside
        assert live.flops == 2 * 2 * 8 * 10 * 1000
    assert wide[0].weight.device.type == "cpu"  # as it was


def test_attention_takes_no_square_of_tokens() -> None:
    def activations(length: int) -> int:
        return Survey(llama(), batch_size=2, length=length).activations

    assert activations(2048) <= 2.1 * activations(1024)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_larger_workload_or_model_takes_more(device: str) -> None:
    def sizes(model: Any, work: Workload) -> list[tuple[int, float]]:
        plans = forecast(model, replace(work, device=device, rates=RATES))
        plans.sort(key=lambda p: (p.strategy, p.weights, p.hidden_states))
        return [(p.device_bytes + p.host_bytes + p.disk_bytes, p.total_seconds) for p in plans]

    small = sizes(llama(3), WORK)
    for larger in (sizes(llama(5), WORK), sizes(llama(3), replace(WORK, samples=64)), sizes(llama(3), replace(WORK, rank=16))):
        assert all(b[0] >= a[0] and b[1] >= a[1] for a, b in zip(small, larger, strict=True))
        assert sum(b[0] for b in larger) > sum(a[0] for a in small)
    batches = sizes(llama(3), replace(WORK, batch_size=8, length=2048)), sizes(llama(3), replace(WORK, length=2048))
    assert all(large[0] >= little[0] for large, little in zip(*batches, strict=True))


def test_layerwise_is_flat_in_depth_but_for_the_bases() -> None:
    few, many = (find(forecast(llama(n), WORK), "layerwise", "disk", "disk") for n in (3, 30))
    assert few.device_parts == many.device_parts
    per_block = (3 * HIDDEN + INNER) * 8 * WORK.rank
    assert many.host_bytes - few.host_bytes == 27 * per_block
    deep = find(forecast(llama(30), WORK), "resident", "device")
    assert deep.device_parts["sums"] > 5 * many.device_parts["sums"]


def test_two_blocks_of_a_70b_model_fit_24_gb() -> None:
    """The eigenproblem of `down_proj`, d = 28672, is the peak: two squares, and the sums and weights of the blocks beside it."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_hidden_layers=2, vocab_size=128256))
    work = Workload(samples=256, length=1024, batch_size=4, rank=128, weights="host")
    plan = find(forecast(model.to(torch.bfloat16), work), "layerwise", "host", "host")
    assert plan.missing(24e9, 64e9) == {}
    assert 2 * 8 * 28672**2 <= plan.device_parts["decomposition"] <= 2.2 * 8 * 28672**2


def test_on_a_cpu_there_is_one_memory() -> None:
    plans = forecast(llama(), replace(WORK, device="cpu"))
    assert {(p.strategy, p.weights, p.hidden_states) for p in plans} >= {
        ("resident", "host", "host"),
        ("layerwise", "disk", "disk"),
    }
    assert all(p.device_bytes == 0 and p.host_parts["sums"] > 0 for p in plans)


def test_a_model_that_needs_data_is_estimated_from_its_layers() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)[: int(x.sum())])

    plans = forecast(Router(), WORK, batch=torch.zeros(4, 16))
    assert {plan.strategy for plan in plans} == {"resident"}
    assert not any(plan.tracked for plan in plans)
    assert all(plan.device_bytes > 0 for plan in plans)


def test_a_target_outside_the_blocks_leaves_no_layerwise_plan() -> None:
    plans = forecast(llama(), replace(WORK, targets=["q_proj", "lm_head"]))
    assert {plan.strategy for plan in plans} == {"resident"}


def test_choose_takes_the_fastest_that_fits() -> None:
    plans = forecast(llama(8), replace(WORK, rates=RATES, length=512))
    assert choose(plans).total_seconds == min(p.total_seconds for p in plans)
    for memory in sorted({p.device_bytes for p in plans}):
        limit = (memory + 1) / MARGIN
        chosen = choose(plans, limit)
        fitting = [p for p in plans if p.device_bytes <= memory]
        assert chosen in fitting
        assert chosen.total_seconds == min(p.total_seconds for p in fitting)


def test_choose_says_what_is_missing() -> None:
    plans = forecast(llama(), WORK)
    least = min(p.device_bytes for p in plans)
    with pytest.raises(MemoryError, match=r"nothing fits. layerwise, .* of device memory .* too much"):
        choose(plans, device_memory=least / 2)
    lack = closest(plans, least / 2).missing(least / 2, None)
    assert lack == {"device": math.ceil(least - MARGIN * least / 2)}
    with pytest.raises(ValueError, match="no plans"):
        choose([])


def test_fit_takes_smaller_batches() -> None:
    work = Workload(samples=32, length=4096, batch_size=32, rank=8, rates=RATES)
    whole = min(p.device_bytes for p in forecast(llama(), work))
    chosen = fit(llama(), work, device_memory=whole / 2)
    assert chosen.batch_size < 32
    assert not chosen.missing(whole / 2, None)
    with pytest.raises(MemoryError, match="batches of 1 needs"):
        fit(llama(), work, device_memory=1e6)


def test_choose_strategy_of_a_loaded_model() -> None:
    model = llama(40, device="cpu")
    batch = {"input_ids": torch.zeros(2, 512, dtype=torch.long), "attention_mask": torch.ones(2, 512, dtype=torch.long)}
    easy = choose_strategy(model, batch=batch, batches=4)
    assert (easy.strategy, easy.hidden_states, easy.plan) == ("resident", "host", None)
    plans = forecast(model, Workload(samples=8, length=512, batch_size=2, device="cpu", weights="host"), batch=batch)
    resident = find(plans, "resident", "host")
    roomy = choose_strategy(model, batch=batch, batches=4, host_memory=1.1 * resident.host_bytes)
    assert roomy.strategy == "resident"
    short = (resident.host_bytes - 1) / MARGIN
    tight = choose_strategy(model, batch=batch, batches=4, host_memory=short)
    assert tight.strategy == "layerwise"
    asked = choose_strategy(model, batch=batch, batches=4, host_memory=short, hidden_states="disk")
    assert (asked.strategy, asked.hidden_states) == ("layerwise", "disk")
    with pytest.warns(UserWarning, match="out of memory is to be expected"):
        assert choose_strategy(model, batch=batch, batches=4, host_memory=1e6).strategy == "layerwise"


@pytest.mark.parametrize("place", ["host", "disk"])
def test_weights_that_are_elsewhere_are_read_once_a_block(place: str, tmp_path: Path) -> None:
    import accelerate

    model, batch = llama(4, device="cpu"), {"input_ids": torch.zeros(2, 64, dtype=torch.long)}
    if place == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    choice = choose_strategy(model, batch=batch, batches=4)
    if place == "host":  # on a CPU that is where they are used
        assert choice.strategy == "resident"
    else:
        assert (choice.strategy, choice.hidden_states, choice.plan and choice.plan.tracked) == ("layerwise", "host", True)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()  # accelerate's hooks are back in their places


def test_a_model_on_the_host_is_run_layerwise_on_a_gpu() -> None:
    batch = {"input_ids": torch.zeros(2, 64, dtype=torch.long)}
    choice = choose_strategy(llama(4, device="cpu"), batch=batch, device="cuda", device_memory=24e9)
    assert (choice.strategy, choice.hidden_states) == ("layerwise", "device")


def test_choose_strategy_keeps_to_resident_without_blocks() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    with pytest.warns(UserWarning, match="to be expected"):
        assert choose_strategy(model, batch=torch.zeros(4, 16), host_memory=1e3).strategy == "resident"


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("800M", 8 * 10**8), ("24", 24 * 10**9), ("5 b", 5), ("25769803776", 3 * 2**33)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 GB of it", "-3GB", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)


def test_a_bare_number_between_gigabytes_and_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="write 24564MB or 24564B"):
        parse_size("24564")


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"device": "tpu"}, {"weights": "cloud"}])
def test_a_wrong_workload(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Workload(**wrong)


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    llama().config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_command_line(configuration: Path) -> None:
    result = run(configuration, "--samples", 8, "--rank", 8, "--device-memory", "24GB")
    assert result.exit_code == 0, result.output
    assert "layerwise" in result.stdout
    assert "The fastest that fits: " in result.stdout
    assert "estimated throughputs" in result.stdout


def test_command_line_says_what_does_not_fit(configuration: Path) -> None:
    result = run(configuration, "--rank", 8, "--device-memory", "1MB")
    assert result.exit_code == 0, result.output
    assert "nothing fits" in result.stdout
    assert "too much" in result.stdout


def test_command_line_as_json(configuration: Path) -> None:
    result = run(configuration, "--rank", 8, "--targets", "q_proj", "--dtype", "bfloat16", "--device", "cuda", "--json")
    found = json.loads(result.stdout)
    resident = next(p for p in found["plans"] if p["strategy"] == "resident")
    assert resident["host_parts"]["bases"] == 3 * HIDDEN * 8 * 8
    assert found["choice"]["total_seconds"] == min(p["total_seconds"] for p in found["plans"])
    assert found["missing"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 64], "rank 64"),
        (["--rank", 8, "--targets", "nothing"], "matches no module"),
        (["--rank", 8, "--device-memory", "lots"], "no size"),
        (["--rank", 8, "--dtype", "int8"], "dtype"),
    ],
)
def test_command_line_with_wrong_input(configuration: Path, arguments: list[Any], message: str) -> None:
    result = run(configuration, *arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), torch.cuda.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), MemoryError),
        (MemoryError("Unable to allocate 9 GiB"), MemoryError),
    ],
)
@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_out_of_memory_comes_with_the_forecast_and_what_fits(
    error: BaseException, kind: type[BaseException], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("nullspace.moments.covariance.Covariance.update", fails)
    with pytest.raises(kind, match=r"By the forecast, " + strategy) as raised:
        compute_null_spaces(tiny("llama"), random_batches(), rank=4, strategy=strategy, progress=False)
    assert str(error) in str(raised.value)
    assert "What fits: strategy='layerwise', hidden_states=" in str(raised.value)


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("nullspace.moments.covariance.Covariance.update", fails)
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"):
        compute_null_spaces(tiny("llama"), random_batches(), rank=4, progress=False)
