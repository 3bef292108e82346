"""Sources: Parquet, JSONL and CSV files behind any fsspec URI, cut into read units, with a key for every row.

The driver takes a census before anything starts: files, columns, rows, and the digest of all keys. Ray Data's own
readers are not used because a row there does not know its place in its file, and so has no stable key without an id.

Every row goes through Ray as `row_key` (string; null if there is an id column, but the row could not be read),
`row_number` (int64; its place in the census: file, then row),
`source` (struct of the row's columns, so that no column of the user can meet one of the engine) and `source_error`
(string; why the row could not be read, else null).
"""

import base64
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Self
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from rayinfer.errors import ConfigError, choices
from rayinfer.pipelines.job import CatalogSpec, SourceSpec
from rayinfer.pipelines.keys import KeyDigest, RowSet, find_duplicate, pack_rows, unpack_rows
from rayinfer.pipelines.textfiles import Chunk, infer_type, merge_types, read_chunks, to_array

KEY, NUMBER, SOURCE, SOURCE_ERROR = "row_key", "row_number", "source", "source_error"
SUFFIXES = {"parquet": (".parquet", ".pq"), "jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv",)}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
CHUNK_ROWS = 1024  # rows of one block on its way to the engines
KEYS_AT_ONCE = 2**16  # keys made at once for the digest
UNIT_ROWS = 8192  # row groups smaller than this share a read task
_PICKLED_TYPES = (b"ray.data.arrow_pickled_object", b"arrow.py_extension_type")
_PLAIN = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}  # layouts that not all functions take
_TAGS = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "mtime", "LastModified", "last_modified", "created")
_HIDDEN = re.compile(r"(^|/)(\.|_(?![^/]*=[^/]*/))")  # a folder `_part=1` is a column's
NUM_LIST_THREADS = 16  # footers are read in parallel: on an object store each costs a round trip


@dataclass(frozen=True)
class Unit:
    """Rows [first_row, first_row + num_rows) of one file: what one read task reads."""

    file: str  # path on the source's file system
    name: str  # path relative to the source's root; with the row's number it is the generated key
    first_row: int
    num_rows: int
    first_group: int = 0  # Parquet: the row group that begins with first_row
    first_number: int = 0  # row_number of first_row
    wanted: str = ""  # row_numbers to yield (keys.pack_rows), all if empty


@dataclass(frozen=True)
class Listing:
    """The files of a source, and what tells whether one was changed."""

    fs: Any
    root: str  # what the files' names are relative to
    format: str
    files: list[str]
    tags: dict[str, tuple[int, str]]  # by relative name: bytes, and the store's checksum or the time of change
    num_skipped_files: int


@dataclass
class Census:
    """What the driver knows about the source before anything starts."""

    spec: SourceSpec
    format: str
    schema: pa.Schema  # columns as the template and the sink see them
    units: list[Unit]
    num_files: int
    num_skipped_files: int  # files in the folder that are not of the format
    digest: KeyDigest | None = None  # of the ids, once they were read

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    def key_digest(self) -> KeyDigest:
        """Digest of the keys that the output must have, from the source alone."""
        if self.digest is None:
            self.digest = KeyDigest()
            for unit in self.units:
                for row in range(0, unit.num_rows, KEYS_AT_ONCE):
                    self.digest.add(_row_keys(unit.name, unit.first_row + row, min(KEYS_AT_ONCE, unit.num_rows - row)))
        return self.digest

    def units_left(self, done: RowSet) -> list[Unit]:
        """What must be read for the rows that are not done."""
        missing = ((unit, done.missing(unit.first_number, unit.first_number + unit.num_rows)) for unit in self.units)
        return [
            unit if len(rows) == unit.num_rows else replace(unit, wanted=pack_rows(rows))
            for unit, rows in missing
            if len(rows)
        ]

    def dataset(self, units: list[Unit]) -> ray.data.Dataset:
        """The rows of units as a Ray dataset: one read task for each unit, streamed in blocks of CHUNK_ROWS rows."""
        items = ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=len(units))
        return items.map_batches(ReadUnits(self), batch_size=1, batch_format="pyarrow")

    def pack(self) -> dict[str, Any]:
        """As JSON, so that a resumed job need not read its source to count it."""
        return {
            "format": self.format, "schema": base64.b64encode(self.schema.serialize()).decode(),
            "num_rows": self.num_rows, "keys": self.key_digest().hex(), "num_files": self.num_files,
            "num_skipped_files": self.num_skipped_files,
            "units": [[unit.file, unit.name, unit.first_row, unit.num_rows, unit.first_group] for unit in self.units],
        }  # fmt: skip

    @classmethod
    def unpack(cls, spec: SourceSpec, packed: dict[str, Any]) -> Self:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(packed["schema"])))
        digest = KeyDigest(packed["num_rows"], int(packed["keys"], 16))
        units = _numbered(Unit(*fields) for fields in packed["units"])
        return cls(spec, packed["format"], schema, units, packed["num_files"], packed["num_skipped_files"], digest)


def take_census(spec: SourceSpec, listing: Listing | None = None) -> Census:
    """Count and key the source.

    Raises:
        ConfigError: nothing there, no rows, mixed formats, an unknown column, a file that cannot be read, an id column
            with a null, a duplicate, or a type that is neither integer nor string.
    """
    listing = listing or list_source(spec)
    format, chosen = listing.format, listing.files
    with ThreadPoolExecutor(NUM_LIST_THREADS) as pool:
        schemas, units = zip(*pool.map(lambda file: _scan(file, listing, spec.limit), chosen), strict=True)
    every = _numbered(unit for some in units for unit in some)
    limit = spec.limit or sum(unit.num_rows for unit in every)
    kept = [replace(u, num_rows=min(u.num_rows, limit - u.first_number)) for u in every if u.first_number < limit]
    if not kept:
        raise ConfigError(f"source.uri = {spec.uri!r}: no rows in {len(chosen)} {format} file(s)")
    census = Census(spec, format, _merge(schemas, listing, spec), kept, len(chosen), listing.num_skipped_files)
    if spec.id_column is not None:
        census.digest = _digest_ids(census, spec.id_column)
    return census


def _numbered(units: Iterable[Unit]) -> list[Unit]:
    """The units with their first numbers: rows are numbered through, from 0."""
    units = list(units)
    numbers = accumulate((unit.num_rows for unit in units), initial=0)  # one more than units: that of the end
    return [replace(unit, first_number=number) for unit, number in zip(units, numbers, strict=False)]


def list_source(spec: SourceSpec) -> Listing:
    """Find the source's files; none is opened.

    Raises:
        ConfigError: nothing there, or files of several formats.
    """
    uri = spec.uri
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        root = path.rpartition("/")[0]
        infos: dict[str, Any] = {}
        if fs.isdir(path):
            root = path.rstrip("/")
            found = fs.find(path, detail=True).items()
            infos = {file: info for file, info in found if not _HIDDEN.search(file.removeprefix(root))}
        elif fs.exists(path):
            infos = {path: fs.info(path)}
        elif any(c in path for c in "*?["):
            found = fs.glob(path, detail=True).items()  # which calls a link, as Hugging Face's cache has, "other"
            infos = {f: info for f, info in found if info["type"] == "file" or (info.get("islink") and not fs.isdir(f))}
            root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    except Exception as error:  # each store's client has errors of its own
        raise ConfigError(f"source.uri = {uri!r}: {error}") from None
    if not infos:
        raise ConfigError(f"source.uri = {uri!r}: no file there")
    if spec.format in ("delta", "iceberg"):
        format, chosen = "parquet", _table_files(spec, fs)
        if outside := [file for file in chosen if file not in infos]:
            raise ConfigError(f"source.uri = {uri!r}: the table's file {outside[0]!r} is not there; name its folder")
    elif spec.version is not None:
        raise ConfigError(f"source.version = {spec.version}: only tables have one; set source.format to delta")
    elif spec.format == "auto" and root == path.rstrip("/") and fs.exists(f"{root}/_delta_log"):
        raise ConfigError(f"source.uri = {uri!r}: a Delta table; set source.format to delta, or parquet for all files")
    else:
        format, chosen = _choose_format(spec, sorted(infos))
    tags = {_relative(file, root): (infos[file]["size"] or 0, _tag(infos[file])) for file in chosen}
    return Listing(fs, root, format, chosen, tags, len(infos) - len(chosen))


def _table_files(spec: SourceSpec, fs: Any) -> list[str]:
    """Files of a table whose rows are simply those of its files. Raises ConfigError for any other."""
    place, library = f"source.uri = {spec.uri!r}: the {spec.format} table", table_library("source", spec.format)
    try:
        files, has = library.data_files(spec)
    except Exception as error:  # each library has errors of its own
        raise ConfigError(f"{place} cannot be read: {(spec.catalog or CatalogSpec()).say(error)}") from None
    if not files:
        raise ConfigError(f"{place} has no rows at its version {spec.version or 'of now'}")
    if reasons := [name for name, there in has.items() if there]:
        raise ConfigError(f"{place} has {' and '.join(reasons)}, which are not read yet; write it as Parquet")
    return sorted(fs._strip_protocol(uri) for uri in files)


def table_library(place: str, format: str) -> Any:
    """Our module for a table format. Raises ConfigError if the library that it needs is not installed."""
    try:
        return importlib.import_module(f"rayinfer.pipelines.{format}")
    except ImportError as error:
        text = f"{error.name} is not installed; pip install 'rayinfer[{format}]'"
        raise ConfigError(f"{place}.format = {format!r}: {text}") from None


def _relative(file: str, root: str) -> str:
    return file.removeprefix(root).lstrip("/")


def _tag(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _TAGS if info.get(key)), "")


def _choose_format(spec: SourceSpec, files: list[str]) -> tuple[str, list[str]]:
    if spec.format != "auto" and len(files) == 1:  # a single file is what the user says it is, whatever its name
        return spec.format, files
    by_format: dict[str, list[str]] = {}
    for file in files:
        name = file.lower()
        stem = next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)
        for format, suffixes in SUFFIXES.items():
            if stem.endswith(suffixes) and spec.format in ("auto", format):
                by_format.setdefault(format, []).append(file)
    if len(by_format) == 1:
        return next(iter(by_format.items()))
    if by_format:
        counts = ", ".join(f"{len(some)} {format}" for format, some in by_format.items())
        raise ConfigError(f"source.uri = {spec.uri!r}: files of several formats ({counts}); set source.format to one")
    wanted = spec.format if spec.format != "auto" else "parquet, jsonl or csv"
    raise ConfigError(f"source.uri = {spec.uri!r}: none of {len(files)} file(s) is {wanted}; set source.format")


def _scan(file: str, listing: Listing, limit: int | None) -> tuple[pa.Schema, list[Unit]]:
    """Columns and units of one file; of a text file, which is read to its end (or limit), one unit."""
    fs, format, name = listing.fs, listing.format, _relative(file, listing.root)
    units: list[Unit] = []
    first_row = 0
    try:
        if format == "parquet":
            with fs.open(file, "rb") as stream:
                _refuse_pickles(stream)
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
                    types[column] = merge_types(types.get(column, pa.null()), kind, or_text=True)
                if limit is not None and first_row >= limit:
                    break
            schema = pa.schema(list(types.items()))
            units = [Unit(file, name, 0, first_row)] if first_row else []
    except Exception as error:  # of the store's client, of a decompressor, of Arrow
        raise ConfigError(f"source file {file!r} cannot be read as {format}: {error}") from None
    for column, value in _hive_values(name).items():
        if column not in schema.names:
            schema = schema.append(pa.field(column, infer_type([value], from_text=True)))
    return schema, units


def _refuse_pickles(stream: Any) -> None:
    """Raise ValueError for a Parquet file with a column whose type, or whose values, are pickles: reading may run them.

    The schema is looked at as bytes, before anything makes types of it. (Ray's tensor types, which were pickles too,
    are JSON to the versions of Ray that we allow.)
    """
    schema = base64.b64decode((pq.read_metadata(stream).metadata or {}).get(b"ARROW:schema", b""))
    for name in _PICKLED_TYPES:
        if name in schema:
            raise ValueError(f"a column of type {name.decode()!r} holds pickled Python objects; write plain types")
    stream.seek(0)


def _hive_values(name: str) -> dict[str, str | None]:
    """Columns that the folders of a hive-partitioned table carry (`year=2024/part.parquet`)."""
    pairs = (part.partition("=") for part in name.split("/")[:-1])
    return {key: None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value) for key, sep, value in pairs if sep}


def _merge(schemas: Iterable[pa.Schema], listing: Listing, spec: SourceSpec) -> pa.Schema:
    """The columns to read, with types that hold those of all files. What was text can be text again, the rest not."""
    place, types = f"source.uri = {spec.uri!r}", dict[str, pa.DataType]()
    ids = [spec.id_column] if spec.id_column is not None else []
    hive = {key for file in listing.files for key in _hive_values(_relative(file, listing.root))}
    for schema, file in zip(schemas, listing.files, strict=True):
        for column in schema:
            if schema.get_field_index(column.name) < 0 and column.name in [*(spec.columns or schema.names), *ids]:
                raise ConfigError(f"{place}: {file!r} has several columns {column.name!r}; leave it out of columns")
            try:
                kind, or_text = _PLAIN.get(column.type, column.type), listing.format != "parquet" or column.name in hive
                types[column.name] = merge_types(types.get(column.name, pa.null()), kind, or_text)
            except pa.ArrowException:
                both = f"is {column.type} in {file!r} but {types[column.name]} in files before it"
                raise ConfigError(f"{place}: column {column.name!r} {both}; split the job") from None
    if not types:
        raise ConfigError(f"{place}: no row has a column; JSON has to be JSON lines, an object on each line")
    for key, names in (("columns", spec.columns or []), ("id_column", ids)):
        for name in names:
            if name not in types:
                raise ConfigError(f"source.{key}: {name!r} is no column of {spec.uri!r}{choices(name, types)}")
    # A column without one value has no type, and one of empty objects none that Parquet has; any sink holds a string.
    kinds = {n: pa.string() if pa.types.is_null(k) or "struct<>" in str(k) else k for n, k in types.items()}
    return pa.schema([(name, kinds[name]) for name in dict.fromkeys([*(spec.columns or types), *ids])])


def _digest_ids(census: Census, column: str) -> KeyDigest:
    kind = census.schema.field(column).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(f"source.id_column = {column!r}: ids are integers or strings, this column is {kind}")
    read = ReadUnits(replace(census, schema=pa.schema([census.schema.field(column)])))

    def keys() -> Iterator[list[str | None]]:
        for unit in census.units:
            for table in read.read(unit):
                bad = table.filter(pc.and_(pc.is_null(table[KEY]), pc.is_null(table[SOURCE_ERROR])))
                if bad.num_rows:  # a row that could not be read is no reason: it costs itself
                    row = unit.first_row + bad[NUMBER][0].as_py() - unit.first_number
                    where = f"row {row} (from 0) of {unit.name!r}"
                    raise ConfigError(f"source.id_column = {column!r} (leave it out?): {where} has no id: null id")
                yield table[KEY].to_pylist()

    digest = KeyDigest()
    if (duplicate := find_duplicate(keys, digest)) is not None:
        text = f"id {duplicate!r} is there more than once; leave id_column out to have a row_key made for every row"
        raise ConfigError(f"source.id_column = {column!r}: {text}")
    return digest


def _row_keys(name: str, first_row: int, num_rows: int) -> list[str]:
    return [f"{name}#{row}" for row in range(first_row, first_row + num_rows)]


class ReadUnits:
    """`map_batches` function over units; each table that it yields is a block, so that a big unit moves on at once."""

    yields_blocks = True  # read by rayinfer.processors.ray_compat

    def __init__(self, census: Census):
        self.spec = census.spec.model_copy(update={"catalog": None})  # its secrets stay with the driver
        self.format, self.schema = census.format, census.schema

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        for unit in units.to_pylist():
            yield from self.read(Unit(**unit))

    def read(self, unit: Unit) -> Iterator[pa.Table]:
        """Yield the wanted rows of the unit as tables of row_key, row_number, source, source_error."""
        fs, _ = fsspec.core.url_to_fs(self.spec.uri)
        at = 0  # rows of the unit that were read
        wanted = unpack_rows(unit.wanted) - unit.first_number if unit.wanted else None
        text = read_chunks(fs, unit.file, self.format, CHUNK_ROWS)  # which opens nothing before it is asked
        try:
            for columns, errors in self._parquet(fs, unit) if self.format == "parquet" else text:
                end = min(at + len(errors), unit.num_rows)
                kept = np.arange(at, end) if wanted is None else wanted[slice(*np.searchsorted(wanted, [at, end]))]
                if len(kept):
                    yield self._table(unit, at, columns, errors).take(pa.array(kept - at))
                at = end
                if at == unit.num_rows:
                    return
        except (OSError, EOFError, ValueError) as error:  # ValueError: Arrow's and Unicode's too
            raise OSError(f"{unit.file}: rows from {unit.first_row + at} on cannot be read: {error}") from None
        ends = f"ends at row {unit.first_row + at}, the census counted {unit.first_row + unit.num_rows}"
        raise OSError(f"{unit.file}: {ends}: the file changed under the job")

    def _table(self, unit: Unit, at: int, columns: Mapping[str, Any], errors: list[str | None]) -> pa.Table:
        """A chunk that begins with row `at` of the unit."""
        arrays, num_rows = [], len(errors)
        hive = {key: [value] * num_rows for key, value in _hive_values(unit.name).items() if key not in columns}
        for name, kind in zip(self.schema.names, self.schema.types, strict=True):
            values = columns.get(name, hive.get(name, [None] * num_rows))
            array, unfit = to_array(values, kind, from_text=self.format == "csv" or name in hive)
            for i in unfit:
                errors[i] = f"column {name!r}: its value does not fit the column's type, {kind}"
            arrays.append(array)
        source = pa.StructArray.from_arrays(arrays, fields=list(self.schema))
        places = _row_keys(unit.name, unit.first_row + at, num_rows)
        keys = pa.array(places, pa.string())
        if self.spec.id_column is not None:
            errors = [error and f"{place}: {error}" for place, error in zip(places, errors, strict=True)]
            keys = source.field(self.spec.id_column).cast(pa.string())
        numbers = pa.array(np.arange(num_rows) + unit.first_number + at)
        return pa.table({KEY: keys, NUMBER: numbers, SOURCE: source, SOURCE_ERROR: pa.array(errors, pa.string())})

    def _parquet(self, fs: Any, unit: Unit) -> Iterator[Chunk]:
        with fs.open(unit.file, "rb") as stream:
            parquet = pq.ParquetFile(stream)
            columns = [name for name in self.schema.names if name in parquet.schema_arrow.names]
            groups = list(range(unit.first_group, parquet.num_row_groups))
            for batch in parquet.iter_batches(min(CHUNK_ROWS, unit.num_rows), row_groups=groups, columns=columns):
                yield {name: batch.column(name) for name in columns}, [None] * batch.num_rows
