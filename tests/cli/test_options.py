"""Every option of every command, beside every source: it has an effect, or it is refused by name before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer
from typer.main import get_command
from typer.testing import CliRunner

from nullspace.artifacts.residual import RESIDUALS
from nullspace.calibration import hidden_states
from nullspace.calibration.run import STRATEGIES
from nullspace.cli import COMMANDS, app
from nullspace.cli.options import declared
from nullspace.integrations.transformers import positions
from nullspace.methods import METHODS
from nullspace.moments.precision import PRECISIONS
from nullspace.planning import plan

INSTALLED: Any = get_command(app)
DECLARED = {command.__name__: {name: option for name, (_, option) in declared(command).items()} for command in COMMANDS}
OF_FORM = {"skip", "shuffle", "as_chat", "template", "system"}
OF_DATA = {*OF_FORM, "samples", "length", "batch_size", "precision", "experts", "strategy", "hidden_states", "fresh", "timeout"}
OF_LOADING, OF_RUNNING = {"revision", "trust_remote_code"}, {"device", "device_map", "attn"}
OF_MODEL = {"targets", "exclude", "dtype", "offload", "load_in_4bit", "load_in_8bit", *OF_RUNNING, *OF_LOADING}
OF_ROWS, OF_HUB = {"field"}, {"split"}
OF_TEXT = {*OF_FORM, "samples", "length", "batch_size", *OF_ROWS, *OF_HUB}
ALL_OF_DATA = OF_DATA | OF_ROWS | OF_HUB
NUMBERS = {"sigma_scale", "beta", "damping", "share", "factor_split", "window", "preserve"}
ALL = {"all_rows"}
UNTOUCHED = {"avoid", "spectrum", "residual"}  # methods that leave the base alone, and compute no null space
OF_NULL, OF_CORDA, OF_WINDOW = {"sigma_scale", "factor_split"}, {"damping", "factor_split"}, {"factor_split", "window"}

# (command, its source) → the options that have no effect there. Paths do not exist: nothing may be looked at before the options.
SOURCES: dict[tuple[str, str], set[str]] = {
    ("init", "MODEL --data a.txt"): {*OF_ROWS, *OF_HUB, "partial", *NUMBERS - OF_NULL},
    ("init", "MODEL --data a.md --method b-zero"): {*OF_ROWS, *OF_HUB, "partial", "residual", "freeze_b", *NUMBERS},
    ("init", "MODEL --data a.jsonl"): {*OF_HUB, "partial", *NUMBERS - OF_NULL},
    ("init", "MODEL --data a.parquet --method eva"): {*ALL, *OF_HUB, "partial", "freeze_b", *UNTOUCHED, *NUMBERS},
    ("init", "MODEL --data some/set --method corda-kpm"): {*ALL, "partial", "avoid", "spectrum", *NUMBERS - OF_CORDA},
    ("init", "MODEL --data set:part --strategy resident"): {"hidden_states", "partial", *NUMBERS - OF_NULL},
    ("init", "MODEL --spaces s"): {*ALL_OF_DATA, "partial", "avoid", "spectrum", *NUMBERS - OF_NULL},
    ("init", "MODEL --covariances c"): {*ALL_OF_DATA, *NUMBERS - OF_NULL},
    ("init", "MODEL --covariances c --method corda-ipm"): {*ALL, *ALL_OF_DATA, "avoid", "spectrum", *NUMBERS - OF_CORDA},
    ("init", "MODEL --covariances c --method corda-exact"): {*ALL, *ALL_OF_DATA, "avoid", "spectrum", *NUMBERS - OF_WINDOW},
    ("init", "MODEL --data a.csv --method sc-lora --preserve p"): {
        *ALL, *OF_HUB, "avoid", "spectrum", "sigma_scale", "damping", "share", "window",
    },
    ("init", "MODEL --covariances c --method contrast --preserve p"): {
        *ALL, *ALL_OF_DATA, *UNTOUCHED, *OF_NULL, "beta", "share", "window", "freeze_b",
    },
    ("init", "MODEL --covariances c --method inflora --preserve p"): {
        *ALL, *ALL_OF_DATA, *UNTOUCHED, *NUMBERS - {"share", "preserve"}, "rank_budget", "freeze_b",
    },
    ("init", "MODEL --covariances c --method mica-data"): {*ALL, *ALL_OF_DATA, "freeze_a", *UNTOUCHED, *NUMBERS},
    ("init", "MODEL --method pissa"): {*ALL, *ALL_OF_DATA, "partial", "avoid", "spectrum", *NUMBERS - {"factor_split"}},
    ("init", "MODEL --method orthogonal"): {*ALL, *ALL_OF_DATA, "partial", "rank_budget", *UNTOUCHED, *NUMBERS},
    ("compute", "MODEL --data a.json"): {*OF_HUB, "partial"},
    ("compute", "MODEL --data a.txt --strategy resident"): {*OF_ROWS, *OF_HUB, "hidden_states", "partial"},
    ("compute", "--covariances c"): {*ALL_OF_DATA, *OF_MODEL},
    ("covariances", "MODEL --data a.txt"): {*OF_ROWS, *OF_HUB},
    ("covariances", "MODEL --data some/set"): set(),
    ("covariances", "MODEL --data a.txt --data a.jsonl"): {*OF_HUB},
    ("covariances", "MODEL --data a.txt --device-map auto"): {*OF_ROWS, *OF_HUB, "device", "offload"},
    ("merge", "c d"): set(),
    ("inspect", "d"): set(),
    ("report", "--covariances c"): {"held_out", "task", "offload", *OF_LOADING},
    ("report", "--spaces s --model m"): {"task"},
    ("report", "--adapter x=a,b"): {"task", "offload", *OF_LOADING},
    ("report", "--covariances c --adapter x=a,b"): {"offload", *OF_LOADING},
    ("report", "--study s"): {"model", "held_out", "task", "offload", *OF_LOADING},
    ("filter", "a --task t --keep k"): {"strength", "drift", "retain", "overwrite", *OF_RUNNING, *OF_TEXT},
    ("filter", "a --task-data a.jsonl --keep k"): {"strength", "drift", "retain", "overwrite", "split"},
    ("filter", "a --task-data some/set --keep-data a.txt --out o --strength 1"): set(),
    ("filter", "a b --task t --keep k --out o --drift 1"): {"base", "initial", "adapter_name", *OF_RUNNING, *OF_LOADING, *OF_TEXT},
    ("combine", "a b --task t --keep k --strength 1"): set(),
    ("verify", "a --keep k --drift 1"): set(),
    ("export", "t --initial i"): {"covariances"},
    ("export", "t --initial i --rank 3"): set(),
    ("plan", "MODEL"): set(),
    ("plan", "MODEL --device cpu"): {"device_memory", "gpu"},
    ("demo", ""): set(),
}  # fmt: skip
# What is given for an option that wants a value, where the default's own text is none that could be typed.
VALUES = {
    "skip": "1", "shuffle": "1", "template": "{{ messages }}", "system": "s",
    "revision": "main", "device_map": "auto", "attn": "eager",
    "device": "cpu", "field": "text", "alpha": "4", "preserve": "p", "avoid": "a", "spaces": "s", "covariances": "c", "study": "s",
    "data": "a.txt", "shard": "1/2", "weights": "1,1", "model": "m", "adapter": "x=a", "initial": "i", "base": "b", "out": "o",
    "exclude": "lm_head", "window": "0.5", "strength": "1", "drift": "1", "worst": "1", "retain": "1", "task": "t", "rank": "4",
    "rank_budget": "4",
    "task_data": "a.txt", "keep_data": "a.txt", "adapter_name": "n", "device_memory": "8GB", "gpu": "L4", "host_memory": "8GB",
}  # fmt: skip
OTHERS = {"plan": {"weights": "host"}, "filter": {"keep": "k"}}
NO_OUT = ("inspect", "plan", "verify", "filter")


def exit_code(command: str, *arguments: str) -> int:
    """As `CliRunner` does, which looks at the signatures of all commands every time."""
    installed = INSTALLED.commands[command]
    try:
        with installed.make_context(command, list(arguments)) as context:
            installed.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def parameters(command: str) -> dict[str, Any]:
    return {each.name: each for each in INSTALLED.commands[command].params if each.name not in ("help", "debug", "verbose")}


def flag(command: str, name: str) -> str:
    return DECLARED[command][name].flags(name)[0]


def test_every_option_is_declared_once() -> None:
    assert list(DECLARED) == list(INSTALLED.commands)
    for command, options in DECLARED.items():
        assert list(options) == list(parameters(command))
        for name, each in parameters(command).items():
            assert tuple(each.opts) == (options[name].flags(name) or (name,))


def test_the_choices_of_the_command_line_are_those_of_the_library() -> None:
    """They are written twice, since the library imports torch, and the help is not to wait for it."""
    known = {
        "experts": plan.EXPERTS,
        "hidden_states": hidden_states.PLACES,
        "method": tuple(METHODS),
        "precision": PRECISIONS,
        "residual": RESIDUALS,
        "strategy": STRATEGIES,
    }
    for command, options in DECLARED.items():
        for name in known.keys() & options.keys():
            assert options[name].check == known[name], (command, name)


def test_the_help_has_groups_and_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command, panels in {"init": ["Data", "Adapter", "Layers and sums", "Model and run", "Output"], "plan": ["Machine"]}.items():
        shown = CliRunner().invoke(app, [command, "--help"]).stdout
        assert [title for title in panels if f"╭─ {title} ─" in shown] == panels
        words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
        for name, option in DECLARED[command].items():
            if isinstance(option.check, tuple):
                assert f"One of: {', '.join(option.check)}." in words, name


def test_every_command_has_a_source_here() -> None:
    assert {command for command, _ in SOURCES} == set(DECLARED)
    for (command, _), refused in SOURCES.items():
        assert refused <= set(DECLARED[command])


@pytest.mark.parametrize(("command", "source"), SOURCES)
def test_every_option_has_an_effect_or_is_refused(
    command: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {part for part in (*source.split(), "a.txt") if part.startswith("a.")}
    for file in files:
        Path(file).touch()
    ran: list[str] = []

    @contextlib.contextmanager
    def not_run(minutes: float | None) -> Iterator[bool]:
        ran.append(command)
        yield False

    monkeypatch.setattr("nullspace.cli.together.joined", not_run)
    given = source.split()
    for name, each in parameters(command).items():
        if each.param_type_name != "option" or flag(command, name) in given:
            continue
        option = [flag(command, name)]
        if not each.is_flag:
            option.append({**VALUES, **OTHERS.get(command, {})}.get(name) or str(each.default))
        out = [] if name == "out" or command in NO_OUT or "--out" in given else ["--out", "o"]
        ran.clear()
        code = exit_code(command, *given, *option, *out)
        said = capsys.readouterr().err
        if name in SOURCES[command, source] or (name == "weights" and "data" in DECLARED[command] and source.count("--data") < 2):
            assert code == 2, (option, said)
            assert f"error: {flag(command, name)} belongs to " in said
            assert not ran
        else:
            assert code == 0, (option, said)
            assert ran
    assert {path.name for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *((f"init m --method pissa --alpha {value}", "--alpha must be a positive number") for value in ("0", "nan", "inf", "-4")),
        ("init m --method pissa --rank 4 --rank-budget 5", "--rank-budget must be between 1 and 4, not 5 (--rank"),
        ("init m --method pissa --rank-budget 0", "--rank-budget must be at least 1"),
        *((f"init m --data a.txt --sigma-scale {value}", "--sigma-scale must be") for value in ("0", "nan", "inf", "-1")),
        *((f"init m --method pissa --factor-split {value}", "--factor-split must be") for value in ("0", "nan", "inf", "-1")),
        *((f"init m --data a --method sc-lora --preserve p --beta {v}", "--beta must be between") for v in ("nan", "-1", "1.5")),
        *((f"init m --data a --method corda-kpm --damping {v}", "--damping must be a number ≥ 0") for v in ("nan", "inf", "-1")),
        ("compute m --data a.txt --timeout inf", "--timeout must be a positive number"),
        *((f"compute m --data a.txt --{n} 0", f"--{n} must be at least 1") for n in ("samples", "length", "batch-size", "rank")),
        ("covariances m --data a.txt --precision banana", "--precision must be one of 'auto', 'mixed', 'fp64', 'qr', not 'banana'"),
        ("covariances m --data a.txt --strategy banana", "--strategy must be one of 'auto', 'resident', 'layerwise'"),
        ("covariances m --data a.txt --hidden-states banana", "--hidden-states must be one of 'auto', 'device', 'host', 'disk'"),
        ("covariances m --data a.txt --dtype float8", "--dtype must be one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ("covariances m --data a.txt --device tpu", "--device: device 'tpu' cannot be used here"),
        ("covariances m --data a.txt --shard 0/2", "--shard: a shard is written i/n"),
        ("covariances m --data a.txt --targets re:(", "--targets: '(' is not a regular expression"),
        ("covariances m --data a.txt --targets ,", "--targets: no layer is named in ','"),
        ("merge c --weights 1,nan", "--weights must be a positive number, not nan"),
        ("report --adapter x", "--adapter must be NAME=INITIAL"),
        ("plan m --gpu A1000", "--gpu: 'A1000' is none of T4, L4"),
        ("plan m --device-memory much", "--device-memory: 'much' is no size"),
        ("plan m --device tpu", "--device must be one of 'cuda', 'cpu'"),
        ("plan m --weights moon", "--weights must be one of 'device', 'host', 'disk'"),
        ("init m --method banana", "--method must be one of 'lora-null', 'b-zero'"),
        ("init m --data none.jsonl", "--data: none.jsonl is not a file"),
        ("init m --data a.txt --data none.jsonl", "--data: none.jsonl is not a file"),
        *((f"init m --data a.txt --data b --weights {v}", "--weights must be a positive number") for v in ("1,0", "1,-1", "nan,1")),
        ("init m --data a.txt --data b --weights half", "--weights must be numbers with commas between them, not 'half'"),
        ("init m --data a.txt --data b --weights 1,2,3", "weights must be one a data set: 3 for 2"),
        ("init m --data a.txt --data a.txt", "a.txt is given twice"),
        ("init m --data a.txt --template none.jinja", "template 'none.jinja' is neither a file nor a Jinja template"),
        ("init m --data a.txt --skip -1", "--skip must be at least 0"),
        ("init m --data a.txt --shuffle -1", "--shuffle must be at least 0"),
        ("demo --rank 0", "--rank must be at least 1"),
    ],
)
def test_a_bad_value_is_refused_by_the_options_name(
    command: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").touch()
    out = [] if command.startswith("plan") else ["--out", "o"]
    result = CliRunner().invoke(app, [*command.split(), *out])
    assert result.exit_code == 2, result.output
    assert f"error: {words}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


POSITIONS = 32
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_positions": POSITIONS},
    "opt": {"model_type": "opt", "max_position_embeddings": POSITIONS},
    "llama": {"model_type": "llama", "max_position_embeddings": POSITIONS},
    "gemma3": {"model_type": "gemma3_text", "max_position_embeddings": POSITIONS},
    "llama, scaled": {
        "model_type": "llama",
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8},
    },
}


@pytest.mark.parametrize(
    ("command", "kind"), [*(("covariances", kind) for kind in CONFIGURATIONS), *((c, "gpt2") for c in ("init", "compute", "plan"))]
)
def test_sequences_longer_than_the_models_positions_are_refused_before_weights_are_looked_for(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIGURATIONS[kind]))
    Path("a.txt").write_text("text")
    of_data = [] if command == "plan" else ["--data", "a.txt", "--out", "o"]
    lengths = [POSITIONS + 1] if command == "plan" else [POSITIONS + 1, POSITIONS]
    for length in lengths:
        said = length > POSITIONS
        result = CliRunner().invoke(app, [command, "model", *of_data, "--length", str(length)])
        assert (f"--length {length} is more than the {POSITIONS} positions that model has" in result.stderr) == said
        if said:
            assert result.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "model"]


def test_models_without_a_limit_have_none() -> None:
    unlimited = [
        transformers.T5Config(),
        transformers.BloomConfig(),
        transformers.MambaConfig(),
        transformers.FalconConfig(alibi=True),
        transformers.XLNetConfig(),
    ]
    assert [positions(config) for config in unlimited] == [None] * len(unlimited)
    assert positions(transformers.BartConfig(max_position_embeddings=12)) == 12
    extended = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    extended["original_max_position_embeddings"] = 8192
    assert positions(transformers.LlamaConfig(max_position_embeddings=131072, rope_parameters=extended)) == 131072
