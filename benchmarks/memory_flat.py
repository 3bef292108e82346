"""Figure 4: memory of the driver, of the actors and of the engine's process does not grow with the table.

    python benchmarks/memory_flat.py --rows 100 --times 20

Runs a table of n rows and one of 20 n rows, each in a process of its own, from Parquet through the processor to
Parquet, and compares the largest resident memory of the driver, of an actor (tokenizer or LLMProcessor) and of the
engine's process, sampled four times a second. Shared pages (Ray's object store among them) are left out: they are the
store's, not the process's. Exit status 1 when one grew by 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, describe_machine, gguf_path, load_rows, table, write_result

LIMIT = 1.10


class Sampler(threading.Thread):
    """Watches the largest private memory, in MiB, of this process, of its actors and of their engine."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"driver": 0.0, "actor": 0.0, "engine": 0.0}
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.25):
            self._see("driver", psutil.Process())
            for process in psutil.Process().children(recursive=True):
                try:
                    line = " ".join(process.cmdline())
                    if "engine_child" in line:
                        self._see("engine", process)
                    elif "MapWorker" in line:  # Ray names an actor's process after its class
                        self._see("actor", process)
                except psutil.Error:
                    continue

    def _see(self, name: str, process: psutil.Process) -> None:
        memory = process.memory_info()
        private = (memory.rss - getattr(memory, "shared", 0)) / 2**20
        self.peak[name] = max(self.peak[name], private)

    def stop(self) -> dict[str, float]:
        self._stop_now.set()
        self.join()
        return self.peak


def write_table(folder: str, num_rows: int) -> None:
    """Write folder/in: `num_rows` rows in files of 500, with a key of their own, for the texts may repeat."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"key": index, "title": row["title"]} for index, row in enumerate(load_rows(num_rows, "wiki"))]
    (Path(folder) / "in").mkdir()
    for first in range(0, num_rows, 500):
        part = pa.Table.from_pylist(rows[first : first + 500])
        pq.write_table(part, Path(folder) / "in" / f"{first:06d}.parquet")


def run(folder: str, num_rows: int) -> dict[str, Any]:
    """One job from folder/in to folder/out; returns the peaks."""
    import pyarrow.parquet as pq
    import ray

    from rayinfer.processors import EngineProcessorConfig, build_processor

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=max(os.cpu_count() or 1, 2))
    config = EngineProcessorConfig(
        model_source=str(gguf_path("smollm2")),
        engine_kwargs=dict(max_model_len=256, max_num_seqs=32, cpu_kv_cache_gib=0.25),
        batch_size=32,
        concurrency=1,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: dict(
            key=row["key"],
            prompt=f"{row['title']} is",
            sampling_params=dict(temperature=0, max_tokens=4),
        ),
        postprocess=lambda row: dict(key=row["key"], text=row["generated_text"], error=row["error_type"]),
    )
    sampler = Sampler()
    sampler.start()
    processor(ray.data.read_parquet(f"{folder}/in")).write_parquet(f"{folder}/out")
    peak = sampler.stop()
    done = pq.read_table(f"{folder}/out", columns=["key"])["key"].to_pylist()
    if sorted(done) != list(range(num_rows)):
        raise RuntimeError(f"{num_rows} rows in, {len(done)} rows out, {len(set(done))} different ones")
    return {"rows": num_rows, **peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--folder", help="run the table in this folder alone, in this process")
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(run(options.folder, options.rows)))
        return 0
    results = []
    for num_rows in (options.rows, options.rows * options.times):
        with tempfile.TemporaryDirectory() as folder:
            write_table(folder, num_rows)
            command = [sys.executable, __file__, "--folder", folder, "--rows", str(num_rows)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=ROOT)
        if result.returncode != 0:
            sys.exit(f"{num_rows} rows: {result.stderr[-3000:]}")
        results.append(json.loads(result.stdout.strip().splitlines()[-1]))
        print(results[-1], flush=True)
    small, large = results
    growth = {name: large[name] / small[name] for name in ("driver", "actor", "engine")}
    body = [
        [name, f"{small[name]:.0f} MiB", f"{large[name]:.0f} MiB", f"{100 * (growth[name] - 1):+.1f} %", "< 10 %"]
        for name in growth
    ]
    header = ["process", f"{small['rows']} rows", f"{large['rows']} rows", "growth", "target"]
    command_line = f"`python benchmarks/memory_flat.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
    text = "\n\n".join(["# Largest private memory", command_line, describe_machine(), table(header, body)])
    print(write_result("memory_flat.md", text).read_text(encoding="utf-8"))
    return 0 if max(growth.values()) < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
