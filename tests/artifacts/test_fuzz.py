"""Thousands of damaged and forged files of every kind that is read: each is refused by name, or read for what it is.

A mutation is drawn from its number alone, so that one that fails can be run by itself. By default there are a few hundred, in this
process; `NULLSPACE_MUTATIONS=10000` asks for more, in processes of their own, so that one that dies is noticed too:

    NULLSPACE_MUTATIONS=10000 python -m pytest tests/artifacts/test_fuzz.py
    python tests/artifacts/test_fuzz.py 1234 1235     # those from 1234 on, up to 1235
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from nullspace import Covariances, NullSpaces, compute_covariances, compute_null_spaces, tables
from nullspace.artifacts import records
from nullspace.cli import console
from nullspace.integrations.peft import files
from nullspace.integrations.peft.corda import files as corda_files
from nullspace.integrations.transformers import load_rows, load_texts, read_config
from nullspace.reporting import study as fronts

COUNT = int(os.environ.get("NULLSPACE_MUTATIONS", "300"))
SECONDS = 20  # that one mutation may take: a thousand times what it does
Value = Any


class Blocks(nn.Module):
    """Two layers that share an input, and one of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.up = nn.Linear(7, 5, bias=False), nn.Linear(7, 6, bias=False), nn.Linear(5, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.up(self.q(x)) + self.k(x).mean()
        return out


@functools.cache
def model() -> nn.Module:
    torch.manual_seed(3)
    return Blocks()


@functools.cache
def loader() -> list[torch.Tensor]:
    return [torch.randn(2, 20, 7, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def compute(checkpoint: Path | None) -> NullSpaces:
    return compute_null_spaces(model(), loader(), rank=2, strategy="resident", checkpoint=checkpoint, progress=False)


# ---- the kinds of files


class Kind(NamedTuple):
    make: Callable[[Path], object]
    """Writes the files into a directory that is there."""
    read: Callable[[Path], Value]
    """Reads them, and makes of them what can be compared."""
    has_digests: bool = True
    """Whether any change of a file must be noticed, if its digest was not renewed."""
    check: Callable[[Value], object] = lambda value: None
    """Fails for a value that no file may give."""


def spaces_of(found: NullSpaces) -> Value:
    value = []
    for site in found.sites:
        space = found[site.name]
        weights = {
            name: (shape, None if mark is None else mark.tolist()) for name, (shape, mark) in found._of[site.name].weights().items()
        }
        value.append((space.facts(), space.basis.tolist(), space.eigenvalues.tolist(), space.leak, weights))
    shown_in_full(found.rows(), tables.cells)
    return value


def shown_in_full(rows: list[dict[str, Any]], cells: Callable[[Any], dict[str, str]]) -> None:
    """Names in files are no markup: a table shows them as they are."""
    if not rows:
        return
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "stdout", Console(file=out, width=10**4))
        console.print_table([cells(row) for row in rows])
    for row in rows:
        if row["site"].isprintable() and row["site"].isascii() and len(row["site"]) < 200:
            assert row["site"] in out.getvalue(), "a name vanished from the table"


def check_spaces(value: Value) -> None:
    for facts, basis, eigenvalues, leak, _ in value:
        u = numpy.array(basis)
        assert u.shape == (facts["d_in"], facts["rank"])
        assert numpy.abs(u.T @ u - numpy.eye(facts["rank"])).max() < 1e-6
        assert 0 <= leak <= 1 + 1e-6
        assert all(a <= b + 1e-6 * facts["trace"] for a, b in itertools.pairwise(eigenvalues))
        assert min(eigenvalues) >= 0
        numbers = [facts[name] for name in ("tokens", "trace", "outliers", "nullity", "excess_estimate", "excess_bound")]
        assert all(math.isfinite(number) and number > -1e-6 for number in numbers)
    names = [name for facts, *_ in value for name in facts["members"]]
    assert len(set(names)) == len(names)


def read_covariances(folder: Path) -> Value:
    found = Covariances.load(folder / "run", partial=True)
    value = []
    for site in found.sites:
        c = found[site.name]
        value.append(
            (site, c.matrix().tolist(), c.mean().tolist(), c.tokens, c.mass, c.trace, c.outliers, c.products, c.error_norm)
        )
        found._of[site.name].weights()
    shown_in_full(found.rows(), tables.covariance_cells)
    derived = NullSpaces.from_covariances(found, rank=2, progress=False)
    return value, spaces_of(derived), found.shards


def check_covariances(value: Value) -> None:
    for _, matrix, _, tokens, mass, trace, *_ in value[0]:
        c = numpy.array(matrix)
        assert numpy.isfinite(c).all()
        assert (c == c.T).all()
        assert (numpy.diag(c) >= 0).all()
        assert math.isfinite(trace + mass + tokens)
    check_spaces(value[1])


def make_covariances(folder: Path) -> None:
    compute_covariances(model(), loader(), folder / "run", precision={"up": "qr", ".*": "fp64"}, shard=(1, 2), progress=False)


def read_checkpoint(folder: Path) -> Value:
    return spaces_of(compute(folder / "kept"))


def make_adapter(folder: Path) -> None:
    folder.joinpath("adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "target_modules": ["q", "up"]}
    config |= {"rank_pattern": {"up": 3}, "alpha_pattern": {"^up": 6.5}, "base_model_name_or_path": "a/b", "use_dora": False}
    (folder / "adapter" / files.ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))
    shapes = {"q.lora_A": (2, 7), "q.lora_B": (5, 2), "up.lora_A": (3, 5), "up.lora_B": (9, 3)}
    tensors = {f"base_model.model.{name}.weight": torch.randn(*shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter" / files.ADAPTER_WEIGHTS)
    records.write_manifest(folder, "init", {"model": "a/b", "rank": 2, "versions": {"torch": "2"}})


def read_adapter(folder: Path) -> Value:
    factors = files.read_factors(folder / "adapter")
    rows = files.row_spaces(folder / "adapter")
    init = files.init_around(folder / "adapter")
    course = files.read_course("x", folder)
    assert set(course.initial) == set(factors)
    name = None if init is None else init.get("model")
    return {n: (f.A.tolist(), f.B.tolist()) for n, f in factors.items()}, {n: r.tolist() for n, r in rows.items()}, name


def check_adapter(value: Value) -> None:
    for a, b in value[0].values():
        assert numpy.isfinite(numpy.array(b) @ numpy.array(a)).all()
    assert value[2] is None or isinstance(value[2], str)


def make_pt(folder: Path) -> None:
    x = torch.randn(30, 7)
    kept = {"q": x.T @ x, "k": x.T @ x, "up": torch.eye(5)}
    torch.save(kept, folder / "sums.pt")
    cache = {}
    for name, layer in layers().items():
        d_out, d_in = layer.weight.shape
        parts = {"S_WC": torch.tensor([2.0, 1.0]), "U_WC": torch.randn(d_out, 2), "V_WC": torch.randn(d_in, 2)}
        cache |= {f"{name}.eigens.{field}": tensor for field, tensor in parts.items()}
    torch.save(cache, folder / "cache.pt")


def layers() -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model().named_modules() if isinstance(layer, nn.Linear)}


def read_pt(folder: Path) -> Value:
    found: list[Any] = [[]]
    for site, covariance in corda_files.read_covariances(folder / "sums.pt", layers()):
        found[0].append((site, covariance.matrix().tolist()))
    eigens = corda_files.read_eigens(folder / "cache.pt", layers(), dict.fromkeys(layers(), 2))
    found.append({name: [t.tolist() for t in vars(each).values()] for name, each in eigens.items()})
    return found


def check_pt(value: Value) -> None:
    for _, matrix in value[0]:
        assert numpy.isfinite(numpy.array(matrix)).all()
    for parts in value[1].values():
        assert all(numpy.isfinite(numpy.array(part)).all() for part in parts)
        assert min(parts[0]) >= 0


def scores(loss: float) -> dict[str, Any]:
    known = {"nq": {"log_likelihood": -9.0 - loss, "exact_match": 0.25}}
    task = {"loss": loss, "token_accuracy": 0.5}
    return {"knowledge": known, "text": {"wiki": {"perplexity": 20.0 + loss}}, "task": task}


def make_study(folder: Path) -> None:
    records: list[Any] = [{"kind": "study", "settings": {"rank": 4}}, {"kind": "base", "scores": scores(2.0)}]
    records += [{"kind": kind, "variant": "a", "scores": scores(2.0)} for kind in ("start", "dropped")]
    for seed in (0, 1):
        for rate, loss in ((1e-4, 1.5), (1e-3, 1.0)):
            records.append(
                {"kind": "run", "variant": "a", "method": "pissa", "sigma_scale": 1.0, "learning_rate": rate, "seed": seed}
            )
            records[-1] |= {"scores": scores(loss + seed / 10), "layers": {"drift": 0.1 * loss}}
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def read_the_study(folder: Path) -> Value:
    study = fronts.read_study(folder / "results.jsonl")
    if study.base is None or not study.runs:
        return None
    return fronts.as_json(fronts.at_equal_loss(study)), fronts.as_json(fronts.over_seeds(study))


def check_study(value: Value) -> None:
    json.dumps(value, allow_nan=False)


ROWS = [{"question": f"What is {i}?", "answer": [f"It is {i}.", "é"], "n": i, "deep": {"a": [i, None]}} for i in range(6)]


def make_data(folder: Path) -> None:
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    (folder / "a.csv").write_text('question,answer\nWhat?,"This, ""that""\nand more"\n' * 3)
    (folder / "a.txt").write_text("One.\n\nTwo:\né.\n\n\nThree.")


def read_data(folder: Path) -> Value:
    found: dict[str, Any] = {}
    for name in ("a.jsonl", "a.json", "lines.json", "a.parquet", "a.csv", "a.txt"):
        found[name] = load_texts(folder / name)
        if name != "a.txt":
            load_rows(folder / name)
    return found


def check_data(value: Value) -> None:
    for texts in value.values():
        assert all(isinstance(text, str) and text.strip() and text.encode() for text in texts)


def make_config(folder: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 6, "rope_scaling": None, "dtype": "float32", "torch_dtype": "float32", "vocab_size": 99}
    (folder / "config.json").write_text(json.dumps(config))


KINDS: dict[str, Kind] = {
    "spaces": Kind(lambda d: compute(None).save(d / "run"), lambda d: spaces_of(NullSpaces.load(d / "run")), check=check_spaces),
    "covariances": Kind(make_covariances, read_covariances, check=check_covariances),
    "checkpoint": Kind(lambda d: compute(d / "kept"), read_checkpoint, check=check_spaces),
    "adapter": Kind(make_adapter, read_adapter, has_digests=False, check=check_adapter),
    "pt": Kind(make_pt, read_pt, has_digests=False, check=check_pt),
    "study": Kind(make_study, read_the_study, has_digests=False, check=check_study),
    "data": Kind(make_data, read_data, has_digests=False, check=check_data),
    "config": Kind(make_config, lambda d: str(type(read_config(d))), has_digests=False),
}
# Cheap ones more often.
DRAWN = [*KINDS, "spaces", "covariances", "adapter", "data", "data", "study"]

# ---- mutations

DEEP = "[" * 20000 + "]" * 20000
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1e9, 10**9, 300000, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, 0.5, -0.5, 1e-300, 1e300,
    math.nan, math.inf, -math.inf, "", "x", "../../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "C:\\x", "\0", "[bold]x", "[/]",
    "[/bold]", "[link=file:///]", "\x1b[2J", "é" * 300, "\ud800", "\u202e", "q", "up", "(", "sha256", [], {}, [[]], [{}], [1],
    ["q", "q"], ["q"], ["up", "k"], [0, 0], [7, 7], {"a": 1}, {"": None}, [None], "DEEP", "HUGE",
]  # fmt: skip


NAMES = [name for name in HOSTILE if isinstance(name, str) and name not in ("DEEP", "HUGE")]


def a_place(value: Any, draw: random.Random) -> tuple[Any, Any]:
    """A container somewhere in a JSON value, and a key of it."""
    places = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(value)
    return draw.choice(places) if places else (None, None)


def with_another_value(value: Any, draw: random.Random) -> Any:
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        inside, key = a_place(value, draw)
        what = draw.choice(("hostile", "hostile", "hostile", "number", "drop", "copy", "rename", "swap"))
        if inside is None:
            return draw.choice(HOSTILE)
        if what == "drop":
            del inside[key]
        elif what == "number" and type(inside[key]) in (int, float):
            inside[key] = draw.choice((inside[key] + 1, -inside[key], inside[key] * 1e6, str(inside[key]), inside[key] / 3))
        elif what == "rename" and isinstance(inside, dict):
            inside[draw.choice(NAMES)] = inside.pop(key)
        elif what == "copy" and isinstance(inside, list):
            inside.append(inside[key])
        elif what == "swap":
            other, at = a_place(value, draw)
            inside[key], other[at] = json.loads(json.dumps(other[at])), json.loads(json.dumps(inside[key]))
        else:
            inside[key] = draw.choice(HOSTILE)
    return value


def as_text(value: Any) -> str:
    return json.dumps(value).replace('"DEEP"', DEEP).replace('"HUGE"', "9" * 5000)


def mutate_bytes(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at, length = draw.randrange(len(content) + 1), draw.choice((1, 2, 8, 64, 500))
    what = draw.choice(("flip", "flip", "flip", "cut", "drop", "repeat", "zero", "noise", "insert", "append"))
    if what == "flip" and content:
        for _ in range(draw.choice((1, 1, 3))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif what == "cut":
        del content[at:]
    elif what == "drop":
        del content[at : at + length]
    elif what == "repeat":
        content[at:at] = content[at : at + length]
    elif what == "zero":
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif what == "noise":
        content[at : at + length] = draw.randbytes(len(content[at : at + length]))
    elif what == "insert":
        content[at:at] = draw.randbytes(length)
    else:
        content += draw.choice((b"\0", b"\n", b"{}", b"\xff", content[:length]))
    path.write_bytes(content)


def replace_file(path: Path, draw: random.Random) -> None:
    """Something else in the place of a file."""
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    what = draw.choice(("nothing", "directory", "pipe", "empty", "loop", "another", "text", "deep", "bom", "pickle"))
    content = path.read_bytes()
    path.unlink()
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "another" and others:
        shutil.copy(draw.choice(others), path)
    elif what != "nothing":
        new = {"text": b"hello", "deep": DEEP.encode(), "bom": b"\xef\xbb\xbf" + content, "pickle": b"\x80\x04cos\nsystem\n."}
        path.write_bytes(new.get(what, b""))


def mutate_json(path: Path, draw: random.Random) -> None:
    """Another value somewhere in a JSON document, or in one of several lines."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" or path.name == "lines.json" else [path.read_text()]
    at = draw.randrange(len(lines))
    lines[at] = as_text(with_another_value(json.loads(lines[at]), draw))
    path.write_text("\n".join(lines) + "\n" * (path.suffix == ".jsonl"))


def mutate_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    name = draw.choice(list(tensors))
    t = tensors[name].clone()
    at = draw.randrange(max(t.numel(), 1))
    what = draw.choice(
        ("nan", "inf", "scale", "one", "shape", "dtype", "negative", "zero", "drop", "more", "huge", "empty", "swap", "flip")
    )
    if what in ("nan", "inf", "one", "huge") and t.is_floating_point() and t.numel() > 0:
        t.view(-1)[at] = {"nan": math.nan, "inf": math.inf, "one": 1.5, "huge": 1e30}[what]
    elif what == "scale":
        t = t * draw.choice((2, 1e-3, 1e200, 1 + 1e-4))
    elif what == "shape":
        t = draw.choice((t.reshape(-1), t[None], t.mT.contiguous() if t.ndim > 1 else t[:-1], t.expand(2, *t.shape).contiguous()))
    elif what == "dtype":
        t = t.to(
            draw.choice((torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn))
        )
    elif what == "negative":
        t = -t
    elif what == "zero":
        t = torch.zeros_like(t)
    elif what == "empty":
        t = t[:0]
    elif what == "flip":
        t = t.flip(-1)
    elif what == "swap":
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
        return tensors
    found = {key: value for key, value in tensors.items() if key != name or what != "drop"}
    if what != "drop":
        found[name] = t
    if what == "more":
        found[draw.choice(("x", "root", "triangle", "fingerprint.q", "../../x"))] = torch.ones(3)
    return found


def seal(folder: Path, draw: random.Random, path: Path) -> None:
    """Change what a file says, and let all digests fit again."""
    manifest = path.parent / records.MANIFEST
    if path.name in (records.MANIFEST, "run.json"):
        body = json.loads(path.read_text())
        body.pop("digest")
        if draw.random() < 0.2 and body.get("files"):
            body["files"] = with_another_value(body["files"], draw)
        body = with_another_value(body, draw)
        if not isinstance(body, dict):
            path.write_text(as_text(body))
            return
        body = json.loads(as_text({**body, "digest": 0}).replace(DEEP, "[[[[]]]]").replace("9" * 5000, "9" * 4000))
        body.pop("digest")
        with contextlib.suppress(UnicodeEncodeError):
            path.write_text(records.sealed(body))
    elif manifest.is_file():
        save_file(mutate_tensors(load_file(path), draw), path)
        body = json.loads(manifest.read_text())
        if path.name in body["files"]:
            body["files"][path.name] = records.looks_of(path.parent, [path.name])[path.name]
        body.pop("digest")
        manifest.write_text(records.sealed(body))
    else:
        mutate_record(path, draw)


def mutate_record(path: Path, draw: random.Random) -> None:
    """A checkpoint's file with other facts or tensors, and digests that fit."""
    from nullspace.artifacts.checkpoint import _digest

    tensors = load_file(path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    facts = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["record"])["facts"]
    if draw.random() < 0.5:
        tensors = mutate_tensors(tensors, draw)
    else:
        facts = with_another_value(facts, draw)
    record = as_text({"facts": facts, "tensors": {name: _digest(tensor) for name, tensor in tensors.items()}})
    save_file(tensors, path, metadata={"record": record, "sha256": hashlib.sha256(record.encode()).hexdigest()})


def mutate(folder: Path, kind: Kind, draw: random.Random) -> tuple[str, bool]:
    """What was done, and whether it was sealed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice(paths)
    how = draw.choice(("bytes", "replace", "bytes", "json", "seal", "seal"))
    in_json = path.suffix in (".json", ".jsonl")
    if how == "replace" and draw.random() < 0.5:
        replace_file(path, draw)
    elif how == "json" and in_json:
        mutate_json(path, draw)
    elif how in ("json", "seal") and path.suffix == ".pt":
        torch.save(mutate_tensors(torch.load(path, weights_only=True), draw), path)
    elif how in ("json", "seal") and path.name == files.ADAPTER_WEIGHTS:
        save_file(mutate_tensors(load_file(path), draw), path)
    elif how == "seal" and (kind.has_digests or path.name == records.MANIFEST):
        seal(folder, draw, path)
        return f"sealed {path.relative_to(folder)}", True
    elif how == "seal" and in_json:
        mutate_json(path, draw)
    else:
        how = "bytes"
        mutate_bytes(path, draw)
    return f"{how} {path.relative_to(folder)}", False


# ---- the properties


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def expired(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)  # if no Python code runs that a signal could stop
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder: Path, kind: Kind, expected: Value, sealed: bool, names: set[str]) -> str:
    """`"refused"`, `"same"`, `"other"` (a valid file that says something else); `AssertionError` if a property does not hold."""
    refused: Exception | None = None
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = kind.read(folder)
    except (ValueError, OSError) as error:
        refused = error
    if refused is not None:
        known = {*names, *(path.name for path in folder.rglob("*")), str(folder), *map(repr, dict(model().named_modules()))} - {
            "''"
        }
        assert any(name in str(refused) for name in known), f"names no file: {type(refused).__name__}: {refused}"
        return "refused"
    kind.check(value)
    if repr(value) == repr(expected):
        return "same"
    assert sealed or not kind.has_digests, f"another value was read: {value}"
    return "other"


def run(numbers: range, root: Path, report: Callable[[int, str], object]) -> collections.Counter[str]:
    """Try these mutations; `report` is given the number and the story of each that fails."""
    count: collections.Counter[str] = collections.Counter()
    expected: dict[str, Value] = {}
    pristine, work, elsewhere = root / "pristine", root / "work", root / "elsewhere"
    elsewhere.mkdir()
    before = Path.cwd()
    os.chdir(elsewhere)
    try:
        for number in numbers:
            draw = random.Random(number)
            name = draw.choice(DRAWN)
            kind = KINDS[name]
            if name not in expected:
                (pristine / name).mkdir(parents=True)
                torch.manual_seed(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kind.make(pristine / name)
                    expected[name] = kind.read(pristine / name)
                kind.check(expected[name])
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(pristine / name, work)
            names = {path.name for path in work.rglob("*")}
            what, sealed = mutate(work, kind, draw)
            try:
                count[f"{name}: {outcome(work, kind, expected[name], sealed, names)}"] += 1
                assert sorted(path.name for path in root.iterdir()) == ["elsewhere", "pristine", "work"], "wrote outside"
                assert not list(elsewhere.iterdir()), "wrote into the working directory"
            except Exception:
                count[f"{name}: FAILED"] += 1
                report(number, f"{name}, {what}: {traceback.format_exc(limit=-6)}")
    finally:
        os.chdir(before)
    return count


@pytest.mark.slow
def test_damaged_and_forged_files_are_refused_by_name_or_read_for_what_they_are(tmp_path: Path) -> None:
    failures: dict[int, str] = {}
    if COUNT <= 1000:
        count = run(range(COUNT), tmp_path, failures.__setitem__)
        assert {key.split(": ")[0] for key in count} == set(KINDS) or COUNT < 100
    else:
        for begin in range(0, COUNT, 500):
            command = [sys.executable, __file__, str(begin), str(min(begin + 500, COUNT))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                failures[begin] = f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert not failures, "\n".join(f"{number}: {story}" for number, story in failures.items())


def main() -> int:
    faulthandler.enable()
    numbers = range(int(sys.argv[1]), int(sys.argv[2]))
    failed = []

    def report(number: int, story: str) -> None:
        failed.append(number)
        print(f"--- {number}: {story}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for key, times in sorted(run(numbers, Path(folder), report).items()):
            print(f"{times:6d} {key}", flush=True)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
