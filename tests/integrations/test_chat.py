"""Conversations of every form, against `apply_chat_template` and TRL; mixtures, tokens, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers
import trl
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from nullspace import compute_covariances
from nullspace.integrations.transformers import Conversation, Mixture, PackedBatches, TokenIds, load_texts

USER, ASSISTANT = {"role": "user", "content": "What is é + 2?"}, {"role": "assistant", "content": "It is\n4."}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [USER, ASSISTANT]
SHARED = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ASSISTANT["content"]}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}
]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
# Writes a leading token, tools, tool calls, and an end of each turn; takes texts.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'narrator' %}{{ raise_exception('no narrators here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARTS = "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}<eos>{% endfor %}"


def make_tokenizer(template: str | None = TEMPLATE, leading: bool = True) -> Any:
    """Bytes, with special tokens; `leading`: the tokenizer puts <bos> before a text."""
    special = ["<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(special)
    if leading:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<bos>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def stream(texts: Any, tokenizer: Any, **how: Any) -> list[int]:
    """All tokens of what is packed into samples that one text each fills."""
    with pytest.warns(UserWarning, match="the texts fill 1 of"):
        batches = PackedBatches(texts, tokenizer, length=4096, **how)
    (batch,) = batches
    ids: list[int] = batch["input_ids"][batch["attention_mask"].bool()].tolist()
    return ids


def by_hand(tokenizer: Any, messages: list[Any], **how: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"]
    return ids


ROWS: list[tuple[dict[str, Any], list[Any], dict[str, Any]]] = [
    ({"messages": TURNS}, TURNS, {}),
    ({"messages": json.dumps(TURNS)}, TURNS, {}),
    ({"conversations": SHARED}, TURNS, {}),
    ({"conversations": json.dumps(SHARED)}, TURNS, {}),
    ({"conversation": [{"from": "system", "value": "Be brief."}, *SHARED]}, [SYSTEM, *TURNS], {}),
    ({"messages": TURNS, "text": "no", "prompt": "no", "chosen": [USER], "rejected": [USER]}, TURNS, {}),
    ({"prompt": [USER], "completion": [ASSISTANT]}, TURNS, {}),
    ({"prompt": [USER], "completion": ASSISTANT["content"]}, TURNS, {}),
    ({"prompt": USER["content"], "completion": [ASSISTANT]}, TURNS, {}),
    ({"prompt": [USER]}, [USER], {"add_generation_prompt": True}),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [SYSTEM]}, TURNS, {}),
    ({"prompt": [USER], "chosen": TURNS, "rejected": [USER]}, TURNS, {}),
    ({"prompt": USER["content"], "chosen": TURNS, "rejected": [USER, SYSTEM]}, TURNS, {}),
    ({"prompt": USER["content"], "chosen": [ASSISTANT], "rejected": [SYSTEM]}, TURNS, {}),
    ({"chosen": TURNS, "rejected": [USER, SYSTEM]}, TURNS, {}),
    ({"dialogue": TURNS, "id": 3}, TURNS, {}),
    ({"messages": TURNS, "system": "Be brief."}, [SYSTEM, *TURNS], {}),
    ({"messages": [SYSTEM, *TURNS], "system": "Another."}, [SYSTEM, *TURNS], {}),
    ({"messages": [USER, CALL], "tools": TOOLS}, [USER, CALL], {"tools": TOOLS}),
    ({"messages": [USER, {**CALL, "content": None}], "tools": json.dumps(TOOLS)}, [USER, CALL], {"tools": TOOLS}),
    ({"messages": TURNS, "tools": []}, TURNS, {}),
    ({"messages": TURNS, "chat_template_kwargs": {"add_generation_prompt": True}}, TURNS, {"add_generation_prompt": True}),
    (
        {"conversations": [SHARED[0], {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}]},
        [USER, CALL],
        {},
    ),
    ({"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]}, TURNS, {}),
]


@pytest.mark.parametrize(("row", "messages", "how"), ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_form_gives_the_tokens_of_the_template(
    row: dict[str, Any], messages: list[Any], how: dict[str, Any], kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    if kind == "parquet":  # a column of lists of objects gives every object all keys, most of them null
        row = {name: value for name, value in row.items() if value != []}
    texts = load_texts(write(tmp_path / f"a.{kind}", [row, row]))
    expected = by_hand(tokenizer, messages, **how)
    assert expected.count(tokenizer.bos_token_id) == 1
    assert stream(texts, tokenizer) == expected + expected
    assert stream(load_texts(datasets.Dataset.from_list([row])), tokenizer) == expected


def test_the_tokens_are_those_that_trl_trains_on(tiny_checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    """SFTTrainer's own preparation of messages, and of prompts with completions."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    config = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None)
    for rows in (
        [{"messages": TURNS}, {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}],
        [{"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}],
    ):
        trainer = SFTTrainer(model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
        prepared = [ids for row in trainer.train_dataset for ids in row["input_ids"]]
        assert stream(load_texts(rows), tokenizer) == prepared
        assert stream(load_texts(trainer.train_dataset), tokenizer) == prepared  # input_ids


def small(place: Path) -> Any:
    """A model in a folder, of which TRL loads its reference."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes)).save_pretrained(place)
    return transformers.AutoModelForCausalLM.from_pretrained(place)


def counted(model: Any, loader: Any, out: Path) -> int:
    sums = compute_covariances(model, loader, out, targets=["q_proj"], progress=False)
    return next(iter(sums.values())).tokens


def test_loaders_of_trl(tmp_path: Path) -> None:
    model, tokenizer = small(tmp_path / "base"), make_tokenizer()
    how: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False}
    chats = datasets.Dataset.from_list([{"messages": TURNS}, {"messages": [SYSTEM, *TURNS]}])
    tokens = sum(len(by_hand(tokenizer, row)) for row in (TURNS, [SYSTEM, *TURNS]))
    for number, packing in enumerate(({}, {"packing": True, "max_length": 64}, {"packing": True, "packing_strategy": "wrapped"})):
        trainer = SFTTrainer(model, SFTConfig(**how, **packing), train_dataset=chats, processing_class=tokenizer)
        assert counted(model, trainer.get_train_dataloader(), tmp_path / f"sft{number}") == tokens
    rows = [{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "No."}]}]
    dpo = DPOTrainer(model, args=DPOConfig(**how), train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    with pytest.warns(UserWarning, match="batch 1 has a 'completion_mask' and no labels.*rejected answers are counted") as warned:
        assert counted(model, dpo.get_train_dataloader(), tmp_path / "dpo") > len(by_hand(tokenizer, TURNS))
    assert sum("completion_mask" in str(each.message) for each in warned) == 1
    batch = {"prompt_input_ids": torch.ones(1, 4).long(), "chosen_input_ids": torch.ones(1, 4).long()}
    with pytest.raises(ValueError, match="batch 1 has no 'input_ids', but 'prompt_input_ids', 'chosen_input_ids': give mappings"):
        counted(model, [batch], tmp_path / "old")
    with pytest.raises(TypeError, match=r"batch 1 is list; expected a mapping.*Rows become batches by PackedBatches"):
        counted(model, [rows], tmp_path / "rows")


def test_a_real_template_and_real_rows(smollm2: Path, shared_data: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    texts = load_texts(shared_data / "gsm8k_train.jsonl", as_chat=True, limit=20)
    rows = [json.loads(line) for line in (shared_data / "gsm8k_train.jsonl").read_text().splitlines()[:20]]
    chats = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows]
    expected = [i for chat in chats for i in by_hand(tokenizer, [SYSTEM, *chat])]
    batches = PackedBatches(texts, tokenizer, system=SYSTEM["content"], samples=10, length=256, batch_size=1)
    assert torch.cat([batch["input_ids"][0] for batch in batches]).tolist() == expected[:2560]


def test_texts_as_chat_are_questions_or_pairs(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("First.\n\nSecond.")
    rows = [
        {"text": "First."},
        {"instruction": "Do", "input": "this", "output": "Done"},
        {"question": "Why?", "answer": ["So.", "No."], "system": "Be brief."},
        {"system_prompt": "Be brief.", "question": "Why?", "response": "So."},
        {"prompt": "Go on", "completion": " "},
    ]
    pairs = [[("user", "First.")], [("user", "Do\nthis"), ("assistant", "Done")]]
    pairs += [[("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]] * 2 + [[("user", "Go on")]]
    chats = [[{"role": role, "content": text} for role, text in pair] for pair in pairs]
    expected = [i for chat in chats for i in by_hand(tokenizer, chat)]
    assert stream([*load_texts(rows[:3], as_chat=True), *load_texts(rows[3:4], as_chat=True, field="question,response"),
                   *load_texts(rows[4:], as_chat=True)], tokenizer) == expected  # fmt: skip
    paragraphs = [[{"role": "user", "content": text}] for text in ("First.", "Second.")]
    assert stream(load_texts(tmp_path / "a.txt", as_chat=True), tokenizer) == [i for p in paragraphs for i in by_hand(tokenizer, p)]
    assert load_texts(rows[:3]) == ["First.", "Do\nthis\nDone", "Why?\nSo."]


@pytest.mark.parametrize("kind", ["text", "file", "system"])
def test_a_template_and_a_system_message_that_are_given(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    other = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "t.jinja").write_text(other)
    given = {"text": {"template": other}, "file": {"template": str(tmp_path / "t.jinja")}, "system": {"system": "Be brief."}}[kind]
    texts = load_texts([{"messages": TURNS}, {"messages": [SYSTEM, *TURNS]}])
    if kind == "system":
        assert stream(texts, tokenizer, **given) == by_hand(tokenizer, [SYSTEM, *TURNS]) * 2
    else:  # it leaves the last turn open, so the tokenizer's end of a text follows
        chats = [by_hand(tokenizer, chat, chat_template=other) for chat in (TURNS, [SYSTEM, *TURNS])]
        assert stream(texts, tokenizer, **given) == [i for chat in chats for i in [*chat, 0]]


def test_contents_are_given_in_the_form_that_the_template_prints() -> None:
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    for template in (TEMPLATE, PARTS):
        tokenizer = make_tokenizer(template)
        expected = by_hand(tokenizer, TURNS if template is TEMPLATE else parts)
        assert stream(load_texts([{"messages": TURNS}]), tokenizer) == expected
        assert stream(load_texts([{"messages": parts}]), tokenizer) == expected
        assert "type" not in tokenizer.decode(expected)
    two = [{"role": "user", "content": [*parts[0]["content"], {"type": "text", "text": "Now?"}]}]
    joined = [{"role": "user", "content": f"{USER['content']}\nNow?"}]
    assert stream(load_texts([{"messages": two}]), make_tokenizer()) == by_hand(make_tokenizer(), joined)


def test_templates_of_many_families() -> None:
    """TRL's templates get contents as they print them; where they take the row's own form, the tokens are those by hand."""
    names = ("deepseekv3", "gemma3", "glm4moe", "gptoss", "llama3", "llava_next", "phi3", "qwen3", "smolvlm")
    paths = [Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja" for name in names]
    templates = [path for path in paths if path.is_file()]
    if not templates:
        pytest.skip("this TRL has no templates")
    tokenizer = make_tokenizer()
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    same = 0
    for path in templates:
        tokenizer.chat_template = path.read_text()
        for messages in (TURNS, parts):
            ids = stream(load_texts([{"messages": messages}]), tokenizer)
            text = tokenizer.decode(ids)
            assert all(turn["content"] in text for turn in TURNS), path
            assert repr(parts[0]["content"]) not in text, path
            with contextlib.suppress(jinja2.TemplateError, TypeError):
                expected = by_hand(tokenizer, messages)
                same += expected == ids[: len(expected)]
    assert same >= len(templates)


@pytest.mark.parametrize("leading", [True, False])
def test_samples_begin_with_special_tokens_once(leading: bool) -> None:
    """In the middle of a conversation, a sample begins as the template begins: with the leading tokens if it writes them."""
    for template, writes in ((TEMPLATE, True), (PARTS, False)):
        tokenizer = make_tokenizer(template, leading)
        whole = stream([Conversation([USER])] * 9, tokenizer)
        assert whole.count(1) == (9 if writes else 0)
        (batch,) = PackedBatches([Conversation([USER])] * 9, tokenizer, samples=4, length=13)
        at, rows = 0, batch["input_ids"].tolist()
        for row in rows:
            added = writes and leading and whole[at] != 1
            assert row == [1] * added + whole[at : at + 13 - added]
            at += 13 - added
        assert (at < 52) == (writes and leading)


def test_chat_and_text_in_one_file(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "One."}, {"messages": TURNS}, {"messages": None, "text": "Two."}, {"messages": [], "id": 4}, {"text": None}]
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("One.", "Two.")]
    expected = [1, *own[0], 0, *by_hand(tokenizer, TURNS), *own[1], 0]
    assert stream(load_texts(write(tmp_path / "a.jsonl", rows)), tokenizer) == expected
    everywhere = [{"messages": row.get("messages"), "text": row.get("text")} for row in rows]
    assert stream(load_texts(write(tmp_path / "a.parquet", everywhere)), tokenizer) == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hello"}, "the field 'messages' holds text that is no JSON list of messages"),
        ({"messages": 3}, r"the field 'messages' holds 3 \(int\): a list of messages is needed"),
        ({"messages": USER}, r"the field 'messages' holds .*\(dict\): a list of messages is needed"),
        ({"messages": json.dumps(USER)}, "the field 'messages' holds .*a list of messages is needed"),
        ({"messages": ["hello"]}, "the field 'messages', message 1 is 'hello'"),
        ({"messages": [USER, {"content": "x"}]}, "message 2 has no role: its fields are content"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no content"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has no content"),
        ({"messages": [{"role": "user", "content": 42}]}, r"message 1: its content is 42 \(int\), which is no text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, r"message 1: its content is \{'a': 1\} \(dict\), which is no text"),
        ({"messages": [{"role": 1, "content": "x"}]}, "message 1 has the role 1"),
        ({"messages": [{"from": None, "value": "x"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 has a part of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "message 1: a part of its content is 1"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "message 1: its content is no valid Unicode"),
        ({"messages": [{**USER, "name": {}}]}, "message 1: its name is {}"),
        ({"messages": [USER, {**CALL, "tool_calls": "add"}]}, "message 2: its tool_calls are 'add'"),
        ({"messages": TURNS, "tools": "add"}, "the field 'tools' holds 'add'"),
        ({"messages": TURNS, "tools": [1]}, "the field 'tools' holds"),
        ({"messages": TURNS, "system": 1}, "the field 'system' is 1"),
        ({"messages": TURNS, "chat_template_kwargs": 1}, "the field 'chat_template_kwargs' holds 1"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "message 1: its function_call is 'add"),
        ({"prompt": [USER], "completion": 3}, "the field 'completion' holds a value of type int"),
        ({"input_ids": "text"}, "the field 'input_ids' holds 'text'"),
        ({"input_ids": [[1, 2]]}, "the field 'input_ids' holds"),
        ({"input_ids": [1, -2]}, "the field 'input_ids' holds"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "'attention_mask' is no list as long as 'input_ids'"),
        ({"first": TURNS, "second": TURNS}, "no field that is known to be text; its fields are first, second"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "fine"}, row])
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 2\b.*{words}"):
        load_texts(path)


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        (None, {"messages": TURNS}, r"row 1 is a conversation, and the tokenizer .*has no chat template: give one .*--template"),
        (TEMPLATE, {"messages": [{"role": "narrator", "content": "x"}]}, "row 1: the chat template refuses .*no narrators here"),
        (TEMPLATE, {"messages": TURNS, "chat_template_kwargs": {"messages": 1}}, "row 1: the chat template refuses"),
        ("{{ messages[0].content + none }}", {"messages": TURNS}, "row 1: the chat template refuses the conversation: TypeError"),
        ("{% for m in messages %}{{ m.content }}", {"messages": TURNS}, "the chat template is no valid Jinja template, line 1"),
        ("{{ 'always the same' }}", {"messages": TURNS}, "the chat template prints no text of a message"),
        (TEMPLATE, {"input_ids": [1, 2, 261]}, "row 1: the tokenizer has 261 tokens, and there is a token id 261"),
    ],
)
def test_what_the_template_refuses_is_named(template: str | None, row: dict[str, Any], words: str, tmp_path: Path) -> None:
    texts = load_texts(write(tmp_path / "a.jsonl", [row]))
    with pytest.raises(ValueError, match=words):
        PackedBatches(texts, make_tokenizer(template))


def test_options_of_conversations_without_one(tokenizer: Any, tmp_path: Path) -> None:
    for given in ({"template": TEMPLATE}, {"system": "Be brief."}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} belongs to conversations.*--as-chat"):
            PackedBatches(["text"], tokenizer, **given)
    with pytest.raises(FileNotFoundError, match=r"template 'none\.jinja' is neither a file nor a Jinja template"):
        PackedBatches(["text"], tokenizer, template="none.jinja")
    (tmp_path / "t.jinja").write_bytes(b"\xff{{")
    with pytest.raises(ValueError, match=r"t\.jinja is not UTF-8"):
        PackedBatches(["text"], tokenizer, template=str(tmp_path / "t.jinja"))
    with pytest.raises(TypeError, match="not dict: read rows with load_texts"):
        PackedBatches([{"messages": TURNS}], tokenizer)  # type: ignore[list-item]


def test_tokens_are_packed_as_they_are(tokenizer: Any) -> None:
    rows = [
        {"input_ids": [1, 7, 8], "labels": [-100, 7, 8]},
        {"input_ids": [9, 10, 0], "attention_mask": [0, 1, 1]},
        {"input_ids": []},
    ]
    assert stream(load_texts(rows), tokenizer) == [1, 7, 8, 10, 0]
    tensors = datasets.Dataset.from_list(rows[:2]).with_format("torch")
    assert stream(load_texts(tensors.select_columns(["input_ids"])), tokenizer) == [1, 7, 8, 9, 10, 0]
    (batch,) = PackedBatches([TokenIds([1, 7, 8, 9, 10, 11, 12])], tokenizer, samples=2, length=4)
    assert batch["input_ids"].tolist() == [[1, 7, 8, 9], [1, 10, 11, 12]]


# ---- several data sets, part of one, another order


def texts_of(letter: str, count: int, tokens: int) -> list[str]:
    return [letter * tokens] * count


def test_a_mixture_has_the_shares_that_are_asked_for(tokenizer: Any) -> None:
    parts = {"a": texts_of("a", 99, 9), "b": texts_of("b", 99, 29), "c": texts_of("c", 999, 1)}
    (batch,) = PackedBatches(Mixture(parts, [3, 1, 2]), tokenizer, samples=4, length=151)
    ids = batch["input_ids"][:, 1:].reshape(-1).tolist()
    text = tokenizer.decode([i for i in ids if i])
    shares = [(text.count(letter) + text.count(letter) // size) / len(ids) for letter, size in (("a", 9), ("b", 29), ("c", 1))]
    assert shares == pytest.approx([1 / 2, 1 / 6, 1 / 3], abs=0.05)
    assert text.index("b") < 40  # interleaved
    again = PackedBatches(Mixture(parts, [6, 2, 4]), tokenizer, samples=4, length=151)[0]
    assert torch.equal(again["input_ids"], batch["input_ids"])
    equal = PackedBatches(Mixture({"a": parts["a"], "c": parts["c"]}), tokenizer, samples=4, length=151)[0]["input_ids"]
    assert int((equal == tokenizer("a")["input_ids"][1]).sum()) == pytest.approx(4 * 150 * 0.45, abs=10)


def test_a_mixture_that_runs_out_goes_on_with_the_rest_and_says_so(tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="goes on without what has ended, and its shares change: b has 10 tokens"):
        batches = PackedBatches(Mixture({"a": texts_of("a", 99, 9), "b": texts_of("b", 1, 9)}), tokenizer, samples=2, length=101)
    assert batches.tokens == 202


def test_several_data_sets_skipped_and_shuffled(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(9)]) for name in "ab"]
    mixture = load_texts(paths, weights=[2, 1], skip=2, limit=3)
    assert mixture == Mixture({str(path): [f"{path.stem}{i}" for i in (2, 3, 4)] for path in paths}, [2, 1])
    shuffled = load_texts(paths[0], shuffle=5, skip=2)
    assert shuffled == load_texts(paths[0], shuffle=5, skip=2) != load_texts(paths[0], shuffle=6, skip=2)
    assert sorted(shuffled) == load_texts(paths[0], skip=2)
    rows = load_texts([[{"text": "x"}], paths[1], [{"text": "y"}]])
    assert list(rows.parts) == ["data set 1", str(paths[1]), "data set 3"]
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "x"}])})
    assert load_texts(splits) == ["x"]
    with pytest.raises(ValueError, match="no split 'test', but train"):
        load_texts(splits, split="test")
    with pytest.raises(ValueError, match=r"a\.jsonl, row 3 has no field 'body'"):
        load_texts(paths[0], skip=2, field="body")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"weights": [1]}, "weights must be one a data set: 1 for 2"),
        ({"weights": [1, 0]}, "weights must be a positive number, not 0"),
        ({"weights": [1, -1]}, "weights must be a positive number, not -1"),
        ({"skip": -1}, "skip must be at least 0, not -1"),
        ({"shuffle": -1}, "shuffle must be at least 0"),
        ({"skip": 2}, r"skip=2 \(--skip\) leaves nothing of .*a\.jsonl, which has 2 rows"),
        ({"skip": 9}, r"skip=9 \(--skip\) leaves nothing of .*a\.jsonl, which has 2 rows"),
    ],
)
def test_wrong_numbers_are_named(how: dict[str, Any], words: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [{"text": "1"}, {"text": "2"}]) for name in "ab"]
    with pytest.raises(ValueError, match=words):
        load_texts(paths, **how)


def test_what_is_no_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "1"}])
    with pytest.raises(ValueError, match=r"a\.jsonl is given twice"):
        load_texts([path, path])
    with pytest.raises(ValueError, match="weights belong to several data sets"):
        load_texts(path, weights=[1])
    with pytest.raises(TypeError, match="rows, not int"):
        load_texts(3)
    with pytest.raises(TypeError, match="row 1 is int"):
        load_texts(iter([3]))
    with pytest.raises(ValueError, match="the data holds no text"):
        load_texts(iter([]))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_texts([path, tmp_path / "none.jsonl"])
