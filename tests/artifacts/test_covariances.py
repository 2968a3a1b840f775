"""`Covariances`: second moments of whole models on disk, added up, and used again without the model."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inputs import activations, randn
from models import random_batches, tiny
from nullspace import Covariance, NullSpace, NullSpaces, Site, compute_null_spaces
from nullspace.artifacts import records, sitewise
from nullspace.artifacts.covariances import Covariances
from nullspace.calibration.covariances import compute_covariances
from nullspace.model.sites import find_targets
from reference import excess_leak, leak, optimal_leak, recorded_inputs, relative_error, second_moment

STRATEGIES = ("resident", "layerwise")
# Sums of the same numbers in another order.
ROUNDING = 1e-12
Q_PROJ, O_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compute(model: nn.Module, loader: Any, out: Path, **options: Any) -> Covariances:
    return compute_covariances(model, loader, out, **{"progress": False, **options})


def covariance_of(x: torch.Tensor, precision: str = "fp64") -> Covariance:
    covariance = Covariance(x.shape[1], precision=precision)
    covariance.update(x)
    return covariance


A, B = Site(("a.q", "a.k"), 24), Site(("a.o",), 32)


def two_sites(x: torch.Tensor, y: torch.Tensor, precision: str = "fp64") -> Covariances:
    """A run by hand: x is the input of A, y of B."""
    return Covariances([(A, covariance_of(x, precision)), (B, covariance_of(y, precision))])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def same_bits(a: Covariances, b: Covariances) -> None:
    assert a.sites == b.sites
    for site in a.sites:
        assert a[site.name].state()[0] == b[site.name].state()[0]
        assert torch.equal(a[site.name].matrix(), b[site.name].matrix())
        assert torch.equal(a[site.name].mean(), b[site.name].mean())


@functools.cache
def batches() -> list[dict[str, torch.Tensor]]:
    return random_batches(4, 4, 40, padding="right")


@functools.cache
def received() -> dict[str, torch.Tensor]:
    model = tiny("llama")
    return recorded_inputs(model, batches(), find_targets(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("covariances") / "run"
    compute(tiny("llama"), batches(), out)
    return out


# ---- what is in them


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_they_are_the_second_moments_of_every_layers_inputs(tmp_path: Path, family: str, strategy: str) -> None:
    model = tiny(family)
    found = compute(model, batches(), tmp_path / "run", strategy=strategy)
    inputs = recorded_inputs(model, batches(), find_targets(model))
    assert set(found) == set(inputs)
    for name, x in inputs.items():
        assert relative_error(found[name].matrix(), second_moment(x)) <= (1e-14 if strategy == "resident" else 1e-6), name
        assert (found[name].tokens, found[name].mass, found[name].products) == (len(x), len(x), "fp64")
        torch.testing.assert_close(found[name].mean(), x.double().mean(0), rtol=1e-5, atol=1e-6)
        found.check(name, find_targets(model)[name])
    for site in found.sites:
        assert all(found[member] is found[site.name] for member in site.members)


def test_resident_and_layerwise_give_the_same(tmp_path: Path, saved: Path) -> None:
    found = compute(tiny("llama"), batches(), tmp_path / "run", strategy="layerwise")
    resident = Covariances.load(saved)
    assert {s.members for s in found.sites} == {s.members for s in resident.sites}
    for site in found.sites:
        assert relative_error(found[site.name].matrix(), resident[site.name].matrix()) <= ROUNDING
        assert found[site.name].tokens == resident[site.name].tokens


def test_other_targets_and_precisions(tmp_path: Path) -> None:
    found = compute(tiny("llama"), batches(), tmp_path / "run", targets=["o_proj", "down_proj"], precision={".*o_proj": "qr"})
    assert len(found.sites) == len(found) == 6
    assert {found[name].products for name in found if name.endswith("o_proj")} == {"qr"}
    assert "qr" not in {found[name].products for name in found if name.endswith("down_proj")}
    for name, covariance in found.items():
        assert relative_error(covariance.matrix(), second_moment(received()[name])) <= 1e-6


@pytest.mark.parametrize(
    "options",
    [{"strategy": "both"}, {"precision": "fp32"}, {"dtype": torch.bfloat16}, {"targets": ["nothing"]}, {"hidden_states": "cloud"}],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_refused_before_anything_is_read_or_written(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).rstrip("s") if "dtype" not in options else "float64 or float32"):
        compute(tiny("llama"), (pytest.fail("the loader was read") for _ in range(1)), tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_noticed_before_the_work(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("…")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="run"):
            compute(tiny("llama"), (pytest.fail("the loader was read") for _ in range(1)), tmp_path / "run", overwrite=overwrite)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    bad = [*batches(), {"input_ids": torch.full((1, 4), 10**6)}]
    for strategy in STRATEGIES:
        with pytest.raises(ValueError, match=rf"batch {len(bad)} .*no embedding"):
            compute(tiny("llama"), bad, tmp_path / "run", strategy=strategy)
        assert list(tmp_path.iterdir()) == []


# ---- kept


def test_what_is_loaded_is_what_was_saved_to_the_bit(tmp_path: Path) -> None:
    x, y = activations(600, 24, quietest=1e-3, massive=1e3), randn(700, 32)
    for precision in ("auto", "fp64", "qr"):
        made = two_sites(x, y, precision)
        made.save(tmp_path / precision)
        found = Covariances.load(tmp_path / precision)
        assert list(found) == ["a.q", "a.k", "a.o"]
        for name in found:
            assert found[name].state()[0] == made[name].state()[0]
            for key, tensor in found[name].state()[1].items():
                assert torch.equal(tensor, made[name].state()[1][key])
        found.save(tmp_path / f"{precision} again")
        assert contents(tmp_path / precision) == contents(tmp_path / f"{precision} again")


def test_only_what_is_asked_for_is_read_and_only_once_while_it_is_held(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_tensors = records.read_tensors
    monkeypatch.setattr(sitewise.records, "read_tensors", lambda d, name, m: read.append(name) or read_tensors(d, name, m))
    found = Covariances.load(saved)
    assert (len(found), len(found.sites), repr(found)) == (21, 12, "Covariances(12 sites, 21 layers)")
    assert read == []
    held = found[Q_PROJ]
    assert read == [f"0000-{Q_PROJ}.safetensors"]
    assert found["model.layers.0.self_attn.v_proj"] is held
    assert len(read) == 1
    del held
    assert found[O_PROJ].tokens == len(received()[O_PROJ])  # until now the last one was held
    assert found[Q_PROJ].tokens == len(received()[Q_PROJ])
    assert len(read) == 3
    found.check(O_PROJ, find_targets(tiny("llama"))[O_PROJ])
    assert len(read) == 3


@pytest.mark.parametrize("harm", ["truncated", "altered", "missing", "emptied"])
def test_a_damaged_file_is_named(tmp_path: Path, harm: str) -> None:
    two_sites(randn(50, 24), randn(60, 32)).save(tmp_path / "run")
    path = tmp_path / "run" / "0001-a.o.safetensors"
    before = path.read_bytes()
    damaged = {"truncated": before[:-1], "altered": before[:-1] + bytes([before[-1] ^ 1]), "emptied": b"", "missing": None}[harm]

    def spoil() -> None:
        path.unlink() if damaged is None else path.write_bytes(damaged)

    spoil()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Covariances.load(tmp_path / "run")
    path.write_bytes(before)
    found = Covariances.load(tmp_path / "run")
    spoil()  # while it is in use
    assert found["a.q"].tokens == 50
    with pytest.raises(ValueError, match=re.escape(str(path))):
        found["a.o"]
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Covariances.merge([found, found])["a.o"]


def test_null_spaces_are_no_covariances_and_the_other_way_round(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="describes 'covariances', not 'spaces'"):
        NullSpaces.load(saved)
    NullSpaces.from_covariances(Covariances.load(saved), rank=4, progress=False).save(tmp_path / "spaces")
    with pytest.raises(ValueError, match="describes 'spaces', not 'covariances'"):
        Covariances.load(tmp_path / "spaces")


def test_another_model_is_refused(saved: Path) -> None:
    found = Covariances.load(saved)
    with pytest.raises(ValueError, match=rf"this covariance is of another model: the weight of '{re.escape(Q_PROJ)}' begins with"):
        found.check(Q_PROJ, find_targets(tiny("llama", seed=1))[Q_PROJ])
    with pytest.raises(ValueError, match="there is no covariance for 'lm_head'"):
        found.check("lm_head", nn.Linear(2, 2))


def test_float32_takes_half_the_space(tmp_path: Path) -> None:
    x, y = activations(900, 400, quietest=1e-2), activations(900, 300, quietest=1e-2, massive=1e3)
    wide, narrow = Site(("x",), 400), Site(("y",), 300)
    for precision in ("fp64", "qr"):
        made = Covariances([(wide, covariance_of(x, precision)), (narrow, covariance_of(y, precision))])
        made.save(tmp_path / "64", overwrite=True)
        made.save(tmp_path / "32", overwrite=True, dtype=torch.float32)
        sizes = [sum(len(c) for name, c in contents(tmp_path / n).items() if name != "nullspace.json") for n in ("64", "32")]
        assert sizes[1] < 0.51 * sizes[0]
        assert sizes[0] < 4 * (400 * 401 + 300 * 301) + 8 * 700 + 2000
        found = Covariances.load(tmp_path / "32")
        for name in ("x", "y"):
            assert relative_error(found[name].matrix(), made[name].matrix()) <= 1e-7
            assert found[name].error_norm > made[name].error_norm
    for bad in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(ValueError, match="kept in float64 or float32, not"):
            made.save(tmp_path / "other", dtype=bad)
    assert not (tmp_path / "other").exists()


def test_a_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    made = two_sites(randn(50, 24), randn(60, 32).double() * 1e50)
    with pytest.raises(ValueError, match=r"range of torch\.float32"):
        made.save(tmp_path / "run", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


# ---- merged


def test_two_halves_of_the_data_are_the_whole(tmp_path: Path, saved: Path) -> None:
    model = tiny("llama")
    halves = [compute(model, batches()[part], tmp_path / str(part.start)) for part in (slice(0, 2), slice(2, 4))]
    merged, whole = Covariances.merge(halves), Covariances.load(saved)
    assert {s.members for s in merged.sites} == {s.members for s in whole.sites}
    for site in whole.sites:
        both, all_at_once = merged[site.name], whole[site.name]
        assert relative_error(both.matrix(), all_at_once.matrix()) <= ROUNDING
        torch.testing.assert_close(both.mean(), all_at_once.mean(), rtol=ROUNDING, atol=ROUNDING)
        assert (both.tokens, both.mass) == (all_at_once.tokens, all_at_once.mass)
    merged.save(tmp_path / "merged")
    same_bits(Covariances.load(tmp_path / "merged"), merged)
    for name, module in find_targets(model).items():
        merged.check(name, module)
    with pytest.raises(ValueError, match="another model"):
        merged.check(Q_PROJ, find_targets(tiny("llama", seed=1))[Q_PROJ])


def parts(precision: str = "fp64") -> list[Covariances]:
    made = []
    for seed, (tokens, scale) in enumerate([(300, 1.0), (70, 5.0), (5, 100.0)]):
        x = activations(tokens, 24, quietest=1e-2, seed=seed) * scale
        made.append(two_sites(x, randn(tokens, 32, seed=seed + 10) / scale, precision))
    return made


@pytest.mark.parametrize("precision", ["fp64", "qr"])
@pytest.mark.parametrize("normalise", [False, True])
def test_neither_order_nor_grouping_matters(precision: str, normalise: bool) -> None:
    runs = parts(precision)
    merge = functools.partial(Covariances.merge, normalise=normalise)
    whole = merge(runs)
    for order in itertools.permutations(range(3)):
        again = merge([runs[i] for i in order])
        for site in (A, B):
            assert relative_error(again[site.name].matrix(), whole[site.name].matrix()) <= ROUNDING
            torch.testing.assert_close(again[site.name].mean(), whole[site.name].mean(), rtol=1e-10, atol=1e-13)
    # A sum of sums; of sums of traces 2 and 1, where these are divided by.
    shares = [2.0, 1.0] if normalise else None
    for first, second in (([0, 1], 2), ([2, 0], 1)):
        again = merge([merge([runs[i] for i in first]), runs[second]], weights=shares)
        for site in (A, B):
            ratio = whole[site.name].trace / again[site.name].trace
            assert relative_error(again[site.name].matrix() * ratio, whole[site.name].matrix()) <= ROUNDING
            assert ratio == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("precision", ["auto", "fp64", "qr"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shares", [None, [1.0, 2.0, 0.125], [1e-6, 1.0, 1e6]])
def test_a_merge_is_a_weighted_sum(precision: str, normalise: bool, shares: list[float] | None) -> None:
    runs = parts(precision)
    before = [run["a.q"].state() for run in runs]
    merged = Covariances.merge(runs, weights=shares, normalise=normalise)
    for site in (A, B):
        c, total, mass = torch.zeros(site.d_in, site.d_in, dtype=torch.float64), 0.0, 0.0
        for run, share in zip(runs, shares or [1.0] * 3, strict=True):
            part = run[site.name]
            share = share / part.trace if normalise else share
            c, total, mass = c + share * part.matrix(), total + share * part.mass * part.mean(), mass + share * part.mass
        assert relative_error(merged[site.name].matrix(), c) <= 1e-13
        torch.testing.assert_close(merged[site.name].mean(), total / mass, rtol=1e-10, atol=1e-13)
        assert merged[site.name].mass == pytest.approx(mass, rel=1e-13)
        assert merged[site.name].tokens == 375
        if normalise:
            assert merged[site.name].trace == pytest.approx(sum(shares or [1.0] * 3), rel=1e-12)
    for run, (facts, tensors) in zip(runs, before, strict=True):  # what was merged is what it was
        assert run["a.q"].state()[0] == facts
        for name, tensor in run["a.q"].state()[1].items():
            assert torch.equal(tensor, tensors[name])


def test_a_merge_of_one_is_a_copy() -> None:
    (run, *_) = parts()
    merged = Covariances.merge([run])
    same_bits(merged, run)
    merged["a.q"].update(randn(5, 24))
    assert run["a.q"].tokens == 300


def test_a_merge_knows_what_its_parts_have_lost(tmp_path: Path) -> None:
    for number, run in enumerate(parts()):
        run.save(tmp_path / str(number), dtype=torch.float32)
    stored = [Covariances.load(tmp_path / str(number)) for number in range(3)]
    for normalise in (False, True):
        rough, exact = (Covariances.merge(runs, normalise=normalise) for runs in (stored, parts()))
        for site in (A, B):
            error = float((rough[site.name].matrix() - exact[site.name].matrix()).norm())
            assert 0 < error <= rough[site.name].error_norm <= 30 * error


class Narrow(nn.Module):
    def __init__(self, d_in: int = 24, d_out: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.o = nn.Linear(d_in, d_out), nn.Linear(d_in, d_out)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q(x), self.o(x + 1)


def run_of(model: nn.Module, tmp_path: Path, name: str, width: int = 24, **options: Any) -> Covariances:
    return compute(model, [randn(60, width)], tmp_path / name, **options)


def test_runs_of_something_else_are_refused_saying_what_differs(tmp_path: Path) -> None:
    first = run_of(Narrow(), tmp_path, "first")
    other_layers = run_of(Narrow(), tmp_path, "layers", targets=["q"])
    other_weights = run_of(Narrow(seed=1), tmp_path, "weights")
    other_shape = run_of(Narrow(d_out=9), tmp_path, "shape")
    other_width = run_of(Narrow(d_in=25), tmp_path, "width", 25)
    merge = Covariances.merge
    with pytest.raises(ValueError, match=r"only the first one has the site o "):
        merge([first, other_layers])
    with pytest.raises(ValueError, match=r"only number 2 has the site o "):
        merge([other_layers, first])
    with pytest.raises(ValueError, match=r"only the first one has the site o "):
        merge([first, first, other_layers])
    with pytest.raises(ValueError, match=r"different models: 'q' has another weight in number 2"):
        merge([first, other_weights])
    with pytest.raises(ValueError, match=r"different models: 'q' has another weight in number 3"):
        merge([first, first, other_shape])
    with pytest.raises(ValueError, match=r"only the first one has the site q \(d_in = 24\)"):
        merge([first, other_width])
    # Without a model to compare, as with one.
    apart = Covariances([(Site(("a.q",), 24), covariance_of(randn(9, 24))), (Site(("a.k",), 24), covariance_of(randn(9, 24)))])
    together = Covariances([(Site(("a.q", "a.k"), 24), covariance_of(randn(9, 24)))])
    with pytest.raises(ValueError, match=r"only the first one has the site a\.q "):
        merge([apart, together])
    with pytest.raises(ValueError, match=r"only the first one has the site a\.q \+ a\.k "):
        merge([together, apart])
    with pytest.raises(ValueError, match=r"has the site x \(d_in = 3\)"):
        merge([Covariances([(Site(("x",), d), covariance_of(randn(9, d)))]) for d in (3, 4)])
    qr = Covariances([(Site(("a.q", "a.k"), 24), covariance_of(randn(9, 24), "qr"))])
    with pytest.raises(ValueError, match=r"'a\.q' was summed with precision 'qr' in one run and not in another"):
        merge([together, qr])["a.q"]


def test_what_was_saved_in_16_bits_is_still_the_same_model(tmp_path: Path) -> None:
    model = Narrow()
    first, second = run_of(model, tmp_path, "first"), run_of(model.bfloat16().float(), tmp_path, "second")
    assert Covariances.merge([first, second])["q"].tokens == 120


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], []])
def test_weights_are_one_positive_number_a_run(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"one positive weight a run: 2 runs, weights \["):
        Covariances.merge(parts()[:2], weights=weights)


def test_there_is_no_merge_of_nothing_and_no_share_of_zeros() -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        Covariances.merge([])
    silent = two_sites(torch.zeros(9, 24), randn(9, 32))
    merged = Covariances.merge([parts()[0], silent], normalise=True)
    assert merged["a.o"].tokens == 309
    with pytest.raises(ValueError, match=r"the inputs of 'a\.q' are all zero in one of the runs"):
        merged["a.q"]
    assert Covariances.merge([parts()[0], silent])["a.q"].tokens == 309


# ---- cut off


class Cut(Exception):
    pass


def cut_after(sites: int) -> Callable[..., None]:
    seen = 0

    def progress(stage: str, done: int, total: int | None, tokens: int) -> None:
        nonlocal seen
        seen += stage == "covariances"
        if seen == sites:
            raise Cut

    return progress


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(tmp_path: Path, strategy: str, dtype: torch.dtype) -> None:
    model, options = tiny("llama"), {"strategy": strategy, "dtype": dtype, "checkpoint": tmp_path / "kept"}
    whole = compute(model, batches(), tmp_path / "whole", strategy=strategy, dtype=dtype)
    for sites in (1, 4):  # cut twice
        with pytest.raises(Cut):
            compute(model, batches(), tmp_path / "run", progress=cut_after(sites), **options)
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "run.part").exists()
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 5
    compute(model, batches(), tmp_path / "run", **options)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    # What is finished is not done again.
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    same_bits(compute(model, batches(), tmp_path / "again", **options), whole)
    hook.remove()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_whose_model_failed_midway_goes_on(tmp_path: Path, strategy: str) -> None:
    model, kept = tiny("llama"), tmp_path / "kept"
    compute(model, batches(), tmp_path / "whole", strategy=strategy)

    def fail(*_: object) -> None:
        if strategy == "resident" or list(kept.glob("*.safetensors")):  # not in the rehearsal of the first batch
            raise Cut

    hook = model.model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(Cut):
        compute(model, batches(), tmp_path / "run", strategy=strategy, checkpoint=kept)
    hook.remove()
    # Layer by layer, the first two were finished; all at once, nothing was.
    assert len(list(kept.glob("*.safetensors"))) == (8 if strategy == "layerwise" else 0)
    compute(model, batches(), tmp_path / "run", strategy=strategy, checkpoint=kept)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"precision": "qr"}, "precision: 'fp64' there, 'qr' now"),
        ({"dtype": torch.float32}, "dtype: 'torch.float64' there, 'torch.float32' now"),
        ({"strategy": "layerwise"}, "strategy: "),
        ({"targets": ["q_proj"]}, "targets: "),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    model, kept = tiny("gpt2") if "targets" not in change else tiny("llama"), tmp_path / "kept"
    compute(model, batches()[:1], tmp_path / "run", checkpoint=kept)
    with pytest.raises(ValueError, match=says):
        compute(model, batches()[:1], tmp_path / "other", checkpoint=kept, **change)
    with pytest.raises(ValueError, match="keeps: 'covariances' there, None now"):
        compute_null_spaces(model, batches()[:1], rank=4, checkpoint=kept, progress=False)
    with pytest.raises(ValueError, match="read more than once"):
        compute(model, iter(batches()), tmp_path / "other", checkpoint=tmp_path / "new")
    assert not (tmp_path / "other").exists()


# ---- null spaces of them


@pytest.mark.parametrize("spectrum", [False, True])
def test_null_spaces_of_kept_sums_are_those_of_the_model(saved: Path, tmp_path: Path, spectrum: bool) -> None:
    model, options = tiny("llama"), {"rank": 6, "spectrum": spectrum, "progress": False}
    direct = compute_null_spaces(model, batches(), precision="fp64", **options)
    kept = NullSpaces.from_covariances(Covariances.load(saved), **options)
    assert kept.sites == direct.sites
    for name, space in direct.items():
        assert float(torch.linalg.matrix_norm(kept[name].basis - space.basis @ (space.basis.T @ kept[name].basis))) <= 1e-10
        assert kept[name].leak == pytest.approx(space.leak, rel=1e-9)
        assert kept[name].leak == pytest.approx(optimal_leak(received()[name], 6), rel=1e-6)
        assert kept[name].effective_rank == (None if not spectrum else pytest.approx(space.effective_rank, rel=1e-9))
        for field in ("tokens", "outliers", "nullity", "precision", "site"):
            assert getattr(kept[name], field) == getattr(space, field)
        kept.check(name, find_targets(model)[name])
    with pytest.raises(ValueError, match="another model"):
        kept.check(Q_PROJ, find_targets(tiny("llama", seed=1))[Q_PROJ])
    kept.save(tmp_path / "spaces")
    assert torch.equal(NullSpaces.load(tmp_path / "spaces")[Q_PROJ].basis, kept[Q_PROJ].basis)


def test_progress_counts_layers(saved: Path) -> None:
    steps: list[tuple[str, int, int | None]] = []
    NullSpaces.from_covariances(Covariances.load(saved), rank=4, progress=lambda s, d, t, n: steps.append((s, d, t)))
    assert steps[0] == ("null spaces", 0, 21)
    assert steps[-1] == ("null spaces", 21, 21)
    assert [d for _, d, _ in steps] == sorted(d for _, d, _ in steps)


@pytest.mark.parametrize("rank", [0, -1, 24, 32, 100])
def test_a_rank_that_does_not_fit_names_the_site(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be between 1 and 23 at 'a\.q' \(d_in = 24\), not {rank}"):
        NullSpaces.from_covariances(parts()[0], rank=rank, progress=False)


def test_sites_that_saw_few_tokens_are_named() -> None:
    wide = Covariances([(A, covariance_of(randn(70, 24))), (Site(("a.o",), 66), covariance_of(randn(70, 66)))])
    with pytest.warns(UserWarning, match=r"1 of 2 sites saw fewer tokens \(70\) than d_in \+ rank \(72 at most\): a\.o"):
        NullSpaces.from_covariances(wide, rank=6, progress=False)


@pytest.mark.parametrize(
    ("quietest", "massive", "said"),
    [(0.1, 1.0, False), (1e-2, 1.0, False), (1e-1, 1e4, True), (1e-3, 1e3, True), (1e-6, 1.0, True)],
)
def test_bases_that_a_float32_file_has_spoilt_are_named(tmp_path: Path, quietest: float, massive: float, said: bool) -> None:
    site, x = Site(("a.q",), 64), activations(2048, 64, quietest=quietest, massive=massive)
    for name, dtype in (("wide", torch.float64), ("narrow", torch.float32)):
        Covariances([(site, covariance_of(x))]).save(tmp_path / name, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spaces = NullSpaces.from_covariances(Covariances.load(tmp_path / "narrow"), rank=8, progress=False)
    assert [w.filename for w in caught] == [__file__] * said
    assert all(re.search(r"1 of 1 sites more than 0\.0001 .*: a\.q\..*keep them in float64", str(w.message)) for w in caught)
    # Said if, and only if, it is so; and it is the file's doing.
    assert (excess_leak(spaces["a.q"].basis, x) > 1e-4) == said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spaces = NullSpaces.from_covariances(Covariances.load(tmp_path / "wide"), rank=8, progress=False)
    assert excess_leak(spaces["a.q"].basis, x) <= 1e-4


def test_an_exact_null_space_kept_in_float64_is_nothing_to_warn_of() -> None:
    site, x = Site(("a.q",), 64), activations(30, 64, quietest=1e-3).double()
    with pytest.warns(UserWarning, match="fewer tokens") as caught:
        spaces = NullSpaces.from_covariances(Covariances([(site, covariance_of(x))]), rank=8, progress=False)
    assert len(caught) == 1
    assert leak(spaces["a.q"].basis, x) <= 1e-10


@pytest.mark.parametrize("precision", ["fp64", "qr"])
@pytest.mark.parametrize("massive", [1.0, 1e2, 1e4])
@pytest.mark.parametrize(("d", "quietest"), [(64, 1e-4), (96, 1e-1), (160, 1e-2)])
def test_what_a_float32_file_costs_is_estimated(precision: str, massive: float, d: int, quietest: float) -> None:
    x = activations(1500, d, quietest=quietest, massive=massive)
    space = NullSpace.from_covariance(Covariance.from_state(*covariance_of(x, precision).state(torch.float32)), 8)
    excess = excess_leak(space.basis, x)
    assert excess <= 3 * space.excess_estimate + 1e-9
    assert excess <= space.excess_bound + 1e-9


# ---- one task after another


def test_a_basis_of_two_tasks_leaves_both_alone() -> None:
    """Each task is silent, up to 1e-3, in 24 of 64 directions, and only 12 of these are the same."""
    turn = torch.linalg.qr(randn(64, 64, dtype=torch.float64)).Q
    scale = torch.ones(2, 64, dtype=torch.float64)
    scale[0, :24], scale[1, 12:36] = 1e-3, 1e-3
    # The first has many more tokens, and of far larger norm: neither counts.
    tasks = [(randn(n, 64, seed=s).double() * scale[s] * norm) @ turn.T for s, (n, norm) in enumerate([(4000, 50.0), (500, 1.0)])]
    site = Site(("a.q",), 64)
    runs = [Covariances([(site, covariance_of(x))]) for x in tasks]
    rank = 12
    of_second = NullSpaces.from_covariances(runs[1], rank=rank, progress=False)["a.q"]
    of_both = NullSpaces.from_covariances(Covariances.merge(runs, normalise=True), rank=rank, progress=False)["a.q"]
    assert leak(of_both.basis, tasks[0]) <= leak(of_second.basis, tasks[0]) / 5
    for x in tasks:
        assert leak(of_both.basis, x) <= 2 * optimal_leak(x, rank)
    # As its own record says: of sums of trace 1 each.
    expected = sum(leak(of_both.basis, x) ** 2 for x in tasks) / 2
    assert of_both.leak == pytest.approx(expected**0.5, rel=1e-9)
    # Added as they are, the one of larger norm would dominate the basis.
    uneven = NullSpaces.from_covariances(Covariances.merge(runs), rank=rank, progress=False)["a.q"]
    assert leak(of_both.basis, tasks[1]) <= leak(uneven.basis, tasks[1])


# ---- digests that fit, and content that does not

FORGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a width without limits": ({"d_in": 300000, "weight_shapes": {}}, {}, r"'triangle' should be \(45000150000,\)"),
    "no tokens": ({"tokens": -1}, {}, "'tokens' should be an integer"),
    "mass that is none": ({"mass": float("nan")}, {}, "'mass' should be a finite number"),
    "losses that are none": ({"sums": {"mixed_energy": -1.0}}, {}, "'mixed_energy' should be a finite number"),
    "sums that are none": ({"sums": 3}, {}, "'sums' should be an object"),
    "a triangle too short": ({}, {"triangle": lambda t: t[:-1]}, "'triangle' should be"),
    "a triangle of integers": ({}, {"triangle": lambda t: t.long()}, "'triangle' should be .*int64"),
    "NaN": ({}, {"triangle": lambda t: t.index_fill(0, torch.tensor([5]), float("nan"))}, "'triangle' holds NaN or Inf"),
    "a negative square": (
        {},
        {"triangle": lambda t: t.index_fill(0, torch.tensor([2]), -1.0)},
        "sums of squares, and one is negative",
    ),
    "no total": ({}, {"total": lambda t: t[:0]}, "'total' should be"),
    "indefinite": ({}, {"triangle": lambda t: t.index_fill(0, torch.tensor([1]), 1e6)}, "q_proj' is not positive semi"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_sums_that_no_run_can_have_written_are_refused_though_their_digests_fit(forgery: str, saved: Path, tmp_path: Path) -> None:
    facts, change, words = FORGED[forgery]
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / records.MANIFEST
    body = records.read_sealed(path)
    file = body["sites"][0]["file"]
    tensors = load_file(path.with_name(file))
    save_file({name: change[name](t) if name in change else t for name, t in tensors.items()}, path.with_name(file))
    body["sites"][0].update(facts)
    body["files"][file] = records.looks_of(path.parent, [file])[file]
    path.write_text(records.sealed(body))
    with pytest.raises(ValueError, match=words) as error:
        NullSpaces.from_covariances(Covariances.load(path.parent), rank=4, progress=False)
    assert forgery == "indefinite" or str(path.parent) in str(error.value)
