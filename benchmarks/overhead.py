"""Figure 8: what a row costs besides the engine, and whether that stays the same as the table grows.

    python benchmarks/overhead.py --rows 10000 100000

For each size a process of its own runs the rows through `LLM.generate` as token ids (the engine), then the same rows
as a whole job, from Parquet to Parquet. The job's time outside of its start, less the engine's, by rows, is what
reading, tokenizing, Ray, columns, parts, the log and the check of all keys cost. The model is tiny, each row gets two
tokens. Wall time drifts with what else the machine does, so CPU time is told as well: of the driver, and of all other
processes except the engine's. And the largest private memory of the driver.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, describe_machine, table, write_result
from memory_flat import Sampler
from tiny_llama import save_tiny_llama

ENGINE = dict(max_model_len=128, max_num_seqs=512, cpu_kv_cache_gib=0.2, num_threads=1, device="cpu")
MAX_TOKENS = 2
ROWS_PER_CALL = 10_000  # of LLM.generate


def run_engine(model: str, prompts: list[str]) -> float:
    """Seconds for the rows, tokenized before."""
    from rayinfer import LLM, SamplingParams

    llm = LLM(model, **ENGINE)
    ids = llm.get_tokenizer()(prompts, add_special_tokens=False)["input_ids"]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    asked = [{"prompt_token_ids": row} for row in ids]
    llm.generate(asked[:256], params, use_tqdm=False)
    begin = time.perf_counter()
    for start in range(0, len(asked), ROWS_PER_CALL):
        llm.generate(asked[start : start + ROWS_PER_CALL], params, use_tqdm=False)
    return time.perf_counter() - begin


def cpu_seconds() -> dict[str, float]:
    """User and system time so far of this process, of the engine's actor, and of Ray's other processes."""
    spent = {"driver": sum(psutil.Process().cpu_times()[:2]), "engine": 0.0, "others": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            kind = "engine" if "LLMProcessor" in " ".join(process.cmdline()) else "others"
            spent[kind] += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return spent


def run(folder: Path, num_rows: int) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from rich.console import Console

    from rayinfer.pipelines import run as run_module
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
    sampler = Sampler()
    sampler.start()
    before, during = cpu_seconds(), {}
    finish = run_module._finish

    def last_look(*args: Any) -> None:
        during.update(cpu_seconds())  # the workers still live
        finish(*args)

    run_module._finish = last_look
    result = run_job(spec, console=Console(file=io.StringIO()))
    peak = sampler.stop()
    ray.shutdown()
    if not (result.complete and result.num_ok == num_rows):
        sys.exit(f"{result.status}: {result.reason}")
    spent = {kind: during[kind] - before[kind] for kind in before}
    return {"rows": num_rows, "engine": engine, "job": result.seconds, "driver": peak["driver"], "cpu": spent}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", action="store_true", help="one size, in this process")
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(Path(folder), options.rows[0])))
        return 0
    rows = []
    for num_rows in options.rows:
        command = [sys.executable, __file__, "--one", "--rows", str(num_rows)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if result.returncode != 0:
            sys.exit(f"{num_rows} rows: {result.stderr[-3000:]}")
        found = json.loads(result.stdout.strip().splitlines()[-1])
        print(found, flush=True)
        job = {name: found["job"].get(name, 0.0) for name in ("check", "run", "end")}
        each = [1e6 * seconds / num_rows for seconds in (found["engine"], *job.values())]
        other = sum(each[1:]) - each[0]
        spent = [1e6 * found["cpu"][kind] / num_rows for kind in ("driver", "others")]
        figures = [f"{one:.0f}" for one in (*each, other, *spent)]
        rows.append([f"{num_rows:,}", *figures, f"{found['driver']:.0f} MiB"])
    header = ["rows", "engine alone, us a row", "job: check", "run", "end", "besides the engine"]
    header += ["CPU: driver", "CPU: others", "driver's memory"]
    command = f"`python benchmarks/overhead.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
    text = "\n\n".join(["# What a row costs besides the engine", command, describe_machine(), table(header, rows)])
    print(write_result("overhead.md", text).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
