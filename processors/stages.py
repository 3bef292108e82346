"""The CPU stages around the engine: the user's functions, chat template and tokenizer, and the result's columns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rayinfer.config import EngineConfig
from rayinfer.errors import ErrorType, RowError, Stage, describe
from rayinfer.processors import columns as col
from rayinfer.processors.llm_processor import INPUTS, sampling_defaults, with_defaults
from rayinfer.processors.ray_compat import take_rows
from rayinfer.sampling import SamplingParams

PREFIX_TOKENS = 4096  # of a prompt are compared
RowFunction = Callable[[dict[str, Any]], Mapping[str, Any]]


class Prepare:
    """Preprocess, chat template and tokenizer; yields tables of at most batch_size rows, each one call of an engine."""

    yields_blocks = True

    def __init__(
        self,
        engine: EngineConfig,
        preprocess: RowFunction | None,
        sampling_params: SamplingParams | Mapping[str, Any],
        chat_template: str | None,
        chat_template_kwargs: Mapping[str, Any],
        batch_size: int,
        on_error: str,
    ):
        from rayinfer.chat import ControlTokens
        from rayinfer.inputs import InputProcessor

        self._inputs = InputProcessor(engine, chat_template, chat_template_kwargs)
        self._preprocess = preprocess
        renders: Any = preprocess
        if hasattr(renders, "control_tokens") and self._inputs.tokenizer is not None:  # a template of its own
            renders.control_tokens = ControlTokens(self._inputs.tokenizer)
        self._defaults = sampling_defaults(sampling_params)
        self._batch_size = batch_size
        self._on_error = on_error

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        table = self._encode(table)
        table = take_rows(table, by_prefix(table[col.TOKEN_IDS]))
        num_blocks = -(-table.num_rows // self._batch_size)
        size = -(-table.num_rows // num_blocks)  # even, so that no call holds an engine's place with a row or two
        for start in range(0, table.num_rows, size):
            yield table.slice(start, size)

    def _encode(self, table: pa.Table) -> pa.Table:
        table = col.without(table, col.HIDDEN)
        rows = table.to_pylist()
        packed: list[bytes | None] = []
        asked: dict[int, Mapping[str, Any]] = {}
        results: dict[int, Any] = {}  # EncodedRow or RowError
        for index, row in enumerate(rows):
            packed.append(None)
            try:
                if (earlier := col.error_of(row)) is not None:  # of a processor before this one
                    raise earlier
                new, packed[index] = self._added(row)
                asked[index] = self._request(row, new)
            except RowError as error:
                results[index] = error
        results |= zip(asked, self._inputs.encode_batch(list(asked.values())), strict=True)
        hidden = []
        for index in range(len(rows)):
            result = results[index]
            if not isinstance(result, RowError):
                params = result.params.model_dump_json(exclude_unset=True)
                hidden.append({col.TOKEN_IDS: result.prompt_token_ids, col.PARAMS: params})
            elif self._on_error == "raise":
                col.raise_row(result, rows[index], index)
            else:
                hidden.append(dict(zip(col.FAILED, col.error_values(result, Stage.ENCODE).values(), strict=True)))
        arrays = col.table_of(hidden, col.ENCODED)
        if self._preprocess is not None:
            arrays[col.ROW] = pa.array(packed, pa.binary())
        return col.with_columns(table, arrays)

    def _added(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None]:
        """What the user's function makes of a row, and that packed. Raises RowError."""
        if self._preprocess is None:
            return {}, None
        try:
            new = self._preprocess(dict(row))
            if isinstance(new, Mapping):
                new = _named(new)
                return new, col.pack(new)
            problem = f"returned {type(new).__name__}, want a dict"
        except RowError as error:  # the function says itself what is wrong with the row
            error.stage = error.stage or Stage.PREPROCESS
            raise
        except (Exception, SystemExit) as error:  # what it returned may not pickle
            problem = f"raised {describe(error, row)}"
        raise RowError(ErrorType.PREPROCESS_ERROR, f"preprocess {problem}", Stage.PREPROCESS)

    def _request(self, row: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
        """The input columns of a row; a prompt of whatever kind made by preprocess hides those of the table."""
        inputs = new if any(key in new for key in INPUTS) else row
        request = {key: inputs[key] for key in INPUTS if key in inputs}
        own = new.get("sampling_params")
        if isinstance(own, Mapping):  # Python's own, so a None in it is meant: max_tokens=None has no limit
            return {**request, "sampling_params": SamplingParams.from_row({**self._defaults, **own})}
        if "sampling_params" not in new:
            own = row.get("sampling_params")
        return with_defaults({**request, "sampling_params": own}, self._defaults)


def _named(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row that a user's function returned. Raises TypeError for keys that cannot name a column."""
    for name in row:
        if not isinstance(name, str) or _utf8(name) != name:
            raise TypeError("it returned a key that names no column: want strings that can be written as UTF-8")
    return dict(row)


def by_prefix(token_ids: pa.ChunkedArray) -> list[int]:
    """The order in which prompts that begin alike stand together, so that one engine gets them and reads that once."""
    lists = token_ids.combine_chunks()
    starts, ids = lists.offsets.to_numpy(), lists.values.to_numpy().astype(">i4")
    keys = [ids[a : min(b, a + PREFIX_TOKENS)].tobytes() for a, b in itertools.pairwise(starts)]
    return sorted(range(len(keys)), key=keys.__getitem__)


def finish(table: pa.Table, postprocess: RowFunction | None, on_error: str) -> pa.Table:
    """Unpack what preprocess added, call postprocess, and give good and failed rows the same columns."""
    added = None
    if col.ROW in table.column_names:
        added = [col.unpack(data) for data in table.column(col.ROW).to_pylist()]
    table = col.without(table, col.HIDDEN)
    outputs = [name for name in col.OUTPUT.names if name in table.column_names]
    if postprocess is None:
        return _with_added(table, added or [], outputs)
    rows = table.to_pylist()
    for row, new in zip(rows, added or [], strict=added is not None):
        row.update({key: value for key, value in new.items() if key not in outputs})
    results: list[Mapping[str, Any] | None] = []
    errors: list[RowError | None] = []
    for index, row in enumerate(rows):
        error = col.error_of(row)
        failed = error is not None
        result: Any = None
        try:
            result = postprocess(dict(row))
            if not isinstance(result, Mapping):
                raise TypeError(f"it returned {type(result).__name__}, want a dict")
            result = _named(result)
        except (Exception, SystemExit) as problem:  # the user's code raises what it likes
            result = None
            text = f"postprocess raised {describe(problem, row)}"
            error = error or RowError(ErrorType.POSTPROCESS_ERROR, text, Stage.POSTPROCESS)
            row.update(col.error_values(error, ""))
        if error is not None and not failed and on_error == "raise":
            col.raise_row(error, row, index)
        results.append(result)
        errors.append(error)
    replaced = {name for new in added or [] for name in new if name not in outputs}
    return _result_table(table, rows, replaced, results, errors, postprocess)


def _with_added(table: pa.Table, added: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> pa.Table:
    names = dict.fromkeys(name for row in added for name in row if name not in outputs)
    arrays: dict[str, Any] = {}
    for name in names:
        old = table.column(name).to_pylist() if name in table.column_names else [None] * len(added)
        values = [row.get(name, before) for row, before in zip(added, old, strict=True)]
        arrays[name] = _input_array(name, values) if name in _INPUT_TYPES else to_array(values)
    return col.with_columns(table, arrays)


def _result_table(
    table: pa.Table,
    rows: Sequence[Mapping[str, Any]],
    replaced: set[str],
    results: Sequence[Mapping[str, Any] | None],
    errors: Sequence[RowError | None],
    postprocess: RowFunction,
) -> pa.Table:
    """The columns that postprocess returned. A failed row that it could not take keeps those of its own columns that
    have these names; the rest of it is null."""
    good = [result for result, error in zip(results, errors, strict=True) if result is not None and error is None]
    shape = good or [result for result in results if result is not None]
    sample = _probe(rows[0], postprocess) if not good else {}
    names = list(dict.fromkeys(name for result in [*shape, sample] for name in result)) or table.column_names
    arrays: dict[str, Any] = {}
    for name in names:
        values = [
            row.get(name) if result is None else result.get(name) for row, result in zip(rows, results, strict=True)
        ]
        passed_through = all(value is row.get(name) for value, row in zip(values, rows, strict=True))
        passed_through &= name not in col.ERROR_COLUMNS or None not in results  # the table does not know these errors
        if passed_through and name in table.column_names and name not in replaced:
            arrays[name] = table.column(name)  # it keeps its Arrow type
        elif passed_through and name in _INPUT_TYPES:
            arrays[name] = _input_array(name, values)
        else:
            arrays[name] = to_array(values, like=[sample[name]] if name in sample else None)
    own = [set(result) for result in results if result is not None]
    for name in col.ERROR_COLUMNS:
        if not any(name in keys for keys in own):
            texts = [None if error is None else col.error_values(error, "")[name] for error in errors]
            arrays[name] = pa.array(texts, pa.string())
    return pa.table(arrays)


def _probe(row: Mapping[str, Any], postprocess: RowFunction) -> Mapping[str, Any]:
    """What postprocess returns for the row with empty outputs: the columns, and their types, of a good row.

    Only for a block in which every row failed, whose columns would otherwise have no type.
    """
    empty = {"generated_text": "", "generated_tokens": [0], "finish_reason": "stop"}
    counts = dict.fromkeys(("num_input_tokens", "num_generated_tokens", "num_cached_tokens"), 0)
    try:
        result = postprocess({**row, **empty, **counts, **dict.fromkeys(col.ERROR_COLUMNS)})
    except Exception:
        return {}
    return result if isinstance(result, Mapping) else {}


_INPUT_TYPES = {
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "prompt": pa.string(),
    "prompt_token_ids": pa.list_(pa.int32()),
    "sampling_params": pa.string(),
}


def _input_array(name: str, values: Sequence[Any]) -> pa.Array:
    """An input column in its fixed type: the keys of inferred structs would differ from block to block.

    Sampling parameters become JSON, and what is malformed (its row has an error) becomes null.
    """
    fitted = []
    for value in values:
        try:
            fitted.append(None if value is None else _fit(name, value))
        except Exception:  # a user's object raises what it likes
            fitted.append(None)
    return pa.array(fitted, _INPUT_TYPES[name])


def _fit(name: str, value: Any) -> Any:
    if name == "prompt_token_ids":
        return np.array([int(id) for id in value], np.int32).tolist()  # one that does not fit raises
    if name == "messages":
        return [{key: _text(message[key]) for key in ("role", "content") if key in message} for message in value]
    if isinstance(value, SamplingParams):
        value = value.model_dump(exclude_unset=True)
    return _text(value)


def _text(value: Any) -> str:
    return _utf8(value if isinstance(value, str) else json.dumps(value))


def _utf8(value: Any) -> str:
    """Text that Arrow can take: a string may hold halves of surrogate pairs, an object refuse to be printed."""
    try:
        return str(value).encode(errors="backslashreplace").decode()
    except Exception:
        return f"<{type(value).__name__}>"


def to_array(values: Sequence[Any], like: Sequence[Any] | None = None) -> pa.Array:
    """An Arrow array of Python values; what Arrow has no type for becomes its text.

    Args:
        values: None is null. like: values whose type is taken when all of `values` are None.
    """
    values = [value.tolist() if isinstance(value, np.ndarray | np.generic) else value for value in values]
    try:
        array = pa.array(values)
        if pa.types.is_null(array.type) and like is not None:
            array = array.cast(pa.array(like).type)
        return array
    except Exception:  # beside Arrow's own errors: numbers that are too large, surrogates, what a user's object raises
        return pa.array([None if value is None else _utf8(value) for value in values], pa.string())
