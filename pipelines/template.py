"""Prompt templates: sandboxed Jinja2 over one row's columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rayinfer.errors import ConfigError, ErrorType, RowError, nearest

ROW_NAME = "row"  # `row["my column"]` reaches columns whose name is no Jinja2 identifier


def _refuse_none(value: Any) -> Any:
    # Jinja2 prints a null column as the word None, and the model would answer that: a row without its text is bad.
    if value is None:
        raise RowError(
            ErrorType.TEMPLATE_ERROR, "the template prints a null value; use {{ x or '' }} or {% if x %} to allow it"
        )
    return value


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_refuse_none, keep_trailing_newline=True)
    for name in ("range", "lipsum", "cycler", "joiner", "namespace", "dict"):
        env.globals.pop(name, None)
    return env


class PromptTemplate:
    """Renders a row into `{"prompt": str}` or `{"messages": [{"role", "content"}, ...]}`.

    Args:
        prompt: one template, for models used without a chat template.
        messages: (role, content template) pairs, in order. Exactly one of the two is given.

    Raises:
        ConfigError: a template is not valid Jinja2.
    """

    def __init__(self, prompt: str | None = None, messages: Sequence[tuple[str, str]] = ()):
        self._prompt = prompt
        self._messages = list(messages)
        _ = self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return {"_prompt": self._prompt, "_messages": self._messages}  # compiled templates do not pickle

    @cached_property
    def _compiled(self) -> list[Any]:
        env = _environment()
        sources = self._sources()
        compiled = []
        for place, text in sources:
            try:
                compiled.append(env.from_string(text))
            except TemplateSyntaxError as error:
                raise ConfigError(f"{place}: line {error.lineno} of the template: {error.message}") from None
        return compiled

    def _sources(self) -> list[tuple[str, str]]:
        if self._prompt is not None:
            return [("prompt", self._prompt)]
        return [(f"messages.{i}.content", text) for i, (_, text) in enumerate(self._messages)]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ConfigError for a name that is no column of the source."""
        columns = list(columns)
        env = _environment()
        for place, text in self._sources():
            tree = env.parse(text)
            used = meta.find_undeclared_variables(tree)
            if ROW_NAME in used and ROW_NAME not in columns:
                used.discard(ROW_NAME)
                used |= _constant_keys(tree)
            for name in sorted(used - set(columns)):
                raise ConfigError(
                    f"{place}: the template uses {name!r}, which is no column of the source"
                    f"{nearest(name, columns)} Columns: {', '.join(columns)}"
                )

    def render(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Render one row.

        Raises:
            RowError: TEMPLATE_ERROR; the message never holds the row's text.
        """
        try:
            texts = [template.render({ROW_NAME: row, **row}) for template in self._compiled]
        except RowError:
            raise
        except TemplateError as error:
            raise RowError(ErrorType.TEMPLATE_ERROR, f"{type(error).__name__}: {error.message}") from None
        except Exception as error:
            # The text of a Python error may quote the value that it choked on, so only its type is told.
            raise RowError(ErrorType.TEMPLATE_ERROR, f"the template raised {type(error).__name__}") from None
        if self._prompt is not None:
            return {"prompt": texts[0]}
        return {
            "messages": [{"role": role, "content": text} for (role, _), text in zip(self._messages, texts, strict=True)]
        }


def _constant_keys(tree: nodes.Template) -> set[str]:
    """Names used as `row["name"]` or `row.name`."""
    keys = set()
    for node in tree.find_all((nodes.Getitem, nodes.Getattr)):
        if not (isinstance(node.node, nodes.Name) and node.node.name == ROW_NAME):
            continue
        if isinstance(node, nodes.Getattr):
            keys.add(node.attr)
        elif isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            keys.add(node.arg.value)
    return keys
