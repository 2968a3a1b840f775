"""The first half hour on a GPU, without one: options, results of runs that are cut, verdicts, and the parts that need no kernel."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks.first_gpu", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import children, gpu_models
from benchmarks.first_gpu import __main__ as all_of_them
from benchmarks.first_gpu import command, job, kernels, profile, solvers
from benchmarks.spans import Spans

FOLDER = Path(command.__file__).parent


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` sets both; they are restored."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def dry(name: str, out: Path, *more: str) -> command.Command:
    return command.Command(name, ["a question?"], command.options_of(name, "", ["--out", str(out), "--device", "cpu", *more]))


def result_of(name: str, out: Path) -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.parametrize("name", all_of_them.COMMANDS)
def test_each_command_says_what_it_answers_and_stands_in_the_readme(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.first_gpu.{name}")
    assert module.ANSWERS
    assert all(line.endswith("?") for line in module.ANSWERS)
    assert f"python -m benchmarks.first_gpu.{name} --out FOLDER" in module.__doc__
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--out", "--seconds", "--device"))
    with pytest.raises(SystemExit):
        module.main([])  # without a folder
    options = command.options_of(name, "", ["--out", "somewhere"])
    assert (options.device, options.seconds) == ("cuda", command.SECONDS)
    readme = (FOLDER / "README.md").read_text()
    places = [readme.index(f"`python -m benchmarks.first_gpu.{each} --out OUT`") for each in all_of_them.COMMANDS]
    assert places == sorted(places)


def test_goals_belong_to_commands_and_none_takes_nine_minutes() -> None:
    assert {goal.command for goal in command.GOALS.values()} <= set(all_of_them.COMMANDS)
    assert command.SECONDS < 540
    options = all_of_them.parser_of().parse_args(["--dry-run", "--seconds", "30"])
    for name in options.only:
        arguments = all_of_them.arguments_of(name, options, Path("out"))
        assert arguments[1:] == ["-m", f"benchmarks.first_gpu.{name}", "--out", "out", "--seconds", "30", "--device", "cpu"]


def test_the_result_is_whole_after_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    def rows_until_cut() -> None:
        with dry("sums", tmp_path) as run:
            for number in range(3):
                run.add(number=number)
                assert [row["number"] for row in result_of("sums", tmp_path)["rows"]] == list(range(number + 1))
                assert result_of("sums", tmp_path)["state"] == "begun"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows_until_cut()
    result = result_of("sums", tmp_path)
    assert result["state"].startswith("ended by KeyboardInterrupt")
    assert len(result["rows"]) == 3
    assert result["environment"]["versions"]["torch"]
    assert "a question?" in capsys.readouterr().out


def test_what_does_not_fit_into_the_time_is_named(tmp_path: Path) -> None:
    with dry("sums", tmp_path, "--seconds", "10") as run:
        assert run.has_time("little", 1)
        assert not run.has_time("much", 1000)
    (left_out,) = result_of("sums", tmp_path)["left_out"]
    assert left_out.startswith("much: takes about 1000 s")


def test_without_a_device_nothing_is_begun(tmp_path: Path) -> None:
    run = command.Command("sums", [], command.options_of("sums", "", ["--out", str(tmp_path)]))
    with pytest.raises(SystemExit, match="no CUDA device here: --device cpu"):
        run.__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "least", "most"), [(None, "not measured", "not measured"), (1.0, "missed", "met"), (3.0, "met", "missed")]
)
def test_verdicts(value: float | None, least: str, most: str) -> None:
    assert command.Goal("x", 2, True, "sums").verdict(value) == least
    assert command.Goal("x", 2, False, "sums").verdict(value) == most


def test_only_variants_that_lose_little_count(tmp_path: Path) -> None:
    rows = [
        {"variant": "default", "delta, 1 launches": 1e-8, "delta, 4 launches": 2.5e-8},
        {"variant": "fast", "delta, 1 launches": 9e-8, "delta, 4 launches": 2e-8},
        {"variant": "default", "d": 4096, "tokens": 16384, "over cuBLAS": 1.6},
        {"variant": "default", "d": 4096, "tokens": 8192, "over cuBLAS": 9.0},
        {"variant": "fast", "d": 4096, "tokens": 16384, "over cuBLAS": 2.0},
        {"variant": "wrong", "failed": "not done in 75 s"},
    ]
    with dry("kernels", tmp_path) as run:
        for row in rows:
            run.add(**row)
        run.dry = False
        kernels.judge(run)
    goals = result_of("kernels", tmp_path)["goals"]
    assert (goals["kernel 4096"]["value"], goals["kernel 4096"]["verdict"]) == (1.6, "met")
    assert goals["kernel 14336"]["verdict"] == "not measured"
    assert (goals["resolution"]["value"], goals["resolution"]["verdict"]) == (2.5e-8, "met")


def test_the_solvers_run_at_a_tiny_size(tmp_path: Path) -> None:
    with dry("solvers", tmp_path) as run:
        solvers.run(run)
    rows = result_of("solvers", tmp_path)["rows"]
    assert {row["what"] for row in rows} == {"small eigenproblem", "solver", "part", "several at once", "tuning"}
    assert all(row["residual"] <= 1e-12 for row in rows if "residual" in row)
    assert all(abs(row["excess"]) <= 1e-9 for row in rows if "excess" in row)
    assert not any("failed" in row for row in rows)
    goals = result_of("solvers", tmp_path)["goals"]
    assert goals["solver 14336"]["value"] is None
    assert goals["excess"]["verdict"] == "not judged: a dry run"


def test_the_whole_depth_is_run_if_there_is_time_and_named_if_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def child(module: str, arguments: list[str], *, timeout: float) -> dict[str, Any]:
        variant, blocks = arguments[1], arguments[arguments.index("--blocks") + 1]
        asked.append((variant, blocks))
        seconds = {"forward": 1.0, "sums-layerwise": 1.5}.get(variant, 1.8) * int(blocks)
        return {
            "variant": variant,
            "blocks": int(blocks),
            "seconds": seconds,
            "peak_gb": 20.0,
            "peak_above_weights_gb": 4.5,
            "wall": 1.0,
        }

    monkeypatch.setattr(gpu_models, "run_child", child)
    for seconds, whole in (("500", True), ("100", False)):
        asked.clear()
        with dry("job", tmp_path, "--seconds", seconds) as run:
            run.dry = False
            job.run(run)
        result = result_of("job", tmp_path)
        assert (("layerwise-device", "32") in asked) == whole
        assert any("all 32 blocks" in text for text in result["left_out"]) != whole
        assert result["goals"]["job"]["value"] == pytest.approx(1.8)
        assert result["goals"]["peak"]["verdict"] == "met"
        parts = result["rows"][-1]["summary"]["layerwise-device"]["parts_s"]
        assert list(parts.values()) == pytest.approx([2.0, 1.0, 0.6])


def test_counters_are_read_from_the_profilers_table() -> None:
    text = '==PROF== Connected\n"ID","Kernel Name","lts__t_sectors.sum"\n"","","sector"\n"0","_syrk","12,345"\n'
    assert profile.metrics_of(text) == {"ID": "0", "Kernel Name": "_syrk", "lts__t_sectors.sum": "12,345 sector"}
    assert profile.metrics_of("==ERROR== no permission") == {}


@pytest.mark.processes
def test_what_a_hanging_child_printed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stuck.py").write_text(
        "import time\nprint('{\"row\": 1}', flush=True)\nprint('not JSON', flush=True)\ntime.sleep(60)\n"
    )
    (tmp_path / "broken.py").write_text("print('{\"row\": 2}', flush=True)\nraise SystemExit('why')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert list(children.lines_of("stuck", [], timeout=0.5)) == [{"row": 1}, {"failed": "not done in 0 s"}]
    assert list(children.lines_of("broken", [], timeout=30)) == [{"row": 2}, {"failed": "why"}]
    assert children.seconds_since_start() > 0


def test_spans_leave_functions_as_they_were() -> None:
    class Owner:
        def double(self, x: int) -> int:
            return 2 * x

    original = Owner.double
    spans = Spans(part=(Owner, "double"))
    with contextlib.suppress(ZeroDivisionError), spans:
        assert Owner().double(2) == 4
        assert Owner().double(3) == 6
        raise ZeroDivisionError
    assert Owner.double is original
    assert spans.calls() == {"part": 2}
    assert spans.seconds()["part"] >= 0
