"""Null spaces of whole models: their leak against the optimum, their facts and warnings, and their files."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import nullspace.moments.sums_torch as sums_torch
from inputs import activations
from models import FAMILIES, VOCABULARY, random_batches, tiny
from nullspace import Covariance, NullSpace, NullSpaces, Site, compute_null_spaces
from nullspace.artifacts import records
from nullspace.artifacts.spaces import TOLERANCE
from nullspace.calibration.covariances import compute_covariances
from nullspace.cli import app
from nullspace.model.sites import find_targets
from nullspace.solvers import cost
from reference import excess_leak, leak, optimal_leak, recorded_inputs

RANK = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # For tensors as small as these a second thread brings nothing, and stalls wherever the cores are busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches_of(family: str) -> list[dict[str, torch.Tensor]]:
    return random_batches(16 if family == "llama" else 4, 4, 64)  # 4,096 tokens, or 1,024


@functools.cache
def calibrated(family: str, precision: str = "auto", spectrum: bool = False) -> NullSpaces:
    options: dict[str, Any] = {"rank": RANK, "precision": precision, "spectrum": spectrum, "progress": False}
    return compute_null_spaces(tiny(family), batches_of(family), **options)


@functools.cache
def inputs_of(family: str) -> dict[str, torch.Tensor]:
    model = tiny(family)
    return recorded_inputs(model, batches_of(family), find_targets(model))


class Untouchable:
    """A loader that must not be read."""

    def __len__(self) -> int:
        raise AssertionError("the loader's length was asked for")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the loader was read")


# ---- their leak


@pytest.mark.parametrize(("precision", "allowed"), [("auto", 1e-4), ("fp64", 1e-8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layers_basis_leaks_as_little_as_the_best(family: str, precision: str, allowed: float) -> None:
    spaces, inputs = calibrated(family, precision), inputs_of(family)
    assert set(spaces) == set(inputs)
    excess = {}
    for name, x in inputs.items():
        assert len(x) > x.shape[1] + RANK
        excess[name] = excess_leak(spaces[name].basis, x)
    worst = max(excess, key=excess.__getitem__)
    assert excess[worst] <= allowed, f"{worst}: {excess[worst]:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_are_orthonormal_float64_columns_on_the_cpu(family: str) -> None:
    for name, space in calibrated(family).items():
        assert space.basis.shape == (space.site.d_in, RANK)
        assert (space.basis.dtype, space.basis.device.type) == (torch.float64, "cpu")
        assert (space.eigenvalues.shape, space.eigenvalues.dtype) == ((RANK,), torch.float64)
        torch.testing.assert_close(space.basis.T @ space.basis, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_eigenvalues_leak_gap_and_trace_are_those_of_the_singular_values(family: str) -> None:
    for name, x in inputs_of(family).items():
        space = calibrated(family, "fp64")[name]
        sigma = torch.linalg.svdvals(x.double()).flip(0)
        largest = float(sigma[-1] ** 2)
        # Weyl: no eigenvalue moves by more than the norm of the rounding error, some 1e-16 × the largest eigenvalue.
        torch.testing.assert_close(space.eigenvalues, sigma[:RANK] ** 2, rtol=1e-9, atol=1e-14 * largest, msg=name)
        assert space.leak == pytest.approx(optimal_leak(x, RANK), rel=1e-6), name
        assert space.leak == pytest.approx(leak(space.basis, x), rel=1e-6), name
        assert space.gap == pytest.approx(1 - float(sigma[RANK - 1] / sigma[RANK]) ** 2, abs=1e-6), name
        assert space.trace == pytest.approx(float((x.double() ** 2).sum()), rel=1e-12)
        assert space.tokens == len(x)
        assert space.precision == "fp64"


def test_each_basis_vector_has_its_own_eigenvalue() -> None:
    """Not only the span is right: ‖Xu_i‖² is λ_i, ascending."""
    for name, x in inputs_of("llama").items():
        space = calibrated("llama", "fp64")[name]
        energy = (x.double() @ space.basis).square().sum(0)
        torch.testing.assert_close(energy, space.eigenvalues, rtol=1e-6, atol=0, msg=name)
        assert (space.eigenvalues.diff() >= 0).all()


def test_the_leak_that_is_reported_in_the_fast_precision_is_the_leak_there_is() -> None:
    for name, x in inputs_of("llama").items():
        space = calibrated("llama")[name]
        assert space.leak == pytest.approx(leak(space.basis, x), rel=1e-2), name
    assert {space.precision for space in calibrated("llama").values()} == {"mixed", "fp64"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_effective_rank_is_that_of_the_singular_values(family: str) -> None:
    for name, x in inputs_of(family).items():
        sigma = torch.linalg.svdvals(x.double())
        p = sigma / sigma.sum()
        expected = math.exp(-float((p * p.log()).sum()))  # arXiv 2503.02659, eq. 2–3
        assert 1 < expected < x.shape[1]
        # √λ of the smallest λ has half the digits.
        assert calibrated(family, "fp64", spectrum=True)[name].effective_rank == pytest.approx(expected, rel=1e-6), name
        assert calibrated(family, "auto", spectrum=True)[name].effective_rank == pytest.approx(expected, rel=1e-3), name


def test_the_effective_rank_is_not_computed_unasked() -> None:
    assert all(space.effective_rank is None for space in calibrated("llama").values())


def test_asking_for_the_spectrum_changes_nothing_else() -> None:
    plain, with_spectrum = calibrated("llama"), calibrated("llama", spectrum=True)
    for name, space in plain.items():
        assert torch.equal(space.basis, with_spectrum[name].basis)
        assert torch.equal(space.eigenvalues, with_spectrum[name].eigenvalues)


# ---- batches and padding


@functools.cache
def sequences() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randint(3, VOCABULARY, (int(n),), generator=generator) for n in torch.linspace(25, 90, 24))


def padded(batch_size: int, side: str) -> list[dict[str, torch.Tensor]]:
    made = []
    for start in range(0, len(sequences()), batch_size):
        part = sequences()[start : start + batch_size]
        width = max(map(len, part)) + 3  # so that even a batch of one has padding
        ids, mask = torch.ones(len(part), width, dtype=torch.long), torch.zeros(len(part), width, dtype=torch.long)
        for row, sequence in enumerate(part):
            at = slice(width - len(sequence), None) if side == "left" else slice(0, len(sequence))
            ids[row, at], mask[row, at] = sequence, 1
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@functools.cache
def unpadded_inputs() -> dict[str, torch.Tensor]:
    model = tiny("llama")
    return recorded_inputs(model, [{"input_ids": sequence[None]} for sequence in sequences()], find_targets(model))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_result_depends_neither_on_the_batch_size_nor_on_padding(batch_size: int, side: str) -> None:
    spaces = compute_null_spaces(tiny("llama"), padded(batch_size, side), rank=RANK, progress=False)
    excess = {}
    for name, x in unpadded_inputs().items():
        assert spaces[name].tokens == len(x) == sum(map(len, sequences()))
        excess[name] = excess_leak(spaces[name].basis, x)
    worst = max(excess, key=excess.__getitem__)
    assert excess[worst] <= 1e-4, f"{worst}: {excess[worst]:.2e}"


# ---- massive activations


@pytest.mark.parametrize("precision", ["auto", "fp64"])
@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_massive_activations_do_not_drown_the_small_directions(layer: int, scale: float, precision: str) -> None:
    model, batches, name = tiny("llama"), random_batches(16, 4, 64), f"model.layers.{layer}.mlp.down_proj"

    # Real spectra are steeper than those of random weights, and not along the coordinates, where float32 would follow any scale.
    steep = torch.logspace(0, -2, 112)[:, None] * torch.linalg.qr(torch.randn(112, 112)).Q

    def amplify(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0] @ steep
        x[:2, 0] *= scale  # the first token, as in real models: 32 of 4,096
        return (x,)

    model.get_submodule(name).register_forward_pre_hook(amplify)
    space = compute_null_spaces(model, batches, rank=RANK, targets=[name], precision=precision, progress=False)[name]
    x = recorded_inputs(model, batches, [name])[name]
    # The test has teeth: an ordinary float32 sum of these very inputs is far off.
    assert excess_leak(torch.linalg.eigh((x.T @ x).double()).eigenvectors[:, :RANK], x) > 1e-2
    assert excess_leak(space.basis, x) <= 1e-4
    assert 30 <= space.outliers < 100


# ---- the mapping


def test_spaces_are_a_mapping_from_layer_to_space() -> None:
    spaces = calibrated("llama")
    names = [name for site in spaces.sites for name in site.members]
    assert isinstance(spaces, Mapping)
    assert list(spaces) == list(spaces.keys()) == names
    assert len(spaces) == len(names) == 21
    assert set(spaces) == set(find_targets(tiny("llama")))
    assert "model.layers.0.mlp.up_proj" in spaces
    assert "lm_head" not in spaces
    assert spaces.get("lm_head") is None
    with pytest.raises(KeyError, match="lm_head"):
        spaces["lm_head"]
    assert repr(spaces) == "NullSpaces(12 sites, 21 layers)"


def test_members_of_a_site_share_one_object() -> None:
    spaces = calibrated("llama")
    assert len({id(space) for space in spaces.values()}) == len(spaces.sites) == 12
    for site in spaces.sites:
        for member in site.members:
            assert spaces[member] is spaces[site.name]
            assert spaces[member].site == site


def test_rows_are_json_and_say_what_the_spaces_say() -> None:
    spaces = calibrated("llama", spectrum=True)
    rows = spaces.rows()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["site"] for row in rows] == [site.name for site in spaces.sites]
    for row in rows:
        space = spaces[row["site"]]
        assert row["members"] == list(space.site.members)
        for field in ("tokens", "rank", "leak", "gap", "outliers", "precision", "effective_rank"):
            assert row[field] == getattr(space, field)
        assert row["d_in"] == space.site.d_in


@pytest.mark.parametrize("spectrum", [False, True])
def test_the_summary_is_an_aligned_table_with_a_line_a_site(spectrum: bool) -> None:
    spaces = calibrated("llama", spectrum=spectrum)
    title, *lines, share = spaces.summary().splitlines()
    assert share == "100.0% of the parameters in the model's matrices (embeddings and output head aside) are in these layers."
    assert ("effective rank" in title) == spectrum
    assert len(lines) == len(spaces.sites)
    assert len({len(line) for line in (title, *lines)}) == 1
    for line, site in zip(lines, spaces.sites, strict=True):
        space = spaces[site.name]
        name, *others = line.split("  ", 1)[0], *line.split()[1:]
        more = f" +{len(site.members) - 1}" if len(site.members) > 1 else ""
        assert name == site.name + more
        cells = [cell for cell in others if not cell.startswith("+")]
        assert cells[:4] == [str(site.d_in), "4,096", str(RANK), f"{space.leak:.2e}"]
        assert cells[4:7] == [f"{space.gap:.1%}", str(space.outliers), space.precision]
        assert cells[7:] == [f"{space.excess_estimate:.0e}", *([f"{space.effective_rank:.1f}"] if spectrum else [])]


def test_there_is_a_summary_of_nothing() -> None:
    assert NullSpaces([]).summary() == "(no sites)"


# ---- ranks


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused_before_the_loader_is_touched(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be at least 1, not {rank}"):
        compute_null_spaces(tiny("llama"), Untouchable(), rank=rank)


@pytest.mark.parametrize("rank", [48, 1000])
def test_a_rank_that_leaves_nothing_to_hear_is_refused_before_the_loader_is_touched(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} .*'model\.layers\.0\.mlp\.up_proj' \(d_in = 48\)"):
        compute_null_spaces(tiny("llama"), Untouchable(), rank=rank, targets=["up_proj", "down_proj"])


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_rank_above_the_layers_outputs_is_refused_before_the_loader_is_touched(family: str) -> None:
    with pytest.raises(ValueError, match=r"rank 17 .*'model\.layers\.0\.self_attn\.k_proj' \(16 × 48\)"):
        compute_null_spaces(tiny(family), Untouchable(), rank=17, targets=["q_proj", "k_proj"])


def test_the_layout_of_conv1d_does_not_confuse_the_rank() -> None:
    model = nn.ModuleDict({"narrow": tiny("gpt2").transformer.h[0].mlp.c_proj})  # 192 inputs, 48 outputs
    with pytest.raises(ValueError, match=r"rank 49 .*'narrow' \(48 × 192\)"):
        compute_null_spaces(model, Untouchable(), rank=49)


@pytest.mark.parametrize("rank", [1, 15])
def test_the_smallest_and_the_largest_rank_work(rank: int) -> None:
    x = torch.randn(200, 16)
    space = compute_null_spaces(nn.Sequential(nn.Linear(16, 20)), [x], rank=rank, progress=False)["0"]
    assert space.basis.shape == (16, rank)
    assert excess_leak(space.basis, x) < 1e-8


def test_a_covariance_without_tokens_or_with_a_wrong_rank_is_refused() -> None:
    covariance = Covariance(4)
    with pytest.raises(ValueError, match="no tokens"):
        NullSpace.from_covariance(covariance, 2)
    covariance.update(torch.randn(9, 4))
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"rank must be between 1 and d_in - 1 = 3, not {rank}"):
            NullSpace.from_covariance(covariance, rank)
    space = NullSpace.from_covariance(covariance, 2)
    assert (space.rank, space.site.d_in, space.tokens) == (2, 4, 9)


def test_taking_a_null_space_leaves_the_covariance_as_it_was() -> None:
    covariance = Covariance(200)  # wide enough for the solver that destroys its input
    covariance.update(torch.randn(900, 200))
    before = covariance.matrix()
    NullSpace.from_covariance(covariance, 5)
    assert torch.equal(covariance.matrix(), before)


def test_inputs_that_are_all_zero_have_a_leak_of_zero() -> None:
    space = compute_null_spaces(nn.Sequential(nn.Linear(4, 4)), [torch.zeros(9, 4)], rank=2, progress=False)["0"]
    assert (space.leak, space.gap, space.trace, space.tokens) == (0.0, 0.0, 0.0, 9)


# ---- few tokens


def test_few_tokens_are_a_warning_that_names_sites_and_need_and_a_null_space_all_the_same() -> None:
    model, batches = tiny("llama"), random_batches(1, 1, 20)
    with pytest.warns(UserWarning, match="12 of 12 sites saw fewer tokens") as caught:
        spaces = compute_null_spaces(model, batches, rank=RANK, progress=False)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert caught[0].filename == __file__
    assert "(20)" in message
    assert "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.o_proj" in message
    assert f"at least {112 + RANK} tokens" in message
    for name, x in recorded_inputs(model, batches, spaces).items():
        assert spaces[name].leak < 1e-4, name
        assert leak(spaces[name].basis, x) < 1e-4, name


def test_few_tokens_have_an_exact_null_space_in_float64() -> None:
    model, batches = tiny("llama"), random_batches(1, 1, 20)
    with pytest.warns(UserWarning, match="fewer tokens"):
        spaces = compute_null_spaces(model, batches, rank=RANK, precision="fp64", progress=False)
    for name, x in recorded_inputs(model, batches, spaces).items():
        assert leak(spaces[name].basis, x) < 1e-10, name


def test_only_the_sites_that_saw_too_few_tokens_are_named() -> None:
    """60 tokens are enough for 48 inputs and not for 112."""
    with pytest.warns(UserWarning, match="3 of 12 sites") as caught:
        compute_null_spaces(tiny("llama"), random_batches(1, 1, 60), rank=RANK, progress=False)
    assert "o_proj" not in str(caught[0].message)


def test_the_warning_begins_below_d_in_plus_rank_tokens() -> None:
    model = nn.Sequential(nn.Linear(10, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_null_spaces(model, [torch.randn(13, 10)], rank=3, progress=False)
    with pytest.warns(UserWarning, match=r"sites saw fewer tokens \(12\) than d_in \+ rank \(13 at most\): 0\."):
        compute_null_spaces(model, [torch.randn(12, 10)], rank=3, progress=False)


# ---- save and load


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    calibrated("llama", spectrum=True).save(tmp_path / "spaces")
    return tmp_path / "spaces"


def test_what_is_loaded_is_what_was_saved_to_the_bit(saved: Path) -> None:
    before, after = calibrated("llama", spectrum=True), NullSpaces.load(saved)
    assert after.sites == before.sites
    assert list(after) == list(before)
    for name, space in before.items():
        for field in ("basis", "eigenvalues"):
            mine, theirs = getattr(space, field), getattr(after[name], field)
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        for field in ("trace", "tokens", "gap", "outliers", "precision", "effective_rank", "site", "rank", "leak"):
            assert getattr(after[name], field) == getattr(space, field), field
    assert after.summary() == before.summary()
    for site in after.sites:
        assert all(after[member] is after[site.name] for member in site.members)


def test_saving_twice_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    NullSpaces.load(saved).save(tmp_path / "again")
    names = sorted(path.name for path in saved.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert len(names) == 12 + 1
    for name in names:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_effective_rank_that_was_not_asked_for_stays_unknown(tmp_path: Path) -> None:
    calibrated("llama").save(tmp_path / "spaces")
    assert all(space.effective_rank is None for space in NullSpaces.load(tmp_path / "spaces").values())


def test_any_layer_name_can_be_saved(tmp_path: Path) -> None:
    names = ("a/b", "a_b", "../up", "größe ‖x‖", "x" * 300, "CON", "a\nb")
    model = nn.ModuleDict({name.replace(".", ""): nn.Linear(6, 6) for name in names})
    model.forward = lambda x: [layer(x + i) for i, layer in enumerate(model.values())]
    spaces = compute_null_spaces(model, [torch.randn(30, 6)], rank=2, progress=False)
    spaces.save(tmp_path / "spaces")
    assert [path.name for path in tmp_path.iterdir()] == ["spaces"]
    after = NullSpaces.load(tmp_path / "spaces")
    assert list(after) == list(model)
    for name, space in spaces.items():
        assert torch.equal(after[name].basis, space.basis)
        after.check(name, model[name])


def test_saving_refuses_what_is_there_unless_it_is_ours_and_may_be_replaced(saved: Path, tmp_path: Path) -> None:
    other = calibrated("gpt2")
    with pytest.raises(FileExistsError, match=re.escape(str(saved))):
        other.save(saved)
    assert len(NullSpaces.load(saved)) == 21
    other.save(saved, overwrite=True)
    assert list(NullSpaces.load(saved)) == list(other)
    assert len(list(saved.iterdir())) == len(other.sites) + 1

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="foreign"):
            other.save(foreign, overwrite=overwrite)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


# ---- damage

FIRST = "0000-model.layers.0.self_attn.q_proj.safetensors"
MANIFEST = "nullspace.json"
SECOND = "0001-model.layers.0.self_attn.o_proj.safetensors"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, **changes}))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "truncated": (FIRST, lambda d: (d / FIRST).write_bytes((d / FIRST).read_bytes()[:-1])),
    "truncated to nothing": (FIRST, lambda d: (d / FIRST).write_bytes(b"")),
    "longer": (FIRST, lambda d: (d / FIRST).write_bytes((d / FIRST).read_bytes() + b"\0")),
    "flipped in the length of the header": (FIRST, lambda d: flip(d / FIRST, 0)),
    "flipped in the header": (FIRST, lambda d: flip(d / FIRST, 20)),
    "flipped in the middle": (SECOND, lambda d: flip(d / SECOND, (d / SECOND).stat().st_size // 2)),
    "flipped at the end": (SECOND, lambda d: flip(d / SECOND, -1)),
    "missing": (SECOND, lambda d: (d / SECOND).unlink()),
    "another site's file": (SECOND, lambda d: shutil.copy(d / FIRST, d / SECOND)),
    "a directory": (SECOND, lambda d: ((d / SECOND).unlink(), (d / SECOND).mkdir())),
    "manifest missing": (MANIFEST, lambda d: (d / MANIFEST).unlink()),
    "manifest empty": (MANIFEST, lambda d: (d / MANIFEST).write_bytes(b"")),
    "manifest truncated": (
        MANIFEST,
        lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:-9]),
    ),
    "manifest garbage": (MANIFEST, lambda d: (d / MANIFEST).write_text("{not json")),
    "manifest not UTF-8": (MANIFEST, lambda d: (d / MANIFEST).write_bytes(b'{"kind": "\xff"}')),
    "manifest a list": (MANIFEST, lambda d: (d / MANIFEST).write_text("[1, 2]")),
    "manifest foreign": (MANIFEST, lambda d: (d / MANIFEST).write_text('{"architectures": ["Llama"]}')),
    "manifest without digest": (MANIFEST, lambda d: edit(d / MANIFEST, digest=None)),
    "manifest altered": (MANIFEST, lambda d: edit(d / MANIFEST, sites=[])),
    "manifest extended": (MANIFEST, lambda d: edit(d / MANIFEST, note="looks fine")),
    "manifest of another kind": (MANIFEST, lambda d: records.write_manifest(d, "export", {"sites": []})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_an_error_naming_the_file(saved: Path, damage: str) -> None:
    file, harm = DAMAGE[damage]
    before = (saved / file).read_bytes()
    harm(saved)
    with pytest.raises(ValueError, match=re.escape(str(saved / file))):
        NullSpaces.load(saved)
    # It was the damage, and nothing else.
    if (saved / file).is_dir():
        (saved / file).rmdir()
    (saved / file).write_bytes(before)
    assert len(NullSpaces.load(saved)) == 21


def test_an_altered_number_in_the_manifest_is_noticed(saved: Path) -> None:
    path = saved / "nullspace.json"
    text = path.read_text()
    assert text.count('"tokens": 4096') == 12
    path.write_text(text.replace('"tokens": 4096', '"tokens": 4097', 1))
    with pytest.raises(ValueError, match=r"nullspace\.json was altered"):
        NullSpaces.load(saved)


def test_a_later_format_is_refused_saying_which(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FORMAT_VERSION", records.FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=r"nullspace\.json has format version 1; this nullspace reads 2"):
        NullSpaces.load(saved)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        NullSpaces.load(tmp_path / "nowhere")


# ---- digests that fit, and content that does not


def forged(saved: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Change the manifest and the first site's tensors, and let all digests fit again."""
    body = json.loads((saved / MANIFEST).read_text())
    tensors = load_file(saved / FIRST)
    change(body, tensors)
    save_file(tensors, saved / FIRST)
    if FIRST in body["files"]:
        body["files"][FIRST] = records.looks_of(saved, [FIRST])[FIRST]
    del body["digest"]
    (saved / MANIFEST).write_text(records.sealed(body))


def site_says(**facts: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]:
    return lambda body, tensors: body["sites"][0].update(facts)


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda body, tensors: tensors.update({name: change(tensors[name]).contiguous()})


FORGED: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "a path": (site_says(file="../../x"), "'file' should be the plain name of a file, not '../../x'"),
    "an absolute path": (site_says(file="/etc/passwd"), "'file' should be the plain name"),
    "a path of Windows": (site_says(file="..\\x"), "'file' should be the plain name"),
    "paths among the files": (
        lambda b, t: b["files"].update({"a/b": {"bytes": 1, "sha256": ""}}),
        "'a/b' in 'files' is not the plain",
    ),
    "a file for two sites": (lambda b, t: b["sites"][1].update(file=FIRST), "is the file of site 0 already"),
    "a width without limits": (site_says(d_in=300000), "is not of a layer with inputs of width 300000"),
    "a width of its own": (site_says(d_in=300000, weight_shapes={}), r"'basis' should be \(300000, 8\)"),
    "a rank without limits": (site_says(rank=10**12), r"'basis' should be \(48, 1000000000000\)"),
    "a boolean rank": (site_says(rank=True), "'rank' should be an integer"),
    "a huge number": (site_says(tokens=10**30), "'tokens' should be an integer between"),
    "a number that is none": (site_says(trace=float("nan")), "'trace' should be a finite number"),
    "an integer beyond all floats": (site_says(trace=10**400), "'trace' should be a finite number"),
    "a number as text": (site_says(trace="1.0"), "'trace' should be a finite number"),
    "a gap beyond 1": (site_says(gap=2.0), "'gap' should be a finite number between"),
    "an unknown precision": (site_says(precision="banana"), "'precision' should be one of"),
    "a member twice": (site_says(members=["a", "a"]), "'members' should be a list of at least 1 distinct"),
    "a member of two sites": (
        lambda b, t: b["sites"][1].update(members=b["sites"][0]["members"], weight_shapes={}),
        "belongs to site 0",
    ),
    "a fact that is missing": (lambda b, t: b["sites"][0].pop("nullity"), "'nullity' is missing"),
    "sites that are none": (lambda b, t: b.update(sites="none"), "'sites' should be a list"),
    "NaN in the basis": (
        with_tensor("basis", lambda u: u.index_fill(0, torch.tensor([3]), float("nan"))),
        "'basis' holds NaN or Inf",
    ),
    "a basis that is not orthonormal": (with_tensor("basis", lambda u: u * 1.001), "not orthonormal: they are off by 2.0e-03"),
    "a basis twice the same": (with_tensor("basis", lambda u: u[:, [0, 0, 2, 3, 4, 5, 6, 7]]), "not orthonormal"),
    "a basis of another dtype": (
        with_tensor("basis", torch.Tensor.float),
        r"'basis' should be \(48, 8\) torch.float64, not .*float32",
    ),
    "a basis of another shape": (with_tensor("basis", lambda u: u.T), r"'basis' should be \(48, 8\) torch.float64, not \(8, 48\)"),
    "no basis": (lambda b, t: t.pop("basis"), "'basis' is missing"),
    "eigenvalues that descend": (with_tensor("eigenvalues", lambda v: v.flip(0)), "should ascend"),
    "eigenvalues below zero": (with_tensor("eigenvalues", lambda v: v - 1e9), "should ascend from 0"),
    "eigenvalues beyond the trace": (with_tensor("eigenvalues", lambda v: v + 1e9), "should not exceed the trace"),
    "NaN in the eigenvalues": (with_tensor("eigenvalues", lambda v: v * float("nan")), "'eigenvalues' holds NaN"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_content_that_no_run_can_have_written_is_refused_though_its_digests_fit(saved: Path, forgery: str) -> None:
    change, words = FORGED[forgery]
    forged(saved, change)
    with pytest.raises(ValueError, match=words) as error:
        for _ in NullSpaces.load(saved).values():
            pass
    assert str(saved) in str(error.value)


def test_a_site_whose_name_looks_like_markup_is_shown_as_it_is(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["[bold]x", "[/]", "[link=file:///]y", "\x1b[2J", "a\nb"]
    for index, name in enumerate(names):
        forged(saved, lambda b, t, i=index, n=name: b["sites"][i].update(members=[n], weight_shapes={}))
    spaces = NullSpaces.load(saved)
    assert [site.name for site in spaces.sites[: len(names)]] == names
    done = CliRunner().invoke(app, ["inspect", str(saved)])
    assert done.exit_code == 0, done.output
    for shown in ("[bold]x", "[/]", "[link=file:///]y", "\\x1b[2J", "a\\nb"):
        assert shown in done.output
        assert shown in spaces.summary()
    assert "\x1b" not in done.output + spaces.summary()


@pytest.mark.parametrize("harm", ["pipe", "deep", "surrogate", "twice", "digits", "byte order mark"])
def test_manifests_that_break_readers_are_refused_by_name(saved: Path, harm: str) -> None:
    path = saved / MANIFEST
    text = path.read_text()
    path.unlink()
    if harm == "pipe":
        os.mkfifo(path)
    else:
        more = {"deep": "[" * 10**5, "surrogate": '"\\ud800"', "twice": '1, "kind": "spaces"', "digits": "9" * 5000}
        path.write_text("\ufeff" + text if harm == "byte order mark" else text.replace("{", '{"x": ' + more[harm] + ",", 1))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        NullSpaces.load(saved)
    assert records.kind_of(saved) is None


# ---- another model


@pytest.fixture(params=["computed", "loaded"])
def spaces(request: pytest.FixtureRequest, tmp_path: Path) -> NullSpaces:
    computed = calibrated("llama")
    if request.param == "computed":
        return computed
    computed.save(tmp_path / "spaces")
    return NullSpaces.load(tmp_path / "spaces")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_copies_of_the_model_in_any_dtype_are_known_again(spaces: NullSpaces, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny("llama")).to(dtype)
    for name, module in find_targets(model).items():
        spaces.check(name, module)


def test_other_weights_are_refused_showing_both(spaces: NullSpaces) -> None:
    mine, other = tiny("llama"), tiny("llama", seed=1)
    for name, module in find_targets(other).items():
        shown = [f"{m.get_submodule(name).weight[0, 0].item():.4g}" for m in (other, mine)]
        with pytest.raises(ValueError, match=f"{re.escape(repr(name))} begins with .*{shown[0]}.* here and with .*{shown[1]}"):
            spaces.check(name, module)


def test_another_layer_of_the_same_shape_is_refused(spaces: NullSpaces) -> None:
    layers = tiny("llama").model.layers
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_proj' begins with"):
        spaces.check("model.layers.0.mlp.up_proj", layers[1].mlp.up_proj)


@pytest.mark.parametrize("shape", [(48, 16), (16, 47), (24, 48)])
def test_another_shape_is_refused_showing_both(spaces: NullSpaces, shape: tuple[int, int]) -> None:
    d_out, d_in = shape
    message = rf"'model\.layers\.0\.self_attn\.k_proj' has weight \({d_out}, {d_in}\) here and had \(16, 48\)"
    with pytest.raises(ValueError, match=message):
        spaces.check("model.layers.0.self_attn.k_proj", nn.Linear(d_in, d_out))


def test_an_unknown_layer_is_refused_naming_it_and_some_that_are_known(spaces: NullSpaces) -> None:
    with pytest.raises(ValueError, match=r"no null space for 'lm_head'; .*model\.layers\.0\.self_attn\.q_proj.*21 layers"):
        spaces.check("lm_head", tiny("llama").lm_head)


def test_spaces_without_fingerprints_are_checked_by_their_width() -> None:
    space = calibrated("llama")["model.layers.0.mlp.up_proj"]
    bare = NullSpaces([NullSpace(**{**vars(space), "site": Site(("up",), 48)})])
    bare.check("up", nn.Linear(48, 5))
    with pytest.raises(ValueError, match=r"'up' has weight \(5, 47\) here and had \(5, 48\)"):
        bare.check("up", nn.Linear(47, 5))


def test_a_weight_whose_values_are_not_at_hand_is_checked_by_its_shape(spaces: NullSpaces) -> None:
    name = "model.layers.0.mlp.up_proj"
    spaces.check(name, nn.Linear(48, 112, device="meta"))
    with pytest.raises(ValueError, match=r"\(111, 48\) here and had \(112, 48\)"):
        spaces.check(name, nn.Linear(48, 111, device="meta"))


# ---- when the fast sum is not enough


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site takes float32 chains to be enough, without regard to its first tokens."""
    monkeypatch.setattr(sums_torch, "PROBE_LIMIT", float("inf"))


def test_the_first_tokens_show_which_sites_need_float64() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one pass is enough: nothing is left to warn about
        spaces = compute_null_spaces(tiny("bert"), iter(batches_of("bert")), rank=RANK, progress=False)
    assert {spaces[name].precision for name in spaces if "attention.output" in name} == {"fp64"}
    assert "mixed" in {space.precision for space in spaces.values()}


def test_sites_that_rounding_may_have_spoilt_are_summed_again_in_float64_and_no_others(no_probe: None) -> None:
    first = compute_null_spaces(tiny("bert"), batches_of("bert"), rank=RANK, progress=False, tolerance=float("inf"))
    steep = {name for name, space in first.items() if space.excess_estimate > TOLERANCE}
    assert steep
    assert steep < set(first)
    spaces = compute_null_spaces(tiny("bert"), batches_of("bert"), rank=RANK, progress=False)
    assert {name for name, space in spaces.items() if space.precision == "fp64"} == steep
    assert all(space.excess_estimate <= TOLERANCE for space in spaces.values())
    for name, space in spaces.items():
        assert (space.site, space.tokens) == (first[name].site, first[name].tokens)
        assert excess_leak(space.basis, inputs_of("bert")[name]) <= TOLERANCE
    # The first pass alone is what the second one is for.
    assert max(excess_leak(first[name].basis, inputs_of("bert")[name]) for name in steep) > TOLERANCE


def test_a_loader_that_can_be_read_only_once_is_warned_about_with_the_sites(no_probe: None) -> None:
    with pytest.warns(UserWarning, match=r"attention\.output\.dense.*precision='fp64'"):
        spaces = compute_null_spaces(tiny("bert"), iter(batches_of("bert")), rank=RANK, progress=False)
    assert {space.precision for space in spaces.values()} == {"mixed"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_excess_is_never_far_above_its_estimate(family: str, no_probe: None) -> None:
    spaces = compute_null_spaces(tiny(family), batches_of(family), rank=RANK, progress=False, tolerance=float("inf"))
    for name, x in inputs_of(family).items():
        assert excess_leak(spaces[name].basis, x) <= 3 * spaces[name].excess_estimate + 1e-9, name


@pytest.mark.parametrize("precision", ["auto", "fp64", "qr"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_excess_is_never_above_its_bound(family: str, precision: str, no_probe: None) -> None:
    spaces = compute_null_spaces(
        tiny(family), batches_of(family), rank=RANK, precision=precision, progress=False, tolerance=float("inf")
    )
    for name, x in inputs_of(family).items():
        assert excess_leak(spaces[name].basis, x) <= spaces[name].excess_bound + 1e-9, name


class Echo(nn.Module):
    """Two layers that get the loader's tensor; the second without its massive tokens."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.massive, self.plain = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.massive(x) + self.plain(x / x.norm(dim=1, keepdim=True).clamp(min=30.0))


@pytest.mark.parametrize(("scale", "precision"), [(1e3, "mixed"), (1e6, "qr")])
def test_auto_goes_on_to_qr_where_float64_is_short(scale: float, precision: str) -> None:
    x = activations(4096, 96, quietest=1e-3, massive=scale)
    loader = list(x.split(512))
    spaces = compute_null_spaces(Echo(96), loader, rank=RANK, progress=False)
    assert spaces["massive"].precision in {"mixed": ("mixed", "fp64"), "qr": ("qr",)}[precision]
    assert spaces["plain"].precision != "qr"
    assert all(space.excess_estimate <= TOLERANCE for space in spaces.values())
    assert excess_leak(spaces["massive"].basis, x) <= 1e-3
    if precision == "qr":  # and it had to
        spaces = compute_null_spaces(Echo(96), loader, rank=RANK, precision="fp64", progress=False)
        assert spaces["massive"].excess_estimate > TOLERANCE


@pytest.mark.parametrize("scale", [1e3, 1e4, 1e5, 1e6, 3e6])
@pytest.mark.parametrize(("d", "quietest"), [(96, 1e-3), (256, 1e-2)])
@pytest.mark.parametrize("precision", ["auto", "fp64", "qr"])
def test_the_excess_under_massive_tokens_is_known(precision: str, d: int, quietest: float, scale: float) -> None:
    x = activations(4096, d, quietest=quietest, massive=scale)
    covariance = Covariance(d, precision=precision)
    covariance.update(x)
    space = NullSpace.from_covariance(covariance, RANK)
    excess = excess_leak(space.basis, x)
    assert excess <= 3 * space.excess_estimate + 1e-9
    assert excess <= space.excess_bound + 1e-9


def test_a_precision_can_be_chosen_layer_by_layer() -> None:
    x = activations(1024, 96, quietest=1e-1)
    chosen = {"mass.*": "qr", ".*": "fp64"}
    spaces = compute_null_spaces(Echo(96), list(x.split(512)), rank=RANK, precision=chosen, progress=False)
    assert (spaces["massive"].precision, spaces["plain"].precision) == ("qr", "fp64")
    spaces = compute_null_spaces(Echo(96), list(x.split(512)), rank=RANK, precision={"plain": "qr"}, progress=False)
    assert (spaces["massive"].precision, spaces["plain"].precision) == ("mixed", "qr")
    with pytest.raises(ValueError, match="precision must be one of 'auto', 'mixed', 'fp64', 'qr', not 'fp32'"):
        compute_null_spaces(Echo(96), [x], rank=RANK, precision={"plain": "fp32"}, progress=False)


@pytest.mark.parametrize("precision", ["fp64", "qr"])
@pytest.mark.parametrize(("tokens", "nullity"), [(600, 0), (30, 34), (64, 0)])
def test_the_numerical_nullity_is_what_the_tokens_leave(tokens: int, nullity: int, precision: str) -> None:
    covariance = Covariance(64, precision=precision)
    covariance.update(activations(tokens, 64, quietest=1e-1))
    assert NullSpace.from_covariance(covariance, RANK).nullity == nullity


def test_large_layers_are_solved_by_shift_invert_to_the_same_space(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(3000, 320, quietest=1e-2)
    covariance = Covariance(320, precision="fp64")
    covariance.update(x)
    every = NullSpace.from_covariance(covariance, 8)
    monkeypatch.setattr(cost, "INVERT_MIN_D", 300)
    found = NullSpace.from_covariance(covariance, 8)
    assert found.leak == pytest.approx(every.leak, rel=1e-9)
    assert found.gap == pytest.approx(every.gap, abs=1e-9)
    assert every.excess_estimate <= found.excess_estimate <= 100 * every.excess_estimate + 1e-15
    assert NullSpace.from_covariance(covariance, 8, spectrum=True).effective_rank is not None


def test_outlier_tokens_do_not_call_for_a_second_pass() -> None:
    x = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    x[::64] *= 1e3
    covariance = Covariance(64)
    covariance.update(x)
    assert covariance.outliers == 32
    assert NullSpace.from_covariance(covariance, RANK).excess_estimate < 1e-9


def test_bases_made_in_inference_mode_are_ordinary_tensors() -> None:
    with torch.inference_mode():
        spaces = compute_null_spaces(tiny("gpt2"), batches_of("gpt2"), rank=RANK, progress=False)
    assert not any(space.basis.is_inference() or space.eigenvalues.is_inference() for space in spaces.values())


# ---- directions that are taken


def rows_of(m: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complement(rows: torch.Tensor) -> torch.Tensor:
    """(d, d − rank) orthonormal columns of what the rows do not span, by NumPy."""
    _, sigma, vt = np.linalg.svd(rows.double().numpy())
    return torch.from_numpy(vt[int((sigma > 1e-10 * max(sigma.max(), 1e-300)).sum()) :].T.copy())


def assert_smallest_beside(space: NullSpace, rows: torch.Tensor, x: torch.Tensor, *, digits: float = 1e-9) -> None:
    """Orthonormal, orthogonal to the rows, with the leak of the bottom of NᵀCN, N spanning all that is left."""
    basis = space.basis
    assert float((basis.T @ basis - torch.eye(space.rank)).abs().max()) <= 1e-12
    assert float((rows.double() @ basis).norm()) <= 1e-12 * float(rows.double().norm())
    n = complement(rows)
    assert space.avoided == len(n) - n.shape[1]
    sigma = torch.linalg.svdvals(x.double() @ n).flip(0)
    best, total = sigma[: space.rank].square(), float(x.double().square().sum())
    assert float((x.double() @ basis).square().sum()) <= float(best.sum()) * (1 + digits) + 1e-15 * total
    torch.testing.assert_close(space.eigenvalues, best, rtol=digits, atol=1e-14 * total)
    assert space.gap == pytest.approx(1 - float(best[-1] / sigma[space.rank] ** 2), abs=1e-6)


@pytest.mark.parametrize("precision", ["fp64", "qr"])
@pytest.mark.parametrize("quietest", [1e-1, 1e-3])
@pytest.mark.parametrize(("d", "m", "rank"), [(40, 1, 4), (40, 30, 4), (40, 35, 4), (40, 12, 27), (200, 40, 8), (3, 1, 1)])
def test_what_is_avoided_is_left_alone_by_the_smallest_basis_that_can(
    d: int, m: int, rank: int, quietest: float, precision: str
) -> None:
    x = activations(900, d, quietest=quietest)
    covariance = Covariance(d, precision=precision)
    covariance.update(x)
    rows = rows_of(m, d)
    taken = torch.linalg.qr(rows.T).Q
    assert_smallest_beside(NullSpace.from_covariance(covariance, rank, avoid=taken), rows, x)
    for limit in (d - m, d):
        with pytest.raises(ValueError, match=rf"rank must be between 1 and .* = {d - m - 1} \({m} avoided\), not {limit}"):
            NullSpace.from_covariance(covariance, limit, avoid=taken)


@pytest.mark.parametrize("precision", ["fp64", "qr"])
def test_even_the_smallest_directions_can_be_avoided(precision: str) -> None:
    """As they are after a first adapter: the next one takes those behind."""
    x = activations(900, 60, quietest=1e-2)
    covariance = Covariance(60, precision=precision)
    covariance.update(x)
    both = NullSpace.from_covariance(covariance, 12)
    second = NullSpace.from_covariance(covariance, 6, avoid=both.basis[:, :6])
    assert_smallest_beside(second, both.basis[:, :6].T, x)
    torch.testing.assert_close(second.eigenvalues, both.eigenvalues[6:], rtol=1e-9, atol=0)


@pytest.mark.parametrize("precision", ["fp64", "qr"])
def test_what_is_avoided_stays_so_where_nothing_was_heard(precision: str) -> None:
    covariance = Covariance(12, precision=precision)
    covariance.update(torch.zeros(30, 12))
    rows = rows_of(5, 12)
    space = NullSpace.from_covariance(covariance, 4, avoid=torch.linalg.qr(rows.T).Q)
    assert float((rows @ space.basis).norm()) <= 1e-12
    assert (space.leak, space.avoided) == (0.0, 5)


@pytest.mark.parametrize("precision", ["fp64", "qr"])
@pytest.mark.parametrize("tokens", [20, 900])
def test_the_effective_rank_is_that_of_the_input_whatever_is_avoided(precision: str, tokens: int) -> None:
    covariance = Covariance(60, precision=precision)
    covariance.update(activations(tokens, 60, quietest=1e-2))
    plain = NullSpace.from_covariance(covariance, 6, spectrum=True)
    taken = torch.linalg.qr(rows_of(20, 60).T).Q
    space = NullSpace.from_covariance(covariance, 6, spectrum=True, avoid=taken)
    # √λ of what is zero is √ of rounding.
    assert space.effective_rank == pytest.approx(plain.effective_rank, rel=1e-10 if tokens > 60 else 1e-5)
    assert (space.trace, space.tokens) == (plain.trace, plain.tokens)
    assert NullSpace.from_covariance(covariance, 6, avoid=taken).effective_rank is None


def members_of_the_first_site() -> tuple[str, ...]:
    return calibrated("llama").sites[0].members


@functools.cache
def avoiding() -> dict[str, torch.Tensor]:
    """Rows of their own for q, k and v, which share one input; of another kind each; and some for a layer with its own input."""
    q, k, v = members_of_the_first_site()
    repeated = rows_of(3, 48, seed=1).float()
    return {
        q: rows_of(4, 48),
        k: torch.cat([repeated, 2 * repeated, torch.zeros(2, 48)]),
        v: nn.Parameter(rows_of(2, 48, seed=2).bfloat16()),
        "model.layers.1.mlp.down_proj": rows_of(60, 112, seed=3),
        "model.layers.2.mlp.down_proj": torch.zeros(0, 112),
        "model.layers.2.mlp.up_proj": torch.zeros(3, 48),
    }


@functools.cache
def spaces_that_avoid(precision: str = "fp64", strategy: str = "resident") -> NullSpaces:
    options: dict[str, Any] = {"rank": RANK, "precision": precision, "strategy": strategy, "progress": False}
    return compute_null_spaces(tiny("llama"), batches_of("llama"), avoid=avoiding(), **options)


@pytest.mark.parametrize("precision", ["auto", "fp64", "qr"])
def test_a_site_avoids_what_any_of_its_members_must(precision: str) -> None:
    spaces, plain = spaces_that_avoid(precision), calibrated("llama", precision)
    members = members_of_the_first_site()
    rows = torch.cat([avoiding()[name].detach().double() for name in members])
    digits = 1e-3 if precision == "auto" else 1e-7
    for name, avoided in ((members[0], rows), ("model.layers.1.mlp.down_proj", avoiding()["model.layers.1.mlp.down_proj"])):
        assert_smallest_beside(spaces[name], avoided, inputs_of("llama")[name], digits=digits)
    assert [spaces[name].avoided for name in members] == [4 + 3 + 2] * 3
    for site in spaces.sites:  # the others are what they were
        if not set(site.members) & {*members, "model.layers.1.mlp.down_proj"}:
            assert spaces[site.name].avoided == 0
            assert torch.equal(spaces[site.name].basis, plain[site.name].basis)


def test_kept_sums_avoid_the_same(tmp_path: Path) -> None:
    kept = compute_covariances(tiny("llama"), batches_of("llama"), tmp_path / "run", progress=False)
    spaces = NullSpaces.from_covariances(kept, rank=RANK, avoid=avoiding(), progress=False)
    for name, space in spaces_that_avoid().items():
        assert spaces[name].facts() == {**space.facts(), "excess_estimate": spaces[name].excess_estimate}
        torch.testing.assert_close(spaces[name].basis, space.basis, rtol=0, atol=1e-9)


def test_what_was_avoided_is_kept_and_old_directories_have_nothing_of_it(tmp_path: Path) -> None:
    spaces = spaces_that_avoid()
    spaces.save(tmp_path / "spaces")
    found = NullSpaces.load(tmp_path / "spaces")
    for site in spaces.sites:
        assert found[site.name].facts() == spaces[site.name].facts()
        assert torch.equal(found[site.name].basis, spaces[site.name].basis)
        again = NullSpace.from_facts(json.loads(json.dumps(spaces[site.name].facts())), vars(spaces[site.name]))
        assert again.facts() == spaces[site.name].facts()
    # As they were written before there was anything to avoid.
    manifest = records.read_manifest(tmp_path / "spaces", "spaces")
    sites = [{key: value for key, value in entry.items() if key != "excluded"} for entry in manifest["sites"]]
    records.write_manifest(tmp_path / "spaces", "spaces", {"sites": sites}, tuple(manifest["files"]))
    old = NullSpaces.load(tmp_path / "spaces")
    assert {space.avoided for space in old.values()} == {0}
    for site in spaces.sites:
        assert {**old[site.name].facts(), "excluded": spaces[site.name].avoided} == spaces[site.name].facts()
        assert torch.equal(old[site.name].basis, spaces[site.name].basis)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("avoid", "message"),
    [
        ({"lm_head": rows_of(2, 48)}, "avoid: 'lm_head' is none of the layers; their names are like 'model"),
        ({"up_proj": rows_of(2, 48)}, "avoid: 'up_proj' is none of the layers"),
        ({UP: rows_of(2, 47)}, r"avoid: '.*up_proj' has inputs of width 48, and its rows are \(2, 47\)"),
        ({UP: rows_of(48, 2)}, r"avoid: '.*up_proj' has inputs of width 48, and its rows are \(48, 2\)"),
        ({UP: rows_of(2, 48)[0]}, r"avoid: '.*up_proj' needs a finite floating-point matrix \(m, d_in\), not \(48,\)"),
        ({UP: torch.ones(2, 48, dtype=torch.long)}, "floating-point matrix .*int64"),
        ({UP: torch.full((2, 48), float("nan"))}, "avoid: '.*up_proj' needs a finite"),
        ({UP: torch.full((2, 48), float("inf"))}, "avoid: '.*up_proj' needs a finite"),
        ({UP: rows_of(40, 48)}, r"between 1 and 7 at '.*up_proj' \(d_in = 48, 40 directions of which are avoided\), not 8"),
        ({UP: rows_of(100, 48)}, r"between 1 and -1 at '.*up_proj' \(d_in = 48, 48 directions of which are avoided\), not 8"),
    ],
)
def test_what_cannot_be_avoided_is_refused_before_the_loader_is_touched(avoid: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_null_spaces(tiny("llama"), Untouchable(), rank=RANK, avoid=avoid)


def test_rows_that_leave_just_enough_are_not_refused() -> None:
    spaces = compute_null_spaces(
        tiny("llama"), batches_of("gpt2"), rank=RANK, targets=[UP], avoid={UP: rows_of(39, 48)}, progress=False
    )
    assert (spaces[UP].rank, spaces[UP].avoided) == (8, 39)


def test_members_that_leave_too_little_between_them_are_named() -> None:
    """Each would do alone; that they share one input is seen only when the model runs."""
    q, k, _ = members_of_the_first_site()
    avoid = {q: rows_of(22, 48), k: rows_of(22, 48, seed=1)}
    message = rf"between 1 and d_in - 45 = 3 at '{re.escape(q)}' \(44 avoided\), not 8"
    with pytest.raises(ValueError, match=message):
        compute_null_spaces(tiny("llama"), batches_of("gpt2"), rank=RANK, avoid=avoid, progress=False)
