"""Real jobs under the faults of `python -m benchmarks.faults`, every row looked for by key and text; one seed a day.

Five seeds of all kinds (`make faults`) are 140 runs, most of them of a job with an engine of its own: 22 minutes, which
CI does not have beside the rest (benchmarks/results/faults.md). Deaths at the commit's seams have 25 seeds each in
test_commit.py, simulated as the outages here are; the engine's own faults, a hung step among them, are in tests/engine.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import commit_crashes as sim
from benchmarks import faults
from benchmarks.fault_world import compare
from rayinfer.pipelines import store as store_module
from rayinfer.pipelines.log import Lease
from rayinfer.pipelines.store import LocalStore, Store
from rayinfer.processors.stages import finish

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_jobs_under_faults(tmp_path):
    """All kinds on one node that do not wait for minutes."""
    kinds = [name for name in faults.ALL if name not in faults.WAITING]
    seed, records = datetime.date.today().toordinal(), tmp_path / "runs.jsonl"
    command = [sys.executable, "-m", "benchmarks.faults", "--kinds", ",".join(kinds), "--seeds", "1"]
    command += ["--first-seed", str(seed), "--records", str(records), "--no-result"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = faults.read(records)
    assert [run["kind"] for run in runs] == kinds
    assert {(run["lost"], run["doubled"], run["altered"], run["wrong"]) for run in runs} == {(0, 0, 0, "")}


class Outage(sim.Faults):
    """A storage that fails from some operation on, for good or for a few operations."""

    def __init__(self, code: int, rng: random.Random, lasting: bool):
        super().__init__()
        first = rng.randint(1, 20)
        self.code, self.failing = code, range(first, 10_000 if lasting else first + rng.randint(1, 8))

    def seam(self) -> None:
        self.count += 1
        if self.count in self.failing:
            raise OSError(self.code, "injected")


@pytest.mark.parametrize("lasting", [True, False], ids=["until the driver ends", "for a while"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=["disk full", "permission lost", "I/O"])
@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_a_storage_that_fails(kind, code, lasting, tmp_path, monkeypatch):
    """In the middle of a write, before an operation, or after one that was done."""
    monkeypatch.setattr(store_module, "RETRY_SECONDS", (0.0,) * 4)
    for seed in range(5):
        rng = random.Random(seed)
        disk = LocalStore(fsspec.filesystem("file"), f"{tmp_path}/{seed}")
        inner = disk if kind == "disk" else Store(sim.Bucket(), "o")
        outage = Outage(code, rng, lasting)
        restore = sim.cut_disk(outage) if kind == "disk" else lambda: None
        try:
            with contextlib.suppress(OSError):
                output = inner if kind == "disk" else sim.SeamStore(inner, outage.seam)
                sim.drive(output, sim.NUM_ROWS, sim.Orderly, rng)
        finally:
            restore()
        assert outage.count >= outage.failing.start
        result = sim.drive(inner, sim.NUM_ROWS, sim.Orderly, rng)
        assert result.complete, result.reason
        assert sim.problems(inner, sim.NUM_ROWS) == ""


def test_a_lease_whose_writing_reports_an_error_is_given_back():
    outage = Outage(errno.EIO, random.Random(0), lasting=False)
    outage.failing = range(2, 3)  # 1 is before the put, 2 after it
    bucket = Store(sim.Bucket(), "o")
    with pytest.raises(OSError, match="injected"), Lease(sim.SeamStore(bucket, outage.seam)):
        pass
    Lease(bucket).check()  # this process may try again


def test_a_row_at_which_a_postprocess_that_returns_its_rows_raises():
    """Found by the kind 'user functions', seed 3: the row kept the error column that it came with, without an error."""

    def picky(row):
        return {**row, "id": 1 / row["id"]}

    rows = [{"id": id, "generated_text": "a", "error_type": None, "error_message": None} for id in range(3)]
    fields = [("id", pa.int64()), *((name, pa.string()) for name in ("generated_text", "error_type", "error_message"))]
    table = finish(pa.Table.from_pylist(rows, pa.schema(fields)), picky, "record")
    assert table["error_type"].to_pylist() == ["POSTPROCESS_ERROR", None, None]
    assert "ZeroDivisionError" in table["error_message"][0].as_py()


def test_rays_start_leaves_sigterm_to_us(local_ray):
    """Found by the kind 'Ctrl-C or SIGTERM', seed 1: Ray's own handler ended the driver, exit code 15, no way told."""
    code = """if True:
        import os, signal, sys
        from rayinfer.pipelines.run import _ray
        signal.signal(signal.SIGTERM, lambda number, frame: print("ours"))
        with _ray(sys.argv[1], False):
            os.kill(os.getpid(), signal.SIGTERM)
    """
    address = local_ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-c", code, address], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, "ours" in done.stdout) == (0, True), done.stderr


def test_engines_are_no_less_urgent_than_other_programs():
    """Seen with the demo beside other work: at Ray's niceness of 15 its engine got next to no time."""
    code = """if True:
        import os, ray
        from rayinfer.pipelines.run import _ray
        with _ray(None, False):
            print("niceness", ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
    """
    env = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode, "niceness 0" in done.stdout) == (0, True), done.stdout + done.stderr


def test_the_oracle_sees_what_is_wrong(tmp_path):
    def write(name: str, rows: list[tuple[str, str, str | None]]) -> None:
        keys, texts, errors = map(list, zip(*rows, strict=True))
        columns = {"row_key": keys, "generated_text": texts, "error_type": pa.array(errors, pa.string())}
        pq.write_table(pa.table(columns), tmp_path / name)

    good = [(f"f#{i}", f"answer {i}", None) for i in range(6)]
    write("part-0.parquet", good)
    want, counts = compare(tmp_path, {})
    assert counts["doubled"] == 6  # none was wanted
    assert not +compare(tmp_path, want)[1]
    write("part-0.parquet", [("f#0", "another answer", None), *good[2:5], ("f#5", "answer 5", "ABORTED")])
    write("part-1.parquet", [good[3]])
    assert compare(tmp_path, want)[1] == {"lost": 1, "doubled": 1, "altered": 2}
