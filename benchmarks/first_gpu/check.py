"""Do the kernels run, and is what they compute right? Everything else is worth nothing before this says yes.

    python -m benchmarks.first_gpu.check --out FOLDER     # 3 to 8 minutes; writes check.json

First a program's own checks, in a child process with a time limit: the kernels against `nullspace.csrc_triton.naive` (exact on
small integers), rounding on real numbers, the same bits twice, an update without a wait of the host, the solvers' certificate, a
tiny model by every strategy, `inject_adapters` by every method, `preprocess_corda` and `get_eva_state_dict` on the device. Then,
with the time that is left and where pytest is installed, the tests that are marked `gpu`; those that fail are named in the result.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.children import lines_of, run_limited
from benchmarks.first_gpu.command import Command, options_of

ANSWERS = [
    "do the kernels compile, launch and end on this device?",
    "are sums exact where they must be, and does a run wait for the device where it must not?",
    "do strategies, methods and PEFT's doors work on this device?",
]
CHILD_SECONDS = 240.0
TESTS = ("tests/csrc_triton", "tests/moments", "tests/calibration/test_devices.py")
ROOT = Path(__file__).parents[2]


def launches(device: Any) -> dict[str, Any]:
    """Whether `nullspace` itself would use the kernels here."""
    from nullspace import csrc_triton

    obstacle = csrc_triton.unavailable(device) if device.type == "cuda" else None
    assert obstacle is None, obstacle
    return {}


def exact_products(device: Any) -> dict[str, Any]:
    """Every dtype, tiles that are not full, strided rows, in squares and in packed panels."""
    import torch

    from nullspace import csrc_triton
    from nullspace.csrc_triton import naive
    from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle

    generator = torch.Generator(device).manual_seed(0)
    shapes = ((1, 1), (7, 3), (130, 127), (128, 128), (129, 300), (1000, 1000)) if device.type == "cuda" else ((7, 3), (60, 40))
    cases = list(itertools.product((torch.bfloat16, torch.float16, torch.float32), shapes))
    for dtype, (tokens, d) in cases:
        x = torch.randint(-8, 9, (tokens, d + 8), generator=generator, device=device).to(dtype)[:, 8:]
        g, triangle = torch.zeros(d, d, dtype=torch.float64, device=device), LowerTriangle(d, device=device)
        expected = g.clone()
        csrc_triton.syrk_accumulate(g, x)
        csrc_triton.syrk_accumulate(triangle.packed, x, panel_rows=PANEL_ROWS)
        naive.syrk_accumulate(expected, x)
        assert torch.equal(g, expected), f"{dtype}, {tokens} × {d}: off by {(g - expected).abs().max().item():.3g}"
        assert torch.equal(triangle.square().tril(), expected), f"{dtype}, {tokens} × {d}, packed"
    return {"cases": len(cases)}


def selected_rows(device: Any) -> dict[str, Any]:
    """Outlier rows in float64; staging; zeroing."""
    import torch

    from nullspace import csrc_triton
    from nullspace.csrc_triton import naive

    generator = torch.Generator(device).manual_seed(1)
    x = torch.randint(-8, 9, (90, 136), generator=generator, device=device).bfloat16()
    rows = torch.randperm(90, generator=generator, device=device)
    count = torch.tensor(37, device=device)
    g = torch.zeros(136, 136, dtype=torch.float64, device=device)
    expected = g.clone()
    csrc_triton.syrk_accumulate_rows(g, x, rows, count)
    naive.syrk_accumulate_rows(expected, x, rows, count)
    assert torch.equal(g, expected), "syrk_accumulate_rows"
    out, wanted = torch.empty_like(x), torch.empty_like(x)
    for found, right in zip(csrc_triton.stage_rows(x, out, rows), naive.stage_rows(x, wanted, rows), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    assert torch.equal(out, wanted), "stage_rows"
    csrc_triton.zero_rows(out, rows, count)
    naive.zero_rows(wanted, rows, count)
    assert torch.equal(out, wanted), "zero_rows"
    return {}


def grouped_products(device: Any) -> dict[str, Any]:
    """Groups that are empty, of one row and of many."""
    import torch

    from nullspace import csrc_triton
    from nullspace.csrc_triton import naive

    x = torch.randint(-8, 9, (140, 72), generator=torch.Generator(device).manual_seed(2), device=device).bfloat16()
    offsets = torch.tensor([0, 0, 1, 38, 38, 139], device=device)
    g = torch.zeros(5, 72, 72, dtype=torch.float64, device=device)
    expected = g.clone()
    csrc_triton.syrk_accumulate_grouped(g, x, offsets)
    naive.syrk_accumulate_grouped(expected, x, offsets)
    assert torch.equal(g, expected)
    return {}


def real_products(device: Any) -> dict[str, Any]:
    """The largest error of an entry relative to √(g_ii g_jj); two runs are equal to the bit."""
    import torch

    from benchmarks.first_gpu.inputs import draw
    from nullspace import csrc_triton

    worst = 0.0
    dtypes, widths = (torch.bfloat16, torch.float16, torch.float32), (1500, 1504) if device.type == "cuda" else (66,)
    for dtype, d in itertools.product(dtypes, widths):
        x = draw(4096 if device.type == "cuda" else 200, d, device, dtype)
        sums = [torch.zeros(d, d, dtype=torch.float64, device=device) for _ in range(2)]
        for g in sums:
            csrc_triton.syrk_accumulate(g, x)
        assert torch.equal(*sums), f"{dtype}, {d}: not the same twice"
        exact = x.double().T @ x.double()
        scale = exact.diagonal().sqrt()
        worst = max(worst, float(((sums[0] - exact).tril().abs() / (scale[:, None] * scale)).max()))
    assert worst <= 1e-6, f"error {worst:.2g}"
    return {"largest_error": worst}


def an_update_without_a_wait(device: Any) -> dict[str, Any]:
    """After the first updates, in which kernels are compiled, the host does not wait for the device."""
    import torch

    from benchmarks.first_gpu.inputs import draw, new_covariance

    x = draw(4096 if device.type == "cuda" else 64, 512 if device.type == "cuda" else 40, device)
    covariance = new_covariance(x.shape[1], device)
    for _ in range(3):
        covariance.update(x)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            covariance.update(x)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    error = float((covariance.matrix() - 6 * x.double().T @ x.double()).norm() / covariance.matrix().norm())
    assert error <= 1e-6, f"error {error:.2g}"
    return {"error": error}


def solvers(device: Any) -> dict[str, Any]:
    """The certificate of every method, and equal bits twice."""
    import torch

    from benchmarks.solvers import SPECTRA, activations, quality, second_moment
    from nullspace.solvers import bottom_eigenpairs

    d, k = (3072, 64) if device.type == "cuda" else (240, 4)
    figures = {"residual": 0.0, "orthogonality": 0.0, "excess": 0.0}
    for spectrum in SPECTRA:
        x = activations(spectrum, d, device)
        c = second_moment(x)
        best = quality(x, c, *(part for part in bottom_eigenpairs(c, k, method="eigh")))["leak"]
        for method in ("auto", "shift-invert"):
            values, vectors = bottom_eigenpairs(c, k, method=method)
            assert torch.equal(vectors, bottom_eigenpairs(c, k, method=method)[1]), f"{spectrum}, {method}: not the same twice"
            row = quality(x, c, values, vectors)
            row["excess"] = row["leak"] / best - 1
            figures = {name: max(value, row[name]) for name, value in figures.items()}
    assert figures["residual"] <= 1e-12, figures
    assert figures["orthogonality"] <= 1e-12, figures
    assert figures["excess"] <= 1e-9, figures
    return figures


def _model_and_batches(device: Any) -> tuple[Any, Any]:
    import torch

    from benchmarks import shapes

    model = shapes.build("tiny", device="cpu", dtype=torch.float32, blocks=2).to(device)
    ids = torch.randint(1, 211, (8, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1::2, 40:] = 0
    return model, [
        {"input_ids": part.to(device), "attention_mask": own.to(device)}
        for part, own in zip(ids.split(2), mask.split(2), strict=True)
    ]


def strategies(device: Any) -> dict[str, Any]:
    """A tiny model with padding, resident and layerwise, beside the same on the CPU in float64 sums."""
    import torch

    from nullspace import compute_null_spaces

    model, batches = _model_and_batches(torch.device("cpu"))
    expected = compute_null_spaces(model, batches, rank=4, precision="fp64", strategy="resident", progress=False)
    worst = 0.0
    ways: list[dict[str, Any]] = [{"strategy": "resident"}]
    ways += [{"strategy": "layerwise", "hidden_states": place} for place in ("device", "host", "disk")]
    for way in ways:
        if device.type == "cpu" and way.get("hidden_states") == "device":
            continue
        spaces = compute_null_spaces(*_model_and_batches(device), rank=4, progress=False, **way)
        for name, space in spaces.items():
            worst = max(worst, abs(space.leak / expected[name].leak - 1))
    assert worst <= 1e-3, f"a leak is off by {worst:.2g}"
    return {"ways": len(ways), "largest_difference_of_a_leak": worst}


def methods(device: Any) -> dict[str, Any]:
    """`inject_adapters` by every method: outputs stay what they were."""
    import tempfile

    import torch
    from peft import LoraConfig

    from nullspace import compute_covariances
    from nullspace.integrations.peft import METHODS, inject_adapters

    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, batches = _model_and_batches(device)
        covariances = compute_covariances(model, batches, Path(folder, "all"), progress=False)
        preserve = compute_covariances(model, batches[:2], Path(folder, "keep"), progress=False)
        for name, method in METHODS.items():
            model, batches = _model_and_batches(device)
            with torch.no_grad():
                before = model(**batches[0]).logits
            sources = {"covariances": covariances} if {"covariances", "spaces"} & set(method.needs) else {}
            sources |= {"preserve": preserve} if "preserve" in method.needs else {}
            adapted = inject_adapters(model, LoraConfig(r=4, lora_alpha=4), method=name, **sources)
            with torch.no_grad():
                after = adapted(**batches[0]).logits
            keep = batches[0]["attention_mask"].bool()
            worst[name] = float((after - before)[keep].norm() / before[keep].norm())
    assert max(worst.values()) <= 1e-3, worst
    return worst


def doors(device: Any) -> dict[str, Any]:
    """PEFT's two functions, in ours."""
    import torch
    from peft import EvaConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig

    from nullspace.integrations.peft import get_eva_state_dict, preprocess_corda

    model, batches = _model_and_batches(device)

    def run_model() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    targets = ["q_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    preprocess_corda(model, config, run_model=run_model)
    get_peft_model(model, config)
    model, batches = _model_and_batches(device)
    eva = LoraConfig(r=4, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig())
    factors = get_eva_state_dict(model, batches, eva, show_progress_bar=False)
    assert all(torch.isfinite(factor).all() for factor in factors.values())
    return {"eva_layers": len(factors)}


CHECKS: tuple[Callable[[Any], dict[str, Any]], ...] = (
    launches,
    exact_products,
    selected_rows,
    grouped_products,
    real_products,
    an_update_without_a_wait,
    solvers,
    strategies,
    methods,
    doors,
)


def rows_of(device: str) -> Iterator[dict[str, Any]]:
    """All checks, each whatever the others say."""
    import torch

    for check in CHECKS:
        began = time.perf_counter()
        try:
            row: dict[str, Any] = {"ok": True, **check(torch.device(device))}
        except Exception as error:
            row = {"ok": False, "failed": f"{type(error).__name__}: {error}"[:500]}
        yield {"check": check.__name__.replace("_", " "), "seconds": time.perf_counter() - began, **row}


def by_pytest(seconds: float, marks: str = "gpu") -> dict[str, Any]:
    """The tests with these marks, within a time limit: how many passed, and the names of those that did not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        arguments = ["-q", "-m", marks, f"--junitxml={report}", "-p", "no:cacheprovider", *workers, *TESTS]
        began = time.perf_counter()
        done = run_limited([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, timeout=seconds)
        if done.returncode is None:
            return {"tests": None, "failed": f"not done in {seconds:.0f} s", "last_output": done.stdout[-400:]}
        if not report.exists():
            return {"tests": None, "failed": (done.stdout + done.stderr)[-500:]}
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = {
        f"{c.get('classname')}::{c.get('name')}": c for c in cases if c.find("failure") is not None or c.find("error") is not None
    }
    why = {
        name: str((c.find("failure") if c.find("failure") is not None else c.find("error")).get("message"))[:200]
        for name, c in bad.items()
    }
    skipped = sum(c.find("skipped") is not None for c in cases)
    row = {"tests": len(cases) - skipped, "skipped": skipped, "seconds": time.perf_counter() - began}
    return {**row, "ok": not bad, **({"failed": f"{len(bad)} tests", "which": why} if bad else {})}


def run(command: Command) -> None:
    """The program's own checks, then pytest's."""
    device = command.options.device
    arguments = ["--out", str(command.options.out), "--device", device, "--run", "checks"]
    for row in lines_of(__spec__.name, arguments, timeout=min(CHILD_SECONDS, command.left)):
        command.add(**row)
    absent = [check.__name__.replace("_", " ") for check in CHECKS[len(command.rows) :]]
    if absent:
        command.leave_out(", ".join(absent), "the checks before did not end")
    if command.dry:
        command.leave_out("pytest -m gpu", "a dry run")
    elif importlib.util.find_spec("pytest") is None:
        command.leave_out("pytest -m gpu", "pytest is not installed")
    elif command.has_time("pytest -m gpu", 60):
        command.add(check="pytest -m gpu", **by_pytest(command.left))
    command.measure("checks", len(command.failed) + len(absent))


def main(argv: list[str] | None = None) -> None:
    options = options_of("check", __doc__, argv)
    if options.run:
        for row in rows_of(options.device):
            print(json.dumps(row), flush=True)
        return
    with Command("check", ANSWERS, options) as command:
        run(command)
    sys.exit(1 if command.failed else 0)


if __name__ == "__main__":
    main()
