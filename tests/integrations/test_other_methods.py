"""Methods of others, by PEFT's own classes, from our directions; and what holds, merges and cuts adapters, on theirs.

docs/other-methods.md has a table of these methods, which names these tests. The start changes nothing, two steps of training work,
and what is saved is the trained model in a process that has only transformers and PEFT.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from calibrated import RANK, covariances_for, sources_for, spaces_for
from composed import BATCH, LEARNING_RATE, SAME, adamw, checkpoint, close, loaded, logits, loss_of, train
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from plain_peft import PlainPeft
from torch import nn

from models import random_batches, tiny
from nullspace import Covariances, factors, solvers
from nullspace.factors import LowRank
from nullspace.integrations.peft import confine, export_lora, inject_adapters, lora_layers, read_factors, save_init
from nullspace.methods import METHODS, Layer, Sources
from reference import optimal_leak, recorded_inputs

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape:UserWarning"),  # PEFT, of layers that AdaLoRA has left no rank
    pytest.mark.filterwarnings("ignore:no record of the first factors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # PEFT's LoRA-GA
]
WIDTH = 48
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"]  # with WIDTH inputs


def start(model: nn.Module, method: str, *, rank: int = RANK, **options: Any) -> PeftModel:
    return inject_adapters(model, LoraConfig(r=rank, lora_alpha=rank), method=method, **sources_for(method, "llama"), **options)


def start_of(method: str, model: nn.Module, name: str) -> LowRank:
    """The factors of a method for a layer of a tiny Llama."""
    weight = model.get_submodule(name).weight.detach()
    a, b = METHODS[method].start(Layer(name, weight, *weight.shape, RANK, weight.device), Sources(**sources_for(method, "llama")))
    return LowRank(a.float(), b.float())


def layer_of(model: PeftModel, name: str) -> Any:
    return model.get_submodule(f"base_model.model.{name}")


def lora_xs(model: nn.Module) -> PeftModel:
    """Of every start with a product, in turns. R = Σ v_i P_i is any r × r matrix if the P_i are the r² unit matrices."""
    methods = itertools.cycle(name for name, each in METHODS.items() if each.changes_base)
    starts = {name: start_of(next(methods), model, name) for name in spaces_for("llama")}
    adapted = get_peft_model(model, peft.TinyLoraConfig(r=RANK, u=RANK**2, target_modules=list(starts)))
    for name, (a, b) in starts.items():
        layer = layer_of(adapted, name)
        layer.tinylora_A["default"], layer.tinylora_B["default"] = a, b
        layer.tinylora_P["default"] = torch.eye(RANK**2).view(RANK**2, RANK, RANK)
    return adapted


def pooled(moments: Covariances) -> torch.Tensor:
    """(d, d): the mean of the second moments of all sites of a width, each of trace 1."""
    of_width = [moments[site.name] for site in moments.sites if site.d_in == WIDTH]
    return torch.stack([each.matrix() / each.trace for each in of_width]).mean(0)


def shared_a() -> torch.Tensor:
    keep, task = pooled(covariances_for("llama")), pooled(covariances_for("llama", seed=2))
    return 6**0.5 * factors.contrast(task, keep, WIDTH, rank=RANK).A


def vera(model: nn.Module) -> PeftModel:
    adapted = get_peft_model(model, peft.VeraConfig(r=RANK, target_modules=TARGETS))
    adapted.base_model.vera_A["default"].copy_(shared_a())
    return adapted


def adalora(model: nn.Module) -> PeftModel:
    starts = {name: start_of("lora-null", model, name) for name in spaces_for("llama")}
    config = peft.AdaLoraConfig(init_r=RANK, target_r=RANK // 2, total_step=4, tfinal=1, target_modules=list(starts))
    adapted = get_peft_model(model, config)
    for name, (a, b) in starts.items():
        layer = layer_of(adapted, name)
        layer.lora_A["default"].data = nn.functional.normalize(a, dim=1)
        layer.lora_B["default"].data = nn.functional.normalize(b, dim=0)
    return adapted


def adalora_steps(model: PeftModel) -> None:
    """Two steps; after each some ranks are taken away, whose part of Λ stays zero."""
    optimizer, generator = adamw(model), torch.Generator().manual_seed(5)
    model.train()
    for step in (1, 2):
        loss_of(model, generator).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) < RANK * len(spaces_for("llama"))


def hra(model: nn.Module) -> PeftModel:
    spaces = spaces_for("llama")
    adapted = get_peft_model(model, peft.HRAConfig(r=RANK, target_modules=list(spaces)))
    for name, space in spaces.items():
        layer_of(adapted, name).hra_u["default"].data = space.basis[:, : RANK // 2].float().repeat_interleave(2, dim=1)
    return adapted


def long_lora(model: nn.Module) -> PeftModel:
    parts = ["embed_tokens", "input_layernorm", "post_attention_layernorm"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=parts)
    return inject_adapters(model, config, method="contrast", **sources_for("contrast", "llama"))


def lora_fa_steps(model: PeftModel) -> None:
    train(model, create_lorafa_optimizer(model, r=RANK, lora_alpha=RANK, lr=LEARNING_RATE))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)


def check_lora_xs(model: PeftModel) -> None:
    """r² numbers a layer are trained, and the product B R A is a LoRA of rank r."""
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == RANK**2 * len(spaces_for("llama"))
    check_directions(lambda layer: layer.tinylora_A["default"], model)
    _, converted = peft.convert_to_lora(model, RANK)
    for name in spaces_for("llama"):
        a, b = (converted[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        change = layer_of(model, name).get_delta_weight("default")
        assert a.shape[0] == RANK
        assert (b @ a - change).norm() <= 1e-5 * change.norm()


def check_directions(of_layer: Callable[[Any], torch.Tensor], model: PeftModel) -> None:
    """However it was trained, a change of a weight reads the rows of A and no other direction."""
    changed = [each for each in model.modules() if hasattr(each, "get_delta_weight")]
    assert len(changed) >= len(TARGETS)
    for layer in changed:
        change, rows = layer.get_delta_weight("default").detach().double(), torch.linalg.qr(of_layer(layer).detach().double().mT).Q
        assert (change - change @ rows @ rows.mT).norm() <= 1e-6 * change.norm()


@dataclass(frozen=True)
class Case:
    start: Callable[[nn.Module], PeftModel]
    train: Callable[[PeftModel], None] = train
    check: Callable[[PeftModel], None] = lambda _: None


# PEFT 0.20 saves VeRA's projections and does not load them.
loads_projections = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="PEFT 0.20 loads no saved vera_A")
CASES = {
    "LoRA-FA": Case(functools.partial(start, method="b-zero"), lora_fa_steps),
    "LoRA-XS": Case(lora_xs, check=check_lora_xs),
    "VeRA": Case(vera, check=functools.partial(check_directions, lambda layer: layer.vera_A["default"])),
    "AdaLoRA": Case(adalora, adalora_steps),
    "HRA": Case(hra),
    "LongLoRA": Case(long_lora),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("original"))


@pytest.mark.parametrize("name", [pytest.param(each, marks=loads_projections if each == "VeRA" else ()) for each in CASES])
def test_in_pefts_own_class(name: str, original: Path, tmp_path: Path, plain_peft: PlainPeft) -> None:
    case, model = CASES[name], loaded(original)
    before = logits(model)
    adapted = case.start(model)
    assert close(logits(adapted), before, 2e-6)
    case.train(adapted)
    case.check(adapted)
    check_saved(adapted, before, tmp_path, plain_peft)


def check_saved(model: PeftModel, before: torch.Tensor, folder: Path, plain_peft: PlainPeft, base: Path | None = None) -> None:
    """The model is not what it was, and plain PEFT loads what it is now."""
    wanted = logits(model)
    assert not close(wanted, before, 100 * SAME[torch.float32])
    model.save_pretrained(folder)
    assert close(plain_peft.logits(folder, BATCH, base), wanted, SAME[torch.float32])


def test_bottom_directions_of_the_pooled_moment_leak_least_over_all_sites() -> None:
    names = [site.name for site in covariances_for("llama").sites if site.d_in == WIDTH]
    inputs = recorded_inputs(tiny("llama"), random_batches(), names)
    together = torch.cat([x.double() / x.double().norm() for x in inputs.values()])
    _, basis = solvers.bottom_eigenpairs(pooled(covariances_for("llama")), RANK)
    squares = torch.stack([(x.double() @ basis).norm() / x.double().norm() for x in inputs.values()]).square()
    assert float(squares.mean().sqrt()) == pytest.approx(optimal_leak(together, RANK), rel=1e-6)


def test_a_shared_a_has_the_norm_of_veras_own() -> None:
    own = get_peft_model(tiny("llama"), peft.VeraConfig(r=RANK, target_modules=TARGETS)).base_model.vera_A["default"]
    a, task = shared_a(), pooled(covariances_for("llama", seed=2))
    assert float(((a @ task) * a).sum() / task.trace()) == pytest.approx(2 * RANK / WIDTH)
    assert float(own.square().mean()) == pytest.approx(2 / WIDTH, rel=0.2)


@pytest.mark.parametrize("name", ["OLoRA", "LoRA-GA"])
def test_confined_from_pefts_start(name: str, original: Path, tmp_path: Path, plain_peft: PlainPeft) -> None:
    model = loaded(original)
    before = logits(model)
    config = LoraConfig(r=RANK, target_modules=["q_proj", "up_proj"], init_lora_weights="olora")
    if name == "LoRA-GA":
        config.init_lora_weights, config.lora_ga_config = "lora_ga", peft.LoraGAConfig()
        peft.tuners.lora.loraga.preprocess_loraga(
            model, config, lambda: loss_of(model, torch.Generator().manual_seed(3)).backward()
        )
    adapted = get_peft_model(model, config)
    assert close(logits(adapted), before, 2e-6)
    kind, config.init_lora_weights = config.init_lora_weights, True
    adapted.save_pretrained(tmp_path / "init")
    config.init_lora_weights = kind
    first = {name: each.lora_A["default"].weight.detach().clone() for name, each in lora_layers(adapted, "default").items()}
    optimizer = adamw(adapted)
    confined = confine(adapted, covariances_for("llama"), leak=0.3, optimizer=optimizer)
    train(adapted, optimizer)
    check_confined(adapted, first, 0.3)
    confined.detach()
    adapted.save_pretrained(tmp_path / "trained")
    export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "plain", base=str(original))
    assert close(plain_peft.logits(tmp_path / "plain", BATCH), logits(adapted), 1e-5)


def check_confined(model: PeftModel, first: Mapping[str, torch.Tensor], leak: float) -> None:
    for name, layer in lora_layers(model, "default").items():
        c, change = covariances_for("llama")[name].matrix(), (layer.lora_A["default"].weight.detach() - first[name]).double()
        assert ((change @ c) * change).sum() <= leak**2 * c.trace() * change.square().sum()


def test_merged_and_started_again(original: Path, tmp_path: Path, plain_peft: PlainPeft) -> None:
    """ReLoRA; XGBLoRA with adapters of rank 1."""
    model = loaded(original)
    before = logits(model)
    # Without weights, second moments belong to any model with layers of these names and widths: the merged one too.
    sources = {
        source: Covariances((s, each[s.name]) for s in each.sites) for source, each in sources_for("contrast", "llama").items()
    }
    for rank in (RANK, 1):
        now = logits(model)
        adapted = inject_adapters(model, LoraConfig(r=rank, lora_alpha=rank), method="contrast", **sources)
        assert close(logits(adapted), now, 2e-6)
        train(adapted)
        if rank == RANK:
            model = adapted.merge_and_unload()
            model.save_pretrained(tmp_path / "merged")
    assert not close(now, before, 100 * SAME[torch.float32])
    check_saved(adapted, now, tmp_path / "trained", plain_peft, tmp_path / "merged")


@pytest.fixture(scope="module")
def two(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two trained adapters, of two tasks."""
    folders = {name: tmp_path_factory.mktemp("trained") for name in ("0", "1")}
    for seed, folder in enumerate(folders.values()):
        adapted = start(loaded(original), "b-zero", freeze_a=True)
        train(adapted, torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1 + seed))
        adapted.save_pretrained(folder)
    return {name: str(folder) for name, folder in folders.items()}


def test_added_up_by_weights_as_lorahub_does(original: Path, two: dict[str, str], tmp_path: Path, plain_peft: PlainPeft) -> None:
    model = PeftModel.from_pretrained(loaded(original), two["0"], adapter_name="first")
    model.load_adapter(two["1"], "second")
    model.add_weighted_adapter(["first", "second"], [0.75, 0.25], "default", combination_type="linear")
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert close(plain_peft.logits(tmp_path, BATCH), logits(model), SAME[torch.float32])


def test_experts_of_x_lora(original: Path, two: dict[str, str], tmp_path: Path) -> None:
    """PEFT loses the router when it saves: it takes the experts' names, "0" and "1", for the number of the router's layer."""

    def mixture(experts: dict[str, str]) -> PeftModel:
        model = loaded(original)
        model.config.use_cache = False
        return get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=WIDTH, adapters=experts))

    adapted = mixture(two)
    before = logits(adapted)
    train(adapted)
    wanted = logits(adapted)
    assert not close(wanted, before, 100 * SAME[torch.float32])
    again = mixture(two)
    again.load_state_dict({name: p for name, p in adapted.named_parameters() if p.requires_grad}, strict=False)
    assert close(logits(again), wanted, SAME[torch.float32])


def test_ranks_that_training_leaves_empty_are_cut(original: Path, tmp_path: Path, plain_peft: PlainPeft) -> None:
    """SoRA's proximal steps close the gates of some ranks, and DyLoRA trains a prefix of them: the rest is cut without loss."""
    adapted = start(loaded(original), "contrast")
    before = logits(adapted)
    save_init(tmp_path / "init", adapted)

    def gates(*_: Any) -> None:
        for layer in lora_layers(adapted, "default").values():
            b = layer.lora_B["default"].weight.data
            b[:, b.norm(dim=0).argsort()[: RANK // 2]] = 0

    optimizer = adamw(adapted)
    optimizer.register_step_post_hook(gates)
    train(adapted, optimizer)
    wanted = logits(adapted)
    assert not close(wanted, before, 100 * SAME[torch.float32])
    export_lora(adapted, tmp_path / "init", tmp_path / "cut", base=str(original), rank=RANK // 2)
    assert all(len(a) == RANK // 2 for a, _ in read_factors(tmp_path / "cut").values())
    assert close(plain_peft.logits(tmp_path / "cut", BATCH), wanted, 1e-5)


@pytest.mark.usefixtures("one_layout_of_four_bits")
def test_confined_from_loftq(original: Path, tmp_path: Path, plain_peft: PlainPeft) -> None:
    """B A is the best part of rank r of what 4 bits lose (one iteration of LoftQ; PEFT's own computes it on a GPU alone)."""
    pytest.importorskip("bitsandbytes")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(original, quantization_config=four_bits, device_map="cpu").eval()
    full, before = loaded(original), logits(base)
    adapted = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "up_proj"]))
    first = {}
    for name, layer in lora_layers(adapted, "default").items():
        lost = full.get_submodule(name).weight - peft.utils.integrations.dequantize_module_weight(layer.get_base_layer())
        u, s, v = torch.linalg.svd(lost.detach())
        layer.lora_B["default"].weight.data = u[:, :RANK] * s[:RANK]
        layer.lora_A["default"].weight.data = first[name] = v[:RANK].clone()
    assert (logits(adapted) - logits(full)).norm() < (before - logits(full)).norm()
    optimizer = adamw(adapted)
    confine(adapted, covariances_for("llama"), leak=0.3, optimizer=optimizer)
    train(adapted, optimizer)
    check_confined(adapted, first, 0.3)
    wanted = logits(adapted)
    assert not close(wanted, before, 100 * SAME[torch.float32])
    adapted.save_pretrained(tmp_path / "trained")
    adapted.unload().dequantize().save_pretrained(tmp_path / "dequantised")
    assert close(plain_peft.logits(tmp_path / "trained", BATCH, tmp_path / "dequantised"), wanted, 1e-5)
