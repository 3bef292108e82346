"""Prompt templates: sandboxed Jinja2 over one row's columns."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import BuiltinMethodType
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes

from rayinfer.chat import ControlTokens, Templated
from rayinfer.errors import ConfigError, ErrorType, RowError, choices, describe
from rayinfer.sandbox import Sandbox

ROW_NAME = "row"  # `row["my column"]` reaches columns whose name is no Jinja2 identifier


def _refuse_none(value: Any) -> Any:
    # Jinja2 prints a null column as the word None, and the model would answer that: a row without its text is bad.
    if value is None:
        text = "the template prints a null value; use {{ '' if x is none else x }} to allow it in a column x"
        raise RowError(ErrorType.TEMPLATE_ERROR, text)
    if isinstance(value, bytes | BuiltinMethodType):
        raise TypeError(f"printed {type(value).__name__} is no text; of bytes use x.decode(), of a field x['items']")
    return value


# As chat templates write JSON: Jinja2's own is for HTML.
_FILTERS = {"tojson": lambda value, indent=None: json.dumps(value, indent=indent, ensure_ascii=False)}
_ENVIRONMENT = Sandbox(_FILTERS, undefined=StrictUndefined, finalize=_refuse_none, keep_trailing_newline=True)
_ENVIRONMENT.globals.clear()  # a name is a column or a mistake


class PromptTemplate:
    """Renders a row into `{"prompt": str}` or `{"messages": [{"role", "content"}, ...]}`.

    Args:
        prompt: one template, for models used without a chat template.
        messages: (role, content template) pairs, in order. Exactly one of the two is given.

    Raises:
        ConfigError: a template is not valid Jinja2.
    """

    def __init__(self, prompt: str | None = None, messages: Sequence[tuple[str, str]] = ()):
        self._given = prompt, messages
        self._roles = None if prompt is not None else [role for role, _ in messages]
        contents = {f"messages.{i}.content": text for i, (_, text) in enumerate(messages)}
        self._sources = contents if prompt is None else {"prompt": prompt}
        self._compiled = []
        for place, text in self._sources.items():
            try:
                self._compiled.append(_ENVIRONMENT.template(text))
            except TemplateSyntaxError as error:
                raise ConfigError(f"{place}: line {error.lineno} of the template: {error.message}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptTemplate, self._given  # compiled templates do not pickle

    @cached_property
    def _names(self) -> list[str]:
        """All that may be a column."""
        trees = [_ENVIRONMENT.parse(text) for text in self._sources.values()]
        return sorted(set().union(*(meta.find_undeclared_variables(tree) | _keys_of_row(tree) for tree in trees)))

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise ConfigError for a name that is no column of the source."""
        for place, text in self._sources.items():
            tree = _ENVIRONMENT.parse(text)
            used = meta.find_undeclared_variables(tree)
            if ROW_NAME not in columns:
                used = (used - {ROW_NAME}) | _keys_of_row(tree)
            for name in sorted(used - set(columns)):
                text = f"the template uses {name!r}, which is no column of the source{choices(name, columns)}"
                raise ConfigError(f"{place}: {text}")

    def render(self, row: Mapping[str, Any], control: ControlTokens | None = None) -> dict[str, Any]:
        """Render one row.

        Args:
            control: control tokens, which are text where the row has them, and themselves where the template of a
                prompt has them. (In messages all content is text: the chat template alone has control tokens.)

        Raises:
            RowError: TEMPLATE_ERROR; the message never holds the row's text.
        """
        if self._roles is None and control is not None:
            row = control.mark(dict(row))
        try:
            texts = [_ENVIRONMENT.render(template, {ROW_NAME: row, **row}) for template in self._compiled]
        except RowError as error:
            null = ", ".join(name for name in self._names if row.get(name, "") is None) or "something in a value"
            raise RowError(error.type, f"{error}; null in this row: {null}") from None
        except Exception as error:
            raise RowError(ErrorType.TEMPLATE_ERROR, f"the template raised {describe(error, row)}") from None
        if self._roles is None:
            return {"prompt": Templated(texts[0])}
        return {"messages": [{"role": role, "content": text} for role, text in zip(self._roles, texts, strict=True)]}


def _keys_of_row(tree: nodes.Template) -> set[str]:
    """Names used as `row["name"]` or `row.name`; `row.get` is a method, whatever columns there are."""
    own = (node for node in tree.find_all(nodes.Getattr) if getattr(node.node, "name", "") == ROW_NAME)
    keys = {node.attr for node in own if not hasattr(dict, node.attr)}
    items = [node.arg for node in tree.find_all(nodes.Getitem) if getattr(node.node, "name", "") == ROW_NAME]
    return keys | {arg.value for arg in items if isinstance(arg, nodes.Const) and isinstance(arg.value, str)}
