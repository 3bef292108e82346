"""Errors users meet. A `RowError` costs one row; everything else refuses the job before an engine starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ValidationError


class ErrorType(StrEnum):
    """The closed set of values that the `error_type` column can hold."""

    INVALID_PROMPT = "INVALID_PROMPT"  # missing, None, empty, wrong type, malformed messages
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"  # no room for one generated token under max_model_len
    INVALID_TOKEN_IDS = "INVALID_TOKEN_IDS"  # prompt_token_ids out of the vocabulary
    INVALID_SAMPLING_PARAMS = "INVALID_SAMPLING_PARAMS"  # unknown name, wrong type, out of range
    TEMPLATE_ERROR = "TEMPLATE_ERROR"  # the chat or prompt template raised
    PREPROCESS_ERROR = "PREPROCESS_ERROR"  # the user's preprocess raised or returned no row
    POSTPROCESS_ERROR = "POSTPROCESS_ERROR"  # the user's postprocess raised or returned no row
    NAN_LOGITS = "NAN_LOGITS"  # the model gave NaN for this row
    ABORTED = "ABORTED"  # taken out before it was finished


class RowError(ValueError):
    """One row cannot be answered. `type` goes to `error_type`, the text to `error_message`."""

    def __init__(self, type: ErrorType, message: str):
        super().__init__(message)
        self.type = type

    def __reduce__(self):
        return (RowError, (self.type, str(self)))


class ConfigError(ValueError):
    """A setting, model or path that the user gave cannot be used; the text says the way out."""


class UnsupportedModelError(ConfigError):
    """The architecture cannot run on the paged engine."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def explain_validation(error: ValidationError, model: type[BaseModel], place: str) -> str:
    """Turn a pydantic error into one line an entry: the place, the field, the value, what is allowed.

    Values are shown by type when they are long: a row's text must not reach a log through an error.
    """
    lines = []
    for entry in error.errors(include_url=False):
        field = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            fields = _fields_at(model, entry["loc"][:-1])
            known = ", ".join(sorted(fields))
            lines.append(f"{place}: unknown key {field!r}{nearest(str(entry['loc'][-1]), fields)} Known keys: {known}")
            continue
        value: Any = entry.get("input")
        shown = repr(value)
        if len(shown) > 60:
            shown = f"a {type(value).__name__}"
        message = entry["msg"].removeprefix("Value error, ")
        lines.append(f"{place}: {field or 'value'} = {shown}: {message}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the (nested) model that `path` leads to."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = getattr(field, "annotation", None)
        candidates = [inner, *getattr(inner, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
