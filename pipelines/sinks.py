"""The sink: finished rows become part files; what reaches the driver is one small entry a part.

A part's name is the hash of its bytes: a task that Ray runs again writes the same file again, not a second one. A part
that no entry names is garbage, and `sweep` removes it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
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

PART_PREFIX = "part-"
TEMP_PREFIX = ".rayinfer-"
MARKER = "_rayinfer.json"
SAMPLES_PER_PART = 3
SAMPLE_CHARS = 400

# What the engine adds to every row, good or bad; log-probabilities only if the job asks for them.
RESULTS = (
    "generated_text",
    "finish_reason",
    "num_input_tokens",
    "num_generated_tokens",
    "num_cached_tokens",
    "error_type",
    "error_message",
    "attempts",
)

# On these a write is seen whole or not at all; elsewhere a part is written aside and moved.
_ATOMIC_PUT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}


@dataclass
class Entry:
    """One part: what the driver learns of its rows."""

    name: str
    num_rows: int
    num_ok: int
    num_bytes: int
    sha256: str
    keys: str  # hex of the KeyDigest
    errors: dict[str, int]
    num_input_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    samples: list[dict[str, Any]] = field(default_factory=list)


class PartWriter:
    """`map_batches` function: writes a batch as one part and returns its entry as JSON in one row."""

    def __init__(self, sink: SinkSpec, schema: pa.Schema):
        self.sink = sink
        self.schema = schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        entries = []
        if batch.num_rows:
            table = flatten(batch, self.schema)
            data = encode(table, self.sink.format)
            digest = KeyDigest()
            digest.add(batch[KEY].to_pylist())
            sha256 = hashlib.sha256(data).hexdigest()
            name = f"{PART_PREFIX}{sha256[:32]}.{self.sink.format}"
            write_whole(self.sink.uri, name, data)
            entry = summarize(table, name, data, sha256, digest)
            entries.append(json.dumps(entry.__dict__))
        return pa.table({"entry": pa.array(entries, pa.string())})


def output_schema(census: Census, spec: JobSpec) -> pa.Schema:
    """Columns of the output table: the key, the kept source columns, the result.

    Raises:
        ConfigError: an unknown column, one whose name the result needs, one that the format cannot hold.
    """
    sink = spec.sink
    results = [OUTPUT.field(name) for name in RESULTS]
    results += [OUTPUT.field(name) for name in WHEN_ASKED if getattr(spec.sampling, name) is not None]
    names = sink.columns if sink.columns is not None else census.schema.names
    for name in names:
        if name not in census.schema.names:
            raise ConfigError(
                f"sink.columns: {name!r} is not read from the source{nearest(name, census.schema.names)} "
                f"Columns: {', '.join(census.schema.names)}"
            )
    fields = [census.schema.field(name) for name in dict.fromkeys(names)]
    id_column = census.spec.id_column
    if id_column is None:
        fields.insert(0, pa.field(KEY, pa.string()))
    elif id_column not in names:
        fields.insert(0, census.schema.field(id_column))  # without its key no row can be accounted for
    taken = {column.name for column in results} | ({KEY} if id_column is None else set())
    for column in fields[id_column is None :]:
        if column.name in taken:
            raise ConfigError(
                f"sink.columns: the source has a column {column.name!r}, a name that the output uses; "
                "leave it out with sink.columns"
            )
    for column in fields + results:
        if sink.format != "parquet" and not _fits_text(column.type, nested=sink.format == "jsonl"):
            raise ConfigError(
                f"sink.format = {sink.format!r} cannot hold column {column.name!r} of type {column.type}; "
                "leave it out with sink.columns, or write parquet"
            )
    return pa.schema(fields + results)


def _fits_text(kind: pa.DataType, nested: bool) -> bool:
    if pa.types.is_nested(kind):
        return nested and all(_fits_text(kind.field(i).type, nested) for i in range(kind.num_fields))
    return not isinstance(kind, pa.BaseExtensionType)


def flatten(batch: pa.Table, schema: pa.Schema) -> pa.Table:
    """Lift the kept source columns out of the struct; every part gets exactly `schema`."""
    source = batch[SOURCE].combine_chunks()
    columns = []
    for column in schema:
        if source.type.get_field_index(column.name) >= 0 and column.name not in OUTPUT.names:
            values = pc.struct_field(source, column.name)
        else:
            values = batch[column.name]
        columns.append(values if values.type == column.type else values.cast(column.type))
    return pa.table(columns, schema=schema)


def summarize(table: pa.Table, name: str, data: bytes, sha256: str, digest: KeyDigest) -> Entry:
    errors = Counter(value for value in table["error_type"].to_pylist() if value is not None)
    counts = {key: pc.sum(table[key]).as_py() or 0 for key in RESULTS if key.startswith("num_")}
    rows = table.select([column.name for column in table.schema if column.name not in WHEN_ASKED])
    bad = pc.indices_nonzero(pc.is_valid(table["error_type"]))[:1]
    samples = [
        {key: _short(value) for key, value in row.items()}
        for row in rows.slice(0, SAMPLES_PER_PART).to_pylist() + rows.take(bad).to_pylist()
    ]
    num_ok = table.num_rows - sum(errors.values())
    return Entry(name, table.num_rows, num_ok, len(data), sha256, digest.hex(), dict(errors), samples=samples, **counts)


def _short(value: Any) -> Any:
    if isinstance(value, int | float | None):
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + "..."


def encode(table: pa.Table, format: str) -> bytes:
    """Encode a part in memory; it is hashed and written whole."""
    buffer = io.BytesIO()
    if format == "parquet":
        pq.write_table(table, buffer, compression="zstd")
    elif format == "csv":
        pyarrow.csv.write_csv(_csv_ready(table), buffer)
    else:
        for row in table.to_pylist():
            line = json.dumps(_json_ready(row), ensure_ascii=False, allow_nan=False)
            buffer.write(line.encode("utf-8", "surrogatepass") + b"\n")
    return buffer.getvalue()


def _csv_ready(table: pa.Table) -> pa.Table:
    for i, column in enumerate(table.schema):
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            values = [None if v is None else base64.b64encode(v).decode() for v in table.column(i).to_pylist()]
            table = table.set_column(i, column.name, pa.array(values, pa.string()))
    return table


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no NaN
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta):
        return str(value)
    return value


def write_whole(uri: str, name: str, data: bytes) -> None:
    """Write a file so that no reader ever sees half of it under its name."""
    fs, folder = fsspec.core.url_to_fs(uri)
    path = f"{folder.rstrip('/')}/{name}"
    if _protocols(fs) & _ATOMIC_PUT:
        fs.pipe_file(path, data)
        return
    aside = f"{folder.rstrip('/')}/{TEMP_PREFIX}{uuid.uuid4().hex}"
    fs.makedirs(folder, exist_ok=True)  # on a disk that is not shared too: the driver then says that it is not
    try:
        fs.pipe_file(aside, data)
        fs.mv(aside, path)
    except BaseException:
        if fs.exists(aside):
            fs.rm_file(aside)
        raise


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def check_sink(sink: SinkSpec, source_uri: str, *, overwrite: bool) -> list[str]:
    """Check that the folder can be written; return the files of an earlier run in it (to be removed by `clear`).

    Raises:
        ConfigError: not writable, not a folder, in the source's folder, or not empty.
    """
    place = f"sink.uri = {sink.uri!r}"
    fs, folder = _open(sink.uri, place)
    if "memory" in _protocols(fs):
        raise ConfigError(f"{place}: memory:// is each process's own, no worker shares it; use a folder or a bucket")
    source_fs, source_path = _open(source_uri, "source.uri")
    inside = (folder.rstrip("/") + "/").startswith(source_path.rstrip("/") + "/")
    if _protocols(fs) == _protocols(source_fs) and inside:
        raise ConfigError(f"{place}: lies in the source {source_uri!r}; the job would read its own output")
    probe = f"{TEMP_PREFIX}{uuid.uuid4().hex}"
    try:
        fs.makedirs(folder, exist_ok=True)
        files = sorted(_child(file, folder) for file in fs.find(folder))
        write_whole(sink.uri, probe, b"")
        fs.rm_file(f"{folder.rstrip('/')}/{probe}")
    except Exception as error:  # a store's client raises errors of its own
        raise ConfigError(f"{place}: the folder cannot be written: {type(error).__name__}: {error}") from None
    ours = [file for file in files if _is_ours(file)]
    if len(ours) != len(files):
        other = next(file for file in files if file not in set(ours))
        raise ConfigError(
            f"{place}: holds {len(files)} file(s), among them {other!r}, which no job wrote; name an empty folder"
        )
    if ours and not overwrite:
        what = "a finished job" if MARKER in ours else "an unfinished job"
        raise ConfigError(f"{place}: holds {len(ours)} file(s) of {what}; give --overwrite or name another folder")
    return ours


def check_apart(sink: SinkSpec, files: set[str]) -> None:
    """Raise ConfigError if a file of the source lies in the output folder, where the job removes what is old."""
    _, folder = fsspec.core.url_to_fs(sink.uri)
    for file in files:
        if file.startswith(folder.rstrip("/") + "/"):
            raise ConfigError(f"sink.uri = {sink.uri!r}: the source's file {file!r} is in it; name another folder")


def _open(uri: str, place: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(uri)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{place}: {error}") from None


def _child(file: str, folder: str) -> str:
    return file.removeprefix(folder).lstrip("/")


def _is_ours(name: str) -> bool:
    return "/" not in name and (name.startswith((PART_PREFIX, TEMP_PREFIX)) or name == MARKER)


def list_files(sink: SinkSpec) -> dict[str, int]:
    """Name and bytes of every file in the folder, as the store has it now."""
    fs, folder = fsspec.core.url_to_fs(sink.uri)
    fs.invalidate_cache()
    return {_child(file, folder): info["size"] for file, info in fs.find(folder, detail=True).items()}


def clear(sink: SinkSpec, names: list[str]) -> None:
    """Remove the files of an earlier run, the marker first, so that no crash leaves a marker without its parts."""
    fs, folder = fsspec.core.url_to_fs(sink.uri)
    for name in sorted(names, key=lambda name: name != MARKER):
        fs.rm_file(f"{folder.rstrip('/')}/{name}")


def sweep(sink: SinkSpec, entries: dict[str, int]) -> tuple[list[str], int]:
    """Compare the folder with the entries (name -> bytes).

    Returns:
        (names whose file is missing or has another size, number of files removed that no entry names).
    """
    sizes = list_files(sink)
    wrong = [name for name, num_bytes in entries.items() if sizes.get(name) != num_bytes]
    garbage = [name for name in sizes if name not in entries and _is_ours(name)]
    clear(sink, garbage)
    return wrong, len(garbage)
