"""The sink: finished rows become part files, written by tasks; of each the driver gets a small `Part`.

A part's name holds the hash of its bytes: a task that Ray runs again writes the same file again, not a second one.
"""

import hashlib
import io
import json
import math
import re
import uuid
from collections import Counter
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from rayinfer.errors import ConfigError, bare_uri, choices
from rayinfer.pipelines.identity import FORMAT, JOB, read_job
from rayinfer.pipelines.job import JobSpec, SinkSpec, SourceSpec
from rayinfer.pipelines.keys import KeyDigest, pack_rows
from rayinfer.pipelines.log import PART_PREFIX, Part
from rayinfer.pipelines.sources import KEY, NUMBER, SOURCE, Census, Listing
from rayinfer.pipelines.store import META, Store, claim, open_store
from rayinfer.pipelines.tables import cannot_hold
from rayinfer.processors.columns import ERROR_COLUMNS, OUTPUT, WHEN_ASKED, to_rows
from rayinfer.processors.ray_compat import take_rows, to_arrow

MARKER = "_rayinfer.json"
SAMPLES_PER_PART = 3
SAMPLE_CHARS = 400

# What the engine adds to every row, good or bad; log-probabilities only if the job asks for them.
_TOKENS = ("num_input_tokens", "num_generated_tokens", "num_cached_tokens")
RESULTS = ("generated_text", "finish_reason", *_TOKENS, *ERROR_COLUMNS, "attempts")


class PartWriter:
    """Writes finished rows as parts; made by the driver, called in tasks.

    Failed rows get parts of their own, so that `replay` takes them out by taking these parts out.
    """

    def __init__(self, store: Store, format: str, schema: pa.Schema, prefix: str, num_replays: int = 0):
        self.store, self.format, self.schema, self.prefix, self.num_replays = store, format, schema, prefix, num_replays

    def __call__(self, only: np.ndarray | None, *blocks: Any) -> tuple[list[Part], list[dict[str, Any]]]:
        """Write the rows of blocks, each row number once; returns the parts and a few rows to look at.

        Args:
            only: the row numbers to write (int64); None: all that the blocks have.
        """
        tables = [to_arrow(block) for block in blocks]
        numbers, first = np.unique(np.concatenate([table[NUMBER].to_numpy() for table in tables]), return_index=True)
        if only is not None:
            kept = np.isin(numbers, only)
            numbers, first = numbers[kept], first[kept]
        table = take_rows(pa.concat_tables([flatten(table, self.schema) for table in tables]), first.tolist())
        keys = take_rows(pa.concat_tables([table.select([KEY]) for table in tables]), first.tolist())[KEY]
        attempts = pc.add(table["attempts"], pa.scalar(self.num_replays, pa.int32()))
        table = table.set_column(table.column_names.index("attempts"), "attempts", attempts)
        failed = pc.is_valid(table["error_type"]).to_numpy()
        parts = []
        for chosen in (np.flatnonzero(~failed), np.flatnonzero(failed)):
            if len(chosen):
                rows = take_rows(table, chosen.tolist())
                parts.append(self._write(rows, keys.take(pa.array(chosen)).to_pylist(), numbers[chosen]))
        return parts, _samples(table)

    def _write(self, table: pa.Table, keys: list[str | None], numbers: np.ndarray) -> Part:
        data = encode(table, self.format)
        digest = KeyDigest()
        digest.add(keys)
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{self.prefix}{sha256[:24]}.{self.format}"
        self.store.put(name, data)
        errors = Counter(table["error_type"].drop_null().to_pylist())
        counts = {name: pc.sum(table[name]).as_py() or 0 for name in _TOKENS}
        return Part(name, table.num_rows, len(data), sha256, digest.hex(), pack_rows(numbers), dict(errors), **counts)


def output_schema(census: Census, spec: JobSpec, format: int = FORMAT) -> pa.Schema:
    """Columns of the output table: the key, the kept source columns, the result; as of a job of so old a format.

    Raises:
        ConfigError: an unknown column, one whose name the result needs, one that the format cannot hold.
    """
    sink, columns, id_column = spec.sink, census.schema.names, census.spec.id_column
    names = list(dict.fromkeys(sink.columns if sink.columns is not None else columns))
    for name in names:
        if name not in columns:
            raise ConfigError(f"sink.columns: {name!r} is not read from the source{choices(name, columns)}")
    if id_column is not None and id_column not in names:
        names.insert(0, id_column)  # without its key no row can be accounted for
    added = [pa.field(KEY, pa.string())] if id_column is None else []
    asked = [name for name in WHEN_ASKED if getattr(spec.sampling, name) is not None]
    given = [name for name in RESULTS if format > 1 or name != "error_stage"]
    results = [OUTPUT.field(name) for name in (*given, *asked)]
    for name in (*RESULTS, *WHEN_ASKED, *(column.name for column in added)):
        if name in names:
            raise ConfigError(f"sink.columns: {name!r} is a column of the output's own; leave out the source's")
    schema = pa.schema([*added, *(census.schema.field(name) for name in names), *results])
    for column in schema:
        if sink.file_format != "parquet" and not _fits_text(column.type, nested=sink.format == "jsonl"):
            raise cannot_hold(sink, column)
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


def _samples(table: pa.Table) -> list[dict[str, Any]]:
    """The first good rows and the first bad one, long texts cut."""
    good, bad = (pc.indices_nonzero(test(table["error_type"])) for test in (pc.is_null, pc.is_valid))
    table = table.drop_columns([name for name in WHEN_ASKED if name in table.column_names])
    rows = [row for chosen in (good[:SAMPLES_PER_PART], bad[:1]) for row in to_rows(table.take(chosen))[0]]
    return [{key: None if value is None else str(value)[:SAMPLE_CHARS] for key, value in row.items()} for row in rows]


def encode(table: pa.Table, format: str) -> bytes:
    """Encode a part in memory; it is hashed and written whole."""
    buffer = io.BytesIO()
    if format == "parquet":
        pq.write_table(table, buffer, compression="zstd")
    elif format == "csv":
        pyarrow.csv.write_csv(table, buffer)
    else:
        for row in to_rows(table)[0]:
            line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str)
            buffer.write(line.encode() + b"\n")
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # a map's entries are tuples
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_sink(sink: SinkSpec, *, overwrite: bool) -> Store:
    """Check that the folder can be written, with put-if-absent, and that no one else's files are in it.

    Raises:
        ConfigError: not so.
    """
    place = f"sink.uri = {bare_uri(sink.uri)!r}"
    store = open_store(sink.uri)
    if sink.uri.startswith("memory:"):
        raise ConfigError(f"{place}: memory:// is each process's own, no worker shares it; use a folder or a bucket")
    probe = f"{META}/probe-{uuid.uuid4().hex}"
    try:
        exclusive = claim(store, probe, b"first") and not claim(store, probe, b"second")
        store.remove([probe])
        names = sorted(store.sizes())
    except Exception as error:  # a store's client raises errors of its own
        raise ConfigError(f"{place}: the folder cannot be written: {type(error).__name__}: {error}") from None
    if not exclusive:
        raise ConfigError(f"{place}: the store does not keep put-if-absent, so rows could be doubled; use another one")
    ours = (MARKER, f"{META}/", {"delta": "_delta_log/", "iceberg": "metadata/"}.get(sink.format))
    if other := [name for name in names if not name.startswith(PART_PREFIX) and name not in ours]:
        raise ConfigError(f"{place}: holds {other[0]!r}, which no job wrote; name an empty folder")
    if not overwrite and set(names) - {f"{META}/"} and read_job(store) is None:
        raise ConfigError(f"{place}: holds {names[-1]!r}, but no {JOB}; give --overwrite, or name another folder")
    return store


def check_apart(sink: SinkSpec, spec: SourceSpec, listing: Listing) -> None:
    """Raise ConfigError if the job could read what it writes, or remove what it reads."""
    folder, source = (fsspec.core.url_to_fs(uri)[1].rstrip("/") for uri in (sink.uri, spec.uri))
    coming = (MARKER, JOB, f"{META}/log-0/0.json", f"{PART_PREFIX}{'0' * 8}-{'0' * 6}-{'0' * 24}.{sink.file_format}")
    # What lies in an archive is no file of a folder, whatever its path.
    glob = re.compile(glob_translate("" if "::" in spec.uri else source))
    files = [*listing.files, *(f"{folder}/{name}" for name in coming if glob.match(f"{folder}/{name}"))]
    if f"{folder}/".startswith(f"{source}/") or any(file.startswith(f"{folder}/") for file in files):
        raise ConfigError(f"sink.uri = {bare_uri(sink.uri)!r}: source and output share a folder; name another one")
