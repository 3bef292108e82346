"""Do drafts pay? The same rows with tokens that are guessed from each row's own text, and without.

    python benchmarks/speculation.py [--rows 1,4,16] [--max-tokens 128]         # real text: SmolLM2 on this CPU
    python benchmarks/speculation.py --model FOLDER [--workloads W5:500,W5] [--weights uniform]

The first wants the demo's model and rows (`make fetch`): summaries of articles, greedy. For the second, FOLDER needs
only a config.json. Random weights say little about drafts: drawn as rayinfer draws them (normal, 0.02), they make texts
in which nothing comes twice; `uniform` draws them as vLLM draws its own (+-0.001): texts that soon repeat one token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, gguf_path, load_rows, messages, params_of, table

sys.path.insert(0, str(ROOT))

from rayinfer import LLM, SamplingParams
from rayinfer.bench import workloads

COUNTS = ("num_steps", "num_draft_tokens", "num_accepted_tokens")


def compare(llm: LLM, name: str, generate: Any, times: int) -> list[str]:
    """A line of the table: the best of some runs with drafts and without, in turns."""
    scheduler = llm.engine.scheduler
    own, seconds, counts, answers = scheduler.max_draft_step, {}, {}, {}
    for most in (own, 0) * times:
        llm.reset_prefix_cache()
        scheduler.max_draft_step, before = most, [getattr(llm.engine.snapshot(), c) for c in COUNTS]
        start = time.perf_counter()
        outputs = generate()
        wall = time.perf_counter() - start
        seconds[most] = min(wall, seconds.get(most, wall))
        counts[most] = [getattr(llm.engine.snapshot(), c) - old for c, old in zip(COUNTS, before, strict=True)]
        answers[most] = [output.outputs[0].token_ids for output in outputs]
    scheduler.max_draft_step = own
    equal = sum(a == b for a, b in zip(answers[own], answers[0], strict=True))
    (steps, drafts, accepted), num = counts[own], sum(map(len, answers[0]))
    return [
        name, f"{num / seconds[0]:,.1f}", f"{num / seconds[own]:,.1f}", f"{seconds[0] / seconds[own]:.2f}",
        f"{counts[0][0]:,}", f"{steps:,}", f"{drafts:,}", f"{accepted:,}", f"{equal} of {len(outputs)}",
    ]  # fmt: skip


def real_text(asked: argparse.Namespace) -> list[list[str]]:
    llm = LLM(str(gguf_path("smollm2")), max_model_len=2048, device="cpu", num_threads=asked.threads)
    params = SamplingParams(temperature=0, max_tokens=asked.max_tokens)
    rows = [messages(row) for row in load_rows(max(asked.rows), "wiki")]
    llm.chat(rows[:1], params.model_copy(update={"max_tokens": 2}), use_tqdm=False)
    return [
        compare(llm, f"{num} rows", lambda num=num: llm.chat(rows[:num], params, use_tqdm=False), asked.times)
        for num in asked.rows
    ]


def random_weights(asked: argparse.Namespace) -> list[list[str]]:
    vocab = json.loads((Path(asked.model) / "config.json").read_text())["vocab_size"]
    llm = LLM(asked.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, **asked.engine_kwargs)
    if asked.weights == "uniform":
        with torch.no_grad():
            for weight in llm.engine.model.module.parameters():
                weight.uniform_(-1e-3, 1e-3)
    lines = []
    for work in (workloads.warmup(vocab), *workloads.parse(asked.workloads, vocab)):
        rows = [{"prompt_token_ids": ids} for ids in work.prompts]
        params = params_of(work.out_lens, work.temperature)
        line = compare(llm, work.name, lambda r=rows, p=params: llm.generate(r, p, use_tqdm=False), asked.times)
        print(line, flush=True)
        lines.append(line)
    return lines[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--model", help="folder with a config.json: random weights instead")
    parser.add_argument("--workloads", default="W5:500,W5")
    parser.add_argument("--weights", choices=["normal", "uniform"], default="normal")
    parser.add_argument("--engine-kwargs", type=json.loads, default={}, help="JSON")
    asked = parser.parse_args()
    lines = random_weights(asked) if asked.model else real_text(asked)
    head = ["", "tok/s without", "with drafts", "ratio", "steps without", "with", "drafts", "accepted", "rows alike"]
    print(table(head, lines))


if __name__ == "__main__":
    main()
