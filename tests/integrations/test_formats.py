"""Files and tensors for MEMIT, AlphaEdit and GPTQ, against what these compute from the inputs themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import covariances_for, spaces_for

from models import random_batches, tiny
from nullspace import Covariance, Covariances, Site
from nullspace.integrations.formats import hessians, write_memit, write_projectors
from reference import recorded_inputs

EDITED = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}


def edited(family: str) -> list[str]:
    """The layers that are edited, in an order that is not the model's."""
    return [EDITED[family].format(number) for number in (1, 0)]


@pytest.fixture(scope="module", params=EDITED)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def inputs(family: str) -> dict[str, torch.Tensor]:
    """Layer → (tokens, d_in) float32, as the model gives them."""
    return recorded_inputs(tiny(family), random_batches(), list(covariances_for(family)))


def one(matrix: torch.Tensor, tokens: int = 8, name: str = "down") -> Covariances:
    return Covariances([(Site((name,), len(matrix)), Covariance.from_matrix(matrix, tokens=tokens))])


# ------------------------------------------------------------------------------------------------ MEMIT


def test_memits_file_has_the_sums_of_the_inputs_under_the_names_that_its_reader_asks_for(
    family: str, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    files = write_memit(covariances_for(family), tmp_path / "stats", model="a_b", layers=edited(family), samples=1234)
    folder = tmp_path / "stats" / "a_b" / "wikipedia_stats"
    assert files == [folder / f"{name}_float32_mom2_1234.npz" for name in edited(family)]
    for name, file in zip(edited(family), files, strict=True):
        with np.load(file) as saved:  # as theirs: without pickles
            assert set(saved.files) == {"mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"}
            # What their loader compares, and what `SecondMoment.load_state_dict` takes.
            assert saved["sample_size"] == 1234
            assert (str(saved["mom2.constructor"]), int(saved["mom2.count"])) == (
                "util.runningstats.SecondMoment()",
                len(inputs[name]),
            )
            mom2 = torch.from_numpy(saved["mom2.mom2"])
        assert mom2.dtype == torch.float32
        rows = inputs[name].double()
        assert float((mom2 - rows.T @ rows).norm()) <= 1e-6 * float(mom2.norm())
    assert not list(folder.glob("*.part"))


def test_weighted_tokens_keep_their_mean(tmp_path: Path) -> None:
    weighted = one(torch.eye(3, dtype=torch.float64), tokens=4)
    weighted["down"].scale(5.0)
    [file] = write_memit(weighted, tmp_path, model="m", layers=["down"])
    with np.load(file) as saved:
        assert np.allclose(saved["mom2.mom2"] / int(saved["mom2.count"]), np.eye(3) / 4)


def test_a_file_is_replaced_on_request_only(tmp_path: Path) -> None:
    moments, options = one(torch.eye(3)), {"model": "m", "layers": ["down"]}
    [file] = write_memit(moments, tmp_path, **options)  # type: ignore[arg-type]
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        write_memit(moments, tmp_path, **options)  # type: ignore[arg-type]
    assert file.read_bytes() == before
    write_memit(one(2 * torch.eye(3)), tmp_path, **options, overwrite=True)  # type: ignore[arg-type]
    assert file.read_bytes() != before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ["up"]}, "no covariance for 'up'"),
        ({"layers": "down"}, "list of names"),
        ({"layers": []}, "list of names"),
        ({"layers": ["down", "down"]}, "named twice"),
        ({"model": "a/b"}, "cannot be 'a/b'"),
        ({"dataset": ""}, "cannot be ''"),
        ({"samples": 0}, "samples"),
        ({"samples": 1.5}, "samples"),
    ],
    ids=str,
)
def test_what_memit_would_not_find_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        write_memit(one(torch.eye(3)), tmp_path / "stats", **{"model": "m", "layers": ["down"], **options})
    assert not (tmp_path / "stats").exists()


# ------------------------------------------------------------------------------------------------ AlphaEdit


def test_the_projectors_are_those_of_the_papers_code(family: str, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    means = [inputs[name].T @ inputs[name] / len(inputs[name]) for name in edited(family)]
    of_first = torch.linalg.svdvals(means[0])
    middle = of_first[len(of_first) // 4 : -len(of_first) // 4]
    gap = int((middle[:-1] / middle[1:]).argmax())
    threshold, wanted = float(middle[gap : gap + 2].mean()), []
    for mean in means:
        u, s, _ = torch.linalg.svd(mean, full_matrices=False)
        few = u[:, s < threshold]
        wanted.append(few @ few.T)
    out = tmp_path / "null_space_project.pt"
    count = write_projectors(covariances_for(family), out, layers=edited(family), threshold=threshold)
    saved = torch.load(out)  # by PyTorch's default without other objects than tensors
    assert saved.shape == (2, *wanted[0].shape)
    assert saved.dtype == torch.float32
    assert all(0 < each < len(wanted[0]) for each in count)
    assert count == [round(float(p.trace())) for p in wanted]
    assert float((saved - torch.stack(wanted)).norm()) <= 1e-3 * float(saved.norm())


def test_null_spaces_give_as_many_directions_as_their_rank(tmp_path: Path) -> None:
    spaces = spaces_for("llama")
    layers = edited("llama")
    assert write_projectors(spaces, tmp_path / "p.pt", layers=layers) == [spaces[name].rank for name in layers]
    for p, name in zip(torch.load(tmp_path / "p.pt"), layers, strict=True):
        assert torch.allclose(p.double() @ spaces[name].basis, spaces[name].basis, atol=1e-6)
    with pytest.raises(ValueError, match="leave threshold out"):
        write_projectors(spaces, tmp_path / "q.pt", layers=layers, threshold=0.1)


def test_a_threshold_that_chooses_nothing_or_everything_is_said(tmp_path: Path) -> None:
    for number, (threshold, count) in enumerate([(1e-9, 0), (1e9, 3)]):
        with pytest.warns(UserWarning, match=rf"'down' \({count} of 3\)"):
            assert write_projectors(one(torch.eye(3)), tmp_path / f"{number}.pt", layers=["down"], threshold=threshold) == [count]


def test_layers_of_two_widths_and_files_that_exist_are_refused(tmp_path: Path) -> None:
    names, out = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"], tmp_path / "p.pt"
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.o_proj' has 48 inputs"):
        write_projectors(covariances_for("llama"), out, layers=names)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(FileExistsError):
        write_projectors(covariances_for("llama"), out, layers=names[:1])
    assert out.read_text() == "mine"


# ------------------------------------------------------------------------------------------------ GPTQ


def test_hessians_are_what_a_running_mean_over_batches_gives(family: str) -> None:
    model, batches = tiny(family), random_batches()
    per_batch = [recorded_inputs(model, [batch], list(covariances_for(family))) for batch in batches]
    for name, hessian in hessians(covariances_for(family)):
        running, seen = torch.zeros_like(hessian), 0
        for x in (each[name] for each in per_batch):  # GPTQ's `add_batch`, in float32
            running *= seen / (seen + len(x))
            seen += len(x)
            scaled = math.sqrt(2 / seen) * x
            running += scaled.T @ scaled
        assert (hessian.dtype, hessian.shape) == (torch.float32, running.shape)
        assert float((hessian - running).norm()) <= 1e-5 * float(running.norm()), name
        hessian.zero_()  # as quantisation may do: the next layer of the same input has its own
    assert all(bool(hessian.any()) for _, hessian in hessians(covariances_for(family)))


def test_a_layer_that_no_token_has_reached_is_named(tmp_path: Path) -> None:
    empty = Covariances([(Site(("down",), 3), Covariance(3))])
    for use in (
        lambda: dict(hessians(empty)),
        lambda: write_memit(empty, tmp_path, model="m", layers=["down"]),
        lambda: write_projectors(empty, tmp_path / "p", layers=["down"]),
    ):
        with pytest.raises(ValueError, match="no token has reached 'down'"):
            use()
    assert not list(tmp_path.rglob("*.*"))
