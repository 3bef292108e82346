"""Where the fault kinds of `benchmarks.faults` play: one Ray, a tiny model, jobs through the command line, the oracle.

A driver is the command line in a forked process, so that it can be killed, and costs no import. Faults inside workers
and engines come from fault_hooks.py.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.tiny_llama import save_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
NUM_ROWS, NUM_FILES = 64, 2
MAX_TOKENS = 24
ROWS_PER_PART = 8
DEADLINE = 420.0  # seconds for any command, on a machine that others use too
COMPARED = ("text", "generated_text", "finish_reason", "num_input_tokens", "num_generated_tokens")


class Wrong(Exception):  # noqa: N818  # what a fault kind found, not an error of its own
    """A promise was broken; the text says which."""


class Host:
    """A process that runs commands one after the other: imports and Ray's start cost as much as a job."""

    def __init__(self, context: Any, address: str):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, address), daemon=True)
        self.process.start()
        theirs.close()
        self.busy = False


def _serve(pipe: Any, address: str) -> None:
    sys.modules["sitecustomize"].driver = True  # type: ignore[attr-defined]
    while True:
        try:
            args, log, once = pipe.recv()
        except EOFError:
            return
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        if not once and address:
            import ray

            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        code = _command(args)
        sys.stdout.flush()
        if once:
            sys.exit(code)
        pipe.send(code)


def _command(args: list[str]) -> int:
    """What `rayinfer ARGS` exits with; `call module:function ARGS` calls a function instead."""
    try:
        if args[0] == "call":
            module, _, name = args[1].partition(":")
            getattr(importlib.import_module(module), name)(*args[2:])
            return 0
        sys.argv = ["rayinfer", *args]
        from rayinfer.pipelines.cli import main

        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 70
    return 0


class Driver:
    """`rayinfer ...` on a host. `once`: a process of its own, which connects to Ray and ends as the command does."""

    def __init__(self, host: Host, args: Iterable[Any], log: Path, once: bool):
        self.host, self.log, self.once = host, log, once
        self.begin, self.seconds, self.code = time.monotonic(), 0.0, None
        host.busy = True
        host.pipe.send(([str(arg) for arg in args], str(log), once))

    @property
    def running(self) -> bool:
        if self.code is None:
            self._look(0)
        return self.code is None

    def _look(self, seconds: float) -> None:
        pipe, process = self.host.pipe, self.host.process
        multiprocessing.connection.wait([pipe, process.sentinel], seconds)
        try:
            if pipe.poll():
                self.code, self.host.busy = pipe.recv(), False
        except (EOFError, ConnectionError):
            process.join(30)
        if self.code is None and not process.is_alive():
            self.code = process.exitcode
        self.seconds = time.monotonic() - self.begin

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.running:
            os.kill(self.host.process.pid, number)

    def wait(self, seconds: float = DEADLINE) -> int:
        """The exit code; minus the signal for one that was killed. Wrong if it does not end."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            self._look(1.0)
        if self.running:
            self.kill()
            self._look(30)
            raise Wrong(f"the driver did not end within {seconds:.0f} s: {self.told()[-800:]}")
        return self.code

    def told(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class World:
    """One Ray with the hooks in all of its processes; `trial` begins a run of a fault kind."""

    def __init__(self, folder: Path, num_cpus: int = 2, address: str = ""):
        self.folder, self.site = folder, folder / "site"
        self.site.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("fault_hooks.py"), self.site / "sitecustomize.py")
        os.environ |= {"PYTHONPATH": f"{self.site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        # On a busy machine a raylet that lives may be late; one that is dead refuses the connection at once.
        os.environ |= {"RAY_health_check_timeout_ms": "60000", "RAY_health_check_failure_threshold": "8"}
        fsspec.register_implementation("s3", "benchmarks.fault_bucket.DiskBucket", clobber=True)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["benchmarks.fault_preload"])
        (self.site / "letters.json").write_text(json.dumps(save_tiny_llama(folder / "model")))
        save_tiny_llama(folder / "other-model", seed=1)
        (folder / "in").mkdir()
        for i in range(NUM_FILES):
            texts = [f"row {k}" for k in range(i, NUM_ROWS, NUM_FILES)]
            pq.write_table(pa.table({"text": texts}), folder / "in" / f"{i}.parquet")
        self.num_cpus = num_cpus
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        self.commit = told.stdout.strip() or "unknown"
        self._expected: dict[str, dict[str, str]] = {}
        self._count = 0
        self.usual = 0.0  # seconds of a run without faults
        self.passages = {"step": 0, "driver": 0, "worker": 0}  # of a run without faults: steps, seams of the store
        self.hosts: list[Host] = []
        self.nodes: Any = None  # of fault_cluster, while they take the place of this world's Ray
        self.address = address
        if not address:
            self.start_ray()

    def start_ray(self) -> None:
        import ray

        ray.init(address="local", num_cpus=self.num_cpus, include_dashboard=False, log_to_driver=False)
        self.address = ray.get_runtime_context().gcs_address

    def stop_ray(self) -> None:
        import ray

        self.end_hosts()
        ray.shutdown()
        self.address = ""

    def end_hosts(self) -> None:
        for host in self.hosts:
            host.process.kill()
            host.process.join()
        self.hosts.clear()

    def host(self, once: bool) -> Host:
        self.hosts = [host for host in self.hosts if host.process.is_alive()]
        for host in self.hosts:
            if not host.busy and not once:
                return host
        host = Host(self.context, self.address)
        self.hosts += [] if once else [host]
        return host

    def job(self, out: str, source: str = "in", **parts: Any) -> dict[str, Any]:
        engine = {"max_model_len": 128, "max_num_seqs": 8, "cpu_kv_cache_gib": 0.01, "num_threads": 1}
        sink = {"uri": out, "rows_per_part": ROWS_PER_PART, "flush_seconds": 5}
        return {
            "source": {"uri": source},
            "prompt": "Say: {{ text }}",
            "model": {"model_source": "model", **engine},
            "sampling": {"temperature": 0, "max_tokens": MAX_TOKENS},
            "sink": sink,
            **parts,
        }

    def trial(self, kind: str, seed: int) -> Trial:
        self._count += 1
        return Trial(self, f"{kind}-{seed}-{self._count}", seed)

    def expected(self, **parts: Any) -> dict[str, str]:
        """The oracle: hash by row key, of a run without a fault; made once for a job."""
        name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        if name not in self._expected:
            trial = Trial(self, f"whole-{name}", 0)
            count = {"at": [], "do": "nothing"}
            trial.strike(
                {"seam": "step", **count},
                *({"seam": "store", "role": role, **count} for role in ("driver", "worker")),
            )
            driver = trial.run(**parts)
            if not parts:
                self.usual, self.whole = driver.seconds, trial
                for number, seam in enumerate(self.passages):
                    passed = self.site / f"passed-{number}"  # not there where workers have no hooks
                    self.passages[seam] = passed.stat().st_size if passed.exists() else 0
            self._expected[name] = trial.rows()
            trial.end()
        return dict(self._expected[name])

    def engines(self) -> list[psutil.Process]:
        """Processes that ever held an engine and live."""
        found = []
        for path in (self.site / "engines").glob("*") if (self.site / "engines").exists() else ():
            try:
                process = psutil.Process(int(path.name))
                if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= path.stat().st_mtime + 1:
                    found.append(process)
                    continue
            except psutil.Error:
                pass
            path.unlink(missing_ok=True)
        return found

    def workers(self) -> list[psutil.Process]:
        """Ray's workers on this machine that belong to this world."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if any(line.startswith("ray::") for line in process.cmdline()[:1]):
                    found.append(process)
            except psutil.Error:
                continue
        return found


class Trial:
    """One job under one fault: its folder, its faults, its drivers, and what was found in the end."""

    def __init__(self, world: World, name: str, seed: int):
        self.world, self.name, self.seed = world, name, seed
        self.pick = random.Random(name.rpartition("-")[0])
        self.out = world.folder / name
        self.drivers: list[Driver] = []
        self.found: Counter[str] = Counter(lost=0, doubled=0, altered=0, struck=0)
        self.strike()

    def strike(self, *faults: dict[str, Any]) -> None:
        """What is to happen from now on, instead of what was; the count of strikes before is kept."""
        site = self.world.site
        (site / "plan.json").unlink(missing_ok=True)
        self.found["struck"] += self.struck()
        for path in [*site.glob("passed-*"), *site.glob("struck-*")]:
            path.unlink()
        if faults:
            (site / "plan.next").write_text(json.dumps(faults))
            (site / "plan.next").rename(site / "plan.json")

    def struck(self) -> int:
        return sum(len(path.read_text().splitlines()) for path in self.world.site.glob("struck-*"))

    def write_job(self, **parts: Any) -> Path:
        path = self.world.folder / f"{self.name}.yaml"
        out = parts.pop("out", self.name)
        path.write_text(yaml.safe_dump(self.world.job(out, **parts)))
        return path

    def start(self, *args: Any, once: bool = False, command: tuple[Any, ...] = (), **parts: Any) -> Driver:
        """Begin `rayinfer run` of the job, or another command."""
        options = ["--address", self.world.address] if self.world.address else []
        log = self.world.folder / f"{self.name}.{len(self.drivers)}.log"
        words = list(command) or ["run", self.write_job(**parts), *options]
        driver = Driver(self.world.host(once), [*words, *args], log, once)
        self.drivers.append(driver)
        return driver

    def run(self, *args: Any, want: int | Iterable[int] = 0, **parts: Any) -> Driver:
        """A driver from its start to its end, whose exit code is to be `want`."""
        driver = self.start(*args, **parts)
        self.check_code(driver, want)
        return driver

    def check_code(self, driver: Driver, want: int | Iterable[int] = 0) -> None:
        code = driver.wait()
        if code not in ({want} if isinstance(want, int) else set(want)):
            raise Wrong(f"exit code {code}, not {want}: {driver.told()[-1200:]}")

    def resume(self, tries: int = 5, **parts: Any) -> Driver:
        """The same command again until it is complete."""
        for _ in range(tries):
            driver = self.run(want=(0, 1), **parts)
            if driver.code == 0:
                return driver
        raise Wrong(f"not complete after {tries} more runs: {driver.told()[-800:]}")

    def wait_commits(self, number: int, driver: Driver | None = None) -> None:
        self.wait_for(
            lambda: self.num_commits() >= number or (driver and not driver.running), f"{number} commits", driver
        )

    def num_commits(self) -> int:
        total = 0
        for path in self.out.glob("_rayinfer/log-*/*.json"):
            try:
                total += '"commit"' in path.read_text()
            except FileNotFoundError:
                continue
        return total

    def wait_for(self, condition: Callable[[], Any], what: str, driver: Driver | None = None) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > deadline:
                told = driver.told()[-800:] if driver else ""
                raise Wrong(f"{what} did not happen within {DEADLINE:.0f} s {told}")
            time.sleep(0.03)

    def rows(self) -> dict[str, str]:
        """Row key -> hash of all that the row says, of the table as any reader sees it."""
        rows, _ = read_table(self.out)
        return rows

    def reconcile(
        self, expected: dict[str, str], failed: dict[str, str] | None = None, strikes: int = 0, by_log: bool = True
    ) -> None:
        """Count lost, doubled and altered rows; `failed` rows must have this error type instead of an answer."""
        from rayinfer.pipelines.verify import verify

        self.strike()
        want = expected | (failed or {})
        rows, counts = compare(self.out, want)
        self.found.update(counts)
        uri = f"s3://{self.out}" if self.in_bucket() else str(self.out)
        facts, wrong = verify(uri) if by_log else ([], [])
        if wrong:
            raise Wrong(f"verify: {wrong}")
        told = dict(facts).get("rows", "")
        if by_log and not told.startswith(f"{len(want):,} in, {len(want) - len(failed or {}):,} ok"):
            raise Wrong(f"verify counts {told}, the table has {len(rows)} rows")
        if bad := +counts:
            sample = [key for key in want if rows.get(key) != want[key]][:3]
            raise Wrong(f"{bad}: {[(key, rows.get(key), want[key]) for key in sample]}")
        if self.found["struck"] < strikes:
            raise Wrong(f"the fault struck {self.found['struck']} times, not {strikes}: nothing was tried")

    def in_bucket(self) -> bool:
        return any("s3://" in path.read_text() for path in self.world.folder.glob(f"{self.name}.yaml"))

    def end(self) -> None:
        """No engine may outlive its job."""
        for driver in self.drivers:
            if driver.running:
                driver.kill()
                driver.wait()
        self.strike()
        deadline = time.monotonic() + 90
        while engines := self.world.engines():
            if time.monotonic() > deadline:
                shown = [(process.pid, process.status(), process.cmdline()[:3]) for process in engines]
                for process in engines:
                    process.kill()
                raise Wrong(f"{len(engines)} engine processes are left over: {shown}")
            time.sleep(0.1)

    def clean(self) -> None:
        for path in self.world.folder.glob(f"{self.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_table(folder: Path) -> tuple[dict[str, str], int]:
    """Hash by row key, and the number of rows whose key was there before; read without our code."""
    rows: dict[str, str] = {}
    copies = 0
    for path in sorted(folder.glob("part-*")):
        table = pq.read_table(path)
        for row in table.to_pylist():
            copies += row["row_key"] in rows
            rows[row["row_key"]] = row["error_type"] or row_hash(row)
    return rows, copies


def compare(folder: Path, want: dict[str, str]) -> tuple[dict[str, str], Counter[str]]:
    """The rows of a table, and how many of those wanted are lost, there twice (or not wanted), or not as wanted."""
    rows, copies = read_table(folder)
    counts = Counter(lost=len(want.keys() - rows.keys()), doubled=copies + len(rows.keys() - want.keys()))
    counts["altered"] = sum(rows[key] != want[key] for key in want.keys() & rows.keys())
    return rows, counts


def row_hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([row.get(name) for name in COMPARED]).encode()).hexdigest()[:20]
