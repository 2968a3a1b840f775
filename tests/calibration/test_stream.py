"""The stream: every layer's sum is of its own unpadded inputs, sharing is never wrong, and the model is left as it was found."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from models import FAMILIES, VOCABULARY, random_batches, tiny
from nullspace import Covariance, Site, compute_null_spaces, stream_covariances
from nullspace.model.sites import find_targets
from nullspace.progress import Bars, reporter
from reference import entrywise_error, recorded_inputs

# A float32 product of some hundred tokens is off by a few 1e-7 of √(c_ii c_jj); a token too many or too few by more than 1e-4.
FLOAT32 = 1e-6
FLOAT64 = 1e-14

# Layers of one block that are handed the same tensor, by the last part of their names. All others listen alone.
SHARED = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "qwen2": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "gemma": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "gpt2": [],
    "opt": [{"q_proj", "k_proj", "v_proj"}],
    "bert": [{"query", "key", "value"}],
    "albert": [{"query", "key", "value"}],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # For tensors as small as these a second thread brings nothing, and stalls wherever the cores are busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(model: nn.Module, loader: Any, **options: Any) -> dict[str, tuple[Site, Covariance]]:
    """Layer name → its site and the site's covariance."""
    found = {}
    for site, covariance in stream_covariances(model, loader, progress=False, **options):
        for member in site.members:
            assert member not in found
            found[member] = (site, covariance)
    return found


def partition(found: dict[str, tuple[Site, Covariance]]) -> set[frozenset[str]]:
    return {frozenset(site.members) for site, _ in found.values()}


def tokens_of(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


class Pair(nn.Module):
    """Two linear layers, and a batch that says what each is handed."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.a = nn.Linear(d, 4)
        self.b = nn.Linear(d, 4)
        self.config = type("Config", (), {})()

    def forward(self, x: torch.Tensor, how: str, attention_mask: torch.Tensor | None = None) -> None:
        x = x + 0.0  # a tensor of the model's own, as activations are
        if how == "same":
            self.a(x), self.b(x)
        elif how == "swapped":
            self.b(x), self.a(x)
        elif how == "twice":
            self.a(x), self.b(x)
            y = x * 2
            self.a(y), self.b(y)
        elif how == "equal":
            # Each copy is gone when the next one is made, so they may well have the same address.
            self.a(x.clone()), self.b(x.clone())
        elif how == "another":
            self.a(x), self.b(x * 3)
        elif how == "written":
            self.a(x)
            x.add_(1.0)
            self.b(x)
        elif how == "only a":
            self.a(x)
        elif how == "only b":
            self.b(x)
        elif how == "neither":
            pass
        elif how == "a twice":
            self.a(x), self.a(x), self.b(x)


class Reshaped(nn.Module):
    """A linear layer that is handed the hidden states in another shape."""

    def __init__(self, shape: Callable[[torch.Tensor], torch.Tensor], d_in: int) -> None:
        super().__init__()
        self.shape = shape
        self.inner = nn.Linear(d_in, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner(self.shape(x))


class Untouchable:
    """A loader that must not be read."""

    def __len__(self) -> int:
        raise AssertionError("the loader's length was asked for")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the loader was read")


# ---- sums


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layers_covariance_is_that_of_its_own_unpadded_inputs(family: str, padding: str | None) -> None:
    model, batches = tiny(family), random_batches(3, 4, 48, padding=padding)
    found = run(model, batches)
    assert set(found) == set(find_targets(model))
    calls = 3 if family == "albert" else 1  # one block's weights, run at every depth
    for name, x in recorded_inputs(model, batches, found).items():
        site, covariance = found[name]
        assert covariance.d_in == site.d_in == x.shape[1]
        assert covariance.tokens == len(x) == tokens_of(batches) * (calls if "layer_groups" in name else 1), name
        assert entrywise_error(covariance.matrix(), x) < FLOAT32, name


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_share_a_site_exactly_when_they_are_handed_one_tensor(family: str) -> None:
    def group(name: str) -> tuple[str, Any]:
        parent, _, last = name.rpartition(".")
        return parent, next((i for i, shared in enumerate(SHARED[family]) if last in shared), last)

    model = tiny(family)
    found = run(model, random_batches(2, 2, 16))
    groups: dict[tuple[str, Any], set[str]] = {}
    for name in find_targets(model):
        groups.setdefault(group(name), set()).add(name)
    assert partition(found) == {frozenset(members) for members in groups.values()}


def test_the_sums_in_float64_are_exact_to_rounding() -> None:
    model, batches = tiny("llama"), random_batches(2, 4, 48, padding="left")
    found = run(model, batches, precision="fp64")
    for name, x in recorded_inputs(model, batches, found).items():
        assert entrywise_error(found[name][1].matrix(), x) < FLOAT64, name


def test_sites_come_in_the_order_in_which_the_model_calls_them() -> None:
    called = []
    model = tiny("llama")
    for name, module in find_targets(model).items():
        module.register_forward_pre_hook(lambda _m, _a, name=name: called.append(name))
    sites = [site for site, _ in stream_covariances(model, random_batches(1), progress=False)]
    assert [name for site in sites for name in site.members] == called[: len(find_targets(model))]


def test_only_the_targets_are_summed() -> None:
    found = run(tiny("llama"), random_batches(1), targets=["k_proj", "v_proj"])
    assert partition(found) == {frozenset(f"model.layers.{i}.self_attn.{p}_proj" for p in "kv") for i in range(3)}


def test_layers_that_are_called_with_keywords_are_summed() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(input=x)

    x = torch.randn(5, 3)
    assert entrywise_error(run(ByKeyword(), [x])["inner"][1].matrix(), x) < FLOAT32


# ---- padding


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding_is_dropped_whatever_the_masks_dtype(dtype: torch.dtype) -> None:
    x, mask = torch.randn(3, 5, 4), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 1, 0, 1]])
    covariance = run(Reshaped(lambda x: x, 4), [{"x": x, "attention_mask": mask.to(dtype)}])["inner"][1]
    assert covariance.tokens == 10
    assert entrywise_error(covariance.matrix(), x[mask.bool()]) < FLOAT32


def test_a_real_pooler_counts_one_vector_a_sequence() -> None:
    config = tiny("bert").config
    config.num_labels = 3
    model = transformers.BertForSequenceClassification(config).eval()
    batches = random_batches(2, 4, 16, padding="right")
    found = run(model, batches)
    assert "classifier" not in found
    assert found["bert.encoder.layer.0.intermediate.dense"][1].tokens == tokens_of(batches)
    inputs: list[torch.Tensor] = []
    model.bert.pooler.dense.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    pooled = torch.cat(inputs)
    covariance = found["bert.pooler.dense"][1]
    assert covariance.tokens == len(pooled) == 8
    assert entrywise_error(covariance.matrix(), pooled) < FLOAT32


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="batch 1: attention_mask is list, not a tensor"):
        run(Reshaped(lambda x: x, 4), [{"x": torch.randn(1, 2, 4), "attention_mask": [[1, 1]]}])


def test_what_padding_holds_does_not_matter() -> None:
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5)
    mask[0, :2] = 0
    x[0, :2] = float("nan")
    covariance = run(Reshaped(lambda x: x, 4), [{"x": x, "attention_mask": mask}])["inner"][1]
    assert entrywise_error(covariance.matrix(), x[mask.bool()]) < FLOAT32


# ---- encoder–decoder models


@pytest.fixture
def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def t5_batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, 64, (3, 12)), "labels": torch.randint(2, 64, (3, 7))}


def test_an_encoder_decoder_model_is_summed_on_both_sides(t5: nn.Module) -> None:
    batches = [t5_batch(), t5_batch()]
    found = run(t5, batches)
    assert set(found) == set(find_targets(t5))
    assert "lm_head" not in found
    for name, x in recorded_inputs(t5, batches, found).items():
        assert found[name][1].tokens == len(x), name
        assert entrywise_error(found[name][1].matrix(), x) < FLOAT32, name
    # The encoder's output goes to every cross-attention of the decoder: one input.
    cross = {name for name in found if "EncDecAttention" in name and name[-1] in "kv"}
    assert len(cross) == 4
    assert cross in partition(found)


def test_an_encoder_decoder_model_takes_a_mask_that_hides_nothing(t5: nn.Module) -> None:
    batch = t5_batch()
    batch["attention_mask"] = torch.ones(3, 12)
    assert len(run(t5, [batch])) == len(find_targets(t5))


@pytest.mark.parametrize("where", ["attention_mask", "decoder_attention_mask", "labels"])
def test_the_padding_of_one_side_leaves_the_other_one_alone(t5: nn.Module, where: str) -> None:
    batch = t5_batch()
    if where == "labels":
        batch["labels"][1, 4:] = -100
    else:
        batch[where] = torch.ones_like(batch["input_ids" if where == "attention_mask" else "labels"])
        batch[where][1, 4:] = 0
    tokens = {name: covariance.tokens for name, (_, covariance) in run(t5, [t5_batch(), batch]).items()}
    assert tokens["encoder.block.1.layer.1.DenseReluDense.wi"] == (64 if where == "attention_mask" else 72)
    assert tokens["decoder.block.0.layer.1.EncDecAttention.v"] == (64 if where == "attention_mask" else 72)
    assert tokens["decoder.block.0.layer.1.EncDecAttention.q"] == (42 if where == "attention_mask" else 39)


# ---- sharing


@pytest.mark.parametrize("how", ["same", "swapped", "twice"])
def test_layers_that_are_always_handed_one_tensor_share_a_site(how: str) -> None:
    batches = [{"x": torch.randn(2, 3, 6), "how": how} for _ in range(3)]
    found = run(Pair(), batches)
    assert partition(found) == {frozenset("ab")}
    inputs = torch.cat([(b["x"] * factor).reshape(-1, 6) for b in batches for factor in ((1, 2) if how == "twice" else (1,))])
    assert entrywise_error(found["a"][1].matrix(), inputs) < FLOAT32


def test_the_order_of_calls_may_change_from_batch_to_batch() -> None:
    batches = [{"x": torch.randn(2, 3, 6), "how": how} for how in ("same", "swapped", "twice", "neither", "same")]
    assert partition(run(Pair(), batches)) == {frozenset("ab")}


@pytest.mark.parametrize("how", ["equal", "another", "written", "a twice"])
def test_layers_that_are_not_handed_one_tensor_have_their_own_sums(how: str) -> None:
    batches = [{"x": torch.randn(2, 3, 6), "how": how} for _ in range(3)]
    found = run(Pair(), batches)
    assert partition(found) == {frozenset("a"), frozenset("b")}
    x = torch.cat([b["x"].reshape(-1, 6) for b in batches])
    of_a = torch.cat([x, x]) if how == "a twice" else x
    of_b = {"another": x * 3, "written": x + 1}.get(how, x)
    for name, expected in (("a", of_a), ("b", of_b)):
        assert found[name][1].tokens == len(expected)
        assert entrywise_error(found[name][1].matrix(), expected) < FLOAT32, name


def test_layers_that_come_to_share_a_tensor_later_keep_their_own_sums() -> None:
    x = torch.randn(2, 3, 6)
    found = run(Pair(), [{"x": x, "how": "another"}, {"x": x, "how": "same"}])
    assert partition(found) == {frozenset("a"), frozenset("b")}
    assert entrywise_error(found["b"][1].matrix(), torch.cat([x * 3, x]).reshape(-1, 6)) < FLOAT32


@pytest.mark.parametrize(
    ("how", "broken", "other"),
    [("another", "b", "a"), ("equal", "b", "a"), ("written", "b", "a"), ("only a", "b", "a"), ("only b", "a", "b")],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_sharing_pattern_that_breaks_is_an_error_naming_the_layer(how: str, broken: str, other: str, inference: bool) -> None:
    batches = [{"x": torch.randn(2, 3, 6), "how": each} for each in ("same", "same", how)]
    message = f"'{broken}' shared its input with '{other}' in the batch in which they were first called, but not in batch 3"
    with torch.inference_mode(inference), pytest.raises(ValueError, match=message):
        run(Pair(), batches)


def test_a_broken_pattern_can_be_calibrated_in_separate_runs() -> None:
    x = torch.randn(2, 3, 6)
    batches = [{"x": x, "how": "same"}, {"x": x, "how": "another"}]
    assert entrywise_error(run(Pair(), batches, targets=["b"])["b"][1].matrix(), torch.cat([x, x * 3]).reshape(-1, 6)) < FLOAT32


def test_a_layer_that_is_not_called_in_every_batch_keeps_its_tokens() -> None:
    """As experts do, which only some batches reach."""
    x = torch.randn(3, 2, 3, 6)
    found = run(Pair(), [{"x": x[i], "how": how} for i, how in enumerate(("only a", "only b", "only a"))])
    assert found["a"][1].tokens == 12
    assert entrywise_error(found["b"][1].matrix(), x[1].reshape(-1, 6)) < FLOAT32


# ---- errors


def test_a_target_that_is_never_called_is_an_error_naming_it() -> None:
    batches = [{"x": torch.randn(2, 3, 6), "how": "only a"}]
    with pytest.raises(ValueError, match="target 'b' was never called"):
        run(Pair(), batches, targets=["a", "b"])
    with pytest.warns(UserWarning, match="leaves out 1 layer: 'b' was never called.* 50.00% of the parameters"):
        assert set(run(Pair(), batches)) == {"a"}
    assert set(run(Pair(), batches, targets=["a"])) == {"a"}


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(ValueError, match="the loader is empty"):
        run(tiny("llama"), [])
    with pytest.raises(ValueError, match="the loader is empty"):
        run(tiny("llama"), iter(()))


def test_a_loader_that_ends_early_is_an_error() -> None:
    class Short(list):
        def __len__(self) -> int:
            return 5

    with pytest.raises(ValueError, match="announced 5 batches and gave 2"):
        run(tiny("llama"), Short(random_batches(2)))


def test_masking_everything_is_an_error() -> None:
    batch = random_batches(1)[0]
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(ValueError, match=r"no tokens at 'model\.layers\.0\.self_attn\.q_proj': everything is masked"):
        run(tiny("llama"), [batch])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_activation_that_is_not_finite_is_an_error_naming_module_and_batch(value: str) -> None:
    model, batches = tiny("llama"), random_batches(3)
    for batch in batches:
        batch["input_ids"].clamp_(max=VOCABULARY - 2)
    # One token's embedding, which only the second batch holds.
    batches[1]["input_ids"][2, 5] = VOCABULARY - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY - 1, 3] = float(value)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj, batch 2: NaN or Inf in \d+ of 256 tokens"):
        run(model, batches)


def test_an_overflow_inside_the_model_is_an_error_naming_the_layer_that_hears_it_first() -> None:
    model = tiny("llama").half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e7)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj, batch 1: NaN or Inf"):
        run(model, random_batches(1))


@pytest.mark.parametrize("batch", ["text", 3, None, ["a"], (), {1, 2}, b"x"], ids=repr)
def test_a_batch_of_the_wrong_type_is_an_error_naming_it(batch: Any) -> None:
    with pytest.raises(TypeError, match=f"batch 2 is {type(batch).__name__}; expected a mapping, a tensor"):
        run(tiny("llama"), [random_batches(1)[0], batch])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fast"}, "strategy must be one of .*'layerwise', not 'fast'"),
        ({"precision": "fp8"}, "precision must be one of 'auto', 'mixed', 'fp64', 'qr', not 'fp8'"),
        ({"targets": ["nope"]}, "target 'nope' matches no module"),
    ],
)
@pytest.mark.parametrize("door", [stream_covariances, lambda *args, **kwargs: compute_null_spaces(*args, rank=4, **kwargs)])
def test_a_bad_argument_is_an_error_before_the_loader_is_touched(
    door: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        door(tiny("llama"), Untouchable(), **options)


# ---- the model is left as it was found


def snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = [key for key in vars(nn.Module()) if key.endswith("hooks") or "hooks_" in key]
    assert "_forward_pre_hooks" in hooks
    return {
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {(name, key): dict(getattr(m, key)) for name, m in model.named_modules() for key in hooks},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "versions": {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()},
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()),
    }


@pytest.fixture
def busy_model() -> nn.Module:
    """A model in the middle of something: part of it in train mode, part of it frozen, with a hook of its owner."""
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda _m, _a: None)
    return model


def test_the_model_is_left_as_it_was_found(busy_model: nn.Module) -> None:
    before = snapshot(busy_model)
    stream = stream_covariances(busy_model, random_batches(2), progress=False)
    assert snapshot(busy_model) == before
    next(stream)
    assert snapshot(busy_model) == before
    stream.close()
    assert snapshot(busy_model) == before


@pytest.mark.parametrize("failure", ["type", "loader", "model", "empty", "finite"])
def test_the_model_is_left_as_it_was_found_after_an_error(busy_model: nn.Module, failure: str) -> None:
    good = random_batches(2)

    def failing_loader() -> Iterator[dict[str, torch.Tensor]]:
        yield good[0]
        raise OSError("the data are gone")

    loader, error = {
        "type": ([good[0], "text"], TypeError),
        "loader": (failing_loader(), OSError),
        "model": ([good[0], {"input_ids": torch.full((1, 4), VOCABULARY)}], ValueError),
        "empty": ([], ValueError),
        "finite": (good, ValueError),
    }[failure]
    if failure == "finite":
        with torch.no_grad():
            busy_model.transformer.h[1].ln_1.weight[0] = float("nan")
    before = snapshot(busy_model)
    with pytest.raises(error):
        run(busy_model, loader)
    assert snapshot(busy_model) == before


def test_dropout_is_off_while_the_model_runs(busy_model: nn.Module) -> None:
    batches = random_batches(2)
    found = run(busy_model, batches)
    for name, x in recorded_inputs(busy_model.eval(), batches, found).items():
        assert entrywise_error(found[name][1].matrix(), x) < FLOAT32, name


def test_nothing_tracks_gradients() -> None:
    model = tiny("llama")
    outputs = []
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: outputs.append(out))
    for _, covariance in stream_covariances(model, random_batches(1), progress=False):
        assert not covariance.matrix().requires_grad
    assert not any(t.requires_grad for out in outputs for t in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "opt"])
def test_the_output_head_runs_for_one_token_a_sequence_unless_it_is_a_target(family: str) -> None:
    model, batches = tiny(family), random_batches(2, 3, 16, padding="right")
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda _m, args: shapes.append(tuple(args[0].shape[:-1])))
    run(model, batches)
    assert shapes == [(3, 1)] * 2
    shapes.clear()
    covariance = run(model, batches, targets=["lm_head"])["lm_head"][1]
    assert shapes == [(3, 16)] * 2
    assert covariance.tokens == tokens_of(batches)
    x = recorded_inputs(model, batches, ["lm_head"])["lm_head"]
    assert entrywise_error(covariance.matrix(), x) < FLOAT32


# ---- loaders and surroundings


class Streamed(IterableDataset):
    """Batches from a data set that does not know its length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda batches: (batch for batch in batches), id="generator"),
        pytest.param(lambda batches: DataLoader(batches, batch_size=None), id="DataLoader"),
        pytest.param(lambda batches: DataLoader(Streamed(batches), batch_size=None), id="DataLoader without a length"),
        pytest.param(lambda batches: [transformers.BatchEncoding(batch) for batch in batches], id="BatchEncoding"),
        pytest.param(lambda batches: [{**batch, "labels": batch["input_ids"]} for batch in batches], id="with labels"),
        pytest.param(lambda batches: [(batch["input_ids"], batch["attention_mask"]) for batch in batches], id="tuples"),
        pytest.param(lambda batches: [[batch["input_ids"], batch["attention_mask"]] for batch in batches], id="lists"),
    ],
)
def test_a_loader_may_be_any_iterable_of_what_the_model_takes(make: Callable[..., Any]) -> None:
    model, batches = tiny("llama"), random_batches(3, 3, 20, padding="right")
    expected, found = run(model, batches), run(model, make(batches))
    for name, (_, covariance) in expected.items():
        assert found[name][1].tokens == tokens_of(batches)
        assert torch.equal(found[name][1].matrix(), covariance.matrix())


def test_a_loader_may_yield_plain_tensors() -> None:
    model, batches = tiny("llama"), random_batches(3, 3, 20)
    expected, found = run(model, batches), run(model, [batch["input_ids"] for batch in batches])
    for name, (_, covariance) in expected.items():
        assert torch.equal(found[name][1].matrix(), covariance.matrix())


def test_labels_reach_a_module_that_is_no_transformers_model() -> None:
    class TakesLabels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.inner(x) - labels

    run(TakesLabels(), [{"x": torch.randn(2, 3), "labels": torch.randn(2, 3)}])


def test_autocast_around_the_stream_does_not_touch_the_sums() -> None:
    model, batches = tiny("llama"), random_batches(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(model, batches)
        inputs = recorded_inputs(model, batches, found)
        matrices = {name: covariance.matrix() for name, (_, covariance) in found.items()}
    assert inputs["model.layers.0.mlp.down_proj"].dtype == torch.bfloat16  # the model itself did run under autocast
    assert len(partition(found)) == 12
    for name, x in inputs.items():
        assert entrywise_error(matrices[name], x) < FLOAT32, name


def test_the_stream_runs_in_inference_mode_and_its_sums_are_of_use_outside() -> None:
    model, batches = tiny("llama"), random_batches(2)
    with torch.inference_mode():
        found = run(model, batches)
        inputs = recorded_inputs(model, batches, found)
        assert torch.is_inference_mode_enabled()
    for name, x in inputs.items():
        assert entrywise_error(found[name][1].matrix(), x) < FLOAT32, name


def test_the_model_may_be_in_half_precision() -> None:
    model, batches = tiny("llama").bfloat16(), random_batches(2)
    found = run(model, batches)
    for name, x in recorded_inputs(model, batches, found).items():
        assert x.dtype == torch.bfloat16
        assert entrywise_error(found[name][1].matrix(), x) < FLOAT32, name


def test_a_covariance_is_freed_when_its_consumer_moves_on() -> None:
    stream = stream_covariances(tiny("llama"), random_batches(1), progress=False)
    references = []
    gc.disable()  # what only the cycle collector frees is not free yet
    try:
        for _, covariance in stream:
            assert not any(reference() for reference in references)
            references.append(weakref.ref(covariance))
            del covariance
        assert len(references) == 12
        assert not any(reference() for reference in references)
    finally:
        gc.enable()


def test_activations_are_not_kept_when_there_are_enough_of_them() -> None:
    inputs = []
    model = tiny("llama")
    for module in find_targets(model).values():
        module.register_forward_pre_hook(lambda _m, args: inputs.append(weakref.ref(args[0])))
    gc.disable()
    try:
        stream = stream_covariances(model, random_batches(2, 8, 64), progress=False)
        next(stream)
        assert len(inputs) == 42
        assert not any(reference() is not None for reference in inputs)
    finally:
        gc.enable()


# ---- progress


def test_progress_is_called_with_stage_steps_and_tokens() -> None:
    batches = random_batches(3, 2, 20, padding="left")
    calls: list[tuple[str, int, int | None, int]] = []
    list(stream_covariances(tiny("llama"), batches, progress=lambda *call: calls.append(call)))
    tokens = [tokens_of(batches[:i]) for i in range(4)]
    assert calls == [("forward", i, 3, tokens[i]) for i in range(4)]

    calls.clear()
    list(stream_covariances(tiny("llama"), iter(batches), progress=lambda *call: calls.append(call)))
    assert calls == [("forward", i, None, tokens[i]) for i in range(4)]

    calls.clear()
    compute_null_spaces(tiny("llama"), batches * 2, rank=4, tolerance=1.0, progress=lambda *call: calls.append(call))
    stages = [call[0] for call in calls]
    assert stages == ["forward"] * 7 + ["null spaces"] * 12
    done = [call[1] for call in calls[7:]]  # layers, of which a site has several
    assert done == sorted(set(done))
    assert calls[-1][:3] == ("null spaces", 21, 21)


def test_progress_counts_tokens_without_a_mask() -> None:
    def last(model: nn.Module, batch: Any) -> int:
        calls: list[int] = []
        list(stream_covariances(model, [batch], progress=lambda stage, done, total, tokens: calls.append(tokens)))
        return calls[-1]

    assert last(tiny("llama"), torch.ones(2, 7, dtype=torch.long)) == 14
    assert last(tiny("llama"), {"input_ids": torch.ones(2, 7, dtype=torch.long)}) == 14
    assert last(nn.Sequential(nn.Linear(3, 3)), torch.ones(2, 7, 3)) == 14


@pytest.mark.parametrize("total", [2, None])
def test_a_bar_is_shown_for_every_stage(capsys: pytest.CaptureFixture[str], total: int | None) -> None:
    report = reporter(True)
    report("forward", 1, total, 100)
    report("forward", 2, total, 200)
    report("null spaces", 3, 3, 0)
    assert isinstance(report, Bars)
    report.close()  # draws a bar of unknown length for the last time
    shown = capsys.readouterr().err
    assert re.search(r"forward: .*2/2" if total else r"forward: 2it", shown)
    assert re.search(r"null spaces: 100%.*3/3", shown)


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    compute_null_spaces(tiny("llama"), random_batches(1), rank=4, progress=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_sequence_beyond_the_positions_names_the_batch_and_its_length(family: str, strategy: str) -> None:
    batches = [*random_batches(1, length=64), *random_batches(1, batch_size=2, length=300)]
    with pytest.raises(ValueError, match=r"batch 2 \(2, 300\): the model has no embedding for one of its token ids or positions"):
        list(stream_covariances(tiny(family), batches, strategy=strategy, progress=False))
    batches[1] = {"input_ids": torch.tensor([[5, 10**6]])}
    with pytest.raises(ValueError, match=r"batch 2 \(1, 2\): the model has no embedding"):
        list(stream_covariances(tiny(family), batches, strategy=strategy, progress=False))
