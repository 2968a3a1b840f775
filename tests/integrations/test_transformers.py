"""Models from folders and GGUF files; texts from every kind of file; packing."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers

from models import FAMILIES, random_batches, tiny
from nullspace.integrations.transformers import (
    PackedBatches,
    drop_quantizer,
    empty_model,
    load_model,
    load_rows,
    load_texts,
    prompt_and_response,
)

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
    (tmp_path / "b.csv").write_bytes('\ufefftext,n\r\n"one, ""two""\nthree",007\r\n\r\nnull,1\r\n'.encode())
    assert load_texts(tmp_path / "b.csv") == ['one, "two"\nthree', "null"]
    assert load_texts(tmp_path / "b.csv", field="n") == ["007", "1"]  # text, as it stands there
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
        ({"query": "q", "response": "r"}, "q\nr"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p\nc"),
        ({"chosen": "c", "rejected": "r"}, "c"),
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
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', None, "a.jsonl is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 10**5, None, "a.jsonl, line 2: not JSON"),
        ("a.json", b"\xff\xfe", None, "a.json cannot be read as json"),
        ("a.csv", b'text,n\nx,1\n"y,2\n', None, "a.csv cannot be read as csv, row 2"),
        ("a.csv", b"text\nx\ny,2\n", None, "a.csv cannot be read as csv, row 2: it has more values"),
        ("a.csv", b"text\n\x1f\x8b\xff\n", None, "a.csv cannot be read as csv"),
        ("a.jsonl.gz", b"\x1f\x8b", None, r"a.jsonl.gz: data are read from files that end in \.txt"),
        ("a.parquet", b"PAR1 but not really", None, "a.parquet cannot be read as parquet"),
    ],
)
def test_bad_data_is_an_error_that_names_the_file(name: str, content: bytes, field: str | None, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_texts(tmp_path / name, field=field)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('\n\n[\n{"text": "a"}\n, null,\n{"other": "b"}]\n', ["a"]),
        ('{"text": "a"}\n\n{"text": "b"}', ["a", "b"]),
        ('{\n"text": "a"}\n{\n"text": "b"}\n ', ["a", "b"]),
        ('{"text": "a", "other": {"b": [null]}}', ["a"]),
        ('{"text": ["a", "b"]}', ["a"]),
        ('["a", "b"]', ["a", "b"]),
        ('\ufeff[{"text": "a"}]', ["a"]),
    ],
)
def test_every_form_of_json(content: str, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert load_texts(tmp_path / "a.json") == texts


@pytest.mark.parametrize(
    "value", ["null", '"text"', "1", "true", "[1]", "[[1]]", "NaN", '{"text": "a"} null', "[" * 10**5, "9" * 5000, "{"]
)
def test_json_that_is_no_rows_is_named(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(value)
    with pytest.raises(ValueError, match=r"a\.json"):
        load_texts(tmp_path / "a.json")


MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello you"}]


@pytest.mark.parametrize("value", [42, 4.5, True, {"a": "b"}, [[1]], [7, 8], MESSAGES])
def test_only_text_is_text(value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, {"question": "q", "answer": value}])
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: the field 'answer' holds"):
        load_texts(path)
    with pytest.raises(ValueError, match="the field 'answer' holds"):
        prompt_and_response({"question": "q", "answer": value})
    assert load_rows(path)[1]["answer"] == value
    with pytest.raises(ValueError, match="the field 'completion' holds chat messages"):
        prompt_and_response({"prompt": "p", "completion": MESSAGES})


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_a_surrogate_pair_is_no_text(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{kind}").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=rf"a\.{kind}, row 2: the field 'text' is no valid Unicode"):
        load_texts(tmp_path / f"a.{kind}")


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


ENDS = {"none": ([], []), "bos": ([2], []), "bos and eos": ([2], [0]), "eos": ([], [0]), "bert": ([2, 4], [5])}


def with_special_tokens(kind: str) -> Any:
    """A tokenizer of bytes that puts special tokens around a text."""
    special = ["<eos>", "<pad>", "<bos>", "<sep>", "[CLS]", "[SEP]"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    before, behind = ([special[i] for i in part] for part in ENDS[kind])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*before, "$A", *behind], special_tokens=[(token, vocabulary[token]) for token in special]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


@pytest.mark.parametrize("kind", ENDS)
def test_every_sample_begins_as_the_tokenizer_begins_a_text(kind: str) -> None:
    tokenizer, (before, behind) = with_special_tokens(kind), ENDS[kind]
    texts = ["", "abcdefghijk", "lm", "nopqrstu", ""]
    assert tokenizer("ab")["input_ids"] == before + tokenizer("ab", add_special_tokens=False)["input_ids"] + behind
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text]
    stream = [i for ids in own for i in ids + (behind or [0])]
    room = 8 - len(before)
    with pytest.warns(UserWarning, match="samples of 8 tokens"):
        batches = PackedBatches(texts, tokenizer, samples=9, length=8, batch_size=2)
    ids, mask = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "attention_mask"))
    assert ids.shape == mask.shape == (-(-len(stream) // room), 8)
    assert ids[:, : len(before)].tolist() == [before] * len(ids)
    assert mask[:, : len(before) + 1].all()
    assert ids[:, len(before) :][mask[:, len(before) :].bool()].tolist() == stream
    assert batches.tokens == int(mask.sum())
    few = PackedBatches(texts, tokenizer, samples=2, length=8)  # an exact fill, of the same tokens
    assert torch.equal(few[0]["input_ids"], ids[:2])
    assert few.tokens == 16
    bare = PackedBatches(texts, tokenizer, samples=2, length=8, special_tokens=False)
    assert bare[0]["input_ids"].reshape(-1).tolist() == [i for ids in own for i in [*ids, 0]][:16]


def test_special_tokens_leave_room_for_text() -> None:
    with pytest.raises(ValueError, match="length must exceed the 2 special tokens that begin a sample, not 2"):
        PackedBatches(["abc"], with_special_tokens("bert"), length=2)
    assert PackedBatches(["abc"], with_special_tokens("bert"), samples=3, length=3)[0]["input_ids"].tolist() == [
        [2, 4, i] for i in with_special_tokens("none")("abc")["input_ids"]
    ]


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


def test_a_model_that_was_dequantised_while_loading_can_be_trained(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.is_quantized, model.quantization_method = True, "gguf"
    model.hf_quantizer = SimpleNamespace(is_trainable=False, quantization_config=SimpleNamespace(quant_method="gguf"))
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(model, arguments)
    drop_quantizer(model)
    transformers.Trainer(model, arguments)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])
def test_an_offloaded_model_computes_the_same_and_holds_no_block(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: "tokenizer")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found, tokenizer = load_model(tmp_path, device="cpu", offload=True)
    assert list((tmp_path / "temporary").iterdir()) == []  # nothing had to be converted
    assert tokenizer == "tokenizer"
    assert not found.training
    assert not [w for w in recwarn if "device_map" in str(w.message)]
    blocks = [m for m in found.modules() if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer)]
    assert len(blocks) >= 2
    assert all(p.device.type == "meta" for block in blocks for p in block.parameters())
    batch = random_batches(1, 2, 16)[0]
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, model(**batch).logits)
        assert torch.equal(found(**batch).logits, model(**batch).logits)  # and again


def test_what_cannot_stay_on_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.gguf is dequantised.*load it whole"):
        load_model(tmp_path / "model.gguf", offload=True)
    tiny("albert").save_pretrained(tmp_path / "albert")
    with pytest.raises(ValueError, match="AlbertForMaskedLM has no blocks"):
        load_model(tmp_path / "albert", offload=True)
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    model.config.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match=r"quantised.*load it whole"):
        load_model(tmp_path / "quantised", offload=True)


def test_loading_opens_one_file_at_a_time_and_leaves_transformers_as_it_was(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transformers.modeling_utils.safe_open
    transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path, max_shard_size="20KB")
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    files = {"open": 0, "most": 0, "ever": 0}

    class Counted:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = original(*args, **options)

        def __enter__(self) -> Any:
            files["open"] += 1
            files["ever"] += 1
            files["most"] = max(files["most"], files["open"])
            return self.file

        def __exit__(self, *_: object) -> None:
            files["open"] -= 1

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", Counted)
    load_model(tmp_path, device="cpu", offload=True)
    assert transformers.modeling_utils.safe_open is Counted
    assert files["ever"] >= len(list(tmp_path.glob("*.safetensors"))) > 3
    assert files["most"] == 1


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_rows_are_as_they_are_in_the_file(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"data.{kind}", ROWS)
    assert load_rows(path) == ROWS
    assert load_rows(path, limit=2) == ROWS[:2]


def test_what_has_no_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"text\.txt is a text, which has no rows"):
        load_rows(tmp_path / "text.txt")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        load_rows(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl is not a file"):
        load_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"question": "2 + 2?", "answer": "4"}, ("2 + 2?", "4")),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, ("Add.\n2, 2", "4")),
        ({"instruction": "Wait.", "input": "", "output": "Yes"}, ("Wait.", "Yes")),
        ({"query": "2 + 2?", "response": "4", "type": "x"}, ("2 + 2?", "4")),
        ({"text": "Add two.", "code": "def f(): ..."}, ("Add two.", "def f(): ...")),
        ({"prompt": "def f():", "canonical_solution": " return 4"}, ("def f():", " return 4")),
        ({"question": "2 + 2?", "answer": ["4", "four"]}, ("2 + 2?", "4")),
    ],
)
def test_what_is_asked_and_what_is_to_be_answered(row: dict[str, Any], wanted: tuple[str, str]) -> None:
    assert prompt_and_response(row) == wanted


@pytest.mark.parametrize(
    "row", [{"text": "x"}, {"question": "x", "answer": ""}, {"question": "x", "answer": []}, {"a": "x", "b": "y"}]
)
def test_rows_without_a_prompt_and_a_response(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"no known prompt and response; its fields are {', '.join(row)}"):
        prompt_and_response(row)


def _damage(folder: Path, what: str) -> None:
    if what == "weights cut off":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "no heads":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    else:
        (folder / what).write_text("{")


@pytest.mark.parametrize("offload", [False, True], ids=["whole", "offload"])
@pytest.mark.parametrize("what", ["weights cut off", "no weights", "no heads", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_named_in_one_line(what: str, offload: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    _damage(folder, what)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}(/config.json is| cannot be loaded: )[^\n]+$"):
        load_model(folder, offload=offload, offload_folder=tmp_path / "offloaded")
    if what in ("no heads", "config.json"):
        with pytest.raises(ValueError, match=r"/damaged(/config.json is| cannot be loaded: )"):
            empty_model(folder)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "no/such/model", "/no/such"])
def test_a_model_that_is_nowhere_is_not_found(name: str) -> None:
    for load in (load_model, empty_model):
        with pytest.raises(FileNotFoundError, match=rf"^{re.escape(name)} is neither a folder nor a model that the hub gives"):
            load(name)
