"""Figure 8: what a row costs besides the engine, and whether that stays the same as the table grows.

    python benchmarks/overhead.py --rows 10000 100000

For each size a process of its own runs the rows through `LLM.generate` as token ids (the engine), then the same rows
as a whole job, from Parquet to Parquet. The job's time outside of its start, less the engine's, by rows, is what
reading, tokenizing, Ray, columns, parts, the log and the check of all keys cost. The model is tiny, each row gets two
tokens. Wall time drifts with what else the machine does, so CPU time is told as well: of the driver, and of all other
processes except the engine's. What starts cost hides in the smallest size; the second table has none of it: what the
rows cost that one size has more than the one before.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, describe_machine, table, write_result
from tiny_llama import save_tiny_llama

ENGINE = dict(max_model_len=128, max_num_seqs=512, cpu_kv_cache_gib=0.2, num_threads=1, device="cpu")
MAX_TOKENS = 2
ROWS_PER_CALL, MOST_ROWS = 10_000, 100_000  # of LLM.generate
LOAD = os.getloadavg()


def run_engine(model: str, prompts: list[str]) -> float:
    """Seconds for the rows, tokenized before; of many rows, the first MOST_ROWS are run."""
    from rayinfer import LLM, SamplingParams

    llm = LLM(model, **ENGINE)
    ids = llm.get_tokenizer()(prompts[:MOST_ROWS], add_special_tokens=False)["input_ids"]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    asked = [{"prompt_token_ids": row} for row in ids]
    llm.generate(asked[:256], params, use_tqdm=False)
    begin = time.perf_counter()
    for start in range(0, len(asked), ROWS_PER_CALL):
        llm.generate(asked[start : start + ROWS_PER_CALL], params, use_tqdm=False)
    return (time.perf_counter() - begin) * len(prompts) / len(asked)


class Watch(threading.Thread):
    """CPU time by kind of process, of those that have ended too."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._spent: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            self.look()

    def look(self) -> dict[str, float]:
        driver = psutil.Process()
        self._spent[driver.pid] = "driver", sum(driver.cpu_times()[:2])
        for process in driver.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if line := " ".join(process.cmdline()):  # it has not just ended
                    kind = "engine" if "engine_child" in line else "others"
                    self._spent[process.pid] = kind, sum(process.cpu_times()[:2])
        kinds = ("driver", "engine", "others")
        return {kind: sum(seconds for its, seconds in list(self._spent.values()) if its == kind) for kind in kinds}

    def end(self) -> None:
        self._ended.set()
        self.join()


def run(folder: Path, num_rows: int) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from rich.console import Console

    from rayinfer.pipelines.job import JobSpec
    from rayinfer.pipelines.run import run_job

    model = str(folder / "model")
    save_tiny_llama(folder / "model")
    prompts = [f"row {i:07d} of the table" for i in range(num_rows)]
    engine = run_engine(model, prompts)
    (folder / "in").mkdir()
    for first in range(0, num_rows, 50_000):
        part = pa.table({"text": prompts[first : first + 50_000]})
        pq.write_table(part, folder / "in" / f"{first:08d}.parquet", row_group_size=8192)
    del prompts
    spec = JobSpec.parse(
        {
            "source": {"uri": str(folder / "in")},
            "prompt": "{{ text }}",
            "model": {"model_source": model, **ENGINE},
            "sampling": {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True},
            "sink": {"uri": str(folder / "out")},
        }
    )
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=3)
    watch = Watch()
    before = watch.look()
    watch.start()
    result = run_job(spec, console=Console(file=io.StringIO()))
    watch.end()
    spent = {kind: seconds - before[kind] for kind, seconds in watch.look().items()}
    ray.shutdown()
    if not (result.complete and result.num_ok == num_rows):
        sys.exit(f"{result.status}: {result.reason}")
    return {"rows": num_rows, "engine": engine, "job": result.seconds, "cpu": spent}


def figures(found: dict[str, Any], less: dict[str, Any] | None = None) -> list[str]:
    """Microseconds a row, of all rows or of those that a smaller size has not."""

    def values(size: dict[str, Any] | None) -> list[float]:
        if size is None:
            return [0.0] * 8
        job = [size["job"].get(name, 0.0) for name in ("check", "run", "end")]
        cpu = [size["cpu"][kind] for kind in ("engine", "driver", "others")]
        return [size["engine"], *job, sum(job) - size["engine"], *cpu]

    num_rows = found["rows"] - (less["rows"] if less else 0)
    return [f"{1e6 * (a - b) / num_rows:.0f}" for a, b in zip(values(found), values(less), strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", action="store_true", help="one size, in this process")
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(Path(folder), options.rows[0])))
        return 0
    sizes = []
    for num_rows in options.rows:
        command = [sys.executable, __file__, "--one", "--rows", str(num_rows)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if result.returncode != 0:
            sys.exit(f"{num_rows} rows: {result.stderr[-3000:]}")
        sizes.append(json.loads(result.stdout.strip().splitlines()[-1]))
        print(sizes[-1], flush=True)
    rows, more = [], []
    for number, found in enumerate(sizes):
        rows.append([f"{found['rows']:,}", *figures(found)])
        if number:
            less = sizes[number - 1]
            more.append([f"{less['rows']:,} to {found['rows']:,}", *figures(found, less)])
    header = ["rows", "engine alone, us a row", "job: check", "run", "end", "besides the engine"]
    header += ["CPU: engine in the job", "CPU: driver", "CPU: others"]
    command = f"`python benchmarks/overhead.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
    parts = [
        "# What a row costs besides the engine",
        command,
        describe_machine(),
        f"load average before: {LOAD[0]:.1f}",
    ]
    text = "\n\n".join([*parts, table(header, rows), table(header, more)])
    print(write_result("overhead.md", text).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
