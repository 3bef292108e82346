"""The columns that rows carry between the stages and get at the end, with their Arrow types.

Types are fixed here, not inferred, so that blocks of good rows, of failed rows and of both have one schema.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from rayinfer.errors import ConfigError, ErrorType, RowError, Stage
from rayinfer.request import Logprob, RequestOutput

ERROR_COLUMNS = ("error_type", "error_stage", "error_message")
_TYPES = frozenset(map(str, ErrorType))

# Between the stages. ROW holds, pickled, what the user's preprocess returned: Python values that Arrow would not keep.
TOKEN_IDS, PARAMS, ROW = "__rayinfer_token_ids", "__rayinfer_params", "__rayinfer_row"
FAILED = tuple(f"__rayinfer_{name}" for name in ERROR_COLUMNS)
ENCODED = pa.schema([(TOKEN_IDS, pa.list_(pa.int32())), *((name, pa.string()) for name in (PARAMS, *FAILED))])
HIDDEN = (*ENCODED.names, ROW)

_ENTRY = pa.struct([("token_id", pa.int32()), ("logprob", pa.float32()), ("rank", pa.int32()), ("token", pa.string())])
_LOGPROBS = pa.list_(_ENTRY)
OUTPUT = pa.schema([
    ("generated_text", pa.string()), ("generated_tokens", pa.list_(pa.int32())),
    ("num_input_tokens", pa.int32()), ("num_generated_tokens", pa.int32()), ("num_cached_tokens", pa.int32()),
    ("finish_reason", pa.string()), ("logprobs", pa.list_(_LOGPROBS)), ("prompt_logprobs", pa.list_(_LOGPROBS)),
    *((name, pa.string()) for name in ERROR_COLUMNS), ("attempts", pa.int32()),
])  # fmt: skip
WHEN_ASKED = ("logprobs", "prompt_logprobs")
ALWAYS = tuple(name for name in OUTPUT.names if name not in WHEN_ASKED)


def refuse_taken(names: Iterable[str], outputs: Iterable[str] = ALWAYS) -> None:
    """Raise ConfigError for a user's column that an output would replace.

    Those of a processor before this one may be replaced. Its tables have ERROR_COLUMNS, one of which may be dropped.
    """
    taken = [name for name in outputs if name in names]
    if taken and sum(name in names for name in ERROR_COLUMNS) < 2:
        raise ConfigError(f"column {taken[0]!r}: an output has this name, and would replace it; rename it, or drop it")


def with_columns(table: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    """The table with columns replaced or appended; without columns a table has no rows to keep."""
    return pa.table({name: table.column(name) for name in table.column_names} | dict(columns))


def to_rows(table: pa.Table) -> tuple[list[dict[str, Any]], dict[int, RowError]]:
    """The rows as Python's values, and an error for each row with a value that Python has none for: it is None there.

    Such are dates after the year 9999, and text that is no UTF-8, which Arrow reads without a look at it.
    """
    errors: dict[int, RowError] = {}

    def held(name: str, index: int, value: Any) -> Any:
        try:
            return value.as_py()
        except Exception as error:  # of whatever type's conversion
            text = f"column {name!r}: Python cannot hold its value ({type(error).__name__})"
            errors[index] = RowError(ErrorType.INVALID_PROMPT, text, Stage.READ)

    try:
        return table.to_pylist(), {}
    except Exception:
        columns = [[held(name, *item) for item in enumerate(table[name])] for name in table.column_names]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)], errors


def without(table: pa.Table, names: Iterable[str]) -> pa.Table:
    return table.drop_columns([name for name in names if name in table.column_names])


def output_row(result: RequestOutput | RowError, attempt: int) -> dict[str, Any]:
    """Values of the OUTPUT columns of one row; all but the finish reason and the error are None in a failed one."""
    if isinstance(result, RowError):  # it never reached the engine
        return error_values(result, Stage.ENCODE) | {"finish_reason": "error", "attempts": 0}
    attempt += result.num_restarts
    if result.error_type is not None:
        error = RowError(ErrorType(result.error_type), result.error_message or "")
        return error_values(error, Stage.ENGINE) | {"finish_reason": "error", "attempts": attempt}
    completion = result.outputs[0]
    return {
        "generated_text": completion.text, "generated_tokens": completion.token_ids,
        "num_input_tokens": len(result.prompt_token_ids), "num_generated_tokens": len(completion.token_ids),
        "num_cached_tokens": result.num_cached_tokens, "finish_reason": completion.finish_reason,
        "logprobs": _logprobs(completion.logprobs), "prompt_logprobs": _logprobs(result.prompt_logprobs),
        "attempts": attempt,
    }  # fmt: skip


def error_values(error: RowError, stage: str) -> dict[str, str]:
    """Values of ERROR_COLUMNS; `stage` is that of an error that names none."""
    return dict(zip(ERROR_COLUMNS, (str(error.type), str(error.stage or stage), str(error)), strict=True))


def error_of(row: Mapping[str, Any]) -> RowError | None:
    """The error that a row's columns hold, if they are ours."""
    kind, stage, message = map(row.get, ERROR_COLUMNS)
    return RowError(ErrorType(kind), str(message), str(stage)) if isinstance(kind, str) and kind in _TYPES else None


def _logprobs(positions: Sequence[Mapping[int, Logprob] | None] | None) -> list[Any] | None:
    """A list for each position, of the tokens that were asked for and the one that was taken."""
    return None if positions is None else [one and [_logprob(*item) for item in one.items()] for one in positions]


def _logprob(id: int, entry: Logprob) -> dict[str, Any]:
    return {"token_id": id, "logprob": entry.logprob, "rank": entry.rank, "token": entry.decoded_token}


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> dict[str, pa.Array]:
    """Arrays of the schema's types; a row that lacks a key gets a null."""
    return {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in schema}


def raise_row(error: RowError, row: Mapping[str, Any], index: int) -> None:
    """Raise an error that names its row: the place in the batch and what looks like the key."""
    keys = [name for name in row if name.lower() in ("id", "key", "uuid", "row_key") or name.lower().endswith("_id")]
    shown = "".join(f", {name}={str(row[name])[:80]!r}" for name in keys)
    raise RowError(ErrorType(error.type), f"row {index} of its batch{shown}: {error.type}: {error}") from error
