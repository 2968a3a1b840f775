"""What is built from a checkout holds the whole package, and is used in the place of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import nullspace
from nullspace.artifacts import identity

pytestmark = pytest.mark.processes

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
NEEDED = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "nullspace", "csrc_triton", "integrations")
LEFT_OUT = ("examples",)  # of the wheel
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# Imports all modules of each tree in a process of its own, forked from one that has what they import.
IMPORT = """
import importlib, os, pkgutil, sys
import accelerate, peft, rich, torch, transformers, triton, typer
for tree in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.path.insert(0, tree)
        import nullspace
        assert nullspace.__file__.startswith(tree), nullspace.__file__
        names = [each.name for each in pkgutil.walk_packages(nullspace.__path__, "nullspace.")]
        assert {"nullspace.csrc_triton.syrk", "nullspace.integrations.peft.inject"} <= set(names), names
        for name in names:
            assert importlib.import_module(name).__file__.startswith(tree), name
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, tree
"""


def python(*arguments: str, cwd: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone has, links as links."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    folder.mkdir()
    for name in (*NEEDED, *LEFT_OUT):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    python("-c", BUILD, "build_wheel", "../dist", cwd=checkout)
    return next((checkout.parent / "dist").glob("*.whl"))


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_once(checkout: Path, wheel: Path) -> None:
    sources = {
        str(Path(folder, name).relative_to(checkout))
        for folder, _, files in os.walk(checkout / "nullspace", followlinks=True)
        for name in files
    }
    assert wheel.name.startswith(f"nullspace_lora-{nullspace.__version__}-py3-none-any")
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == sources
    assert "nullspace/py.typed" in sources


def test_a_source_archive_builds_the_same_wheel(checkout: Path, wheel: Path) -> None:
    python("-c", BUILD, "build_sdist", "../dist", cwd=checkout)
    archive = next((checkout.parent / "dist").glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(checkout.parent / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = next((checkout.parent / "unpacked").iterdir())
    assert not (unpacked / "tests").exists()
    python("-c", BUILD, "build_wheel", "../again", cwd=unpacked)
    assert names_in(next(unpacked.parent.glob("again/*.whl"))) == names_in(wheel)


def test_all_modules_are_importable_from_the_wheel_and_from_a_checkout(checkout: Path, wheel: Path) -> None:
    installed, elsewhere = checkout.parent / "installed", checkout.parent / "elsewhere"
    elsewhere.mkdir()
    python(
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(installed),
        str(wheel),
        cwd=elsewhere,
    )
    python("-c", IMPORT, str(installed), str(checkout), cwd=elsewhere)


def test_a_checkout_that_is_not_installed_gives_the_same_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_metadata(package: str) -> str:
        raise identity.PackageNotFoundError(package)

    monkeypatch.setattr(identity, "version", no_metadata)
    assert identity._version("nullspace-lora") == nullspace.__version__


def test_files_about_the_project_can_be_read_and_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == nullspace.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "mypy"}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    runs = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert set(re.findall(r"\bmake ([a-z]+)", runs)) == {"lint", "quick", "docs"} <= set(targets)
    assert (ROOT / ".ci/run").exists()
