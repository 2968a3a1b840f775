"""EVA: against PEFT's own, and against the SVD of the activations themselves."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import eva as peft_eva
from torch import nn

from models import random_batches, tiny
from nullspace.integrations.peft import get_eva_state_dict, initialize_lora_eva_weights
from nullspace.integrations.peft.targets import rank_of
from nullspace.integrations.transformers import PackedBatches, load_model
from reference import recorded_inputs

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
PREFIX = "base_model.model."
RANK = 4
Batches = list[dict[str, torch.Tensor]]


def config(rank: int = RANK, targets: Any = TARGETS, *, rank_pattern: dict[str, int] | None = None, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        rank_pattern=rank_pattern or {},
        init_lora_weights="eva",
        eva_config=EvaConfig(**options),
    )


def wrapped(family: str = "llama", **options: Any) -> PeftModel:
    return get_peft_model(tiny(family), config(**options))


def state_dict(model: nn.Module, batches: Any, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
    return get_eva_state_dict(model, batches, *args, show_progress_bar=False, **options)


def centred(x: torch.Tensor) -> torch.Tensor:
    return x.double() - x.double().mean(0)


def explained(a: torch.Tensor, x_centred: torch.Tensor) -> float:
    """The share of the variance in the span of A's rows."""
    q = torch.linalg.qr(a.double().T).Q
    return float((x_centred @ q).norm() ** 2 / x_centred.norm() ** 2)


def ranks_by_peft(shares: dict[str, torch.Tensor], shared: dict[str, str], budget: int, most: dict[str, int]) -> dict[str, int]:
    """PEFT's own `_get_rank_distribution`, which is local to another function, of the first layers' shares."""
    code = next(c for c in peft_eva._get_eva_state_dict.__code__.co_consts if getattr(c, "co_name", "") == "_get_rank_distribution")
    function = types.FunctionType(code, vars(peft_eva))
    hooks = {k: (types.SimpleNamespace(svd=types.SimpleNamespace(explained_variance_ratio_=v)), None) for k, v in shares.items()}
    return function(hooks, {**{k: k for k in shares}, **shared}, shared, budget, most)


def assert_like_the_activations(found: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
    assert any(len(a) for a in found.values())
    for name, a in found.items():
        x = centred(inputs[name.removeprefix(PREFIX)])
        _, sigma, vt = torch.linalg.svd(x, full_matrices=False)
        assert a.shape == (len(a), x.shape[1])
        assert a.dtype == torch.float32
        assert a.is_contiguous()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-6, rtol=0)
        peak = a.gather(1, a.abs().argmax(1, keepdim=True))
        assert (peak > 0).all()
        torch.testing.assert_close((a.double() @ vt[: len(a)].T).abs(), torch.eye(len(a)).double(), atol=1e-4, rtol=0)
        best = (sigma[: len(a)] ** 2).sum() / (sigma**2).sum()
        assert explained(a, x) == pytest.approx(float(best), abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_components_are_the_singular_vectors_of_the_centred_activations(family: str) -> None:
    model, batches = tiny(family), random_batches(3, padding="left")
    targets = ["c_attn", "c_proj"] if family == "gpt2" else TARGETS
    found = state_dict(model, batches, config(targets=targets))
    assert_like_the_activations(found, recorded_inputs(model, batches, found))
    assert all(name.rpartition(".")[2] in targets for name in found)
    of_wrapped = state_dict(get_peft_model(tiny(family), config(targets=targets)), batches)
    assert {name.removeprefix(PREFIX) for name in of_wrapped} == set(found)
    for name, a in of_wrapped.items():
        torch.testing.assert_close(a, found[name.removeprefix(PREFIX)])


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 30.0])
@pytest.mark.parametrize("rank_pattern", [{}, {"q_proj": 7, "layers.0.mlp.down_proj": 2}, {".*1.*v_proj": 9}])
def test_ranks_are_those_of_peft(rho: float, rank_pattern: dict[str, int]) -> None:
    """Given the same explained variances."""
    model, batches = tiny("llama"), random_batches(3)
    settings = config(rho=rho, rank_pattern=rank_pattern)
    found = state_dict(model, batches, settings)
    inputs = recorded_inputs(model, batches, found)
    ranks = {name: rank_of(name, settings) for name in found}
    assert (sum(ranks.values()) == RANK * len(found)) == (not rank_pattern)
    shared = {name: name.replace("v_proj", "q_proj") for name in found if name.endswith("v_proj")}
    most = {name: round(rank * rho) for name, rank in ranks.items()}
    for name, first in shared.items():
        most[name] = most[first] = max(most[name], most[first])
    shares = {}
    for name in found:
        if name not in shared:
            squares = torch.linalg.svdvals(centred(inputs[name])) ** 2
            shares[name] = squares / squares.sum()
    expected = ranks_by_peft(shares, shared, sum(ranks.values()), most)
    assert {name: len(a) for name, a in found.items()} == expected
    assert sum(expected.values()) == sum(ranks.values())


@pytest.mark.slow
def test_as_much_variance_as_peft_after_its_convergence() -> None:
    batches = random_batches(4, padding="right")
    model = wrapped(rho=2.0)
    ours, theirs = state_dict(model, batches), peft.get_eva_state_dict(model, batches, show_progress_bar=False)
    inputs = recorded_inputs(tiny("llama"), batches, [name.removeprefix(PREFIX) for name in ours])
    assert set(ours) == set(theirs)
    for name, a in ours.items():
        x, r = centred(inputs[name.removeprefix(PREFIX)]), min(len(a), len(theirs[name]))
        assert abs(len(a) - len(theirs[name])) <= 1  # PEFT knows the variances to three digits or so
        assert r == 0 or explained(a[:r], x) >= explained(theirs[name][:r], x) - 1e-7


@pytest.mark.slow
def test_as_much_variance_as_peft_on_real_text(smollm2: Path, prose: list[str]) -> None:
    model, tokenizer = load_model(smollm2, device="cpu")
    model.model.layers = model.model.layers[:2]
    batches = list(PackedBatches(prose, tokenizer, samples=8, length=256))
    settings = config(targets=r".*\.(q_proj|o_proj|down_proj)")
    options: Any = {"forward_fn": lambda model, inputs: model.model(**inputs), "show_progress_bar": False}  # no logits
    ours = get_eva_state_dict(model, batches, settings, **options)
    theirs = peft.get_eva_state_dict(model, batches, settings, **options)
    inputs = recorded_inputs(model.model, batches, [name.removeprefix("model.") for name in ours])
    for name, a in ours.items():
        x, r = centred(inputs[name.removeprefix("model.")]), min(len(a), len(theirs[name]))
        assert r > 0
        best = float(torch.linalg.svdvals(x)[:r].norm() ** 2 / x.norm() ** 2)
        assert explained(a[:r], x) == pytest.approx(best, abs=1e-7)
        assert explained(a[:r], x) >= explained(theirs[name][:r], x) - 1e-7


def test_order_and_size_of_batches_do_not_matter() -> None:
    model, batches = tiny("llama"), random_batches(4)
    whole = [{key: torch.cat([b[key] for b in reversed(batches)]) for key in batches[0]}]
    one, other = state_dict(model, batches, config()), state_dict(model, whole, config())
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)


def test_what_a_tokenizer_returns_is_a_batch_too() -> None:
    model, batches = tiny("llama"), random_batches(2, padding="left")
    found = state_dict(model, [transformers.BatchEncoding(batch) for batch in batches], config())
    expected = state_dict(model, batches, config())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_data_are_read_once() -> None:
    read = []

    def generate() -> Any:
        for number, batch in enumerate(random_batches(3)):
            read.append(number)
            yield batch

    assert state_dict(tiny("llama"), generate(), config())
    assert read == [0, 1, 2]


def test_padding_is_not_counted() -> None:
    model = tiny("llama")
    short = random_batches(3, 4, 40)
    padded = [{key: nn.functional.pad(value, (0, 9)) for key, value in b.items()} for b in short]
    for batch in padded:  # which the causal tokens before cannot see
        batch["input_ids"][:, 40:] = torch.randint(3, 200, (4, 9))
    expected, found = state_dict(model, short, config()), state_dict(model, padded, config())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


def with_labels(batches: Batches, value: int = -100) -> Batches:
    """The last quarter of every sequence is left out."""
    made = []
    for batch in batches:
        labels = batch["input_ids"].clone()
        labels[:, -labels.shape[1] // 4 :] = value
        made.append({**batch, "labels": labels})
    return made


@pytest.mark.parametrize("mask", [True, False])
def test_tokens_that_labels_leave_out_are_not_counted(mask: bool) -> None:
    model, batches = tiny("llama"), random_batches(3)
    without = [{key: value[:, :48] for key, value in batch.items()} for batch in batches]
    expected = state_dict(model, without, config())
    labelled = with_labels(batches, -7)
    if not mask:
        labelled = [{key: value for key, value in batch.items() if key != "attention_mask"} for batch in labelled]

    def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        model(input_ids=inputs["input_ids"])

    found = state_dict(model, labelled, config(label_mask_value=-7), forward_fn=forward)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
    every = state_dict(model, batches, config())
    found = state_dict(model, labelled, config(label_mask_value=-7, use_label_mask=False), forward_fn=forward)
    assert all(torch.equal(found[name], every[name]) for name in every)


@pytest.mark.slow
@pytest.mark.parametrize(("tau", "read"), [(0.0, 32), (1.0, 70)])
def test_a_long_loader_is_read_until_twice_the_data_say_the_same(tau: float, read: int) -> None:
    batches = random_batches(
        70
    )  # of 256 tokens: 32 for each of down_proj's 112 inputs with the 14th batch, looked at with the 16th
    seen: list[int] = []

    def loader() -> Any:
        for number, batch in enumerate(batches, start=1):
            seen.append(number)
            yield batch

    found = state_dict(tiny("llama"), loader(), config(tau=tau))
    assert len(seen) == read
    wanted = state_dict(tiny("llama"), batches[:read], config(tau=1.0))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tokens_that_labels_leave_out_are_not_called_padding() -> None:
    batches = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in random_batches(2)]
    with pytest.raises(ValueError, match=r"no tokens at 'model.*masked, as padding or by its label.*use_label_mask=False"):
        state_dict(tiny("llama"), batches, config())


def test_labels_go_through_the_default_forward() -> None:
    batches = with_labels(random_batches(2, padding="left"))
    inputs = [{**b, "attention_mask": b["attention_mask"] * (b["labels"] != -100)} for b in batches]
    model = tiny("llama")
    found = state_dict(model, batches, config(rank=2))
    recorded: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for batch, counted in zip(batches, inputs, strict=True):
        unmasked = {key: value for key, value in batch.items() if key != "labels"}
        keep = counted["attention_mask"].bool()
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, x, name=name, keep=keep: recorded[name].append(x[0][keep])
            )
            for name in found
        ]
        with torch.no_grad():
            model(**unmasked)
        for handle in handles:
            handle.remove()
    assert_like_the_activations(found, {name: torch.cat(parts) for name, parts in recorded.items()})


def test_whitening_is_that_of_peft() -> None:
    """At a layer that shares its input with none: where some do, PEFT 0.21 divides the same numbers once a layer."""
    model, batches = tiny("llama"), random_batches(1, padding="left")
    settings = {"targets": [f"layers.{i}.self_attn.o_proj" for i in range(3)], "rho": 1.0}
    plain, white = state_dict(model, batches, config(**settings)), state_dict(model, batches, config(**settings, whiten=True))
    inputs = recorded_inputs(model, batches, plain)
    for name in plain:
        sigma = torch.linalg.svdvals(centred(inputs[name]))[:RANK].float()
        torch.testing.assert_close(white[name], plain[name] / sigma.sqrt()[:, None], atol=1e-5, rtol=1e-4)

    calls = []

    def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        calls.append(1)
        model(**inputs)

    name = "model.layers.0.self_attn.o_proj"
    settings["targets"] = [name]
    theirs = peft.get_eva_state_dict(model, batches, config(**settings, whiten=True), forward_fn=forward, show_progress_bar=False)
    turns = len(calls) - 1  # of the data through PEFT's sum; the first one looked for equal inputs
    torch.testing.assert_close(theirs[name].float() * turns**0.25, white[name], atol=1e-3, rtol=1e-3)


def rows_of_odd_tokens(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    assert isinstance(layer_input, tuple)
    assert model_input["input_ids"].shape == layer_input[0].shape[:2]
    return layer_input[0][:, 1::2].flatten(0, 1)


def last_layer_apart(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    rows = layer_input[0].flatten(0, 1)
    return rows[::2] if layer_name.endswith("v_proj") else rows


def test_functions_of_the_users() -> None:
    model, batches = tiny("llama"), random_batches(3)
    recorded = recorded_inputs(model, [{"input_ids": b["input_ids"]} for b in batches], dict(state_dict(model, batches, config())))
    odd = state_dict(model, batches, config(), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=rows_of_odd_tokens)
    assert_like_the_activations(odd, {name: x[1::2] for name, x in recorded.items()})
    apart = state_dict(model, batches, config(), prepare_layer_inputs_fn=last_layer_apart)
    assert_like_the_activations(apart, {name: x[::2] if name.endswith("v_proj") else x for name, x in recorded.items()})

    padded = random_batches(3, padding="left")
    everything = state_dict(model, padded, config(), prepare_layer_inputs_fn=None)
    name = next(iter(everything))
    functions = {name: peft_eva.prepare_layer_inputs_fn_language_modeling}
    mixed = state_dict(model, padded, config(rho=1.0), prepare_layer_inputs_fn=functions)
    assert list(functions) == [name]  # which PEFT would have emptied
    alone = recorded_inputs(model, padded, everything)
    assert_like_the_activations({name: mixed[name]}, alone)
    with pytest.raises(AssertionError):
        assert_like_the_activations({name: everything[name]}, alone)


def test_users_functions_that_do_nothing_give_the_same() -> None:
    model, batches = tiny("llama"), random_batches(3, padding="left")

    def same(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
        return peft_eva.prepare_layer_inputs_fn_language_modeling(layer_input, model_input, layer_name)

    expected = state_dict(model, batches, config(rank_pattern={"q_proj": 7}))
    found = state_dict(model, batches, config(rank_pattern={"q_proj": 7}), prepare_layer_inputs_fn=same)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_linear_on_a_bare_model(family: str) -> None:
    batches = random_batches(2)
    bare = state_dict(tiny(family), batches, config(targets="all-linear"))
    adapted = state_dict(wrapped(family, targets="all-linear"), batches)
    assert {PREFIX + name for name in bare} == set(adapted)
    assert not any("lm_head" in name for name in bare)


def test_a_bare_model_without_target_modules_is_started_in_all_linear_layers_as_by_peft() -> None:
    batches, chosen = random_batches(4), config(targets=None)
    chosen.target_modules = None
    by_peft = peft_eva.get_eva_state_dict(tiny("llama"), batches, chosen, show_progress_bar=False)
    found = state_dict(tiny("llama"), batches, chosen)
    assert set(found) == set(by_peft)
    assert "lm_head" in found


@pytest.mark.parametrize("bare", [False, True])
def test_layers_that_eva_does_not_know_start_as_lora_does_and_peft_warns(bare: bool) -> None:
    model = wrapped("gpt2", targets=["wte"])
    found = state_dict(tiny("gpt2"), random_batches(1), config(targets=["wte"])) if bare else state_dict(model, random_batches(1))
    assert found == {}
    with pytest.warns(UserWarning, match="were not found in the eva state_dict"):
        initialize_lora_eva_weights(model, *([] if bare else [random_batches(1)]), eva_state_dict=found if bare else None)
    layer: Any = model.base_model.model.transformer.wte
    assert layer.lora_embedding_A["default"].shape == (RANK, tiny("gpt2").config.vocab_size)


def test_ours_in_the_place_of_peft_s_in_its_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only under an importer's name: PEFT's function, which ours calls, is another object then."""
    monkeypatch.setattr(peft_eva, "initialize_lora_eva_weights", initialize_lora_eva_weights)
    monkeypatch.setattr(peft_eva, "get_eva_state_dict", get_eva_state_dict)
    model, batches = wrapped(), random_batches(2)
    peft_eva.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    expected = state_dict(wrapped(), batches)
    for name, a in expected.items():
        if len(a):
            assert torch.equal(model.get_submodule(name).lora_A["default"].weight, a)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_s_example_with_another_import(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    batches = random_batches(3, padding="left")
    with torch.no_grad():
        before = model(**batches[0]).logits
    eva_config = EvaConfig(rho=2.0)
    peft_config = LoraConfig(
        r=RANK, lora_alpha=2, target_modules=TARGETS, init_lora_weights="eva", eva_config=eva_config, lora_dropout=0.0
    )
    peft_model = get_peft_model(model, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
    expected = state_dict(peft_model, batches)
    samples = [{key: batch[key][row] for key in batch} for batch in batches for row in range(len(batch["input_ids"]))]
    dataloader = torch.utils.data.DataLoader(samples, batch_size=4)
    initialize_lora_eva_weights(peft_model, dataloader)

    layers = {name: module for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)}
    assert set(layers) == {name for name, a in expected.items() if len(a)}
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(a, expected[name])
        assert not b.any()
        assert a.requires_grad
        assert layer.r["default"] == len(a)
        assert layer.scaling["default"] == pytest.approx(2 / RANK)  # alpha was adjusted
    assert {len(a) for a in expected.values()} != {RANK}
    peft_model.eval()
    with torch.no_grad():
        assert torch.equal(peft_model(**batches[0]).logits, before)
        for layer in layers.values():
            layer.lora_B["default"].weight.normal_(std=0.1)
        trained = peft_model(**batches[0]).logits
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
        torch.testing.assert_close(loaded(**batches[0]).logits, trained)


def test_a_state_dict_can_be_used_again() -> None:
    batches = random_batches(2)
    found = {PREFIX + name: a for name, a in state_dict(tiny("llama"), batches, config()).items()}
    kept = dict(found)
    for _ in range(2):
        model = wrapped()
        initialize_lora_eva_weights(model, eva_state_dict=found)
        assert found == kept
        for name, a in found.items():
            if len(a):
                assert torch.equal(model.get_submodule(name).lora_A["default"].weight, a)


def test_a_bare_model_s_state_dict_is_loaded_under_the_names_of_the_peft_model() -> None:
    found = state_dict(tiny("llama"), random_batches(2), config())
    kept = dict(found)
    model = wrapped()
    initialize_lora_eva_weights(model, eva_state_dict=found)
    assert found == kept
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert set(layers) == {PREFIX + name for name, a in found.items() if len(a)}
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight, found[name.removeprefix(PREFIX)])


def test_the_model_is_left_as_it_was() -> None:
    model = wrapped().train()
    layer = model.base_model.model.model.layers[0]
    layer.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state_dict(model, random_batches(2))
    assert_untouched(model, modes)


def assert_untouched(model: nn.Module, modes: dict[str, bool]) -> None:
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(module.disable_adapters for module in model.modules() if isinstance(module, LoraLayer))


def poisoned(batches: int) -> Any:
    """A forward function in whose last batch the second block's attention hands on NaN."""
    called = []

    def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        called.append(1)
        layer = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))
        handle = layer.register_forward_hook(lambda *_: torch.full_like(_[2], torch.nan)) if len(called) == batches else None
        model(**inputs)
        if handle is not None:
            handle.remove()

    return forward


def test_nan_names_the_layer_and_everything_is_put_back() -> None:
    model = wrapped().train()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj, batch 2: NaN or Inf"):
        state_dict(model, random_batches(3), forward_fn=poisoned(2))
    next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))._forward_hooks.clear()
    assert_untouched(model, modes)


def all_masked(batches: Batches) -> Batches:
    return [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in batches]


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "dataloader is empty"),
        (random_batches(1, 1, 8), {"rank": 8, "rho": 1.0}, r"layers\.0\.self_attn\.q_proj.* received 8 tokens"),
        (random_batches(1, 1, 8), {"rank": 4, "rho": 2.0}, r"layers\.0\.self_attn\.q_proj.* received 8 tokens"),
        (random_batches(1, 1, 48), {"rho": 999.0}, r"layers\.0\.self_attn\.q_proj.* received 48 tokens"),
        (all_masked(random_batches(2)), {}, r"no tokens at .*q_proj"),
        (
            [{"input_ids": torch.full((4, 16), 5)}],
            {"targets": r".*\.0\..*q_proj"},
            r"layers\.0\.self_attn\.q_proj' are all the same",
        ),
        (random_batches(2), {"targets": ["no_proj"]}, "matches no linear layer of LlamaForCausalLM"),
        (
            [{**random_batches(1)[0], "labels": torch.ones(4, dtype=torch.long)}],
            {},
            r"batch 1: labels \(4,\) cannot be lined up .*use_label_mask=False",
        ),
    ],
)
def test_errors(batches: Batches, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        state_dict(tiny("llama"), batches, config(**options))


def test_more_components_than_an_input_has_are_all_of_them() -> None:
    found = state_dict(tiny("llama"), random_batches(1), config(targets=["q_proj"], rank=40, rho=2.0))
    assert {len(a) for a in found.values()} <= set(range(49))
    assert sum(map(len, found.values())) == 3 * 40


def test_a_layer_that_is_never_called_is_named() -> None:
    with pytest.raises(ValueError, match=r"'model\.layers\.2\.self_attn\.q_proj'.* was never called"):
        state_dict(
            tiny("llama"), random_batches(2), config(), forward_fn=lambda m, inputs: m.model.layers[0:2] and first_two(m, inputs)
        )


def first_two(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    short = copy.copy(model.model)
    short._modules = {**model.model._modules, "layers": model.model.layers[:2]}
    short.config = copy.copy(model.config)
    short.config.num_hidden_layers = 2
    short(**inputs)


def test_nothing_to_whiten() -> None:
    ids = torch.tensor([[3, 4, 5] * 20])  # three different inputs of the first layer: two components
    with pytest.raises(ValueError, match=r"component 4 of 'model\.layers\.0\.self_attn\.q_proj' explains nothing"):
        state_dict(tiny("llama"), [{"input_ids": ids}], config(targets=r".*\.0\..*q_proj", rho=1.0, whiten=True))


def test_configurations_that_do_not_fit() -> None:
    batches = random_batches(1)
    with pytest.raises(ValueError, match="peft_config is required"):
        state_dict(tiny("llama"), batches)
    with pytest.raises(ValueError, match="no eva_config"):
        state_dict(tiny("llama"), batches, LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        state_dict(wrapped(), batches, adapter_name="other")
    with pytest.raises(ValueError, match=r"not found in the model: 'nowhere'"):
        state_dict(tiny("llama"), batches, config(), prepare_layer_inputs_fn={"nowhere": rows_of_odd_tokens})
    with pytest.raises(ValueError, match=r"q_proj: prepare_layer_inputs_fn must return a tensor \(n, d_in\), not .*\(4, 64, 48\)"):
        state_dict(tiny("llama"), batches, config(), prepare_layer_inputs_fn=lambda x, *_: x[0])
    with pytest.raises(TypeError, match="batch 1 is Tensor, not a mapping"):
        state_dict(tiny("llama"), [batches[0]["input_ids"]], config(), forward_fn=lambda model, inputs: model(inputs))


def test_models_that_cannot_be_initialised() -> None:
    batches = random_batches(1)
    with pytest.raises(ValueError, match="must be a PeftModel"):
        initialize_lora_eva_weights(tiny("llama"), batches)
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        initialize_lora_eva_weights(get_peft_model(tiny("llama"), LoraConfig(target_modules=TARGETS)), batches)
    with pytest.raises(ValueError, match="dataloader is required"):
        initialize_lora_eva_weights(wrapped())
    model = wrapped()
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="single active adapter"):
        initialize_lora_eva_weights(model, batches)


def test_state_dicts_that_cannot_be_loaded() -> None:
    bare = state_dict(tiny("llama"), random_batches(1), config())
    with pytest.raises(ValueError, match=r"none of this model's layers, such as 'base_model\.model\.model.*such as 'module\.model"):
        initialize_lora_eva_weights(wrapped(), eva_state_dict={"module." + name: a for name, a in bare.items()})
    state = {PREFIX + name: a for name, a in bare.items()}
    name = next(iter(state))
    with pytest.raises(ValueError, match=r"q_proj' needs \(rank, 48\), not \(2, 5\)"):
        initialize_lora_eva_weights(wrapped(), eva_state_dict={**state, name: torch.zeros(2, 5)})
    model = wrapped()
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match="gets rank 0, and PEFT would remove 'second' there too"):
        initialize_lora_eva_weights(model, eva_state_dict={**state, name: torch.zeros(0, 48)})
    model = wrapped()
    model.add_adapter("second", config(targets=["up_proj"]))
    with pytest.raises(ValueError, match="has only 'second', but PEFT would give it 'default' too"):
        initialize_lora_eva_weights(model, eva_state_dict=state)


@pytest.mark.usefixtures("one_layout_of_four_bits")
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_bases(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            options: Any = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
            quantised = getattr(bnb.nn, kind)(module.in_features, module.out_features, bias=False, **options)
            quantised.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised.to("cpu"))
    batches = random_batches(2, padding="left")
    peft_model = get_peft_model(model, config()).eval()
    with torch.no_grad(), peft_model.disable_adapter():
        before = peft_model(**batches[0]).logits
    found = state_dict(peft_model, batches)
    inputs = recorded_inputs(model, batches, [name.removeprefix(PREFIX) for name in found])
    assert_like_the_activations(found, inputs)
    initialize_lora_eva_weights(peft_model, eva_state_dict=found)
    with torch.no_grad():
        torch.testing.assert_close(peft_model.eval()(**batches[0]).logits, before)


def of_one_rank(rank: int, folder: str, batches: Batches) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = state_dict(tiny("llama"), batches[rank::2], config())
    alone = state_dict(tiny("llama"), batches[rank::2], config(), gather_distributed_inputs=False)
    torch.save((found, alone), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux" or not torch.distributed.is_available(), reason="needs fork and gloo")
def test_ranks_add_up(tmp_path: Path) -> None:
    batches = random_batches(3)
    torch.multiprocessing.start_processes(of_one_rank, (str(tmp_path), batches), nprocs=2, start_method="fork")
    expected = state_dict(tiny("llama"), batches, config())
    for rank in range(2):
        found, alone = torch.load(tmp_path / f"{rank}.pt")
        half = state_dict(tiny("llama"), batches[rank::2], config())
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone[name], half[name], atol=1e-5, rtol=0)
