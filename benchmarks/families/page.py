"""The page of the documentation that shows the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.families.records import SAME_OUTPUTS, SAME_SUMS, STEPS, Row

TITLES = {
    "language model": "Language models",
    "encoder": "Encoders (masked language models)",
    "multimodal": "Vision-language and audio-language models",
    "encoder–decoder": "Encoder–decoder models",
    "speech": "Speech models",
}
INTRODUCTION = """# Families

What nullspace does with each architecture of transformers. `python -m benchmarks.families --page docs/families.md` builds a tiny
model of every class that transformers' automatic classes know, from its configuration class with random weights, and takes it from
the calibration to an exported adapter. This page is made of the rows in `benchmarks/results/families.jsonl`, which have every
figure and message.

{environment}

## How to read it

| column | what it says |
|---|---|
| matrices | parameters in matrices at the default sizes of the configuration class, embeddings and output head aside |
| covered | the share of them that `targets="all-linear"` gives an adapter, of those in modules that the data reach |
| reached | the share in modules that the data, which are text, reach, where that is not all: other towers get no text |
| resident | the sums of `stream_covariances`, against X Xᵀ of plain hooks in float64 (≤ {sums}) |
| layerwise | the sums of a pass block by block, against those of resident (≤ {sums}) |
| start | `lora-null` by `inject_adapters`, rank 4: the change of the scores, relative to the largest (≤ {outputs}) |
| train | two steps of AdamW on A and B: the loss is finite, gradients reach the factors, the scores change |
| reload | `save_init`; the trained adapter, loaded by plain PEFT on the saved base: the same scores (≤ {outputs}) |
| export | `export_lora`; its result, loaded by plain PEFT on the untouched model: the same scores (≤ {outputs}) |

Models are in float64, where their class computes in it; otherwise in float32, and sums may differ by {rounded}. The batches have
padding on the right and, for decoders, on the left; one has none.

`✓` is within the limit. `refused` means that nullspace has said, by an error that names the layer or the class, that it does not do
this; the message is below the table. `wrong` and `failed` are errors of nullspace or of a library below it. An empty cell is a step
that was not reached. What the text does not reach, and what is no matrix product, is left out of `"all-linear"` with one warning
that names it. Names of layers have `#` for all numbers.
"""


def page_of(environment: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Markdown: an introduction, a table for each kind with its notes, and the classes that could not be built."""
    built = [row for row in rows if row.get("built")]
    parts = [
        INTRODUCTION.format(
            environment=_environment(environment, rows),
            sums=_limit(SAME_SUMS["float64"]),
            rounded=_limit(SAME_SUMS["float32"]),
            outputs=_limit(SAME_OUTPUTS),
        ),
        _summary(built),
    ]
    for kind, title in TITLES.items():
        own = sorted((row for row in built if row["kind"] == kind), key=lambda row: (row["family"].lower(), row["class"]))
        if own:
            parts.append(_section(title, own))
    parts.append(_unbuilt([row for row in rows if not row.get("built")]))
    return "\n".join(parts).rstrip() + "\n"


def _limit(value: float) -> str:
    digits, power = f"{value:.0e}".split("e")
    raised = f"10{str(int(power)).translate(SUPERSCRIPTS)}"
    return raised if digits == "1" else f"{digits} · {raised}"


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _environment(environment: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Versions and machine, in a sentence."""
    named = ", ".join(f"{name} {environment['versions'][name]}" for name in ("transformers", "peft", "torch"))
    commits = ", ".join(sorted({row["commit"][:7] for row in rows}))
    return f"{named}; {environment['cpu']}, {environment['cores']} cores; nullspace at {commits}."


def _summary(built: Sequence[Row]) -> str:
    """How many classes have which result."""
    lines = ["## In short", "", "| | " + " | ".join(STEPS) + " |", "|---|" + "---:|" * len(STEPS)]
    counts = {name: Counter(row[name]["result"] for row in built if name in row) for name in STEPS}
    for result, label in (("ok", "✓"), ("refused", "refused"), ("wrong", "wrong"), ("failed", "failed")):
        lines.append(f"| {label} | " + " | ".join(str(counts[name][result]) for name in STEPS) + " |")
    whole = sum(row.get("share", 0.0) >= 0.99 for row in built)
    return "\n".join([*lines, "", f"{len(built)} classes; {whole} have 99 % or more of their matrices covered.", ""])


def _section(title: str, rows: Sequence[Row]) -> str:
    lines = [f"## {title}", "", "| family | class | matrices | covered | reached | " + " | ".join(STEPS) + " |"]
    lines.append("|---|---|---:|---:|---:|" + "---|" * len(STEPS))
    notes: dict[str, list[str]] = {}
    for row in rows:
        lines.append(_line(row))
        for note in _notes(row):
            notes.setdefault(note, []).append(row["class"])
    if notes:
        lines += ["", "Notes:", ""]
        lines += [f"- {', '.join(f'`{name}`' for name in names)}: {note}" for note, names in notes.items()]
    return "\n".join([*lines, ""])


def _line(row: Row) -> str:
    share, reached = row.get("share"), row.get("reached")
    cells = [
        f"`{row['family']}`",
        f"`{row['class']}`",
        _count(row.get("matrices")),
        "" if share is None else _percent(share),
        "" if reached is None or reached >= 0.9995 else _percent(reached),
        *(_cell(row.get(name)) for name in STEPS),
    ]
    return "| " + " | ".join(cells) + " |"


def _cell(step: Mapping[str, Any] | None) -> str:
    if step is None:
        return ""
    result: str = step["result"]
    return "✓" if result == "ok" else f"{result} ({step['error']:.0e})" if "error" in step else result


def _count(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.9995 else "100 %"


def _notes(row: Row) -> list[str]:
    """What is to be said of a row: refusals and other messages, and what is left out of what the data reach."""
    notes = [f"{name}: {_plain(row[name]['message'], row)}" for name in STEPS if "message" in row.get(name, {})]
    if "padding" in row:
        notes.append(f"padded batches: {_plain(row['padding'], row)}")
    if row.get("without_gradient"):
        layers = sorted({_layer_of(name) for name in row["without_gradient"]})
        notes.append(f"train: no gradient reaches {', '.join(f'`{name}`' for name in layers[:4])}{' …' * (len(layers) > 4)}")
    if row.get("share", 1.0) < 0.99:
        left = ", ".join(f"`{name}` ({_percent(share)})" for name, share in row["left_out"].items())
        notes.append(f"left out: {left}")
    return notes


def _layer_of(factor: str) -> str:
    """The layer of a factor, by its name in a `PeftModel`."""
    return factor.removeprefix("base_model.model.").partition(".lora_")[0]


def _plain(message: str, row: Row) -> str:
    """A message for a cell of Markdown, the same for all classes and folders that get it."""
    text = re.sub(r"/tmp/\S*?/(?=\w)", "", message).replace(row["class"], "the class")
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _unbuilt(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = ["## Not built", "", "The sizes of these classes, or the inputs that they need, are not known to the builder.", ""]
    lines += [f"- `{row['class']}`: {_plain(row.get('message') or row.get('failed', ''), row)[:160]}" for row in rows]
    return "\n".join(lines)
