"""Figure 8, second part: what the driver holds of a job's keys and rows, by simulation.

    python benchmarks/keys_scale.py --rows 1000000 100000000

For each size, in a process of its own: the census of a table of Parquet files of 1,000,000 rows (footers' figures; no
row exists), its key digest, the search for duplicates among as many ids, then the whole commit log of a run that ends:
rows are committed in parts of 5,000, out of order as engines finish them, loaded again by a second driver, and the
units of a half-done job are made. Told is how far the resident memory grew at its largest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from common import ROOT, describe_machine, table, write_result

PART_ROWS, FILE_ROWS, WINDOW = 5000, 1_000_000, 50_000


class Peak(threading.Thread):
    """The largest resident memory of this process, looked at fifty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.largest, self.ended = psutil.Process(), 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.largest = max(self.largest, self.process.memory_info().rss)


def simulate(num_rows: int, with_keys: bool) -> dict[str, Any]:
    from rayinfer.pipelines.job import SourceSpec
    from rayinfer.pipelines.keys import KeyDigest, find_duplicate, pack_rows
    from rayinfer.pipelines.log import CommitLog, Part
    from rayinfer.pipelines.sources import Census, Unit
    from rayinfer.pipelines.store import open_store

    peak = Peak()
    base = peak.process.memory_info().rss
    found: dict[str, Any] = {"rows": num_rows}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        nonlocal peak
        peak = Peak()
        peak.start()
        begin = time.monotonic()
        value = work()
        peak.ended.set()
        peak.join()
        found[name] = {"seconds": time.monotonic() - begin, "mib": (peak.largest - base) / 2**20}
        return value

    def units() -> list[Unit]:
        firsts = range(0, num_rows, FILE_ROWS)
        return [
            Unit(
                f"bucket/in/{first:012d}.parquet",
                f"{first:012d}.parquet",
                0,
                min(FILE_ROWS, num_rows - first),
                0,
                first,
            )
            for first in firsts
        ]

    census = Census(SourceSpec(uri="s3://bucket/in"), "parquet", pa.schema([("text", pa.string())]), units(), 1, 0)
    if with_keys:
        stage("key digest", census.key_digest)

        def ids() -> Iterator[list[str]]:
            for start in range(0, num_rows, 2**16):
                yield [f"id-{i}" for i in range(start, min(start + 2**16, num_rows))]

        if stage("search for duplicates", lambda: find_duplicate(ids, KeyDigest())) is not None:
            sys.exit("a duplicate that is none")
    rng = np.random.default_rng(0)

    def part(rows: np.ndarray, name: str) -> Part:
        return Part(name, len(rows), 10**6, "0" * 64, "0" * 32, pack_rows(rows), {}, 10**6, 10**6, 0)

    def commit(folder: str, half: bool = False) -> CommitLog:
        log = CommitLog(open_store(folder), "0" * 8, num_rows)
        log.store.size = lambda name: 10**6  # type: ignore[method-assign]  # parts are not written here
        log.start()
        for start in range(0, num_rows // 2 if half else num_rows, WINDOW):
            rows = rng.permutation(np.arange(start, min(start + WINDOW, num_rows)))
            log.commit(
                [
                    part(np.sort(some), f"part-{log.length}")
                    for some in np.split(rows, range(PART_ROWS, len(rows), PART_ROWS))
                ]
            )
        return log

    def load(folder: str) -> None:
        log = CommitLog(open_store(folder), "0" * 8, num_rows)
        log.load()
        if log.num_missing:
            sys.exit(f"{log.num_missing} rows are missing")

    with tempfile.TemporaryDirectory() as folder:
        stage("commit log", lambda: commit(folder).num_missing)
        stage("loaded by a resumed job", lambda: load(folder))
    with tempfile.TemporaryDirectory() as folder:
        stage("half a log, and units left", lambda: len(census.units_left(commit(folder, half=True).done)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 100_000_000])
    parser.add_argument("--no-keys", action="store_true", help="the log alone: hashing 10^8 keys takes minutes")
    parser.add_argument("--one", action="store_true", help="one size, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(simulate(options.rows[0], not options.no_keys)))
        return 0
    rows = []
    for num_rows in options.rows:
        command = [sys.executable, __file__, "--one", "--rows", str(num_rows), *["--no-keys"] * options.no_keys]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if result.returncode != 0:
            sys.exit(f"{num_rows} rows: {result.stderr[-3000:]}")
        found = json.loads(result.stdout.strip().splitlines()[-1])
        print(found, flush=True)
        for name, seen in found.items():
            if name != "rows":
                rows.append([f"{num_rows:,}", name, f"{seen['seconds']:.1f} s", f"{seen['mib']:.0f} MiB"])
    command = f"`python benchmarks/keys_scale.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
    header = ["rows", "what", "time", "memory above the start, at most"]
    text = "\n\n".join(["# Keys and rows on the driver", command, describe_machine(), table(header, rows)])
    print(write_result("keys_scale.md", text).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
