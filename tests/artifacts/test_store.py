"""Directories appear completely or not at all, after any failure; damage is noticed; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models import random_spaces, tiny
from nullspace import NullSpaces
from nullspace.artifacts import identity, records, store
from nullspace.model.sites import find_targets
from patience import run

# For a process of its own: what it does to itself (kill -9, a full disk) must not reach the tests. The children of a fork need not
# import torch again.
CHILDREN = """
import os, sys
from nullspace import NullSpaces

root = sys.argv[1]
first, second = (NullSpaces.load(f"{root}/{name}") for name in ("first", "second"))


def child(job):
    pid = os.fork()
    if pid == 0:
        try:
            job()
        finally:
            os._exit(0)
    return pid
"""


def run_script(script: str, root: Path, first: NullSpaces, second: NullSpaces) -> str:
    """Run a script that has `root`, where both spaces are saved, `first`, `second` and `child`."""
    first.save(root / "first")
    second.save(root / "second")
    command = [sys.executable, "-c", CHILDREN + script, str(root)]
    done = run(command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(a: NullSpaces, b: NullSpaces) -> bool:
    return a.sites == b.sites and all(torch.equal(a[name].basis, b[name].basis) for name in a)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def ours(directory: Path, **files: str) -> Path:
    """A directory that this package wrote."""
    with store.new_directory(directory) as part:
        for name, text in files.items():
            (part / name).write_text(text)
        records.write_manifest(part, "test", {}, files=tuple(files))
    return directory


# ---- whole or not at all


def test_a_directory_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with store.new_directory(out) as part:
        (part / "sub").mkdir()
        (part / "sub" / "file").write_text("content")
        assert not out.exists()
        assert part.stat().st_dev == out.parent.stat().st_dev  # a rename across file systems would be a copy
    assert tree(out) == {"sub/file": b"content"}
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["nothing", "an empty directory", "ours"])
def test_an_error_inside_leaves_what_was_there_before(tmp_path: Path, error: type[BaseException], before: str) -> None:
    out = tmp_path / "out"
    if before == "an empty directory":
        out.mkdir()
    elif before == "ours":
        ours(out, old="old")
    existed, content = out.exists(), tree(out)

    def fail() -> None:
        with store.new_directory(out, overwrite=True) as part:
            (part / "new").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (out.exists(), tree(out)) == (existed, content)
    assert os.listdir(tmp_path) == (["out"] if existed else [])


def test_what_a_crash_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """Names that temporary directories have, or had, or might have: only those that carry our mark are deleted."""
    foreign = ("out.part", "out.old.part", "out.0123abcd.part", "out.covariances", "out.checkpoint", "out.lock", "outer.part")
    for left in (*foreign, "out.deadbeef.part", "out.two.00000000.part"):
        (tmp_path / left / "new").mkdir(parents=True)
        (tmp_path / left / "new" / "thesis.txt").write_text(left)
    for left in ("out.deadbeef.part", "out.two.00000000.part"):
        (tmp_path / left / store.PART).write_text("{}")
    (tmp_path / "out.fedcba98.part").symlink_to(tmp_path / "outer.part")
    kept = {name: text for name, text in tree(tmp_path).items() if not name.startswith("out.deadbeef.part")}
    with store.new_directory(tmp_path / "out") as part:
        assert not any(part.iterdir())
        (part / "file").write_text("content")
    assert tree(tmp_path) == {**kept, "out/file": b"content"}
    assert (tmp_path / "out.fedcba98.part").is_symlink()


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ours(tmp_path / "out", file="content")
    assert set(tree(tmp_path / "out")) == {"file", "nullspace.json"}


@pytest.mark.parametrize("added", ["notes.txt", "trained/adapter_model.safetensors", "spaces/notes.txt"])
def test_a_directory_with_added_files_is_not_overwritten(tmp_path: Path, added: str) -> None:
    out = tmp_path / "out"
    spaces = random_spaces(0, sites=2)

    def write(content: str) -> None:
        with store.new_directory(out, overwrite=True) as part:
            spaces.write(part / "spaces")
            (part / "content").write_text(content)
            records.write_manifest(part, "init", {"model": None})

    write("first")
    write("second")
    (out / added).parent.mkdir(exist_ok=True)
    (out / added).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"holds '{re.escape(added)}', which nullspace did not write"):
        write("third")
    assert ((out / added).read_text(), (out / "content").read_text()) == ("mine", "second")
    store.delete_directory(out)
    assert (out / added).read_text() == "mine"
    (out / added).unlink()
    write("third")
    assert (out / "content").read_text() == "third"


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    out = ours(tmp_path / "out", old="old")
    with store.new_directory(out, overwrite=True) as part:
        (part / "new").write_text("new")
    assert tree(out) == {"new": b"new"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("there", "overwrite"),
    [
        ("ours", False),
        ("foreign", False),
        ("foreign", True),
        ("file", False),
        ("file", True),
        ("a directory called nullspace.json", False),
        ("a directory called nullspace.json", True),
    ],
)
def test_what_is_in_the_way_is_refused_and_left_alone(tmp_path: Path, there: str, overwrite: bool) -> None:
    out = tmp_path / "out"
    if there == "ours":
        ours(out, file="content")
    elif there == "file":
        out.write_text("content")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("content")
        if there != "foreign":
            (out / records.MANIFEST).mkdir()
    before = tree(tmp_path)
    for door in (store.check_free, lambda *args, **kwargs: store.new_directory(*args, **kwargs).__enter__()):
        with pytest.raises(FileExistsError, match="out"):
            door(out, overwrite=overwrite)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_free_is_known_beforehand(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ours(tmp_path / "ours")
    store.check_free(tmp_path / "nothing")
    store.check_free(tmp_path / "empty")
    store.check_free(tmp_path / "ours", overwrite=True)


# ---- kill -9

MOMENTS = 8


@pytest.mark.processes
def test_kill_9_at_any_moment_leaves_nothing_or_everything(tmp_path: Path) -> None:
    spaces = random_spaces(0, sites=25)
    run_script(
        f"""
import random, signal, time
begin = time.perf_counter()
first.save(f"{{root}}/whole")
duration = time.perf_counter() - begin
for i in range({MOMENTS}):
    pid = child(lambda: first.save(f"{{root}}/{{i}}/out"))
    # One moment in each slice of the time that it takes, and a little beyond.
    time.sleep(duration * 1.1 * (i + random.random()) / {MOMENTS})
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
""",
        tmp_path,
        spaces,
        spaces,
    )
    assert same(NullSpaces.load(tmp_path / "whole"), spaces)
    interrupted = 0
    for i in range(MOMENTS):
        out = tmp_path / str(i) / "out"
        interrupted += any(out.parent.glob("out.*.part"))
        if not out.exists():
            spaces.save(out)
            assert os.listdir(out.parent) == ["out"]
        assert same(NullSpaces.load(out), spaces)
    assert interrupted > 0  # or nothing was tested


@pytest.mark.processes
def test_a_crash_or_an_error_around_the_rename_leaves_the_old_the_new_or_nothing(tmp_path: Path) -> None:
    """While a directory is overwritten there are two renames: the old one away, the new one in."""
    old, new = random_spaces(1, sites=2), random_spaces(2, sites=2)
    run_script(
        """
import signal


def overwrite(out, how, nth):
    renames = []

    def hook(event, _):
        if event == "os.rename":
            renames.append(event)
            if len(renames) == nth and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if len(renames) == nth:
                raise KeyboardInterrupt

    sys.addaudithook(hook)
    second.save(out, overwrite=True)


for how in ("kill", "raise"):
    for nth in (1, 2):
        out = f"{root}/{how}{nth}/out"
        first.save(out)
        os.waitpid(child(lambda: overwrite(out, how, nth)), 0)
""",
        tmp_path,
        old,
        new,
    )
    # An error can be cleaned up after: the old directory is back.
    for name in ("raise1", "raise2", "kill1"):
        assert same(NullSpaces.load(tmp_path / name / "out"), old), name
    assert os.listdir(tmp_path / "raise1") == os.listdir(tmp_path / "raise2") == ["out"]
    # A kill cannot. Between the two renames there is no directory, never half of one.
    assert (tmp_path / "kill1" / "out").exists()
    assert not (tmp_path / "kill2" / "out").exists()
    for name in ("kill1", "kill2"):
        # The next run puts the old one back, whether it may replace it or not.
        with pytest.raises(FileExistsError, match="exists"):
            new.save(tmp_path / name / "out")
        assert same(NullSpaces.load(tmp_path / name / "out"), old)
        assert os.listdir(tmp_path / name) == ["out"]
        new.save(tmp_path / name / "out", overwrite=True)
        assert same(NullSpaces.load(tmp_path / name / "out"), new)
        assert os.listdir(tmp_path / name) == ["out"]


# ---- a full disk


@pytest.mark.processes
def test_a_disk_that_is_full_is_an_os_error_and_leaves_nothing_new(tmp_path: Path) -> None:
    """The limit on file sizes stands in for the disk's: the same calls fail at the same places."""
    old, new = random_spaces(1, sites=40), random_spaces(2, sites=40)
    output = run_script(
        """
import json, resource


def save(out, limit, overwrite, pipe):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    said = "nothing was raised"
    try:
        second.save(out, overwrite=overwrite)
    except OSError as error:
        said = f"OSError: {error}"
    except BaseException as error:
        said = repr(error)
    os.write(pipe, said.encode())


results = {}
for limit in (1_000, 10_000):
    for overwrite in (False, True):
        out = f"{root}/{limit}-{overwrite}/out"
        if overwrite:
            first.save(out)
        read, write = os.pipe()
        os.waitpid(child(lambda: save(out, limit, overwrite, write)), 0)
        results[f"{limit}-{overwrite}"] = os.read(read, 10_000).decode()
print(json.dumps(results))
""",
        tmp_path,
        old,
        new,
    )
    # The lower limit strikes in the first file of tensors, the higher one in the manifest.
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "second").iterdir()}
    assert all(1_000 < size < 10_000 for name, size in sizes.items() if name != records.MANIFEST)
    assert sizes[records.MANIFEST] > 10_000
    results = json.loads(output)
    assert len(results) == 4
    for name, said in results.items():
        assert said.startswith("OSError"), (name, said)
        if name.startswith("1000-"):
            assert "0000-layers.0.up.safetensors" in said
        if name.endswith("False"):
            assert not (tmp_path / name).exists()
        else:
            assert os.listdir(tmp_path / name) == ["out"]
            assert same(NullSpaces.load(tmp_path / name / "out"), old)


def test_tensors_that_cannot_be_written_are_an_os_error_naming_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere.*x\.safetensors"):
        records.write_tensors(tmp_path / "nowhere" / "x.safetensors", {"a": torch.ones(2)})


# ---- reading


def directory_with(tmp_path: Path, name: str, content: bytes) -> Path:
    """A directory whose manifest vouches for a file with this content."""
    with store.new_directory(tmp_path / "out") as part:
        (part / name).write_bytes(content)
        records.write_manifest(part, "test", {}, files=(name,))
    return tmp_path / "out"


class Payload:
    """Unpickling it makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["x.safetensors", "adapter_model.safetensors", "nullspace.json"])
def test_nothing_is_unpickled(tmp_path: Path, how: str, name: str) -> None:
    marker = tmp_path / "marker"
    poison = tmp_path / "poison"
    if how == "pickle":
        poison.write_bytes(pickle.dumps(Payload(marker)))
        pickle.loads(poison.read_bytes())
    else:
        torch.save({"basis": Payload(marker)}, poison)
        torch.load(poison, weights_only=False)
    marker.rmdir()  # the poison works
    if name == records.MANIFEST:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_bytes(poison.read_bytes())
        with pytest.raises(ValueError, match=r"nullspace\.json"):
            records.read_manifest(tmp_path / "out", "test")
    else:
        out = directory_with(tmp_path, name, poison.read_bytes())
        with pytest.raises(ValueError, match=f"{name} is not a safetensors file"):
            records.read_tensors(out, name, records.read_manifest(out, "test"))
        with pytest.raises(ValueError, match=f"{name} is not a safetensors file"):
            records.load_tensors(out / name)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\xff" * 64, b"{}", b"\x02" + b"\0" * 7 + b"{", b"\x08" + b"\0" * 7 + b"not json"]
)
def test_a_file_that_is_no_safetensors_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    out = directory_with(tmp_path, "x.safetensors", content)
    with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file"):
        records.read_tensors(out, "x.safetensors", records.read_manifest(out, "test"))


def test_a_file_that_the_manifest_does_not_list_is_refused_by_name(tmp_path: Path) -> None:
    out = ours(tmp_path / "out", listed="x")
    records.write_tensors(out / "other.safetensors", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"other\.safetensors is not listed in nullspace\.json"):
        records.read_tensors(out, "other.safetensors", records.read_manifest(out, "test"))


def test_a_missing_file_or_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        records.read_manifest(tmp_path / "nowhere", "test")
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors is missing"):
        records.load_tensors(tmp_path / "x.safetensors")
    out = ours(tmp_path / "out", listed="x")
    (out / "listed").unlink()
    with pytest.raises(ValueError, match="listed is missing"):
        records.read_tensors(out, "listed", records.read_manifest(out, "test"))


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    content = {"text": "größe ‖·‖ \n", "number": 0.1 + 0.2, "big": 2**60, "none": None, "list": [1, [2.5e-300]], "true": True}
    with store.new_directory(tmp_path / "out") as part:
        records.write_manifest(part, "test", content)
    read = records.read_manifest(tmp_path / "out", "test")
    assert {key: read[key] for key in content} == content


def test_tensors_come_back_to_the_bit_whatever_their_layout(tmp_path: Path) -> None:
    base = torch.randn(6, 4, dtype=torch.float64)
    tensors = {"transposed": base.T, "slice": base[::2, 1:], "half": base.bfloat16(), "empty": torch.empty(0, 3), "same": base}
    records.write_tensors(tmp_path / "x.safetensors", tensors)
    read = records.load_tensors(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


# ---- fingerprints

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_a_weight_is_known_again_in_another_dtype(family: str, dtype: torch.dtype, other: torch.dtype) -> None:
    for name, module in find_targets(tiny(family)).items():
        a, b = identity.fingerprint(module.weight.to(dtype)), identity.fingerprint(module.weight.to(other))
        assert a is not None
        assert b is not None
        assert identity.same_fingerprint(a, b), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_weights_have_other_fingerprints(family: str, dtype: torch.dtype) -> None:
    prints = [
        identity.fingerprint(module.weight.to(dtype)) for seed in (0, 1) for module in find_targets(tiny(family, seed)).values()
    ]
    for i, a in enumerate(prints):
        for b in prints[:i]:
            assert not identity.same_fingerprint(a, b)


def test_a_fingerprint_sees_the_first_the_last_and_the_middle_of_a_weight() -> None:
    weight = torch.randn(40, 30)
    for rows in (slice(0, 1), slice(-1, None), slice(18, 22)):
        other = weight.clone()
        other[rows] += 1
        assert not identity.same_fingerprint(identity.fingerprint(weight), identity.fingerprint(other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_differ_by_more_than_rounding_are_told_apart(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 30)
    changed = (weight * 1.02).to(dtype)  # two roundings to bf16 can make 0.8 %
    assert not identity.same_fingerprint(identity.fingerprint(weight), identity.fingerprint(changed))


def test_a_fingerprint_is_of_the_values_not_of_the_memory() -> None:
    weight = torch.randn(40, 30)
    strided = torch.empty(40, 60)[:, ::2].copy_(weight)
    parameter = torch.nn.Parameter(weight)
    found = identity.fingerprint(parameter)
    assert torch.equal(found, identity.fingerprint(strided))
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not identity.same_fingerprint(found, identity.fingerprint(weight.T))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (8, 9)])
def test_small_weights_have_fingerprints_too(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    found = identity.fingerprint(weight)
    assert len(found) == min(64, weight.numel())
    assert identity.same_fingerprint(found, identity.fingerprint(weight.half()))
    assert not identity.same_fingerprint(found, identity.fingerprint(weight + 1))


def test_weights_of_different_sizes_are_different() -> None:
    assert not identity.same_fingerprint(identity.fingerprint(torch.ones(3, 3)), identity.fingerprint(torch.ones(4, 4)))


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(4, 4, dtype=torch.int8),
        torch.ones(4, 4, dtype=torch.uint8),
        torch.ones(4, 4, device="meta"),
        torch.empty(0, 4),
    ],
    ids=["int8", "uint8", "meta", "empty"],
)
def test_a_weight_without_plain_values_has_no_fingerprint(weight: torch.Tensor) -> None:
    assert identity.fingerprint(weight) is None


def mixed_tensors() -> dict[str, torch.Tensor]:
    dtypes = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    tensors = {f"{index % 3}.{str(dtype)[6:]}": (torch.randn(3, 5) * 9).to(dtype) for index, dtype in enumerate(dtypes)}
    return {**tensors, "scalar": torch.tensor(7), "empty": torch.zeros(0, 4), 'ü"quoted': torch.ones(2)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_tensor_file_is_that_of_safetensors_byte_for_byte(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = mixed_tensors()
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    with records.TensorFile(tmp_path / "ours", {name: t.to("meta") for name, t in tensors.items()}, metadata) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_one_tensor_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    for name, tensor in tensors.items():
        save_file(tensors, tmp_path / "file")
        new = tensor.flip(0) if tensor.ndim else tensor + 1
        records.replace_tensor(tmp_path / "file", name, new)
        save_file({**tensors, name: new.contiguous()}, tmp_path / "wanted")
        assert (tmp_path / "file").read_bytes() == (tmp_path / "wanted").read_bytes()
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match=r"'scalar' in .*file is I64 \[\], not torch\.float32 \[1\]"):
        records.replace_tensor(tmp_path / "file", "scalar", torch.zeros(1))
    assert (tmp_path / "file").read_bytes() == before


def test_tensor_file_takes_what_was_announced_and_all_of_it(tmp_path: Path) -> None:
    announced = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    with (
        pytest.raises(ValueError, match=r"'b' was never written to .*file"),
        records.TensorFile(tmp_path / "file", announced) as file,
    ):
        file.write("a", torch.ones(3, 2).T)  # not contiguous
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        should = pytest.raises(ValueError, match=r"'a' in .*file should be torch\.float32 \(2, 3\)")
        with should, records.TensorFile(tmp_path / "file", announced) as file:
            file.write("a", wrong)
    with pytest.raises(ValueError, match=r"'c' is torch\.complex64"):
        records.TensorFile(tmp_path / "file", {"c": torch.zeros(1, dtype=torch.complex64)})


@contextlib.contextmanager
def files_of(size: int) -> Iterator[None]:
    """Inside, no file can be larger: a write to an open file fails as on a full disk, without the file's name."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_names_the_place(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(5000)}

    def write_tensors_one_by_one(part: Path) -> None:
        with records.TensorFile(part / "a.safetensors", tensors) as file:
            file.write("a", tensors["a"])

    def write_bytes(part: Path) -> None:
        (part / "a").write_bytes(bytes(10**5))

    for number, write in enumerate((write_tensors_one_by_one, write_bytes)):
        out = tmp_path / str(number)
        with (
            files_of(10**4),
            pytest.raises(OSError, match=rf"too large: '{re.escape(str(out))}'"),
            store.new_directory(out) as part,
        ):
            write(part)
    page = tmp_path / "page.html"
    with files_of(10**4), pytest.raises(OSError, match=r"page\.html"), store.new_file(page, overwritable=Path.is_file) as part:
        part.write_text("x" * 10**5)
    assert not list(tmp_path.iterdir())
