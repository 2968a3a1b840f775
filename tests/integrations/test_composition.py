"""Every start together with what else PEFT, transformers and TRL offer: the start changes nothing, training works, and what is
saved is the trained model in a process that has only transformers and PEFT."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from calibrated import RANK, sources_for
from composed import BATCH, LEARNING_RATE, SAME, TOKENS, checkpoint, close, loaded, logits, loss_of, train
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from plain_peft import PlainPeft
from safetensors.torch import load_file
from torch import nn

from models import VOCABULARY, tiny
from nullspace.integrations import peft as integration
from nullspace.integrations.peft import export_lora, freeze_a, inject_adapters, save_init
from nullspace.methods import METHODS, frozen_factor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # TRL and PEFT to transformers
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape:UserWarning"),  # PEFT, of the biases of its own
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:lora_dropout=:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*the residual of adapter:UserWarning"),
]

THOROUGH = ("lora-null", "b-zero")
"""Composed with everything; the other methods with 16 bits and one more."""


def start(method: str, model: nn.Module, config: LoraConfig, family: str = "llama", **options: Any) -> PeftModel:
    return inject_adapters(model, config, method=method, **sources_for(method, family), **options)


@dataclass(frozen=True)
class Composition:
    config: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[PeftModel], torch.optim.Optimizer] | None = None
    prepare: Callable[[PeftModel], None] = lambda _: None


def loraplus(model: PeftModel) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=LEARNING_RATE / 4, loraplus_lr_ratio=16)


def checkpointing(use_reentrant: bool, model: PeftModel) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


PATTERNS = {
    "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.down_proj": 6},
    "alpha_pattern": {"k_proj": 32, r"layers\.0\.mlp\.up_proj": 1},
}

COMPOSITIONS = {
    "plain": Composition(),
    "frozen A": Composition(options={"freeze_a": True}),
    "frozen B": Composition(options={"freeze_b": True}),
    "rsLoRA": Composition({"use_rslora": True, "lora_alpha": 12}),
    "DoRA": Composition({"use_dora": True}),
    "DoRA, frozen A": Composition({"use_dora": True, "lora_alpha": 3}, options={"freeze_a": True}),
    "DoRA, rsLoRA, patterns": Composition({"use_dora": True, "use_rslora": True, **PATTERNS}),
    "DoRA, Conv1D": Composition({"use_dora": True}, family="gpt2"),
    "DoRA, bfloat16": Composition({"use_dora": True}, dtype=torch.bfloat16),
    "LoRA+": Composition(optimizer=loraplus),
    "patterns": Composition(PATTERNS),
    "rank budget, rsLoRA": Composition({"use_rslora": True, "lora_alpha": 12}, options={"rank_budget": 3}),
    "dropout": Composition({"lora_dropout": 0.3}),
    "whole head and norms, frozen A": Composition(
        {"modules_to_save": ["lm_head", "post_attention_layernorm"]}, options={"freeze_a": True}
    ),
    "tokens": Composition({"trainable_token_indices": TOKENS}),
    "tied embeddings": Composition(family="qwen2"),
    "tied embeddings, whole head": Composition({"modules_to_save": ["lm_head"]}, family="qwen2"),
    "tied embeddings, tokens": Composition({"trainable_token_indices": TOKENS}, family="qwen2"),
    "all biases": Composition({"bias": "all"}, family="qwen2"),
    "biases of layers": Composition({"bias": "lora_only"}, family="qwen2"),
    "biases of adapters": Composition({"lora_bias": True}),
    "checkpointing": Composition(prepare=partial(checkpointing, False)),
    "checkpointing, reentrant": Composition(prepare=partial(checkpointing, True)),
    "bfloat16": Composition(dtype=torch.bfloat16),
    "float16": Composition(dtype=torch.float16),
}

FEW = ("DoRA, rsLoRA, patterns", "whole head and norms, frozen A")


def learns(name: str, method: str) -> bool:
    """Whether something is learned where this factor is frozen: not where the other one starts at zero."""
    zero = METHODS[method].zero
    return zero is None or not COMPOSITIONS[name].options.get(f"freeze_{zero.lower()}")


CASES = [
    (name, method)
    for number, method in enumerate(METHODS)
    for name in COMPOSITIONS
    if name != "rank budget, rsLoRA"
    and (method in THOROUGH or name in ("bfloat16", FEW[number % len(FEW)]))
    and learns(name, method)
]
CASES += [("rank budget, rsLoRA", method) for method in ("contrast", "corda-kpm", "pissa", "mica-data")]


def check_base(base: Path, original: Path, adapted: PeftModel) -> None:
    """The residual checkpoint has the original's tensors, all the same to the bit but W - s B A where there are adapters."""
    residual, before = (load_file(folder / "model.safetensors") for folder in (base, original))
    assert residual.keys() == before.keys()
    for name, layer in integration.lora_layers(adapted, "default").items():
        weight = f"{name}.weight" if f"{name}.weight" in before else f"{name.removeprefix('transformer.')}.weight"
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        product = layer.scaling["default"] * b @ a
        wanted = before.pop(weight).double() - (product.T if layer.fan_in_fan_out else product)
        found = residual.pop(weight)
        limits = torch.finfo(found.dtype)
        assert ((found.double() - wanted).abs() <= limits.eps / 2 * wanted.abs() + limits.smallest_normal).all(), name
    for name, tensor in before.items():
        assert torch.equal(residual[name], tensor), name


@pytest.mark.processes
@pytest.mark.parametrize(("name", "method"), CASES)
def test_starts_as_the_base_and_what_is_saved_is_what_was_trained(
    name: str, method: str, tmp_path: Path, plain_peft: PlainPeft
) -> None:
    it = COMPOSITIONS[name]
    original = checkpoint(tmp_path / "original", it.family, it.dtype)
    model = loaded(original)
    before, exact = logits(model), logits(copy.deepcopy(model).float())
    config = LoraConfig(**{"r": RANK, "lora_alpha": RANK, **it.config})
    adapted = start(method, model, config, it.family, **it.options)
    if it.dtype == torch.float32:
        assert close(logits(adapted), before, 2e-6)
    else:  # rounding the residual costs no more than computing in 16 bits does anyhow
        # (OLoRA-tail's product is larger than these small weights, and so is what rounding its residual costs.)
        assert (logits(adapted) - exact).abs().max() <= (4 if method == "olora-tail" else 2) * (before - exact).abs().max()
    save_init(tmp_path / "init", adapted)
    frozen = frozen_factor(method, it.options.get("freeze_a"), it.options.get("freeze_b"))
    residual = METHODS[method].changes_base and frozen is None
    assert (tmp_path / "init" / "base").is_dir() == residual
    if residual:
        check_base(tmp_path / "init" / "base", original, adapted)

    it.prepare(adapted)
    for factor in ("A", "B"):
        assert (factor != frozen) == any(p.requires_grad for n, p in adapted.named_parameters() if f"lora_{factor}" in n)
    train(adapted, it.optimizer and it.optimizer(adapted))
    adapted.save_pretrained(tmp_path / "trained")
    wanted = logits(adapted)
    assert not close(wanted, before, 100 * SAME[torch.float32])  # or else the rest would say nothing
    assert close(plain_peft.logits(tmp_path / "trained", BATCH), wanted, SAME[it.dtype])

    # Two 16-bit models, each as far from the exact one as rounding once more takes it.
    noise = 1e-5 * wanted.abs().max() if it.dtype == torch.float32 else 4 * (before - exact).abs().max()
    if not (it.config.get("use_dora") and residual):
        export_lora(adapted, tmp_path / "init" / "adapter", tmp_path / "exported", base=str(original))
        assert (plain_peft.logits(tmp_path / "exported", BATCH) - wanted).abs().max() <= noise
    if not it.config.get("lora_bias"):  # the model's layers have none to merge it into
        merged = adapted.merge_and_unload()
        assert (logits(merged) - wanted).abs().max() <= noise
        merged.save_pretrained(tmp_path / "merged")
        assert (plain_peft.logits(None, BATCH, tmp_path / "merged") - wanted).abs().max() <= noise


def small(folder: Path, method: str = "lora-null", **options: Any) -> tuple[PeftModel, torch.Tensor]:
    """A started model, saved below the folder, and the logits that it began with."""
    model = loaded(checkpoint(folder / "original"))
    before = logits(model)
    adapted = start(method, model, LoraConfig(r=RANK, lora_alpha=RANK), **options)
    save_init(folder / "init", adapted)
    return adapted, before


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("method", THOROUGH)
def test_loraplus_steps_further_with_b_than_with_a(method: str, frozen: bool, tmp_path: Path) -> None:
    adapted, _ = small(tmp_path, method, freeze_a=frozen)
    before = weights(adapted)
    optimizer = loraplus(adapted)
    loss_of(adapted, torch.Generator().manual_seed(5)).backward()
    optimizer.step()
    for key, value in weights(adapted).items():
        # The first step of Adam is the learning rate in every entry with a gradient (which A has none of where B is zero).
        step = LEARNING_RATE / 4 * (16 if "lora_B" in key else 1)
        taken = 0.0 if "lora_A" in key and (method == "b-zero" or frozen) else step
        assert (value - before[key]).abs().max().item() == pytest.approx(taken, rel=1e-2), key


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_gives_the_gradients_that_there_are_without(use_reentrant: bool, tmp_path: Path) -> None:
    found = []
    for prepared in (False, True):
        adapted, _ = small(tmp_path / str(prepared), freeze_a=True)
        if prepared:
            checkpointing(use_reentrant, adapted)
        adapted.train()
        adapted(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() == {name for name in weights(adapted) if "lora_B" in name}
    assert all(close(again[name], plain[name], 1e-6) for name in plain)


@pytest.mark.processes
@pytest.mark.parametrize("method", THOROUGH)
def test_a_second_adapter_beside_ours(method: str, tmp_path: Path, plain_peft: PlainPeft) -> None:
    adapted, before = small(tmp_path, method)
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights="gaussian"))
    adapted.base_model.set_adapter(["default", "second"])
    assert close(logits(adapted), before, 2e-6)
    # Saved while another adapter is the active one: it too belongs to this base.
    adapted.set_adapter("second")
    save_init(tmp_path / "again", adapted)
    assert (tmp_path / "again" / "base").is_dir() == METHODS[method].changes_base
    adapted.base_model.set_adapter(["default", "second"])
    train(adapted)
    both = logits(adapted)
    adapted.set_adapter("default")
    one = logits(adapted)
    assert not close(both, one, 1e-3)
    assert not close(one, before, 1e-3)

    adapted.save_pretrained(tmp_path / "trained")
    adapters = {"default": tmp_path / "trained", "second": tmp_path / "trained" / "second"}
    assert close(plain_peft.logits(adapters, BATCH), one, SAME[torch.float32])
    assert close(plain_peft.logits(adapters, BATCH, active=["default", "second"]), both, SAME[torch.float32])
    if METHODS[method].changes_base:
        again = tmp_path / "again" / "base"
        assert close(plain_peft.logits(adapters["default"], BATCH, base=again), one, SAME[torch.float32])


@pytest.mark.processes
@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, **PATTERNS},
        {"lora_dropout": 0.3, "bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
    ],
    ids=lambda config: next(iter(config)),
)
def test_the_second_adapter_that_takes_the_product_away_adds_nothing_else(
    config: dict[str, Any], tmp_path: Path, plain_peft: PlainPeft
) -> None:
    model = loaded(checkpoint(tmp_path / "original", "qwen2"))
    before = logits(model)
    adapted = start("lora-null", model, LoraConfig(r=RANK, **config), "qwen2", residual="adapter")
    assert close(logits(adapted), before, 2e-6)
    save_init(tmp_path / "init", adapted)
    train(adapted)
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path / "trained")
    pair = {"default": tmp_path / "trained", "default_subtracted": tmp_path / "init" / "subtracted"}
    assert close(plain_peft.logits(pair, BATCH, active=list(pair)), wanted, SAME[torch.float32])
    export_lora(adapted, tmp_path / "init" / "adapter", tmp_path / "exported", base=str(tmp_path / "original"))
    assert close(plain_peft.logits(tmp_path / "exported", BATCH), wanted, 1e-5)


def test_tokens_are_refused_where_a_second_adapter_would_have_to_be_saved() -> None:
    config = LoraConfig(r=RANK, trainable_token_indices=TOKENS)
    with pytest.raises(ValueError, match=r"trainable_token_indices.*base that can be changed"):
        start("lora-null", tiny("llama"), config, residual="adapter")


def test_a_second_start_on_one_base_is_refused_and_the_first_is_as_it_was(tmp_path: Path) -> None:
    adapted, before = small(tmp_path, freeze_a=True, residual="base")
    config = LoraConfig(r=RANK, lora_alpha=RANK)
    for model, words in ((adapted, "already is a PeftModel"), (adapted.get_base_model(), "already has adapters")):
        for method in METHODS:
            with pytest.raises(TypeError, match=words):
                start(method, model, config)
            with pytest.raises(TypeError, match=words):
                start(method, model, config, adapter_name="second")
    assert close(logits(adapted), before, 2e-6)
    assert list(adapted.peft_config) == ["default"]
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {n for n in weights(adapted) if "lora_B" in n}
    # Without its adapter the base is a residual, to which the null spaces do not belong; merged, it is what it was.
    with pytest.raises(ValueError, match="another model"):
        start("lora-null", copy.deepcopy(adapted).unload(), config)


@pytest.mark.parametrize("method", THOROUGH)
def test_a_refused_model_has_its_own_modules_as_trainable_and_as_tied_as_they_were(method: str) -> None:
    model = tiny("qwen2")
    model.model.norm.requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for config, error in (
        ({"r": RANK + 1, "modules_to_save": ["lm_head"], "trainable_token_indices": [3]}, "rank 9"),
        ({"target_modules": ["q_proj", "nothing_of_the_kind"], "rank_pattern": {"q_proj": RANK + 1}}, "rank 9"),
        ({"target_modules": ["nothing_of_the_kind"]}, "nothing_of_the_kind"),
    ):
        with pytest.raises(ValueError, match=error):
            start(method, model, LoraConfig(**{"r": RANK, **config}), "qwen2")
        assert {name: id(module) for name, module in model.named_modules()} == modules
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not hasattr(model, "peft_config")


def test_dora_on_a_residual_base_is_not_exported_and_on_an_untouched_one_as_it_is(tmp_path: Path) -> None:
    for method in THOROUGH:
        folder = tmp_path / method
        adapted = start(method, loaded(checkpoint(folder / "original")), LoraConfig(r=RANK, use_dora=True))
        save_init(folder / "init", adapted)
        train(adapted)
        adapted.save_pretrained(folder / "trained")
        if METHODS[method].changes_base:
            with pytest.raises(ValueError, match=r"DoRA on a residual base.*merge"):
                export_lora(folder / "trained", folder / "init" / "adapter", folder / "plain")
            assert not (folder / "plain").exists()
        else:
            export_lora(folder / "trained", folder / "init" / "adapter", folder / "plain")
            trained, plain = (load_file(folder / name / "adapter_model.safetensors") for name in ("trained", "plain"))
            assert trained.keys() == plain.keys()
            assert any("magnitude" in name for name in plain)
            assert all(torch.equal(plain[name], trained[name]) for name in plain)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of as many words as the tiny models know."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", pad_token="w1", unk_token="w0")


def sequences(seed: int = 3) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": each, "labels": each} for each in ids]


def arguments(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out), "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": LEARNING_RATE,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip


def check_trained(adapted: PeftModel, before: dict[str, torch.Tensor], frozen: bool) -> None:
    """B has moved, and A has unless it is frozen: then not by a bit, as the base."""
    for name, p in adapted.named_parameters():
        trained = "lora_B" in name or ("lora_A" in name and not frozen)
        assert torch.equal(p, before[name]) == (not trained), name


TRAINED = [
    pytest.param("lora-null", False, id="lora-null"),
    pytest.param("lora-null", True, id="lora-null, frozen A"),
    pytest.param("b-zero", True, id="b-zero, frozen A"),
]


@pytest.mark.processes
@pytest.mark.parametrize(("method", "frozen"), [*TRAINED, pytest.param("contrast", True, id="contrast")])
def test_transformers_trainer_trains_saves_and_resumes(method: str, frozen: bool, tmp_path: Path, plain_peft: PlainPeft) -> None:
    adapted, _ = small(tmp_path, method, freeze_a=frozen)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}

    def trainer(model: PeftModel, out: str) -> transformers.Trainer:
        return transformers.Trainer(model, transformers.TrainingArguments(**arguments(tmp_path / out)), train_dataset=sequences())

    trainer(adapted, "straight").train()
    check_trained(adapted, before, frozen)
    assert close(plain_peft.logits(tmp_path / "straight" / "checkpoint-4", BATCH), logits(adapted), SAME[torch.float32])

    # In another process, which has but the files.
    base = loaded(tmp_path / ("init/base" if METHODS[method].changes_base and not frozen else "original"))
    again = PeftModel.from_pretrained(base, tmp_path / "init" / "adapter", is_trainable=True)
    if frozen:
        freeze_a(again)
    trainer(again, "resumed").train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    check_trained(again, before, frozen)
    straight = dict(adapted.named_parameters())
    assert all(close(p, straight[name], 1e-6) for name, p in again.named_parameters() if p.requires_grad)


@pytest.mark.processes
@pytest.mark.parametrize(("method", "frozen"), TRAINED)
def test_trl_sft_trainer(method: str, frozen: bool, tmp_path: Path, plain_peft: PlainPeft, tokenizer: Any) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    adapted, _ = small(tmp_path, method, freeze_a=frozen)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    trainer = trl.SFTTrainer(
        adapted,
        trl.SFTConfig(**arguments(tmp_path / "sft"), bf16=False),
        train_dataset=datasets.Dataset.from_list([{"input_ids": each["input_ids"]} for each in sequences()]),
        processing_class=tokenizer,
    )
    trainer.train()
    check_trained(adapted, before, frozen)
    assert close(plain_peft.logits(tmp_path / "sft" / "checkpoint-4", BATCH), logits(adapted), SAME[torch.float32])


@pytest.mark.slow
def test_trl_dpo_trainer_compares_with_the_start_and_not_with_the_residual(tmp_path: Path, tokenizer: Any) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    adapted, _ = small(tmp_path)
    texts = [tokenizer.decode(each["input_ids"]) for each in sequences()]
    pairs = [{"prompt": a[:20], "chosen": a[20:], "rejected": b} for a, b in itertools.pairwise(texts)]
    trainer = trl.DPOTrainer(
        adapted,
        args=trl.DPOConfig(**arguments(tmp_path / "dpo"), bf16=False),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # policy and reference are the same model
    assert losses[-1] < losses[0] - 1e-3
