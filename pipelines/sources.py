"""Sources: Parquet, JSONL and CSV files behind any fsspec URI, cut into read units, with a key for every row.

The driver takes a census before anything starts: files, columns, rows, and the digest of all keys. Ray Data's own
readers are not used because a row there does not know its place in its file, and so has no stable key without an id.

Every row goes through Ray as `row_key` (string), `source` (struct of the row's columns, so that no column of the user
can meet one of the engine) and `source_error` (string; why the row could not be read, else null).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from rayinfer.pipelines.textfiles import Chunk, infer_type, merge_types, read_chunks, to_array

KEY, SOURCE, SOURCE_ERROR = "row_key", "source", "source_error"
SUFFIXES = {"parquet": (".parquet", ".pq"), "jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv",)}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
CHUNK_ROWS = 1024  # rows of one block on its way to the engines
UNIT_ROWS = 8192  # row groups smaller than this share a read task
NUM_LIST_THREADS = 16  # footers are read in parallel: on an object store each costs a round trip


@dataclass(frozen=True)
class Unit:
    """Rows [first_row, first_row + num_rows) of one file: what one read task reads."""

    file: str  # path on the source's file system
    name: str  # path relative to the source's root; with the row's number it is the generated key
    first_row: int
    num_rows: int
    first_group: int = 0  # Parquet: the row group that begins with first_row


@dataclass
class Census:
    """What the driver knows about the source before anything starts."""

    spec: SourceSpec
    format: str
    schema: pa.Schema  # columns as the template and the sink see them
    units: list[Unit]
    num_files: int
    num_skipped_files: int  # files in the folder that are not of the format
    id_digest: KeyDigest | None = None

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    def key_digest(self) -> KeyDigest:
        """Digest of the keys that the output must have, from the source alone."""
        digest = self.id_digest or KeyDigest()
        for unit in self.units if self.id_digest is None else ():
            digest.add(_row_keys(unit.name, unit.first_row, unit.num_rows))
        return digest

    def dataset(self) -> ray.data.Dataset:
        """The rows as a Ray dataset: one read task for each unit, streamed in blocks of CHUNK_ROWS rows."""
        units = ray.data.from_items([asdict(unit) for unit in self.units], override_num_blocks=len(self.units))
        return units.map_batches(ReadUnits(self), batch_size=1, batch_format="pyarrow")


def take_census(spec: SourceSpec) -> Census:
    """List, count and key the source.

    Raises:
        ConfigError: nothing there, no rows, mixed formats, an unknown column, a file that cannot be read, an id column
            with a null, a duplicate, or a type that is neither integer nor string.
    """
    fs, files, root = _list_files(spec.uri)
    format, chosen = _choose_format(spec, files)
    scan = partial(_scan, fs=fs, root=root, format=format, limit=spec.limit)
    with ThreadPoolExecutor(NUM_LIST_THREADS) as pool:
        schemas, units = zip(*pool.map(scan, chosen), strict=True)
    census = Census(spec, format, _merge(schemas, chosen, spec), [], len(chosen), len(files) - len(chosen))
    left = spec.limit or sum(unit.num_rows for some in units for unit in some)
    for unit in (unit for some in units for unit in some):
        if left > 0:
            census.units.append(replace(unit, num_rows=min(unit.num_rows, left)))
            left -= unit.num_rows
    if not census.units:
        raise ConfigError(f"source.uri = {spec.uri!r}: no rows in {len(chosen)} {format} file(s)")
    if spec.id_column is not None:
        census.id_digest = _digest_ids(census, spec.id_column)
    return census


def _list_files(uri: str) -> tuple[Any, list[str], str]:
    """Return the file system, all files in order, and the folder that their names are relative to."""
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        root, files = path.rpartition("/")[0], []
        if fs.isdir(path):
            root = path.rstrip("/")
            parts = {file: file.removeprefix(root).split("/") for file in fs.find(path)}
            files = sorted(file for file in parts if not any(part.startswith(("_", ".")) for part in parts[file]))
        elif fs.exists(path):
            files = [path]
        elif any(c in path for c in "*?["):
            files = sorted(str(file) for file in fs.glob(path) if fs.isfile(file))
            root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"source.uri = {uri!r}: {error}") from None
    if not files:
        raise ConfigError(f"source.uri = {uri!r}: no file there")
    return fs, files, root


def _choose_format(spec: SourceSpec, files: list[str]) -> tuple[str, list[str]]:
    by_format: dict[str, list[str]] = {}
    for file in files:
        stem = next((file.removesuffix(end) for end in COMPRESSIONS if file.endswith(end)), file).lower()
        for format, suffixes in SUFFIXES.items():
            if stem.endswith(suffixes):
                by_format.setdefault(format, []).append(file)
    if spec.format != "auto":
        if len(files) == 1:  # a single file is what the user says it is, whatever its name
            return spec.format, files
        by_format = {format: some for format, some in by_format.items() if format == spec.format}
    if len(by_format) == 1:
        return next(iter(by_format.items()))
    if by_format:
        counts = ", ".join(f"{len(some)} {format}" for format, some in by_format.items())
        raise ConfigError(f"source.uri = {spec.uri!r}: files of several formats ({counts}); set source.format to one")
    wanted = spec.format if spec.format != "auto" else "parquet, jsonl or csv"
    raise ConfigError(f"source.uri = {spec.uri!r}: none of {len(files)} file(s) is {wanted}; set source.format")


def _scan(file: str, *, fs: Any, root: str, format: str, limit: int | None) -> tuple[pa.Schema, list[Unit]]:
    """Columns and units of one file; of a text file, which is read to its end (or limit), one unit."""
    name = file.removeprefix(root).lstrip("/")
    units: list[Unit] = []
    first_row = 0
    try:
        if format == "parquet":
            with fs.open(file, "rb") as stream:
                parquet = pq.ParquetFile(stream)
                schema = parquet.schema_arrow.remove_metadata()
                sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            for group, size in enumerate(sizes):
                if units and units[-1].num_rows + size <= UNIT_ROWS:
                    units[-1] = replace(units[-1], num_rows=units[-1].num_rows + size)
                elif size:
                    units.append(Unit(file, name, first_row, size, group))
                first_row += size
        else:
            types: dict[str, pa.DataType] = {}
            for columns, errors in read_chunks(fs, file, format, CHUNK_ROWS):
                first_row += len(errors)
                for column, values in columns.items():
                    kind = infer_type(values, from_text=format == "csv")
                    try:
                        types[column] = merge_types(types.get(column, pa.null()), kind)
                    except pa.ArrowException:
                        types[column] = pa.string()
                if limit is not None and first_row >= limit:
                    break
            schema = pa.schema(list(types.items()))
            units = [Unit(file, name, 0, first_row)] if first_row else []
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"source file {file!r} cannot be read as {format}: {error}") from None
    for column, value in _hive_values(name).items():
        if column not in schema.names:
            schema = schema.append(pa.field(column, infer_type([value], from_text=True)))
    return schema, units


def _hive_values(name: str) -> dict[str, str]:
    """Columns that the folders of a hive-partitioned table carry (`year=2024/part.parquet`)."""
    return {key: unquote(value) for key, sep, value in (p.partition("=") for p in name.split("/")[:-1]) if sep}


def _merge(schemas: Iterable[pa.Schema], files: list[str], spec: SourceSpec) -> pa.Schema:
    """The columns to read, with types that hold those of all files."""
    types: dict[str, pa.DataType] = {}
    for schema, file in zip(schemas, files, strict=True):
        for column in schema:
            try:
                types[column.name] = merge_types(types.get(column.name, pa.null()), column.type)
            except pa.ArrowException:
                raise ConfigError(
                    f"source.uri = {spec.uri!r}: column {column.name!r} is {column.type} in {file!r} but "
                    f"{types[column.name]} in files before it; split the job"
                ) from None
    ids = [spec.id_column] if spec.id_column is not None else []
    for key, names in (("columns", spec.columns or []), ("id_column", ids)):
        for name in names:
            if name not in types:
                known = f"{nearest(name, types)} Columns: {', '.join(types)}"
                raise ConfigError(f"source.{key}: {name!r} is no column of {spec.uri!r}{known}")
    # A column without one value has no type; a null string is what every sink can hold.
    kinds = {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in types.items()}
    return pa.schema([(name, kinds[name]) for name in dict.fromkeys([*(spec.columns or types), *ids])])


def _digest_ids(census: Census, column: str) -> KeyDigest:
    kind = census.schema.field(column).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(f"source.id_column = {column!r}: ids are integers or strings, this column is {kind}")
    read = ReadUnits(replace(census, schema=pa.schema([census.schema.field(column)])))

    def keys() -> Iterator[list[str]]:
        for unit in census.units:
            first_row = unit.first_row
            for table in read.read(unit):
                if table[KEY].null_count:
                    i = pc.index(pc.is_null(table[KEY]), True).as_py()
                    reason = table[SOURCE_ERROR][i].as_py() or "null id"
                    where = f"row {first_row + i} (from 0) of {unit.name!r}"
                    raise ConfigError(f"source.id_column = {column!r}: {where} has no id: {reason}")
                first_row += table.num_rows
                yield table[KEY].to_pylist()

    digest = KeyDigest()
    duplicate = find_duplicate(keys, digest)
    if duplicate is not None:
        raise ConfigError(
            f"source.id_column = {column!r}: id {duplicate!r} is there more than once; ids must be unique "
            "(leave id_column out to have a row_key made for every row)"
        )
    return digest


def _row_keys(name: str, first_row: int, num_rows: int) -> list[str]:
    return [f"{name}#{row}" for row in range(first_row, first_row + num_rows)]


class ReadUnits:
    """`map_batches` function over units; each table that it yields is a block, so that a big unit moves on at once."""

    yields_blocks = True  # read by rayinfer.processors.ray_compat

    def __init__(self, census: Census):
        self.spec, self.format, self.schema = census.spec, census.format, census.schema

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        for unit in units.to_pylist():
            yield from self.read(Unit(**unit))

    def read(self, unit: Unit) -> Iterator[pa.Table]:
        """Yield the unit's rows as tables of row_key, source, source_error."""
        fs, _ = fsspec.core.url_to_fs(self.spec.uri)
        hive = _hive_values(unit.name)
        row, end = unit.first_row, unit.first_row + unit.num_rows
        text = self.format != "parquet"
        chunks = read_chunks(fs, unit.file, self.format, CHUNK_ROWS) if text else self._parquet(fs, unit)
        for columns, errors in chunks:
            arrays = []
            for name, kind in zip(self.schema.names, self.schema.types, strict=True):
                if name in columns:
                    arrays.append(to_array(columns[name], kind, from_text=self.format == "csv"))
                elif name in hive:
                    arrays.append(to_array([hive[name]] * len(errors), kind, from_text=True))
                else:
                    arrays.append(pa.nulls(len(errors), kind))
            source = pa.StructArray.from_arrays(arrays, fields=list(self.schema))
            keys = pa.array(_row_keys(unit.name, row, len(errors)), pa.string())
            if self.spec.id_column is not None:
                keys = source.field(self.spec.id_column).cast(pa.string())
            table = pa.table({KEY: keys, SOURCE: source, SOURCE_ERROR: pa.array(errors, pa.string())})
            yield table.slice(0, end - row)
            row += min(len(errors), end - row)
            if row == end:
                return
        raise OSError(f"{unit.file}: ends at row {row}, the census counted {end}: the file changed under the job")

    def _parquet(self, fs: Any, unit: Unit) -> Iterator[Chunk]:
        with fs.open(unit.file, "rb") as stream:
            parquet = pq.ParquetFile(stream)
            columns = [name for name in self.schema.names if name in parquet.schema_arrow.names]
            groups = list(range(unit.first_group, parquet.num_row_groups))
            for batch in parquet.iter_batches(min(CHUNK_ROWS, unit.num_rows), row_groups=groups, columns=columns):
                yield {name: batch.column(name) for name in columns}, [None] * batch.num_rows
