"""Sources: Parquet, JSONL and CSV files behind any fsspec URI, cut into read units with a key for every row.

The driver takes a census before anything starts: files, columns, rows, and the digest of all keys. Ray Data's own
readers are not used because a row there does not know its place in its file, and so has no stable key without an id.

Every row goes through Ray as `row_key` (string), `source` (struct of the row's columns, so that no column of the user
can meet one of the engine) and `source_error` (string; why the row could not be read, else null).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from rayinfer.errors import ConfigError, nearest
from rayinfer.pipelines.job import SourceSpec
from rayinfer.pipelines.keys import KeyDigest, find_duplicate
from rayinfer.pipelines.textfiles import Chunk, infer_columns, merge_types, read_chunks, to_array

KEY, SOURCE, SOURCE_ERROR = "row_key", "source", "source_error"
SUFFIXES = {"parquet": (".parquet", ".pq"), "jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv",)}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
UNIT_ROWS = 1024  # rows of one read task, more when there would be over MAX_UNITS tasks
MAX_UNITS = 4096
NUM_LIST_THREADS = 16  # footers are read in parallel: on an object store each costs a round trip


@dataclass(frozen=True)
class Unit:
    """Rows [first_row, first_row + num_rows) of one file: what one read task reads."""

    file: str  # path on the source's file system
    name: str  # path relative to the source's root; with the row's number it is the generated key
    first_row: int
    num_rows: int
    offset: int = 0  # text: byte where first_row begins
    first_group: int = 0  # Parquet: row group where first_row begins


@dataclass
class Census:
    """What the driver knows about the source before anything starts."""

    spec: SourceSpec
    format: str
    schema: pa.Schema  # columns as the sink and the template see them
    units: list[Unit]
    num_files: int
    num_skipped_files: int  # files in the folder that are not of the format
    id_digest: KeyDigest | None = field(default=None)

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    def key_digest(self) -> KeyDigest:
        """Digest of the keys that the output must have, from the source alone."""
        if self.id_digest is not None:
            return self.id_digest
        digest = KeyDigest()
        for unit in self.units:
            digest.add(_keys(unit, 0, unit.num_rows))
        return digest

    def dataset(self) -> ray.data.Dataset:
        """The rows as a Ray dataset: one read task for each unit, streamed in blocks of UNIT_ROWS rows."""
        read = _ReadUnits(self.spec, self.format, self.schema)
        units = ray.data.from_items([asdict(unit) for unit in self.units], override_num_blocks=len(self.units))
        return units.map_batches(read, batch_size=1, batch_format="pyarrow")


def take_census(spec: SourceSpec) -> Census:
    """List, count and key the source.

    Raises:
        ConfigError: nothing there, no rows, mixed formats, an unknown column, a file that cannot be read, an id column
            with a null, a duplicate, or a type that is neither integer nor string.
    """
    fs, files, root = _list_files(spec.uri)
    format, chosen = _choose_format(spec, files)
    names = {file: _relative(file, root) for file in chosen}
    hive = _hive_types(names.values())
    scan = partial(
        _scan_parquet if format == "parquet" else _scan_text, fs, format=format, names=names, limit=spec.limit
    )
    with ThreadPoolExecutor(NUM_LIST_THREADS) as pool:
        scans = list(pool.map(scan, chosen))
    schema = _merge_schemas([scan.schema for scan in scans], chosen, spec.uri)
    for column, kind in hive.items():
        if column not in schema.names:
            schema = schema.append(pa.field(column, kind))
    schema = _select(schema, spec)
    units = _limit([unit for scan in scans for unit in scan.units], spec.limit)
    if not units:
        raise ConfigError(f"source.uri = {spec.uri!r}: no rows in {len(chosen)} {format} file(s)")
    census = Census(spec, format, schema, units, len(chosen), len(files) - len(chosen))
    if spec.id_column is not None:
        census.id_digest = _digest_ids(census)
    return census


@dataclass
class _Scan:
    schema: pa.Schema
    units: list[Unit]


def _list_files(uri: str) -> tuple[Any, list[str], str]:
    """Return the file system, all files in order, and the folder that names are relative to."""
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        if any(c in path for c in "*?[") and not fs.exists(path):
            files = sorted(str(file) for file in fs.glob(path) if fs.isfile(file))
            root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        elif fs.isdir(path):
            root = path.rstrip("/")
            files = sorted(file for file in fs.find(path) if _visible(_relative(file, root)))
        elif fs.exists(path):
            files, root = [path], path.rpartition("/")[0]
        else:
            files, root = [], ""
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"source.uri = {uri!r}: {error}") from None
    if not files:
        raise ConfigError(f"source.uri = {uri!r}: no file there")
    return fs, files, root


def _visible(name: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in name.split("/"))


def _relative(file: str, root: str) -> str:
    return file.removeprefix(root).lstrip("/")


def _choose_format(spec: SourceSpec, files: list[str]) -> tuple[str, list[str]]:
    def format_of(file: str) -> str | None:
        name = file.lower()
        stem = name.rpartition(".")[0] if name.endswith(COMPRESSIONS) else name
        return next((format for format, suffixes in SUFFIXES.items() if stem.endswith(suffixes)), None)

    by_format = {format: [file for file in files if format_of(file) == format] for format in SUFFIXES}
    found = [format for format, some in by_format.items() if some]
    if spec.format != "auto":
        if by_format[spec.format]:
            return spec.format, by_format[spec.format]
        if len(files) == 1:  # a single file is what the user says it is, whatever its name
            return spec.format, files
        found = []
    if len(found) > 1:
        counts = ", ".join(f"{len(by_format[format])} {format}" for format in found)
        raise ConfigError(f"source.uri = {spec.uri!r}: files of several formats ({counts}); set source.format to one")
    if not found:
        wanted = spec.format if spec.format != "auto" else "parquet, jsonl or csv"
        raise ConfigError(f"source.uri = {spec.uri!r}: none of {len(files)} file(s) is {wanted}; set source.format")
    return found[0], by_format[found[0]]


def _hive_values(name: str) -> dict[str, str]:
    """Columns that the folders of a hive-partitioned table carry (`year=2024/part.parquet`)."""
    return {key: unquote(value) for key, sep, value in (p.partition("=") for p in name.split("/")[:-1]) if sep}


def _hive_types(names: Any) -> dict[str, pa.DataType]:
    values: dict[str, list[str]] = {}
    for name in names:
        for key, value in _hive_values(name).items():
            values.setdefault(key, []).append(value)
    return {key: infer_columns("csv", {key: some})[key] for key, some in values.items()}


def _scan_parquet(fs: Any, file: str, *, format: str, names: dict[str, str], limit: int | None) -> _Scan:
    try:
        with fs.open(file, "rb") as stream:
            parquet = pq.ParquetFile(stream)
            schema = parquet.schema_arrow.remove_metadata()
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"source file {file!r} cannot be read as parquet: {error}") from None
    units: list[Unit] = []
    first_row = 0
    for group, size in enumerate(sizes):
        if units and units[-1].num_rows + size <= UNIT_ROWS:
            units[-1] = replace(units[-1], num_rows=units[-1].num_rows + size)
        elif size:
            units.append(Unit(file, names[file], first_row, size, first_group=group))
        first_row += size
    return _Scan(schema, units)


def _scan_text(fs: Any, file: str, *, format: str, names: dict[str, str], limit: int | None) -> _Scan:
    types: dict[str, pa.DataType] = {}
    units: list[Unit] = []
    first_row = 0
    try:
        for chunk in read_chunks(fs, file, format, UNIT_ROWS):
            units.append(Unit(file, names[file], first_row, chunk.num_rows, offset=chunk.offset))
            for name, kind in infer_columns(format, chunk.columns).items():
                types[name] = merge_types(types.get(name, pa.null()), kind)
            first_row += chunk.num_rows
            if limit is not None and first_row >= limit:
                break
    except (OSError, ValueError) as error:
        raise ConfigError(f"source file {file!r} cannot be read as {format}: {error}") from None
    if units and file.endswith(COMPRESSIONS):  # no seek inside: one task reads the file in one go
        units = [replace(units[0], num_rows=first_row)]
    return _Scan(pa.schema(list(types.items())), units)


def _merge_schemas(schemas: list[pa.Schema], files: list[str], uri: str) -> pa.Schema:
    merged: dict[str, pa.DataType] = {}
    for schema, file in zip(schemas, files, strict=True):
        for column in schema:
            try:
                merged[column.name] = merge_types(merged.get(column.name, pa.null()), column.type, strict=True)
            except pa.ArrowException:
                raise ConfigError(
                    f"source.uri = {uri!r}: column {column.name!r} is {column.type} in {file!r} but "
                    f"{merged[column.name]} in files before it; leave it out with source.columns, or split the job"
                ) from None
    # A column without one value has no type; a null string is what every sink can hold.
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in merged.items()])


def _select(schema: pa.Schema, spec: SourceSpec) -> pa.Schema:
    wanted = list(dict.fromkeys(spec.columns or schema.names))
    for key, names in (("columns", wanted), ("id_column", [spec.id_column] if spec.id_column else [])):
        for name in names:
            if name not in schema.names:
                raise ConfigError(
                    f"source.{key}: {name!r} is no column of {spec.uri!r}{nearest(name, schema.names)} "
                    f"Columns: {', '.join(schema.names)}"
                )
    if spec.id_column and spec.id_column not in wanted:
        wanted.append(spec.id_column)
    return pa.schema([schema.field(name) for name in wanted])


def _limit(units: list[Unit], limit: int | None) -> list[Unit]:
    """Cut to the first `limit` rows, and join neighbours when there are more units than tasks are wanted."""
    if limit is not None:
        kept, left = [], limit
        for unit in units:
            if left > 0:
                kept.append(replace(unit, num_rows=min(unit.num_rows, left)))
                left -= unit.num_rows
        units = kept
    size = max(UNIT_ROWS, sum(unit.num_rows for unit in units) // MAX_UNITS)
    joined: list[Unit] = []
    for unit in units:
        last = joined[-1] if joined else None
        if last and last.file == unit.file and last.num_rows + unit.num_rows <= size:
            joined[-1] = replace(last, num_rows=last.num_rows + unit.num_rows)
        else:
            joined.append(unit)
    return joined


def _digest_ids(census: Census) -> KeyDigest:
    column = census.spec.id_column
    assert column is not None
    kind = census.schema.field(column).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(f"source.id_column = {column!r}: ids are integers or strings, this column is {kind}")
    digest = KeyDigest()

    def keys() -> Iterator[list[str]]:
        for unit in census.units:
            first_row = unit.first_row
            for table in _read_unit(unit, census.spec, census.format, pa.schema([census.schema.field(column)])):
                if table[KEY].null_count:
                    i = pc.index(pc.is_null(table[KEY]), True).as_py()
                    reason = table[SOURCE_ERROR][i].as_py() or "null id"
                    where = f"row {first_row + i} (from 0) of {unit.name!r}"
                    raise ConfigError(f"source.id_column = {column!r}: {where} has no id: {reason}")
                first_row += table.num_rows
                yield table[KEY].to_pylist()

    duplicate = find_duplicate(keys, digest)
    if duplicate is not None:
        raise ConfigError(
            f"source.id_column = {column!r}: id {duplicate!r} is there more than once; ids must be unique "
            "(leave id_column out to have a row_key made for every row)"
        )
    return digest


def _keys(unit: Unit, start: int, num_rows: int) -> list[str]:
    first = unit.first_row + start
    return [f"{unit.name}#{row}" for row in range(first, first + num_rows)]


class _ReadUnits:
    """`map_batches` function over units; each table that it yields is a block, so that a big unit moves on at once."""

    yields_blocks = True  # read by rayinfer.processors.ray_compat

    def __init__(self, spec: SourceSpec, format: str, schema: pa.Schema):
        self.spec, self.format, self.schema = spec, format, schema

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        for unit in units.to_pylist():
            yield from _read_unit(Unit(**unit), self.spec, self.format, self.schema)


def _read_unit(unit: Unit, spec: SourceSpec, format: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the unit's rows as tables of row_key, source, source_error."""
    fs, _ = fsspec.core.url_to_fs(spec.uri)
    hive = _hive_values(unit.name)
    read = _parquet_chunks if format == "parquet" else read_chunks_of
    done = 0
    for chunk in read(fs, unit, format, schema):
        columns = []
        errors: list[str | None] = list(chunk.errors)
        for column in schema:
            values = chunk.columns.get(column.name)
            if values is None:
                values = [hive.get(column.name)] * chunk.num_rows
            columns.append(to_array(values, column, errors, from_text=format == "csv" or column.name in hive))
        source = pa.StructArray.from_arrays(columns, fields=list(schema))
        if spec.id_column is not None:
            keys = source.field(spec.id_column).cast(pa.string())
        else:
            keys = pa.array(_keys(unit, done, chunk.num_rows), pa.string())
        yield pa.table({KEY: keys, SOURCE: source, SOURCE_ERROR: pa.array(errors, pa.string())})
        done += chunk.num_rows
    if done != unit.num_rows:
        raise OSError(
            f"{unit.file}: {done} rows where the census counted {unit.num_rows}: the file changed under the job"
        )


def read_chunks_of(fs: Any, unit: Unit, format: str, schema: pa.Schema) -> Iterator[Chunk]:
    return read_chunks(
        fs, unit.file, format, UNIT_ROWS, offset=unit.offset, first_row=unit.first_row, num_rows=unit.num_rows
    )


def _parquet_chunks(fs: Any, unit: Unit, format: str, schema: pa.Schema) -> Iterator[Chunk]:
    with fs.open(unit.file, "rb") as stream:
        parquet = pq.ParquetFile(stream)
        present = set(parquet.schema_arrow.names)
        columns = [name for name in schema.names if name in present]
        left = unit.num_rows
        groups = list(range(unit.first_group, parquet.num_row_groups))
        for batch in parquet.iter_batches(min(UNIT_ROWS, left), row_groups=groups, columns=columns):
            batch = batch.slice(0, left)
            left -= batch.num_rows
            yield Chunk(0, batch.num_rows, {name: batch.column(name) for name in columns}, [None] * batch.num_rows)
            if not left:
                return
