"""Figure 5: one row of every batch is 50 times longer than the others; what the job's throughput loses.

    python benchmarks/straggler.py --batches 400

Two jobs, one after the other and again: as many rows, as many generated tokens, once evenly spread, once with a row in
every batch that takes 50 times the tokens of its neighbours. The model is tiny, so that the job around the engine
counts. A third job has one batch alone: when is its first row committed, when is its long row done?
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

BATCH, SHORT, TIMES = 32, 8, 50
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
    length = 64 + max(num_tokens)
    engine = dict(max_model_len=length, max_num_seqs=2 * BATCH, cpu_kv_cache_gib=0.2, num_threads=1, device="cpu")
    spec = JobSpec.parse(
        {
            "source": {"uri": str(source)},
            "prompt": "{{ text }}",
            "model": {"model_source": str(folder / "model"), **engine},
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
    options = parser.parse_args()
    run_module.RenderPrompt = Ask  # type: ignore[assignment, misc]
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        save_tiny_llama(folder / "model", max_position_embeddings=8192)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=3)
        try:
            tokens = sum(lengths(options.batches, True))
            for pair in range(options.pairs):
                even = run(folder, f"even{pair}", lengths(options.batches, False))[0]
                uneven = run(folder, f"uneven{pair}", lengths(options.batches, True))[0]
                ratios.append(even / uneven)
                rows.append([f"{tokens / even:.0f}", f"{tokens / uneven:.0f}", f"{100 * ratios[-1]:.1f} %"])
                print(rows[-1], flush=True)
            _, commits = run(folder, "alone", lengths(1, True, times=500))
        finally:
            ray.shutdown()
    header = ["tokens/s, all rows alike", "tokens/s, one row in 32 is 50 times longer", "ratio (target: 95 %)"]
    num_rows = options.batches * BATCH
    text = "\n\n".join(
        [
            "# Stragglers",
            f"`python benchmarks/straggler.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
            describe_machine(),
            f"{num_rows} rows and {tokens} generated tokens in each job, timed from the loaded engine on.",
            table(header, rows),
            f"Median: {100 * statistics.median(ratios):.1f} %. A job of one batch with a row of {500 * SHORT} tokens: "
            f"its first commit is {commits[-1] - commits[0]:.1f} s before its last.",
        ]
    )
    print(write_result("straggler.md", text).read_text(encoding="utf-8"))
    return int(statistics.median(ratios) < TARGET or len(commits) < 2)


if __name__ == "__main__":
    sys.exit(main())
