"""The commit protocol without Ray or engine: crashes at every seam, interleavings, size, and what `verify` finds."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import commit_crashes as sim
from rayinfer.errors import ConfigError
from rayinfer.pipelines import run
from rayinfer.pipelines import store as store_module
from rayinfer.pipelines.identity import bare_uri, differences, fingerprint, read_job
from rayinfer.pipelines.job import JobSpec
from rayinfer.pipelines.keys import pack_rows
from rayinfer.pipelines.log import CommitLog, Lease, OutputTakenError, Part
from rayinfer.pipelines.run import check_equation
from rayinfer.pipelines.sinks import MARKER
from rayinfer.pipelines.sources import list_source
from rayinfer.pipelines.store import META, LocalStore, Store, claim, open_store
from rayinfer.pipelines.verify import verify


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(store_module, "RETRY_SECONDS", (0.0,) * 4)


@pytest.mark.parametrize("kind", sim.KINDS)
def test_drivers_killed_at_every_seam(kind):
    outcomes = [sim.crash_job(kind, seed) for seed in range(1000, 1025)]
    assert [problem for _, problem in outcomes if problem] == []
    assert sum(crashes for crashes, _ in outcomes) > 40


def test_two_drivers_in_any_order():
    states, ends, wrong = sim.interleave(num_rows=4, limit=400)
    assert wrong == []
    assert states == 400
    assert ends > 0


@pytest.mark.parametrize("broken", ["start", "claim"])
def test_the_interleavings_notice_a_protocol_without_its_rules(broken, monkeypatch):
    if broken == "start":  # a driver that does not end the ones before it
        monkeypatch.setattr(CommitLog, "start", lambda self: setattr(self, "epoch", self.length))
    else:  # an append that is no put-if-absent
        monkeypatch.setattr(sim.log, "claim", lambda store, name, data: store.put(name, data) or True)
    monkeypatch.setattr(sim.identity, "uuid", sim.names)
    monkeypatch.setattr(sim.log, "uuid", sim.names)
    sim.names.start(2)
    pick = random.Random(1)
    for _ in range(300):
        at = sim.Interleaving(tuple(pick.choices((0, 1), k=pick.randint(20, 60))), 4)
        rest = Store(sim.Bucket(at.objects), "o")
        try:
            third = sim.drive(rest, 4, sim.Orderly, random.Random(0))
            if not third.complete or sim.problems(rest, 4):
                return
        except (ConfigError, KeyError):
            return
    pytest.fail("300 interleavings, and none went wrong")


@pytest.fixture(params=["disk", "memory", "bucket"])
def output(request, tmp_path) -> Store:
    if request.param == "bucket":
        return Store(sim.Bucket(), "o")
    return open_store(str(tmp_path / "o") if request.param == "disk" else f"memory://{tmp_path.name}")


def test_of_many_writers_of_a_name_one_wins(output):
    won: list[int] = []
    start = threading.Barrier(8)

    def write(i: int) -> None:
        start.wait()
        won.extend([i] if claim(output, "a/name", f"writer {i}".encode()) else [])

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert output.read("a/name") == f"writer {won[0]}".encode()
    assert claim(output, "a/name", f"writer {won[0]}".encode())  # its own, seen again after an error
    assert output.sizes("a") == {"name": 8}
    assert (output.size("a/name"), output.size("a/none"), output.sizes("none")) == (8, None, {})
    output.remove(["a/name", "a/name", "none/"])
    with pytest.raises(FileNotFoundError):
        output.read("a/name")


def part_of(name: str, rows: range) -> Part:
    return Part(name, len(rows), 1, "", "0", pack_rows(np.array(rows)), {}, 0, 0, 0)


def test_a_log_of_many_rows_needs_little_memory():
    num_rows, num_parts = 10**8, 1000
    output = Store(sim.Bucket(), "o")
    log = CommitLog(output, "0" * 8, num_rows)
    log.start()
    size = num_rows // num_parts // 10
    starts = [i * (num_rows // num_parts) for i in range(num_parts)]
    for start in starts[:-1]:
        name = f"part-{start}"
        output.put(name, b"x")
        log.commit([part_of(name, range(start, start + size))])
    tracemalloc.start()
    again = CommitLog(output, "0" * 8, num_rows)
    again.load()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (again.done.count, again.length) == ((num_parts - 1) * size, num_parts)
    assert again.done.missing(starts[-2], starts[-1]).tolist() == list(range(starts[-2] + size, starts[-1]))
    assert peak < 64e6, f"{peak / 1e6:.0f} MB for 10^8 rows"


def test_the_log_refuses_what_cannot_be(output):
    log = CommitLog(output, "0" * 8, 10)
    log.start()
    with pytest.raises(FileNotFoundError, match="name a folder that all nodes share"):
        log.commit([part_of("part-a", range(5))])
    output.put("part-a", b"x")
    log.commit([part_of("part-a", range(5))])
    other = CommitLog(output, "0" * 8, 10)
    other.load()
    other.start()
    with pytest.raises(OutputTakenError, match="another driver is writing to this output"):
        log.end()
    with pytest.raises(OutputTakenError):
        log.commit([part_of("part-gone", range(5, 7))])  # swept by the other one
    output.remove([f"{other.folder}/00000001.json"])
    with pytest.raises(ConfigError, match=r"log-00000000: an entry is missing or damaged .*00000001.json.*--overwrite"):
        CommitLog(output, "0" * 8, 10).load()


def test_the_lease_tells_a_living_driver_from_a_dead_one(output):
    Lease(output).check()
    with Lease(output):
        with pytest.raises(OutputTakenError, match=f"process {os.getpid()} of this machine"):
            Lease(output).check()
        holder = json.loads(output.read(f"{META}/driver.json"))
        for change in ({"since": 1.0}, {"pid": 2**22 + 1}, {"host": "elsewhere"}):
            output.put(f"{META}/driver.json", json.dumps(holder | change).encode())
            Lease(output).check()
        output.put(f"{META}/driver.json", b"torn {")
        Lease(output).check()
        output.put(f"{META}/driver.json", json.dumps(holder).encode())
    assert output.size(f"{META}/driver.json") is None


def test_differences_name_the_field_and_keep_secrets():
    assert bare_uri("s3://key:pass@bucket/a/*.parquet?token=1") == "s3://bucket/a/*.parquet"
    assert bare_uri("/data/what?.csv") == "/data/what?.csv"
    assert bare_uri("s3://key:pass@b/?/part-?.parquet?sig=a/b=1&x") == "s3://b/?/part-?.parquet"
    assert bare_uri("s3://b/part-?/k=1/a.parquet") == "s3://b/part-?/k=1/a.parquet"
    old = {"prompt": "x" * 100 + "old", "sampling.seed": 1, "same": 2}
    lines = differences(old, {"prompt": "x" * 100 + "new", "model.dtype": "float32", "same": 2})
    assert lines == [
        "model.dtype: nothing -> 'float32'",
        f"prompt: '...{'x' * 10}old' -> '...{'x' * 10}new'",
        "sampling.seed: '1' -> nothing",
    ]
    assert differences({str(i): 1 for i in range(20)}, {})[-1] == "and 12 more"


def test_weights_of_one_size_and_values_that_are_no_defaults_make_another_job(tmp_path):
    """A job went on with a model that was trained further, and with max_tokens and columns that are no defaults."""
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")

    def told(weights: bytes, **parts) -> dict:
        (tmp_path / "model/model.safetensors").write_bytes(b"head" + bytes(3 << 20) + weights)
        job = {"source": {"uri": str(tmp_path / "in.parquet")}, "prompt": "a", "model": str(tmp_path / "model")}
        spec = JobSpec.parse({**job, "sink": {"uri": str(tmp_path / "out")}, **parts})
        return fingerprint(spec, list_source(spec.source))

    name, first = "model.files.model.safetensors", told(b"one")
    assert [line.partition(":")[0] for line in differences(first, told(b"two"))] == [name]
    earlier = {**first, name: first[name].partition(", ")[0]}  # as versions wrote it that knew the size alone
    assert differences(earlier, first) == []
    assert differences({**earlier, name: "1 bytes"}, first) != []
    assert differences(first, told(b"one", sampling={"max_tokens": None})) == ["sampling.max_tokens: nothing -> 'null'"]
    sink = {"uri": str(tmp_path / "out"), "columns": []}
    assert differences(first, told(b"one", sink=sink)) == ["sink.columns: nothing -> '[]'"]


def test_a_part_that_is_gone_is_told_without_the_password_and_with_a_way_out(tmp_path):
    plan = sim.plan_of(open_store(str(tmp_path)), 24)
    sim.drive(plan.store, 24, sim.Orderly, random.Random(0))
    log = CommitLog(plan.store, read_job(plan.store)["id"], 24)
    log.load()
    assert check_equation(plan.census, log, "s3://key:hush@bucket/out") == ""
    next(tmp_path.glob("part-*")).unlink()
    reason = check_equation(plan.census, log, "s3://key:hush@bucket/out")
    assert reason.startswith("1 part(s) are no longer in 's3://bucket/out'")
    assert "start afresh with --overwrite" in reason


def test_a_replay_says_how_many_rows_it_runs_again(tmp_path):
    plan = sim.plan_of(open_store(str(tmp_path)), 24)
    sim.drive(plan.store, 24, sim.Orderly, random.Random(0))
    log = CommitLog(plan.store, read_job(plan.store)["id"], 24)
    log.load()
    begun = replace(plan, log=log, marker={"num_failed": 1234})
    assert run._intro(begun).endswith("going on: 24 rows are done")
    assert run._intro(replace(begun, replay=True)).endswith("24 rows are done, 1,234 of them failed: these run again")


def test_what_is_refused_once_the_work_has_begun_is_told_in_the_report(tmp_path, monkeypatch):
    def work(plan, result, times, *args, **kwargs):
        for stage in stages:
            times.enter(stage)
        raise ConfigError("the table has 'x.parquet', which no job wrote")

    plan = sim.plan_of(open_store(str(tmp_path)), 24)
    monkeypatch.setattr(run, "prepare", lambda *args, **kwargs: plan)
    monkeypatch.setattr(run, "_work", work)
    stages = ["start"]
    with pytest.raises(ConfigError, match="which no job wrote"):
        run.run_job(plan.spec)
    stages = ["start", "load", "run"]
    result = run.run_job(plan.spec)
    assert (result.status, result.reason) == ("incomplete", "the table has 'x.parquet', which no job wrote")


@pytest.fixture
def finished_job(tmp_path, monkeypatch) -> Callable[[], Path]:
    """A finished output on a disk, made by a driver of the simulation."""

    def make() -> Path:
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        result = sim.drive(open_store(str(folder)), 24, sim.Orderly, random.Random(0))
        assert result.complete
        return folder

    return make


def break_part(folder: Path, change: Callable[[bytes], bytes]) -> str:
    path = sorted(folder.glob("part-*"))[0]
    path.write_bytes(change(path.read_bytes()))
    return path.name


def test_a_job_whose_marker_cannot_be_written_is_not_complete(finished_job, monkeypatch):
    """Nor is it told so: the next run has only the marker left to write."""
    folder = finished_job()
    (folder / MARKER).unlink()

    def put(store, name, data, real=LocalStore.put):
        if name in broken:
            raise OSError(5, "Input/output error")
        real(store, name, data)

    monkeypatch.setattr(LocalStore, "put", put)
    broken, statuses = [MARKER], []
    for _ in range(2):
        plan = sim.plan_of(open_store(str(folder)), 24)
        plan = replace(plan, log=CommitLog(plan.store, read_job(plan.store)["id"], 24))
        monkeypatch.setattr(run, "prepare", lambda *args, plan=plan, **kwargs: plan)
        result = run.run_job(plan.spec)
        statuses.append((result.status, result.complete, "Input/output error" in result.reason))
        assert (folder / MARKER).exists() is result.complete
        broken.clear()
    assert statuses == [("incomplete", False, True), ("complete", True, False)]
    assert verify(str(folder))[1] == []


def test_verify_proves_the_table_and_finds_what_is_wrong(finished_job):
    folder = finished_job()
    facts, wrong = verify(str(folder))
    assert wrong == []
    assert ("rows", "24 in, 19 ok + 5 failed") in facts
    assert ("keys", "24 read, none twice") in facts

    def found(damage: Callable[[Path], object]) -> str:
        folder = finished_job()
        damage(folder)
        return "\n".join(verify(str(folder))[1])

    assert "its bytes were changed" in found(lambda f: break_part(f, lambda data: data.replace(b"text", b"Text")))
    lost = found(lambda f: break_part(f, lambda data: data.partition(b"\n")[2]))
    assert "its bytes were changed" in lost
    assert "the keys of the table are not those of the source" in lost
    assert "it cannot be read: FileNotFoundError" in found(lambda f: sorted(f.glob("part-*"))[0].unlink())
    assert "1 part file(s) are not in the log" in found(lambda f: (f / "part-stray.jsonl").write_text("{}"))
    assert f"{MARKER} is missing" in found(lambda f: (f / MARKER).unlink())

    def double(folder: Path) -> None:  # a log that lies: two parts with the same keys
        log = next(folder.glob(f"{META}/log-*"))
        commits = [path for path in sorted(log.iterdir()) if json.loads(path.read_text())["add"]]
        first, second = (json.loads(path.read_text()) for path in commits[:2])
        copied, *others = second["add"]
        twin = {**first["add"][0], "rows": copied["rows"], "num_rows": copied["num_rows"]}
        commits[1].write_text(json.dumps({**second, "add": [{**twin, "name": "part-twin.jsonl"}, *others]}))
        (folder / "part-twin.jsonl").write_bytes((folder / first["add"][0]["name"]).read_bytes())

    assert "is there more than once" in found(double)
    with pytest.raises(ConfigError, match=r"no _rayinfer/job.json there"):
        verify(str(folder.parent))
