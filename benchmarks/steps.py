"""Where a step's time and a GPU's memory go: decode steps by batch size, prompt tokens beside them, and their floor.

    python benchmarks/steps.py --model FOLDER [--context 400] [--parts memory,decode,mixed,kernels]

FOLDER needs only a config.json (random weights). `floor` is the larger of (weights and KV at the copy bandwidth) and
(FLOPs of the products at the rate of a large product), both measured first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rayinfer import LLM
from rayinfer.bench.engines import _ceilings, _shape, part_of
from rayinfer.plan import DEVICE_TOKEN, StepPlan
from rayinfer.runner.memory import _trial_plan

GPU = torch.cuda.is_available()
GIB = 2**30


def plan(num_decodes: int, context: int, chunks: list[int]) -> StepPlan:
    """Rows that decode at `context` tokens, then prompts of these sizes; slots in order."""
    num = num_decodes + len(chunks)
    num_new = np.array([1] * num_decodes + chunks, np.int32)
    starts = np.array([context - 1] * num_decodes + [0] * len(chunks), np.int32)
    ids = np.concatenate([np.full(num_decodes, DEVICE_TOKEN, np.int32), np.full(sum(chunks), 300, np.int32)])
    rows = np.arange(num, dtype=np.int32)
    return StepPlan(
        slots=rows, starts=starts, num_new=num_new, num_decodes=num_decodes, token_ids=ids, samples=rows,
        new_blocks=np.zeros((0, 3), np.int32), new_rows=[], all_greedy=True, banned=np.zeros((0, 2), np.int32),
        shared_lens=np.zeros(num_decodes, np.int32),
    )  # fmt: skip


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(runner: Any, step: StepPlan, seconds: float) -> float:
    """Seconds a step, launched one after the other as an engine does, after a warm-up."""
    for _ in range(3):
        runner.launch(step)
    wait()
    num, start = 0, time.perf_counter()
    while num < 4 or time.perf_counter() - start < seconds:
        for _ in range(4):
            runner.launch(step)
            num += 1
        wait()
    return (time.perf_counter() - start) / num


def kernels(runner: Any, step: StepPlan, num: int = 8) -> Counter[str]:
    """Milliseconds of each kernel in one step."""
    from torch.profiler import ProfilerActivity, profile

    runner.launch(step)
    wait()
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as trace:
        for _ in range(num):
            runner.launch(step)
        wait()
    times: Counter[str] = Counter()
    for event in trace.key_averages():
        time_us = event.self_device_time_total if GPU else event.self_cpu_time_total
        times[event.key] += time_us / 1000 / num
    return times


def memory(llm: LLM) -> None:
    engine, runner = llm.engine, llm.engine.runner
    free, total = torch.cuda.mem_get_info()
    weights = sum(p.nbytes for p in engine.model.module.parameters())
    kv = engine.pool.num_blocks * runner.bytes_per_block()
    stats = torch.cuda.memory_stats()
    rows = {
        "card": total, "used now": total - free, "weights": weights, "KV": kv,
        "allocated": stats["allocated_bytes.all.current"], "reserved": stats["reserved_bytes.all.current"],
        "graphs' pool": sum(s["total_size"] for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] != (0, 0)),
    }  # fmt: skip
    rows["outside torch"] = rows["used now"] - rows["reserved"]
    for greedy in (True, False):
        for num in (llm.engine.max_num_batched_tokens, llm.engine.max_num_seqs):
            torch.cuda.reset_peak_memory_stats()
            before, graphs = torch.cuda.memory_allocated(), runner.graphs
            runner.graphs = None
            runner.launch(_trial_plan(runner, engine.max_num_seqs, num, greedy)).read()
            runner.graphs = graphs
            rows[f"step of {num}, {'greedy' if greedy else 'drawn'}"] = torch.cuda.max_memory_allocated() - before
    print("\n| memory | GiB |\n|---|---|")
    for name, num_bytes in rows.items():
        print(f"| {name} | {num_bytes / GIB:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--context", type=int, default=400)
    parser.add_argument("--parts", default="memory,decode,mixed,kernels")
    parser.add_argument("--rows", default="1,8,16,32,64,96,128,192,256,384,512,768,1024")
    parser.add_argument("--seconds", type=float, default=0.15, help="of each timing")
    args = parser.parse_args()
    parts, sizes = args.parts.split(","), [int(size) for size in args.rows.split(",")]
    ceilings = _ceilings({"device": "cuda" if GPU else "cpu", "dtype": "bfloat16" if GPU else "float32"})
    flops, bandwidth = ceilings["flops"], ceilings["bandwidth"]
    print(f"{ceilings['source']}: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}")
    llm = LLM(
        args.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=max(2048, 2 * args.context),
        max_num_seqs=max(sizes) + 32, enforce_eager="decode" not in parts,
    )  # fmt: skip
    engine, runner = llm.engine, llm.engine.runner
    shape = _shape(engine)
    num_params = shape["num_body"] + shape["vocab"] * shape["hidden"]
    width = runner.block_table_SP.shape[1]
    table = torch.arange(runner.block_table_SP.numel(), dtype=torch.int32) % (engine.pool.num_blocks - 1) + 1
    runner.block_table_SP.copy_(table.view(-1, width))
    if GPU and "memory" in parts:
        memory(llm)

    def floor(num_decodes: int, num_tokens: int = 0) -> float:
        kv = runner.bytes_per_block() / runner.block_size * args.context * num_decodes
        work = 2 * (shape["num_body"] * (num_decodes + num_tokens) + shape["vocab"] * shape["hidden"] * num_decodes)
        return max((num_params * shape["item_bytes"] + kv) / bandwidth, work / flops + kv / bandwidth)

    if "decode" in parts:
        print(f"\n| rows that decode at {args.context} | floor ms | ms |\n|---|---|---|")
        for size in sizes:
            took = timed(runner, plan(size, args.context, []), args.seconds)
            print(f"| {size} | {1e3 * floor(size):.2f} | {1e3 * took:.3f} |", flush=True)
    if "mixed" in parts:
        print("\n| rows + prompt tokens (launched eagerly) | floor ms | ms |\n|---|---|---|")
        for rows in (size for size in (1, 64, 128, 256, 512) if size <= max(sizes)):
            for tokens in (128, 256, 512, 1024, 2048, 4096, 8192):
                chunks = [min(256, tokens)] * max(1, tokens // 256)
                took = timed(runner, plan(rows, args.context, chunks), args.seconds)
                print(f"| {rows} + {tokens} | {1e3 * floor(rows, tokens):.2f} | {1e3 * took:.2f} |", flush=True)
    if "kernels" in parts:
        for name, step in {"16": (16, []), "64": (64, []), "256": (256, []), "64 + 8 x 256": (64, [256] * 8)}.items():
            if step[0] > max(sizes):
                continue
            times = kernels(runner, plan(step[0], args.context, step[1]))
            shares = Counter[str]()
            for kernel, ms in times.items():
                shares[part_of(kernel)] += ms
            total = "; ".join(f"{part} {ms:.3f}" for part, ms in shares.items())
            print(f"\nrows {name}: {sum(times.values()):.3f} ms of kernels: {total}")
            for kernel, ms in times.most_common(14):
                print(f"  {ms:8.3f} ms  {kernel[:110]}", flush=True)


if __name__ == "__main__":
    main()
