"""Delta and Iceberg tables: what deltalake and pyiceberg read, after crashes, overtaken drivers, and other hands."""

from __future__ import annotations

import os
import pickle
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog import load_catalog

from benchmarks import table_crashes as sim
from rayinfer.errors import ConfigError
from rayinfer.pipelines import tables as tables_module
from rayinfer.pipelines.identity import fingerprint
from rayinfer.pipelines.job import JobSpec, SourceSpec
from rayinfer.pipelines.log import CommitLog, OutputTakenError, Part
from rayinfer.pipelines.run import run_job
from rayinfer.pipelines.sources import ReadUnits, list_source, take_census
from rayinfer.pipelines.store import open_store
from rayinfer.pipelines.tables import Table, open_table
from rayinfer.pipelines.verify import verify
from tests.pipelines.test_run import reference_texts

SECRET = "canary-7431"


@pytest.fixture(autouse=True)
def _no_waiting():
    with sim.no_waiting():
        yield


@pytest.mark.parametrize(("format", "num_jobs"), [("delta", 5), ("iceberg", 2)])
@pytest.mark.parametrize("flaky", [False, True])
def test_drivers_killed_at_every_seam(format, num_jobs, flaky):
    outcomes = [sim.crash_job(format, seed, flaky) for seed in range(5000, 5000 + num_jobs)]
    assert [problem for _, problem in outcomes if problem] == []
    assert sum(crashes for crashes, _ in outcomes) >= num_jobs


@pytest.mark.parametrize("format", sim.KINDS)
@pytest.mark.parametrize("second", ["resume", "replay", "overwrite"])
def test_a_driver_that_is_overtaken_before_its_commit(format, second):
    for at in (1, 3) if format == "delta" else (2,):
        assert sim.overtake(format, at, second) == (True, "")


@pytest.mark.parametrize("broken", ["log", "order", "base"])
def test_the_simulation_notices_a_table_without_its_rules(broken, tmp_path, monkeypatch):
    if broken == "log":  # a part enters the table before the log
        commit = CommitLog.commit

        def early(self, parts):
            parts = list(parts)
            self.parts |= {part.name: part for part in parts}
            tables[0].sync(self)
            for part in parts:
                del self.parts[part.name]
            commit(self, parts)

        tables: list[Table] = []
        monkeypatch.setattr(CommitLog, "commit", early)
        monkeypatch.setattr(Table, "follow", lambda self, log: None)
        fit = Table.fit
        monkeypatch.setattr(Table, "fit", lambda self, schema: (tables.insert(0, self), fit(self, schema))[1])
        assert any(sim.crash_job("delta", seed, False)[1] for seed in range(20))
    elif broken == "order":  # rows are replayed before their failed parts have left the table

        def late(plan, log):
            plan.store.remove([sim.MARKER])
            log.replay()
            raise sim.Killed

        finished("delta", tmp_path)
        output = open_store(str(tmp_path / "out"))
        assert sim.halfway("delta", str(tmp_path), output) == ""
        monkeypatch.setattr(sim.run, "_take_failed_out", late)
        with pytest.raises(sim.Killed):
            sim.drive(sim.plan_of("delta", str(tmp_path), output), sim.random.Random(1), replay=True)
        assert "parts that the log has not" in sim.halfway("delta", str(tmp_path), output)
    else:  # a commit goes on top of whatever is there

        def anyhow(self, table, *args):
            type(self).plain(self, self.load(), *args)

        kind = type(sim.plan_of("delta", "nowhere", open_store("nowhere")).table)
        monkeypatch.setattr(kind, "plain", kind.change, raising=False)
        monkeypatch.setattr(kind, "change", anyhow)
        assert any(sim.overtake("delta", at, second)[1] for second in ("replay", "overwrite") for at in (1, 2, 3))


def sink_of(format: str, folder: Path) -> dict:
    sink = {"uri": str(folder / "out"), "format": format, "rows_per_part": 5}
    if format == "iceberg":
        sink["catalog"] = {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "properties": {"token": SECRET}}
        sink["table"] = "db.rows"
    return sink


@pytest.mark.long
def test_jobs_give_every_row_once_with_its_text(tmp_path, local_ray, job, model_path, table):
    table = table.append_column("nested", pa.array([[{"a": float(i)}] * i for i in range(12)]))
    texts = [None if i == 4 else f"row {i}" for i in range(12)]
    table = table.set_column(1, "text", pa.array(texts))
    pq.write_table(table, tmp_path / "in.parquet")
    source = {"uri": str(tmp_path / "in.parquet"), "id_column": "id"}
    want = iter(reference_texts(model_path, [f"Say: {text}" for text in texts if text]))
    want = [next(want) if text else None for text in texts]
    for format in sim.KINDS:
        (tmp_path / format).mkdir()
        spec = JobSpec.parse(job(source, sink=sink_of(format, tmp_path / format)))
        result = run_job(spec)
        assert (result.status, result.num_ok, result.num_failed) == ("complete", 11, 1), result.reason
        assert verify(str(tmp_path / format / "out"), spec.sink)[1] == []
        rows = sorted(sim.read_table(format, str(tmp_path / format))[1], key=lambda row: row["id"])
        assert [row["generated_text"] for row in rows] == want
        assert [{name: row[name] for name in table.column_names} for row in rows] == table.to_pylist()
    folder = tmp_path / "iceberg" / "out"
    assert [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []


def finished(format: str, folder: Path) -> None:
    output = open_store(str(folder / "out"))
    assert sim.drive(sim.plan_of(format, str(folder), output), sim.random.Random(1)).complete


@pytest.mark.parametrize("format", sim.KINDS)
def test_other_hands_in_the_table_are_told(tmp_path, format):
    finished(format, tmp_path)
    output = open_store(str(tmp_path / "out"))
    plan = sim.plan_of(format, str(tmp_path), output)
    facts, wrong = verify(str(tmp_path / "out"))
    assert wrong == []
    assert any(name == format and "24 keys" in value for name, value in facts)
    plan.table.change(plan.table.load(), [], list(plan.table.names(plan.table.load()).values())[:1], {})
    assert any("table lacks 1 part(s)" in line for line in verify(str(tmp_path / "out"))[1])
    plan.table.sync(sim.run._take_over(plan, overwrite=False))
    if format == "delta":
        DeltaTable(plan.spec.sink.uri).delete("row_key = 'f#3'")  # rewrites the file of that row
    else:
        catalog = load_catalog("default", **plan.spec.sink.catalog.settings())
        catalog.load_table("db.rows").delete("row_key == 'f#3'")
    assert any("which no job wrote" in line for line in verify(str(tmp_path / "out"))[1])
    with pytest.raises(ConfigError, match="which no job wrote; name another"):
        sim.plan_of(format, str(tmp_path), output)


def test_tables_that_are_not_the_jobs_are_refused(tmp_path):
    store = open_store(str(tmp_path / "out"))
    write_deltalake(tmp_path / "out", pa.table({"x": [1]}))
    with pytest.raises(ConfigError, match=r"holds a Delta table that no job made; name another folder"):
        sim.plan_of("delta", str(tmp_path), store)
    catalog = load_catalog("default", type="sql", uri=f"sqlite:///{tmp_path}/catalog.db")
    catalog.create_namespace("db")
    catalog.create_table("db.rows", pa.schema([("x", pa.int64())]), location=f"file://{tmp_path}/elsewhere")
    with pytest.raises(ConfigError, match=r"sink.table = 'db.rows': its files are in .*elsewhere"):
        sim.plan_of("iceberg", str(tmp_path), store)
    catalog.drop_table("db.rows")
    catalog.create_table("db.rows", pa.schema([("x", pa.int64())]), location=f"file://{tmp_path}/out")
    with pytest.raises(ConfigError, match=r"sink.table = 'db.rows': has other columns"):
        sim.plan_of("iceberg", str(tmp_path), store)


def test_overwriting_a_delta_table_with_other_columns(tmp_path):
    finished("delta", tmp_path)
    output = open_store(str(tmp_path / "out"))
    plan = sim.plan_of("delta", str(tmp_path), output, prompt="y")
    plan.table.schema = plan.schema.append(pa.field("more", pa.int64()))
    plan.table.schema = plan.table.held(plan.table.schema)
    log = sim.run._take_over(plan, overwrite=True)
    assert sim.read_table("delta", str(tmp_path)) == ([], [])
    assert DeltaTable(str(tmp_path / "out")).schema().to_arrow().names[-1] == "more"
    with pytest.raises(OutputTakenError):
        sim.plan_of("delta", str(tmp_path), output).table.sync(CommitLog(output, "0" * 8, sim.NUM_ROWS))
    assert log.length == 1


HELD = [
    pa.int8(),
    pa.int32(),
    pa.float32(),
    pa.large_string(),
    pa.date32(),
    pa.timestamp("ms"),
    pa.binary(),
    pa.bool_(),
]
HELD += [pa.list_(pa.list_(pa.struct([("a", pa.float32())]))), pa.map_(pa.string(), pa.int64()), pa.decimal128(9, 2)]
LOSSY = [pa.uint64(), pa.duration("s"), pa.time32("s"), pa.timestamp("ns")]


@pytest.mark.parametrize("format", sim.KINDS)
def test_types_are_held_or_refused(tmp_path, format):
    sink = JobSpec.parse({"source": {"uri": "f"}, "prompt": "p", "model": "m", "sink": sink_of(format, tmp_path)}).sink
    table = open_table(sink, open_store(sink.uri))
    (tmp_path / "out").mkdir()
    values = [1, 2, 0.5, "text", date(2026, 1, 2), datetime(2026, 1, 2), b"x", True]
    values += [[[{"a": 0.5}]], [("k", 1)], Decimal("1.25")]
    columns = {f"c{i}": pa.array([value, None], kind) for i, (value, kind) in enumerate(zip(values, HELD, strict=True))}
    rows = pa.table(columns).cast(table.fit(pa.table(columns).schema))
    name = "part-00000000-000000-x.parquet"
    pq.write_table(rows, tmp_path / "out" / name)
    size = os.path.getsize(tmp_path / "out" / name)
    table.create()
    table.change(table.load(), [Part(name, 2, size, "", "", "", {}, 0, 0, 0)], [], {})
    assert sim.read_table(format, str(tmp_path)) == ([name], pa.table(columns).to_pylist())
    for kind in LOSSY:
        with pytest.raises(ConfigError, match=rf"sink.format = '{format}' cannot hold column 'bad' of type"):
            table.fit(pa.schema([("good", pa.int64()), ("bad", kind)]))
    if format == "delta":
        with pytest.raises(ConfigError, match=r"cannot hold column 'a b' of type int64 \(Delta's readers refuse ' '"):
            table.fit(pa.schema([("a b", pa.int64())]))


def test_the_catalogs_secrets_stay_with_the_driver(tmp_path, monkeypatch):
    base = {"source": {"uri": str(tmp_path / "in.jsonl")}, "prompt": "p", "model": str(tmp_path)}
    (tmp_path / "in.jsonl").write_text('{"a": 1}\n')
    sink = sink_of("iceberg", tmp_path)
    spec = JobSpec.parse({**base, "sink": sink})
    told = [repr(spec), str(spec.model_dump(mode="json")), str(fingerprint(spec, list_source(spec.source)))]
    table = open_table(spec.sink, open_store(spec.sink.uri))
    monkeypatch.setattr(table, "load", lambda: (_ for _ in ()).throw(OSError(f"401: token={SECRET}")))
    with pytest.raises(ConfigError, match="out of reach") as refused:
        table.fit(pa.schema([("x", pa.int64())]))
    uri = f"nosuch://user:{SECRET}@host/db"
    with pytest.raises(ConfigError, match=r"sink\.catalog: cannot be opened") as unopened:
        open_table(JobSpec.parse({**base, "sink": {**sink, "catalog": {"type": "sql", "uri": uri}}}).sink, table.store)
    told += [str(refused.value), str(unopened.value)]
    assert [text for text in told if SECRET in text] == []


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        ({"format": "iceberg"}, "table is given if format is iceberg, and only then"),
        ({"format": "delta", "table": "a.b"}, "table is given if format is iceberg, and only then"),
        ({"format": "iceberg", "table": "ab", "catalog": {}}, r"sink.table = 'ab'"),
        ({"format": "iceberg", "table": "a.b", "catalog": {"tokn": "x"}}, r"unknown key 'sink.catalog.tokn'"),
        ({"format": "lance"}, "'parquet', 'jsonl', 'csv', 'delta' or 'iceberg'"),
    ],
)
def test_wrong_sinks_are_named(sink, message):
    with pytest.raises(ConfigError, match=message):
        JobSpec.parse({"source": {"uri": "f"}, "prompt": "p", "model": "m", "sink": {"uri": "o", **sink}})


def test_a_table_that_cannot_be_reached_stops_nothing_until_the_end(tmp_path, monkeypatch):
    output = open_store(str(tmp_path / "out"))
    plan = sim.plan_of("delta", str(tmp_path), output)
    plan.table.sync(log := sim.run._take_over(plan, overwrite=False))
    monkeypatch.setattr(plan.table, "load", lambda: (_ for _ in ()).throw(OSError("gone")))
    plan.table.follow(log)
    with pytest.raises(OSError, match="the delta table was not brought to the log: OSError: gone"):
        plan.table.sync(log)
    assert tables_module.FOLLOW_SECONDS == 0
    assert os.path.isdir(tmp_path / "out" / "_delta_log")


def test_a_delta_table_is_read_at_its_version(tmp_path):
    uri = str(tmp_path / "in")
    for first in (0, 3):
        write_deltalake(uri, pa.table({"id": range(first, first + 3), "text": ["x"] * 3}), mode="append")
    DeltaTable(uri).delete("id = 1")  # a file that is still in the folder, and no longer in the table
    with pytest.raises(ConfigError, match=r"a Delta table; set source.format to delta, or parquet"):
        list_source(SourceSpec(uri=uri))

    def rows(**fields) -> list[int]:
        census = take_census(SourceSpec(uri=uri, format="delta", id_column="id", **fields))
        return sorted(i for unit in census.units for table in ReadUnits(census).read(unit) for i in ids(table))

    def ids(table: pa.Table) -> list[int]:
        return [row["id"] for row in table["source"].to_pylist()]

    for version in (0, 1, 2):
        assert rows(version=version) == sorted(DeltaTable(uri, version=version).to_pyarrow_table()["id"].to_pylist())
    assert rows() == [0, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match=r"source.version = 1: only tables have one"):
        list_source(SourceSpec(uri=uri, format="parquet", version=1))
    with pytest.raises(ConfigError, match=r"the delta table cannot be read"):
        list_source(SourceSpec(uri=uri, format="delta", version=9))
    write_deltalake(str(tmp_path / "parts"), pa.table({"id": [1], "day": ["a"]}), partition_by=["day"])
    with pytest.raises(ConfigError, match=r"the delta table has partitions, which are not read yet"):
        list_source(SourceSpec(uri=str(tmp_path / "parts"), format="delta"))


def test_an_iceberg_table_is_read_at_its_snapshot(tmp_path):
    uri, place = str(tmp_path / "in"), {"type": "sql", "uri": f"sqlite:///{tmp_path}/catalog.db"}
    catalog = load_catalog("default", **place)
    catalog.create_namespace("db")
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    theirs = catalog.create_table("db.rows", schema=schema, location=f"file://{uri}")
    for first in (0, 3):
        theirs.append(pa.table({"id": range(first, first + 3), "text": ["x"] * 3}, schema=schema))
    theirs.delete("id = 1")  # its file is still in the folder, and no longer in the table

    def spec(**fields) -> SourceSpec:
        place["properties"] = {"token": SECRET}
        fields = {"uri": uri, "table": "db.rows", **fields}
        return SourceSpec(format="iceberg", id_column="id", catalog=place, **fields)

    def ids(spec: SourceSpec) -> list[int]:
        census = take_census(spec)
        read = ReadUnits(census)
        assert SECRET.encode() not in pickle.dumps(read)
        tables = [table for unit in census.units for table in read.read(unit)]
        return sorted(row["id"] for table in tables for row in table["source"].to_pylist())

    snapshots = [snapshot.snapshot_id for snapshot in theirs.snapshots()]
    assert len(snapshots) >= 3
    for snapshot in snapshots:
        want = theirs.scan(snapshot_id=snapshot).to_arrow()["id"].to_pylist()
        assert ids(spec(version=snapshot)) == sorted(want)
    assert ids(spec()) == [0, 2, 3, 4, 5]
    job = {"prompt": "{{ text }}", "model": str(tmp_path), "sink": {"uri": str(tmp_path / "out")}}
    job = JobSpec.parse({**job, "source": spec().model_dump()})
    assert SECRET not in str(fingerprint(job, list_source(job.source)))
    with pytest.raises(ConfigError, match="the iceberg table has no rows at its version 7"):
        list_source(spec(version=7))
    with pytest.raises(ConfigError, match="the iceberg table cannot be read: NoSuchTableError"):
        list_source(spec(table="db.other"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.parquet").touch()
    with pytest.raises(ConfigError, match=r"file '.*' is not there; name its folder"):
        list_source(spec(uri=str(tmp_path / "other")))
    with theirs.update_schema() as update:
        update.rename_column("text", "words")
    with pytest.raises(ConfigError, match="the iceberg table has columns that were renamed, added or dropped, which"):
        list_source(spec())
