"""Part files: every source format into every sink format, read back with pyarrow; names, entries, rules."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest

from rayinfer.errors import ConfigError
from rayinfer.pipelines.job import JobSpec, SinkSpec, SourceSpec
from rayinfer.pipelines.keys import KeyDigest, unpack_rows
from rayinfer.pipelines.log import Part
from rayinfer.pipelines.sinks import MARKER, RESULTS, PartWriter, check_apart, check_sink, output_schema
from rayinfer.pipelines.sources import ReadUnits, list_source, take_census
from rayinfer.pipelines.store import META, Store, open_store
from rayinfer.processors.columns import OUTPUT

READERS = {
    "parquet": pq.read_table,
    "jsonl": pyarrow.json.read_json,
    "csv": lambda path: pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)),
}


def spec_of(source: Any, sink: Any, **parts: Any) -> JobSpec:
    source = source if isinstance(source, dict) else {"uri": str(source)}
    sink = sink if isinstance(sink, dict) else {"uri": str(sink)}
    return JobSpec.parse({"source": source, "prompt": "x", "model": "m", "sink": sink, **parts})


def finished(spec: JobSpec) -> tuple[pa.Table, pa.Schema]:
    """The source's rows with results, as they come out of the processor: every third row failed."""
    census = take_census(spec.source)
    table = pa.concat_tables(ReadUnits(census)(pa.Table.from_pylist([unit.__dict__ for unit in census.units])))
    rows = []
    for i in range(table.num_rows):
        good = {"generated_text": f'a "{i}",\nü', "finish_reason": "stop", "num_generated_tokens": 2, "attempts": 1}
        good |= {"num_input_tokens": 5, "num_cached_tokens": 1, "generated_tokens": [1, 2]}
        bad = {"finish_reason": "error", "error_type": "TEMPLATE_ERROR", "error_message": "why", "attempts": 0}
        rows.append(bad if i % 3 == 0 else good)
    for field in OUTPUT:
        if field.name not in ("logprobs", "prompt_logprobs"):
            table = table.append_column(field, pa.array([row.get(field.name) for row in rows], field.type))
    return table, output_schema(census, spec)


def write(spec: JobSpec, *blocks: pa.Table, schema: pa.Schema, only: Any = None) -> list[Part]:
    return PartWriter(open_store(spec.sink.uri), spec.sink.format, schema, "part-x-")(only, *blocks)[0]


def written(spec: JobSpec) -> list[Part]:
    rows, schema = finished(spec)
    return write(spec, rows, schema=schema)


def parts_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != META)


@pytest.mark.parametrize("sink", list(READERS))
@pytest.mark.parametrize("source", list(READERS))
def test_every_source_into_every_sink(tmp_path, table, source, sink):
    path = tmp_path / f"in.{source}"
    if source == "parquet":
        pq.write_table(table, path)
    elif source == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    spec = spec_of(path, {"uri": str(tmp_path / "out"), "format": sink})
    rows, schema = finished(spec)
    good, bad = write(spec, rows, schema=schema)
    outs = [READERS[sink](tmp_path / "out" / part.name) for part in (good, bad)]
    assert all(out["error_type"].null_count == (8, 0)[i] or sink == "csv" for i, out in enumerate(outs))
    out = pa.concat_tables(outs, promote_options="permissive").sort_by("id")
    assert out.column_names == ["row_key", *table.column_names, *RESULTS]
    # The input, by pyarrow's own reading of the part, is what went in; ids above 2^53 too.
    assert out.select(table.column_names).cast(table.schema).to_pylist() == table.to_pylist()
    assert out["row_key"].to_pylist() == [f"in.{source}#{i}" for i in range(12)]
    texts = [None if i % 3 == 0 else f'a "{i}",\nü' for i in range(12)]
    if sink == "csv":  # pyarrow reads an empty field of a string column as "", null or not
        texts = [text or "" for text in texts]
    assert [text or ("" if sink == "csv" else None) for text in out["generated_text"].to_pylist()] == texts
    assert out["error_type"].to_pylist().count("TEMPLATE_ERROR") == 4
    assert out["num_generated_tokens"].to_pylist() == [None if i % 3 == 0 else 2 for i in range(12)]

    assert [(part.num_rows, part.errors) for part in (good, bad)] == [(8, {}), (4, {"TEMPLATE_ERROR": 4})]
    assert (good.num_input_tokens, good.num_generated_tokens, good.num_cached_tokens) == (40, 16, 8)
    for part, numbers in ((good, [i for i in range(12) if i % 3]), (bad, [0, 3, 6, 9])):
        digest = KeyDigest()
        digest.add([f"in.{source}#{i}" for i in numbers])
        data = (tmp_path / "out" / part.name).read_bytes()
        assert part.name == f"part-x-{hashlib.sha256(data).hexdigest()[:24]}.{sink}"
        assert (part.num_bytes, part.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert part.keys == digest.hex()
        assert unpack_rows(part.rows).tolist() == numbers


def test_values_that_python_cannot_hold(tmp_path):
    """JSON has null for them, Parquet what was read; the samples that are shown do not mind them."""
    texts = pa.array([b"fine", b"\xff", b"fine"]).view(pa.string())
    table = pa.table({"text": texts, "day": pa.array([0, 0, 10**7], pa.int32()).view(pa.date32())})
    pq.write_table(table, tmp_path / "in.parquet")
    for sink in ("jsonl", "parquet"):
        spec = spec_of(tmp_path / "in.parquet", {"uri": str(tmp_path / sink), "format": sink})
        rows, schema = finished(spec)
        parts = [READERS[sink](tmp_path / sink / part.name) for part in write(spec, rows, schema=schema)]
        out = pa.concat_tables(parts, promote_options="permissive").sort_by("row_key").select(["text", "day"])
        if sink == "parquet":
            assert out.equals(table)
        else:
            assert out["text"].to_pylist() == ["fine", None, "fine"]
            assert out["day"].cast(pa.date32()).to_pylist() == [dt.date(1970, 1, 1)] * 2 + [None]


def test_the_same_rows_are_the_same_part_and_all_parts_have_one_schema(tmp_path, table):
    pq.write_table(table, tmp_path / "in.parquet")
    spec = spec_of(tmp_path / "in.parquet", tmp_path / "out")
    rows, schema = finished(spec)
    names = {part.name for start in (0, 4, 8, 0, 8) for part in write(spec, rows.slice(start, 4), schema=schema)}
    assert names == {path.name for path in parts_in(tmp_path / "out")}
    assert len(names) == 6  # three times good ones and failed ones
    assert len({str(pq.read_schema(path)) for path in parts_in(tmp_path / "out")}) == 1
    # The rows decide, not the blocks that they come in, nor how often they come.
    whole = write(spec, rows, schema=schema)
    pieces = [rows.slice(5, 7), rows.slice(0, 8), rows.slice(3, 2)]
    assert write(spec, *pieces, schema=schema) == whole
    some = write(spec, rows, rows, schema=schema, only=np.array([1, 2, 3, 7]))
    assert [unpack_rows(part.rows).tolist() for part in some] == [[1, 2, 7], [3]]


def test_a_replayed_row_has_one_more_attempt(tmp_path, table):
    pq.write_table(table, tmp_path / "in.parquet")
    spec = spec_of(tmp_path / "in.parquet", tmp_path / "out")
    rows, schema = finished(spec)
    writer = PartWriter(open_store(spec.sink.uri), "parquet", schema, "part-x-", num_replays=2)
    _, bad = writer(None, rows)[0]
    assert pq.read_table(tmp_path / "out" / bad.name)["attempts"].to_pylist() == [2, 2, 2, 2]


def test_types_that_json_and_csv_have_not(tmp_path):
    kinds = {
        "when": pa.array([dt.datetime(2024, 1, 2, 3, 4, 5)], pa.timestamp("us")),
        "money": pa.array([Decimal("1.10")], pa.decimal128(10, 2)),
        "nan": pa.array([float("nan")]),
        "tags": pa.array([["a", "b"]]),
        "map": pa.array([[("k", float("inf"))]], pa.map_(pa.string(), pa.float64())),  # its entries are tuples
    }
    pq.write_table(pa.table(kinds), tmp_path / "in.parquet")
    spec = spec_of(tmp_path / "in.parquet", {"uri": str(tmp_path / "out"), "format": "jsonl"})
    written(spec)
    (part,) = parts_in(tmp_path / "out")
    row = json.loads(part.read_text())
    assert [row[key] for key in kinds] == ["2024-01-02 03:04:05", "1.10", None, ["a", "b"], [["k", None]]]
    spec = spec_of(tmp_path / "in.parquet", {"uri": str(tmp_path / "csv"), "format": "csv"})
    with pytest.raises(ConfigError, match=r"sink.format = 'csv' cannot hold column 'tags' of type list"):
        finished(spec)
    spec = spec_of(
        tmp_path / "in.parquet", {"uri": str(tmp_path / "csv"), "format": "csv", "columns": ["money", "when"]}
    )
    written(spec)
    (part,) = parts_in(tmp_path / "csv")
    assert READERS["csv"](part).select(["money", "when"]).to_pylist() == [
        {"money": 1.1, "when": dt.datetime(2024, 1, 2, 3, 4, 5)}
    ]
    pq.write_table(pa.table({"raw": [b"\x00\xff"]}), tmp_path / "raw.parquet")
    with pytest.raises(ConfigError, match=r"sink.format = 'jsonl' cannot hold column 'raw' of type binary"):
        finished(spec_of(tmp_path / "raw.parquet", {"uri": "o", "format": "jsonl"}))
    spec = spec_of(tmp_path / "in.parquet", {"uri": "o", "format": "csv", "columns": []}, sampling={"logprobs": 1})
    with pytest.raises(ConfigError, match="cannot hold column 'logprobs'"):
        finished(spec)


def test_kept_columns_and_name_clashes(tmp_path):
    source = pa.table({"id": ["a"], "text": ["t"], "error_type": ["mine"], "row_key": ["k"], "prompt": ["p"]})
    pq.write_table(source, tmp_path / "in.parquet")
    uri = {"uri": str(tmp_path / "in.parquet")}
    with pytest.raises(ConfigError, match="'error_type' is a column of the output's own"):
        finished(spec_of(uri, "o"))
    with pytest.raises(ConfigError, match="'row_key' is a column of the output's own"):
        finished(spec_of(uri, {"uri": "o", "columns": ["row_key"]}))
    with pytest.raises(ConfigError, match=r"sink.columns: 'txt' is not read from the source; did you mean 'text'\?"):
        finished(spec_of(uri, {"uri": "o", "columns": ["txt"]}))
    spec = spec_of({**uri, "id_column": "id"}, {"uri": str(tmp_path / "out"), "columns": ["row_key", "prompt"]})
    written(spec)
    (out,) = pq.read_table(tmp_path / "out").to_pylist()
    assert {key: out[key] for key in ("id", "row_key", "prompt", "error_type")} == {
        "id": "a", "row_key": "k", "prompt": "p", "error_type": "TEMPLATE_ERROR",
    }  # fmt: skip
    assert "text" not in out


def test_a_store_that_is_not_local(tmp_path, table):
    pq.write_table(table, tmp_path / "in.parquet")
    spec = spec_of(tmp_path / "in.parquet", "memory://bucket/out")
    parts = written(spec)
    infos = fsspec.filesystem("memory").ls("/bucket/out", detail=True)
    assert {info["name"]: info["size"] for info in infos} == {f"/bucket/out/{p.name}": p.num_bytes for p in parts}


def test_a_failed_write_leaves_nothing(tmp_path, table, monkeypatch):
    pq.write_table(table, tmp_path / "in.parquet")
    spec = spec_of(tmp_path / "in.parquet", tmp_path / "out")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        written(spec)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def sink_of(path: Path | str) -> SinkSpec:
    return SinkSpec(uri=str(path))


def test_rules_of_the_output_folder(tmp_path):
    out = tmp_path / "a" / "out"
    check_sink(sink_of(out), overwrite=False)
    assert [path for path in out.rglob("*") if path.is_file()] == []  # made, and the probe is gone
    (out / "part-1.parquet").touch()
    with pytest.raises(ConfigError, match=r"holds 'part-1.parquet', but no _rayinfer/job.json.*--overwrite"):
        check_sink(sink_of(out), overwrite=False)
    (out / MARKER).touch()
    check_sink(sink_of(out), overwrite=True)
    assert [path.name for path in parts_in(out)] == [MARKER, "part-1.parquet"]  # checking removes nothing
    (out / "diary.txt").touch()
    with pytest.raises(ConfigError, match=r"holds 'diary.txt', which no job wrote"):
        check_sink(sink_of(out), overwrite=True)
    with pytest.raises(ConfigError, match="the folder cannot be written"):
        check_sink(sink_of(out / "diary.txt"), overwrite=False)
    with pytest.raises(ConfigError, match="no worker shares it"):
        check_sink(sink_of("memory://out"), overwrite=False)
    with pytest.raises(ConfigError, match=r"uri = 'nosuch://x'"):
        check_sink(sink_of("nosuch://x"), overwrite=False)
    with pytest.raises(ConfigError, match="no put-if-absent is known for simplecache"):
        check_sink(sink_of("simplecache::memory://out"), overwrite=False)


def test_a_store_that_does_not_keep_put_if_absent_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", os.replace)
    with pytest.raises(ConfigError, match="does not keep put-if-absent"):
        check_sink(sink_of(tmp_path / "out"), overwrite=False)


def test_source_and_output_never_share_a_folder(tmp_path, table):
    for name in ("in/a.parquet", "out/part-1.parquet"):
        (tmp_path / name).parent.mkdir()
        pq.write_table(table, tmp_path / name)
    for source, sink in (("in", "in/sub"), ("in", "in"), ("out/*.parquet", "out"), ("out/part-1.parquet", "out")):
        spec = SourceSpec(uri=str(tmp_path / source))
        with pytest.raises(ConfigError, match="source and output share a folder"):
            check_apart(sink_of(tmp_path / sink), spec, list_source(spec))
        check_apart(sink_of(tmp_path / f"{source}-2"), spec, list_source(spec))


def test_a_glob_that_covers_the_output_is_refused_at_the_first_run(tmp_path, table):
    (tmp_path / "g/in").mkdir(parents=True)
    pq.write_table(table, tmp_path / "g/in/a.parquet")
    (tmp_path / "g/in/a.json").write_text('{"a": 1}')
    for glob, covered in (("**/*.parquet", True), ("*/*.json", True), ("in/*", False), ("*/a.parquet", False)):
        spec = SourceSpec(uri=f"{tmp_path}/g/{glob}", format="jsonl" if "json" in glob else "parquet")
        with pytest.raises(ConfigError, match="share a folder") if covered else contextlib.nullcontext():
            check_apart(sink_of(tmp_path / "g/out"), spec, list_source(spec))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "g/in/a.parquet", "in/a.parquet")
    spec = SourceSpec(uri=f"zip://**/*.parquet::{tmp_path}/a.zip")
    check_apart(sink_of(tmp_path / "g/out"), spec, list_source(spec))


def test_what_desktops_and_consoles_leave_behind_is_no_file_of_others(tmp_path):
    for name in (".ipynb_checkpoints/x.py", ".DS_Store", ".nfs0001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(check_sink(sink_of(tmp_path), overwrite=False).sizes()) == {f"{META}/"}

    class Bucket:
        def invalidate_cache(self):
            pass

        def ls(self, path, detail):
            kinds = {"b/out/": "file", "b/out/part-1": "file", "b/out/sub": "directory", "b/out/sub/": "file"}
            return [{"name": name, "type": kind, "size": 0} for name, kind in kinds.items()]

    assert set(Store(Bucket(), "b/out").sizes()) == {"part-1", "sub/"}


def test_a_folder_without_write_permission(tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    if os.access(out, os.W_OK):  # root writes everywhere but here
        out = Path("/proc/out")
    with pytest.raises(ConfigError, match="the folder cannot be written"):
        check_sink(sink_of(out), overwrite=False)
