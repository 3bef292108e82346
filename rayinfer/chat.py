"""Chat templates: messages become one text, in which only the template's own control tokens are control tokens.

A row may hold the text of a control token (`<|im_end|>`), by chance or to speak with the system's voice, and a
tokenizer finds it wherever it stands. So where a row's strings hold one, it is put between two marks before the
template sees it; what the template then prints between marks is encoded as plain text, the rest as always. Rows without
such text, nearly all, take no other way than the tokenizer's own, and have its ids to the last one.

Control tokens are the tokenizer's special tokens and, in all but an assistant's messages, those of its other added
tokens that the template names (`<tool_call>`): what a model once wrote keeps its form. A role may not be a piece of a
control token, because templates make `<|role|>` of it. The price: whoever wants control tokens in a row has to give
`prompt`, which is raw, and a template that cuts through the text of a control token leaves text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension

from rayinfer.errors import ErrorType, RowError
from rayinfer.sandbox import Sandbox

if TYPE_CHECKING:  # transformers takes seconds to import, and drivers use only what is here
    from transformers import PreTrainedTokenizerBase

START, END = "\ufdd0", "\ufdd1"  # noncharacters: for use inside a program, never in a text
_MARKED = re.compile(f"{START}([^{START}{END}]*){END}|[{START}{END}]")
_ROLES = {"system", "user", "assistant", "tool", "developer", "function", "model", "ipython"}


class _Generation(Extension):
    """`{% generation %}`, which marks what a model is trained on, is only a scope here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _refuse(message: str) -> None:
    raise TemplateError(message)


_FILTERS = {"tojson": lambda value, ensure_ascii=False, **rest: json.dumps(value, ensure_ascii=ensure_ascii, **rest)}
_SANDBOX = Sandbox(_FILTERS, extensions=[_Generation, "jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True)
_SANDBOX.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))


class ControlTokens:
    """The control tokens of a tokenizer, to be found in a row's strings.

    Args:
        template: the source of the chat template; added tokens that it names are control tokens too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = ""):
        added = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        named = [t.content for t in added if not t.special and not t.content.isspace() and t.content in template]
        self.all, self._special = {*special, *named}, special
        self._first = {text[0] for text in self.all}
        self._patterns: dict[bool, re.Pattern[str]] = {}  # made when needed: thousands of tokens take a second

    def mark(self, value: Any, special_only: bool = False) -> Any:
        """The value (strings in lists and mappings) with marks around control tokens; the same one if it has none."""
        if isinstance(value, str):
            if not any(first in value for first in self._first):
                return value
            special_only &= len(self._special) < len(self.all)
            if special_only not in self._patterns:
                longest_first = sorted(self._special if special_only else self.all, key=len, reverse=True)
                self._patterns[special_only] = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
            pattern = self._patterns[special_only]
            if pattern.search(value) is None:
                return value
            return pattern.sub(rf"{START}\g<0>{END}", re.sub(f"[{START}{END}]", "\ufffd", value))
        if isinstance(value, list | tuple):  # a map's entries are tuples
            return [self.mark(item, special_only) for item in value]
        if isinstance(value, dict):
            return {self.mark(key, special_only): self.mark(item, special_only) for key, item in value.items()}
        return value

    def check_role(self, role: str, place: str) -> None:
        """Raise RowError for a role of which a template could make a control token."""
        if role not in _ROLES and any(role in token or token in role for token in self.all):
            want = f"want {', '.join(sorted(_ROLES))} or a name that is none"
            text = f"{place}.role = {role[:40]!r}: a piece of a control token, {want}"
            raise RowError(ErrorType.INVALID_PROMPT, text)


class ChatTemplate:
    """A tokenizer's chat template, or another one, with its arguments.

    Args:
        kwargs: what the template sees beside `messages`; `tools` may be functions with docstrings or JSON schemas.

    Raises:
        Exception: there is no template, or it is not valid.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, kwargs: Mapping[str, Any]):
        from transformers.utils import get_json_schema

        tools = kwargs.get("tools")
        source = tokenizer.get_chat_template(template, tools)
        self.control = ControlTokens(tokenizer, source)
        self._template = _SANDBOX.template(source)
        self._values = {"documents": None, "add_generation_prompt": True, **tokenizer.special_tokens_map, **kwargs}
        self._values["tools"] = tools and [t if isinstance(t, Mapping) else get_json_schema(t) for t in tools]

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The text, with marks around control tokens of the messages. Raises RowError and what the template does."""
        for number, message in enumerate(messages):
            self.control.check_role(message["role"], f"messages[{number}]")
        marked = [self.control.mark(message, special_only=message["role"] == "assistant") for message in messages]
        return _SANDBOX.render(self._template, {**self._values, "messages": marked})


class Templated(str):
    """A prompt made of a template and a row; `marked` is the same text with marks around control tokens of the row."""

    marked: str | None

    def __new__(cls, text: str) -> Templated:
        """Of a text whose row went through `ControlTokens.mark`."""
        self = super().__new__(cls, unmarked(text))
        self.marked = text if START in text or END in text else None
        return self


def unmarked(text: str) -> str:
    return re.sub(f"[{START}{END}]", "", text)


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text with marks: what stands between two is plain text.

    Raises:
        RowError: the tokenizer cannot but make a control token of a plain text.
    """
    ids: list[int] = []
    for number, piece in enumerate(_MARKED.split(text)):
        plain = number % 2 == 1
        if piece is None and add_special_tokens:  # a job's prompt; chat templates do cut, at a "</think>" say
            raise RowError(ErrorType.INVALID_PROMPT, "the template cuts a control token of the row (or has U+FDD0)")
        if piece:
            new = _encode(tokenizer, piece, plain, first=not ids)
            if plain and tokenizer.convert_tokens_to_ids(piece) in new:
                text = f"the tokenizer cannot take the control token {piece[:40]!r} as plain text"
                raise RowError(ErrorType.INVALID_PROMPT, text)
            ids += new
    if not add_special_tokens:
        return ids
    line, whole = (tokenizer.encode("\n", add_special_tokens=add) for add in (False, True))
    at = next(at for at in range(len(whole)) if whole[at : at + len(line)] == line)
    return whole[:at] + ids + whole[at + len(line) :]


def _encode(tokenizer: PreTrainedTokenizerBase, piece: str, plain: bool, first: bool) -> list[int]:
    def encode(text: str) -> list[int]:
        if not plain:
            return tokenizer.encode(text, add_special_tokens=False)
        if not tokenizer.is_fast:
            return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        backend = tokenizer.backend_tokenizer  # its pipeline without the step that finds added tokens
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
        return [token.id for word, _ in words for token in backend.model.tokenize(word)]

    if first:
        return encode(piece)
    # Some tokenizers put a space before a text; behind a newline, which is cut off again, they put none.
    newline, ids = tokenizer.encode("\n", add_special_tokens=False), encode("\n" + piece)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)
