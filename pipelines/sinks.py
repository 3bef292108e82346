"""The sink: finished rows become part files; what reaches the driver is one small entry a part.

A part's name is the hash of its bytes: a task that Ray runs again writes the same file again, not a second one. A part
that no entry names is garbage, and `sweep` removes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from rayinfer.errors import ConfigError, nearest
from rayinfer.pipelines.job import JobSpec, SinkSpec
from rayinfer.pipelines.keys import KeyDigest
from rayinfer.pipelines.sources import KEY, SOURCE, Census
from rayinfer.processors.columns import OUTPUT, WHEN_ASKED

PART_PREFIX, TEMP_PREFIX, MARKER = "part-", ".rayinfer-", "_rayinfer.json"
SAMPLES_PER_PART = 3
SAMPLE_CHARS = 400

# What the engine adds to every row, good or bad; log-probabilities only if the job asks for them.
RESULTS = (
    *("generated_text", "finish_reason", "num_input_tokens", "num_generated_tokens", "num_cached_tokens"),
    *("error_type", "error_message", "attempts"),
)

# On these a write is seen whole or not at all; elsewhere a part is written aside and moved.
_ATOMIC_PUT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}


@dataclass
class Entry:
    """One part: what the driver learns of its rows."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str
    keys: str  # hex of the KeyDigest
    errors: dict[str, int]
    num_input_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    samples: list[dict[str, Any]]


class PartWriter:
    """`map_batches` function: writes a batch as one part and returns its entry, as JSON in one row."""

    def __init__(self, sink: SinkSpec, schema: pa.Schema):
        self.sink, self.schema = sink, schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = flatten(batch, self.schema)
        data = encode(table, self.sink.format)
        digest = KeyDigest()
        digest.add(batch[KEY].to_pylist())
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{PART_PREFIX}{sha256[:32]}.{self.sink.format}"
        entry = Entry(name, table.num_rows, len(data), sha256, digest.hex(), **_counts(table), samples=_samples(table))
        write_whole(self.sink.uri, name, data)
        return pa.table({"entry": [json.dumps(entry.__dict__)]})


def output_schema(census: Census, spec: JobSpec) -> pa.Schema:
    """Columns of the output table: the key, the kept source columns, the result.

    Raises:
        ConfigError: an unknown column, one whose name the result needs, one that the format cannot hold.
    """
    sink, columns, id_column = spec.sink, census.schema.names, census.spec.id_column
    names = list(dict.fromkeys(sink.columns if sink.columns is not None else columns))
    for name in names:
        if name not in columns:
            known = f"{nearest(name, columns)} Columns: {', '.join(columns)}"
            raise ConfigError(f"sink.columns: {name!r} is not read from the source{known}")
    if id_column is not None and id_column not in names:
        names.insert(0, id_column)  # without its key no row can be accounted for
    added = [pa.field(KEY, pa.string())] if id_column is None else []
    asked = [name for name in WHEN_ASKED if getattr(spec.sampling, name) is not None]
    results = [OUTPUT.field(name) for name in (*RESULTS, *asked)]
    for name in (*RESULTS, *WHEN_ASKED, *(column.name for column in added)):
        if name in names:
            raise ConfigError(
                f"sink.columns: the source has a column {name!r}, a name that the output uses; "
                "leave it out with sink.columns"
            )
    schema = pa.schema([*added, *(census.schema.field(name) for name in names), *results])
    for column in schema:
        if sink.format != "parquet" and not _fits_text(column.type, nested=sink.format == "jsonl"):
            raise ConfigError(
                f"sink.format = {sink.format!r} cannot hold column {column.name!r} of type {column.type}; "
                "leave it out with sink.columns, or write parquet"
            )
    return schema


def _fits_text(kind: pa.DataType, nested: bool) -> bool:
    if pa.types.is_nested(kind):
        return nested and all(_fits_text(kind.field(i).type, nested) for i in range(kind.num_fields))
    return not (isinstance(kind, pa.BaseExtensionType) or "binary" in str(kind))


def flatten(batch: pa.Table, schema: pa.Schema) -> pa.Table:
    """Lift the kept source columns out of the struct; every part gets exactly `schema`."""
    source = batch[SOURCE].combine_chunks()
    columns = []
    for column in schema:
        own = source.type.get_field_index(column.name) >= 0 and column.name not in (*RESULTS, *WHEN_ASKED)
        values = pc.struct_field(source, column.name) if own else batch[column.name]
        columns.append(values if values.type == column.type else values.cast(column.type))
    return pa.table(columns, schema=schema)


def _counts(table: pa.Table) -> dict[str, Any]:
    errors = Counter(value for value in table["error_type"].to_pylist() if value is not None)
    tokens = {name: pc.sum(table[name]).as_py() or 0 for name in RESULTS if name.startswith("num_")}
    return {"errors": dict(errors), **tokens}


def _samples(table: pa.Table) -> list[dict[str, Any]]:
    """The first good rows and the first bad one, long texts cut."""
    good, bad = (pc.indices_nonzero(test(table["error_type"])) for test in (pc.is_null, pc.is_valid))
    table = table.drop_columns([name for name in WHEN_ASKED if name in table.column_names])
    rows = table.take(good[:SAMPLES_PER_PART]).to_pylist() + table.take(bad[:1]).to_pylist()
    return [{key: None if value is None else str(value)[:SAMPLE_CHARS] for key, value in row.items()} for row in rows]


def encode(table: pa.Table, format: str) -> bytes:
    """Encode a part in memory; it is hashed and written whole."""
    buffer = io.BytesIO()
    if format == "parquet":
        pq.write_table(table, buffer, compression="zstd")
    elif format == "csv":
        pyarrow.csv.write_csv(table, buffer)
    else:
        for row in table.to_pylist():
            line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str)
            buffer.write(line.encode() + b"\n")
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(uri: str, name: str, data: bytes) -> None:
    """Write a file so that no reader ever sees half of it under its name."""
    fs, folder = _open(uri)
    if _protocols(fs) & _ATOMIC_PUT:
        fs.pipe_file(f"{folder}/{name}", data)
        return
    aside = f"{folder}/{TEMP_PREFIX}{uuid.uuid4().hex}"
    fs.makedirs(folder, exist_ok=True)  # on a disk that is not shared too: the driver then says that it is not
    try:
        fs.pipe_file(aside, data)
        fs.mv(aside, f"{folder}/{name}")
    except BaseException:
        if fs.exists(aside):
            fs.rm_file(aside)
        raise


def _open(uri: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        return fs, path.rstrip("/")
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"uri = {uri!r}: {error}") from None


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def check_sink(sink: SinkSpec, *, overwrite: bool) -> list[str]:
    """Check that the folder can be written; return the files of an earlier run in it (to be removed by `clear`).

    Raises:
        ConfigError: not writable, not a folder, not empty.
    """
    place = f"sink.uri = {sink.uri!r}"
    fs, folder = _open(sink.uri)
    if "memory" in _protocols(fs):
        raise ConfigError(f"{place}: memory:// is each process's own, no worker shares it; use a folder or a bucket")
    probe = f"{TEMP_PREFIX}{uuid.uuid4().hex}"
    try:
        write_whole(sink.uri, probe, b"")
        fs.rm_file(f"{folder}/{probe}")
        files = sorted(list_files(sink))
    except Exception as error:  # a store's client raises errors of its own
        raise ConfigError(f"{place}: the folder cannot be written: {type(error).__name__}: {error}") from None
    other = [file for file in files if not _is_ours(file)]
    if other:
        raise ConfigError(f"{place}: holds {other[0]!r}, which no job wrote; name an empty folder")
    if files and not overwrite:
        what = "a finished job" if MARKER in files else "an unfinished job"
        raise ConfigError(f"{place}: holds {len(files)} file(s) of {what}; give --overwrite or name another folder")
    return files


def check_apart(sink: SinkSpec, census: Census) -> None:
    """Raise ConfigError if the job could read what it writes, or remove what it reads."""
    _, folder = _open(sink.uri)
    _, source = _open(census.spec.uri)
    if f"{folder}/".startswith(f"{source}/") or any(unit.file.startswith(f"{folder}/") for unit in census.units):
        raise ConfigError(f"sink.uri = {sink.uri!r}: source and output share a folder; name another one")


def _is_ours(name: str) -> bool:
    return "/" not in name and (name.startswith((PART_PREFIX, TEMP_PREFIX)) or name == MARKER)


def list_files(sink: SinkSpec) -> dict[str, int]:
    """Name and bytes of every file in the folder, as the store has it now."""
    fs, folder = _open(sink.uri)
    fs.invalidate_cache()
    files = fs.find(folder, detail=True)
    return {file.removeprefix(folder).lstrip("/"): info["size"] for file, info in files.items()}


def clear(sink: SinkSpec, names: list[str]) -> None:
    """Remove files, the marker first, so that no crash leaves a marker without its parts."""
    fs, folder = _open(sink.uri)
    for name in sorted(names, key=lambda name: name != MARKER):
        fs.rm_file(f"{folder}/{name}")


def sweep(sink: SinkSpec, parts: dict[str, int]) -> list[str]:
    """Remove what no entry names; return parts (name -> bytes) whose file is missing or has another size."""
    sizes = list_files(sink)
    clear(sink, [name for name in sizes if name not in parts and _is_ours(name)])
    return [name for name, num_bytes in parts.items() if sizes.get(name) != num_bytes]
