"""An Iceberg table in a catalog; its files and its metadata lie in the sink's folder."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
from pyiceberg.io.pyarrow import parquet_file_to_data_file, schema_to_pyarrow
from pyiceberg.manifest import FileFormat

from rayinfer.errors import ConfigError
from rayinfer.pipelines.job import CatalogSpec, SinkSpec, SourceSpec
from rayinfer.pipelines.log import Part
from rayinfer.pipelines.store import Store
from rayinfer.pipelines.tables import Table


class Sink(Table):
    """Snapshots over the parts. Its commits are exact as its catalog's are, which compare and swap."""

    def __init__(self, sink: SinkSpec, store: Store):
        super().__init__(sink, store)
        catalog, self._name = sink.catalog or CatalogSpec(), sink.table or ""  # SinkSpec saw to both
        self._location = (sink.uri if "://" in sink.uri else f"file://{sink.uri}").rstrip("/")
        try:
            self._catalog = load_catalog(catalog.name, **catalog.settings())
        except Exception as error:
            raise ConfigError(f"sink.catalog: cannot be opened: {self.say(error)}") from None

    def load(self) -> Any:
        try:
            table = self._catalog.load_table(self._name)
        except (NoSuchTableError, NoSuchNamespaceError):
            return None
        place = f"sink.table = {self._name!r}"
        if table.location().rstrip("/") != self._location:
            raise ConfigError(f"{place}: its files are in {table.location()!r}; name another table")
        if hasattr(self, "schema") and _arrow(table.schema()) != self.schema:
            raise ConfigError(f"{place}: has other columns than this job writes; drop it first, or name another table")
        # Of this object alone: no commit is tried again on top of a version that was not looked at.
        table.metadata.properties["commit.retry.num-retries"] = "0"
        return table

    def files(self, table: Any) -> Iterable[tuple[str, Any]]:
        return ((task.file.file_path, task.file) for task in table.scan().plan_files())

    def create(self) -> None:
        self._catalog.create_namespace_if_not_exists(self._name.rpartition(".")[0])
        self._catalog.create_table(self._name, schema=self.schema, location=self._location)

    def change(self, table: Any, add: list[Part], remove: list[Any], told: dict[str, str]) -> None:
        transaction = table.transaction()
        if table.name_mapping() is None:  # parts know their columns by name
            transaction.set_properties(**{"schema.name-mapping.default": table.schema().name_mapping.model_dump_json()})
        update = transaction.update_snapshot(snapshot_properties=told)
        with update.overwrite() if remove else update.merge_append() as snapshot:
            for part in add:
                path = f"{self._location}/{part.name}"
                snapshot.append_data_file(parquet_file_to_data_file(table.io, transaction.table_metadata, path))
            for file in remove:
                snapshot.delete_data_file(file)
        transaction.commit_transaction()

    def held(self, schema: pa.Schema) -> pa.Schema:
        return _arrow(Catalog._convert_schema_if_needed(schema))  # what create_table does

    def batches(self, table: Any, column: str) -> Iterable[pa.RecordBatch]:
        return table.scan(selected_fields=(column,)).to_arrow_batch_reader()


def data_files(spec: SourceSpec) -> tuple[list[str], dict[str, bool]]:
    """URIs of a snapshot's files, and whether it has what makes its rows other than those of its files."""
    catalog = spec.catalog or CatalogSpec()
    table = load_catalog(catalog.name, **catalog.settings()).load_table(spec.table or "")
    tasks = list(table.scan(snapshot_id=spec.version).plan_files())
    columns = {frozenset((field.field_id, field.name) for field in one.fields) for one in table.schemas().values()}
    return [task.file.file_path for task in tasks], {
        "partitions": any(one.fields for one in table.specs().values()),
        "columns that were renamed, added or dropped": len(columns) > 1,
        "rows deleted by files of their own": any(task.delete_files for task in tasks),
        "files that are not Parquet": any(task.file.file_format != FileFormat.PARQUET for task in tasks),
    }


def _arrow(schema: Any) -> pa.Schema:
    return schema_to_pyarrow(schema, include_field_ids=False)
