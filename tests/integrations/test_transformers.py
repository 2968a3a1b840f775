"""Models from folders and GGUF files; texts from every kind of file; packing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

from models import tiny
from nullspace.integrations.transformers import PackedBatches, load_model, load_texts

ROWS = [{"question": f"What is {i}?", "answer": [f"It is {i}.", "other"], "text": f"text {i}"} for i in range(5)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"data.{kind}", ROWS)
    assert load_texts(path) == [row["text"] for row in ROWS]
    assert load_texts(path, field="question,answer") == [f"What is {i}?\nIt is {i}." for i in range(5)]
    assert load_texts(path, field="answer", limit=2) == ["It is 0.", "It is 1."]


def test_csv_and_plain_text(tmp_path: Path) -> None:
    assert load_texts(write(tmp_path / "a.csv", [{"prompt": "p", "completion": "c"}])) == ["p\nc"]
    (tmp_path / "a.txt").write_bytes("First.\r\n\r\n  \n\nSecond,\nhere: é.\n".encode())
    assert load_texts(tmp_path / "a.txt") == ["First.", "Second,\nhere: é.\n"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": "q", "answer": "a"}, "q\na"),
        ({"instruction": "i", "input": "", "output": "o"}, "i\no"),
        ({"prompt": "p", "response": "r"}, "p\nr"),
        ({"problem": "p", "solution": "s", "level": 3}, "p\ns"),
        ({"question": "q", "answer": []}, "q"),
    ],
)
def test_known_pairs_are_joined(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    assert load_texts(write(tmp_path / "a.jsonl", [row])) == [text]


@pytest.mark.parametrize(
    ("name", "content", "field", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', None, "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["x"]\n', None, "a.jsonl, line 1: expected an object"),
        ("a.jsonl", b'{"body": "x", "title": "y"}\n', None, "no field that is known to be text; its fields are body, title"),
        ("a.jsonl", b'{"body": "x"}\n', "txt", "no field 'txt'; its fields are body"),
        ("a.jsonl", b"", None, "holds no text"),
        ("a.txt", b"\n\n \n", None, "holds no text"),
        ("a.txt", b"\xff\xfe\x00", None, "a.txt is not UTF-8"),
        ("a.parquet", b"PAR1 but not really", None, "a.parquet cannot be read as parquet"),
    ],
)
def test_bad_data_is_an_error_that_names_the_file(name: str, content: bytes, field: str | None, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_texts(tmp_path / name, field=field)


def test_a_missing_file_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_texts(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_model(tmp_path / "none.gguf")


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)


def test_packing_lays_texts_end_to_end_and_masks_only_what_they_do_not_fill(tokenizer: Any) -> None:
    texts = ["abcde", "fg", "hijklmnop"]
    with pytest.warns(UserWarning, match="fill 3 of 5 samples of 8 tokens"):
        batches = PackedBatches(texts, tokenizer, samples=5, length=8, batch_size=2)
    joined = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    mask = torch.cat([batch["attention_mask"] for batch in batches])
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert len(batches) == 2
    assert ids[mask.bool()].tolist() == joined
    assert batches.tokens == len(joined) == int(mask.sum())
    assert mask[:-1].all()


def test_packing_stops_at_the_samples_asked_for(tokenizer: Any) -> None:
    def endless() -> Any:
        while True:
            yield "some words"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = PackedBatches(endless(), tokenizer, samples=3, length=16, batch_size=2)
    assert torch.cat([batch["input_ids"] for batch in batches]).shape == (3, 16)
    assert all(batch["attention_mask"].all() for batch in batches)


@pytest.mark.parametrize("sizes", [{"samples": 0}, {"length": 0}, {"batch_size": -1}])
def test_sizes_must_be_positive(sizes: dict[str, int], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be at least 1"):
        PackedBatches(["x"], tokenizer, **sizes)
    with pytest.raises(ValueError, match="no token"):
        PackedBatches([], tokenizer)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_the_class_is_the_one_that_the_checkpoint_names(family: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = tiny(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert load_model(tmp_path, dtype="float32", device="cpu")[0].dtype == torch.float32


def test_a_gguf_model_is_an_ordinary_one_after_loading(smollm2: Path) -> None:
    """The fixture is made by `load_model` of the GGUF file and `save_pretrained`, which refuses a model with a quantiser."""
    model, tokenizer = load_model(smollm2, device="cpu")
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())
    assert model.dtype == torch.float32
    with torch.no_grad():
        ids = tokenizer("The capital of France is", return_tensors="pt")
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"
