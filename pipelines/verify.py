"""`rayinfer verify`: prove from the files alone that the table has every row of the source once."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from rayinfer.pipelines.identity import need_job
from rayinfer.pipelines.job import SinkSpec
from rayinfer.pipelines.keys import KeyDigest, find_duplicate
from rayinfer.pipelines.log import PART_PREFIX, CommitLog, Part
from rayinfer.pipelines.sinks import MARKER
from rayinfer.pipelines.sources import CHUNK_ROWS, KEY
from rayinfer.pipelines.store import Store, open_store
from rayinfer.pipelines.tables import Table, open_table
from rayinfer.pipelines.textfiles import read_chunks

MAX_TOLD = 5  # problems of one kind


def verify(uri: str, sink: SinkSpec | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """Read the log and every part of an output; returns (name, value) facts, and what is wrong.

    A Delta or Iceberg table is also read by its own library, and must have the same parts and the same keys.

    Args:
        sink: of the job, if its catalog needs what no log may keep; default: as the log has it.

    Memory: a bit a row and one part; hashes of the keys go to temporary files.

    Raises:
        ConfigError: no job's output, or its log cannot be read.
    """
    store = open_store(uri)
    job = need_job(store, uri)
    census = job["census"]
    log = CommitLog(store, job["id"], census["num_rows"])
    log.load()
    key_column = job["fingerprint"].get("source.id_column", KEY)
    parts = list(log.parts.values())
    digest, bad = KeyDigest(), dict[str, str]()
    duplicate = find_duplicate(lambda: (_part_keys(store, part, key_column, bad) for part in parts), digest)
    wrong = [f"{name}: {problem}" for name, problem in bad.items()][:MAX_TOLD]
    errors = sum((Counter(part.errors) for part in parts), Counter())
    failed = errors.total()
    if log.num_missing:
        wrong.append(f"{log.num_missing:,} of {census['num_rows']:,} rows are not done; run the job again")
    elif digest != KeyDigest(census["num_rows"], int(census["keys"], 16)):
        wrong.append("the keys of the table are not those of the source")
    if duplicate is not None:
        wrong.append(f"key {duplicate!r} is there more than once")
    # Of a driver that is at work, or garbage.
    if strays := [name for name in store.sizes() if name.startswith(PART_PREFIX) and name not in log.parts]:
        wrong.append(f"{len(strays)} part file(s) are not in the log, and none may read them (first: {strays[0]})")
    if not log.num_missing and MARKER not in store.sizes():
        wrong.append(f"all rows are done, but {MARKER} is missing; run the job again, it ends at once")
    sink = sink or SinkSpec.model_validate({**job["job"]["sink"], "uri": uri})
    facts = [
        ("rows", f"{census['num_rows']:,} in, {log.done.count - failed:,} ok + {failed:,} failed"),
        *(("", f"{name}: {count:,}") for name, count in errors.most_common()),
        ("keys", f"{digest.count:,} read, {'one or more' if duplicate is not None else 'none'} twice"),
        ("parts", f"{len(parts) - len(bad):,} of {len(parts):,} as they were written (bytes, sha256, rows, keys)"),
        ("log", f"{log.length:,} entries, {log.num_replays} replays"),
    ]
    if table := open_table(sink, store):
        facts.append((sink.format, _check_table(table, log, key_column, wrong)))
    return facts, wrong


def _check_table(table: Table, log: CommitLog, key_column: str, wrong: list[str]) -> str:
    """What the table's own reader finds, in words; what is not the log's is noted."""
    digest = KeyDigest()
    try:
        version = table.load()
        names = table.names(version).keys()
        for batch in table.batches(version, key_column) if names else ():
            digest.add(batch.column(0).cast(pa.string()).to_pylist())
    except Exception as error:
        wrong.append(f"the {table.sink.format} table cannot be checked: {table.say(error)}")
        return "not readable"
    hint = "it was changed after the job" if log.store.size(MARKER) else "run the job again"
    for what, some in (("lacks", log.parts.keys() - names), ("still has", names - log.parts.keys())):
        if some:
            wrong.append(f"the {table.sink.format} table {what} {len(some)} part(s), like {min(some)}; {hint}")
    if names == log.parts.keys() and digest != log.digest():
        wrong.append(f"the {table.sink.format} table has the parts of the log, but its reader finds other keys in them")
    return f"{len(names):,} parts, {digest.count:,} keys"


def _part_keys(store: Store, part: Part, key_column: str, bad: dict[str, str]) -> list[str | None]:
    """A part's keys. What is wrong with it, compared with what the log says, is noted in `bad` under its name."""
    keys, errors, problem = [], Counter[str](), ""
    try:
        data = store.read(part.name)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            problem = f"its bytes were changed ({part.num_bytes:,} written, {len(data):,} there)"
        for some, failed in _read(store, part.name, data, key_column):
            keys += some
            errors.update(failed)
        digest = KeyDigest()
        digest.add(keys)
        if (digest.count, digest.hex(), dict(errors)) != (part.num_rows, part.keys, part.errors):
            problem = problem or "its rows are not those that the log counts"
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        problem = f"it cannot be read: {type(error).__name__}"
    if problem:
        bad[part.name] = problem
    return keys


def _read(store: Store, name: str, data: bytes, key_column: str) -> Iterator[tuple[list[str | None], list[str]]]:
    """Keys and error types of a part, some rows at a time."""
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data), columns=[key_column, "error_type"])
        yield table[key_column].cast(pa.string()).to_pylist(), table["error_type"].drop_null().to_pylist()
        return
    for columns, _ in read_chunks(store.fs, f"{store.folder}/{name}", name.rpartition(".")[2], CHUNK_ROWS):
        keys = [None if key in (None, "") else str(key) for key in columns[key_column]]  # null is empty in CSV
        yield keys, [value for value in columns["error_type"] if value]
