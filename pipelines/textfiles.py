"""JSONL and CSV files, record by record: types that hold every value, and one error for one bad record."""

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

csv.field_size_limit(2**31 - 1)  # Python's default refuses a text over 128 KiB

# Numbers that text and type hold alike; "007", "+1", "-0", "1.10" and integers of 19 digits and more stay strings.
_NUMBERS = {
    pa.int64(): r"^(0|-?[1-9][0-9]{0,17})$",
    pa.float64(): r"^(0|-?[1-9][0-9]{0,14}|-?(0|[1-9][0-9]{0,14})\.(0|[0-9]*[1-9]))([eE][-+]?[0-9]{1,2})?$",
}
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # lone ones, which no UTF-8 has, among them
_NO_FIT = (pa.ArrowException, OverflowError, TypeError, ValueError)

Chunk = tuple[dict[str, Any], list[str | None]]  # values by column; for each record why it is bad, or None


def read_chunks(fs: Any, file: str, format: str, size: int) -> Iterator[Chunk]:
    """Yield records, `size` at a time. Compressed files are known by their names.

    Raises:
        ValueError: CSV without a proper header, not UTF-8, or with an open quote. OSError: it cannot be read.
    """
    zstd = file.lower().endswith(".zst")  # fsspec's reader takes a cut file for a whole one, and reads no lines
    with fs.open(file, "rb", compression=None if zstd else "infer") as raw:
        stream = io.BufferedReader(pa.CompressedInputStream(raw, "zstd")) if zstd else raw
        records = _csv_records(stream) if format == "csv" else _json_records(stream)
        names: dict[str, None] = {}  # of all records so far, in the order in which they came
        while chunk := list(islice(records, size)):
            names.update(dict.fromkeys(name for row, _ in chunk for name in row))
            yield {name: [row.get(name) for row, _ in chunk] for name in names}, [error for _, error in chunk]


def _json_records(stream: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    for number, line in enumerate(line for line in stream if line.strip()):
        place = f"record {number} (from 0)"
        try:
            value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            if _SURROGATES.search(line):
                json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            yield {}, f"{place} is not valid JSON: {getattr(error, 'msg', 'bad text')}"
            continue
        is_object = isinstance(value, dict)
        yield value if is_object else {}, None if is_object else f"{place} is a {type(value).__name__}, not an object"


def _csv_records(stream: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    try:
        records = (record for record in reader if record)
        header = next(records, [])
        if len(set(header)) != len(header) or not all(header):
            raise ValueError(f"the header has an empty or a repeated name: {header}")
        for number, record in enumerate(records):
            if len(record) == len(header):
                yield dict(zip(header, record, strict=True)), None
            else:
                yield {}, f"record {number} (from 0) has {len(record)} fields where the header has {len(header)}"
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def infer_type(values: list[Any], from_text: bool) -> pa.DataType:
    """The type of a column; values of several types are kept as their JSON text."""
    if not from_text:
        try:
            return pa.array(values).type
        except _NO_FIT:
            return pa.string()
    filled = pa.array([value for value in values if value], pa.string())
    return next((kind for kind in _NUMBERS if _holds(kind, filled)), pa.string()) if len(filled) else pa.null()


def _holds(kind: pa.DataType, texts: pa.Array) -> bool:
    """Whether these texts can be had back from a type; of types that `infer_type` does not give, Arrow says it."""
    return pc.all(pc.match_substring_regex(texts, _NUMBERS.get(kind, "")), min_count=0).as_py()


def merge_types(a: pa.DataType, b: pa.DataType, or_text: bool) -> pa.DataType:
    """The type that holds both; if there is none, that of texts, or an ArrowException is raised."""
    if pa.types.is_dictionary(a) != pa.types.is_dictionary(b) and pa.null() not in (a, b):  # else Arrow merges them
        a, b = (kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (a, b))
    try:
        return pa.unify_schemas([pa.schema({"x": kind}) for kind in (a, b)], promote_options="permissive").field(0).type
    except pa.ArrowException:
        if not or_text:
            raise
        return pa.string()


def to_array(values: Any, kind: pa.DataType, from_text: bool) -> tuple[pa.Array, list[int]]:
    """Values of a column in the type that was merged from all its values', and the places of those that do not fit.

    Those are null. Such are integers above 2^53 among floats, and the year 2500 among nanoseconds.
    """
    text = kind == pa.string()
    try:
        if isinstance(values, pa.Array):
            return values if values.type == kind else values.cast(kind), []
        if from_text:
            texts = pa.array([None if value == "" and not text else value for value in values], pa.string())
            if not _holds(kind, texts):
                raise ValueError
            return texts.cast(kind), []
        if text:
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        return pa.array(values, kind), []
    except _NO_FIT:
        if len(values) == 1:
            return pa.nulls(1, kind), [0]
        each = [to_array(values[i : i + 1], kind, from_text) for i in range(len(values))]
        return pa.concat_arrays([array for array, _ in each]), [i for i, (_, unfit) in enumerate(each) if unfit]
