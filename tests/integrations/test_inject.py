"""Injection, freezing, saving and export, on tiny models of every family."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from calibrated import RANK, covariances_for, sources_for, spaces_for
from peft import LoraConfig, PeftModel, get_peft_model
from plain_peft import PlainPeft
from torch import nn

from models import FAMILIES, random_batches, tiny
from nullspace import Covariances, NullSpaces, factors
from nullspace.artifacts import records
from nullspace.factors import LowRank
from nullspace.integrations import peft as integration
from nullspace.integrations.peft import attach_subtracted, export_lora, freeze_a, freeze_b, inject_adapters, save_init
from nullspace.methods import METHODS, Layer, Method, Sources
from reference import recorded_inputs

BATCH = random_batches(1, 2, 32, seed=7)[0]
ALTERING = [name for name, each in integration.METHODS.items() if each.changes_base]


def logits(model: nn.Module, batch: dict[str, torch.Tensor] = BATCH) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return integration.lora_layers(model, "default")


def product(layer: Any) -> torch.Tensor:
    """s · B A, in float64."""
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return layer.scaling["default"] * b @ a


def plain_weight(layer: Any) -> torch.Tensor:
    """(d_out, d_in), float64."""
    weight = layer.get_base_layer().weight.double()
    return weight.T if layer.fan_in_fan_out else weight


def train(model: nn.Module, steps: int = 20) -> None:
    """AdamW on random targets, at the paper's order of learning rate."""
    torch.manual_seed(5)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        ids = torch.randint(3, 200, (2, 24))
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# A method does not see the family: one on all of them, the others on both layouts of a weight and on one more.
PAIRS = [
    (family, method)
    for number, method in enumerate(integration.METHODS)
    for family in FAMILIES
    if method == "lora-null" or family in ("llama", "gpt2", [*FAMILIES][number % len(FAMILIES)])
]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_the_model_computes_what_it_computed_before(family: str, method: str) -> None:
    model = tiny(family)
    before = logits(model)
    after = logits(inject_adapters(model, LoraConfig(r=RANK, lora_alpha=RANK), method=method, **sources_for(method, family)))
    assert (after - before).abs().max() <= 2e-6 * before.abs().max()


@pytest.mark.parametrize("method", integration.METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scaled_product_is_that_of_the_method_and_nothing_of_the_weight_is_lost(family: str, method: str) -> None:
    originals = {name: m.weight.detach().double() for name, m in tiny(family).named_modules() if name in spaces_for(family)}
    torch.manual_seed(11)
    model = inject_adapters(tiny(family), LoraConfig(r=RANK, lora_alpha=24), method=method, **sources_for(method, family))
    known = {name: covariances_for(family)[name].matrix() for name in originals}
    other = {name: covariances_for(family, seed=2)[name].matrix() for name in originals}
    for name, layer in lora_layers(model).items():
        w = originals[name].T if layer.fan_in_fan_out else originals[name]
        c, minus, basis = known[name], other[name], spaces_for(family)[name].basis
        damped = c / c.diagonal().mean() + 0.01 * torch.eye(len(c), dtype=torch.float64)
        tokens, r = covariances_for(family)[name].tokens, RANK
        values, vectors = torch.linalg.eigh(c)
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        left, _, _ = torch.linalg.svd(w @ damped, full_matrices=False)
        exact, _, _ = torch.linalg.svd(w @ vectors * values.clamp(min=0).sqrt(), full_matrices=False)
        outputs = torch.linalg.eigh(w @ (c - minus) @ w.T / (2 * tokens)).eigenvectors[:, -r:]
        nothing = torch.zeros_like(w)
        wanted = {
            "lora-null": w @ basis @ basis.T,
            "corda-kpm": left[:, -r:] @ left[:, -r:].T @ w,
            "corda-ipm": left[:, :r] @ left[:, :r].T @ w,
            "corda-exact": exact[:, -r:] @ exact[:, -r:].T @ w,
            "astra": exact[:, :r] @ exact[:, :r].T @ w,
            "olora-tail": u[:, -r:] @ vt[-r:],
            "sc-lora": outputs @ outputs.T @ w,
            "milora": u[:, -r:] * s[-r:] @ vt[-r:],
            "pissa": u[:, :r] * s[:r] @ vt[:r],
        }.get(method, nothing)
        assert (product(layer) - wanted).norm() <= 1e-6 * w.norm(), name
        rest = plain_weight(layer) + (product(layer) if method in ALTERING else 0)
        assert (rest - w).abs().max() <= 2**-23 * max(w.abs().max(), wanted.abs().max()), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_is_pefts_without_its_rounding(family: str) -> None:
    config = {"r": RANK, "lora_alpha": 24, "target_modules": list(spaces_for(family))}
    theirs = lora_layers(get_peft_model(tiny(family), LoraConfig(**config, init_lora_weights="pissa")))
    ours = lora_layers(inject_adapters(tiny(family), LoraConfig(**config), method="pissa"))
    original = lora_layers(get_peft_model(tiny(family), LoraConfig(**config)))
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        u, s, vt = torch.linalg.svd(plain_weight(original[name]), full_matrices=False)
        wanted = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        error, pefts = ((product(each[name]) - wanted).norm() / wanted.norm() for each in (ours, theirs))
        assert error <= 1e-6, name
        assert error < pefts <= 1e-4, name  # PEFT's SVD is in float32
        assert (plain_weight(layer) - plain_weight(theirs[name])).norm() <= 2 * pefts * wanted.norm(), name


@pytest.mark.parametrize("method", ["lora-null", "b-zero"])
def test_null_spaces_are_found_in_covariances_where_only_these_are_given(method: str) -> None:
    # Of the same sums: those of `spaces_for` have other precisions, and vectors of close eigenvalues turn by rounding.
    spaces = NullSpaces.from_covariances(covariances_for("llama"), rank=RANK, progress=False)
    from_spaces = inject_adapters(tiny("llama"), LoraConfig(r=RANK), spaces, method=method)
    from_sums = inject_adapters(tiny("llama"), LoraConfig(r=RANK), method=method, covariances=covariances_for("llama"))
    for name, layer in lora_layers(from_sums).items():
        mine, theirs = layer.lora_A["default"].weight, lora_layers(from_spaces)[name].lora_A["default"].weight
        projectors = [torch.linalg.qr(a.detach().double().T).Q for a in (mine, theirs)]
        assert torch.linalg.matrix_norm(projectors[0].T @ projectors[1]).square() >= RANK - 1e-6, name


def test_a_method_is_one_pure_function_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(layer: Layer, given: Sources) -> LowRank:
        assert layer.weight is not None
        assert given.covariances is not None
        return factors.corda_exact(layer.weight, given.covariances[layer.name].matrix(), rank=layer.rank, mode="ipm")

    monkeypatch.setitem(METHODS, "corda-exact-ipm", Method(("covariances",), True, (), start))
    model = tiny("llama")
    expected = logits(model)
    adapted = inject_adapters(model, LoraConfig(r=RANK), method="corda-exact-ipm", covariances=covariances_for("llama"))
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(adapted).values())
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("lora-null", {"spaces": None}, "'lora-null' needs null spaces"),
        ("corda-kpm", {"covariances": None}, "'corda-kpm' needs the second moments.*compute_covariances"),
        ("sc-lora", {"preserve": None}, "'sc-lora' needs the second moments of what is to be preserved"),
        ("contrast", {"covariances": None}, "'contrast' needs the second moments of its data"),
        ("contrast", {"preserve": None}, "'contrast' needs the second moments of what is to be preserved"),
        ("contrast", {"preserve": "gpt2"}, "there is no covariance for 'model"),
        ("contrast", {"damping": 0.0}, "damping must be a positive number"),
        ("contrast", {"split": 2.0}, "split belongs to 'lora-null' and .*; 'contrast' does not take it"),
        ("inflora", {"share": 1.5}, "share must be between 0 and 1"),
        ("contrast", {"share": 0.5}, "share belongs to 'inflora'; 'contrast' does not take it"),
        ("lora-null", {"split": 0.0}, "split must be a positive number"),
        ("pissa", {"covariances": "llama"}, "'pissa' makes no use of covariances"),
        ("pissa", {"beta": 0.7}, "beta belongs to 'sc-lora'; 'pissa' does not take it"),
        ("sc-lora", {"beta": 1.5}, "beta must be between 0 and 1"),
        ("corda-ipm", {"damping": -1.0}, "damping must be"),
        ("corda-ipm", {"damping": float("nan")}, "damping must be"),
        ("milora", {"r": 17}, "k_proj' has rank 17, but its weight is 16 × 48"),
        ("orthogonal", {"r": 7}, "has rank 7: method 'orthogonal' needs an even one"),
        ("eva", {"covariances": "gpt2"}, "there is no covariance for 'model"),
        ("corda", {}, "method must be one of 'lora-null'.*'corda-kpm'"),
    ],
)
def test_what_a_method_lacks_or_does_not_take_is_said_before_the_model_is_touched(
    method: str, change: dict[str, Any], words: str
) -> None:
    arguments = {**(sources_for(method, "llama") if method in integration.METHODS else {}), **change}
    rank = arguments.pop("r", RANK)
    arguments |= {name: covariances_for(of) for name, of in arguments.items() if isinstance(of, str)}
    model = tiny("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    targets = ["q_proj", "k_proj"]
    with pytest.raises(ValueError, match=words):
        inject_adapters(model, LoraConfig(r=rank, target_modules=targets), method=method, **arguments)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("method", ["lora-null", "corda-kpm", "pissa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_second_frozen_adapter_takes_the_product_away_and_leaves_the_base_alone(family: str, method: str, tmp_path: Path) -> None:
    base = tiny(family)
    before, state = logits(base), {name: value.clone() for name, value in base.state_dict().items()}
    config = LoraConfig(r=RANK, lora_alpha=24, lora_dropout=0.1)
    model = inject_adapters(base, config, method=method, residual="adapter", **sources_for(method, family)).eval()
    assert (logits(model) - before).abs().max() <= 2e-6 * before.abs().max()
    save_init(tmp_path / "init", model)
    assert sorted(p.name for p in (tmp_path / "init").iterdir()) == ["adapter", "nullspace.json", "subtracted"]
    frozen = {n: p.clone() for n, p in model.named_parameters() if "default_subtracted" in n}
    train(model, 5)
    now = dict(model.named_parameters())
    assert frozen
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    left = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.state_dict().items()}
    assert all(torch.equal(left[n], value) for n, value in state.items())
    wanted = logits(model)
    assert (wanted - before).abs().max() > 1e-3 * before.abs().max()
    # Loaded again, to be trained on.
    model.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    again = PeftModel.from_pretrained(tiny(family), tmp_path / "trained", is_trainable=True)
    attach_subtracted(again, tmp_path / "init" / "subtracted")
    assert (logits(again.eval()) - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    trainable = [n for n, p in again.named_parameters() if p.requires_grad]
    assert trainable
    assert not any("subtracted" in n for n in trainable)
    # One plain adapter of both.
    export_lora(tmp_path / "trained", tmp_path / "init" / "adapter", tmp_path / "plain", base="the-base")
    exported = PeftModel.from_pretrained(tiny(family), tmp_path / "plain").eval()
    assert (logits(exported) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_with_a_frozen_and_a_base_that_cannot_change_b_starts_at_zero() -> None:
    base = _tied_base()
    before, state = logits(base), {name: value.clone() for name, value in base.state_dict().items()}
    spaces = NullSpaces([spaces_for("llama")[site.name] for site in spaces_for("llama").sites])
    model = inject_adapters(base, LoraConfig(r=RANK), spaces, freeze_a=True)
    assert torch.equal(logits(model), before)
    plain = inject_adapters(tiny("llama"), LoraConfig(r=RANK), spaces_for("llama"), freeze_a=True)
    mine, theirs = lora_layers(model), lora_layers(plain)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(mine[name].lora_A["default"].weight, theirs[name].lora_A["default"].weight)
    assert model.active_adapters == ["default"]
    train(model, 3)
    left = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.state_dict().items()}
    assert all(torch.equal(left[n], value) for n, value in state.items())


def test_dora_is_refused_where_two_adapters_would_have_to_add_up() -> None:
    with pytest.raises(ValueError, match=r"use_dora.*base that can be changed"):
        inject_adapters(tiny("llama"), LoraConfig(r=RANK, use_dora=True), method="pissa", residual="adapter")


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 1},
        {"lora_alpha": 40},
        {"lora_alpha": 12, "use_rslora": True},
        {"lora_alpha": 16, "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 5}, "alpha_pattern": {"k_proj": 32}},
        {"r": 5, "lora_alpha": 5},
    ],
    ids=lambda c: ",".join(c),
)
def test_scaled_product_is_the_best_part_of_the_projected_weight_and_the_base_is_the_rest(config: dict[str, Any]) -> None:
    spaces = spaces_for("llama")
    originals = {name: m.weight.detach().double() for name, m in tiny("llama").named_modules() if name in spaces}
    model = inject_adapters(tiny("llama"), LoraConfig(**{"r": RANK, **config}), spaces)
    for name, layer in lora_layers(model).items():
        u, s, vt = torch.linalg.svd(originals[name] @ spaces[name].basis @ spaces[name].basis.T)
        rank = layer.r["default"]
        wanted = u[:, :rank] * s[:rank] @ vt[:rank]
        assert (product(layer) - wanted).norm() <= 1e-6 * wanted.norm(), name
        assert (plain_weight(layer) + product(layer) - originals[name]).abs().max() <= 2**-24 * originals[name].abs().max(), name
    assert {layer.r["default"] for layer in lora_layers(model).values()} == {config.get("r", RANK)} | set(
        config.get("rank_pattern", {}).values()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_of_a_16_bit_weight_is_rounded_once_from_the_factors_as_stored(family: str, dtype: torch.dtype) -> None:
    originals = {
        name: m.weight.detach().to(dtype).double() for name, m in tiny(family).named_modules() if name in spaces_for(family)
    }
    model = tiny(family).to(dtype)
    before = logits(model).float()
    exact = logits(copy.deepcopy(model).float())
    adapted = inject_adapters(model, LoraConfig(r=RANK, lora_alpha=16), spaces_for(family))
    for name, layer in lora_layers(adapted).items():
        stored = layer.get_base_layer().weight
        assert stored.dtype == dtype
        original = originals[name].T if layer.fan_in_fan_out else originals[name]
        wanted = original - product(layer)
        half_ulp = torch.finfo(dtype).eps / 2 * wanted.abs()
        assert ((plain_weight(layer) - wanted).abs() <= half_ulp + torch.finfo(dtype).smallest_normal).all(), name
    # Rounding the residual costs no more than computing in 16 bits does anyhow.
    assert (logits(adapted).float() - exact).abs().max() <= 2 * (before - exact).abs().max() + 1e-3


def test_b_zero_leaves_the_base_alone_and_its_a_is_the_quietest_directions() -> None:
    spaces = spaces_for("llama")
    original = tiny("llama").state_dict()
    model = inject_adapters(tiny("llama"), LoraConfig(r=5, lora_alpha=7), spaces, method="b-zero")
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, original[f"{name}.weight"])
        assert torch.equal(layer.lora_A["default"].weight, spaces[name].basis[:, :5].T.float())
        assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"lora_alpha": 12, "use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 32}}),
        ("gpt2", {}),
    ],
)
def test_contrast_answers_the_task_and_least_of_what_is_kept_and_trains_b_alone(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    base, before = tiny(family), tiny(family).state_dict()
    expected = logits(base)
    task, keep = covariances_for(family), covariances_for(family, seed=2)
    model = inject_adapters(base, LoraConfig(r=RANK, **config), method="contrast", covariances=task, preserve=keep)
    assert torch.equal(logits(model), expected)  # B = 0, on any base
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight.detach().double()
        c_task, c_keep = (c / c.trace() for c in (task[name].matrix(), keep[name].matrix()))
        # The Rayleigh quotients of the rows are the largest that there are, whatever the scaling of PEFT.
        values, _ = scipy.linalg.eigh(c_task.numpy(), (c_keep + 0.01 / len(c_keep) * torch.eye(len(c_keep))).numpy())
        ratios = ((a @ c_task) * a).sum(1) / (((a @ c_keep) * a).sum(1) + 0.01 / len(c_keep) * a.square().sum(1))
        wanted = torch.from_numpy(values).flip(0)[: len(a)]
        assert (ratios - wanted).abs().max() <= 1e-5 * wanted.max(), name
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(lora_layers(model))))
    model.set_adapter("default")
    start = {name: p.clone() for name, p in model.named_parameters() if "lora_A" in name}
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}
    train(model, 3)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in start.items())
    left = {name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.state_dict().items()}
    assert all(torch.equal(left[name], value) for name, value in before.items())
    # A plain LoRA of the untouched base, which loads without us.
    wanted = logits(model)
    model.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    again = PeftModel.from_pretrained(tiny(family), tmp_path / "trained").eval()
    assert (logits(again) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert "freeze_a(model)" in (tmp_path / "trained" / "README.md").read_text(encoding="utf-8")


def test_mica_is_pefts(tmp_path: Path) -> None:
    """The same factors but for the rounding of its float32 and for signs; the same training, and its own way of freezing B."""
    config = {"r": RANK, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    theirs = get_peft_model(tiny("llama"), LoraConfig(**config, init_lora_weights="mica"))
    ours = inject_adapters(tiny("llama"), LoraConfig(**config), method="mica")
    for name, layer in lora_layers(ours).items():
        b, other = (each.lora_B["default"].weight for each in (layer, lora_layers(theirs)[name]))
        assert (other * (b * other).sum(0).sign() - b).norm() <= 1e-4
        assert not layer.lora_A["default"].weight.any()
        with torch.no_grad():
            other.copy_(b)
    for model in (ours, theirs):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("default")
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A"}
        train(model, 2)
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-6 * logits(theirs).abs().max()
    # What PEFT has saved as its own it freezes again; ours says in its card that it has to be asked.
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / name, selected_adapters=["default"])
        again = PeftModel.from_pretrained(tiny("llama"), tmp_path / name, is_trainable=True)
        assert (logits(again) - logits(ours)).abs().max() <= 1e-6 * logits(ours).abs().max()
        if name == "ours":
            assert "freeze_b(model)" in (tmp_path / name / "README.md").read_text(encoding="utf-8")
            freeze_b(again)
        else:
            with pytest.raises(ValueError, match="B of adapter 'default' is frozen: with freeze_a nothing would train"):
                freeze_a(again)
        again.set_adapter("default")
        before = {key: layer.lora_B["default"].weight.clone() for key, layer in lora_layers(again).items()}
        train(again, 2)
        assert all(torch.equal(layer.lora_B["default"].weight, before[key]) for key, layer in lora_layers(again).items())
        assert all(layer.lora_A["default"].weight.any() for layer in lora_layers(again).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_a": True, "freeze_b": True}, "with freeze_a and freeze_b nothing trains"),
        ({"method": "b-zero", "freeze_b": True}, "'b-zero' starts with B = 0, and with B frozen nothing is learned"),
        ({"method": "mica", "freeze_a": True}, "'mica' starts with A = 0, and with A frozen nothing is learned"),
        ({"method": "mica", "window": 0.5}, "window belongs to 'corda-exact' and 'astra' and 'milora'"),
        ({"method": "milora", "window": 1.5}, "window must be between 0 and 1"),
        ({"method": "mica", "config": {"lora_bias": True}}, "lora_bias is a bias of B"),
    ],
)
def test_a_factor_alone_is_trained_only_where_that_learns(options: dict[str, Any], message: str) -> None:
    options = {"method": "lora-null", **options}
    config = LoraConfig(r=RANK, **options.pop("config", {}))
    for door in (inject_adapters, functools.partial(integration.write_init, "nowhere")):
        with pytest.raises(ValueError, match=message):
            door(tiny("llama"), config, **options, **sources_for(options["method"], "llama"))


def test_a_window_of_the_singular_triples_reaches_the_adapter() -> None:
    for method, window in (("milora", 0.5), ("corda-exact", 0.25), ("astra", 1.0)):
        sources, config = sources_for(method, "llama"), LoraConfig(r=RANK, target_modules=["q_proj"])
        model = inject_adapters(tiny("llama"), config, method=method, window=window, **sources)
        name, layer = next(iter(lora_layers(model).items()))
        c = covariances_for("llama")[name].matrix()
        start = getattr(factors, method.replace("-", "_"))
        wanted = start(plain_weight(layer) + product(layer), *([c] if sources else []), rank=RANK, window=window)
        assert (product(layer) - wanted.B @ wanted.A).norm() <= 1e-5 * (wanted.B @ wanted.A).norm()


def test_a_is_trained_with_contrast_where_the_caller_wants_it(tmp_path: Path) -> None:
    sources = sources_for("contrast", "llama")
    model = inject_adapters(tiny("llama"), LoraConfig(r=RANK), method="contrast", freeze_a=False, **sources)
    assert all(layer.lora_A["default"].weight.requires_grad for layer in lora_layers(model).values())
    save_init(tmp_path / "out", model)
    assert records.read_json(tmp_path / "out" / "nullspace.json")["freeze_a"] is False
    assert "freeze_a" not in (tmp_path / "out" / "adapter" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("split", [8.0, 0.3])
@pytest.mark.parametrize("method", ALTERING)
def test_split_shifts_the_product_between_the_factors_and_leaves_it_as_it_is(method: str, split: float) -> None:
    sources, config = sources_for(method, "llama"), LoraConfig(r=RANK, lora_alpha=24)
    model = tiny("llama")
    before = logits(model)
    shifted = inject_adapters(model, config, method=method, split=split, **sources)
    assert (logits(shifted) - before).abs().max() <= 2e-6 * before.abs().max()
    even = lora_layers(inject_adapters(tiny("llama"), config, method=method, **sources))
    for name, layer in lora_layers(shifted).items():
        (a, b), (a0, b0) = ((each.lora_A["default"].weight, each.lora_B["default"].weight) for each in (layer, even[name]))
        for mine, theirs in ((a, split * a0), (b, b0 / split)):
            assert (mine - theirs).abs().max() <= 2**-22 * theirs.abs().max(), name
        if split == 8.0:  # a power of two: not a bit of the base differs
            assert torch.equal(layer.get_base_layer().weight, even[name].get_base_layer().weight)


def test_sigma_scale_multiplies_the_product_and_still_changes_nothing_at_the_start() -> None:
    one = inject_adapters(tiny("llama"), LoraConfig(r=RANK), spaces_for("llama"))
    model = tiny("llama")
    before = logits(model)
    four = inject_adapters(model, LoraConfig(r=RANK), spaces_for("llama"), sigma_scale=4.0)
    for name, layer in lora_layers(four).items():
        assert torch.allclose(product(layer), 4 * product(lora_layers(one)[name]), atol=1e-6)
    assert (logits(four) - before).abs().max() <= 2e-6 * before.abs().max()


@pytest.mark.parametrize("config", [{}, {"lora_alpha": 40}, {"use_rslora": True}], ids=["plain", "alpha", "rslora"])
def test_with_a_frozen_training_stays_in_the_null_space(config: dict[str, Any]) -> None:
    batches = random_batches()
    spaces = spaces_for("llama")
    names = [site.name for site in spaces.sites]
    inputs = recorded_inputs(tiny("llama"), batches, names)
    model = inject_adapters(tiny("llama"), LoraConfig(r=RANK, **config), spaces, freeze_a=True)
    start = copy.deepcopy(lora_layers(model))
    train(model)
    moved = []
    for name, layer in lora_layers(model).items():
        a, a0 = layer.lora_A["default"].weight, start[name].lora_A["default"].weight
        assert torch.equal(a, a0), name
        if name in inputs:
            x = inputs[name].double()
            update = x @ (product(layer) - product(start[name])).T
            scale = layer.scaling["default"]
            b_moved = scale * (layer.lora_B["default"].weight - start[name].lora_B["default"].weight).double()
            bound = torch.linalg.matrix_norm(b_moved, 2) * (x @ a0.double().T).norm()
            assert update.norm() <= bound * (1 + 1e-9), name
            moved.append(b_moved.norm().item())
    assert max(moved) > 0.01  # B was trained: the bound did not hold for want of an update


def test_frozen_a_stays_frozen_through_set_adapter_and_a_second_adapter(tmp_path: Path) -> None:
    model = inject_adapters(tiny("llama"), LoraConfig(r=RANK), spaces_for("llama"), freeze_a=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    for name in ("other", "default"):
        model.set_adapter(name)
    layers = lora_layers(model)
    assert not any(layer.lora_A["default"].weight.requires_grad for layer in layers.values())
    assert all(layer.lora_B["default"].weight.requires_grad for layer in layers.values())
    model.set_adapter("other")
    assert layers["model.layers.0.self_attn.q_proj"].lora_A["other"].weight.requires_grad


def test_frozen_a_survives_saving_and_loading(tmp_path: Path) -> None:
    model = inject_adapters(tiny("llama"), LoraConfig(r=RANK), spaces_for("llama"), freeze_a=True)
    save_init(tmp_path / "out", model, spaces_for("llama"))
    train(model, 2)
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "trained", is_trainable=True)
    freeze_a(again)
    again.set_adapter("default")
    train(again, 2)
    for name, layer in lora_layers(again).items():
        assert torch.equal(layer.lora_A["default"].weight, lora_layers(model)[name].lora_A["default"].weight)
        assert not torch.equal(layer.lora_B["default"].weight, lora_layers(model)[name].lora_B["default"].weight)


@pytest.mark.processes
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_saved_loads_with_plain_peft_in_a_process_that_never_imports_us(
    family: str, tmp_path: Path, plain_peft: PlainPeft
) -> None:
    model, batch = tiny(family), {"input_ids": BATCH["input_ids"]}
    known = logits(model, batch)
    adapted = inject_adapters(model, LoraConfig(r=RANK, lora_alpha=3), spaces_for(family))
    save_init(tmp_path / "out", adapted, spaces_for(family), record={"note": "x"})
    # Saving does not touch the model.
    assert torch.allclose(logits(adapted, batch), known, atol=1e-5)
    plain = plain_peft.logits(tmp_path / "out" / "adapter", batch, tmp_path / "out" / "base")
    assert (plain - known).abs().max() < 2e-6 * known.abs().max()
    assert len(NullSpaces.load(tmp_path / "out" / "spaces")) == len(spaces_for(family))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    ("family", "method", "config"),
    [
        *(("llama", method, {}) for method in integration.METHODS),
        ("llama", "lora-null", {"use_rslora": True, "lora_alpha": 12}),
        ("llama", "lora-null", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 32}}),
        ("llama", "lora-null", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 32}, "use_rslora": True}),
        ("gpt2", "lora-null", {}),
    ],
)
def test_exported_lora_on_the_untouched_base_is_the_trained_model(
    family: str, method: str, config: dict[str, Any], frozen: bool, tmp_path: Path
) -> None:
    freeze: dict[str, Any] = {"freeze_b" if METHODS[method].zero == "A" else "freeze_a": frozen}
    model = inject_adapters(tiny(family), LoraConfig(r=RANK, **config), method=method, **freeze, **sources_for(method, family))
    save_init(tmp_path / "init", model)
    before = logits(model)
    train(model, 5)
    export_lora(model, tmp_path / "init" / "adapter", tmp_path / "plain", base="the-base")
    exported = PeftModel.from_pretrained(tiny(family), tmp_path / "plain").eval()
    wanted = logits(model)
    assert (logits(exported) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (wanted - before).abs().max() > 1e-3 * wanted.abs().max()  # training did something
    assert exported.peft_config["default"].r == (RANK if frozen or method not in ALTERING else 2 * RANK)
    assert exported.peft_config["default"].base_model_name_or_path == "the-base"


def test_export_refuses_adapters_that_do_not_belong_together(tmp_path: Path) -> None:
    for name, config in {"a": {}, "b": {"lora_alpha": 99}, "c": {"target_modules": ["q_proj"]}, "d": {"use_dora": True}}.items():
        get_peft_model(tiny("llama"), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **config})).save_pretrained(
            tmp_path / name
        )
    for other, words in (("b", "lora_alpha is 8 and 99"), ("c", "v_proj.*not in the initial adapter")):
        with pytest.raises(ValueError, match=words):
            export_lora(tmp_path / "a", tmp_path / other, tmp_path / "out")
    with pytest.raises(ValueError, match="use_dora is True and False"):
        export_lora(tmp_path / "d", tmp_path / "a", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        export_lora(tmp_path / "none", tmp_path / "a", tmp_path / "out")
    weights = tmp_path / "c" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        export_lora(tmp_path / "c", tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Packed(nn.Linear):
    """A stand-in for a quantised layer: what matters is that its weight is not a floating-point matrix."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(like.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def _packed_base() -> nn.Module:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = _Packed(model.model.layers[1].mlp.up_proj)
    return model


def _tied_base() -> nn.Module:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def _other_weights() -> nn.Module:
    return tiny("llama", seed=3)


def _other_shape() -> nn.Module:
    model = tiny("llama")
    model.model.layers[2].mlp.down_proj = nn.Linear(100, 48, bias=False)
    return model


@pytest.mark.parametrize(
    ("base", "config", "words"),
    [
        (tiny, {"target_modules": ["q_proj", "lm_head"]}, "no null space for 'lm_head'"),
        (tiny, {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*Embedding"),
        (tiny, {"r": RANK + 1}, r"'model\.layers\.0\.self_attn\.q_proj' has rank 9, but its null space has 8"),
        (tiny, {"rank_pattern": {"k_proj": 17}}, "k_proj' has rank 17"),
        (_other_weights, {}, r"another model: the weight of 'model\.layers\.0\.self_attn\.q_proj' begins with \[.*\[.*"),
        (_other_shape, {}, r"down_proj' has weight \(48, 100\) here and had \(48, 112\)"),
        (_tied_base, {}, r"up_proj' is tied \(model\.layers\.0\.mlp\.up_proj.* and model\.layers\.1.*b-zero"),
        (_packed_base, {}, "up_proj'.*quantised.*b-zero"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_model_is_as_it_was(base: Any, config: dict[str, Any], words: str) -> None:
    model = base("llama") if base is tiny else base()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    # The tied and packed bases are the calibrated model but for that one layer.
    spaces = spaces_for("llama")
    if base in (_tied_base, _packed_base):
        spaces = NullSpaces([spaces[site.name] for site in spaces.sites])
    with pytest.raises(ValueError, match=words):
        inject_adapters(model, LoraConfig(**{"r": RANK, **config}), spaces, residual="base")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "pissa2"}, ValueError, "lora-null"),
        ({"sigma_scale": 0.0}, ValueError, "sigma_scale"),
        ({"sigma_scale": 2.0, "method": "b-zero"}, ValueError, "sigma_scale"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        inject_adapters(tiny("llama"), LoraConfig(r=RANK), spaces_for("llama"), **arguments)


def test_a_config_of_another_kind_and_a_model_with_adapters_are_refused() -> None:
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="LoraConfig"):
        inject_adapters(tiny("llama"), {"r": 4}, spaces_for("llama"))
    with pytest.raises(TypeError, match="already is a PeftModel"):
        inject_adapters(adapted, LoraConfig(), spaces_for("llama"))
    with pytest.raises(ValueError, match="no LoRA adapter named 'nobody'"):
        freeze_a(adapted, "nobody")


@pytest.mark.parametrize("method", ["b-zero", "contrast"])
def test_a_method_that_starts_at_zero_serves_a_base_whose_weights_cannot_be_changed(method: str) -> None:
    spaces, sums = spaces_for("llama"), covariances_for("llama")
    # Those of the calibrated model, but for what would tell the tied one from it.
    known = {"spaces": NullSpaces([spaces[site.name] for site in spaces.sites])}
    known |= dict.fromkeys(("covariances", "preserve"), Covariances((site, sums[site.name]) for site in sums.sites))
    model = _tied_base()
    before = logits(model)
    sources = {name: known[name] for name in METHODS[method].needs}
    assert torch.equal(logits(inject_adapters(model, LoraConfig(r=RANK), method=method, **sources)), before)


def test_the_callers_config_is_not_changed() -> None:
    config = LoraConfig(r=RANK, init_lora_weights="gaussian")
    model = inject_adapters(tiny("llama"), config, spaces_for("llama"))
    assert config.init_lora_weights == "gaussian"
    assert config.target_modules is None
    assert model.peft_config["default"].init_lora_weights is True


def test_save_init_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    model = inject_adapters(tiny("llama"), LoraConfig(r=RANK), spaces_for("llama"))
    with pytest.raises(TypeError):  # not JSON: found out at the very end, when all else is written
        save_init(tmp_path / "out", model, spaces_for("llama"), record={"x": object()})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="out"):
        save_init(tmp_path / "out", model, spaces_for("llama"), overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
