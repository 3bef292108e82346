"""Figure: the driver of `rayinfer run` is killed at random points, and the same command typed again until it ends.

    python benchmarks/kill_driver.py --kills 100

One Ray cluster serves all drivers, so that a try costs the driver's start and the tiny model's, not Ray's. Each driver
gets SIGKILL after a random time, from its first instruction to a little after the time that the fastest one took; when
a driver comes through, its table is compared row by row with that of a run without faults, and the next job begins.
Also told: the time of a run after success, and at each kill the time since the last commit (or the driver's start):
what an engine computed in it, it may compute again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from common import ROOT, describe_machine, load_rows, table, write_result
from tiny_llama import save_tiny_llama

from rayinfer.pipelines.verify import verify

FLUSH_SECONDS = 2.0


def write_job(folder: Path, out: str, num_rows: int) -> Path:
    job = {
        "source": {"uri": "in.parquet"},
        "prompt": "{{ text }}",
        "model": {"model_source": "model", "max_model_len": 256, "max_num_seqs": 16},
        "sampling": {"temperature": 0, "max_tokens": 12},
        "sink": {"uri": out, "rows_per_part": 8, "flush_seconds": FLUSH_SECONDS},
    }
    texts = [f"{row['title']} is" for row in load_rows(num_rows)]
    pq.write_table(pa.table({"text": texts}), folder / "in.parquet", row_group_size=16)
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start(job: Path, address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rayinfer.pipelines.cli", "run", str(job), "--address", address]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def read(out: Path) -> dict[str, Any]:
    rows = pq.read_table(out).to_pylist()
    found = {row["row_key"]: (row["text"], row["generated_text"], row["error_type"]) for row in rows}
    return found if len(found) == len(rows) else {"doubled": len(rows) - len(found)}


def since_commit(out: Path, begin: float) -> float:
    """Seconds since the last commit to `out`, or since `begin` if that is later."""
    entries = [path.stat().st_mtime for path in out.glob("_rayinfer/log-*/*.json")]
    return time.time() - max([begin, *entries])


def main() -> int:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pick = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-driver-"))
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    address = ray.get_runtime_context().gcs_address
    kills = jobs = tries = 0
    wrong: list[str] = []
    undone: list[float] = []
    begin = time.monotonic()
    try:
        save_tiny_llama(folder / "model", times=4)
        job = write_job(folder, "whole", options.rows)
        clock = time.monotonic()
        process = start(job, address)
        _, err = process.communicate()
        if process.returncode != 0:
            sys.exit(f"the run without faults exits with {process.returncode}: {err.decode()[-2000:]}")
        usual = time.monotonic() - clock
        whole = read(folder / "whole")
        clock = time.monotonic()
        start(job, address).communicate()
        again = time.monotonic() - clock
        while kills < options.kills:
            jobs += 1
            job = write_job(folder, f"out{jobs}", options.rows)
            whole_run = True  # until a try of this job was killed
            while True:
                begun, process = time.time(), start(job, address)
                tries += 1
                try:
                    _, err = process.communicate(timeout=pick.uniform(0, 1.1 * usual) if kills < options.kills else 600)
                    if process.returncode == 0:
                        usual = min(usual, time.time() - begun) if whole_run else usual
                        break
                    whole_run = False
                    wrong.append(f"job {jobs}: a driver exits with {process.returncode}: {err.decode()[-300:]}")
                    if len(wrong) > 5:
                        break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    kills, whole_run = kills + 1, False
                    undone.append(since_commit(folder / f"out{jobs}", begun))
            if read(folder / f"out{jobs}") != whole:
                wrong.append(f"job {jobs}: the table is not that of the run without faults")
            wrong += [f"job {jobs}: {line}" for line in verify(str(folder / f"out{jobs}"))[1]]
            print(f"{kills} kills, {jobs} jobs, {tries} tries, {len(wrong)} wrong {wrong[:3]}", flush=True)
            if len(wrong) > 5:
                break
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    rows = [
        ["kills", f"{kills}"],
        ["jobs that ended whole, by key and text", f"{jobs - len(wrong)} of {jobs}"],
        ["starts of a driver", f"{tries}"],
        ["run without faults, the fastest", f"{usual:.1f} s"],
        ["the same command after success", f"{again:.1f} s (target: 10 s)"],
        ["flush interval", f"{FLUSH_SECONDS:.0f} s"],
        ["from the last commit, or the driver's start, to the kill, longest", f"{max(undone):.1f} s (target: 60 s)"],
        ["time", f"{time.monotonic() - begin:.0f} s"],
    ]
    text = ["# Drivers killed at random points", f"`python benchmarks/kill_driver.py --kills {options.kills}`"]
    text += [describe_machine(), table(["what", "figure"], rows), *wrong]
    print(write_result("kill_driver.md", "\n\n".join(text)).read_text(encoding="utf-8"))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
