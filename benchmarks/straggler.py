"""Figure 5: one row of every batch is 50 times longer than the others; what the job's throughput loses.

    python benchmarks/straggler.py --batches 400

Two jobs, one after the other and again: as many rows, as many generated tokens, once evenly spread, once with a row in
every batch that takes 50 times the tokens of its neighbours. The engine by itself (`LLM.generate` of the same rows) is
timed too: its tokens are dearer where rows are long, which on a CPU shows, so what the job loses to stragglers is told
next to what the engine does. A last job has one batch alone: when is its first row committed, when its long row?
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import describe_machine, table, write_result
from tiny_llama import save_tiny_llama

BATCH, SHORT, TIMES = 32, 2, 50
TARGET = 0.95


class Ask:
    """The job's `preprocess`, with a number of tokens for each row."""

    def __init__(self, template: Any):
        self.template = template

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        source = row["source"]
        return {"prompt": source["text"], "sampling_params": {"max_tokens": source["num_tokens"], "ignore_eos": True}}


def lengths(num_batches: int, stragglers: bool, times: int = TIMES) -> list[int]:
    batch = [SHORT * times if i == BATCH // 2 else SHORT for i in range(BATCH)]
    if not stragglers:
        total = sum(batch)
        batch = [total // BATCH + (i < total % BATCH) for i in range(BATCH)]
    return batch * num_batches


def engine_of(num_tokens: list[int]) -> dict[str, Any]:
    length = 64 + max(num_tokens)
    return dict(max_model_len=length, max_num_seqs=2 * BATCH, cpu_kv_cache_gib=0.2, num_threads=1, device="cpu")


def run_engine(folder: Path, num_tokens: list[int]) -> float:
    """Seconds of LLM.generate for the rows, in this process."""
    from rayinfer import LLM, SamplingParams

    llm = LLM(str(folder / "model"), **engine_of(num_tokens))
    ids = llm.get_tokenizer()([f"row {i}" for i in range(len(num_tokens))], add_special_tokens=False)["input_ids"]
    params = [SamplingParams(temperature=0, max_tokens=number, ignore_eos=True) for number in num_tokens]
    asked = [{"prompt_token_ids": row} for row in ids]
    llm.generate(asked[: 4 * BATCH], params[: 4 * BATCH], use_tqdm=False)
    llm.reset_prefix_cache()
    begin = time.perf_counter()
    llm.generate(asked, params, use_tqdm=False)
    return time.perf_counter() - begin


def run(folder: Path, name: str, num_tokens: list[int]) -> tuple[float, list[float]]:
    """Seconds of the job's run stage, and when each commit was made, from its start."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from rich.console import Console

    from rayinfer.pipelines.job import JobSpec
    from rayinfer.pipelines.run import run_job

    texts = [f"row {i}" for i in range(len(num_tokens))]
    source = folder / f"{name}.parquet"
    pq.write_table(pa.table({"text": texts, "num_tokens": num_tokens}), source, row_group_size=1024)
    spec = JobSpec.parse(
        {
            "source": {"uri": str(source)},
            "prompt": "{{ text }}",
            "model": {"model_source": str(folder / "model"), **engine_of(num_tokens)},
            "sampling": {"temperature": 0},
            "processor": {"batch_size": BATCH},
            "sink": {"uri": str(folder / name), "rows_per_part": 4 * BATCH, "flush_seconds": 1},
        }
    )
    begin = time.time()
    result = run_job(spec, console=Console(file=io.StringIO()))
    if not (result.complete and result.num_generated_tokens == sum(num_tokens)):
        sys.exit(f"{name}: {result.status} {result.reason}, {result.num_generated_tokens} tokens")
    entries = [path for path in (folder / name).glob("_rayinfer/log-*/*.json") if "add" in path.read_text()]
    commits = [path.stat().st_mtime - begin for path in entries if json.loads(path.read_text())["add"]]
    return result.seconds["run"], sorted(commits)


def main() -> int:
    import ray

    from rayinfer.pipelines import run as run_module

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--times", type=int, default=4, help="size of the tiny model; the larger, the less Ray shows")
    options = parser.parse_args()
    run_module.RenderPrompt = Ask  # type: ignore[assignment, misc]
    rows: list[list[str]] = []
    ratios: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        save_tiny_llama(folder / "model", max_position_embeddings=8192, times=options.times)
        plans = {stragglers: lengths(options.batches, stragglers) for stragglers in (False, True)}
        tokens = sum(plans[True])
        ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=3)
        try:
            for pair in range(options.pairs):
                job = [run(folder, f"{kind}{pair}", plan)[0] for kind, plan in plans.items()]
                engine = [run_engine(folder, plan) for plan in plans.values()]
                ratios.append((job[0] / job[1], engine[0] / engine[1]))
                rows.append([f"{tokens / seconds:.0f}" for seconds in (*job, *engine)])
                rows[-1] += [f"{100 * ratio:.1f} %" for ratio in (*ratios[-1], ratios[-1][0] / ratios[-1][1])]
                print(rows[-1], flush=True)
            _, commits = run(folder, "alone", lengths(1, True, times=TIMES * 20))
        finally:
            ray.shutdown()
    header = ["job, tokens/s: all rows alike", "one row in 32 is 50 times longer", "engine: alike", "with long rows"]
    header += ["ratio, job", "ratio, engine", "job's to engine's (target: 95 %)"]
    median = statistics.median(job / engine for job, engine in ratios)
    text = "\n\n".join(
        [
            "# Stragglers",
            f"`python benchmarks/straggler.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
            describe_machine(),
            f"{options.batches * BATCH} rows of {SHORT} and {SHORT * TIMES} tokens (or as many of "
            f"{plans[False][-1]} to {plans[False][0]}), {tokens} tokens in each job, timed from the loaded engine on.",
            table(header, rows),
            f"Median: {100 * median:.1f} %. A job of one batch with a row of {20 * TIMES * SHORT} tokens: "
            f"its first commit is {commits[-1] - commits[0]:.1f} s before its last.",
        ]
    )
    print(write_result("straggler.md", text).read_text(encoding="utf-8"))
    return int(median < TARGET or len(commits) < 2)


if __name__ == "__main__":
    sys.exit(main())
