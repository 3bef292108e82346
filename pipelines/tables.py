"""Delta and Iceberg tables: they name the same parts as the commit log, and follow it.

The log stays the truth. A table is brought to it by one commit of what differs, found by looking at both: nothing is
counted or remembered, so a commit that a crash cut off, or that came through although it was reported lost, is found
done or not done, and no part is in the table twice. Two rules make that safe:

- A part is in the log before it is in the table, and out of the table before it is out of the log: readers never see
  a part that the log has not.
- First look at the table, then at the log, whether it is still ours, then commit on top of exactly what was seen, or
  fail. A driver begins with an entry of the log and then a commit of its own, empty or not; so one that was replaced
  finds the entry, or its commit is refused.
"""

import contextlib
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import pyarrow as pa

from rayinfer.errors import ConfigError
from rayinfer.pipelines import store as stores
from rayinfer.pipelines.identity import read_job
from rayinfer.pipelines.job import CatalogSpec, SinkSpec
from rayinfer.pipelines.log import CommitLog, OutputTakenError, Part, part_ids
from rayinfer.pipelines.sources import table_library
from rayinfer.pipelines.store import Store

FOLLOW_SECONDS = 60.0  # a table is at most so far behind the log of a job at work


class Table(Protocol):
    """A table over the parts in a sink's folder; each `Sink` speaks to its library, and raises what that raises."""

    sink: SinkSpec
    store: Store
    schema: pa.Schema  # of the parts, from `fit`
    _last: float  # when it was brought to the log

    def __init__(self, sink: SinkSpec, store: Store):
        self.sink, self.store, self._last = sink, store, time.monotonic()

    def load(self) -> Any:
        """The table's newest version; None if there is no table. Raises ConfigError if it is not this output's."""

    def files(self, table: Any) -> Iterable[tuple[str, Any]]:
        """URIs of the files that a version names, each with what `change` takes for it."""

    def create(self) -> None:
        """Make the table, empty; fails if there is one."""

    def change(self, table: Any, add: list[Part], remove: list[Any], told: dict[str, str]) -> None:
        """One commit, with what it shall tell, on top of this version; fails if there is a newer one."""

    def held(self, schema: pa.Schema) -> pa.Schema:
        """The Arrow types that the table makes of `schema`."""

    def batches(self, table: Any, column: str) -> Iterable[pa.RecordBatch]:
        """A column as the table's own reader gives it."""

    def fit(self, schema: pa.Schema) -> pa.Schema:
        """The schema that the parts must have; checks that the table, if there is one, can be written.

        Raises:
            ConfigError: a column that the table cannot hold without loss, a table of others, one out of reach.
        """
        for column in schema:
            try:
                held = self.held(pa.schema([column])).field(0).type
                reason = "" if _holds(held, column.type) else f"it would become {held}"
            except Exception as error:  # each library has errors of its own
                reason = str(error).partition("\n")[0]
            if reason:
                raise cannot_hold(self.sink, column, f" ({reason})")
        try:
            self.schema = self.held(schema)
            self.names(self.load())
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"sink: the {self.sink.format} table is out of reach: {self.say(error)}") from None
        return self.schema

    def names(self, table: Any) -> dict[str, Any]:
        """`files` by the names of the parts. Raises ConfigError if one is no part."""
        files = {} if table is None else {uri.rpartition("/")[2]: file for uri, file in self.files(table)}
        if other := [name for name in files if not part_ids([name])]:
            raise ConfigError(f"sink: the {self.sink.format} table has {other[0]!r}, which no job wrote; name another")
        return files

    def sync(self, log: CommitLog, *, without: Collection[str] = (), first: bool = False) -> None:
        """Bring the table to the log, but for the parts `without`, which are about to leave it.

        Args:
            first: commit also if nothing differs, so that what another driver has under way fails.

        Raises:
            OutputTakenError: another driver has begun. ConfigError: as of `names`.
            OSError: the library failed, a few times.
        """
        wanted = {name: part for name, part in log.parts.items() if name not in without}
        for seconds in stores.RETRY_SECONDS:
            time.sleep(seconds)
            try:
                return self._sync(log, wanted, first)
            except (OutputTakenError, ConfigError):
                raise
            except Exception as error:
                reason = self.say(error)
        raise OSError(f"the {self.sink.format} table was not brought to the log: {reason}")

    def follow(self, log: CommitLog, *, now: bool = False) -> None:
        """Bring the table to the log now, or now and then; a failure is left for the next time."""
        if now or time.monotonic() - self._last >= FOLLOW_SECONDS:
            with contextlib.suppress(OSError):
                self.sync(log)
            self._last = time.monotonic()

    def _sync(self, log: CommitLog, wanted: Mapping[str, Part], first: bool) -> None:
        table = self.load()
        there = self.names(table)
        log.check_last()
        if (read_job(self.store) or {}).get("id") != log.job_id:
            raise OutputTakenError("another driver has replaced this job with --overwrite")
        if table is None:
            self.create()
            table = self.load()
        add = [part for name, part in wanted.items() if name not in there]
        remove = [file for name, file in there.items() if name not in wanted]
        if add or remove or first:
            self.change(table, add, remove, {"rayinfer.job": log.job_id, "rayinfer.entries": str(log.length)})

    def say(self, error: Exception) -> str:
        return (self.sink.catalog or CatalogSpec()).say(error)


def cannot_hold(sink: SinkSpec, column: pa.Field, reason: str = "") -> ConfigError:
    """The error of a column that the sink's format has no type for."""
    what = f"sink.format = {sink.format!r} cannot hold column {column.name!r} of type {column.type}{reason}"
    return ConfigError(f"{what}; leave it out with sink.columns, or write parquet")


def _holds(wide: pa.DataType, narrow: pa.DataType) -> bool:
    """Whether every value of a type is one of another; how strings and lists are laid out does not count."""
    plain = [str(kind).replace("large_", "").replace("item: ", "element: ") for kind in (wide, narrow)]
    both = [pa.schema([("x", kind)]) for kind in (wide, narrow)]
    if plain[0] == plain[1] or pa.types.is_uint64(narrow):  # which Arrow takes for one of int64
        return plain[0] == plain[1]
    with contextlib.suppress(pa.ArrowException):
        return pa.unify_schemas(both, promote_options="permissive").field(0).type == wide
    return False


def open_table(sink: SinkSpec, store: Store) -> Table | None:
    """The table of a sink; None for files alone.

    Raises:
        ConfigError: its library is not installed, or the catalog cannot be opened.
    """
    return table_library("sink", sink.format).Sink(sink, store) if sink.format in ("delta", "iceberg") else None
