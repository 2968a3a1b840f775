"""What a language model knows and can do, in numbers: gold answers, greedy answers, perplexity, and the loss on responses.

Prompts and answers are tokenised apart, so that what is scored is the answer and nothing else. Padding is masked, and what it does
to a number is rounding alone.
"""

from __future__ import annotations

import copy
import math
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

IGNORED = -100  # transformers' label of a token that does not count


class Question(NamedTuple):
    """A prompt and the answers that count as right, the usual one first."""

    prompt: str
    answers: tuple[str, ...]


class Scored(NamedTuple):
    """Of each row: its log-likelihood in nats, how many tokens that is, and how many of them greedy decoding would have hit.

    `divergence`: Σ KL(reference ‖ model) over these tokens, in nats; 0 without a reference.
    """

    log_likelihood: list[float]
    tokens: list[int]
    hits: list[int]
    divergence: list[float]


def questions(rows: Iterable[Mapping[str, Any]]) -> list[Question]:
    """Rows of NQ-open, WebQuestions or TriviaQA: `question`, and `answer` or `answers` (text, list, or TriviaQA's mapping).

    Raises:
        ValueError: naming the row that has no question or no answer.
    """
    questions = []
    for number, row in enumerate(rows, start=1):
        answers = _answers(row.get("answer", row.get("answers")))
        if not row.get("question") or not answers:
            raise ValueError(f"row {number} has no question and answer; its fields are {', '.join(map(str, row))}")
        question = str(row["question"]).strip().rstrip("?")
        questions.append(Question(f"Question: {question}?\nAnswer:", answers))
    return questions


def _answers(given: Any) -> tuple[str, ...]:
    if isinstance(given, Mapping):
        given = [given.get("value"), *given.get("aliases", [])]
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, (list, tuple)):
        return ()
    return tuple(dict.fromkeys(answer for answer in given if isinstance(answer, str) and answer))


def tokenized(tokenizer: Any, prompt: str, response: str, *, first: bool = True) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a prompt and its response; the labels are `IGNORED` on the prompt.

    What the tokenizer puts at the beginning of a text comes first, unless something else stands before it (`first=False`).
    """
    start = _ids(tokenizer, prompt, first=first)
    rest = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not start or not rest:
        raise ValueError(
            f"nothing to score: {len(start)} tokens of prompt {prompt[:60]!r}, {len(rest)} of response {response[:60]!r}"
        )
    return {"input_ids": start + rest, "labels": [IGNORED] * len(start) + rest}


def _ids(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=first)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens (b, t), padded on the right, and their mask."""
    width = max(map(len, rows))
    tokens_bt = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask_bt = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return tokens_bt, mask_bt


def _read(model: Any, context: Sequence[int]) -> Any:
    """Keys and values of what stands before every row; None if nothing does."""
    return model(input_ids=torch.tensor([list(context)], device=model.device), use_cache=True).past_key_values if context else None


def _behind(
    model: Any,
    cache: Any,
    ids_bt: torch.Tensor,
    mask_bt: torch.Tensor,
    *,
    keep: bool = False,
    places: int | torch.Tensor = 0,
) -> tuple[torch.Tensor, Any]:
    """Logits (b, t, v) of rows behind a cached context, at certain places or all (0); with `keep`, the cache with the rows too."""
    if cache is None:
        output = model(input_ids=ids_bt, attention_mask=mask_bt, use_cache=keep, logits_to_keep=places)
    else:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(ids_bt))
        seen_bt = torch.ones(len(ids_bt), cache.get_seq_length(), dtype=mask_bt.dtype, device=mask_bt.device)
        output = model(
            input_ids=ids_bt,
            attention_mask=torch.cat([seen_bt, mask_bt], 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=places,
        )
    return output.logits, output.past_key_values if keep else None


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows of like length together, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def _labelled(
    model: Any, rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int, context: Sequence[int]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, list[int]]]:
    """Batch by batch: its rows, log-probabilities (n, v) at their labelled tokens, these tokens (n,), and how many a row has."""
    model.eval()
    cache = _read(model, context)
    for batch in _batches([len(row["input_ids"]) for row in rows], batch_size):
        ids_bt, mask_bt = _padded([rows[row]["input_ids"] for row in batch], 0, model.device)
        labels_bt, _ = _padded([rows[row]["labels"] for row in batch], IGNORED, model.device)
        wanted_bt = labels_bt[:, 1:] != IGNORED
        places = wanted_bt.any(0).nonzero()[:, 0]  # the head is a large part of a small model
        logits_btv, _ = _behind(model, cache, ids_bt, mask_bt, places=places)
        log_nv = logits_btv[wanted_bt[:, places]].float().log_softmax(-1)
        yield batch, log_nv, labels_bt[:, 1:][wanted_bt], wanted_bt.sum(1).tolist()


@torch.no_grad()
def score(
    model: Any,
    rows: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int = 16,
    *,
    context: Sequence[int] = (),
    reference: Sequence[torch.Tensor] | None = None,
) -> Scored:
    """The labelled tokens of each row, given what stands before them: `input_ids` and `labels` as of `tokenized`.

    `context` are tokens that stand before every row, and are computed once. `reference`: `log_probabilities` of another model.
    """
    sums: dict[int, tuple[float, int, int, float]] = {}
    for batch, log_nv, gold_n, sizes in _labelled(model, rows, batch_size, context):
        likely_n = log_nv.gather(1, gold_n[:, None])[:, 0].double()
        hit_n = log_nv.argmax(-1) == gold_n
        for row, own_nv, likely, hit in zip(batch, log_nv.split(sizes), likely_n.split(sizes), hit_n.split(sizes), strict=True):
            apart = 0.0 if reference is None else float((reference[row].exp() * (reference[row] - own_nv)).sum(dtype=torch.float64))
            sums[row] = (float(likely.sum()), len(likely), int(hit.sum()), apart)
    in_order = [sums[row] for row in range(len(rows))]
    return Scored(*(list(column) for column in zip(*in_order, strict=True)))  # type: ignore[arg-type]


@torch.no_grad()
def log_probabilities(
    model: Any, rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int = 16, *, context: Sequence[int] = ()
) -> list[torch.Tensor]:
    """Of each row, the model's log-probabilities (n, vocabulary) at its n labelled tokens, float32: a `reference` for `score`."""
    kept: dict[int, torch.Tensor] = {}
    for batch, log_nv, _, sizes in _labelled(model, rows, batch_size, context):
        kept.update(zip(batch, log_nv.split(sizes), strict=True))
    return [kept[row] for row in range(len(rows))]


def asked_after(
    tokenizer: Any, asked: Sequence[Question], shots: Sequence[Question]
) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Questions with their first gold answers as rows for `score`, and the context: other questions with their answers."""
    before = "".join(f"{shot.prompt} {shot.answers[0]}\n\n" for shot in shots)
    context = _ids(tokenizer, before, first=True) if before else []
    return [tokenized(tokenizer, each.prompt, " " + each.answers[0], first=not context) for each in asked], context


def knowledge(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    *,
    shots: Sequence[Question] = (),
    answered: int | None = None,
    batch_size: int = 16,
    new_tokens: int = 12,
) -> dict[str, float]:
    """How well a model knows the answers.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        asked: the questions.
        shots: questions that stand before each of them with their answers, and show what an answer looks like.
        answered: greedy decoding answers only so many of them, which takes longer than the likelihoods.
        batch_size: rows at once; twice as many when answers are written.
        new_tokens: at most this many tokens an answer; 0 writes none.

    Returns:
        `log_likelihood`: of the first gold answer, in nats an answer, the mean over the questions. `exact_match`: the share of
        questions whose greedy answer, up to its first line break, is one of the gold ones after `normalised`.
    """
    rows, context = asked_after(tokenizer, asked, shots)
    scores = {"log_likelihood": _mean(score(model, rows, batch_size, context=context).log_likelihood)}
    if new_tokens:
        asked = asked[:answered]
        prompts = [question.prompt for question in asked]
        texts = greedy(model, tokenizer, prompts, new_tokens=new_tokens, batch_size=2 * batch_size, context=context)
        answers = [normalised(text.lstrip().split("\n", 1)[0]) for text in texts]
        gold = [{normalised(answer) for answer in question.answers} for question in asked]
        scores["exact_match"] = _mean(answer in right for answer, right in zip(answers, gold, strict=True))
    return scores


def perplexity(model: Any, batches: Iterable[Mapping[str, torch.Tensor]], batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each sequence."""
    scored = score(model, running_text(batches), batch_size)
    return math.exp(-sum(scored.log_likelihood) / sum(scored.tokens))


def running_text(batches: Iterable[Mapping[str, torch.Tensor]]) -> list[dict[str, list[int]]]:
    """Every sequence as a row for `score`: all tokens but the first are labelled."""
    rows = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            kept = ids[mask.bool()].tolist()
            if len(kept) > 1:
                rows.append({"input_ids": kept, "labels": [IGNORED, *kept[1:]]})
    return rows


def task(model: Any, rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int = 8) -> dict[str, float]:
    """`loss`: nats a response token. `token_accuracy`: the share of response tokens that were the likeliest ones."""
    scored = score(model, rows, batch_size)
    tokens = sum(scored.tokens)
    return {"loss": -sum(scored.log_likelihood) / tokens, "token_accuracy": sum(scored.hits) / tokens}


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, batch_size: int = 32, context: Sequence[int] = ()
) -> list[str]:
    """What greedy decoding writes behind each prompt: `new_tokens` tokens, cut at the end-of-text token."""
    model.eval()
    cache = _read(model, context)
    ids = [_ids(tokenizer, prompt, first=not context) for prompt in prompts]
    texts: dict[int, str] = {}
    for batch in _batches([len(row) for row in ids], batch_size):
        ids_bt, mask_bt = _padded([ids[row] for row in batch], 0, model.device)
        logits_btv, kept = _behind(model, cache, ids_bt, mask_bt, keep=True)
        length_b1 = mask_bt.sum(1, keepdim=True)
        next_b1 = logits_btv[torch.arange(len(batch)), length_b1[:, 0] - 1].argmax(-1, keepdim=True)
        seen_bt = torch.cat([mask_bt.new_ones(len(batch), len(context)), mask_bt], 1)
        written = [next_b1]
        for step in range(new_tokens - 1):
            seen_bt = torch.cat([seen_bt, torch.ones_like(next_b1)], 1)
            output = model(
                input_ids=next_b1,
                attention_mask=seen_bt,
                position_ids=len(context) + length_b1 + step,
                past_key_values=kept,
                use_cache=True,
            )
            kept, next_b1 = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            written.append(next_b1)
        for row, tokens in zip(batch, torch.cat(written, 1).tolist(), strict=True):
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            texts[row] = tokenizer.decode(tokens)
    return [texts[row] for row in range(len(ids))]


def last_number(text: str) -> str | None:
    """GSM8K's answer: what stands behind `####`, or else the last number, without separators and trailing zeros."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rsplit("####", 1)[-1])
    if not numbers:
        return None
    number = (numbers[0] if "####" in text else numbers[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def same_result(answer: str, gold: str) -> bool:
    """Whether a written response ends where the gold one does: in GSM8K's number, or else word for word, after `normalised`."""
    if "####" in gold:
        return last_number(answer) == last_number(gold)
    return normalised(answer) == normalised(gold)


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and superfluous space: as open-domain question answering compares answers."""
    bare = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
