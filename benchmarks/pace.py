"""Prompts in small steps beside decodes: the same rows in one process, by turns with them and without.

    python benchmarks/pace.py --model FOLDER [--workloads W5:500,W5] [--most 0,512] [--times 1]

FOLDER needs only a config.json (random weights). `--most`: tokens of such a step at most (`graphs.MAX_MIXED`).
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from common import ROOT, params_of, table

sys.path.insert(0, str(ROOT))

from rayinfer import LLM
from rayinfer.bench import workloads
from rayinfer.runner import graphs


def common_start(one: list[int], other: list[int]) -> float:
    """The share of two texts' tokens before they part."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one)) / len(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workloads", default="W5:500,W5")
    parser.add_argument("--most", default="0,512")
    parser.add_argument("--times", type=int, default=1)
    asked = parser.parse_args()
    llm = LLM(asked.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096)
    pace, runner, lines = llm.engine.scheduler._pace, llm.engine.runner, []
    vocab = llm.engine.info.vocab_size
    for work in (workloads.warmup(vocab), *workloads.parse(asked.workloads, vocab)):
        rows = [{"prompt_token_ids": ids} for ids in work.prompts]
        params = params_of(work.out_lens, work.temperature)
        first: list[list[int]] = []
        for most in [int(n) for n in asked.most.split(",")] * asked.times:
            llm.reset_prefix_cache()
            graphs.MAX_MIXED = most
            pace._mixed_sizes, pace._max_reads = runner.graphs.mixed() if runner.graphs else ((), 0)
            steps, start = llm.engine.snapshot().num_steps, time.perf_counter()
            answers = [output.outputs[0].token_ids for output in llm.generate(rows, params, use_tqdm=False)]
            wall = time.perf_counter() - start
            first, num = first or answers, sum(map(len, answers))
            same = sum(map(common_start, first, answers)) / len(answers)
            lines.append(
                [work.name, most, f"{num / wall:,.0f}", llm.engine.snapshot().num_steps - steps, f"{same:.3f}"]
            )
            print(lines[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}")
    print(table(["workload", "most", "output tokens/s", "steps", "tokens as in the first run"], lines))


if __name__ == "__main__":
    main()
