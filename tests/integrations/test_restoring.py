"""`inject_adapters` fails: the model is what it was, to the bit, and the message names the layer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated import RANK, covariances_for, sources_for, spaces_for
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from models import random_batches, tiny
from nullspace import Covariance, Covariances, compute_null_spaces
from nullspace.artifacts.identity import weights_of
from nullspace.integrations.peft import attach_subtracted, inject, inject_adapters, row_spaces, save_init, write_init
from nullspace.methods import METHODS
from nullspace.model.sites import find_targets

DEAD = "model.layers.1.mlp.down_proj"
NAN, INF = float("nan"), -float("inf")


def _photograph(model: nn.Module) -> dict[str, Any]:
    """All that an injection may change, by value."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: [dict(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)]
            for name, module in model.named_modules()
        },
        "config": model.config.to_dict(),
    }


def _same(before: dict[str, Any], after: dict[str, Any]) -> None:
    states = before.pop("state"), after.pop("state")
    assert after == before
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value.view(torch.uint8), states[1][name].view(torch.uint8)) for name, value in states[0].items())


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Not fresh: half of it is frozen, a block trains, and hooks stand."""
    model = tiny("llama").to(dtype)
    model.gradient_checkpointing_enable()  # for which PEFT puts a hook on the embeddings
    model.model.layers[0].train()
    model.model.layers[2].requires_grad_(False)
    model.model.norm.register_forward_hook(lambda *_: None)
    return model


def _with(name: str, value: float) -> nn.Module:
    model = _model()
    with torch.no_grad():
        model.get_submodule(name).weight[3, 5] = value
    return model


def _deaf() -> Covariances:
    """Covariances of the model in which one layer has had zeros alone."""
    known = covariances_for("llama")

    def each() -> Iterator[tuple[Any, Covariance]]:
        for site in known.sites:
            silent = Covariance(site.d_in)
            silent.update(torch.zeros(100, site.d_in))
            yield site, silent if DEAD in site.members else known[site.name]

    return Covariances(each(), weights_of(find_targets(tiny("llama"))))


@pytest.mark.parametrize(("method", "residual"), [("corda-kpm", "base"), ("corda-ipm", "adapter"), ("corda-exact", "base")])
def test_a_dead_layer_is_named_and_nothing_has_changed(method: str, residual: str) -> None:
    model = _model()
    before = _photograph(model)
    with pytest.raises(ValueError, match=rf"layer '{DEAD}': its calibration inputs are all zero.*add data"):
        inject_adapters(model, LoraConfig(r=4), method=method, covariances=_deaf(), residual=residual)
    _same(before, _photograph(model))


@pytest.mark.parametrize(
    ("method", "value"),
    [("lora-null", NAN), ("corda-kpm", NAN), ("corda-exact", INF), ("sc-lora", NAN), ("milora", INF), ("pissa", NAN)],
)
def test_a_damaged_weight_is_named_and_nothing_has_changed(method: str, value: float) -> None:
    model = _with(DEAD, value)
    before = _photograph(model)
    sources = {**sources_for(method, "llama")}
    with pytest.raises(ValueError, match=rf"'{DEAD}'.*NaN or Inf|{DEAD}' begins with"):
        inject_adapters(model, LoraConfig(r=4), method=method, **sources)
    _same(before, _photograph(model))


def _fails_at(number: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise error
        return function(*args, **kwargs)

    return failing


@pytest.mark.parametrize(
    ("where", "number", "error", "dtype"),
    [
        ("get_peft_model", 1, KeyboardInterrupt(), torch.float32),
        ("start_of", 9, torch.OutOfMemoryError("CUDA out of memory"), torch.float32),
        ("freeze_layers", 1, KeyboardInterrupt(), torch.float32),
        ("residual_of", 9, MemoryError("no room"), torch.float32),
        ("write", 21, KeyboardInterrupt(), torch.bfloat16),
    ],
)
def test_an_error_at_any_stage_leaves_the_model_as_it_was(
    where: str, number: int, error: BaseException, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(dtype)
    before = _photograph(model)
    monkeypatch.setattr(inject, where, _fails_at(number, getattr(inject, where), error))
    with pytest.raises(type(error)):
        inject_adapters(model, LoraConfig(r=RANK, modules_to_save=["lm_head"]), spaces_for("llama"), freeze_a=True, residual="base")
    _same(before, _photograph(model))
    monkeypatch.undo()
    adapted = inject_adapters(model, LoraConfig(r=RANK), spaces_for("llama"))  # and it can be tried again
    assert isinstance(adapted, PeftModel)


@pytest.mark.parametrize("method", ["lora-null", "pissa"])
def test_an_error_of_one_layers_mathematics_names_the_layer(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    before = _photograph(model)
    failing = _fails_at(11, METHODS[method].start, torch.OutOfMemoryError("out of memory"))
    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], start=failing))  # type: ignore[attr-defined]
    layer = list(find_targets(model))[10]
    with pytest.raises(torch.OutOfMemoryError, match=rf"layer '{layer}': out of memory.*write_init"):
        inject_adapters(model, LoraConfig(r=4), method=method, **sources_for(method, "llama"))
    _same(before, _photograph(model))


def test_where_originals_do_not_fit_into_memory_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    modules = {name: id(module) for name, module in model.named_modules()}
    monkeypatch.setattr(inject, "free_on_host", lambda: 1000)
    monkeypatch.setattr(inject, "residual_of", _fails_at(3, inject.residual_of, KeyboardInterrupt()))
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match="^2 weights of the base are residuals now.*load the model"),
    ):
        inject_adapters(model, LoraConfig(r=RANK), spaces_for("llama"))
    assert {name: id(module) for name, module in model.named_modules()} == modules
    monkeypatch.undo()
    monkeypatch.setattr(inject, "free_on_host", lambda: 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        inject_adapters(tiny("llama"), LoraConfig(r=RANK), spaces_for("llama"))


def test_a_residual_beyond_the_range_of_the_weights_dtype_is_refused() -> None:
    model = _model(torch.float16)
    before = _photograph(model)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0.*beyond the range of torch\.float16"):
        inject_adapters(model, LoraConfig(r=4), spaces_for("llama"), sigma_scale=1e9)
    _same(before, _photograph(model))


def test_files_of_a_damaged_model_are_not_begun(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"layer '{DEAD}': the weight holds NaN"):
        write_init(tmp_path / "out", _with(DEAD, NAN), LoraConfig(r=4), method="milora", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_second_adapter_that_cannot_be_read_is_not_attached(tmp_path: Path) -> None:
    save_init(tmp_path / "out", inject_adapters(tiny("llama"), LoraConfig(r=4), method="pissa", residual="adapter"))
    (tmp_path / "out" / "subtracted" / "adapter_model.safetensors").unlink()
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "out" / "adapter")
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        attach_subtracted(model, tmp_path / "out" / "subtracted")
    assert list(model.peft_config) == ["default"]


class _Gated(nn.Module):
    """Modules of the base that have PEFT's names."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(48, 48, bias=False)
        self.lora_gate = nn.Linear(48, 48, bias=False)
        self.lora_A = nn.Linear(48, 48, bias=False)
        self.modules_to_save = nn.LayerNorm(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.modules_to_save(self.base_layer(x) + self.lora_gate(x).sigmoid() * self.lora_A(x))


class GatedLlama(transformers.LlamaForCausalLM):
    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.self_attn.o_proj = _Gated()


@pytest.mark.parametrize("targets", [["q_proj", "lora_A", "base_layer"], ["lora_gate"]])
def test_modules_of_the_base_that_are_called_like_pefts_are_the_bases(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GatedLlama(tiny("llama").config).eval()
    assert "model.layers.0.self_attn.o_proj.lora_A" in find_targets(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batch = random_batches(1, 2, 12, seed=7)[0]
    with torch.no_grad():
        before = model(**batch).logits
    spaces = compute_null_spaces(model, random_batches(4), rank=4, targets=targets, progress=False)
    config = LoraConfig(r=4, modules_to_save=["lm_head"])
    write_init(tmp_path / "written", model, LoraConfig(r=4), spaces, progress=False)
    adapted = inject_adapters(model, config, spaces)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if ".default." in name}
    save_init(tmp_path / "saved", adapted)
    for out in (tmp_path / "written", tmp_path / "saved"):
        saved = load_file(out / "base" / "model.safetensors")
        assert saved.keys() == state.keys()
        assert {name for name, value in saved.items() if not torch.equal(value, state[name])} == {f"{n}.weight" for n in spaces}
        again = PeftModel.from_pretrained(GatedLlama.from_pretrained(out / "base"), out / "adapter").eval()
        with torch.no_grad():
            assert (again(**batch).logits - before).abs().max() <= 2e-6 * before.abs().max()
        assert row_spaces(out / "adapter").keys() == row_spaces(again).keys() == set(spaces)
