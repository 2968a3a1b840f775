"""A residual base without its adapter is not the model that it was: it is marked, and what would go wrong silently warns."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated import RANK, sources_for, spaces_for
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from models import random_batches, tiny
from nullspace import compute_null_spaces
from nullspace.artifacts.residual import KEY, residual_mark
from nullspace.integrations.peft import attach_subtracted, freeze_a, inject_adapters, save_init, write_init
from nullspace.methods import METHODS

BATCH = random_batches(1, 2, 12, seed=7)[0]
CONFIG = LoraConfig(r=RANK, lora_alpha=12)


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH, **options).logits


def said(call: Callable[[], Any]) -> list[str]:
    """The messages of the `UserWarning`s of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(issubclass(each.category, UserWarning) for each in caught if "residual" in str(each.message))
    return [str(w.message) for w in caught if "residual" in str(w.message) or "belong together" in str(w.message)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary adapter of the original model."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(3)
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def started(residual: str = "base", method: str = "lora-null") -> PeftModel:
    return inject_adapters(tiny("llama"), CONFIG, method=method, residual=residual, **sources_for(method, "llama")).eval()


# ---- the start in training mode


@pytest.mark.parametrize("method", METHODS)
def test_dropout_warns_where_and_only_where_the_first_step_in_training_is_another_models(method: str) -> None:
    for residual in ("base", "adapter"):
        model = tiny("llama")
        before = logits(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = LoraConfig(r=RANK, lora_dropout=0.25)
            adapted = inject_adapters(model, config, method=method, residual=residual, **sources_for(method, "llama"))
        ours = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "lora_dropout" in str(w.message)]
        off = (logits(adapted.train()) - before).abs().max() > 1e-5 * before.abs().max()
        assert bool(off) == METHODS[method].changes_base == bool(ours)
        assert all("lora_dropout=0.25" in text and "lora_dropout=0," in text and "'b-zero'" in text for text in ours)


def test_dropout_warns_when_files_are_written(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.1 with method 'pissa'") as caught:
        write_init(tmp_path / "out", tiny("llama"), LoraConfig(r=4, lora_dropout=0.1), method="pissa", progress=False)
    assert next(w.filename for w in caught if "lora_dropout" in str(w.message)) == __file__
    assert said(lambda: write_init(tmp_path / "no", tiny("llama"), LoraConfig(r=4), method="pissa", progress=False)) == []


# ---- without its adapter


def test_a_residual_base_that_computes_without_its_adapter_warns(plain: Path) -> None:
    model, original = started(), logits(tiny("llama"))
    model.load_adapter(plain, "plain")
    assert said(lambda: logits(model)) == []

    def disabled() -> None:
        with model.disable_adapter():
            assert not torch.allclose(logits(model), original, atol=1e-2)

    def of_rows() -> None:
        logits(model, adapter_names=["default", "__base__"])

    for call in (disabled, of_rows):
        (text,) = said(call)
        assert "residual of adapter 'default'" in text
        assert "export_lora" in text
    model.set_adapter("plain")
    assert "active: 'plain'" in said(lambda: logits(model))[0]
    model.base_model.set_adapter(["default", "plain"])  # the plain one on the original: right
    wanted = logits(PeftModel.from_pretrained(tiny("llama"), plain).eval())
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    assert said(lambda: logits(model)) == []
    model.set_adapter("default")
    assert said(lambda: (logits(model), logits(model, adapter_names=["default", "default"]))) == []
    model.merge_adapter(["default"])
    assert said(lambda: logits(model)) == []


def test_copies_of_its_adapter_belong_to_a_residual_base_too(tmp_path: Path) -> None:
    model, original = started(), logits(tiny("llama"))
    save_init(tmp_path / "out", model)
    model.load_adapter(tmp_path / "out" / "adapter", "reference")  # as TRL does
    model.set_adapter("reference")
    assert torch.allclose(logits(model), original, atol=1e-5)
    assert said(lambda: logits(model)) == []
    model.delete_adapter("default")
    assert said(lambda: logits(model)) == []


def test_a_model_that_was_copied_or_pickled_warns_as_well(plain: Path) -> None:
    for model in (copy.deepcopy(started()), pickle.loads(pickle.dumps(started()))):
        model.load_adapter(plain, "plain")
        assert said(lambda model=model: logits(model)) == []
        model.set_adapter("plain")
        assert len(said(lambda model=model: logits(model))) == 1
        assert model.base_model.unload.args[0] is model.base_model


def test_what_is_unloaded_is_said_to_be_a_residual_and_what_is_merged_is_not(plain: Path) -> None:
    texts = said(lambda: started().unload())
    assert len(texts) == 1
    assert "unload returns the residual of adapter 'default'" in texts[0]
    model = started()
    model.load_adapter(plain, "plain")
    model.set_adapter("plain")
    assert "merge_and_unload returns the residual" in said(lambda: model.merge_and_unload())[0]
    merged: list[Any] = []
    assert said(lambda: merged.append(started().merge_and_unload())) == []
    assert not hasattr(merged[0].config, KEY)
    assert torch.allclose(logits(merged[0]), logits(tiny("llama")), atol=1e-5)
    inject_adapters(merged[0], CONFIG, method="pissa")


def test_where_the_base_is_left_alone_nothing_warns_but_half_of_a_pair(plain: Path) -> None:
    for model in (started("adapter"), started(method="b-zero")):
        model.load_adapter(plain, "plain")

        def use(model: Any = model) -> None:
            model.set_adapter("plain")
            logits(model)
            with model.disable_adapter():
                logits(model)
            model.set_adapter("default")
            logits(model)

        assert said(use) == []
        assert not hasattr(model.get_base_model().config, KEY)
    pair = started("adapter")
    pair.base_model.set_adapter("default")  # not PeftModel's, which sets both
    assert "'default' and 'default_subtracted' belong together" in said(lambda: logits(pair))[0]


# ---- the mark


def test_a_residual_base_is_marked_in_memory_and_in_files_and_loads_anywhere(tmp_path: Path) -> None:
    model = started()
    base = model.get_base_model()
    save_init(tmp_path / "out", model)
    write_init(tmp_path / "two", tiny("llama"), CONFIG, spaces_for("llama"), progress=False)
    entry = json.loads((tmp_path / "out" / "base" / "config.json").read_text())[KEY]
    assert entry == json.loads((tmp_path / "two" / "base" / "config.json").read_text())[KEY] == getattr(base.config, KEY)
    assert entry["residual"]["method"] == "lora-null"
    for dtype in (torch.float32, torch.bfloat16):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=dtype)
        assert residual_mark(again) == entry["residual"]
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())[KEY] == entry
    assert residual_mark(type(base)(base.config)) is None  # the same configuration, other weights
    original = tiny("llama")
    setattr(original.config, KEY, entry)
    assert residual_mark(original) is None
    with torch.device("meta"):
        assert residual_mark(type(base)(base.config)) == entry["residual"]  # nothing to look at


@pytest.mark.parametrize("config", [None, {"model_type": "custom"}], ids=str)
def test_models_of_ones_own_have_no_place_for_a_mark(config: Any) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        if config is not None:
            model.config = config
        return model

    x = torch.randn(3, 8)
    lora = LoraConfig(r=2, target_modules=["0"])
    model = inject_adapters(make(), lora, method="pissa")
    assert torch.allclose(model(x), make()(x), atol=1e-5)
    merged: list[Any] = []
    assert said(lambda: merged.append(model.merge_and_unload())) == []
    inject_adapters(merged[0], lora, method="pissa")
    assert "unload returns" in said(lambda: inject_adapters(make(), lora, method="pissa").unload())[0]
    with torch.no_grad():
        (broken := make())[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '0': the weight holds NaN"):
        inject_adapters(broken, lora, method="pissa")


def loaded_base(tmp_path: Path) -> Any:
    if not (tmp_path / "out").exists():
        save_init(tmp_path / "out", started())
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").eval()


def test_a_residual_base_is_refused_for_a_second_start_and_calibrating_it_warns(tmp_path: Path) -> None:
    base = loaded_base(tmp_path)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    for method in ("pissa", "b-zero", "orthogonal"):
        words = r"LlamaForCausalLM is the residual base of an adapter \(method 'lora-null'\).*merge_and_unload"
        sources = {} if method != "b-zero" else {"spaces": compute_null_spaces(base, random_batches(1), rank=RANK, progress=False)}
        with pytest.raises(ValueError, match=words):
            inject_adapters(base, CONFIG, method=method, **sources)
        with pytest.raises(ValueError, match=words):
            write_init(tmp_path / "second", base, CONFIG, method=method, progress=False, **sources)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert not (tmp_path / "second").exists()
    texts = said(lambda: compute_null_spaces(base, random_batches(1), rank=4, progress=False))
    assert len(texts) == 1
    assert "and not the original model: calibrate that, or merge the adapter" in texts[0]
    merged = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").merge_and_unload()  # by PEFT alone
    assert said(lambda: compute_null_spaces(merged, random_batches(1), rank=4, progress=False)) == []
    inject_adapters(merged, CONFIG, method="pissa")


def test_adapters_that_are_loaded_again_are_known_by_the_base(plain: Path, tmp_path: Path) -> None:
    again = PeftModel.from_pretrained(loaded_base(tmp_path), tmp_path / "out" / "adapter", is_trainable=True).eval()
    freeze_a(again)
    freeze_a(again)
    again.load_adapter(plain, "plain")
    assert said(lambda: logits(again)) == []
    again.set_adapter("plain")
    assert len(said(lambda: logits(again))) == 1
    save_init(tmp_path / "pair", started("adapter"))
    with pytest.raises(ValueError, match=r"is the residual base of an adapter.*on the original model"):
        attach_subtracted(again, tmp_path / "pair" / "subtracted")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "residual",
        {},
        {"residual": True},
        {"residual": {"layer": 3, "at": [0], "values": [0.0]}},
        {"residual": {"layer": "model.layers.0.mlp.up_proj", "at": [10**9], "values": [0.0]}},
        {"residual": {"layer": "model.layers.0.mlp.up_proj", "at": [-1], "values": [0.0]}},
        {"residual": {"layer": "model.layers.0.mlp.up_proj", "at": [0, 1], "values": [float("nan"), 0.0]}},
        {"residual": {"layer": "model.layers.0.mlp.up_proj", "at": [0.5], "values": [0.0]}},
        {"residual": {"layer": "model.layers.0.mlp.up_proj", "at": {"0": 1}, "values": None}},
    ],
    ids=str,
)
def test_what_is_no_mark_of_ours_is_passed_over(entry: Any) -> None:
    model = tiny("llama")
    setattr(model.config, KEY, entry)
    assert residual_mark(model) is None
