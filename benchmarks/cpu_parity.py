"""Figure 1: greedy tokens equal transformers' `generate` in fp32 on a CPU, however the work is cut up.

    python benchmarks/cpu_parity.py                             both models, the whole grid (hours on 2 cores)
    python benchmarks/cpu_parity.py --models smollm2 --prompts 64 --prompts-at-batch-1 8

The reference is transformers' own `generate`, one prompt at a time, no padding, no EOS stop, kept in .cache/parity/.
Against it runs every combination of chunk size, block size, prefix cache and batch, then a KV pool so small that rows
are preempted, and one run in which EOS does end rows.

The measured rounding error is the largest difference between the reference's logits of one token at a time and
those of one forward over the whole sequence: the same model, the same tokens, another order of additions. Where our
tokens leave the reference's, the reference scores our whole row in one forward; each of our tokens must be its
likeliest or lie within that error of it. Such rows are listed; anything else is a failure, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from common import ROOT, describe_machine, gguf_path, load_reference, load_rows, prompt_ids, table, write_result

import rayinfer

WHOLE = 8192


@dataclass
class Reference:
    """What transformers answers: `tokens[i]` for `prompts[i]`, and its rounding error in logits."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    rounding_error: float
    eos: list[int]


@dataclass
class Outcome:
    """One run of the engine against the reference."""

    label: list[Any]
    num_rows: int
    seconds: float
    num_equal: int = 0
    within_error: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    num_cached: int = 0
    num_preemptions: int = 0


class Judge:
    """Scores rows that differ with the reference model, each distinct row once."""

    def __init__(self, model_name: str, reference: Reference):
        self.model_name = model_name
        self.reference = reference
        self.model: Any = None
        self.gaps: dict[tuple[int, ...], list[float]] = {}

    def gaps_of(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """For each of our tokens, how far its logit lies below the reference's largest."""
        key = (*prompt, -1, *tokens)
        if key not in self.gaps:
            if self.model is None:
                self.model, _ = load_reference(self.model_name)
            logits = forward(self.model, prompt, tokens)
            chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            self.gaps[key] = (logits.max(dim=1).values - chosen).tolist()
        return self.gaps[key]

    def compare(self, outcome: Outcome, row: int, expected: list[int], tokens: list[int]) -> None:
        if tokens == expected:
            outcome.num_equal += 1
            return
        at = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), len(tokens))
        gaps = self.gaps_of(self.reference.prompts[row], tokens)
        worst = max(gaps, default=float("inf"))
        text = f"row {row}, token {at}: gap {gaps[at] if at < len(gaps) else float('nan'):.2e}, worst {worst:.2e}"
        same_length = len(tokens) == len(expected)
        (outcome.within_error if same_length and worst < self.reference.rounding_error else outcome.wrong).append(text)


@torch.inference_mode()
def forward(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [len(tokens), vocabulary], fp32, that predict each of `tokens`, from one forward."""
    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()


@torch.inference_mode()
def make_reference(name: str, num_prompts: int, num_tokens: int) -> Reference:
    """Run transformers' generate over each prompt that an earlier run has not kept."""
    digest = hashlib.sha256(gguf_path(name).read_bytes()).hexdigest()[:12]
    kept = ROOT / ".cache" / "parity" / f"{name}-{digest}-{num_prompts}x{num_tokens}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if kept.exists():
        reference = Reference(**json.loads(kept.read_text(encoding="utf-8")))
        if len(reference.tokens) == num_prompts:
            return reference
    model, tokenizer = load_reference(name)
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos if eos is not None else tokenizer.eos_token_id]
    model.generation_config.eos_token_id = None
    if not kept.exists():
        reference = Reference(prompt_ids(name, tokenizer, load_rows(num_prompts)), [], 0.0, eos)
    start = time.perf_counter()
    for prompt in reference.prompts[len(reference.tokens) :]:
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = answer.sequences[0, len(prompt) :].tolist()
        error = (torch.cat(answer.logits).float() - forward(model, prompt, tokens)).abs().max().item()
        reference.tokens.append(tokens)
        reference.rounding_error = max(reference.rounding_error, error)
        kept.write_text(json.dumps(reference.__dict__), encoding="utf-8")
        done = len(reference.tokens)
        print(f"{name}: reference {done} of {num_prompts}, {time.perf_counter() - start:.0f} s", flush=True)
    return reference


def run(name: str, judge: Judge, label: list[Any], num_rows: int, stop_at_eos: bool = False, **engine: Any) -> Outcome:
    """Answer the first `num_rows` prompts with our engine and compare."""
    reference = judge.reference
    num_tokens = len(reference.tokens[0])
    llm = rayinfer.LLM(str(gguf_path(name)), dtype="float32", device="cpu", **engine)
    llm.engine.scheduler.all_known = "num_gpu_blocks_override" not in engine  # else rows wait where some would give way
    params = rayinfer.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=not stop_at_eos, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in reference.prompts[:num_rows]]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    outcome = Outcome(label, num_rows, time.perf_counter() - start)
    for row, output in enumerate(outputs):
        expected = reference.tokens[row]
        if stop_at_eos:
            ends = [i for i, token in enumerate(expected) if token in reference.eos]
            expected = expected[: ends[0] + 1] if ends else expected
        judge.compare(outcome, row, expected, list(output.outputs[0].token_ids) if output.outputs else [])
        outcome.num_cached += max(output.num_cached_tokens, 0)
    outcome.num_preemptions = llm.engine.snapshot().num_preemptions
    del llm
    gc.collect()
    return outcome


def run_model(name: str, options: argparse.Namespace) -> tuple[str, bool]:
    """All runs of one model; returns its section of the report, and whether nothing was wrong."""
    reference = make_reference(name, options.prompts, options.tokens)
    judge = Judge(name, reference)
    longest = max(map(len, reference.prompts)) + options.tokens
    common = dict(max_model_len=longest + 1, num_threads=options.threads)
    outcomes: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(
            f"{name} {outcome.label}: {outcome.num_equal}/{outcome.num_rows} equal, {outcome.seconds:.0f} s", flush=True
        )

    grid = itertools.product(options.batches, options.chunks, options.blocks, (True, False))
    for batch, chunk, block, prefix in grid:
        num_rows = min(options.prompts, options.prompts_at_batch_1 if batch == 1 else options.prompts)
        label = [batch, "whole" if chunk == WHOLE else chunk, block, "on" if prefix else "off", ""]
        engine = dict(max_num_seqs=batch, max_num_batched_tokens=chunk, block_size=block, enable_prefix_caching=prefix)
        add(run(name, judge, label, num_rows, **engine, **common))
    for block in options.blocks:
        # Four full rows fit, many more are let in: the youngest must give way.
        pool = 4 * -(-longest // block) + 1
        engine = dict(max_num_seqs=64, max_num_batched_tokens=64, block_size=block, **common)
        label = [64, 64, block, "on", f"{pool} KV blocks"]
        add(run(name, judge, label, options.prompts, **engine, num_gpu_blocks_override=pool))
    label = [64, "whole", 16, "on", "EOS ends rows"]
    engine = dict(max_num_seqs=64, max_num_batched_tokens=WHOLE, block_size=16, **common)
    add(run(name, judge, label, options.prompts, stop_at_eos=True, **engine))

    header = ["batch", "chunk", "block", "prefix cache", "", "rows", "equal", "within error", "wrong", "cached tokens",
              "preemptions", "seconds"]  # fmt: skip
    body = [
        [*o.label, o.num_rows, o.num_equal, len(o.within_error), len(o.wrong), o.num_cached, o.num_preemptions,
         f"{o.seconds:.0f}"]
        for o in outcomes
    ]  # fmt: skip
    notes = [f"- {o.label}: {text}" for o in outcomes for text in o.within_error]
    wrong = [f"- **wrong** {o.label}: {text}" for o in outcomes for text in o.wrong]
    starved = [o for o in outcomes if "KV blocks" in o.label[-1] and o.num_preemptions == 0]
    wrong += [f"- **wrong** {o.label}: the pool was to be too small, but no row was preempted" for o in starved]
    lengths = [len(prompt) for prompt in reference.prompts]
    section = [
        f"## {name}: {gguf_path(name).name}",
        f"{options.prompts} prompts of {min(lengths)} to {max(lengths)} tokens, {options.tokens} tokens each; "
        f"rounding error of the reference's logits {reference.rounding_error:.2e}.",
        table(header, body),
        *(["Rows that leave the reference within its rounding error:", "\n".join(notes)] if notes else []),
        *(["\n".join(wrong)] if wrong else []),
    ]
    return "\n\n".join(section), not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3"], choices=["smollm2", "gemma3"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompts-at-batch-1", type=int, default=64, help="batch 1 is slow on a CPU")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--chunks", nargs="+", type=int, default=[16, 64, WHOLE], help=f"{WHOLE}: whole prompts")
    parser.add_argument("--blocks", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 1])
    parser.add_argument("--threads", type=int, help="torch threads of the engine; default: all cores")
    options = parser.parse_args()
    sections, good = [], True
    for name in options.models:
        section, passed = run_model(name, options)
        sections.append(section)
        good = good and passed
        command = f"python benchmarks/cpu_parity.py {' '.join(sys.argv[1:])}".rstrip()
        text = ["# Greedy tokens against transformers, fp32, CPU", f"`{command}`", describe_machine(), *sections]
        path = write_result("cpu_parity.md", "\n\n".join(text))
    print(path.read_text(encoding="utf-8"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
