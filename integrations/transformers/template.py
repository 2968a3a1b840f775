"""A tokenizer's chat template: `ChatTemplate` turns conversations into exactly the tokens that `apply_chat_template` gives."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nullspace.errors import InputError, MissingFileError
from nullspace.integrations.transformers.chat import Conversation

_PROBE = "Where is the lighthouse"


def read_template(template: str) -> str:
    """A chat template: the text of a file, or the text itself, if it is one of Jinja.

    Raises:
        FileNotFoundError: if it is neither.
        ValueError: naming the file, if it is not UTF-8.
    """
    if "{{" in template or "{%" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise MissingFileError(f"template {template!r} is neither a file nor a Jinja template, which has {{{{ … }}}} in it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"template {template} is not UTF-8 text: {error}") from error


class ChatTemplate:
    """Conversations as token ids, by transformers' `apply_chat_template`.

    Args:
        tokenizer: transformers'.
        template: a Jinja template, or a file with one, in the place of the tokenizer's own.
        system: a system message for conversations that have none.

    Raises:
        FileNotFoundError, ValueError: for a template that is none.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, system: str | None = None) -> None:
        self._tokenizer, self._system = tokenizer, system
        self._template = None if template is None else read_template(template)

    def ids(self, conversation: Conversation) -> list[int]:
        """The tokens of a conversation, with all special tokens that the template writes and no others.

        Raises:
            ValueError: if the tokenizer has no template, or the template is no Jinja; naming the row, if the template refuses it.
        """
        if self._template is None and not getattr(self._tokenizer, "chat_template", None):
            raise InputError(
                f"{conversation.where} is a conversation, and the tokenizer {getattr(self._tokenizer, 'name_or_path', '')} has no "
                "chat template: give one (template=, on the command line --template FILE), or choose a field with plain text "
                "(field / --field)"
            )
        texts, parts = self._takes
        chat = conversation.with_system(self._system)
        messages = [_fitted(message, texts, parts) for message in chat.messages]
        try:
            given = {**chat.variables, "tools": chat.tools, "add_generation_prompt": chat.asks}
            ids: list[int] = self._apply(messages, **given, tokenizer_kwargs={"verbose": False})["input_ids"]
            return ids
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # templates raise jinja2's errors, and those of any expression in them
            raise InputError(f"{conversation.where}: the chat template refuses the conversation: {_line(error)}") from error

    def ends_turn(self, ids: Sequence[int]) -> bool:
        """Whether a conversation ends with a special token, white space aside: its end needs no other mark."""
        last = next((i for i in reversed(ids) if self._tokenizer.decode([i]).strip()), None)
        return last is not None and last in self._special

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        added: Mapping[int, Any] = getattr(self._tokenizer, "added_tokens_decoder", {})
        return frozenset([*self._tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)])

    @functools.cached_property
    def _takes(self) -> tuple[bool, bool]:
        """Whether the template prints contents that are texts, and contents that are lists of parts: many do one of them.

        Raises:
            ValueError: if the template is no Jinja, or prints neither.
        """
        import jinja2

        printed: list[bool | None] = []
        for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
            try:
                text = self._apply([{"role": "user", "content": content}], tokenize=False)
            except jinja2.TemplateSyntaxError as error:
                raise InputError(f"the chat template is no valid Jinja template, line {error.lineno}: {error.message}") from error
            except (ImportError, MemoryError):
                raise
            except Exception:
                printed.append(None)
            else:
                # A template for texts may print the Python or JSON form of a list.
                printed.append(_PROBE in text and repr(content) not in text and json.dumps(content) not in text)
        if printed == [False, False]:
            raise InputError("the chat template prints no text of a message: it needs {{ message['content'] }} or the like")
        return printed[0] is not False, printed[1] is True

    def _apply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(messages, chat_template=self._template, **{"return_dict": True, **options})


def _fitted(message: Mapping[str, Any], texts: bool, parts: bool) -> Mapping[str, Any]:
    """A message with its content in a form that the template prints."""
    content = message.get("content")
    if isinstance(content, str) and not texts and parts:
        return {**message, "content": [{"type": "text", "text": content}]}
    if isinstance(content, list) and not parts:
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return message


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
