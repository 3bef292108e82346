"""Figure: crashes of the commit protocol at every seam, and every interleaving of two drivers.

    python benchmarks/commit_crashes.py --crashes 12000

The drivers run the code of `rayinfer run` (claim, take-over, collecting, writing parts, commits, the end), without Ray
and an engine. Rows come from an adversary that loses, repeats and regroups them, as Ray was seen to do. A driver is
killed before or after any operation on the store (on a disk: any system call, and in the middle of a write), up to
five times a job, then one runs to the end. What counts is read by other code: each row once, with its text.

Stores: a disk; fsspec's memory; a bucket that answers a lost conditional put with an error; the bucket, in which one
operation in ten fails before or after it was done. With --uri, a real one (s3://bucket/folder) instead.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from rayinfer.pipelines import identity, log, run, store
from rayinfer.pipelines.collect import Block, collect_all
from rayinfer.pipelines.job import JobSpec
from rayinfer.pipelines.log import OutputTakenError
from rayinfer.pipelines.report import JobResult
from rayinfer.pipelines.sinks import MARKER, PartWriter, output_schema
from rayinfer.pipelines.sources import KEY, NUMBER, SOURCE, Census, Unit
from rayinfer.pipelines.store import LocalStore, Store, open_store
from rayinfer.processors.columns import OUTPUT

KINDS = ("disk", "memory", "bucket", "flaky")
NUM_ROWS = 24
MAX_CRASHES = 5  # of one job
ERROR_RATE = 0.1


class Killed(BaseException):
    """The driver's process is gone: nothing of it runs any more."""


class Faults:
    """Counts the seams that a driver passes; kills it at one, or lets operations fail at random."""

    def __init__(self, kill_at: int = 0, error_rate: float = 0.0, seed: int = 0):
        self.count, self.kill_at, self.error_rate = 0, kill_at, error_rate
        self.dead = False
        self._random = random.Random(seed)

    def seam(self) -> None:
        self.count += 1
        self.dead = self.dead or self.count == self.kill_at
        if self.dead:
            raise Killed
        if self._random.random() < self.error_rate:
            raise OSError(errno.EIO, "injected")


class SeamStore(Store):
    """A store with a seam before and after each operation."""

    def __init__(self, inner: Store, seam: Callable[[], None]):
        self.inner, self.seam = inner, seam

    def _do(self, name: str, *args: Any) -> Any:
        self.seam()
        result = getattr(self.inner, name)(*args)
        self.seam()
        return result

    def remove(self, names: Any) -> None:
        for name in names:
            self._do("remove", [name])


for _name in ("put", "create", "read", "size", "sizes"):
    setattr(SeamStore, _name, lambda self, *args, _name=_name: self._do(_name, *args))


class Bucket(fsspec.AbstractFileSystem):
    """What the stores use of an S3 client; a conditional put that is lost is an error of the store's own."""

    protocol = "s3"
    cachable = False

    def __init__(self, objects: dict[str, bytes] | None = None):
        super().__init__()
        self.objects = objects if objects is not None else {}
        self._lock = threading.Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        with self._lock:
            if mode == "create" and path in self.objects:
                raise OSError(errno.EINVAL, "PreconditionFailed")
            self.objects[path] = value

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def size(self, path: str) -> int:
        return len(self.cat_file(path))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        inside = [name.removeprefix(f"{path}/") for name in self.objects if name.startswith(f"{path}/")]
        names = {name.partition("/")[0]: "/" in name for name in inside}
        if not names:
            raise FileNotFoundError(path)
        infos = {name: ("directory", 0) if d else ("file", self.size(f"{path}/{name}")) for name, d in names.items()}
        return [{"name": f"{path}/{name}", "type": kind, "size": size} for name, (kind, size) in infos.items()]

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        gone = [name for name in self.objects if name == path or (recursive and name.startswith(f"{path}/"))]
        if not gone:
            raise FileNotFoundError(path)
        for name in gone:
            del self.objects[name]


def cut_disk(faults: Faults) -> Callable[[], None]:
    """Put seams around the system calls of LocalStore; returns what takes them away."""

    def seamed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            faults.seam()
            result = function(*args, **kwargs)
            faults.seam()
            return result

        return call

    class Torn:
        def __init__(self, path: str, mode: str):
            faults.seam()
            self.file = builtins.open(path, mode)  # noqa: SIM115  # closed by __exit__

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *exc: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            faults.seam()
            self.file.write(data[len(data) // 2 :])

    names = {name: seamed(getattr(os, name)) for name in ("replace", "link", "unlink", "makedirs")}
    kept = {name: getattr(os, name) for name in ("open", "close", "O_RDONLY", "path")}
    # A real fsync tells nothing about a killed process, and costs most of the time.
    store.os = SimpleNamespace(**names, **kept, fsync=lambda number: faults.seam())  # type: ignore[attr-defined]
    store.open = lambda path, mode: Torn(path, mode)  # type: ignore[attr-defined]

    def restore() -> None:
        store.os = os  # type: ignore[attr-defined]
        del store.open  # type: ignore[attr-defined]

    return restore


def finished(numbers: np.ndarray) -> pa.Table:
    """Rows as they come out of the processor; every fifth one failed."""
    rows = []
    for i in numbers.tolist():
        row = {"attempts": 1, "finish_reason": "stop", "generated_text": f"answer {i}", "num_generated_tokens": i}
        rows.append(row if i % 5 else {"attempts": 1, "error_type": "TEMPLATE_ERROR", "error_message": "why"})
    columns: dict[str, Any] = {
        KEY: [f"f#{i}" for i in numbers.tolist()], NUMBER: pa.array(numbers),
        SOURCE: pa.StructArray.from_arrays([pa.array([f"text {i}" for i in numbers.tolist()])], ["text"]),
    }  # fmt: skip
    names = [field for field in OUTPUT if field.name not in ("logprobs", "prompt_logprobs")]
    columns |= {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in names}
    return pa.table(columns)


class Adversary:
    """Blocks of the missing rows, and write tasks, with what Ray may do to them."""

    def __init__(self, rng: random.Random, log: log.CommitLog, writer: PartWriter):
        self.rng, self.log, self.writer = rng, log, writer
        self._results: dict[object, Any] = {}

    def blocks(self) -> Iterator[Block]:
        rng = self.rng
        rows = self.log.done.missing(0, self.log.done.num_rows).tolist()
        if rng.random() < 0.3:  # a task that ran before is run again: rows that are done
            rows += rng.sample(range(self.log.done.num_rows), 5)
        rng.shuffle(rows)
        while rows:
            some, rows = rows[: rng.randint(1, 6)], rows[6:] if rng.random() < 0.1 else rows[len(rows[:4]) :]
            for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
                yield finished(np.array(some)), len(some), 100

    def start(self, only: np.ndarray | None, blocks: list[Any]) -> Any:
        handle = object()
        self._results[handle] = (only, blocks)
        return handle

    def hurry(self) -> bool:
        return False

    def resources(self) -> dict[str, float]:
        return {}

    def ended(self, handles: list[Any], seconds: float) -> list[Any]:
        return self.rng.sample(handles, self.rng.randint(1, len(handles)))

    def result(self, handle: Any) -> Any:
        only, blocks = self._results.pop(handle)
        if self.rng.random() < 0.1:
            self.writer(only, *blocks)  # a first try whose node was lost
        written = self.writer(only, *blocks)
        return None if self.rng.random() < 0.1 else written


class Orderly(Adversary):
    """One block of half the rows after the other: for the interleavings, which are many enough."""

    def blocks(self) -> Iterator[Block]:
        rows = self.log.done.missing(0, self.log.done.num_rows)
        for some in np.array_split(rows, 2):
            if len(some):
                yield finished(some), len(some), 100

    def ended(self, handles: list[Any], seconds: float) -> list[Any]:
        return handles

    def result(self, handle: Any) -> Any:
        only, blocks = self._results.pop(handle)
        return self.writer(only, *blocks)


def plan_of(output: Store, num_rows: int) -> run.Plan:
    spec = JobSpec.parse(
        {
            "source": {"uri": "f"},
            "prompt": "{{ text }}",
            "model": "m",
            "sink": {"uri": "o", "format": "jsonl", "rows_per_part": 5},
        }
    )
    units = [Unit("f", "f", 0, num_rows)]
    census = Census(spec.source, "jsonl", pa.schema([("text", pa.string())]), units, 1, 0)
    return run.Plan(spec, output, {"prompt": "x"}, census, output_schema(census, spec), None, None)


def drive(
    output: Store, num_rows: int, adversary: type[Adversary], rng: random.Random, replay: bool = False
) -> JobResult:
    """A driver from its start to its end, as run_job does it."""
    plan = plan_of(output, num_rows)
    entries = run._take_over(plan, overwrite=False)
    if replay and not entries.num_missing:
        output.remove([MARKER])
        entries.replay()
    if entries.num_missing:
        writer = PartWriter(output, "jsonl", plan.schema, entries.part_prefix, entries.num_replays)
        ray = adversary(rng, entries, writer)
        collect_all(ray.blocks, entries, ray, plan.spec.sink, lambda written: None)
    result = JobResult(num_rows_in=num_rows)
    run._finish(plan, entries, result, run._Times())
    return result


def problems(output: Store, num_rows: int) -> str:
    """What is wrong with the table of a finished job, found without the log's code; empty if nothing."""
    marker = json.loads(output.read(MARKER))
    rows = [json.loads(line) for part in marker["parts"] for line in output.read(part["name"]).splitlines()]
    got = sorted((row["row_key"], row["text"], row["generated_text"], row["error_type"]) for row in rows)
    want = sorted(
        (f"f#{i}", f"text {i}", f"answer {i}" if i % 5 else None, None if i % 5 else "TEMPLATE_ERROR")
        for i in range(num_rows)
    )
    if got != want:
        return f"{len(got)} rows, {len({row[0] for row in got})} keys, {num_rows} wanted; or texts differ"
    counts = marker["num_ok"], marker["num_failed"], marker["num_rows_in"]
    if counts != (num_rows - len(range(0, num_rows, 5)), len(range(0, num_rows, 5)), num_rows):
        return f"the marker counts {counts}"
    named = {part["name"] for part in marker["parts"]}
    strays = [name for name in output.sizes() if name.startswith("part-") and name not in named]
    return f"parts that nothing names stay: {strays}" if strays else ""


def crash_job(kind: str, seed: int, uri: str | None = None) -> tuple[int, str]:
    """Run one job, killing its drivers; returns the number of crashes, and what is wrong with the table."""
    rng = random.Random(seed)
    folder = tempfile.mkdtemp(prefix="commit-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    name = f"run-{uuid.uuid4().hex}"
    inner: Store = LocalStore(fsspec.filesystem("file"), folder)
    if uri:
        inner = open_store(f"{uri}/{name}")
    elif kind == "memory":
        inner = open_store(f"memory://{name}")
    elif kind != "disk":
        inner = Store(Bucket(), name)
    num_crashes = rng.randint(1, MAX_CRASHES)
    crashes = 0
    try:
        while True:
            rate = ERROR_RATE if kind == "flaky" and crashes < num_crashes else 0.0
            faults = Faults(rng.randint(1, 90) if crashes < num_crashes else 0, rate, rng.random())  # type: ignore[arg-type]
            restore = cut_disk(faults) if kind == "disk" and not uri else None
            output = inner if restore else SeamStore(inner, faults.seam)
            try:
                result = drive(output, NUM_ROWS, Adversary, rng)
            except (Killed, OSError):
                crashes += 1
                continue
            finally:
                if restore:
                    restore()
            if result.complete and not faults.dead:
                return crashes, problems(inner, NUM_ROWS)
            crashes = num_crashes  # it came through, with rows that the adversary kept from it: once more
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if uri or kind == "memory":
            inner.fs.rm(inner.folder, recursive=True)


class Interleaving:
    """Two drivers on one bucket, one operation at a time, in the order that a schedule gives."""

    def __init__(self, schedule: tuple[int, ...], num_rows: int):
        self.bucket = Bucket()
        self.outcome: list[Any] = [None, None]
        self.seen: list[list[str]] = [[], []]  # what each driver has got from the store
        self._turns = [threading.Semaphore(0), threading.Semaphore(0)]
        self._back = threading.Semaphore(0)
        self._stop = False
        threads = [threading.Thread(target=self._run, args=(i, num_rows), daemon=True) for i in (0, 1)]
        for thread in threads:
            thread.start()
            self._back.acquire()
        for i in schedule:
            if self.outcome[i] is None:
                self._turns[i].release()
                self._back.acquire()
        self.alive = [i for i in (0, 1) if self.outcome[i] is None]
        self.objects = dict(self.bucket.objects)
        self._stop = True
        for i in self.alive:
            self._turns[i].release()
        for thread in threads:
            thread.join()

    def state(self) -> int:
        """Equal for equal states; when an entry was made, and by whom, counts for nothing."""
        texts = {name: re.sub(rb'"(at|created|finished)": "[^"]*"', b"", data) for name, data in self.objects.items()}
        return hash((tuple(sorted(texts.items())), tuple(map(tuple, self.seen)), tuple(map(str, self.outcome))))

    def _wait(self, i: int) -> None:
        self._back.release()
        self._turns[i].acquire()
        if self._stop:
            raise Killed

    def _run(self, i: int, num_rows: int) -> None:
        driver = self

        class Turns(SeamStore):
            def _do(self, name: str, *args: Any) -> Any:
                if name != "read":  # what is read never changes: when it is read makes no difference
                    driver._wait(i)
                try:
                    result = getattr(self.inner, name)(*args)
                except Exception as error:
                    driver.seen[i].append(f"{name} {type(error).__name__}")
                    raise
                driver.seen[i].append(re.sub(r'"(at|created)": "[^"]*"', "", f"{name} {result}"))
                return result

            def read_all(self, names: list[str]) -> list[bytes]:
                return [self.read(name) for name in names]

        try:
            names.start(i)
            drive(Turns(Store(self.bucket, "o"), lambda: None), num_rows, Orderly, random.Random(0), replay=i == 1)
            self.outcome[i] = "done"
        except OutputTakenError:
            self.outcome[i] = "stopped"
        except Killed:
            return
        except Exception as error:
            self.outcome[i] = f"{type(error).__name__}: {error}"
        self._back.release()


class Names(threading.local):
    """Stands for the module uuid: names that are the same in each run, and different for each driver."""

    def start(self, driver: int) -> None:
        self.driver, self.count = driver, 0

    def uuid4(self) -> Any:
        self.count += 1
        return SimpleNamespace(hex=f"{self.driver:04x}{self.count:04x}{'0' * 24}")


names = Names()


def interleave(num_rows: int = 4, limit: int = 1_000_000) -> tuple[int, int, list[str]]:
    """Go through the states that two drivers can bring about; in each, both may die and a third one takes over.

    The second driver replays the failed rows if it finds the job complete. All states, unless there are more than
    `limit`: then some, at random.

    Returns the number of states, of ends (both have ended by themselves), and what went wrong.
    """
    identity.uuid = log.uuid = names  # type: ignore[attr-defined]
    names.start(2)
    seen: set[int] = set()
    wrong: list[str] = []
    todo: list[tuple[int, ...]] = [()]
    pick = random.Random(0)
    ends = 0
    try:
        while todo and len(seen) < limit:
            schedule = todo.pop(pick.randrange(len(todo)) if pick.random() < 0.1 else -1)
            at = Interleaving(schedule, num_rows)
            state = at.state()
            if state in seen:
                continue
            seen.add(state)
            ends += not at.alive
            if not at.alive and set(at.outcome) - {"done", "stopped"}:
                wrong.append(f"{schedule}: {at.outcome}")
            rest = Store(Bucket(dict(at.objects)), "o")
            third = drive(rest, num_rows, Orderly, random.Random(0))
            problem = problems(rest, num_rows) if third.complete else third.reason
            if problem:
                wrong.append(f"{schedule}: {problem}")
            todo += [(*schedule, i) for i in at.alive]
    finally:
        identity.uuid = log.uuid = uuid  # type: ignore[attr-defined]
    return len(seen), ends, wrong


def main() -> int:
    from common import describe_machine, table, write_result

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crashes", type=int, default=12_000, help="at least so many, over all stores")
    parser.add_argument("--uri", help="an object store to use instead; nothing is written to the results")
    options = parser.parse_args()
    store.RETRY_SECONDS = (0.0,) * 4
    rows, wrong, total = [], [], 0
    kinds = ("bucket",) if options.uri else KINDS
    for kind in kinds:
        start, crashes, jobs = time.monotonic(), 0, 0
        while crashes < options.crashes / len(kinds):
            num_crashes, problem = crash_job(kind, jobs, options.uri)
            crashes, jobs = crashes + num_crashes, jobs + 1
            wrong += [f"{kind}, seed {jobs - 1}: {problem}"] if problem else []
        total += crashes
        rows.append([kind, f"{jobs:,}", f"{crashes:,}", len(wrong), f"{time.monotonic() - start:.0f} s"])
        print(rows[-1], wrong[:3], flush=True)
    if options.uri:
        return bool(wrong)
    start = time.monotonic()
    states, ends, bad = interleave(num_rows=1)
    print(states, ends, bad[:5], flush=True)
    text = [
        "# Crashes of the commit protocol",
        f"`python benchmarks/commit_crashes.py --crashes {options.crashes}`",
        describe_machine(),
        f"{total:,} crashes, {len(wrong)} violations:",
        table(["store", "jobs", "crashes", "violations", "time"], rows),
        f"Two drivers at once, every interleaving of their operations on the store: {states:,} states, {ends} of them "
        f"ends; from each, a third driver makes the table whole after the death of both: {len(bad)} violations "
        f"({time.monotonic() - start:.0f} s).",
    ]
    write_result("commit_crashes.md", "\n\n".join(text))
    print("\n".join([*wrong, *bad]))
    return bool(wrong or bad)


if __name__ == "__main__":
    sys.exit(main())
