"""`prepare` and `initialize_lora_nullspace_weights`: against the long way, on data of every form, on hostile input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
import transformers
from mixtures import mixture
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from trl import SFTConfig, SFTTrainer

import nullspace
from models import VOCABULARY, random_batches, tiny
from nullspace import Covariances, compute_covariances, compute_null_spaces
from nullspace.errors import DataWarning
from nullspace.integrations.peft import initialize_lora_nullspace_weights, inject_adapters, lora_layers, prepare, save_init
from nullspace.integrations.transformers import PackedBatches, load_texts
from nullspace.integrations.transformers.batches import checked_length, token_batches
from nullspace.integrations.transformers.corpus import default_corpus
from nullspace.methods import METHODS

RANK = 4
TASK, KEEP = random_batches(2, 4, 48, seed=3), random_batches(2, 4, 48, seed=4, padding="right")
BATCH = random_batches(1, 2, 24, seed=7)[0]
SIZES: dict[str, Any] = {"samples": 4, "length": 32, "batch_size": 2}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*saw fewer tokens", "ignore:.*span fewer directions", "ignore:the texts fill", "ignore:the mixture goes on"
)


def small(seed: int = 0) -> nn.Module:
    """A Llama of one layer."""
    sizes = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 1, "num_attention_heads": 6}
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, num_key_value_heads=2)).eval()


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": RANK, **options})


def wrapped(adapter_name: str = "default", **options: Any) -> PeftModel:
    """What PEFT makes of the tiny model, with an adapter on all linear layers but the head."""
    torch.manual_seed(0)
    return get_peft_model(small(), config(**{"target_modules": "all-linear", **options}), adapter_name=adapter_name).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def factors(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    pairs = {
        name: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for name, layer in lora_layers(model, adapter).items()
    }
    return {f"{name} {part}": each.detach().clone() for name, pair in pairs.items() for part, each in zip("AB", pair, strict=True)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are the same to the bit."""
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of second moments of `TASK` and `KEEP`, and of the null spaces of `KEEP`, as the long way makes them."""
    folder = tmp_path_factory.mktemp("moments")
    for name, data in (("task", TASK), ("keep", KEEP)):
        compute_covariances(small(), data, folder / name, precision="auto", progress=False)
    compute_null_spaces(small(), KEEP, rank=RANK, progress=False).save(folder / "spaces")
    return {name: folder / name for name in ("task", "keep", "spaces")}


def long_way(method: str, moments: dict[str, Path]) -> PeftModel:
    """`inject_adapters`, after a calibration."""
    of = {"covariances": "task" if METHODS[method].of_task else "keep", "preserve": "keep"}
    given: dict[str, Any] = {name: Covariances.load(moments[of[name]]) for name in METHODS[method].needs if name != "spaces"}
    if "spaces" in METHODS[method].needs:
        given["spaces"] = nullspace.NullSpaces.load(moments["spaces"])
    return inject_adapters(small(), config(), method=method, **given)


KNOWN: dict[str, dict[str, torch.Tensor]] = {}


def wanted_factors(method: str, moments: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Those of the long way."""
    if method not in KNOWN:
        KNOWN[method] = factors(long_way(method, moments))
    return KNOWN[method]


def data_for(method: str, **data: Any) -> dict[str, Any]:
    return {name: data.get(name, {"task": TASK, "keep": KEEP}[name]) for name in METHODS[method].data}


@pytest.fixture(scope="module")
def text_model(tiny_checkpoint: Path) -> tuple[nn.Module, Any]:
    """A model and its tokenizer, which has a chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = TEMPLATE
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), tokenizer


# ---- the same as the long way


@pytest.mark.parametrize("method", ["contrast", "lora-null", "corda-kpm", "eva", "mica-data", "orthogonal"])
def test_one_call_gives_what_the_long_way_gives_to_the_bit(method: str, moments: dict[str, Path]) -> None:
    torch.manual_seed(5)
    one_call = prepare(small(), None, config(), **data_for(method), method=method, progress=False)
    torch.manual_seed(5)
    assert same(factors(one_call), wanted_factors(method, moments))
    trained = {name.rpartition(".lora_")[2][0] for name, p in one_call.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"} - {METHODS[method].frozen}


def test_it_is_a_lazy_name_of_the_package() -> None:
    assert nullspace.prepare is prepare


@pytest.mark.parametrize("method", ["contrast", "lora-null"])
def test_moments_that_are_there_are_used_and_no_forward_runs(
    method: str, moments: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = wanted_factors(method, moments)
    monkeypatch.setattr(transformers.LlamaModel, "forward", lambda *_, **__: pytest.fail("the model runs"))
    keep = moments["spaces" if method == "lora-null" else "keep"]
    folders = prepare(small(), None, config(), **data_for(method, task=str(moments["task"]), keep=keep), method=method)
    assert same(factors(folders), wanted)
    model = wrapped()
    given = data_for(method, task=Covariances.load(moments["task"]), keep=keep)
    initialize_lora_nullspace_weights(model, **given, method=method, residual="base" if METHODS[method].changes_base else "auto")
    assert same(factors(model), wanted)


# ---- data of every form


def tokens(loader: Any) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in loader])


CHAT = [{"role": "user", "content": "Where is the lighthouse?"}, {"role": "assistant", "content": "On the island, at its end."}]
TEXTS = [f"Number {number} of many lines of text, which are not all alike." for number in range(8)]
FORMS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": text} for text in TEXTS],
    "messages": [{"messages": CHAT}] * 8,
    "prompt and completion": [{"prompt": "Where is it?", "completion": text} for text in TEXTS],
    "conversational prompt and completion": [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 8,
    "preferences": [{"chosen": CHAT, "rejected": [*CHAT[:1], {"role": "assistant", "content": "No."}]}] * 8,
    "preferences of texts": [{"prompt": "Where?", "chosen": text, "rejected": "Nowhere."} for text in TEXTS],
    "tokens": [{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12] * 4, "attention_mask": [1] * 32}] * 8,
}


def places(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The same rows in every kind of place that holds rows."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = datasets.Dataset.from_list(rows)
    return {
        "a list": rows,
        "an iterator": iter(rows),
        "a Dataset": data,
        "a Dataset of tensors": data.with_format("torch") if "input_ids" in rows[0] else data,
        "an IterableDataset": data.to_iterable_dataset(),
        "a DatasetDict": datasets.DatasetDict(train=data),
        "a file": folder / "rows.jsonl",
        "the name of a file": str(folder / "rows.jsonl"),
        "a list of files": [str(folder / "rows.jsonl")],
        "what load_texts returns": load_texts(rows),
    }


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_and_place_become_the_same_tokens(form: str, text_model: Any, tmp_path: Path) -> None:
    model, tokenizer = text_model
    wanted = tokens(PackedBatches(load_texts(FORMS[form]), tokenizer, **SIZES))
    for place, data in places(FORMS[form], tmp_path).items():
        assert torch.equal(tokens(token_batches(data, tokenizer, model, **SIZES)), wanted), place
    if "No" in str(FORMS[form]):
        assert "No" not in tokenizer.decode(wanted.flatten().tolist())  # rejected answers are not read


def test_texts_and_batches_of_every_form_are_the_same_data(text_model: Any) -> None:
    model, tokenizer = text_model
    packed = PackedBatches(TEXTS, tokenizer, **SIZES)
    wanted, every = tokens(packed), torch.cat([batch["input_ids"] for batch in packed])
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in every], batch_size=2)
    whole = {"input_ids": every}
    for data in (TEXTS, tuple(TEXTS), iter(TEXTS), packed, iter(packed), (each for each in packed), loader, whole, [whole]):
        assert torch.equal(tokens(token_batches(data, tokenizer, model, **SIZES)), wanted), type(data)
    for data in ([every[:2], every[2:]], [(every[:2],)], [[every, torch.ones_like(every)]]):
        assert token_batches(data, None, model, **SIZES) is data
    (alone,) = token_batches(every, None, model, **SIZES)
    assert alone is every


def test_a_look_at_a_loader_takes_no_batch_and_no_random_number(text_model: Any) -> None:
    model, tokenizer = text_model
    rows = [{"input_ids": torch.full((4,), number)} for number in range(8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
    torch.manual_seed(1)
    wanted = tokens(loader)
    torch.manual_seed(1)
    assert torch.equal(tokens(token_batches(loader, tokenizer, model, **SIZES)), wanted)


def test_factors_from_texts_are_those_of_their_batches(text_model: Any, tiny_checkpoint: Path) -> None:
    tokenizer = text_model[1]
    rows, lines = FORMS["messages"], datasets.Dataset.from_list(FORMS["text"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    from_text = prepare(load(tiny_checkpoint), tokenizer, config(), task=rows, keep=lines, progress=False, **SIZES)
    task, keep = (PackedBatches(load_texts(data), tokenizer, **SIZES) for data in (rows, lines))
    assert same(factors(from_text), factors(prepare(load(tiny_checkpoint), None, config(), task=task, keep=keep, progress=False)))


def test_sequences_are_as_long_as_the_model_has_positions_or_1024() -> None:
    assert [checked_length(model, None) for model in (small(), tiny("gpt2"), nn.Linear(2, 2))] == [1024, 256, 1024]
    with pytest.raises(ValueError, match="length must be at most 256, the positions that GPT2LMHeadModel has, not 257"):
        checked_length(tiny("gpt2"), 257)


# ---- the default of `keep`


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_default_is_mixed_and_enough_for_the_default_sizes(template: str | None) -> None:
    class Tokenizer:
        chat_template = template

    parts = default_corpus(Tokenizer()).parts
    assert set(parts) == {"prose", "questions", "code"} | ({"conversations"} if template else set())
    assert all(each.messages[0]["role"] == "user" for each in parts.get("conversations", ()))  # type: ignore[union-attr]
    assert default_corpus(Tokenizer()) == default_corpus(Tokenizer())


def test_the_default_is_named_in_one_warning_and_is_in_the_chat_template(text_model: Any) -> None:
    _, tokenizer = text_model
    model = small()
    model.resize_token_embeddings(len(tokenizer))
    with pytest.warns(DataWarning, match=r"keep is not given: 2,048 tokens of Python's own documentation .* kept less") as caught:
        prepare(model, tokenizer, config(), method="b-zero", samples=16, length=128, progress=False)
    assert sum("keep is not given" in str(each.message) for each in caught) == 1
    packed = PackedBatches(default_corpus(tokenizer), tokenizer, samples=64, length=128)
    text = tokenizer.decode(tokens(packed).flatten().tolist())
    assert "<user>What is " in text
    assert "Question: What is " in text


# ---- a model that PEFT has wrapped


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": False}, {"use_dora": True}])
def test_a_wrapped_model_gets_the_same_start_and_computes_what_its_base_does(options: Any, moments: dict[str, Path]) -> None:
    model = wrapped(**options)
    before = {name: t.clone() for name, t in model.get_base_model().state_dict().items() if "lora_" not in name}
    initialize_lora_nullspace_weights(model, task=moments["task"] if options else TASK, keep=moments["keep"], progress=False)
    assert same(factors(model), wanted_factors("contrast", moments))
    assert torch.equal(logits(model), logits(small())) or options.get("use_dora")
    assert torch.allclose(logits(model), logits(small()), rtol=0, atol=1e-5)
    assert same({name: model.get_base_model().state_dict()[name] for name in before}, before)
    assert {name.rpartition(".lora_")[2][0] for name, p in model.named_parameters() if p.requires_grad and "lora_" in name} <= {
        "B",
        "m",
    }
    assert model.peft_config["default"].init_lora_weights is True


def test_other_adapters_take_no_part_and_stay_as_they_are(moments: dict[str, Path]) -> None:
    model = wrapped("other", init_lora_weights=False, target_modules=["q_proj", "o_proj"])
    model.add_adapter("mine", config(target_modules="all-linear"))
    other, alone = factors(model, "other"), logits(model)
    initialize_lora_nullspace_weights(model, task=TASK, keep=KEEP, adapter_name="mine", progress=False)
    assert same(factors(model, "mine"), wanted_factors("contrast", moments))
    assert same(factors(model, "other"), other)
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model), alone)
    model.set_adapter("mine")
    assert torch.equal(logits(model), logits(small()))


def test_a_product_is_subtracted_beside_other_adapters_without_a_change_of_the_base(moments: dict[str, Path]) -> None:
    model = wrapped("other", init_lora_weights=False, target_modules=["q_proj"])
    model.add_adapter("mine", config(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"residual='base' would change what adapter 'other'"):
        initialize_lora_nullspace_weights(model, keep=moments["spaces"], method="lora-null", adapter_name="mine", residual="base")
    alone = logits(model)
    initialize_lora_nullspace_weights(model, keep=moments["spaces"], method="lora-null", adapter_name="mine")
    assert same(factors(model, "mine"), wanted_factors("lora-null", moments))
    assert torch.allclose(logits(model), logits(small()), rtol=0, atol=1e-5)
    model.set_adapter("other")
    assert torch.equal(logits(model), alone)


def test_a_residual_base_is_that_of_the_long_way_and_can_be_saved(moments: dict[str, Path], tmp_path: Path) -> None:
    model, wanted = wrapped(), long_way("lora-null", moments)
    initialize_lora_nullspace_weights(model, keep=KEEP, method="lora-null", progress=False)
    assert same(dict(model.get_base_model().state_dict()), dict(wanted.get_base_model().state_dict()))
    save_init(tmp_path / "out", model)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    assert torch.equal(logits(again), logits(model))


def test_a_second_start_replaces_the_first_and_trains_a_again(moments: dict[str, Path]) -> None:
    model, spaces = wrapped(), moments["spaces"]
    initialize_lora_nullspace_weights(model, task=moments["task"], keep=moments["keep"])
    initialize_lora_nullspace_weights(model, keep=spaces, method="b-zero")
    assert same(factors(model), wanted_factors("b-zero", moments))
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("place", ["start_of", "record_init"])
def test_an_error_leaves_a_wrapped_model_as_it_was(place: str, moments: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(init_lora_weights=False)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    settings, modules, calls = model.peft_config["default"].to_dict(), list(map(id, model.modules())), iter(range(99))
    whole = getattr(nullspace.integrations.peft.inject, place)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == (3 if place == "start_of" else 0):
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(f"nullspace.integrations.peft.inject.{place}", fail)
    with pytest.raises(KeyboardInterrupt):
        initialize_lora_nullspace_weights(model, task=moments["task"], keep=moments["keep"])
    assert same(dict(model.state_dict()), state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.peft_config["default"].to_dict() == settings
    assert list(map(id, model.modules())) == modules


def test_an_error_in_the_calibration_leaves_both_kinds_of_model_as_they_were() -> None:
    broken = [{"input_ids": torch.full((1, 4), 10**6)}]
    for model in (small(), wrapped()):
        state, modules = {name: t.clone() for name, t in model.state_dict().items()}, list(map(id, model.modules()))
        call: Callable[..., Any] = initialize_lora_nullspace_weights if isinstance(model, PeftModel) else prepare
        arguments = (model, None) if isinstance(model, PeftModel) else (model, None, config())
        with pytest.raises(ValueError, match="no embedding"):
            call(*arguments, task=broken, keep=KEEP, progress=False)
        assert same(dict(model.state_dict()), state)
        assert list(map(id, model.modules())) == modules
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_experts_get_the_same_start_in_a_wrapped_model() -> None:
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    whole = prepare(mixture("mixtral"), None, config(**options), task=TASK, keep=KEEP, progress=False)
    model = get_peft_model(mixture("mixtral"), config(**options))
    initialize_lora_nullspace_weights(model, task=TASK, keep=KEEP, progress=False)
    assert any("[" in name for name in factors(model))
    assert same(factors(model), factors(whole))


def test_a_trainer_of_trl_wraps_the_model_and_trains_b_alone(text_model: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint), text_model[1]
    options: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, "max_steps": 1}
    rows = datasets.Dataset.from_list(FORMS["messages"])
    settings = config(target_modules="all-linear")
    trainer = SFTTrainer(model, SFTConfig(**options), train_dataset=rows, processing_class=tokenizer, peft_config=settings)
    initialize_lora_nullspace_weights(
        trainer.model, tokenizer, task=trainer.get_train_dataloader(), keep=TEXTS, progress=False, **SIZES
    )
    before, original = factors(trainer.model), text_model[0].state_dict()
    trainer.train()
    changed = {name for name, factor in factors(trainer.model).items() if not torch.equal(factor, before[name])}
    assert {name[-1] for name in changed} == {"B"}
    base = {name.replace("base_layer.", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(t, original[name]) for name, t in base.items())


# ---- hostile input: refused before the model runs


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must not run."""
    monkeypatch.setattr(transformers.LlamaModel, "forward", lambda *_, **__: pytest.fail("the model runs"))


def moments_of_another_model(folder: Path) -> Covariances:
    return Covariances.load(folder) if (folder / "nullspace.json").exists() else compute_covariances(tiny("qwen2"), TASK, folder)


GOOD: dict[str, Any] = {"task": TASK, "keep": KEEP}
ARGUMENTS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "config must be a LoraConfig, not str", {"config": "lora"}),
    (ValueError, "method must be one of .*'contrast'", {"method": "lora"}),
    (ValueError, r"'contrast' needs examples of the task \(task=\)", {"task": None}),
    (ValueError, "'lora-null' makes no use of task", {"method": "lora-null"}),
    (ValueError, "'eva' makes no use of keep", {"method": "eva"}),
    (TypeError, "no argument 'sigma'; .* sigma_scale", {"sigma": 2.0}),
    (ValueError, "sigma_scale belongs to 'lora-null'", {"sigma_scale": 2.0}),
    (ValueError, "damping must be a positive number", {"damping": 0.0}),
    (ValueError, "samples must be at least 1", {"samples": 0}),
    (TypeError, "batch_size must be an integer", {"batch_size": "4"}),
    (TypeError, "length must be an integer", {"length": 1.5}),
    (ValueError, "length must be at most 2048, the positions", {"length": 4096}),
    (ValueError, "strategy must be one of", {"strategy": "fast"}),
    (ValueError, "precision must be one of", {"precision": "bf16"}),
    (ValueError, "experts must be one of", {"experts": "some"}),
    (ValueError, "device 'nowhere' cannot be used", {"device": "nowhere"}),
    (ValueError, "device belongs to strategy='layerwise'", {"device": "cpu", "strategy": "resident"}),
    (ValueError, "residual must be one of", {"residual": "none"}),
    (ValueError, "adapter_name must be the name of a module", {"adapter_name": "a.b"}),
    (TypeError, "adapter_name must be a string", {"adapter_name": 1}),
    (ValueError, "r ≤ 16", {"config": LoraConfig(r=20, target_modules=["k_proj"])}),
    (ValueError, "matches no linear layer", {"config": LoraConfig(target_modules=["nope"])}),
    (
        ValueError,
        "rank must be between 1 and 47",
        {"config": config(r=48, target_modules=["q_proj"]), "method": "b-zero", "task": None},
    ),
]
DATA: list[tuple[type[Exception], str, Any]] = [
    (TypeError, r"keep must be data .* not int", 5),
    (TypeError, r"keep must be data .* not bytes", b"text"),
    (ValueError, "keep is empty", []),
    (ValueError, "keep is empty", iter(())),
    (ValueError, "keep is empty", torch.utils.data.DataLoader([])),
    (TypeError, "keep must be data .* not DataFrame", pandas.DataFrame(FORMS["text"])),
    (ValueError, r"give texts as a list: keep=\['One text", "One text that is no name"),
    (ValueError, "give texts as a list", ""),
    (FileNotFoundError, "gone.jsonl is not a file", "gone.jsonl"),
    (FileNotFoundError, "gone.jsonl is not a file", ["gone.jsonl"]),
    (TypeError, "keep: entry 2 is int", ["a text", 3]),
    (TypeError, "keep holds names of files and texts", ["a text of many words", Path("gone.jsonl")]),
    (TypeError, "keep, row 2 is int: rows must be mappings", [{"text": "one"}, 3]),
    (ValueError, "keep, row 1 has no field that is known to be text; its fields are x", [{"x": "one"}]),
    (ValueError, "keep holds no text", [{"text": " "}]),
    (TypeError, "keep: batch 1 holds 'text', and no tensor", torch.utils.data.DataLoader([{"text": "one"}])),
    (ValueError, r"keep: batch 1: its input_ids have the shape \(8,\)", [TASK[0]["input_ids"][0][:8]]),
    (ValueError, "keep: batch 1 has no 'input_ids', but 'chosen_input_ids'", [{"chosen_input_ids": TASK[0]["input_ids"]}]),
]


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("error", "message", "options"), ARGUMENTS)
def test_arguments_are_refused_before_the_model_runs(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    given = {"config": config(), **GOOD, "progress": False, **options}
    with pytest.raises(error, match=message):
        prepare(small(), None, given.pop("config"), **given)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("error", "message", "keep"), DATA)
def test_data_are_refused_before_the_model_runs(error: type[Exception], message: str, keep: Any, text_model: Any) -> None:
    with pytest.raises(error, match=message):
        prepare(small(), text_model[1], config(), task=TASK, keep=keep, progress=False)


@pytest.mark.usefixtures("idle")
def test_tokenizers_are_refused_before_the_model_runs(text_model: Any) -> None:
    model, (own, tokenizer) = small(), text_model
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    for error, message, base, given, keep in (
        (ValueError, "keep holds texts, and tokenizer is None", model, None, ["a text"]),
        (ValueError, "keep is not given, and the default text needs a tokenizer", model, None, None),
        (TypeError, "tokenizer must be transformers' tokenizer of the model, not str", model, "llama", ["a text"]),
        (ValueError, "keep: the tokenizer gives token 2.., and LlamaForCausalLM has embeddings for 211", model, tokenizer, TEXTS),
        (ValueError, "keep, row 1 is a conversation, and the tokenizer  has no chat template", own, bare, FORMS["messages"]),
    ):
        with pytest.raises(error, match=message):
            prepare(base, given, config(), task=TASK, keep=keep, progress=False)


@pytest.mark.usefixtures("idle")
def test_moments_are_refused_before_the_model_runs(
    moments: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="keep is null spaces, and method 'contrast' needs second moments"):
        prepare(small(), None, config(), task=TASK, keep=moments["spaces"])
    altered = nullspace.NullSpaces.load(moments["spaces"])
    other = small(seed=1)
    for call in (
        lambda: prepare(other, None, config(), task=TASK, keep=moments["keep"]),
        lambda: prepare(other, None, config(), keep=altered, method="lora-null"),
        lambda: initialize_lora_nullspace_weights(get_peft_model(other, config()), task=TASK, keep=moments["keep"]),
    ):
        with pytest.raises(ValueError, match="is of another model"):
            call()
    (tmp_path / "nullspace.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is a folder of kind None: second moments"):
        prepare(other, None, config(), task=TASK, keep=tmp_path)


@pytest.mark.usefixtures("idle")
def test_wrapped_models_are_refused_before_they_run(moments: dict[str, Path]) -> None:
    embedding = get_peft_model(small(), config(target_modules=["embed_tokens", "q_proj"]))
    merged = wrapped()
    merged.merge_adapter()
    meta = get_peft_model(small(), config(), low_cpu_mem_usage=True)
    residual = inject_adapters(small(), config(), nullspace.NullSpaces.load(moments["spaces"]))
    second = inject_adapters(small(), config(), nullspace.NullSpaces.load(moments["spaces"]), residual="adapter")
    for error, message, model, options in (
        (TypeError, "peft_model must be a PeftModel, not LlamaForCausalLM", small(), {}),
        (ValueError, "no adapter named 'mine', but 'default'", wrapped(), {"adapter_name": "mine"}),
        (TypeError, "adapter 'default' is of VeraConfig", get_peft_model(tiny("qwen2"), VeraConfig(target_modules=["q_proj"])), {}),
        (ValueError, "init_lora_weights='pissa', with which PEFT has changed the base", wrapped(init_lora_weights="pissa"), {}),
        (ValueError, "target 'model.embed_tokens' is Embedding, not a linear layer", embedding, {}),
        (ValueError, "'default' is merged into", merged, {}),
        (ValueError, "on the meta device: wrap the model without low_cpu_mem_usage", meta, {}),
        (ValueError, "DoRA's magnitudes belong to its product", wrapped(use_dora=True, init_lora_weights=False), {}),
        (ValueError, "is the residual base", residual, {}),
        (ValueError, "was started together with a second one", second, {}),
        (ValueError, r"needs examples of the task \(task=\)", wrapped(), {"task": None}),
        (ValueError, "samples must be at least 1", wrapped(), {"samples": 0}),
    ):
        with pytest.raises(error, match=message):
            initialize_lora_nullspace_weights(model, **{**GOOD, "progress": False, **options})
