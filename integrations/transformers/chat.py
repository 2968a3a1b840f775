"""Conversations and token ids in the rows of data sets, in every form that is in use. Errors are `ValueError`s with file and row.

| fields | form |
|---|---|
| `messages`, `conversations`, `conversation` | messages with role and content, or ShareGPT's from and value; or their JSON text |
| `prompt` with `completion`, `response` or `chosen` | messages; one of both may be a text, a user's or an assistant's |
| `chosen` | the messages of the preferred side, with the prompt in them; `rejected` is not read |
| `prompt` | messages that end with a question: the template opens the assistant's turn |
| `tools`, `system` or `system_prompt`, `chat_template_kwargs` | beside these: JSON schemas, a system message, variables |
| `input_ids`, `attention_mask` | token ids as they are, without those that the mask hides |
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nullspace.checks import shown
from nullspace.errors import InputError
from nullspace.integrations.transformers.rows import Row, as_text, checked_text, fields_of, is_chat, text_fields

WHOLE = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "response", "chosen")
SYSTEM = ("system", "system_prompt")
Message = dict[str, Any]

# ShareGPT's names of roles; any other is a role's name already.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "bot", "model", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}


@dataclass(frozen=True)
class Conversation:
    """Messages as transformers' chat templates take them.

    Attributes:
        messages: each with `role`, and `content` (a text, or a list of parts of type text), `tool_calls`, or both.
        tools: JSON schemas of functions, or None.
        variables: further variables of the template.
        asks: whether the template opens the assistant's turn behind the last message.
        where: file and row, for messages.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    asks: bool = False
    where: str = "a conversation"

    def with_system(self, text: str | None) -> Conversation:
        """The same with this system message in front, if it has none and there is a text."""
        if not text or any(message["role"] in ("system", "developer") for message in self.messages):
            return self
        return replace(self, messages=[{"role": "system", "content": text}, *self.messages])


@dataclass(frozen=True)
class TokenIds:
    """A text that is tokens already."""

    ids: Sequence[int]
    where: str = "a row"


def token_ids(row: Row, where: str) -> TokenIds | None:
    """The tokens of a row with `input_ids`, without those that its `attention_mask` hides; None for any other row."""
    if row.get("input_ids") is None:
        return None
    ids, mask = (_listed(row.get(name)) for name in ("input_ids", "attention_mask"))
    if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
        raise InputError(f"{where}: the field 'input_ids' holds {shown(ids)}: a list of token ids, one sequence, is needed")
    if mask is None:
        return TokenIds(ids, where)
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise InputError(f"{where}: 'attention_mask' is no list as long as 'input_ids', which has {len(ids)} tokens")
    return TokenIds([each for each, seen in zip(ids, mask, strict=True) if seen], where)


def conversation(row: Row, names: Sequence[str] | None, where: str) -> Conversation | None:
    """The conversation of a row, without messages if it is empty; None if the row holds texts.

    Args:
        row: a row.
        names: of the fields that hold it, in their order; by default those of the table above, or the one that holds messages.
        where: file and row, for messages.

    Raises:
        ValueError: naming row and field, for messages, tools or variables of another form, and for contents that are not text.
    """
    chosen = _fields(row) if names is None else tuple(names)
    if not all(name in row for name in chosen) or not any(name in WHOLE or is_chat(row[name]) for name in chosen):
        return None
    messages: list[Message] = []
    for place, name in enumerate(chosen):
        if name in WHOLE or is_chat(row[name]):
            more = _messages(row[name], f"{where}: the field {name!r}")
            begins = bool(more) and more[0]["role"] in ("user", "system") and not is_chat(row[chosen[0]])
            # An answer may hold the prompt too: with preferences that is usual.
            repeats = more[: len(messages)] == messages or (names is None and begins)
            messages = more if repeats else messages + more
        elif text := as_text(row, name, where):
            answers = 0 < place == len(chosen) - 1
            messages.append({"role": "assistant" if answers else "user", "content": text})
    if not messages:
        return Conversation(messages, where=where)
    variables = _variables(row, where)
    asks = bool(variables.pop("add_generation_prompt", chosen == ("prompt",) and messages[-1]["role"] in ("user", "tool")))
    made = Conversation(messages, _tools(row, where), variables, asks, where)
    return made.with_system(_system(row, chosen, where))


def as_conversation(parts: Sequence[str], row: Row, where: str) -> Conversation:
    """A text as a user's message; a prompt and a response, the last of several parts, as a user's and an assistant's.

    Args:
        parts: of which blank ones are left out; those before the last are joined by line breaks.
        row: whose `system` or `system_prompt` is the system message.
        where: file and row, for messages.
    """
    asked = "\n".join(part for part in (parts[:-1] if len(parts) > 1 else parts) if part.strip())
    answer = parts[-1] if len(parts) > 1 else ""
    turns = (("user", asked), ("assistant", answer))
    messages = [{"role": role, "content": text} for role, text in turns if text.strip()]
    return Conversation(messages, where=where).with_system(_system(row, (), where) if messages else None)


def _fields(row: Row) -> tuple[str, ...]:
    """The fields that hold a row's conversation; empty if none does."""
    whole = next((name for name in WHOLE if row.get(name)), None)
    if whole is not None:
        return (whole,)
    if is_chat(row.get("prompt")):
        return ("prompt", *[name for name in ANSWERS if row.get(name) is not None][:1])
    answer = next((name for name in ANSWERS if is_chat(row.get(name))), None)
    if answer is not None:
        return ("prompt", answer) if row.get("prompt") is not None else (answer,)
    if text_fields(row):
        return ()
    others = [name for name in row if is_chat(row[name])]
    return tuple(others) if len(others) == 1 else tuple(name for name in WHOLE if name in row)[:1]


def _messages(value: Any, what: str) -> list[Message]:
    """The messages of a field's value."""
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{what} holds text that is no JSON list of messages ({error})") from None
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{what} holds {shown(value)} ({type(value).__name__}): a list of messages is needed")
    return [_message(each, f"{what}, message {number}") for number, each in enumerate(value, start=1)]


def _message(value: Any, what: str) -> Message:
    """One message with role and content. Keys without a value are left out, as Arrow files give every message all keys."""
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is {shown(value)} ({type(value).__name__}): an object with role and content is needed")
    known = {name: each for name, each in value.items() if each is not None}
    if "role" in known:
        message = known
    elif "from" in known:
        message = {name: each for name, each in known.items() if name not in ("from", "value")}
        given = known["from"]
        message["role"] = _ROLES.get(given.lower(), given) if isinstance(given, str) else given
        if given == "function_call":
            message["tool_calls"] = _call(known.get("value"), what)
        elif "value" in known:
            message["content"] = known["value"]
    else:
        raise InputError(f"{what} has no role: its fields are {fields_of(value)} (role and content, or from and value, are needed)")
    if not isinstance(message["role"], str) or not message["role"].strip():
        raise InputError(f"{what} has the role {shown(message['role'])}, which is no text")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, (list, tuple)) and all(isinstance(call, Mapping) for call in calls)):
        raise InputError(f"{what}: its tool_calls are {shown(calls)}: a list of objects is needed")
    if "content" in message:
        message["content"] = _content(message["content"], what)
    elif not calls and "function_call" not in message:
        raise InputError(f"{what} has no content: leave the row out, or give the message a text")
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        if name in message:
            checked_text(message[name], f"{what}: its {name}")
    return message


def _content(value: Any, what: str) -> str | list[dict[str, str]]:
    """A message's text, or its parts, all of which are texts."""
    if not isinstance(value, (list, tuple)):
        return checked_text(value, f"{what}: its content")
    parts = []
    for part in value:
        if isinstance(part, Mapping):
            kind = part.get("type", "text")
            if kind != "text":
                raise InputError(
                    f"{what} has a part of type {shown(kind)}, and text alone is read from data files: leave such rows out, or "
                    "calibrate in Python on a loader of the batches that the model's processor makes"
                )
            part = part.get("text")
        parts.append({"type": "text", "text": checked_text(part, f"{what}: a part of its content")})
    return parts


def _call(value: Any, what: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call, JSON text of an object with name and arguments, as tool calls."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise InputError(f"{what}: its function_call is {shown(value)}: JSON of an object with name and arguments is needed")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}]


def _tools(row: Row, where: str) -> list[Mapping[str, Any]] | None:
    """The column `tools`: a list of objects, or JSON text of one."""
    tools = row.get("tools")
    with contextlib.suppress(ValueError, RecursionError):
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    if tools and not (isinstance(tools, (list, tuple)) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"{where}: the field 'tools' holds {shown(tools)}: a list of JSON schemas is needed, or its JSON text")
    return list(tools) if tools else None


def _variables(row: Row, where: str) -> dict[str, Any]:
    """The column `chat_template_kwargs`."""
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise InputError(f"{where}: the field 'chat_template_kwargs' holds {shown(variables)}: an object is needed")
    return dict(variables)


def _system(row: Row, besides: Sequence[str], where: str) -> str | None:
    """The text of a row's system column."""
    name = next((name for name in SYSTEM if row.get(name) is not None and name not in besides), None)
    text = "" if name is None else checked_text(row[name], f"{where}: the field {name!r}")
    return text if text.strip() else None


def _listed(value: Any) -> Any:
    """A tensor or an array as a list; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def without_nulls(row: Row) -> Row:
    """A row of an Arrow file, without null values in its objects: in Arrow, all objects of a column have the same keys."""
    return {name: _pruned(value) for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _pruned(each) for name, each in value.items() if each is not None}
    return [_pruned(each) for each in value] if isinstance(value, list) else value
