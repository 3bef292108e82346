"""The CPU stages around the engine: the user's functions, chat template and tokenizer, and the result's columns."""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from ray import cloudpickle

from rayinfer.errors import RowError, Stage, describe
from rayinfer.processors import columns as col
from rayinfer.processors.functions import RowFunction, call_all, failed, utf8
from rayinfer.processors.llm_processor import INPUTS, as_mapping, sampling_defaults, with_defaults
from rayinfer.processors.ray_compat import take_rows
from rayinfer.sampling import SamplingParams

if TYPE_CHECKING:
    from rayinfer.inputs import InputProcessor

PREFIX_TOKENS = 4096  # of a prompt are compared


class Prepare:
    """Preprocess, chat template and tokenizer; yields tables of at most batch_size rows, each one call of an engine."""

    yields_blocks = True

    def __init__(
        self, inputs: InputProcessor, preprocess: RowFunction | None,
        sampling_params: SamplingParams | Mapping[str, Any], batch_size: int, on_error: str, seconds: float = 600.0,
    ):  # fmt: skip
        from rayinfer.chat import ControlTokens

        self._inputs, self._preprocess = inputs, preprocess
        self._repeats = preprocess is None or hasattr(preprocess, "control_tokens")  # a user's may give other prompts
        if hasattr(preprocess, "control_tokens") and inputs.tokenizer is not None:  # a template of its own
            preprocess.control_tokens = ControlTokens(inputs.tokenizer)  # type: ignore[union-attr]
        self._defaults = sampling_defaults(sampling_params)
        self._batch_size, self._on_error, self._seconds = batch_size, on_error, seconds

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        table = self._encode(table)
        # A lost worker's task runs again, and Ray skips as many blocks as it has: these are to hold the same rows.
        if self._repeats:
            table = take_rows(table, by_prefix(table[col.TOKEN_IDS]))
        num_blocks = -(-table.num_rows // self._batch_size)
        size = -(-table.num_rows // num_blocks)  # even, so that no call holds an engine's place with a row or two
        for start in range(0, table.num_rows, size):
            block = table.slice(start, size)
            yield block if self._repeats else take_rows(block, by_prefix(block[col.TOKEN_IDS]))

    def _encode(self, table: pa.Table) -> pa.Table:
        table = col.without(table, col.HIDDEN)
        rows, unread = col.to_rows(table)
        packed: list[bytes | None] = [None] * len(rows)
        asked: dict[int, Mapping[str, Any]] = {}
        # EncodedRow or RowError, at first those of a processor before this one
        results: dict[int, Any] = unread | {i: error for i, row in enumerate(rows) if (error := col.error_of(row))}
        left = {index: row for index, row in enumerate(rows) if index not in results}
        added: list[Any] = [{}] * len(left)
        if self._preprocess is not None:
            added = call_all(self._preprocess, list(left.values()), Stage.PREPROCESS, self._seconds)
        for (index, row), new in zip(left.items(), added, strict=True):
            try:
                if isinstance(new, RowError):
                    raise new
                if new:
                    # Also classes that the driver's script has; what cannot be made again fails here, not in `finish`.
                    pickle.loads(data := cloudpickle.dumps(dict(new)))
                    packed[index] = data
                asked[index] = self._request(row, new)
            except RowError as error:
                results[index] = error
            except Exception as error:  # a user's object that does not pickle raises what it likes
                results[index] = failed(Stage.PREPROCESS, f"raised {describe(error, row)}")
        results |= zip(asked, self._inputs.encode_batch(list(asked.values())), strict=True)
        hidden = []
        for index, result in sorted(results.items()):
            if not isinstance(result, RowError):
                params = result.params.model_dump_json(exclude_unset=True)
                hidden.append({col.TOKEN_IDS: np.array(result.prompt_token_ids, np.int32), col.PARAMS: params})
            elif self._on_error == "raise":
                col.raise_row(result, rows[index], index)
            else:
                hidden.append(dict(zip(col.FAILED, col.error_values(result, Stage.ENCODE).values(), strict=True)))
        arrays = col.table_of(hidden, col.ENCODED)
        if self._preprocess is not None:
            arrays[col.ROW] = pa.array(packed, pa.binary())
        return col.with_columns(table, arrays)

    def _request(self, row: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
        """The input columns of a row; a prompt of whatever kind made by preprocess hides those of the table."""
        inputs = new if any(key in new for key in INPUTS) else row
        request = {key: inputs[key] for key in INPUTS if key in inputs}
        own = as_mapping(new.get("sampling_params", row.get("sampling_params")))
        if "sampling_params" in new and isinstance(own, Mapping):  # Python's, so a None in it is meant: no max_tokens
            return {**request, "sampling_params": SamplingParams.from_row({**self._defaults, **own})}
        return with_defaults({**request, "sampling_params": own}, self._defaults)


def by_prefix(token_ids: pa.ChunkedArray) -> list[int]:
    """The order in which prompts that begin alike stand together, so that one engine gets them and reads that once."""
    lists = token_ids.combine_chunks()
    starts, ids = lists.offsets.to_numpy(), lists.values.to_numpy().astype(">i4")
    keys = [ids[a : min(b, a + PREFIX_TOKENS)].tobytes() for a, b in itertools.pairwise(starts)]
    return sorted(range(len(keys)), key=keys.__getitem__)


def finish(table: pa.Table, postprocess: RowFunction | None, on_error: str, seconds: float = 600.0) -> pa.Table:
    """Unpack what preprocess added, call postprocess, and give good and failed rows the same columns."""
    packed = table[col.ROW].to_pylist() if col.ROW in table.column_names else []
    added = [{} if data is None else pickle.loads(data) for data in packed]  # Prepare's: it drops what has this name
    table = col.without(table, col.HIDDEN)
    outputs = [name for name in col.OUTPUT.names if name in table.column_names]
    if postprocess is None:
        return _with_added(table, added, outputs)
    rows, _ = col.to_rows(table)
    for row, new in zip(rows, added, strict=bool(added)):
        row.update({key: value for key, value in new.items() if key not in outputs})
    errors = [col.error_of(row) for row in rows]
    answers = call_all(postprocess, rows, Stage.POSTPROCESS, seconds)
    results = [None if isinstance(answer, RowError) else answer for answer in answers]
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        if isinstance(answer, RowError):
            if errors[index] is None and on_error == "raise":
                col.raise_row(answer, row, index)
            errors[index] = error = errors[index] or answer
            row.update(col.error_values(error, Stage.ENCODE))
    replaced = {name for new in added for name in new if name not in outputs}
    sample: Any = {}
    if all(error is not None for error in errors):
        (sample,) = call_all(postprocess, [_good(rows[0])], Stage.POSTPROCESS, seconds)
    return _result_table(table, rows, replaced, results, errors, {} if isinstance(sample, RowError) else sample)


def _with_added(table: pa.Table, added: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> pa.Table:
    arrays: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in added for name in row if name not in outputs):
        own = _own(table.column(name)) if name in table.column_names else [None] * len(added)
        values = [row.get(name, old) for row, old in zip(added, own, strict=True)]
        arrays[name] = _input_array(name, values) if name in _INPUT_TYPES else to_array(values, table, name)
    return col.with_columns(table, arrays)


def _own(column: Any) -> list[Any]:
    """A column's values, as the user's functions get them."""
    return [row[""] for row in col.to_rows(pa.table({"": column}))[0]]


def _result_table(
    table: pa.Table, rows: Sequence[Mapping[str, Any]], replaced: set[str],
    results: Sequence[Mapping[str, Any] | None], errors: Sequence[RowError | None], sample: Mapping[str, Any],
) -> pa.Table:  # fmt: skip
    """The columns that postprocess returned. A failed row that it could not take keeps those of its own columns that
    have these names; the rest of it is null. `sample`: what it would return for a good row, if there is none."""
    good = [result for result, error in zip(results, errors, strict=True) if result is not None and error is None]
    shape = good or [result for result in results if result is not None]
    names = list(dict.fromkeys(name for result in [*shape, sample] for name in result)) or table.column_names
    arrays: dict[str, Any] = {}
    for name in names:
        values = [(row if result is None else result).get(name) for row, result in zip(rows, results, strict=True)]
        passed_through = all(value is row.get(name) for value, row in zip(values, rows, strict=True))
        passed_through &= name not in col.ERROR_COLUMNS or None not in results  # the table does not know these errors
        own = name in table.column_names and name not in replaced
        if passed_through and own and not pa.types.is_nested(table.column(name).type):  # what is may have been changed
            arrays[name] = table.column(name)  # it keeps its Arrow type
        elif passed_through and not own and name in _INPUT_TYPES:
            arrays[name] = _input_array(name, values)
        else:
            arrays[name] = to_array(values, table, name, sample.get(name))
    for name in col.ERROR_COLUMNS:
        if not any(name in result for result in results if result is not None):
            texts = [None if error is None else col.error_values(error, "")[name] for error in errors]
            arrays[name] = pa.array(texts, pa.string())
    return pa.table(arrays)


def _good(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with empty outputs. What postprocess makes of it has the columns, and their types, of a good row.

    Only for a block in which every row failed, whose columns would otherwise have no type.
    """
    empty = {"generated_text": "", "generated_tokens": [0], "finish_reason": "stop"}
    counts = dict.fromkeys(("num_input_tokens", "num_generated_tokens", "num_cached_tokens"), 0)
    return {**row, **empty, **counts, **dict.fromkeys(col.ERROR_COLUMNS)}


_INPUT_TYPES = {
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), "prompt": pa.string(),
    "prompt_token_ids": pa.list_(pa.int32()), "sampling_params": pa.string(),
}  # fmt: skip


def _input_array(name: str, values: Sequence[Any]) -> pa.Array:
    """An input column in its fixed type: the keys of inferred structs would differ from block to block.

    Sampling parameters become JSON, and what is malformed (its row has an error) becomes null.
    """
    fitted: list[Any] = [None] * len(values)
    for i, value in enumerate(values):
        with contextlib.suppress(Exception):  # a user's object raises what it likes
            fitted[i] = None if value is None else _fit(name, value)
    return pa.array(fitted, _INPUT_TYPES[name])


def _fit(name: str, value: Any) -> Any:
    if name == "prompt_token_ids":
        return np.array([int(id) for id in value], np.int32).tolist()  # one that does not fit raises
    if name == "messages":
        return [
            {key: _text(message[key]) for key in ("role", "content") if message.get(key) is not None}
            for message in value
        ]
    return _text(as_mapping(value))


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, Mapping) and "text" in part for part in value):
        value = "".join(part["text"] for part in value)  # as the chat template gets it
    return utf8(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def to_array(values: Sequence[Any], table: pa.Table, name: str, sample: Any = None) -> pa.Array | pa.ChunkedArray:
    """A column of Python values: the table's of that name if it has these, else one of that type if it holds these.

    Of other values Arrow tells the type; what it has none for becomes its text.

    Args:
        values: None is null. sample: a value whose type is taken when all of `values` are None.
    """
    # Numpy's times stay what they are: Python has none in nanoseconds.
    values = [v.tolist() if isinstance(v, np.ndarray | np.generic) and v.dtype.kind not in "mM" else v for v in values]
    if sample is not None and all(value is None for value in values):
        return pa.nulls(len(values), to_array([sample], table, name).type)
    with contextlib.suppress(Exception):  # there is no such column, or as below
        column = table.column(name)
        if repr(_own(column)) == repr(values):
            return column
        array, nested = pa.array(values, column.type), pa.types.is_nested(column.type)
        kept = _own(array)  # Arrow makes times of numbers, and drops keys that a type has not
        if repr(kept) == repr(values) if nested else all(map(isinstance, kept, map(type, values))):
            return array
    try:
        return pa.array(values)
    except Exception:  # beside Arrow's own errors: numbers that are too large, surrogates, what a user's object raises
        return pa.array([None if value is None else utf8(value) for value in values], pa.string())
