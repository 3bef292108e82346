"""A Delta table in the sink's folder. Its commits are exact where the store has put-if-absent, as the log's are."""

import json
import time
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from rayinfer.errors import ConfigError
from rayinfer.pipelines.job import SourceSpec
from rayinfer.pipelines.log import Part
from rayinfer.pipelines.tables import Table

OWNER = "rayinfer"  # application of all commits: no table without one is written


class Sink(Table):
    """Add and remove actions for the parts."""

    def load(self) -> Any:
        try:
            table = DeltaTable(self.sink.uri)
        except TableNotFoundError:
            return None
        if table.transaction_version(OWNER) is None:
            what = "holds a Delta table that no job made; name another folder"
            raise ConfigError(f"sink.uri = {self.sink.uri!r}: {what}")
        return table

    def files(self, table: Any) -> Iterable[tuple[str, Any]]:
        return ((uri, uri.rpartition("/")[2]) for uri in table.file_uris())

    def create(self) -> None:
        DeltaTable.create(self.sink.uri, self.schema, mode="error", commit_properties=_properties(0, {}))

    def change(self, table: Any, add: list[Part], remove: list[Any], told: dict[str, str]) -> None:
        now, schema, actions = int(time.time() * 1000), Schema.from_arrow(self.schema), list[Any]()
        for part in add:
            stats = json.dumps({"numRecords": part.num_rows})
            actions.append(AddAction(part.name, part.num_bytes, {}, now, data_change=True, stats=stats))
        mode = "append" if table.schema() == schema else "overwrite"  # another schema takes the place of all files
        if mode == "append":
            actions += [RemoveAction(name, True, now, partition_values={}) for name in remove]
        properties = _properties(table.transaction_version(OWNER) + 1, told)
        table.create_write_transaction(actions, mode, schema, commit_properties=properties)

    def held(self, schema: pa.Schema) -> pa.Schema:
        if bad := [letter for name in schema.names for letter in name if letter in " ,;{}()\n\t="]:
            raise ValueError(f"Delta's readers refuse {bad[0]!r} in names")
        if any("timestamp[ns" in str(kind) for kind in schema.types):  # deltalake has them, other readers do not
            raise ValueError("Delta's timestamps are microseconds")
        return pa.schema(Schema.from_arrow(schema).to_arrow())

    def batches(self, table: Any, column: str) -> Iterable[pa.RecordBatch]:
        return table.to_pyarrow_dataset().to_batches(columns=[column])


def data_files(spec: SourceSpec) -> tuple[list[str], dict[str, bool]]:
    """URIs of a version's files, and whether it has what makes its rows other than those of its files."""
    table = DeltaTable(spec.uri, version=spec.version)
    metadata = table.metadata()
    return table.file_uris(), {
        "partitions": bool(metadata.partition_columns),
        "column mapping": metadata.configuration.get("delta.columnMapping.mode", "none") != "none",
        "deletion vectors": pa.table(table.deletion_vectors().read_all()).num_rows > 0,
    }


def _properties(version: int, told: dict[str, str]) -> CommitProperties:
    return CommitProperties(told, max_commit_retries=0, app_transactions=[Transaction(OWNER, version)])
