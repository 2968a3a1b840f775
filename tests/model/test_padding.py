"""Padding: every row that is a token's counts, no other one does, and what cannot be told apart is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.config import CordaConfig
from torch import nn

from models import SMALL, random_batches, tiny
from nullspace import stream_covariances
from nullspace.integrations.peft import get_eva_state_dict, preprocess_corda
from nullspace.model.padding import PaddingReader
from reference import entrywise_error, recorded_inputs

FLOAT32 = 1e-6
D = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(model: nn.Module, loader: Any, **options: Any) -> dict[str, Any]:
    """Layer name → its covariance."""
    found = stream_covariances(model, loader, progress=False, **options)
    return {member: covariance for site, covariance in found for member in site.members}


class Reshaped(nn.Module):
    """A linear layer that is handed the hidden states in another shape."""

    def __init__(self, shape: Callable[[torch.Tensor], torch.Tensor], d_in: int = D) -> None:
        super().__init__()
        self.shape = shape
        self.inner = nn.Linear(d_in, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        return self.inner(self.shape(x))


def padded(batch: int = 3, tokens: int = 5) -> torch.Tensor:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, :2], mask[-1, -1:] = 0, 0
    return mask


def heads(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.stack([x, 2 * x], dim=axis)


# ---- shapes


@pytest.mark.parametrize("tokens", [5, 3], ids=["", "square"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(lambda x: x, id="(B, T)"),
        pytest.param(lambda x: x.reshape(-1, D), id="(B T)"),
        pytest.param(lambda x: x.reshape(1, -1, D), id="(1, B T)"),
        pytest.param(lambda x: x.unsqueeze(1), id="(B, 1, T)"),
        pytest.param(lambda x: x.unsqueeze(2), id="(B, T, 1)"),
        pytest.param(lambda x: x.unsqueeze(0), id="(1, B, T)"),
        pytest.param(lambda x: heads(x, 1), id="(B, H, T)"),
        pytest.param(lambda x: heads(x, 2), id="(B, T, H)"),
        pytest.param(lambda x: heads(x.reshape(-1, D), 1), id="(B T, H)"),
        pytest.param(lambda x: x[:1], id="one sequence"),
    ],
)
def test_padding_is_dropped_in_every_shape_whose_axes_are_clear(shape: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> None:
    x, mask = torch.randn(3, tokens, D), padded(3, tokens)
    one = shape(x).shape[0] == 1 and shape(x).numel() < x.numel()
    x, mask = (x[:1], mask[:1]) if one else (x, mask)
    counts = shape(mask[..., None].expand_as(x).clone()).reshape(-1, D)[:, 0] != 0
    covariance = run(Reshaped(shape), [{"x": x, "attention_mask": mask}])["inner"]
    rows = shape(x).reshape(-1, D)[counts]
    assert covariance.tokens == len(rows)
    assert entrywise_error(covariance.matrix(), rows) < FLOAT32


def test_tokens_may_come_before_sequences() -> None:
    model = Reshaped(lambda x: x.transpose(0, 1).contiguous())
    batches = [{"x": torch.randn(3, t, D), "attention_mask": padded(3, t)} for t in (5, 3, 4)]
    covariance = run(model, batches)["inner"]
    rows = torch.cat([b["x"][b["attention_mask"].bool()] for b in batches])  # the second one is square: the first has shown it
    assert entrywise_error(covariance.matrix(), rows) < FLOAT32
    with pytest.raises(ValueError, match=r"inner, batch 2: .*tokens first, which an earlier batch"):
        run(model, batches[1:])


@pytest.mark.parametrize("tokens", [5, 3], ids=["", "square"])
@pytest.mark.parametrize("token", [0, 2])
def test_a_slice_has_one_row_a_sequence(token: int, tokens: int) -> None:
    x, mask = torch.randn(3, tokens, D), padded(3, tokens)
    mask[1] = 0
    covariance = run(Reshaped(lambda x: x[:, token]), [{"x": x, "attention_mask": mask}])["inner"]
    assert covariance.tokens == 2
    assert entrywise_error(covariance.matrix(), x[[0, 2], token]) < FLOAT32


UNCLEAR = [
    pytest.param(lambda x: x.reshape(-1, D)[[0, 4, 7]], D, id="as many routed rows as sequences"),
    pytest.param(lambda x: x.reshape(-1, D)[:3], D, id="the first rows"),
    pytest.param(lambda x: x.mean(1), D, id="pooled"),
    pytest.param(lambda x: x[:, 1:], D, id="a token less"),
    pytest.param(lambda x: x.reshape(len(x), -1, 2 * D), 2 * D, id="merged tokens"),
    pytest.param(lambda x: x.reshape(len(x), 3, 2, D), D, id="windows"),
    pytest.param(lambda x: x[:, :, None] * x[:, None], D, id="pairs of tokens"),
    pytest.param(lambda x: heads(x, 1).reshape(-1, *x.shape[1:]), D, id="heads beside sequences"),
]


@pytest.mark.parametrize(("shape", "d_in"), UNCLEAR)
def test_unclear_rows_count_without_padding_and_are_refused_with_it(
    shape: Callable[[torch.Tensor], torch.Tensor], d_in: int
) -> None:
    model, x = Reshaped(shape, d_in), torch.randn(3, 6, D)
    batch = {"x": x, "attention_mask": torch.ones(3, 6)}
    rows = shape(x).reshape(-1, d_in)
    assert entrywise_error(run(model, [batch, {"x": x}])["inner"].matrix(), torch.cat([rows, rows])) < FLOAT32
    with_padding = {"x": x, "attention_mask": padded(3, 6)}
    with pytest.raises(ValueError, match=r"^inner, batch 1: .*cannot be lined up with the attention_mask \(3, 6\)"):
        run(model, [with_padding, batch])
    model.calls = 0
    with pytest.raises(ValueError, match=r"^inner, batch 3: .*cannot be lined up"):
        run(model, [batch, batch, with_padding])
    assert model.calls == 1  # not after all the work
    with pytest.raises(ValueError, match=r"^inner, batch 2: .*cannot be lined up"):
        run(model, iter([batch, with_padding]))


class Experts(nn.Module):
    """Each token goes to the experts in an order of its own; each expert takes first the tokens that name it first."""

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])
        self.chosen = chosen

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        rows = x.reshape(-1, D)
        order = rows[:, :2].argsort(dim=1)[:, : self.chosen]
        for number, expert in enumerate(self.experts):
            expert(torch.cat([rows[order[:, place] == number] for place in range(self.chosen)]))


def test_rows_that_a_router_chose_are_never_masked_as_something_else() -> None:
    generator = torch.Generator().manual_seed(0)
    for chosen in (1, 2):  # 2: as many rows as tokens, in another order
        x = torch.randn(3, 5, D, generator=generator)
        assert run(Experts(chosen), [{"x": x, "attention_mask": torch.ones(3, 5)}])["experts.0"].tokens > 0
        with pytest.raises(ValueError, match=r"^experts\.0, batch 1: .*cannot be lined up"):
            run(Experts(chosen), [{"x": x, "attention_mask": padded()}])


# ---- real models


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_latent_attention_is_masked_where_only_the_last_batch_has_padding(strategy: str) -> None:
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **{**SMALL, "num_hidden_layers": 2},
        num_key_value_heads=4,
        first_k_dense_replace=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    batches = [*random_batches(2, 4, 24), *random_batches(1, 4, 24, padding="right", seed=2)]
    found = run(model, batches, strategy=strategy)
    for name, x in recorded_inputs(model, batches, found).items():
        assert found[name].tokens == len(x), name
        assert entrywise_error(found[name].matrix(), x) < FLOAT32, name


def test_the_texts_padding_is_not_held_against_a_vision_tower_of_the_same_shape() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=2),
            vision_config=transformers.CLIPVisionConfig(**sizes, image_size=12, patch_size=4),
            image_token_id=63,
            vision_feature_layer=-1,
        )
    ).eval()
    ids = torch.tensor([[5, *[63] * 9], [1, *[63] * 9]])  # ten tokens, and ten patches with the class token
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long(), "pixel_values": torch.randn(2, 3, 12, 12)}
    found = run(model, [batch])
    tokens = {name: covariance.tokens for name, covariance in found.items()}
    vision = [n for n in tokens if "vision_tower" in n and n.endswith(("q_proj", "fc1"))]
    text = [n for n in tokens if "language_model" in n]
    projector = [n for n in tokens if "projector" in n]
    assert len(vision) == 4
    assert len(text) == 14
    assert {tokens[n] for n in vision} == {20}
    assert {tokens[n] for n in text} == {19}
    assert projector
    assert {tokens[n] for n in projector} == {18}


# ---- masks of other shapes


def causal(mask: torch.Tensor) -> torch.Tensor:
    """(batch, 1, queries, keys) bool."""
    length = mask.shape[1]
    return (torch.ones(length, length).tril().bool() & mask.bool()[:, None])[:, None]


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(causal, id="bool"),
        pytest.param(lambda m: causal(m).expand(-1, 2, -1, -1), id="a head each"),
        pytest.param(lambda m: causal(m)[:, 0], id="three dimensions"),
        pytest.param(lambda m: additive(causal(m)), id="additive"),
        pytest.param(lambda m: {"full": causal(m), "sliding": causal(m) & ~causal(m).tril(-3)}, id="a kind of attention each"),
        pytest.param(lambda m: m.bool()[:, None, None].expand(-1, 1, 5, -1), id="both directions"),
    ],
)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_mask_over_pairs_says_which_tokens_count(pairs: Callable[[torch.Tensor], Any], side: str | None) -> None:
    x, mask = torch.randn(3, 5, D), torch.ones(3, 5, dtype=torch.long)
    if side is not None:
        mask[1, slice(0, 2) if side == "left" else slice(3, None)] = 0
    seen: list[int] = []
    found = stream_covariances(
        Reshaped(lambda x: x),
        [{"x": x, "attention_mask": pairs(mask)}],
        progress=lambda stage, done, total, tokens: seen.append(tokens),
    )
    (_, covariance) = next(found)
    assert covariance.tokens == seen[-1] == int(mask.sum())
    assert entrywise_error(covariance.matrix(), x[mask.bool()]) < FLOAT32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: causal(m) | torch.eye(5, dtype=torch.bool), r"shape \(3, 1, 5, 5\)"),
        (lambda m: causal(m) | (m == 0)[:, None, :, None], r"shape \(3, 1, 5, 5\)"),
        (lambda m: additive(causal(m)) - torch.arange(5.0), "biases"),
        (lambda m: torch.ones(3, 1, 5, 8), r"shape \(3, 1, 5, 8\)"),
        (lambda m: {"full": causal(m), "sliding": None}, "one hides tokens"),
        (lambda m: {"full": causal(m), "sliding": causal(m.flip(0))}, "different tokens"),
    ],
    ids=["padding sees itself", "padding sees all", "biases", "a cache", "half a dictionary", "two minds"],
)
def test_a_mask_over_pairs_that_leaves_doubts_is_refused(change: Callable[[torch.Tensor], Any], words: str) -> None:
    mask = torch.ones(3, 5)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match=rf"^inner, batch 1: cannot tell padding.*{words}"):
        run(Reshaped(lambda x: x), [{"x": torch.randn(3, 5, D), "attention_mask": change(mask)}])


def test_texts_packed_into_a_mask_of_blocks_all_count() -> None:
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool().expand(3, 1, 5, 5)
    assert run(Reshaped(lambda x: x), [{"x": torch.randn(3, 5, D), "attention_mask": blocks}])["inner"].tokens == 15


# ---- batches without names


class Wrapper(nn.Module):
    """Hands its arguments on, whatever they are."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for number, module in enumerate(modules):
            self.add_module(f"inner{number}", module)

    def forward(self, *args: Any) -> Any:
        return self.inner0(*args)


def test_the_padding_of_a_tuple_is_found_through_a_wrapper_or_refused() -> None:
    model, batches = tiny("llama"), random_batches(2, 4, 24, padding="right")
    wanted = run(model, batches)
    tuples = [tuple(batch.values()) for batch in batches]
    found = run(Wrapper(Wrapper(model)), tuples, targets=["q_proj"])
    for name, covariance in found.items():
        assert torch.equal(covariance.matrix(), wanted[name.replace("inner0.inner0.", "")].matrix())
    two = Wrapper(model, nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"batch 1: one of its 2 tensors looks like an attention_mask.*Wrapper"):
        run(two, tuples, targets=["q_proj"])
    assert len(run(two, [(batch["input_ids"],) for batch in batches], targets=["q_proj"])) == 3


# ---- padding that nothing marks


IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [5, 6, 7, 2, 2, 2], [2, 2, 5, 6, 7, 8]])
LABELS = IDS.masked_fill(IDS == 2, -100)


@pytest.mark.parametrize(
    ("pad", "inputs", "count"),
    [
        (2, {"input_ids": IDS}, 5),
        (2, {"input_ids": IDS[:1]}, None),
        (2, {"input_ids": IDS[:1], "labels": LABELS[:1]}, 1),
        (2, {"input_ids": IDS, "labels": LABELS}, 6),
        (None, {"input_ids": IDS}, None),
        (None, {"input_ids": IDS, "labels": LABELS}, 5),
        (None, {"input_ids": IDS, "labels": IDS}, None),
        (0, {"input_ids": IDS}, None),
        (2, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, None),
        (None, {"input_ids": IDS, "padding_mask": IDS == 2}, 12),
        (None, {"input_ids": IDS, "mask": torch.ones_like(IDS)}, None),
        (None, {"input_ids": IDS, "special_tokens_mask": IDS == 2}, None),
        (2, {"x": torch.randn(3, 6, D)}, None),
    ],
)
def test_tokens_that_look_like_padding_are_told_of(pad: int | None, inputs: dict[str, torch.Tensor], count: int | None) -> None:
    model = nn.Linear(1, 1)
    model.config = type("Config", (), {"pad_token_id": pad})()  # type: ignore[assignment]
    reader = PaddingReader(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in (1, 2):
            assert reader.read(number, inputs).mask is None
    assert len(caught) == (count is not None)
    for warning in caught:
        assert issubclass(warning.category, UserWarning)
        assert str(warning.message).startswith("batch 1: ")
        assert f"{count} " in str(warning.message)
        assert "'attention_mask' (batch, tokens)" in str(warning.message)


def test_padding_without_a_mask_is_told_of_once_a_run() -> None:
    model = tiny("opt")  # its padding token is 1
    batches = [{"input_ids": batch["input_ids"]} for batch in random_batches(2, 4, 16, padding="right")]
    with pytest.warns(UserWarning, match="tokens look like padding") as caught:
        run(model, batches, targets=["q_proj"])
    assert len(caught) == 1


# ---- positions


@pytest.mark.parametrize(
    ("family", "side", "told"),
    [("gpt2", "left", True), ("gpt2", "right", False), ("bert", "left", True), ("opt", "left", False), ("llama", "left", False)],
)
def test_positions_that_padding_moves_are_told_of(family: str, side: str, told: bool) -> None:
    model, batches = tiny(family), random_batches(2, 4, 24, padding=side)
    found: dict[str, torch.Tensor] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {name: c.matrix() for name, c in run(model, batches).items()}
    moved = [each for each in caught if "padded on the left" in str(each.message)]
    assert len(moved) == told
    for name, x in recorded_inputs(model, batches, found).items():  # the trial is not summed
        assert entrywise_error(found[name], x) < FLOAT32, name
    if told and family == "gpt2":
        pairs = [{"input_ids": b["input_ids"], "attention_mask": causal(b["attention_mask"])} for b in batches]
        with pytest.warns(UserWarning, match="padded on the left"):
            assert run(model, pairs, targets=["c_fc"])["transformer.h.0.mlp.c_fc"].tokens == len(x)
        positions = [{**b, "position_ids": (b["attention_mask"].cumsum(1) - 1).clamp(min=0)} for b in batches]
        alone = [{"input_ids": row[m.bool()][None]} for b in batches for row, m in zip(*b.values(), strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given, right = run(model, positions, precision="fp64"), run(model, alone, precision="fp64")
        for name, covariance in right.items():
            assert (given[name].matrix() - covariance.matrix()).norm() < 1e-5 * covariance.matrix().norm()
            if name.endswith("0.attn.c_attn"):
                assert (found[name] - covariance.matrix()).norm() > 1e-2 * covariance.matrix().norm()


# ---- PEFT's doors


def test_pefts_doors_find_padding_alike() -> None:
    config = LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights="eva", eva_config=EvaConfig())
    batches = random_batches(1, 4, 24, padding="left")
    plain = tiny("gpt2")
    with pytest.warns(UserWarning, match="padded on the left") as caught:
        found = get_eva_state_dict(plain, batches, config, show_progress_bar=False)
    assert len([each for each in caught if "padded" in str(each.message)]) == 1
    for name, x in recorded_inputs(plain, batches, found).items():
        x = x.double() - x.double().mean(0)
        _, _, vt = torch.linalg.svd(x, full_matrices=False)
        assert (found[name].double() @ vt[: len(found[name])].T).abs().diagonal().min() > 0.999, name
    model = tiny("opt")
    ids = random_batches(1, 4, 24, padding="right")[0]["input_ids"]
    corda = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    with pytest.warns(UserWarning, match="batch 1: .* look like padding") as caught:
        preprocess_corda(model, corda, run_model=lambda: [model(ids), model(input_ids=ids)])
    assert len([each for each in caught if "look like padding" in str(each.message)]) == 1
