"""Jinja2 for templates that may be hostile: what one rendering computes and builds is limited.

Jinja2's own sandbox keeps a template away from Python's internals, but not from a loop of 10^10 turns, a string of
10 GB or a list that holds another one 2^40 times. A thread cannot be interrupted inside one C call, and a process for
each worker would cost more than the templates do. So operations whose result may be far larger than their operands are
refused before they run, results are weighed, and turns of loops look at the clock of this thread's CPU time, which a
busy machine does not move: a row that is rendered here is rendered everywhere.
"""

import functools
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import Template, TemplateRuntimeError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 2.0  # CPU time of one rendering
MAX_SIZE = 2**24  # characters and elements of one value, the text included
MAX_TOTAL = 2**30  # of all values that one rendering makes
_MAX_WORK = 2**28  # bound on the result of one call, known before it is made
_MAX_ELEMENTS = 2**20  # of one value, counted through its containers
_MAX_WIDTH = 10**5
_LOOK = 256  # characters, elements, turns and calls between two looks at the clock
_MAX_BITS = 2**12  # of an integer

# Filters and methods of strings whose result is not bounded by a multiple of their input; widths are integer arguments.
_GROWING = {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "round", "slice", "tojson"}
_GROWING |= {"translate", "wordwrap", "zfill", "format", "format_map"}
_WIDE = re.compile(r"\d{5}|%[-+ #0-9.]*\*|\{[^{}]*\{")  # widths in a format, or taken from its arguments
_VIEWS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class LimitError(TemplateRuntimeError):
    """A rendering went over a limit of this module."""


class Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja2 environment with limits; `template` and `render` instead of `from_string` and `Template.render`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, filters: dict[str, Callable[..., Any]], **options: Any):
        super().__init__(**options)
        self._spent = threading.local()
        self.filters = {name: self._limited(name, filter) for name, filter in (self.filters | filters).items()}
        self.filters |= {"_turns": self._turns, "_weighed": self.weighed}
        self.globals.update(namespace=_Namespace, dict=lambda *args, **kwargs: dict(*args, **kwargs))
        self.globals.pop("lipsum")

    def template(self, source: str) -> Template:
        """Compile. Raises jinja2.TemplateSyntaxError, RecursionError."""
        self._begin()  # constant expressions are evaluated now
        return self.from_string(_Charging().visit(self.parse(source)))

    def render(self, template: Template, values: Mapping[str, Any]) -> str:
        """Render. Raises LimitError, and whatever the template does."""
        self._begin()
        return template.render(values)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        bound = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        if isinstance(getattr(bound, "__self__", None), str):
            __self._foresee(bound.__name__, bound.__self__, (*args, *kwargs.values()))
        return __self.weighed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._foresee("format", left, (right,))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _refuse_above(bits, _MAX_BITS, "bits")
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int):
                _refuse_above(times * weigh(value), MAX_SIZE, "characters or elements")
        return self.weighed(super().call_binop(context, operator, left, right))

    def weighed(self, value: Any) -> Any:
        """The value, charged to this rendering."""
        self._spend(weigh(value))
        return value

    def _begin(self) -> None:
        self._spent.total, self._spent.next_look, self._spent.until = 0, _LOOK, time.thread_time() + MAX_SECONDS

    def _spend(self, size: int) -> None:
        spent = self._spent
        spent.total += size + 1
        if spent.total > spent.next_look:
            spent.next_look = spent.total + _LOOK
            _refuse_above(spent.total, MAX_TOTAL, "characters or elements in all")
            if time.thread_time() > spent.until:
                raise LimitError(f"the template ran for over {MAX_SECONDS:g} s")

    def _turns(self, value: Iterable[Any]) -> Iterator[Any]:
        for item in value:
            self._spend(0)
            yield item

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        size, kept = 0, []
        for part in parts:
            size += len(part)
            _refuse_above(size, MAX_SIZE, "characters")
            kept.append(part)
        self._spend(size)
        return "".join(kept)

    def _limited(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(filter, "jinja_pass_arg"))  # the environment or context comes before the value

        @functools.wraps(filter)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._foresee(name, args[first], (*args[first + 1 :], *kwargs.values()))
            return self.weighed(filter(*args, **kwargs))

        return limited

    def _foresee(self, name: str, value: Any, args: tuple[Any, ...]) -> None:
        """Refuse a call whose result may be too large."""
        if name in _GROWING:
            formats = name.startswith("format")
            if formats and _WIDE.search(str(value)):
                raise LimitError("the template formats with a width that is too large or not written out")
            widths = [abs(arg) for arg in args if isinstance(arg, int) and not formats]
            _refuse_above(max(widths, default=0), _MAX_WIDTH, "characters of width")
            _refuse_above(weigh(value) * (1 + sum(widths) + sum(map(weigh, args))), _MAX_WORK, "characters at most")


class _Namespace(Namespace):
    """Jinja2's, but printed without its attributes, which may be namespaces, which ..."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Charging(NodeTransformer):
    """Loops count their turns; `~` and literals with values in them are weighed like any call."""

    def visit_For(self, node: Any) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)
        node.iter = _filter("_turns", node.iter)
        return node

    def visit_Concat(self, node: Any) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)
        return _filter("join", nodes.List(node.nodes, lineno=node.lineno, environment=node.environment))

    def visit_List(self, node: Any) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if constant or getattr(node, "ctx", "load") != "load" else _filter("_weighed", node)

    visit_Tuple = visit_Dict = visit_List


def _filter(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def weigh(value: Any) -> int:
    """Characters and elements of a value, counted as often as they would be printed.

    Raises:
        LimitError: more than MAX_SIZE or _MAX_ELEMENTS.
    """
    if type(value) is str:
        _refuse_above(len(value), MAX_SIZE, "characters")
        return len(value)
    size, num_elements, left = 0, 0, [value]
    while left:
        item = left.pop()
        num_elements += 1
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            left += [*item, *item.values()]
        elif isinstance(item, _VIEWS):
            left += item
        _refuse_above(size, MAX_SIZE, "characters")
        _refuse_above(num_elements, _MAX_ELEMENTS, "elements")
    return size + num_elements


def _refuse_above(amount: int, limit: int, unit: str) -> None:
    if amount > limit:
        raise LimitError(f"the template makes a value that is too large: over {limit:,} {unit}")
