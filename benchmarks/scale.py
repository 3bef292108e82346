"""How the cost of a row grows: with the number of rows, the tail included, and with the length of the context.

    python benchmarks/scale.py --model FOLDER [--rows 1000,5000,20000] [--contexts 1024,4096,32768] [--max-rows 256]

FOLDER needs only a config.json (random weights). Rows are W5's (`rayinfer bench`). At a context of C tokens, as many
rows as the KV cache holds, --max-rows at most, have prompts of C - 128 and yield 128. Memory of a running row: its KV
blocks, and what a slot has of its own (block table, sampling parameters, last token).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from common import ROOT, params_of, table

sys.path.insert(0, str(ROOT))

from rayinfer import LLM
from rayinfer.bench import workloads

NUM_OUT = 128


def run(llm: LLM, prompts: Sequence[list[int]], lens: Sequence[int]) -> tuple[float, int]:
    """Seconds and steps."""
    params = params_of(lens)
    llm.reset_prefix_cache()
    steps, start = llm.engine.snapshot().num_steps, time.perf_counter()
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return time.perf_counter() - start, llm.engine.snapshot().num_steps - steps


def row_bytes(llm: LLM, context: int) -> tuple[int, int]:
    """Of a running row: bytes of KV, and of its slot."""
    runner = llm.engine.runner
    state = runner.block_table_SP, runner.last_token_S, runner.params_S4, runner.seed_S
    own = sum(tensor.nbytes for tensor in state) // len(runner.last_token_S)
    return -(-context // runner.block_size) * runner.bytes_per_block(), own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", default="1000,5000,20000")
    parser.add_argument("--contexts", default="1024,4096,16384,32768")
    parser.add_argument("--max-rows", type=int, default=256)
    asked = parser.parse_args()
    contexts = [int(n) for n in asked.contexts.split(",") if n]
    most = max([4096, *contexts])
    stretched = {"max_position_embeddings": most}  # of random weights nothing is expected there
    llm = LLM(asked.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=most, hf_overrides=stretched)
    vocab, pool, lines = llm.engine.info.vocab_size, llm.engine.pool, []
    warm = workloads.warmup(vocab)
    run(llm, warm.prompts, warm.out_lens)
    for num in [int(n) for n in asked.rows.split(",") if n]:
        work = workloads.build("W5", vocab, n=num)
        seconds, steps = run(llm, work.prompts, work.out_lens)
        per_s = work.num_output_tokens / seconds
        lines.append([f"{num:,}", f"{seconds:.1f}", f"{per_s:,.0f}", f"{1e3 * seconds / num:.2f}", f"{steps:,}"])
        print(lines[-1], flush=True)
    print(table(["rows of W5", "s", "output tokens/s", "ms a row", "steps"], lines) if lines else "", flush=True)
    lines, rng = [], np.random.default_rng(0)
    for context in contexts:
        num = min(asked.max_rows, (pool.num_blocks - 1) * pool.block_size // context)
        prompts = rng.integers(workloads.LOW, vocab - workloads.HIGH, (num, context - NUM_OUT)).tolist()
        seconds, steps = run(llm, prompts, [NUM_OUT] * num)
        kv, own = row_bytes(llm, context)
        lines.append([
            f"{context:,}", num, f"{seconds:.1f}", f"{num * context / seconds:,.0f}", f"{num * NUM_OUT / seconds:,.0f}",
            f"{1e3 * seconds / num:.1f}", f"{kv / 2**20:,.1f}", f"{own / 2**10:.1f}",
        ])  # fmt: skip
        print(lines[-1], flush=True)
    titles = ["context", "rows", "s", "tokens/s, in and out", "output tokens/s", "ms a row"]
    print(table([*titles, "MiB of KV a row", "KiB of a slot"], lines) if lines else "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {pool.num_blocks * pool.block_size:,} KV tokens")


if __name__ == "__main__":
    main()
