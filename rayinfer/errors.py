"""Errors users meet. A `RowError` costs one row; everything else refuses the job before an engine starts."""

import difflib
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_QUOTE = 8  # characters that an error may repeat of a row
_MAX_TEXT = 400  # characters of an exception's text
_MAX_SHOWN = 60  # characters of a value
_MAX_LINES = 8


class ErrorType(StrEnum):
    """The closed set of values that the `error_type` column can hold."""

    INVALID_PROMPT = "INVALID_PROMPT"  # missing, None, empty, wrong type, malformed messages
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"  # no room for one generated token under max_model_len
    INVALID_TOKEN_IDS = "INVALID_TOKEN_IDS"  # given or a text's, out of the vocabulary
    INVALID_SAMPLING_PARAMS = "INVALID_SAMPLING_PARAMS"  # unknown name, wrong type, out of range
    TEMPLATE_ERROR = "TEMPLATE_ERROR"  # the chat or prompt template raised
    PREPROCESS_ERROR = "PREPROCESS_ERROR"  # the user's preprocess raised or returned no row
    POSTPROCESS_ERROR = "POSTPROCESS_ERROR"  # the user's postprocess raised or returned no row
    NAN_LOGITS = "NAN_LOGITS"  # the model gave NaN for this row
    ENGINE_CRASH = "ENGINE_CRASH"  # the engine died each time that it ran this row, at last alone
    ABORTED = "ABORTED"  # taken out before it was finished


class Stage(StrEnum):
    """The closed set of values that the `error_stage` column can hold: where on its way a row was lost."""

    READ = "read"  # from its file
    PREPROCESS = "preprocess"  # the user's function; in a job, its prompt template
    ENCODE = "encode"  # checks, chat template, tokenizer, limits
    ENGINE = "engine"
    POSTPROCESS = "postprocess"


class RowError(ValueError):
    """One row cannot be answered. `type` goes to `error_type`, the text to `error_message`, so it is valid UTF-8.

    `stage` goes to `error_stage`; None, or what is no Stage: whoever catches it knows.
    """

    def __init__(self, type: ErrorType, message: str, stage: str | None = None):
        super().__init__(message.encode(errors="backslashreplace").decode())
        self.type, self.stage = ErrorType(type), Stage(stage) if stage and stage in {*Stage} else None

    def __reduce__(self):
        return (RowError, (self.type, str(self), self.stage))


class ConfigError(ValueError):
    """A setting, model or path that the user gave cannot be used; the text says the way out, and no URI's password."""

    def __init__(self, message: str):
        super().__init__(bare_uri(message))


class UnsupportedModelError(ConfigError):
    """The architecture cannot run on the paged engine."""


def bare_uri(text: str) -> str:
    """A URI, or a text with URIs in it, without user, password and query, in which credentials travel."""
    text = re.sub(r"://[^/\s'\"]*@", "://", text)
    return re.sub(r"(://[^\s'\"]*?)\?[^\s'\"/?=]*=[^\s'\"]*", r"\1", text)  # without a "=" the ? is a glob's


def describe(error: BaseException, row: Any) -> str:
    """`Type (file:line): text` of what a user's function or a template raised, less what the text quotes of the row.

    Cut out is every run of _QUOTE characters that one of the row's strings holds too, in whatever case; shorter ones,
    and what was computed from the row, stay. The line is where the function, or the template, was left.
    """
    try:
        text = " ".join(str(error).split())[:_MAX_TEXT]
    except Exception:  # str() of a user's exception is the user's code
        text = ""
    own = "\0".join(" ".join(part.split()) for part in _strings(row)).casefold()
    kept = list(text)
    for start in range(len(text) - _QUOTE + 1):
        if text[start : start + _QUOTE].casefold() in own:
            kept[start : start + _QUOTE] = ["\0"] * _QUOTE
    text = re.sub("\0+", "[...]", "".join(kept))
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    inner = [frame for frame in frames if frame[0] == "<template>"][-1:] or frames[1:]  # the first one caught the error
    place = f" ({os.path.basename(inner[0][0])}:{inner[0][1]})" if inner else ""
    return f"{type(error).__name__}{place}: {text}" if text else f"{type(error).__name__}{place}"


def _strings(value: Any) -> Iterable[str]:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, bytes):
            yield item.decode(errors="replace")
        elif isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def choices(name: str, known: Iterable[str], what: str = "Columns") -> str:
    """The end of an error about an unknown name: the nearest known one, and all."""
    return f"{nearest(name, known) or '.'} {what}: {', '.join(known)}"


def explain_validation(error: ValidationError, model: type[BaseModel], place: str) -> str:
    """Turn a pydantic error into one line an entry: the place, the field, the value, what is allowed.

    Values are shown by type when they are long: a row's text must not reach a log through an error.
    """
    lines = []
    entries = error.errors(include_url=False)
    for entry in entries[:_MAX_LINES]:
        field = ".".join(str(part)[:_MAX_SHOWN] for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            fields = sorted(_fields_at(model, entry["loc"][:-1]))
            lines.append(f"{place}: unknown key {field!r}{choices(field.split('.')[-1], fields, 'Known keys')}")
            continue
        value: Any = entry.get("input")
        shown = repr(value) if len(repr(value)) <= _MAX_SHOWN else f"a {type(value).__name__}"
        lines.append(f"{place}: {field or 'value'} = {shown}: {entry['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines + [f"{place}: and {len(entries) - _MAX_LINES} more"] * (len(entries) > _MAX_LINES))


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the (nested) model that `path` leads to."""
    for part in path:
        inner = getattr(model.model_fields.get(str(part)), "annotation", None)
        nested = [c for c in (inner, *get_args(inner)) if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
