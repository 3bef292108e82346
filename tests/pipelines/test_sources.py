"""The census and the read units against pyarrow and the standard library reading the same files."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayinfer.errors import ConfigError
from rayinfer.pipelines import sources
from rayinfer.pipelines.job import SourceSpec
from rayinfer.pipelines.keys import KeyDigest, RowSet, pack_rows, unpack_rows
from rayinfer.pipelines.sources import KEY, NUMBER, SOURCE, SOURCE_ERROR, Census, ReadUnits, Unit, take_census


def census_of(uri: Any, **kwargs: Any) -> Census:
    return take_census(SourceSpec(uri=str(uri), **kwargs))


def read_all(census: Census, units: list[Unit] | None = None) -> pa.Table:
    """The rows of units, by default all, as the read tasks give them to Ray."""
    units = census.units if units is None else units
    return pa.concat_tables(ReadUnits(census)(pa.Table.from_pylist([unit.__dict__ for unit in units])))


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    return table[SOURCE].to_pylist()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"id": i, "text": f'say "{i}",\r\nor ünï {i}', "half": i / 2} for i in range(3000)]


def check_same(census: Census, expected: list[dict[str, Any]]) -> None:
    table = read_all(census)
    assert rows_of(table) == expected
    assert census.num_rows == len(expected)
    assert table[SOURCE_ERROR].null_count == len(expected)
    assert len(set(table[KEY].to_pylist())) == len(expected)
    assert table[NUMBER].to_pylist() == list(range(len(expected)))
    digest = KeyDigest()
    digest.add(table[KEY].to_pylist())
    assert digest == census.key_digest()


@pytest.mark.parametrize("id_column", [None, "id"])
@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_every_row_once_with_its_key(tmp_path, rows, format, id_column):
    path = tmp_path / f"in.{format}"
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    else:
        {"jsonl": write_jsonl, "csv": write_csv}[format](path, rows)
    check_same(census_of(path, id_column=id_column), rows)
    check_same(census_of(path, id_column=id_column, limit=1500), rows[:1500])


def test_small_row_groups_share_a_read_task(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_ROWS", 100)
    monkeypatch.setattr(sources, "CHUNK_ROWS", 7)
    pq.write_table(pa.Table.from_pylist(rows[:450]), tmp_path / "a.parquet", row_group_size=30)
    pq.write_table(pa.Table.from_pylist(rows[450:700]), tmp_path / "b.parquet", row_group_size=200)
    census = census_of(tmp_path, limit=670)
    assert [unit.num_rows for unit in census.units] == [90] * 5 + [200, 20]
    check_same(census, rows[:670])


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_only_the_rows_that_are_not_done_are_read(tmp_path, rows, format, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_ROWS", 500)
    for name, some in (("a", rows[:1700]), ("b", rows[1700:])):
        path = tmp_path / f"{name}.{format}"
        if format == "parquet":
            pq.write_table(pa.Table.from_pylist(some), path, row_group_size=300)
        else:
            {"jsonl": write_jsonl, "csv": write_csv}[format](path, some)
    counted = census_of(tmp_path, limit=2900)
    census = Census.unpack(counted.spec, json.loads(json.dumps(counted.pack())))
    assert (census.units, census.schema, census.key_digest()) == (counted.units, counted.schema, counted.key_digest())
    done = RowSet(2900)
    finished = [*range(600), 650, 652, *range(1699, 1702), *range(2000, 2890)]
    done.add(np.array(finished))
    left = census.units_left(done)
    numbers = sorted(set(range(2900)) - set(finished))
    table = read_all(census, left)
    assert table[NUMBER].to_pylist() == numbers
    whole = read_all(census)
    assert table.to_pylist() == whole.take(pa.array(numbers)).to_pylist()
    if format == "parquet":  # row groups that are done are not read
        assert {unit.first_number for unit in left} == {u.first_number for u in census.units} - {0, 300, 2000, 2300}


def test_folders_globs_hive_and_compression(tmp_path, rows):
    for year in (2024, 2025):
        (tmp_path / "hive" / f"year={year}").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[:10]), tmp_path / "hive/year=2024/a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[10:20]), tmp_path / "hive/year=2025/a.parquet")
    (tmp_path / "hive/_SUCCESS").touch()
    (tmp_path / "hive/readme.md").touch()
    census = census_of(tmp_path / "hive")
    assert census.num_skipped_files == 1
    check_same(
        census, pq.read_table(tmp_path / "hive", partitioning="hive", ignore_prefixes=["_", "readme"]).to_pylist()
    )
    assert read_all(census)[KEY][10].as_py() == "year=2025/a.parquet#0"

    path = write_jsonl(tmp_path / "z.jsonl", rows)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    check_same(census_of(tmp_path / "z.jsonl.gz"), rows)
    write_jsonl(tmp_path / "y.jsonl", rows[:5])
    check_same(census_of(tmp_path / "[yz].jsonl"), rows[:5] + rows)


def test_a_file_system_that_is_not_local(rows):
    fs = fsspec.filesystem("memory")
    with fs.open("/bucket/in/a.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows[:7]), file)
    check_same(census_of("memory://bucket/in"), rows[:7])


def test_columns_are_chosen_and_the_id_is_always_read(tmp_path, rows):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows[:3]), path)
    census = census_of(path, columns=["text"], id_column="id")
    assert rows_of(read_all(census)) == [{"text": row["text"], "id": row["id"]} for row in rows[:3]]


def test_parquet_files_with_other_columns_and_wider_types(tmp_path):
    pq.write_table(pa.table({"a": pa.array([1], pa.int32()), "n": pa.nulls(1)}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": pa.array([2**40]), "b": ["x"], "n": ["y"]}), tmp_path / "2.parquet")
    census = census_of(tmp_path)
    assert census.schema == pa.schema([("a", pa.int64()), ("n", pa.string()), ("b", pa.string())])
    check_same(census, [{"a": 1, "n": None, "b": None}, {"a": 2**40, "n": "y", "b": "x"}])
    pq.write_table(pa.table({"a": ["text"]}), tmp_path / "3.parquet")
    with pytest.raises(ConfigError, match=r"column 'a' is string in .*3.parquet' but int64"):
        census_of(tmp_path)


def test_csv_types_hold_what_the_text_said(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "\ufeffi,f,zip,big,empty,date,price,zero,small\n"
        "1,1,007,123456789012345678901,,2024-01-01,1.10,-0,-0.5e-05\n\n,2.5,1,1,,x,2,1,1.0\n", "utf-8",
    )  # fmt: skip
    census = census_of(path)
    kinds = ["int64", "double", "string", "string", "string", "string", "string", "string", "double"]
    assert [str(kind) for kind in census.schema.types] == kinds
    check_same(
        census,
        [
            {
                "i": 1,
                "f": 1.0,
                "zip": "007",
                "big": "123456789012345678901",
                "empty": "",
                "date": "2024-01-01",
                "price": "1.10",
                "zero": "-0",
                "small": -0.5e-05,
            },
            {
                "i": None,
                "f": 2.5,
                "zip": "1",
                "big": "1",
                "empty": "",
                "date": "x",
                "price": "2",
                "zero": "1",
                "small": 1.0,
            },
        ],
    )


def test_a_long_csv_field_is_read(tmp_path):
    text = "x" * 300_000
    check_same(census_of(write_csv(tmp_path / "a.csv", [{"text": text}])), [{"text": text}])


def test_jsonl_types_are_those_of_all_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 2)
    rows = [{"a": 1, "m": 1}, {"a": 2, "s": {"x": 1}}, {"a": 0.5, "m": "one", "s": {"x": 2, "y": [1]}}, {"m": [1, "a"]}]
    census = census_of(write_jsonl(tmp_path / "a.jsonl", rows))
    assert census.schema.field("a").type == pa.float64()
    check_same(
        census,
        [
            {"a": 1.0, "m": "1", "s": None},
            {"a": 2.0, "m": None, "s": {"x": 1, "y": None}},
            {"a": 0.5, "m": "one", "s": {"x": 2, "y": [1]}},
            {"a": None, "m": '[1, "a"]', "s": None},
        ],
    )


def test_a_bad_record_costs_one_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"t": "a"}\n{"t": \n[1]\n\n{"t": "\xff"}\n{"t": "b"}')
    table = read_all(census_of(path))
    assert [row["t"] for row in rows_of(table)] == ["a", None, None, None, "b"]
    assert table[KEY].to_pylist() == [f"a.jsonl#{i}" for i in range(5)]
    errors = table[SOURCE_ERROR].to_pylist()
    assert errors[0] is errors[4] is None
    assert errors[1].startswith("record 1 (from 0) is not valid JSON")
    assert errors[2:4] == [
        "record 2 (from 0) is a list, not an object",
        "record 3 (from 0) is not valid JSON: bad text",
    ]
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n3\n4,5\n")
    table = read_all(census_of(path))
    assert rows_of(table) == [{"a": 1, "b": 2}, {"a": None, "b": None}, {"a": 4, "b": 5}]
    assert table[SOURCE_ERROR].to_pylist() == [None, "record 1 (from 0) has 1 fields where the header has 2", None]


def test_a_record_that_cannot_be_read_needs_no_id(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"id": f"i{i}", "t": "x"}) for i in range(3)]
    path.write_text("\n".join([good[0], '{"id": "i1', good[1], "7", good[2]]))
    census = census_of(path, id_column="id")
    table = read_all(census)
    assert table[KEY].to_pylist() == ["i0", None, "i1", None, "i2"]
    assert [row["id"] for row in rows_of(table)] == ["i0", None, "i1", None, "i2"]
    errors = table[SOURCE_ERROR].to_pylist()
    assert [error is None for error in errors] == [True, False, True, False, True]
    assert errors[1].startswith("a.jsonl#1: record 1 (from 0) is not valid JSON")
    assert errors[3] == "a.jsonl#3: record 3 (from 0) is a int, not an object"
    digest = KeyDigest()
    digest.add(table[KEY].to_pylist())
    assert (digest, digest.count) == (census.key_digest(), 5)
    broken = [f'{{"id": {i}, ' for i in range(2500)]  # more than there may be collisions: all of them are one key
    for lines, message in (
        ([*broken, *good, good[1], *broken], "id 'i1' is there more than once"),
        ([*broken[:2], good[0], '{"id": null, "t": "x"}', *broken], "row 3 .from 0. of 'a.jsonl' has no id: null id"),
        ([*broken[:2], good[0], '{"t": "x"}'], "row 3 .from 0. of 'a.jsonl' has no id: null id"),
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(ConfigError, match=message):
            census_of(path, id_column="id")
    (tmp_path / "a.csv").write_text("id,t\n1,x\n2\n3,x\n")
    table = read_all(census_of(tmp_path / "a.csv", id_column="id"))
    assert table[KEY].to_pylist() == ["1", None, "3"]
    big = 2**53 + 1
    for name, ids in (("1.parquet", pa.array([-1])), ("2.parquet", pa.array([2**64 - 1, 5], pa.uint64()))):
        (tmp_path / "wide").mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": ids, "n": [big] * len(ids)}), tmp_path / "wide" / name)
    table = read_all(census_of(tmp_path / "wide", id_column="id"))
    assert table[KEY].to_pylist() == ["-1", None, "5"]
    assert table[SOURCE_ERROR][1].as_py() == "2.parquet#0: column 'id': its value does not fit the column's type, int64"


def test_a_half_of_a_surrogate_pair_costs_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        rb'{"t": "\ud83d\ude00"}',
        rb'{"t": "cut \ud83d"}',
        rb'{"\udc00": 1}',
        b'{"t": "\xed\xa0\x80"}',
        b'{"t": "b"}',
    ]
    path.write_bytes(b"\n".join(lines))
    table = read_all(census_of(path))
    assert [row["t"] for row in rows_of(table)] == ["\U0001f600", None, None, None, "b"]
    bad = [f"record {i} (from 0) is not valid JSON: bad text" for i in (1, 2, 3)]
    assert table[SOURCE_ERROR].to_pylist() == [None, *bad, None]


def test_text_in_one_file_makes_text_in_all(tmp_path):
    for name, text in (("1.csv", "zip,n\n01234,1\n"), ("2.csv", "zip,n\n90210,2\n")):
        (tmp_path / "csv").mkdir(exist_ok=True)
        (tmp_path / "csv" / name).write_text(text)
    check_same(census_of(tmp_path / "csv"), [{"zip": "01234", "n": 1}, {"zip": "90210", "n": 2}])
    (tmp_path / "json").mkdir()
    write_jsonl(tmp_path / "json/1.jsonl", [{"a": 1, "b": {"c": 1}}])
    write_jsonl(tmp_path / "json/2.jsonl", [{"a": "x", "b": {"c": "\xfc"}}])
    expected = [{"a": "1", "b": '{"c": 1}'}, {"a": "x", "b": '{"c": "\xfc"}'}]
    check_same(census_of(tmp_path / "json"), expected)


def test_hive_columns_and_dictionaries_of_several_types(tmp_path):
    for folder, kind in (
        ("month=01/year=2024", pa.string()),
        ("month=10/year=__HIVE_DEFAULT_PARTITION__", pa.dictionary(pa.int32(), pa.string())),
    ):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"t": pa.array(["a"], kind)}), tmp_path / folder / "a.parquet")
    check_same(
        census_of(tmp_path),
        [{"t": "a", "month": "01", "year": 2024}, {"t": "a", "month": "10", "year": None}],
    )
    only = census_of(tmp_path / "month=10")
    assert only.schema.field("t").type == pa.dictionary(pa.int32(), pa.string())


def test_objects_that_are_always_empty_become_text(tmp_path):
    census = census_of(write_jsonl(tmp_path / "a.jsonl", [{"meta": {}, "n": {"a": {}}, "l": [{}]}, {"meta": None}]))
    check_same(census, [{"meta": "{}", "n": '{"a": {}}', "l": "[{}]"}, {"meta": None, "n": None, "l": None}])
    pq.write_table(read_all(census), tmp_path / "out.parquet")


def test_a_value_that_the_type_of_its_column_cannot_hold_costs_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 2)
    big = 2**53 + 1
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"a": [0.5], "t": pa.array([0], pa.timestamp("ns"))}), tmp_path / "parquet/1.parquet")
    when = pa.array([1, 16725225600 * 10**6], pa.timestamp("us"))  # the year 2500
    pq.write_table(pa.table({"a": [big, 2], "t": when}), tmp_path / "parquet/2.parquet")
    table = read_all(census_of(tmp_path / "parquet"))
    assert [row["a"] for row in rows_of(table)] == [0.5, None, 2.0]
    assert table[SOURCE].combine_chunks().field("t").cast(pa.int64()).to_pylist() == [0, 1000, None]
    _, *errors = table[SOURCE_ERROR].to_pylist()
    assert errors == [
        "column 'a': its value does not fit the column's type, double",
        "column 't': its value does not fit the column's type, timestamp[ns]",
    ]
    for name, wrap in (("flat", lambda value: value), ("nested", lambda value: {"a": value})):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"t": wrap(value)} for value in (1.5, 2.5, 3, big)])
        table = read_all(census_of(path))
        assert rows_of(table) == [{"t": wrap(1.5)}, {"t": wrap(2.5)}, {"t": wrap(3.0)}, {"t": None}]
        assert table[SOURCE_ERROR].null_count == 3
    (tmp_path / "a.csv").write_text("n\n1.5\n2\n3\n100000000000000001\n")
    table = read_all(census_of(tmp_path / "a.csv"))
    assert rows_of(table) == [{"n": 1.5}, {"n": 2.0}, {"n": 3.0}, {"n": None}]


def test_columns_of_one_name_are_refused_unless_they_are_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([[1], [2], ["x"]], names=["a", "a", "t"]), path)
    with pytest.raises(ConfigError, match=r"a.parquet' has several columns 'a'"):
        census_of(path)
    check_same(census_of(path, columns=["t"]), [{"t": "x"}])


def test_a_file_that_changes_under_the_job_is_noticed(tmp_path, rows):
    path = write_jsonl(tmp_path / "a.jsonl", rows[:5])
    census = census_of(path)
    write_jsonl(path, rows[:4])
    with pytest.raises(OSError, match="ends at row 4, the census counted 5"):
        read_all(census)


def refused(tmp_path: Path, name: str, content: str | bytes, message: str, **kwargs: Any) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        census_of(path, **kwargs)


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"source.uri = .*nothing'.*: no file there"):
        census_of(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no file there"):
        census_of(tmp_path / "*.csv")
    with pytest.raises(ConfigError, match=r"source.uri = 'nosuch://x'"):
        census_of("nosuch://x")
    refused(tmp_path, "e.csv", "", "no rows in 1 csv file")
    refused(tmp_path, "e.csv", "a,b\n", "no rows in 1 csv file")
    refused(tmp_path, "e.jsonl", "\n", "no rows in 1 jsonl file")
    refused(tmp_path, "h.csv", "a,a\n1,2\n", "an empty or a repeated name")
    refused(tmp_path, "q.csv", 'a\n"open\n', "q.csv' cannot be read as csv: line 2: unexpected end of data")
    refused(tmp_path, "u.csv", b"a\n\xff\n", "can't decode byte 0xff")
    refused(tmp_path, "t.parquet", b"PAR1 no", "t.parquet' cannot be read as parquet")
    refused(tmp_path, "z.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:-9], "z.jsonl.gz' cannot be read as jsonl")
    refused(tmp_path, "z.csv.xz", b"\xfd7zXZ\0no", "z.csv.xz' cannot be read as csv")
    for text in ("{}\n{}\n", '[{"a": 1}]', '[\n{"a": 1},\n{"a": 2},\n]\n'):
        refused(tmp_path, "o.json", text, "no row has a column; JSON has to be JSON lines")
    for name in ("z.jsonl.gz", "z.csv.xz", "o.json"):
        (tmp_path / name).unlink()
    refused(tmp_path, "a.txt", "a", "none of 1 file")
    refused(
        tmp_path,
        "c.csv",
        "text\n1\n",
        "source.columns: 'txt' is no column of .*; did you mean 'text'?",
        columns=["txt"],
    )
    refused(tmp_path, "c.csv", "text\n1\n", "source.id_column: 'id' is no column", id_column="id")
    with pytest.raises(ConfigError, match="files of several formats"):
        census_of(tmp_path)
    assert census_of(tmp_path / "a.txt", format="csv", limit=1) if (tmp_path / "a.txt").write_text("a\n1\n") else None


def test_a_store_that_raises_what_it_likes(monkeypatch):
    class NoCredentialsError(Exception):
        pass

    def open_store(uri):
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", open_store)
    with pytest.raises(ConfigError, match=r"source.uri = 's3://b/in': Unable to locate credentials"):
        census_of("s3://b/in")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "id 'a' is there more than once"),
        ([1, 2, None], r"row 2 \(from 0\) of 'a.jsonl' has no id: null id"),
        ([1.5, 2.5, 3.5], "ids are integers or strings, this column is double"),
    ],
)
def test_ids_that_are_none(tmp_path, ids, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": id, "t": "x"} for id in ids])
    with pytest.raises(ConfigError, match=message):
        census_of(path, id_column="id")
    assert census_of(path, id_column="id", limit=2).num_rows == 2 if ids[0] != 1.5 else True


def test_a_duplicate_far_away_and_a_hash_collision(monkeypatch):
    from rayinfer.pipelines import keys

    batches = [[str(i) for i in range(n, n + 1000)] for n in range(0, 50_000, 1000)]
    digest = KeyDigest()
    assert keys.find_duplicate(lambda: iter(batches), digest) is None
    assert digest.count == 50_000
    assert keys.find_duplicate(lambda: iter([*batches, ["17"]]), KeyDigest()) == "17"

    class Colliding(KeyDigest):
        def add(self, keys):
            return super().add(keys) % 7

    few = [["a", "b", "c"], ["d", "e", "f", "g", "h", "i"]]
    monkeypatch.setattr(keys, "KeyDigest", Colliding)
    assert keys.find_duplicate(lambda: iter(few), Colliding()) is None
    assert keys.find_duplicate(lambda: iter([*few, ["e"]]), Colliding()) == "e"
    assert keys.find_duplicate(lambda: iter([["x"] * 5000]), Colliding()) == "x"


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 1000])
def test_row_numbers_against_python_sets(num_rows):
    rng = random.Random(num_rows)
    for _ in range(50):
        chosen = sorted(rng.sample(range(num_rows), rng.randint(0, num_rows)))
        rows = np.array(chosen, np.int64)
        assert unpack_rows(pack_rows(rows)).tolist() == chosen
        done = RowSet(num_rows)
        done.add(rows)
        start, stop = sorted((rng.randint(0, num_rows), rng.randint(0, num_rows)))
        assert done.missing(start, stop).tolist() == sorted(set(range(start, stop)) - set(chosen))
        done.discard(rows[::2])
        assert np.flatnonzero(done.has(np.arange(num_rows))).tolist() == chosen[1::2]
        assert done.count == len(chosen[1::2])


def test_digest_tells_lost_and_doubled_apart():
    def digest(*parts: list[str]) -> KeyDigest:
        whole = KeyDigest()
        for part in parts:
            other = KeyDigest()
            other.add(part)
            whole.merge(KeyDigest(other.count, int(other.hex(), 16)))
        return whole

    assert digest(["a", "b"], ["c"]) == digest(["c", "a"], [], ["b"])
    assert digest(["a", "b", "c"]) != digest(["a", "b", "b"])
    assert digest(["a", "b"]) != digest(["a", "b", "b"])
