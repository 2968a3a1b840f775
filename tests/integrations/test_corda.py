"""`preprocess_corda` in PEFT's place: the same factors where it is right, and its faults one by one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda as theirs
from torch import nn

from models import random_batches, tiny
from nullspace import Covariances, stream_covariances
from nullspace.integrations.peft import inject_adapters, preprocess_corda
from nullspace.model.sites import find_targets
from reference import recorded_inputs

TARGETS = {"llama": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}
SAMPLES = random_batches(12, 1, 64)
R = 4
# PEFT inverts C in float32: its factors are off by up to 2e-3 on one CPU and by less than 1e-3 on another.
PEFT_ROUNDING = 1e-2


def config(family: str = "llama", mode: str | None = "kpm", **options: Any) -> LoraConfig:
    corda = {key: options.pop(key) for key in ("cache_file", "covariance_file", "prune_temporary_fields") if key in options}
    wanted = {"r": R, "lora_alpha": 2 * R, "target_modules": TARGETS[family], **options}
    return LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode, **corda), **wanted)  # type: ignore[arg-type]


def runner(model: nn.Module, batches: list[dict[str, torch.Tensor]] = SAMPLES, mask: bool = False) -> Callable[[], None]:
    def run_model() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch) if mask else model(input_ids=batch["input_ids"])

    return run_model


def factors(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of a layer → A and B, of the adapter that PEFT makes."""
    base: Any = model.base_model.model  # type: ignore[union-attr]
    return {
        name: (layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double())
        for name, layer in base.named_modules()
        if hasattr(layer, "lora_A")
    }


def weight(model: nn.Module, name: str) -> torch.Tensor:
    """(d_out, d_in), float64."""
    layer = model.get_submodule(name)
    w = layer.weight.detach().double()
    return w.T if type(layer).__name__ == "Conv1D" else w


def literal(w: torch.Tensor, c: torch.Tensor, mode: str) -> torch.Tensor:
    """BA by the definition, in float64: SVD(W C) C⁻¹, r triples of it."""
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(w @ c, full_matrices=False)
    part = slice(-R, None) if mode == "kpm" else slice(R)
    return u[:, part] * s[part] @ vt[part] @ torch.linalg.inv(c)


def as_peft_counts(model: nn.Module, name: str) -> torch.Tensor:
    x = recorded_inputs(model, [{"input_ids": batch["input_ids"]} for batch in SAMPLES], [name])[name].double()
    parts = [part / part.max().abs() for part in x.split(64)]
    return sum(part.T @ part for part in parts) / len(parts)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_parity_the_adapter_is_pefts_and_that_of_the_definition(family: str, mode: str) -> None:
    adapted = {}
    for which in ("theirs", "ours"):
        model = tiny(family)
        if which == "theirs":
            theirs(model, config(family, mode), run_model=runner(model))
        else:
            preprocess_corda(model, config(family, mode), run_model=runner(model), parity=True)
        adapted[which] = factors(get_peft_model(model, config(family, mode)))
    assert adapted["ours"].keys() == adapted["theirs"].keys()
    assert len(adapted["ours"]) >= 8
    plain = tiny(family)
    for name, (a, b) in adapted["ours"].items():
        peft_a, peft_b = adapted["theirs"][name]
        wanted = literal(weight(plain, name), as_peft_counts(plain, name), mode)
        assert (2 * b @ a - wanted).norm() <= 1e-6 * wanted.norm(), name
        assert (b @ a - peft_b @ peft_a).norm() <= PEFT_ROUNDING * wanted.norm() / 2, name  # s = 2
        assert (a.abs() - peft_a.abs()).norm() <= PEFT_ROUNDING * a.norm(), name
        assert (b.abs() - peft_b.abs()).norm() <= PEFT_ROUNDING * b.norm(), name


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_product_is_divided_between_a_and_b_as_peft_does(family: str, mode: str) -> None:
    """By default too, and from covariances: random texts are so much alike that how each is weighed moves BA by some percent."""
    found: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for which, function in (("theirs", theirs), ("ours", preprocess_corda)):
        model = tiny(family)
        function(model, config(family, mode), run_model=runner(model))
        found[which] = factors(get_peft_model(model, config(family, mode)))
    model, names = tiny(family), list(found["theirs"])
    together = [{"input_ids": torch.cat([b["input_ids"] for b in SAMPLES[i : i + 4]])} for i in (0, 4, 8)]
    covariances = Covariances(stream_covariances(model, together, targets=names, precision="fp64", progress=False))
    plain = LoraConfig(r=R, lora_alpha=2 * R, target_modules=names)
    found["from covariances"] = factors(inject_adapters(model, plain, covariances=covariances, method=f"corda-{mode}"))
    for which in ("ours", "from covariances"):
        for name, (peft_a, peft_b) in found["theirs"].items():
            a, b = found[which][name]
            for ours, peft, dim in ((a, peft_a, 1), (b, peft_b, 0)):
                assert abs(float(ours.norm() / peft.norm()) - 1) < 0.06, (which, name)
                ratio = ours.norm(dim=dim) / peft.norm(dim=dim)  # of every direction
                assert 0.8 < float(ratio.min()) <= float(ratio.max()) < 1.25, (which, name)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_by_default_every_token_counts_once_and_padding_does_not(mode: str) -> None:
    batches = random_batches(3, 4, 48, padding="left")
    model = tiny("llama")
    preprocess_corda(model, config(mode=mode), run_model=runner(model, batches, mask=True))
    adapted = factors(get_peft_model(model, config(mode=mode)))
    plain = tiny("llama")
    inputs = recorded_inputs(plain, batches, list(adapted))
    for name, (a, b) in adapted.items():
        x = inputs[name].double()
        wanted = literal(weight(plain, name), x.T @ x, mode)
        assert (2 * b @ a - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_the_adapted_model_computes_what_it_computed_before_and_nothing_of_ours_is_left_on_it() -> None:
    model = tiny("llama")
    before = model(**SAMPLES[0]).logits
    preprocess_corda(model, config(), run_model=runner(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    adapted = get_peft_model(model, config())
    assert (adapted(**SAMPLES[0]).logits - before).abs().max() <= 1e-5 * before.abs().max()
    assert not any(hasattr(module, "eigens") for module in model.modules())


@pytest.mark.parametrize("reader", ["ours", "theirs"])
@pytest.mark.parametrize("file", ["covariance_file", "cache_file"])
def test_files_are_pefts_in_both_directions(file: str, reader: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.pt"
    first = tiny("llama")
    write, read = (theirs, preprocess_corda) if reader == "ours" else (preprocess_corda, theirs)
    write(first, config(**{file: str(path)}), run_model=runner(first))
    wanted = factors(get_peft_model(first, config()))
    assert [p.name for p in path.parent.iterdir()] == ["file.pt"]
    second = tiny("llama")
    read(second, config(**{file: str(path)}))  # without run_model
    for name, (a, b) in factors(get_peft_model(second, config())).items():
        product = wanted[name][1] @ wanted[name][0]
        assert (b @ a - product).norm() <= PEFT_ROUNDING * product.norm(), name


def test_a_file_without_a_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    preprocess_corda(model, config(cache_file="x.pt", covariance_file="y.pt"), run_model=runner(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt", "y.pt"]
    found = torch.load("y.pt", weights_only=True)
    q, k = found["model.layers.0.self_attn.q_proj"], found["model.layers.0.self_attn.k_proj"]
    assert q.data_ptr() == k.data_ptr()  # one input, one matrix in the file


def test_all_linear_and_no_targets_are_understood() -> None:
    model = tiny("llama")
    preprocess_corda(model, config(target_modules="all-linear"), run_model=runner(model))
    assert [n for n, m in model.named_modules() if hasattr(m, "eigens")] == list(find_targets(model))
    model = tiny("llama")
    preprocess_corda(model, config(target_modules=None), run_model=runner(model))
    assert {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "eigens")} == {"q_proj", "v_proj"}
    get_peft_model(model, config(target_modules=None))


def test_rank_patterns_count_and_fields_stay_if_asked_for() -> None:
    chosen = config(rank_pattern={"down_proj": 6}, prune_temporary_fields=False)
    model = tiny("llama")
    preprocess_corda(model, chosen, run_model=runner(model))
    layer: Any = model.get_submodule("model.layers.1.mlp.down_proj")
    assert (layer.rank, layer.corda_method, layer.covariance_matrix.shape) == (6, "kpm", (112, 112))
    adapted = factors(get_peft_model(model, chosen))
    assert {len(a) for name, (a, _) in adapted.items() if "down_proj" in name} == {6}


@pytest.mark.parametrize("parity", [True, False])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_the_fields_that_stay_are_those_of_peft(mode: str, parity: bool) -> None:
    """The number of calls, the sum over them divided by it, and hooks of others, which are called as often as the model."""
    torch.manual_seed(233)
    data, heard = torch.rand(200, 100), []
    chosen = LoraConfig(
        init_lora_weights="corda",
        target_modules=["0"],
        corda_config=CordaConfig(corda_method=mode, prune_temporary_fields=False),  # type: ignore[arg-type]
    )
    models = [nn.Sequential(nn.Linear(100, 100)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model[0].register_forward_hook(lambda *_: heard.append(1))
    theirs(models[0], chosen, run_model=lambda: [models[0](data), models[0](data)])
    preprocess_corda(models[1], chosen, run_model=lambda: [models[1](data), models[1](data)], parity=parity)
    assert len(heard) == 4
    expected, ours = models[0][0], models[1][0]
    assert ours.sample_count == expected.sample_count == 2
    torch.testing.assert_close(ours.covariance_matrix, expected.covariance_matrix, rtol=1e-5, atol=0)
    assert (ours.rank, ours.corda_method) == (expected.rank, expected.corda_method)
    models[1](data)
    assert ours.sample_count == 2


def test_another_model_may_be_run_in_the_place_of_the_one_that_is_adapted() -> None:
    model, run = tiny("llama"), tiny("llama")
    run.train()
    preprocess_corda(model, config(), run_model=runner(run), hooked_model=run)
    assert run.training
    mine = factors(get_peft_model(model, config()))
    plain = tiny("llama")
    preprocess_corda(plain, config(), run_model=runner(plain))
    for name, (a, b) in factors(get_peft_model(plain, config())).items():
        assert torch.equal(b @ a, mine[name][1] @ mine[name][0])


def _nan_file(path: Path, names: list[str]) -> None:
    sums = {name: torch.eye(112 if "down" in name else 48) for name in names}
    sums[names[1]][3, 3] = float("nan")
    torch.save(sums, path)


class _Fails(Exception):
    pass


def test_hooks_and_mode_are_restored_if_the_model_raises() -> None:
    model = tiny("llama").train()

    def run_model() -> None:
        model(input_ids=SAMPLES[0]["input_ids"])
        raise _Fails

    with pytest.raises(_Fails):
        preprocess_corda(model, config(), run_model=run_model)
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(hasattr(module, "eigens") for module in model.modules())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corda_config": None}, "corda_config is None"),
        ({"target_modules": ["no_proj"]}, "no_proj.*matches no linear layer of LlamaForCausalLM"),
        ({"r": 50}, r"q_proj' has rank 50, but its weight is 48 × 48"),
        ({"run_model": None}, "run_model is needed"),
        ({"run_model": lambda: None}, "was never called"),
        ({"mode": None}, "corda_method must be 'kpm' or 'ipm'"),
        ({"covariance_file": "nan.pt"}, r"nan\.pt: the covariance of .* holds NaN or Inf"),
        ({"covariance_file": "askew.pt"}, r"askew\.pt: the covariance of .* is not symmetric"),
        ({"covariance_file": "negative.pt"}, r"negative\.pt: the covariance of .* is zero or negative"),
        ({"covariance_file": "integers.pt"}, r"integers\.pt: the covariance of .* is torch\.int64"),
        ({"covariance_file": "pipe.pt"}, r"pipe\.pt is a pipe or a device, not a file"),
        ({"cache_file": "directory.pt"}, r"directory\.pt is a directory, not a file"),
        ({"covariance_file": "other.pt"}, r"other\.pt has no covariance of 'model\.layers\.0\.self_attn\.q_proj'"),
        ({"covariance_file": "cut.pt"}, r"cut\.pt is damaged"),
        ({"cache_file": "cut.pt"}, r"cut\.pt is damaged"),
        ({"cache_file": "pickled.pt"}, r"pickled\.pt is damaged, or holds something else than tensors"),
        ({"cache_file": "wrong.pt"}, r"wrong\.pt: 'model\.layers\.0\.self_attn\.q_proj\.eigens\.S_WC' is \(7,\), not \(4,\)"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_input_is_named_before_the_model_runs(
    change: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    names = list(find_targets(model, TARGETS["llama"]))
    _nan_file(tmp_path / "nan.pt", names)
    torch.save({"else": torch.eye(3)}, "other.pt")
    c = torch.eye(48)
    torch.save(dict.fromkeys(names, c + torch.ones(48, 48).triu(1)), "askew.pt")
    torch.save(dict.fromkeys(names, c - 2 * torch.eye(48)[0]), "negative.pt")
    torch.save(dict.fromkeys(names, c.long()), "integers.pt")
    os.mkfifo("pipe.pt")
    Path("directory.pt").mkdir()
    Path("cut.pt").write_bytes(Path("nan.pt").read_bytes()[:200])
    torch.save({"x": _Fails()}, "pickled.pt")
    torch.save({f"{names[0]}.eigens.S_WC": torch.ones(7)}, "wrong.pt")
    ran: list[int] = []

    def run_model() -> None:
        ran.append(1)

    change = dict(change)
    run = change.pop("run_model", run_model)
    chosen = config(**{key: value for key, value in change.items() if key != "corda_config"})
    if "corda_config" in change:
        chosen.corda_config = None
    with pytest.raises(ValueError, match=words):
        preprocess_corda(model, chosen, run_model=run)
    assert ran == []
    assert not any(hasattr(module, "eigens") for module in model.modules())


def test_nan_in_an_activation_names_the_layer() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj, batch 1: NaN or Inf"):
        preprocess_corda(model, config(), run_model=runner(model))
