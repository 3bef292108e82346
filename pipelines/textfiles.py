"""JSONL and CSV files, record by record: exact places (byte and row), types, and one error for one bad record."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

csv.field_size_limit(2**31 - 1)  # Python's default refuses a text over 128 KiB

# A number that text and type hold alike; "007", "+1" and integers of 19 digits and more stay strings.
_INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"
_FLOAT = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?$"


@dataclass
class Chunk:
    """`num_rows` records. `columns` are value lists (or Arrow arrays); `errors` has a text for each bad record."""

    offset: int  # byte where the first record begins
    num_rows: int
    columns: dict[str, Any]
    errors: list[str | None]


def read_chunks(
    fs: Any, file: str, format: str, size: int, *, offset: int = 0, first_row: int = 0, num_rows: int | None = None
) -> Iterator[Chunk]:
    """Yield records in chunks of `size`, from byte `offset` on, which is where record `first_row` begins.

    Raises:
        ValueError: CSV without header, not UTF-8, with an open quote.
        OSError: the file cannot be read.
    """
    with fs.open(file, "rb", compression="infer") as stream:
        lines = _Lines(stream, file)
        header: list[str] = []
        if format == "csv":
            header = next(lines.csv_records(), (0, []))[1]
            if not header:
                return
            if len(set(header)) != len(header) or not all(header):
                raise ValueError(f"the header has an empty or a repeated name: {header}")
        if offset > lines.offset:
            stream.seek(offset)
            lines.offset = offset
        records = lines.csv_records() if format == "csv" else lines.json_records()
        columns: dict[str, list[Any]] = {name: [] for name in header}
        errors: list[str | None] = []
        start = 0
        for done, (begin, record) in enumerate(records, 1):
            if not errors:
                start = begin
            row, error = (
                _parse(record, header, first_row + done - 1)
                if format == "csv"
                else _parse_json(record, first_row + done - 1)
            )
            for name in row:
                if name not in columns:
                    columns[name] = [None] * len(errors)
            errors.append(error)
            for name, values in columns.items():
                values.append(row.get(name))
            if len(errors) == size or done == num_rows:
                yield Chunk(start, len(errors), columns, errors)
                columns, errors = {name: [] for name in header}, []
            if done == num_rows:
                return
        if errors:
            yield Chunk(start, len(errors), columns, errors)


class _Lines:
    """Lines of a binary stream, with the byte where the next one begins."""

    def __init__(self, stream: Any, file: str):
        self.stream = stream
        self.file = file
        self.offset = 0

    def _raw(self) -> Iterator[bytes]:
        for line in self.stream:
            first = self.offset == 0
            self.offset += len(line)
            yield line.removeprefix(b"\xef\xbb\xbf") if first else line

    def json_records(self) -> Iterator[tuple[int, bytes]]:
        begin = self.offset
        for line in self._raw():
            if line.strip():
                yield begin, line
            begin = self.offset

    def csv_records(self) -> Iterator[tuple[int, list[str]]]:
        text = (line.decode("utf-8") for line in self._raw())
        begin = self.offset
        try:
            for record in csv.reader(text, strict=True):
                if record:
                    yield begin, record
                begin = self.offset
        except csv.Error as error:
            raise ValueError(f"the record at byte {begin}: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"the record at byte {begin} is not UTF-8 ({error.reason})") from None


def _parse(record: list[str], header: list[str], row: int) -> tuple[dict[str, Any], str | None]:
    if len(record) != len(header):
        return {}, f"record {row} (from 0) has {len(record)} fields where the header has {len(header)}"
    return dict(zip(header, record, strict=True)), None


def _parse_json(line: bytes, row: int) -> tuple[dict[str, Any], str | None]:
    try:
        value = json.loads(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        return {}, f"record {row} (from 0) is not valid JSON: {reason}"
    except RecursionError:
        return {}, f"record {row} (from 0) is nested too deeply"
    if not isinstance(value, dict):
        return {}, f"record {row} (from 0) is a {type(value).__name__}, not a JSON object"
    return value, None


def infer_columns(format: str, columns: dict[str, list[Any]]) -> dict[str, pa.DataType]:
    infer = _infer_text if format == "csv" else _infer_json
    return {name: infer(values) for name, values in columns.items()}


def _infer_text(values: list[str | None]) -> pa.DataType:
    array = pa.array([value for value in values if value], pa.string())
    if not len(array):
        return pa.null()
    for pattern, kind in ((_INTEGER, pa.int64()), (_FLOAT, pa.float64())):
        if pc.all(pc.match_substring_regex(array, pattern)).as_py():
            return kind
    return pa.string()


def _infer_json(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return pa.string()  # mixed types: every value is kept as its JSON text


def merge_types(a: pa.DataType, b: pa.DataType, *, strict: bool = False) -> pa.DataType:
    """The type that holds both; where there is none, string, or ArrowException if `strict`."""
    try:
        schemas = [pa.schema([("x", kind)]) for kind in (a, b)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException:
        if strict:
            raise
        return pa.string()


def to_array(values: Any, column: pa.Field, errors: list[str | None], *, from_text: bool) -> pa.Array:
    """Values of one column as `column.type`; one that does not fit becomes null and its row gets an error."""
    if isinstance(values, pa.Array):
        return values if values.type == column.type else values.cast(column.type)
    if from_text and not pa.types.is_string(column.type):
        values = [None if value in (None, "") else value for value in values]
    try:
        array = pa.array(values, pa.string() if from_text else column.type)
        return array.cast(column.type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    if pa.types.is_string(column.type):
        return pa.array(
            [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values], pa.string()
        )
    fitting: list[Any] = []
    for i, value in enumerate(values):
        try:
            fitting.append(pa.array([value], pa.string() if from_text else column.type).cast(column.type)[0])
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            fitting.append(pa.scalar(None, column.type))
            errors[i] = errors[i] or f"column {column.name!r}: the value is no {column.type}"
    return pa.array([scalar.as_py() for scalar in fitting], column.type)
