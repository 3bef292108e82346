"""Does a job keep its engine full? Rows/s through Ray Data next to `LLM.generate`, one machine, nothing tuned.

    python benchmarks/saturation.py --model FOLDER [--workloads W1,W5:500]

FOLDER needs only a config.json (random weights). Rows of `rayinfer bench`'s workloads, token ids in a Parquet file,
each row with its own number of tokens. Every way in a process of its own; times are from the engine being there to the
last row, and the time before is shown. "Ray Data" is `build_processor`, "job" the same as `rayinfer run` has it, with
rows that leave their calls as they end. Needs Ray's data library.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, params_of, start_clock, table

sys.path.insert(0, str(ROOT))

from rayinfer.bench.workloads import Workload, build, warmup

Timing = dict[str, float]


def load(asked: argparse.Namespace) -> Workload:
    vocab = json.loads((Path(asked.model) / "config.json").read_text())["vocab_size"]
    name, _, num = asked.way_workload.partition(":")
    return build(name, vocab, n=int(num) if num else None)


def engine_kwargs() -> dict[str, Any]:
    return {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 4096}


def run_llm(asked: argparse.Namespace) -> Timing:
    import rayinfer

    start = time.perf_counter()
    llm = rayinfer.LLM(asked.model, **engine_kwargs())
    timing = {"start": time.perf_counter() - start}
    work = load(asked)
    for rows in (warmup(1000), work):
        params = params_of(rows.out_lens)
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in rows.prompts], params, use_tqdm=False)
        timing["seconds"] = time.perf_counter() - begin
    return timing | {"num_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


def run_ray(asked: argparse.Namespace, any_rows: bool = False) -> Timing:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    from rayinfer.processors import EngineProcessorConfig, build_processor

    ray.init(address="local", include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    work = load(asked)
    columns = {"id": range(len(work.prompts)), "prompt_token_ids": work.prompts, "max_tokens": work.out_lens}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), f"{folder}/rows.parquet", row_group_size=100)
        board = start_clock()
        processor = build_processor(
            EngineProcessorConfig(model_source=asked.model, engine_kwargs=engine_kwargs(), concurrency=1),
            preprocess=lambda row: dict(
                id=row["id"], prompt_token_ids=row["prompt_token_ids"],
                sampling_params=dict(max_tokens=row["max_tokens"], temperature=0, ignore_eos=True, detokenize=False),
            ),
            postprocess=lambda row: dict(id=row["id"], num_tokens=row["num_generated_tokens"]),
            stats_actor=board,
        )  # fmt: skip
        processor = dataclasses.replace(processor, any_rows=any_rows)
        start = time.time()
        rows = processor(ray.data.read_parquet(folder)).take_all()
        end, loaded = time.time(), ray.get(board.at.remote())
    if {row["id"] for row in rows} != set(columns["id"]) or len(rows) != len(work.prompts):
        raise RuntimeError(f"{len(work.prompts)} rows in, {len(rows)} rows out")
    num_tokens = sum(row["num_tokens"] for row in rows)
    return {"start": loaded - start, "seconds": end - loaded, "num_tokens": num_tokens}


WAYS: dict[str, Callable[[argparse.Namespace], Timing]] = {
    "LLM.generate": run_llm, "Ray Data": run_ray, "job": functools.partial(run_ray, any_rows=True),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workloads", default="W1,W5")
    parser.add_argument("--way", choices=list(WAYS), help="run this alone, in this process")
    parser.add_argument("--way-workload")
    asked = parser.parse_args()
    asked.model = str(Path(asked.model).resolve())
    if asked.way:
        print(json.dumps(WAYS[asked.way](asked)))
        return
    lines = []
    for workload in asked.workloads.split(","):
        speeds = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--model", asked.model, "--way", way, "--way-workload", workload]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                sys.exit(f"{way}, {workload}: {done.stderr[-3000:]}")
            timing = json.loads(done.stdout.strip().splitlines()[-1])
            speeds[way] = timing["num_tokens"] / timing["seconds"]
            print(f"{workload}, {way}: {timing}", flush=True)
        alone, *through_ray = speeds.values()
        ratios = [f"{speed / alone:.3f}" for speed in through_ray]
        lines.append([workload, *(f"{speed:,.0f}" for speed in speeds.values()), *ratios])
    header = ["workload", *(f"{way}, output tokens/s" for way in WAYS), *(f"{way}, ratio" for way in list(WAYS)[1:])]
    print(table(header, lines), "target: 0.97", sep="\n")


if __name__ == "__main__":
    main()
