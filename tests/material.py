"""What examples are run with: tiny models in folders, and small data in the forms that they take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


class Material(NamedTuple):
    """Folders of models, and files."""

    model: str
    mixture: str
    chats: str
    more: str
    pairs: str
    questions: str
    keep: str


def write_material(folder: Path, checkpoint: Path, prose: list[str]) -> Material:
    """Write them into a folder.

    Args:
        checkpoint: of a tiny model with a tokenizer.
        prose: at least 32 texts.
    """
    model, mixture = folder / "model", folder / "mixture"
    shutil.copytree(checkpoint, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(model, mixture, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, **experts)).save_pretrained(mixture)

    def write(name: str, rows: list[Mapping[str, Any]]) -> str:
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder / f"{name}.jsonl")

    question, answers = {"role": "user", "content": "What is this?"}, [text[:200] for text in prose[:16]]
    said = [{"role": "assistant", "content": answer} for answer in answers]
    pairs = zip(said[:8], said[8:], strict=True)
    return Material(
        str(model),
        str(mixture),
        write("chats", [{"messages": [question, answer]} for answer in said[:8]]),
        write("more", [{"messages": [question, {**answer, "content": answer["content"][::-1]}]} for answer in said[8:]]),
        write("pairs", [{"prompt": [question], "chosen": [good], "rejected": [bad]} for good, bad in pairs]),
        write("questions", [{"question": question["content"], "answer": answer} for answer in answers]),
        write("keep", [{"question": question["content"], "answer": text[:400]} for text in prose[16:32]]),
    )
