"""Files that listings and readers of others took for less than they are, or told nothing of."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayinfer.errors import ConfigError
from tests.pipelines.test_sources import census_of, check_same, read_all, rows, write_csv, write_jsonl  # noqa: F401


def test_links_partitions_that_begin_with_a_line_and_other_suffixes(tmp_path, rows):  # noqa: F811
    """Hugging Face's cache has links alone, which a glob took for no files; `_part=1` is a folder of a hive table."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:10]), tmp_path / "blobs/abc")
    (tmp_path / "data/0.parquet").symlink_to("../blobs/abc")
    (tmp_path / "data/folder.parquet").mkdir()
    check_same(census_of(tmp_path / "data/*.parquet"), rows[:10])
    for part in ("_part=1", "_tmp"):
        (tmp_path / f"hive/{part}").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows[:5]), tmp_path / f"hive/{part}/a.parquet")
    check_same(census_of(tmp_path / "hive"), [{**row, "_part": 1} for row in rows[:5]])
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.GZ").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    check_same(census_of(tmp_path / "*.GZ"), rows)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_zstandard_whole_and_cut(tmp_path, rows, suffix):  # noqa: F811
    """The reader of fsspec took a file that was cut for a whole one: a job lost the rest of it and said complete."""
    plain = (write_jsonl if suffix == "jsonl" else write_csv)(tmp_path / f"a.{suffix}", rows).read_bytes()
    frames = b"".join(pa.compress(part, "zstd", asbytes=True) for part in (plain[:999], plain[999:]))
    path = tmp_path / f"z.{suffix}.zst"
    path.write_bytes(frames)
    check_same(census_of(path), rows)
    path.write_bytes(frames[: len(frames) // 2])
    with pytest.raises(ConfigError, match=r"z.*zst' cannot be read as .*: .*(T|t)runcated"):
        census_of(path)


@pytest.mark.parametrize("id_column", [None, "id"])
def test_a_file_with_a_damaged_page_is_named(tmp_path, rows, id_column):  # noqa: F811
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", use_dictionary=False)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[40:90] = b"\xff" * 50  # its first page; the footer is whole
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(OSError, match=r"a\.parquet: rows from 0 on cannot be read: "):
        read_all(census_of(tmp_path, id_column=id_column))
