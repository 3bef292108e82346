"""Figure: crashes around the commits of Delta and Iceberg tables, as their own libraries then read them.

    python -m benchmarks.table_crashes --crashes 2000

As benchmarks/commit_crashes.py, with the code of `rayinfer run` writing a table: a driver is killed before or after any
operation on the store, on the table (look, create, commit), and inside pyiceberg's commit, before or after the
catalog's; or operations fail at random, before or after they were done. Each table commit follows each commit of the
log, failed rows are replayed once, and a second driver goes through a whole run between another's look at the table
and its commit. After every crash deltalake or pyiceberg read the table: no key twice, no part that the log has not;
at the end all rows, once, with their texts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from benchmarks.commit_crashes import ERROR_RATE, MAX_CRASHES, Adversary, Faults, Killed, SeamStore
from rayinfer.pipelines import run, store, tables
from rayinfer.pipelines.collect import collect_all
from rayinfer.pipelines.identity import read_job
from rayinfer.pipelines.job import JobSpec
from rayinfer.pipelines.log import CommitLog, OutputTakenError
from rayinfer.pipelines.report import JobResult
from rayinfer.pipelines.sinks import MARKER, PartWriter, output_schema
from rayinfer.pipelines.sources import Census, Unit
from rayinfer.pipelines.store import Store, open_store

KINDS = ("delta", "iceberg")
NUM_ROWS = 24


def plan_of(format: str, folder: str, output: Store, prompt: str = "x") -> run.Plan:
    """A job that writes to folder/out; its catalog is folder/catalog.db."""
    sink = {"uri": f"{folder}/out", "format": format, "rows_per_part": 5}
    if format == "iceberg":
        sink |= {"table": "db.rows", "catalog": {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db"}}
    spec = JobSpec.parse({"source": {"uri": "f"}, "prompt": "{{ text }}", "model": "m", "sink": sink})
    census = Census(spec.source, "jsonl", pa.schema([("text", pa.string())]), [Unit("f", "f", 0, NUM_ROWS)], 1, 0)
    table = tables.open_table(spec.sink, output)
    assert table is not None
    schema = table.fit(output_schema(census, spec))
    return run.Plan(spec, output, {"prompt": prompt}, census, schema, None, None, table)


def drive(plan: run.Plan, rng: random.Random, *, replay: bool = False, overwrite: bool = False) -> JobResult:
    """A driver from its start to its end, as run_job does it."""
    entries = run._take_over(plan, overwrite=overwrite)
    if replay and not entries.num_missing:
        run._take_failed_out(plan, entries)
    if entries.num_missing:
        writer = PartWriter(plan.store, "parquet", plan.schema, entries.part_prefix, entries.num_replays)
        ray: Any = Adversary(rng, entries, writer)
        collect_all(ray.blocks, entries, ray, plan.spec.sink, lambda written: plan.table.follow(entries))
    result = JobResult(num_rows_in=NUM_ROWS)
    run._finish(plan, entries, result, run._Times())
    return result


def read_table(format: str, folder: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the files and all rows, by the table's own library."""
    if format == "delta":
        from deltalake import DeltaTable

        if not DeltaTable.is_deltatable(f"{folder}/out"):
            return [], []
        delta = DeltaTable(f"{folder}/out")
        return [os.path.basename(uri) for uri in delta.file_uris()], delta.to_pyarrow_table().to_pylist()
    from pyiceberg.catalog import load_catalog

    catalog = load_catalog("default", type="sql", uri=f"sqlite:///{folder}/catalog.db")
    if not catalog.table_exists("db.rows"):
        return [], []
    scan = catalog.load_table("db.rows").scan()
    return [os.path.basename(task.file.file_path) for task in scan.plan_files()], scan.to_arrow().to_pylist()


def halfway(format: str, folder: str, output: Store) -> str:
    """What a reader may never see, whatever has crashed."""
    names, rows = read_table(format, folder)
    job = read_job(output)
    if job is None:
        return "rows of no job" if rows else ""
    entries = CommitLog(output, job["id"], NUM_ROWS)
    entries.load()
    keys = [row["row_key"] for row in rows]
    if len(keys) != len(set(keys)):
        return "a key twice"
    old = set(names) - set(entries.parts)
    return f"parts that the log has not: {old}" if old else ""


def problems(format: str, folder: str, output: Store) -> str:
    """What is wrong with the table of a finished job; empty if nothing."""
    names, rows = read_table(format, folder)
    got = sorted((row["row_key"], row["text"], row["generated_text"], row["error_type"]) for row in rows)
    want = sorted(
        (f"f#{i}", f"text {i}", f"answer {i}" if i % 5 else None, None if i % 5 else "TEMPLATE_ERROR")
        for i in range(NUM_ROWS)
    )
    if got != want:
        return f"{len(got)} rows, {len({row[0] for row in got})} keys, {NUM_ROWS} wanted; or texts differ"
    parts = [part["name"] for part in json.loads(output.read(MARKER))["parts"]]
    return "" if sorted(names) == sorted(parts) else f"the marker names {len(parts)} parts, the table {len(names)}"


@contextmanager
def seams(table: Any, seam: Callable[[], None]) -> Iterator[None]:
    """Seams before and after what is done to a table, and inside pyiceberg's commits."""

    def seamed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seam()
            result = function(*args, **kwargs)
            seam()
            return result

        return call

    for name in ("load", "create", "change"):
        setattr(table, name, seamed(getattr(table, name)))
    catalog = getattr(table, "_catalog", None)
    if catalog is not None:
        catalog.commit_table = seamed(catalog.commit_table)
    yield


def crash_job(format: str, seed: int, flaky: bool) -> tuple[int, str]:
    """Run a job, then replay its failed rows, killing drivers; the number of crashes, and what is wrong."""
    rng = random.Random(seed)
    folder = tempfile.mkdtemp(prefix="tables-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    inner = open_store(f"{folder}/out")
    num_crashes, crashes = rng.randint(1, MAX_CRASHES), 0
    replayed = False
    try:
        while True:
            rate = ERROR_RATE / 2 if flaky and crashes < num_crashes else 0.0
            faults = Faults(rng.randint(1, 120) if crashes < num_crashes else 0, rate, rng.random())  # type: ignore[arg-type]
            plan = plan_of(format, folder, SeamStore(inner, faults.seam))
            try:
                with seams(plan.table, faults.seam):
                    result = drive(plan, rng, replay=not replayed)
            except (Killed, OSError):
                crashes += 1
                if problem := halfway(format, folder, inner):
                    return crashes, problem
                continue
            if not result.complete or faults.dead:
                crashes = num_crashes
                continue
            if problem := problems(format, folder, inner):
                return crashes, problem
            if replayed:
                return crashes, ""
            log = CommitLog(inner, read_job(inner)["id"], NUM_ROWS)  # type: ignore[index]
            log.load()
            replayed, num_crashes = log.num_replays > 0, crashes + rng.randint(0, 2)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def overtake(format: str, at: int, second: str) -> tuple[bool, str]:
    """A second driver runs wholly between another's look at the table and its commit number `at`.

    Args:
        second: "resume", "replay" or "overwrite".

    Returns whether there was such a commit, and what is wrong.
    """
    folder = tempfile.mkdtemp(prefix="tables-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    output = open_store(f"{folder}/out")
    try:
        plan = plan_of(format, folder, output)
        change, count = plan.table.change, 0  # type: ignore[union-attr]
        ended = False

        def late(*args: Any) -> None:
            nonlocal count, ended
            count += 1
            if count == at:
                ended = True
                prompt = "y" if second == "overwrite" else "x"
                other = plan_of(format, folder, output, prompt=prompt)
                for replay in (False, True) if second == "replay" else (False,):
                    whole = drive(other, random.Random(at), replay=replay, overwrite=second == "overwrite").complete
                    while not whole:  # this Ray lost rows in each of the last rounds: the same command goes on
                        whole = drive(plan_of(format, folder, output, prompt=prompt), random.Random()).complete
            change(*args)

        plan.table.change = late  # type: ignore[union-attr, method-assign]
        try:
            done = drive(plan, random.Random(0)).complete
        except OutputTakenError:
            done = False
        if ended and done:
            return ended, f"commit {at}, {second}: the first driver noticed nothing"
        problem = problems(format, folder, output)
        return ended, f"commit {at}, {second}: {problem}" if problem else ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Tables follow each commit, and what failed is tried again at once."""
    kept = store.RETRY_SECONDS, tables.FOLLOW_SECONDS
    store.RETRY_SECONDS, tables.FOLLOW_SECONDS = (0.0,) * 4, 0.0
    try:
        yield
    finally:
        store.RETRY_SECONDS, tables.FOLLOW_SECONDS = kept


def main() -> int:
    from benchmarks.common import describe_machine, table, write_result

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crashes", type=int, default=2000, help="at least so many, over both formats")
    options = parser.parse_args()
    rows, wrong = [], []
    with no_waiting():
        for format in KINDS:
            for flaky in (False, True):
                start, crashes, jobs = time.monotonic(), 0, 0
                bad = []
                while crashes < options.crashes / 4:
                    num_crashes, problem = crash_job(format, jobs, flaky)
                    crashes, jobs = crashes + num_crashes, jobs + 1
                    bad += [f"{format}, flaky {flaky}, seed {jobs - 1}: {problem}"] if problem else []
                seconds = f"{time.monotonic() - start:.0f} s"
                name = f"{format}, operations fail too" if flaky else format
                rows.append([name, f"{jobs:,}", f"{crashes:,}", len(bad), seconds])
                print(rows[-1], bad[:3], flush=True)
                wrong += bad
            start, runs, bad = time.monotonic(), 0, []
            for second in ("resume", "replay", "overwrite"):
                at, there = 1, True
                while there:
                    there, problem = overtake(format, at, second)
                    runs, at = runs + there, at + 1
                    bad += [problem] if problem else []
            rows.append([f"{format}, overtaken between look and commit", f"{runs:,}", "", len(bad),
                         f"{time.monotonic() - start:.0f} s"])  # fmt: skip
            print(rows[-1], bad[:3], flush=True)
            wrong += bad
    text = [
        "# Crashes of table commits",
        f"`python -m benchmarks.table_crashes --crashes {options.crashes}`",
        describe_machine(),
        "Tables read by deltalake and pyiceberg after every crash and at the end:",
        table(["table", "jobs", "crashes", "violations", "time"], rows),
    ]
    write_result("table_crashes.md", "\n\n".join(text))
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
