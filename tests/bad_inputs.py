"""Some 300 rows that cannot be answered, each with the error that it must become.

Every entry is (what, input, error_type, fragments of the message). The model of the tests has byte tokens 0 to 256 (256
is <eos>, whose text is a control token) and takes 256 tokens. SECRET stands for a row's text, which no message repeats.
"""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from rayinfer import RowError
from rayinfer.errors import ErrorType

SECRET = "the quick patient in room 12 is called Ada"
NAN, INF = float("nan"), float("inf")

# The chat template: what a message says decides how it fails.
TEMPLATE = (
    "{% for m in messages %}{% set c = m.content %}"
    "{% if c == 'raise' %}{{ raise_exception('roles must alternate') }}"
    "{% elif c == 'quote' %}{{ raise_exception('cannot take ' ~ m.note) }}"
    "{% elif c == 'divide' %}{{ 1 / 0 }}"
    "{% elif c == 'add' %}{{ c + 1 }}"
    "{% elif c == 'attribute' %}{{ m.nothing.more }}"
    "{% elif c == 'private' %}{{ c.__class__.__mro__ }}"
    "{% elif c == 'call' %}{{ c() }}"
    "{% elif c == 'range' %}{% for i in range(10**9) %}x{% endfor %}"
    "{% elif c == 'repeat' %}{{ 'a' * 10**10 }}"
    "{% elif c == 'power' %}{{ 10**10**9 * 10 }}{{ 2**99999 }}"
    "{% elif c == 'width' %}{{ c.ljust(10**9) }}"
    "{% elif c == 'format' %}{{ '%999999999d' % 1 }}"
    "{% elif c == 'append' %}{{ messages.append(m) }}"
    "{% elif c == 'double' %}{% set s = namespace(x=2) %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}"
    "{% elif c == 'nest' %}{% set s = namespace(x=1) %}{% for i in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}"
    "{% elif c == 'nothing' %}"
    "{% else %}[{{ m.role }}]{{ c }}{% endif %}{% endfor %}"
)


def chat(content: Any, role: Any = "user", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more}]}


def deep(levels: int) -> Any:
    value: Any = SECRET
    for _ in range(levels):
        value = [value]
    return value


def text(what: str, prompt: Any, *fragments: str, kind: str = "INVALID_PROMPT") -> tuple[Any, ...]:
    return (f"prompt {what}", {"prompt": prompt}, kind, fragments)


def ids(what: str, value: Any, *fragments: str, kind: str = "INVALID_PROMPT") -> tuple[Any, ...]:
    return (f"ids {what}", {"prompt_token_ids": value}, kind, fragments)


def talk(what: str, value: Any, *fragments: str, kind: str = "INVALID_PROMPT") -> tuple[Any, ...]:
    return (f"messages {what}", {"messages": value}, kind, fragments)


def sampling(what: str, value: Any, *fragments: str) -> tuple[Any, ...]:
    row = {"prompt": SECRET, "sampling_params": value}
    return (f"sampling {what}", row, "INVALID_SAMPLING_PARAMS", ("sampling_params", *fragments))


def template(content: str, *fragments: str, kind: str = "TEMPLATE_ERROR") -> tuple[Any, ...]:
    return (f"template {content}", chat(content, note=SECRET), kind, fragments)


def raises(what: str, error: BaseException, *fragments: str) -> tuple[Any, ...]:
    return (f"preprocess raises {what}", error, "PREPROCESS_ERROR", ("preprocess raised", "bad_inputs.py:", *fragments))


def returns(what: str, value: Any, *fragments: str) -> tuple[Any, ...]:
    return (f"preprocess returns {what}", lambda: value, "PREPROCESS_ERROR", fragments)


class BrokenError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Loops(Mapping):
    """A mapping that cannot be read."""

    def __getitem__(self, key: Any) -> Any:
        raise OSError("gone")

    def __iter__(self) -> Any:
        raise OSError("gone")

    def __len__(self) -> int:
        return 1


def _undecodable() -> BaseException:
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        return error
    raise AssertionError


STRING, LIST, EMPTY = "want a string", "want a list of integers that is not empty", "is empty"
LONG, FITS = "PROMPT_TOO_LONG", "at most 255 fit"

PROMPTS = [
    ("row empty", {}, "INVALID_PROMPT", ("one of messages, prompt, prompt_token_ids", "all None or missing")),
    ("row of other names", {"text": SECRET}, "INVALID_PROMPT", ("all None or missing",)),
    ("row of Nones", {"prompt": None, "messages": None}, "INVALID_PROMPT", ("all None or missing",)),
    ("row prompt+ids", {"prompt": SECRET, "prompt_token_ids": [1]}, "INVALID_PROMPT", ("both set", "prompt_token_ids")),
    ("row prompt+messages", {"prompt": SECRET, **chat(SECRET)}, "INVALID_PROMPT", ("messages and prompt", "both set")),
    ("row messages+ids", {**chat("a"), "prompt_token_ids": [1]}, "INVALID_PROMPT", ("messages and prompt_token_ids",)),
    ("row all three", {"prompt": "a", **chat("a"), "prompt_token_ids": [1]}, "INVALID_PROMPT", ("both set",)),
    text("None", None, "all None or missing"),
    text("empty", "", "prompt", EMPTY),
    text("empty numpy", np.str_(""), "prompt", EMPTY),
    text("int", 7, "prompt", STRING, "int"),
    text("zero", 0, STRING, "int"),
    text("float", 1.5, STRING, "float"),
    text("NaN", NAN, STRING, "float"),
    text("bool", True, STRING, "bool"),
    text("False", False, STRING, "bool"),
    text("bytes", SECRET.encode(), STRING, "bytes"),
    text("list", [SECRET], STRING, "list"),
    text("tuple", (SECRET, SECRET), STRING, "tuple"),
    text("mapping", {"text": SECRET}, STRING, "dict"),
    text("set", {SECRET}, STRING, "set"),
    text("array", np.array([SECRET]), STRING, "ndarray"),
    text("date", datetime.date(2026, 1, 1), STRING, "date"),
    text("complex", 1j, STRING, "complex"),
    text("high surrogate", "\ud800", "tokenizer refused"),
    text("low surrogate", SECRET + "\udfff", "tokenizer refused"),
    text("surrogates swapped", "\udc00\ud800", "tokenizer refused"),
    text("undecoded byte", b"\xff".decode(errors="surrogateescape"), "tokenizer refused"),
    text("at the limit", "x" * 256, "256 tokens", FITS, "max_model_len = 256", kind=LONG),
    text("over the limit", "x" * 257, "257 tokens", FITS, kind=LONG),
    text("a megabyte", SECRET * 25_000, FITS, kind=LONG),
    text("two-byte characters", "\xe9" * 128, "256 tokens", kind=LONG),
    text("four-byte characters", "\U0001f642" * 64, "256 tokens", kind=LONG),
    text("NULs", "\0" * 256, "256 tokens", kind=LONG),
    text("combining marks", "e" + "\u0301" * 128, "257 tokens", kind=LONG),
]

IDS = [
    ids("empty", [], "prompt_token_ids", LIST),
    ids("empty tuple", (), LIST),
    ids("empty array", np.zeros(0, np.int64), LIST),
    ids("float", [1.0], LIST),
    ids("fraction", [1, 2.5], LIST),
    ids("NaN", [NAN], LIST),
    ids("bool", [True], LIST),
    ids("bools", [False, True], LIST),
    ids("strings", ["1"], LIST),
    ids("string among", [1, "2"], LIST),
    ids("a string", "1 2 3", LIST),
    ids("an int", 5, LIST),
    ids("None among", [1, None], LIST),
    ids("nested", [[1]], LIST),
    ids("ragged", [[1], [2, 3]], LIST),
    ids("mapping", {"a": 1}, LIST),
    ids("set", {1, 2}, LIST),
    ids("bytes", b"\x01\x02", LIST),
    ids("complex", [1j], LIST),
    ids("iterator", iter, LIST),
    ids("matrix", np.ones((2, 2), np.int64), LIST),
    ids("float array", np.array([1.5]), LIST),
    ids("bool array", np.array([True]), LIST),
    ids("text array", np.array(["1"]), LIST),
    ids("beyond 64 bits", [10**30], LIST),
    ids("dates", [datetime.date(2026, 1, 1)], LIST),
    ids("just out", [257], "257 is out of the vocabulary", "0 to 256", kind="INVALID_TOKEN_IDS"),
    ids("last is out", [1, 2, 300], "300 is out", kind="INVALID_TOKEN_IDS"),
    ids("negative", [-1], "-1 is out", "0 to 256", kind="INVALID_TOKEN_IDS"),
    ids("negative among", np.array([5, -7]), "-7 is out", kind="INVALID_TOKEN_IDS"),
    ids("32 bits", [2**31], f"{2**31} is out", kind="INVALID_TOKEN_IDS"),
    ids("63 bits", [2**63 - 1], f"{2**63 - 1} is out", kind="INVALID_TOKEN_IDS"),
    ids("64 bits", [2**64 - 1], "is out", kind="INVALID_TOKEN_IDS"),
    ids("least", [-(2**63)], "is out", kind="INVALID_TOKEN_IDS"),
    ids("at the limit", [65] * 256, "256 tokens", FITS, kind=LONG),
    ids("over the limit", np.full(5000, 65), "5000 tokens", FITS, kind=LONG),
]

WANT, ROLE = "want a list of {role, content} that is not empty", "want a mapping with a string `role`"
PARTS = "only parts of type text are supported"
CONTROL = "a piece of a control token"
MESSAGES = [
    talk("empty", [], "messages", WANT),
    talk("empty tuple", (), WANT),
    talk("string", SECRET, WANT),
    talk("int", 5, WANT),
    talk("mapping", {"role": "user", "content": SECRET}, WANT),
    talk("bytes", SECRET.encode(), WANT),
    talk("of strings", [SECRET], "messages[0]", ROLE),
    talk("of None", [None], "messages[0]", ROLE),
    talk("of ints", [1, 2], "messages[0]", ROLE),
    talk("of lists", [["user", SECRET]], "messages[0]", ROLE),
    talk("of empty mappings", [{}], "messages[0]", ROLE),
    talk("nested", [[{"role": "user", "content": SECRET}]], "messages[0]", ROLE),
    talk("second bad", [{"role": "user", "content": "a"}, 5], "messages[1]", ROLE),
    talk("no role", [{"content": SECRET}], "messages[0]", ROLE),
    talk("role None", [{"role": None, "content": SECRET}], ROLE),
    talk("role int", [{"role": 1, "content": SECRET}], ROLE),
    talk("role list", [{"role": ["user"], "content": SECRET}], ROLE),
    talk("role bytes", [{"role": b"user", "content": SECRET}], ROLE),
    talk("role empty", [{"role": "", "content": SECRET}], "messages[0].role = ''", CONTROL),
    talk("role a control token", [{"role": "<eos>", "content": SECRET}], "'<eos>'", CONTROL, "assistant"),
    talk("role in a control token", [{"role": "eos", "content": SECRET}], "'eos'", CONTROL),
    talk("role with a control token", [{"role": "a<eos>b", "content": SECRET}], CONTROL),
    talk("role a surrogate", [{"role": "\ud800", "content": "a"}], "tokenizer refused"),
    talk("no content", [{"role": "user"}], "messages[0].content", STRING, "NoneType"),
    talk("content None", [{"role": "user", "content": None}], STRING, "NoneType"),
    talk("content int", [{"role": "user", "content": 5}], STRING, "int"),
    talk("content bool", [{"role": "user", "content": True}], STRING, "bool"),
    talk("content bytes", [{"role": "user", "content": SECRET.encode()}], STRING, "bytes"),
    talk("content mapping", [{"role": "user", "content": {"text": SECRET}}], STRING, "dict"),
    talk("content set", [{"role": "user", "content": {SECRET}}], STRING, "set"),
    talk("content NaN", [{"role": "user", "content": NAN}], STRING, "float"),
    talk("third content", [*chat("a")["messages"] * 2, {"role": "user", "content": 5}], "messages[2].content"),
    talk("part image", [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}], PARTS),
    talk("part without type", [{"role": "user", "content": [{"text": SECRET}]}], PARTS),
    talk("part without text", [{"role": "user", "content": [{"type": "text"}]}], PARTS),
    talk("part text int", [{"role": "user", "content": [{"type": "text", "text": 5}]}], PARTS),
    talk("part string", [{"role": "user", "content": [SECRET]}], PARTS),
    talk("part None", [{"role": "user", "content": [None]}], PARTS),
    talk(
        "part second",
        [{"role": "user", "content": [{"type": "text", "text": SECRET}, {"type": "audio"}]}],
        "messages[0].content",
        PARTS,
    ),
    talk("content surrogate", [{"role": "user", "content": SECRET + "\ud83d"}], "tokenizer refused"),
    talk("content long", [{"role": "user", "content": "x" * 251}], "257 tokens", FITS, kind=LONG),
    talk("content at the limit", [{"role": "user", "content": "x" * 250}], "256 tokens", FITS, kind=LONG),
    talk("many", [{"role": "user", "content": "a"}] * 1000, "7000 tokens", FITS, kind=LONG),
    talk("control tokens long", [{"role": "user", "content": "<eos>" * 50}], "256 tokens", FITS, kind=LONG),
    talk("deep", deep(5000), "deep recursion", kind="PREPROCESS_ERROR"),
    talk("deep extra", chat(SECRET, extra=deep(5000))["messages"], "deep recursion", kind="PREPROCESS_ERROR"),
]

TOO_LARGE = "too large"
TEMPLATES = [
    template("raise", "chat template", "TemplateError", "roles must alternate"),
    template("quote", "TemplateError", "cannot take"),
    template("divide", "ZeroDivisionError", "division by zero"),
    template("add", "TypeError"),
    template("attribute", "UndefinedError", "nothing"),
    template("private", "SecurityError", "unsafe"),
    template("call", "TypeError", "not callable"),
    template("range", "OverflowError", "Range too big"),
    template("repeat", "LimitError", TOO_LARGE),
    template("power", "LimitError", TOO_LARGE),
    template("width", "LimitError", TOO_LARGE),
    template("format", "LimitError", "width"),
    template("append", "SecurityError"),
    template("double", "LimitError", TOO_LARGE),
    template("nest", "LimitError", f"{TOO_LARGE}|ran for over"),
    template("nothing", "is empty", kind="INVALID_PROMPT"),
]

LIMITS: dict[str, list[tuple[Any, str]]] = {
    "temperature": [(-0.1, "greater than or equal to 0"), (100.5, "less than or equal to 100"), (10**30, "100")],
    "top_k": [(-2, "greater than or equal to -1"), (2**31, "less than 2147483648"), (1.5, "integer")],
    "top_p": [(0, "greater than 0"), (1.01, "less than or equal to 1"), (-1, "greater than 0")],
    "min_p": [(-0.01, "greater than or equal to 0"), (1.5, "less than or equal to 1"), (10**9, "1")],
    "seed": [(-1, "greater than or equal to 0"), (2**63, "less than 9223372036854775808"), (0.5, "integer")],
    "max_tokens": [(0, "greater than or equal to 1"), (-5, "greater than or equal to 1"), (2.5, "integer")],
    "min_tokens": [(-1, "greater than or equal to 0"), (17, "max_tokens"), (0.1, "integer")],
    "logprobs": [(-1, "greater than or equal to 0"), (21, "less than or equal to 20"), (1.5, "integer")],
    "prompt_logprobs": [(-1, "greater than or equal to 0"), (21, "less than or equal to 20"), (1.5, "integer")],
}
WRONG = [
    (True, "want a number, got bool"),
    ("1", "want a number, got str"),
    ([1], "number|integer"),
    (NAN, ""),
    (INF, ""),
]
FIELDS = [
    sampling(f"{name}={value!r}", {name: value}, name, message)
    for name, limits in LIMITS.items()
    for value, message in [*limits, *WRONG]
]
FLAGS = [
    sampling(f"{name}={value!r}", {name: value}, name, "valid boolean")
    for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")
    for value in (1, "yes", None)
]
MAPPING, UNKNOWN, UTF8 = "want a mapping", "unknown key", "UTF-8"
SAMPLING = [
    *FIELDS,
    *FLAGS,
    sampling("string", "greedy", MAPPING, "str"),
    sampling("JSON", '{"temperature": -0.5}', "temperature = -0.5", "greater than or equal to 0"),
    sampling("int", 5, MAPPING, "int"),
    sampling("float", 0.7, MAPPING, "float"),
    sampling("bool", True, MAPPING, "bool"),
    sampling("list", [0.7, 16], MAPPING, "list"),
    sampling("bytes", b"greedy", MAPPING, "bytes"),
    sampling("misspelt", {"temprature": 0}, UNKNOWN, "'temprature'", "did you mean 'temperature'?"),
    sampling("cut", {"max_token": 5}, UNKNOWN, "did you mean 'max_tokens'?"),
    sampling("dashed", {"top-k": 5}, UNKNOWN, "did you mean 'top_k'?"),
    sampling("capital", {"Temperature": 0}, UNKNOWN, "did you mean 'temperature'?"),
    sampling("OpenAI", {"max_completion_tokens": 5}, UNKNOWN, "Known keys: detokenize"),
    sampling("n", {"n": 2}, UNKNOWN, "'n'"),
    sampling("penalty", {"repetition_penalty": 1.1}, UNKNOWN, "'repetition_penalty'"),
    sampling("empty name", {"": 1}, UNKNOWN),
    sampling("long name", {"x" * 5000: 1}, UNKNOWN, "xxx"),
    sampling("surrogate name", {"\ud800": 1}, "ud800"),
    sampling("many names", {f"k{i}": i for i in range(500)}, UNKNOWN, "and 492 more"),
    sampling("int name", {5: 1}, "5"),
    sampling("two wrong", {"top_p": 2, "top_k": -5}, "top_p = 2", "top_k = -5"),
    sampling("min over max", {"min_tokens": 9, "max_tokens": 4}, "min_tokens (9) is above max_tokens (4)"),
    sampling("stop without text", {"stop": "a", "detokenize": False}, "stop strings need detokenize=True"),
    sampling("stop empty", {"stop": ""}, "stop", "may not be empty"),
    sampling("stop one empty", {"stop": ["a", ""]}, "may not be empty"),
    sampling("stop int", {"stop": 5}, "stop = 5", "tuple"),
    sampling("stop ints", {"stop": [5]}, "stop", UTF8),
    sampling("stop None among", {"stop": ["a", None]}, "stop", UTF8),
    sampling("stop bytes", {"stop": b"a"}, "stop", UTF8),
    sampling("stop surrogate", {"stop": "\ud800"}, "stop", UTF8),
    sampling("stop mapping", {"stop": {"a": 1}}, "stop"),
    sampling("stop id out", {"stop_token_ids": [257]}, "stop_token_ids", "257 is out of the vocabulary", "0 to 256"),
    sampling("stop id negative", {"stop_token_ids": [-1]}, "stop_token_ids", "-1 is out"),
    sampling("stop id huge", {"stop_token_ids": [10**30]}, "stop_token_ids"),
    sampling("stop id string", {"stop_token_ids": ["5"]}, "stop_token_ids", "integers"),
    sampling("stop id bool", {"stop_token_ids": [True]}, "stop_token_ids", "integers"),
    sampling("stop id float", {"stop_token_ids": [1.5]}, "stop_token_ids", "integer"),
    sampling("stop id None", {"stop_token_ids": [None]}, "stop_token_ids", "integer"),
    sampling("stop ids int", {"stop_token_ids": 5}, "stop_token_ids = 5", "tuple"),
    sampling("stop ids string", {"stop_token_ids": "5"}, "stop_token_ids = '5'", "integers"),
    sampling("long value", {"seed": SECRET * 5}, "seed = a str"),
]

WANT_DICT = "want a dict"
FUNCTIONS = [
    raises("ValueError", ValueError("no number"), "ValueError", "no number"),
    raises("KeyError", KeyError("column"), "KeyError", "column"),
    raises("ZeroDivisionError", ZeroDivisionError("division by zero"), "division by zero"),
    raises("what quotes the row", ValueError(f"cannot parse {SECRET!r}"), "cannot parse '[...]'"),
    raises("what quotes a part", RuntimeError(f"bad: {SECRET[4:25].upper()}!"), "bad:[...]!"),
    raises("UnicodeDecodeError", _undecodable(), "UnicodeDecodeError"),
    raises("JSONDecodeError", json.JSONDecodeError("Expecting value", SECRET, 0), "line 1 column 1"),
    raises("RecursionError", RecursionError("maximum depth"), "RecursionError"),
    raises("MemoryError", MemoryError(), "MemoryError"),
    raises("StopIteration", StopIteration(), "StopIteration"),
    raises("SystemExit", SystemExit(1), "SystemExit"),
    raises("AssertionError", AssertionError(), "AssertionError"),
    raises("a surrogate", ValueError("\ud800"), "ud800"),
    raises("no text", BrokenError(), "BrokenError"),
    raises("a very long text", ValueError("z" * 10**6), "zzz"),
    returns("None", None, "NoneType", WANT_DICT),
    returns("int", 42, "int", WANT_DICT),
    returns("string", SECRET, "str", WANT_DICT),
    returns("list", [SECRET], "list", WANT_DICT),
    returns("set", {SECRET}, "set", WANT_DICT),
    returns("generator", iter([SECRET]), "iterator", WANT_DICT),
    returns("generator in it", {"prompt": "a", "g": (i for i in ())}, "preprocess raised", "pickle"),
    returns("lock", {"prompt": "a", "lock": threading.Lock()}, "preprocess raised", "pickle"),
    returns("int key", {"prompt": "a", 5: 1}, "preprocess raised", "names no column"),
    returns("surrogate key", {"prompt": "a", "\ud800": 1}, "names no column"),
    returns("unreadable", Loops(), "preprocess raised", "OSError", "gone"),
    (
        "preprocess says so",
        RowError(ErrorType.INVALID_PROMPT, "no question in this row"),
        "INVALID_PROMPT",
        ("no question",),
    ),
]


def column(name: str, values: Any, kind: Any, *fragments: str, error: str = "INVALID_PROMPT") -> tuple[Any, ...]:
    columns = {name: pa.array(values, kind)}
    if name == "sampling_params":
        columns["prompt"] = pa.array(["a"])
    return (f"column {name}: {kind}", pa.table(columns), error, fragments)


_PARAMS = pa.struct([("temperature", pa.float64()), ("top_kk", pa.int64())])
_WRONG_PARAMS = pa.struct([("temperature", pa.string())])
BAD_PARAMS = {"error": "INVALID_SAMPLING_PARAMS"}
_ROLES = pa.list_(pa.struct([("role", pa.int64()), ("content", pa.string())]))
_CONTENTS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.int64())]))
_IMAGES = pa.struct([("type", pa.string()), ("text", pa.string())])
COLUMNS = [
    column("prompt", [5], pa.int64(), STRING, "int"),
    column("prompt", [1.5], pa.float64(), STRING, "float"),
    column("prompt", [True], pa.bool_(), STRING, "bool"),
    column("prompt", [b"a"], pa.binary(), STRING, "bytes"),
    column("prompt", [["a"]], pa.list_(pa.string()), STRING, "list"),
    column("prompt", [{"a": "b"}], pa.struct([("a", pa.string())]), STRING, "dict"),
    column("prompt", [0], pa.timestamp("ms"), STRING, "datetime"),
    column("prompt", [None], pa.null(), "all None or missing"),
    column("prompt_token_ids", [["1"]], pa.list_(pa.string()), LIST),
    column("prompt_token_ids", [[1.0]], pa.list_(pa.float32()), LIST),
    column("prompt_token_ids", [[True]], pa.list_(pa.bool_()), LIST),
    column("prompt_token_ids", [[1, None]], pa.list_(pa.int32()), LIST),
    column("prompt_token_ids", [[[1]]], pa.list_(pa.list_(pa.int32())), LIST),
    column("prompt_token_ids", [5], pa.int32(), LIST),
    column("prompt_token_ids", ["5"], pa.string(), LIST),
    column("prompt_token_ids", [[-1]], pa.list_(pa.int8()), "-1 is out", error="INVALID_TOKEN_IDS"),
    column("messages", ["hello"], pa.string(), WANT),
    column("messages", [["hello"]], pa.list_(pa.string()), "messages[0]", ROLE),
    column("messages", [[1]], pa.list_(pa.int64()), "messages[0]", ROLE),
    column("messages", [[{"role": 1, "content": "a"}]], _ROLES, "messages[0]", ROLE),
    column("messages", [[{"role": "user", "content": 1}]], _CONTENTS, "messages[0].content", STRING),
    column("messages", [[{"type": "image"}]], pa.list_(_IMAGES), "messages[0]", ROLE),
    column("sampling_params", ["greedy"], pa.string(), MAPPING, "str", **BAD_PARAMS),
    column("sampling_params", [5], pa.int64(), MAPPING, "int", **BAD_PARAMS),
    column("sampling_params", [[5]], pa.list_(pa.int64()), MAPPING, "list", **BAD_PARAMS),
    column("sampling_params", [{"top_kk": 5}], _PARAMS, UNKNOWN, "did you mean 'top_k'?", **BAD_PARAMS),
    column("sampling_params", [{"temperature": "0"}], _WRONG_PARAMS, "want a number, got str", **BAD_PARAMS),
]

ROWS = [*PROMPTS, *IDS, *MESSAGES, *TEMPLATES, *SAMPLING, *FUNCTIONS]  # what a preprocess makes, or raises
