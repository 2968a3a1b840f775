"""A layerwise pass gives the sums of an ordinary forward pass, in the memory of one block; models without a chain are refused."""

from __future__ import annotations

import gc
import logging
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from models import CHAINS, random_batches, tiny
from nullspace import Covariance, compute_null_spaces, stream_covariances
from nullspace.calibration.hidden_states import Shelf, choose_place
from nullspace.calibration.run import resolve_strategy
from nullspace.model.blocks import find_blocks
from nullspace.model.sites import find_targets
from nullspace.model.weights import Loaded, is_loaded


def layerwise(model: nn.Module, loader: Any, **options: Any) -> dict[Any, Covariance]:
    return dict(stream_covariances(model, loader, strategy="layerwise", progress=False, **options))


def resident(model: nn.Module, loader: Any, **options: Any) -> dict[Any, Covariance]:
    return dict(stream_covariances(model, loader, strategy="resident", progress=False, **options))


def assert_same(found: dict[Any, Covariance], expected: dict[Any, Covariance]) -> None:
    assert list(found) == list(expected)
    for site, covariance in expected.items():
        assert found[site].tokens == covariance.tokens
        assert found[site].outliers == covariance.outliers
        torch.testing.assert_close(found[site].matrix(), covariance.matrix(), rtol=1e-12, atol=1e-12 * covariance.trace)
        torch.testing.assert_close(found[site].mean(), covariance.mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", list(CHAINS))
def test_it_sums_what_an_ordinary_forward_sums(family: str, padding: str | None) -> None:
    model, batches = tiny(family), random_batches(padding=padding)
    assert_same(layerwise(model, batches), resident(model, batches))


@pytest.mark.parametrize("family", list(CHAINS))
def test_the_bases_of_both_strategies_leak_alike(family: str) -> None:
    model, batches = tiny(family), random_batches()
    covariances = resident(model, batches, precision="fp64")
    found = compute_null_spaces(model, batches, rank=8, strategy="layerwise", progress=False)
    expected = compute_null_spaces(model, batches, rank=8, strategy="resident", progress=False)
    for site, covariance in covariances.items():
        c = covariance.matrix()

        def energy(basis: torch.Tensor, c: torch.Tensor = c) -> float:
            return float(torch.einsum("dr,de,er->", basis, c, basis))

        assert energy(found[site.name].basis) <= (1 + 1e-9) * energy(expected[site.name].basis) + 1e-16 * covariance.trace


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_come_back_from_anywhere_as_they_were(place: str, dtype: torch.dtype) -> None:
    model, batches = tiny("gemma3").to(dtype), random_batches(padding="right")
    assert_same(layerwise(model, batches, hidden_states=place), resident(model, batches))


def test_batches_may_differ_in_shape() -> None:
    batches = [*random_batches(2, 3, 40), *random_batches(1, 1, 17, seed=2), *random_batches(1, 2, 64, padding="left")]
    assert_same(layerwise(tiny("llama"), batches, hidden_states="disk"), resident(tiny("llama"), batches))


def opt_with_projections() -> nn.Module:
    config = tiny("opt").config
    config.word_embed_proj_dim = 32
    return transformers.OPTForCausalLM(config).eval()


def test_layers_ahead_of_the_blocks_and_behind_them_are_summed_too() -> None:
    model, batches = opt_with_projections(), random_batches(padding="right")
    found = layerwise(model, batches)
    names = [site.name for site in found]
    assert names[0].endswith("project_in")
    assert names[-1].endswith("project_out")
    assert_same(found, resident(model, batches))


def test_the_output_head_can_be_a_target() -> None:
    model, batches = tiny("llama"), random_batches()
    assert_same(layerwise(model, batches, targets=["lm_head", "q_proj"]), resident(model, batches, targets=["lm_head", "q_proj"]))


def test_the_loader_is_read_once() -> None:
    model, batches = tiny("llama"), random_batches()
    assert_same(layerwise(model, iter(batches)), resident(model, batches))


def test_nothing_behind_the_last_target_is_run() -> None:
    model = tiny("llama")
    called: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: called.append(index))
    layerwise(model, random_batches(3), targets=r"model\.layers\.1\..*")
    assert set(called) == {0, 1}


# --- what it refuses ------------------------------------------------------------------------------------------------------------


class Block(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return x + torch.tanh(self.up(x)) + (0 if other is None else other)


class Chain(nn.Module):
    """Three blocks, called as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.how = self.long = how

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        first, second, third = self.blocks
        if self.how == "chain" or (self.long == "chain" and ids.shape[1] > 30):
            return third(second(first(x)))
        if self.how == "but one":
            return third(first(x))
        if self.how == "none":
            return x
        if self.how == "skip":
            a = first(x)
            return third(second(a), a)
        if self.how == "skip, changed":
            a = first(x)
            return third(second(a), 2 * a)
        if self.how == "between":
            return third(2 * second(first(x)))
        if self.how == "from the embeddings":
            return third(second(first(x), 2 * x), x)
        if self.how == "twice":
            return third(second(first(first(x))))
        if self.how == "out of order":
            return first(second(third(x)))
        if self.how == "not all":
            return second(first(x))
        if self.how == "around":
            return third(second(first(third(second(first(x))))))
        if self.how == "back":
            return third(first(second(first(x))))
        raise AssertionError(self.how)


def ids(batches: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (2, 30), generator=generator) for _ in range(batches)]


@pytest.mark.filterwarnings("ignore:'all-linear' leaves out")
@pytest.mark.parametrize("how", ["chain", "from the embeddings", "not all", "but one"])
def test_any_chain_will_do(how: str) -> None:
    model = Chain(how)
    assert_same(layerwise(model, ids()), resident(model, ids()))


def test_blocks_that_the_first_batch_does_not_reach_must_not_be_called_later() -> None:
    model = Chain("but one")
    with pytest.raises(ValueError, match=r"target 'blocks\.1\.up' was never called"):
        layerwise(model, ids(), targets=["up"])
    model.long = "chain"
    with pytest.raises(ValueError, match=r"Chain: it calls its block 'blocks\.1' in batch 2, but not in the first batch"):
        layerwise(model, [ids()[0], ids()[0].repeat(1, 2)])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("skip", r"'blocks\.2' more than what 'blocks\.1' returned"),
        ("skip, changed", r"'blocks\.2' more than what 'blocks\.1' returned"),
        ("between", r"does not hand 'blocks\.2' the hidden states that 'blocks\.1' returned"),
        ("twice", r"'blocks\.0' more than once"),
        ("out of order", r"'blocks\.1' out of order"),
        ("none", r"calls none of its blocks 'blocks\.0' … 'blocks\.2' in batch 1"),
        ("back", r"'blocks\.0' more than once"),
        ("around", r"'blocks\.0' more than once"),
    ],
)
def test_blocks_that_are_not_a_chain_are_refused_by_name(how: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        layerwise(Chain(how), ids())
    assert "Chain" in str(error.value)
    assert "strategy='resident'" in str(error.value)


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 24))])
        self.last = nn.Linear(24, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_blocks_that_change_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'blocks\.1' that turns .*16\) into .*24\)"):
        layerwise(Growing(), ids())


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny("albert"),
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=211, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        lambda: nn.Sequential(nn.Linear(4, 4)),
    ],
    ids=["albert", "t5", "no blocks"],
)
def test_models_without_a_chain_are_refused_by_name_and_offered_the_resident_strategy(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    with pytest.raises(ValueError, match=type(model).__name__) as error:
        layerwise(model, random_batches())
    assert "strategy='resident'" in str(error.value)


def test_blocks_without_transformers_mark_are_found_by_their_list() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]))
    assert list(find_blocks(model, find_targets(model))) == ["1.0", "1.1", "1.2"]


# --- memory ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sums_of_one_block_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Covariance] = weakref.WeakSet()
    most = 0
    begin = Covariance.__init__

    def counted(self: Covariance, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        begin(self, *args, **kwargs)
        gc.collect()
        alive.add(self)
        most = max(most, len(alive))

    monkeypatch.setattr(Covariance, "__init__", counted)
    for pair in stream_covariances(tiny("llama"), random_batches(), strategy="layerwise", progress=False):
        del pair
    assert most == 4  # q/k/v, o, gate/up, down


@pytest.fixture
def on_disk(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """A model, and the same one with its blocks' weights on the disk."""
    whole = tiny("gemma3")
    whole.save_pretrained(tmp_path / "model")
    where = {name: "cpu" for name, _ in whole.model.named_children() if name != "layers"}
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**{f"model.{name}": device for name, device in where.items()}, "model.layers": "disk", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    return whole, offloaded


def test_weights_are_read_from_the_disk_block_by_block(on_disk: tuple[nn.Module, nn.Module]) -> None:
    whole, offloaded = on_disk
    batches = random_batches(padding="right")
    assert not is_loaded(offloaded)
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(is_loaded(block) for block in offloaded.model.layers))

    for block in offloaded.model.layers:
        block.mlp.down_proj.register_forward_hook(look)
    expected = resident(whole, batches)
    assert_same(layerwise(offloaded, batches), expected)
    assert most == 1
    assert not any(is_loaded(block) for block in offloaded.model.layers)
    assert_same(resident(offloaded, batches), expected)  # accelerate's own hooks are in force again


def chosen(model: nn.Module, **options: Any) -> str:
    return resolve_strategy(model, random_batches(), "all-linear", rank=4, **options)[0]


def test_auto_goes_by_blocks_where_the_model_is_not_whole_in_memory(on_disk: tuple[nn.Module, nn.Module]) -> None:
    whole, offloaded = on_disk
    assert chosen(offloaded) == "layerwise"
    assert chosen(whole) == "resident"
    assert_same(dict(stream_covariances(offloaded, random_batches(), progress=False)), resident(whole, random_batches()))


def test_auto_goes_by_blocks_where_the_sums_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = 10**8
    model = tiny("llama")
    monkeypatch.setattr("nullspace.planning.choice.free_on_host", lambda: sums)
    monkeypatch.setattr("nullspace.planning.forecast.LIBRARIES", {"cpu": sums, "cuda": 0})
    with pytest.warns(UserWarning, match="out of memory is to be expected"):
        assert chosen(model) == "layerwise"


def test_loading_may_be_entered_twice_and_leaves_the_modules_own_tensors(on_disk: tuple[nn.Module, nn.Module]) -> None:
    whole, offloaded = on_disk
    block, same = offloaded.model.layers[0], whole.model.layers[0]
    own = list(block.parameters())
    loaded = Loaded(block, torch.device("cpu"))
    for _ in range(2):
        with loaded:
            for ours, theirs in zip(block.parameters(), same.parameters(), strict=True):
                assert torch.equal(ours, theirs)
        assert all(a is b for a, b in zip(own, block.parameters(), strict=True))
    loaded.close()


def test_hidden_states_on_disk_are_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stream = stream_covariances(tiny("llama"), random_batches(), strategy="layerwise", hidden_states="disk", progress=False)
    next(stream)
    assert len(list(tmp_path.iterdir())) == 1
    stream.close()
    assert not list(tmp_path.iterdir())


def test_a_shelf_gives_back_what_was_put_last() -> None:
    for place in ("device", "host", "disk"):
        shelf = Shelf(place)
        for value in (torch.arange(6).view(2, 3), torch.zeros(0, 4), torch.tensor(True), torch.randn(2, 2, dtype=torch.bfloat16).T):
            shelf.put(1, 0, value)
            found = shelf.get(1, 0, torch.device("cpu"))
            assert torch.equal(found, value)
            assert found.dtype == value.dtype
        shelf.close()


def test_auto_puts_hidden_states_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nullspace.calibration.hidden_states.free_on_host", lambda: 1000)
    cpu = torch.device("cpu")
    assert [choose_place("auto", size, cpu) for size in (250, 251)] == ["host", "disk"]
    assert choose_place("device", 10**9, cpu) == "device"


# --- as it was found ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["exhausted", "closed", "error"])
def test_the_model_is_left_as_it_was_found(end: str) -> None:
    model = tiny("falcon").train()
    before = {name: (dict(m.__dict__), list(m._forward_pre_hooks)) for name, m in model.named_modules()}
    batches = random_batches()
    if end == "error":
        with torch.no_grad():
            model.transformer.h[1].mlp.dense_h_to_4h.weight[0, 0] = float("nan")
    stream = stream_covariances(model, batches, strategy="layerwise", progress=False)
    if end == "error":
        with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.dense_4h_to_h, batch 1"):
            list(stream)
    elif end == "closed":
        next(stream)
        stream.close()
    else:
        list(stream)
    for name, module in model.named_modules():
        attributes, hooks = before[name]
        assert module.__dict__.keys() == attributes.keys()
        assert module.training
        assert list(module._forward_pre_hooks) == hooks


def test_blocks_before_a_bad_activation_were_given_out() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    stream = stream_covariances(model, random_batches(), strategy="layerwise", progress=False)
    seen = [next(stream)[0].name for _ in range(4)]
    assert all(name.startswith("model.layers.0.") for name in seen)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj, batch 1"):
        next(stream)


def test_a_target_that_is_never_called_is_an_error_naming_it() -> None:
    model = tiny("llama")
    model.model.layers[1].spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.spare"):
        layerwise(model, random_batches(), targets=["spare", "q_proj"])
    with pytest.warns(UserWarning, match=r"leaves out 1 layer: 'model\.layers\.1\.spare' was never called"):
        assert "model.layers.1.spare" not in layerwise(model, random_batches())


def test_arguments_for_blocks_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(ValueError, match="layerwise"):
        resident(tiny("llama"), random_batches(), device="cpu")
    with pytest.raises(ValueError, match="hidden_states must be one of"):
        layerwise(tiny("llama"), random_batches(), hidden_states="cloud")


def test_progress_and_log_tell_of_every_block(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[str, int, int | None, int]] = []
    batches = random_batches(2, 2, 20)
    with caplog.at_level(logging.INFO, logger="nullspace"):
        list(stream_covariances(tiny("llama"), batches, strategy="layerwise", progress=lambda *a: calls.append(a)))
    assert calls == [("forward", done, 6, 80 * done // 6) for done in range(7)]
    begun, *of_blocks = [record.getMessage() for record in caplog.records]
    assert begun == "21 layers, strategy layerwise, precision auto"
    assert [text.split(":")[0] for text in of_blocks] == [f"model.layers.{i}" for i in range(3)]
