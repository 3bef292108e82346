"""Jobs that lose their output, nodes or a write, and are replayed; test_faults.py kills their drivers and workers."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.commit_crashes import Orderly, finished, plan_of
from rayinfer.pipelines import collect, identity
from rayinfer.pipelines.collect import RayWrites, collect_all
from rayinfer.pipelines.job import JobSpec
from rayinfer.pipelines.log import CommitLog, OutputTakenError
from rayinfer.pipelines.report import JobResult
from rayinfer.pipelines.run import run_job
from rayinfer.pipelines.sinks import MARKER, PartWriter
from rayinfer.pipelines.store import META, LocalStore, Store, open_store
from rayinfer.pipelines.verify import verify

PATIENCE = 400  # seconds; what takes 10 s on an idle machine was seen to take 150 s on a busy one


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def num_commits(out: Path) -> int:
    return sum('"commit"' in path.read_text() for path in out.glob(f"{META}/log-*/*.json"))


def texts(out: Path) -> dict[str, str]:
    table = pq.read_table(out)
    rows = dict(zip(table["row_key"].to_pylist(), table["generated_text"].to_pylist(), strict=True))
    assert len(rows) == table.num_rows  # no key twice
    return rows


@pytest.fixture
def slow_job(tmp_path, job) -> Callable[..., dict]:
    """A job of a few seconds whose rows come to an end one after the other."""
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(120)]}), tmp_path / "in.parquet", row_group_size=30)

    def make(out: str = "out", **parts):
        sink = {"uri": str(tmp_path / out), "rows_per_part": 10}
        return job(tmp_path / "in.parquet", sink=sink, **{"sampling": {"temperature": 0, "max_tokens": 60}, **parts})

    return make


def engines() -> list[psutil.Process]:
    """Processes of this test's engines."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found += [child] if "MapWorker(MapBatches(LLMProcessor" in " ".join(child.cmdline()) else []
    return found


def test_a_driver_that_lost_its_output_stops_and_frees_its_engines(tmp_path, slow_job, local_ray):
    results: list[JobResult] = []
    for number in itertools.count():  # until the thief is quicker than the driver
        out = tmp_path / f"out{number}"
        spec = JobSpec.parse(slow_job(out.name))
        driver = threading.Thread(target=lambda spec=spec: results.append(run_job(spec)), daemon=True)
        driver.start()
        wait_for(lambda out=out: num_commits(out) >= 2)
        while driver.is_alive():
            thief = CommitLog(open_store(str(out)), json.loads((out / META / "job.json").read_text())["id"], 120)
            thief.load()
            with contextlib.suppress(OutputTakenError):
                thief.start()
                break
        driver.join(timeout=PATIENCE)
        if results[-1].status != "complete" and results[-1].num_rows_out < 120:  # 120: it had only to say so
            break
    assert (results[-1].status, results[-1].num_rows_out < 120) == ("incomplete", True)
    assert "another driver is writing to this output" in results[-1].reason
    wait_for(lambda: not engines())
    again = CommitLog(thief.store, thief.job_id, 120)
    again.load()
    assert again.length == thief.length  # nothing came after


def test_failed_rows_are_run_again(tmp_path, job, local_ray, monkeypatch):
    """Those of an output of an earlier version, whose columns it keeps."""
    values = [None if i % 4 == 0 else f"row {i}" for i in range(12)]
    pq.write_table(pa.table({"text": values}), tmp_path / "in.parquet")
    spec = JobSpec.parse(job(tmp_path / "in.parquet"))
    out = tmp_path / "out"
    for attempts in (0, 1):
        with monkeypatch.context() as patch:
            if attempts == 0:
                patch.setattr(identity, "FORMAT", 1)  # which had no error_stage
            result = run_job(spec, replay=attempts > 0)
        assert (result.status, result.num_ok, result.num_failed) == ("complete", 9, 3), result.reason
        rows = pq.read_table(out).to_pylist()
        failed = [row for row in rows if row["error_type"]]
        assert [row["attempts"] for row in failed] == [attempts] * 3
        assert "error_stage" not in rows[0]
        assert {row["attempts"] for row in rows if not row["error_type"]} == {1}
        assert verify(str(out))[1] == []
    assert result.num_rows_before == 9
    marker = json.loads((out / MARKER).read_text())
    assert {part["name"] for part in marker["parts"]} == {path.name for path in out.glob("part-*")}


def test_a_disk_error_in_a_write_task_stops_the_job_and_loses_nothing(tmp_path, local_ray):
    plan = plan_of(open_store(str(tmp_path / "out")), 20)
    log = CommitLog(plan.store, "0" * 8, 20)
    log.start()

    def collect(store: Store) -> None:
        def blocks():
            for rows in np.array_split(log.done.missing(0, 20), 2):
                yield local_ray.put(finished(rows)), len(rows), 100

        writer = PartWriter(store, "jsonl", plan.schema, log.part_prefix)
        collect_all(blocks, log, RayWrites(writer), plan.spec.sink, lambda written: None)

    (tmp_path / "full").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="full"):
        collect(LocalStore(fsspec.filesystem("file"), str(tmp_path / "full")))
    assert (log.done.count, log.length) == (0, 1)
    collect(plan.store)
    assert log.num_missing == 0
    assert sum(part.num_rows for part in log.parts.values()) == 20


def test_the_time_for_a_flush_passes_while_no_block_comes(tmp_path):
    plan = plan_of(open_store(str(tmp_path / "out")), 20)
    log = CommitLog(plan.store, "0" * 8, 20)
    log.start()
    writes = Orderly(None, log, PartWriter(plan.store, "jsonl", plan.schema, log.part_prefix))
    times: list[float] = []

    def blocks():
        yield finished(np.arange(3)), 3, 100
        wait_for(lambda: times)  # it is committed although the next one is not there
        yield finished(np.arange(3, 20)), 17, 100

    sink = plan.spec.sink.model_copy(update={"flush_seconds": 0.5, "rows_per_part": 1000})
    start = time.monotonic()
    collect_all(blocks, log, writes, sink, lambda written: times.append(time.monotonic() - start))
    assert times[0] >= 0.5
    assert log.num_missing == 0


class Shrinking(Orderly):
    """Counts the CPUs of a cluster that has fewer each time that it is asked for them, down to `least`."""

    def __init__(self, *args, cpus: list[int]):
        super().__init__(*args)
        self.cpus = cpus

    def resources(self):
        return {"CPU": float(self.cpus.pop(0) if len(self.cpus) > 1 else self.cpus[0])}


@pytest.mark.parametrize(("cpus", "num_rounds"), [([6, 2], 2), ([6, 6], 1)])
def test_a_round_that_stands_still_after_nodes_were_lost_gives_way(tmp_path, monkeypatch, cpus, num_rounds):
    """Ray waits for ever when the actors of a round hold all CPUs that are left; a slow round is left alone."""
    monkeypatch.setattr(collect, "STALL_SECONDS", 0.4)
    plan = plan_of(open_store(str(tmp_path / "out")), 20)
    log = CommitLog(plan.store, "0" * 8, 20)
    log.start()
    writes = Shrinking(None, log, PartWriter(plan.store, "jsonl", plan.schema, log.part_prefix), cpus=cpus)
    begun: list[int] = []

    def blocks():
        begun.append(log.num_missing)
        first, *others = np.array_split(log.done.missing(0, 20), 3)
        yield finished(first), len(first), 100
        if len(begun) == 1:
            start = time.monotonic()
            while num_rounds > 1 or time.monotonic() - start < 1.5:
                time.sleep(0.01)
        for rows in others:
            yield finished(rows), len(rows), 100

    collect.collect_all(blocks, log, writes, plan.spec.sink, lambda written: None)
    assert begun == [20, 13][:num_rounds]  # what was finished is committed before
    assert log.num_missing == 0
