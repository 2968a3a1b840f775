"""Fused experts: their sums are those of a plain loop over experts, and few tokens are completed by those of all experts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import transformers
from mixtures import MIXTURES, mixture
from torch import nn

from models import VOCABULARY, tiny
from nullspace import Covariances, NullSpace, NullSpaces, compute_covariances, compute_null_spaces, stream_covariances
from nullspace.calibration.gradients import gradient_covariances
from nullspace.model.coverage import covered_share
from nullspace.model.experts import ExpertMatrix, expert_of, is_fused
from nullspace.model.sites import find_targets

RANK = 4


def model_of(family: str) -> nn.Module:
    model: Any = mixture(family).double()
    model.set_experts_implementation("eager")  # grouped products take no float64
    return cast(nn.Module, model)


def batches(side: str | None = None, count: int = 3, sequences: int = 3, length: int = 21) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        mask = torch.ones(sequences, length, dtype=torch.long)
        if side == "left":
            mask[0, :6], mask[2, :1] = 0, 0
        elif side == "right":
            mask[0, -6:], mask[2, -1:] = 0, 0
        ids = torch.randint(5, VOCABULARY, (sequences, length), generator=generator)
        made.append({"input_ids": ids, **({} if side is None else {"attention_mask": mask})})
    return made


def fused(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_fused(module)}


def rerouted(model: nn.Module) -> None:
    """No token goes to expert 3. Expert 2 gets one, in the first batch of 63 tokens, once a layer."""
    for module in fused(model).values():
        seen: list[bool] = []

        def change(_: nn.Module, args: tuple[Any, ...], seen: list[bool] = seen) -> tuple[Any, ...]:
            hidden, index, weights = args
            index = torch.stack([torch.zeros_like(index[:, 0]), torch.ones_like(index[:, 0])], dim=1)
            if len(hidden) == 63 and not seen:
                index[10, 1] = 2
            return hidden, index, weights

        module.register_forward_pre_hook(change)


def of_a_loop(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> dict[tuple[str, str, int], torch.Tensor]:
    """(module, parameter, expert) → the rows that it gets, by a loop over experts in the place of the class's own forward pass."""
    rows: dict[tuple[str, str, int], list[torch.Tensor]] = {}
    keep = torch.ones(0)

    def forward_of(name: str, experts: Any) -> Callable[..., torch.Tensor]:
        first = "gate_up_proj" if experts.has_gate else "up_proj"

        def linear(x: torch.Tensor, parameter: str, e: int) -> torch.Tensor:
            weight = getattr(experts, parameter)[e]
            return F.linear(x, weight.T if experts.is_transposed else weight) + (
                getattr(experts, f"{parameter}_bias")[e] if experts.has_bias else 0
            )

        def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(hidden)
            for e in range(len(getattr(experts, first))):
                token, slot = torch.where(index == e)
                x = hidden[token]
                inner = linear(x, first, e)
                y = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
                for parameter, value in ((first, x), ("down_proj", y)):
                    rows.setdefault((name, parameter, e), []).append(value[keep[token]])
                out.index_add_(0, token, linear(y, "down_proj", e) * weights[token, slot, None])
            return out

        return forward

    for name, experts in fused(model).items():
        experts.forward = forward_of(name, experts)  # type: ignore[method-assign]
    with torch.no_grad():
        for batch in data:
            keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).reshape(-1).bool()
            model(**batch)
    for experts in fused(model).values():
        del experts.forward
    return {key: torch.cat(parts) for key, parts in rows.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


@pytest.fixture(scope="module", params=list(MIXTURES))
def moe(request: pytest.FixtureRequest) -> nn.Module:
    return model_of(request.param)


@pytest.fixture(scope="module")
def qwen() -> nn.Module:
    return model_of("qwen3_moe")


@pytest.mark.parametrize("side", ["left", "right"])
def test_sums_are_those_of_a_loop_over_experts(moe: nn.Module, side: str) -> None:
    data = batches(side)
    expected = of_a_loop(moe, data)
    with torch.no_grad():
        before = moe(**data[0]).logits
    for strategy in ("resident", "layerwise"):
        count = 0
        for site, covariance in stream_covariances(
            moe, data, strategy=strategy, experts="each", precision="fp64", targets="experts", progress=False
        ):
            expert = expert_of(site.name)
            assert expert is not None
            assert site.members == (site.name,)
            rows = expected[tuple(expert)]  # type: ignore[index]
            assert covariance.tokens == len(rows)
            assert relative(covariance.matrix(), rows.T @ rows) < 1e-9
            assert relative(covariance.total(), rows.sum(0)) < 1e-9
            count += 1
        assert count == len(expected)
    with torch.no_grad():
        assert torch.equal(moe(**data[0]).logits, before)


def test_all_linear_covers_the_matrices(moe: nn.Module) -> None:
    targets = find_targets(moe)
    routers = 4 * 32 * len(fused(moe))
    sizes = sum(
        p.numel() for name, p in moe.named_parameters() if p.ndim > 1 and not any(n in name for n in ("embed", "lm_head", "bias"))
    )
    assert covered_share(moe, targets) == pytest.approx(1 - routers / sizes)
    assert sum(isinstance(each, ExpertMatrix) for each in targets.values()) == 8 * len(fused(moe))


def test_one_expert_with_one_token_and_one_without() -> None:
    model = model_of("qwen3_moe")
    rerouted(model)
    data = batches("left")
    expected = of_a_loop(model, data)
    found = {
        site.name: covariance
        for site, covariance in stream_covariances(model, data, experts="each", precision="fp64", targets="experts", progress=False)
    }
    name = next(iter(fused(model)))
    for key, rows in expected.items():
        assert found["{}.{}[{}]".format(*key)].tokens == len(rows)
        assert relative(found["{}.{}[{}]".format(*key)].matrix(), rows.T @ rows) < 1e-9
    assert len(expected[name, "gate_up_proj", 2]) == 3
    assert not len(expected[name, "gate_up_proj", 3])

    with pytest.warns(UserWarning, match=r"got none, and have the basis of all experts of the layer: .*gate_up_proj\[3\]"):
        spaces = compute_null_spaces(model, data, rank=RANK, experts="each", precision="fp64", targets="experts", progress=False)
    pool = torch.cat([rows for (module, parameter, _), rows in expected.items() if (module, parameter) == (name, "gate_up_proj")])
    few = expected[name, "gate_up_proj", 2]
    for number, own in ((3, torch.zeros_like(few)), (2, few)):
        missing = 32 + RANK - (len(few) if number == 2 else 0)
        completed = own.T @ own + missing / len(pool) * pool.T @ pool
        _, vectors = torch.linalg.eigh(completed)
        basis = spaces[f"{name}.gate_up_proj[{number}]"].basis
        assert relative(basis @ basis.T, vectors[:, :RANK] @ vectors[:, :RANK].T) < 1e-7
    assert spaces[f"{name}.gate_up_proj[3]"].tokens == 0
    assert "Experts: 0 to " in spaces.summary()
    assert "gate_up_proj[3]" in spaces.summary()


def test_pooled_is_one_sum_of_the_hidden_states(qwen: nn.Module) -> None:
    data = batches("right")
    expected = of_a_loop(qwen, data)
    names = {}
    for site, covariance in stream_covariances(qwen, data, experts="pooled", precision="fp64", targets="experts", progress=False):
        expert = expert_of(site.name)
        assert expert is not None
        names[site.name] = site.members
        if len(site.members) > 1:
            rows = torch.cat([expected[expert.experts, expert.parameter, e] for e in range(4)])
            assert covariance.tokens * 2 == len(rows)  # each token is routed to two experts
            assert relative(2 * covariance.matrix(), rows.T @ rows) < 1e-9
        else:
            assert expert.parameter == "down_proj"
    stacks = [members for members in names.values() if len(members) > 1]
    assert len(stacks) == len(fused(qwen))
    assert all(len(members) == 4 for members in stacks)


def test_kept_sums_are_completed_like_streamed_ones(qwen: nn.Module, tmp_path: Any) -> None:
    data = batches("left", count=1)  # too few tokens for all experts
    rerouted_model = model_of("qwen3_moe")
    rerouted(rerouted_model)
    with pytest.warns(UserWarning, match="Experts: "):
        spaces = compute_null_spaces(rerouted_model, data, rank=RANK, experts="each", precision="fp64", progress=False)
    kept = compute_covariances(rerouted_model, data, tmp_path / "kept", experts="each", progress=False)
    for covariances in (kept, Covariances.merge([kept])):
        with pytest.warns(UserWarning, match="Experts: "):
            again = NullSpaces.from_covariances(covariances, rank=RANK, progress=False)
        for name, space in spaces.items():
            assert relative(again[name].basis @ again[name].basis.T, space.basis @ space.basis.T) < 1e-6
            assert again[name].tokens == space.tokens
    spaces.save(tmp_path / "spaces")
    assert NullSpaces.load(tmp_path / "spaces").summary() == spaces.summary()


def test_auto_pools_where_tokens_are_few(qwen: nn.Module) -> None:
    def members(data: list[dict[str, torch.Tensor]]) -> set[int]:
        stream = stream_covariances(qwen, data, targets=["experts.gate_up_proj"], progress=False)
        return {len(site.members) for site, _ in stream}

    assert members(batches(count=1)) == {4}  # 63 tokens, 2 of 4 experts each: 31.5 an expert, and d_in is 32
    assert members(batches(count=2)) == {1}


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Any) -> None:
    model = model_of("qwen3_moe")
    rerouted(model)
    data = batches("left")
    settings: dict[str, Any] = {"rank": RANK, "experts": "each", "strategy": "layerwise"}
    with pytest.warns(UserWarning, match="Experts: "):
        whole = compute_null_spaces(model, data, **settings, progress=False)

    def stop(stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage == "null spaces" and done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_null_spaces(model, data, **settings, checkpoint=tmp_path / "kept", progress=stop)
    with pytest.warns(UserWarning, match="Experts: "):
        again = compute_null_spaces(model, data, **settings, checkpoint=tmp_path / "kept", progress=False)
    for name, space in whole.items():
        assert torch.equal(again[name].basis, space.basis), name


def test_the_model_is_left_as_it_was(qwen: nn.Module) -> None:
    config: Any = qwen.config
    config._experts_implementation = "eager"
    poisoned = batches(count=1)

    def poison(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].index_fill(0, torch.tensor([5]), float("nan")), *args[1:])

    name, module = next(iter(fused(qwen).items()))
    handle = module.register_forward_pre_hook(poison)
    for strategy in ("resident", "layerwise"):
        with pytest.raises(ValueError, match=rf"batch 1: {name}.gate_up_proj"):
            list(stream_covariances(qwen, poisoned, experts="each", strategy=strategy, progress=False))
        assert config._experts_implementation == "eager"
    handle.remove()
    with pytest.raises(ValueError, match="experts must be one of"):
        list(stream_covariances(qwen, poisoned, experts="all", progress=False))


def test_pairs_of_other_processes_are_left_out(qwen: nn.Module) -> None:
    data = batches(count=1)
    name, module = next(iter(fused(qwen).items()))

    def foreign(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index, weights = args
        return hidden, index.clone().index_fill_(0, torch.arange(20), 4), weights

    handle = module.register_forward_pre_hook(foreign)
    try:
        counts = [
            covariance.tokens
            for _, covariance in stream_covariances(qwen, data, targets=[f"{name}.gate_up_proj"], experts="each", progress=False)
        ]
        pooled = [
            covariance.tokens
            for _, covariance in stream_covariances(qwen, data, targets=[f"{name}.gate_up_proj"], experts="pooled", progress=False)
        ]
    finally:
        handle.remove()
    assert sum(counts) == 2 * (63 - 20)
    assert pooled == [63 - 20]


def test_some_experts_alone(qwen: nn.Module) -> None:
    """The pool is that of all experts, whichever are targets."""
    data = batches(count=1)
    name = next(iter(fused(qwen)))
    every = dict(stream_covariances(qwen, data, targets=[f"{name}.down_proj"], experts="each", precision="fp64", progress=False))
    ((site, one),) = stream_covariances(
        qwen, data, targets=[f"{name}.down_proj[2]"], experts="each", precision="fp64", progress=False
    )
    assert site.name == f"{name}.down_proj[2]"
    assert torch.equal(one.matrix(), every[site].matrix())
    total = sum(covariance.matrix() for covariance in every.values())
    if one.pool is not None:
        assert relative(one.pool.matrix, total) < 1e-12  # type: ignore[arg-type]
    basis = NullSpace.from_covariance(one, 2).basis
    assert torch.equal(basis, NullSpace.from_covariance(every[site], 2).basis)


def test_words_for_kinds_of_layers(qwen: nn.Module) -> None:
    kinds = {word: set(find_targets(qwen, word)) for word in ("all-linear", "attention", "mlp", "experts")}
    assert kinds["experts"] <= kinds["mlp"]
    assert not kinds["attention"] & kinds["mlp"]
    assert kinds["attention"] | kinds["mlp"] == kinds["all-linear"]
    assert set(find_targets(qwen, exclude="experts")) == kinds["all-linear"] - kinds["experts"]
    assert set(find_targets(qwen, exclude=["experts", "q_proj"])) == {
        name for name in kinds["all-linear"] - kinds["experts"] if not name.endswith("q_proj")
    }
    with pytest.raises(ValueError, match="has no such layer"):
        find_targets(tiny("llama"), "experts")


def test_gradient_covariances_leave_experts_out(qwen: nn.Module) -> None:
    data = [{**batch, "labels": batch["input_ids"]} for batch in batches(count=1)]
    with pytest.warns(UserWarning, match=r"is an expert's matrix"):
        found = gradient_covariances(qwen, data, progress=False)
    assert found
    assert all(expert_of(name) is None for name in found)
    with pytest.raises(ValueError, match="is an expert's matrix"):
        gradient_covariances(qwen, data, targets=["experts.down_proj"], progress=False)


def test_a_class_that_computes_the_same_without_being_decorated() -> None:
    modeling = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    config = SimpleNamespace(num_local_experts=4, hidden_size=16, moe_intermediate_size=8, hidden_act="silu")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = modeling.Step3p7Experts(config, swiglu_limit=0.5)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, index = x[:, :4].topk(2)
            return self.experts(x, index, weights)

    torch.manual_seed(0)
    model, data = Block().double(), [torch.randn(50, 16, dtype=torch.float64) for _ in range(2)]
    expected: dict[int, list[torch.Tensor]] = {}
    for x in data:
        index = x[:, :4].topk(2).indices
        for e in range(4):
            expected.setdefault(e, []).append(x[(index == e).any(1)])
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        before = [model(x) for x in data]
    handle = model.register_forward_hook(lambda _, args, output: outputs.append(output))
    found = dict(stream_covariances(model, data, experts="each", precision="fp64", progress=False))
    handle.remove()
    for site, covariance in found.items():
        expert = expert_of(site.name)
        assert expert is not None
        if expert.parameter == "gate_up_proj":
            rows = torch.cat(expected[expert.number])
            assert relative(covariance.matrix(), rows.T @ rows) < 1e-12
    assert len(found) == 8
    assert all(relative(after, own) < 1e-12 for after, own in zip(outputs, before, strict=True))
    assert "forward" not in vars(model.experts)


def test_experts_that_cannot_be_summed_are_named() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 4}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, **heads, pad_token_id=1)).eval()
    why = "is a parameter of Llama4TextExperts, a class of experts whose forward pass cannot be replaced"
    with pytest.warns(UserWarning, match=rf"experts\.gate_up_proj' \(and 1 more like it\) {why}"):
        spaces = compute_null_spaces(model, batches(), rank=RANK, progress=False)
    assert spaces.covered_share == pytest.approx(covered_share(model, spaces))
    assert "% of the parameters" in spaces.summary()
    with pytest.raises(ValueError, match=rf"has no such layer. What it holds {why}"):
        find_targets(model, "experts")
