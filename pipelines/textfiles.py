"""JSONL and CSV files, record by record: types that hold every value, and one error for one bad record."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

csv.field_size_limit(2**31 - 1)  # Python's default refuses a text over 128 KiB

# Numbers that text and type hold alike; "007", "+1" and integers of 19 digits and more stay strings.
_NUMBERS = (
    (r"^-?(0|[1-9][0-9]{0,17})$", pa.int64()),
    (r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?$", pa.float64()),
)
_NO_FIT = (pa.ArrowException, OverflowError, TypeError, ValueError)

Chunk = tuple[dict[str, Any], list[str | None]]  # values by column; for each record why it is bad, or None


def read_chunks(fs: Any, file: str, format: str, size: int) -> Iterator[Chunk]:
    """Yield records, `size` at a time. Compressed files are known by their names.

    Raises:
        ValueError: CSV without a proper header, not UTF-8, or with an open quote. OSError: it cannot be read.
    """
    with fs.open(file, "rb", compression="infer") as stream:
        columns: dict[str, list[Any]] = {}
        errors: list[str | None] = []
        for row, error in _csv_records(stream) if format == "csv" else _json_records(stream):
            for name in row:
                if name not in columns:
                    columns[name] = [None] * len(errors)
            errors.append(error)
            for name, values in columns.items():
                values.append(row.get(name))
            if len(errors) == size:
                yield columns, errors
                columns, errors = {name: [] for name in columns}, []
        if errors:
            yield columns, errors


def _json_records(stream: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    for number, line in enumerate(line for line in stream if line.strip()):
        place = f"record {number} (from 0)"
        try:
            value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError) as error:
            yield {}, f"{place} is not valid JSON: {getattr(error, 'msg', 'bad text')}"
            continue
        is_object = isinstance(value, dict)
        yield value if is_object else {}, None if is_object else f"{place} is a {type(value).__name__}, not an object"


def _csv_records(stream: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        records = (record for record in csv.reader(text, strict=True) if record)
        header = next(records, [])
        if len(set(header)) != len(header) or not all(header):
            raise ValueError(f"the header has an empty or a repeated name: {header}")
        for number, record in enumerate(records):
            if len(record) == len(header):
                yield dict(zip(header, record, strict=True)), None
            else:
                yield {}, f"record {number} (from 0) has {len(record)} fields where the header has {len(header)}"
    except csv.Error as error:
        raise ValueError(str(error)) from None


def infer_type(values: list[Any], from_text: bool) -> pa.DataType:
    """The type of a column; values of several types are kept as their JSON text."""
    if not from_text:
        try:
            return pa.array(values).type
        except _NO_FIT:
            return pa.string()
    filled = pa.array([value for value in values if value], pa.string())
    if not len(filled):
        return pa.null()
    fitting = (kind for form, kind in _NUMBERS if pc.all(pc.match_substring_regex(filled, form)).as_py())
    return next(fitting, pa.string())


def merge_types(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The type that holds both. Raises ArrowException if there is none."""
    schemas = [pa.schema([("x", kind)]) for kind in (a, b)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("x").type


def to_array(values: Any, kind: pa.DataType, from_text: bool) -> pa.Array:
    """Values of a column whose type is the merged `infer_type` of all its values."""
    if isinstance(values, pa.Array):
        return values if values.type == kind else values.cast(kind)
    if from_text:
        empty = ("",) if kind != pa.string() else ()
        return pa.array([None if value in empty else value for value in values], pa.string()).cast(kind)
    try:
        return pa.array(values, kind)
    except _NO_FIT:
        text = kind == pa.string()
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) if text else float(v) for v in values])
