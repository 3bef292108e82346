"""Figure 3: rows/s on a CPU through Ray Data, through LLM.generate, and through transformers' own ways, one run.

    python benchmarks/cpu_throughput.py --rows 64
    python benchmarks/cpu_throughput.py --rows 200 --max-tokens 32 --pairs 3 [--threads 1]

With --pairs, only LLM.chat and Ray Data are run, in turns. The same rows, prompts, greedy sampling, token limit and EOS
everywhere; fp32; every way in a process of its own, with all cores unless --threads says otherwise: of two cores, Ray's
own processes want a part of one. Times are from the first row to the last: loading the model is left out. Ray Data's
time begins when its engine is there, as that engine tells itself; what comes before it (workers, model) is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
from common import (
    ROOT,
    describe_machine,
    gguf_path,
    load_reference,
    load_rows,
    messages,
    prompt_ids,
    start_clock,
    table,
    write_result,
)

MODEL = "smollm2"
BATCH_SIZES = (4, 8, 16, 32, 64)
MOST_SECONDS = 400
LOAD = os.getloadavg()
Timing = dict[str, float]  # seconds, num_tokens, and what else a way has to tell


def run_ray(asked: argparse.Namespace) -> Timing:
    import ray

    from rayinfer.processors import EngineProcessorConfig, build_processor

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=max(os.cpu_count() or 1, 2))
    config = EngineProcessorConfig(
        model_source=str(gguf_path(MODEL)),
        engine_kwargs=dict(max_model_len=1024, dtype="float32", num_threads=asked.threads),
        concurrency=1,
    )

    def run(num: int, limit: int) -> Timing:
        board = start_clock()
        processor = build_processor(
            config,
            preprocess=lambda row: dict(
                messages=messages(row), sampling_params=dict(temperature=0, max_tokens=limit), id=row["id"]
            ),
            postprocess=lambda row: dict(id=row["id"], num_tokens=row["num_generated_tokens"]),
            stats_actor=board,
        )
        dataset = processor(ray.data.from_items(load_rows(num)))
        start = time.time()
        rows = dataset.take_all()
        end, loaded = time.time(), ray.get(board.at.remote())
        if len(rows) != num:
            raise RuntimeError(f"{num} rows in, {len(rows)} rows out")
        num_tokens = sum(row["num_tokens"] for row in rows)
        return dict(seconds=end - loaded, start_up=loaded - start, num_tokens=num_tokens)

    run(1, 1)
    before = cpu_seconds()
    timing = run(asked.rows, asked.max_tokens)
    after = cpu_seconds()
    seconds = timing["seconds"] + timing["start_up"]
    return timing | dict(cores=sum(after[pid] - before[pid] for pid in before.keys() & after.keys()) / seconds)


def cpu_seconds() -> dict[int, float]:
    """CPU time so far of this process and of Ray's, by process."""
    spent = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            spent[process.pid] = sum(process.cpu_times()[:2])
    return spent


def run_llm(asked: argparse.Namespace) -> Timing:
    import rayinfer

    llm = rayinfer.LLM(
        str(gguf_path(MODEL)), max_model_len=1024, dtype="float32", device="cpu", num_threads=asked.threads
    )
    llm.chat(
        [[{"role": "user", "content": "Hello"}]], rayinfer.SamplingParams(temperature=0, max_tokens=4), use_tqdm=False
    )
    llm.reset_prefix_cache()
    conversations = [messages(row) for row in load_rows(asked.rows)]
    start = time.perf_counter()
    outputs = llm.chat(
        conversations, rayinfer.SamplingParams(temperature=0, max_tokens=asked.max_tokens), use_tqdm=False
    )
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, num_tokens=sum(len(output.outputs[0].token_ids) for output in outputs))


def run_generate(asked: argparse.Namespace) -> Timing:
    """transformers' generate in padded batches, rows sorted by length so that little is padding."""
    import torch

    model, tokenizer = load_reference(MODEL)
    torch.set_num_threads(asked.threads or os.cpu_count() or 1)
    tokenizer.padding_side = "left"
    eos = model.generation_config.eos_token_id
    warm = tokenizer(["Hello"] * asked.batch_size, return_tensors="pt")
    model.generate(**warm, max_new_tokens=4, do_sample=False)
    rows = load_rows(asked.rows)
    num_tokens = 0
    start = time.perf_counter()
    prompts = sorted(prompt_ids(MODEL, tokenizer, rows), key=len)
    for first in range(0, asked.rows, asked.batch_size):
        batch = tokenizer.pad({"input_ids": prompts[first : first + asked.batch_size]}, return_tensors="pt")
        answers = model.generate(**batch, max_new_tokens=asked.max_tokens, do_sample=False, pad_token_id=eos)
        for answer in answers[:, batch["input_ids"].shape[1] :].tolist():
            tokenizer.decode(answer, skip_special_tokens=True)
            num_tokens += answer.index(eos) + 1 if eos in answer else len(answer)
    return dict(seconds=time.perf_counter() - start, num_tokens=num_tokens)


def run_generate_batch(asked: argparse.Namespace) -> Timing:
    """transformers' continuous batching."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, tokenizer = load_reference(MODEL)
    torch.set_num_threads(asked.threads or os.cpu_count() or 1)
    eos = model.generation_config.eos_token_id
    config = GenerationConfig(max_new_tokens=asked.max_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    # Its default cache takes 60 % of the machine's memory; a tenth holds these rows many times over.
    cache = ContinuousBatchingConfig(max_memory_percent=0.1)
    warm = [tokenizer("Hello")["input_ids"]] * 4
    model.generate_batch(inputs=warm, generation_config=config, continuous_batching_config=cache)
    rows = load_rows(asked.rows)
    start = time.perf_counter()
    prompts = prompt_ids(MODEL, tokenizer, rows)
    outputs = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=cache)
    num_tokens = 0
    for output in outputs.values():
        tokenizer.decode(output.generated_tokens, skip_special_tokens=True)
        num_tokens += len(output.generated_tokens)
    seconds = time.perf_counter() - start
    if len(outputs) != asked.rows:
        raise RuntimeError(f"{asked.rows} rows in, {len(outputs)} rows out")
    return dict(seconds=seconds, num_tokens=num_tokens)


WAYS: dict[str, Callable[[argparse.Namespace], Timing]] = {
    "rayinfer, Ray Data": run_ray,
    "rayinfer, LLM.chat": run_llm,
    "transformers, generate": run_generate,
    "transformers, generate_batch": run_generate_batch,
}


def measure(way: str, options: argparse.Namespace, num_rows: int, batch_size: int = 0) -> Timing:
    """Run one way in a fresh process."""
    command = [sys.executable, __file__, "--way", way, "--rows", str(num_rows), "--batch-size", str(batch_size)]
    command += ["--max-tokens", str(options.max_tokens)]
    command += ["--threads", str(options.threads)] if options.threads else []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=MOST_SECONDS, cwd=ROOT, env=environment
        )
    except subprocess.TimeoutExpired:
        print(f"{way} (batch size {batch_size or 'own'}): {num_rows} rows did not end in {MOST_SECONDS} s", flush=True)
        return dict(seconds=float("inf"), num_tokens=0)
    if result.returncode != 0:
        sys.exit(f"{way}, batch size {batch_size}: {result.stderr[-3000:]}")
    timing = json.loads(result.stdout.strip().splitlines()[-1])
    print(f"{way} (batch size {batch_size or 'own'}): {num_rows / timing['seconds']:.2f} rows/s", flush=True)
    return timing


def run_pairs(options: argparse.Namespace) -> None:
    lines, ratios = [], []
    for _ in range(options.pairs):
        alone, ray_data = (measure(way, options, options.rows) for way in ("rayinfer, LLM.chat", "rayinfer, Ray Data"))
        if alone["num_tokens"] != ray_data["num_tokens"]:
            sys.exit(f"other tokens: {alone} {ray_data}")
        ratios.append(alone["seconds"] / ray_data["seconds"])
        times = [f"{timing['seconds']:.1f}" for timing in (alone, ray_data)]
        lines.append([*times, f"{ratios[-1]:.3f}", f"{ray_data['start_up']:.1f}", f"{ray_data['cores']:.2f}"])
    header = [
        "LLM.chat, s",
        "Ray Data, s",
        "ratio (target: 0.95)",
        "start, left out, s",
        "cores taken by Ray and driver",
    ]
    limits = f"{options.rows} rows, at most {options.max_tokens} tokens each"
    text = "\n\n".join([
        "# Ray Data next to LLM.chat on a CPU, in turns",
        f"`python benchmarks/cpu_throughput.py {' '.join(sys.argv[1:])}`",
        f"{describe_machine()}, load average before: {LOAD[0]:.1f}",
        f"{gguf_path(MODEL).name}, fp32, greedy, {limits}, {options.threads or os.cpu_count()} engine threads.",
        table(header, lines), f"Median: {statistics.median(ratios):.3f}.",
    ])  # fmt: skip
    print(write_result(f"cpu_pairs_{options.threads or os.cpu_count()}.md", text).read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument(
        "--rows-at-batch-1", type=int, default=32, help="the loop at batch 1 and generate_batch are slow"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--way", choices=list(WAYS), help="run this alone, in this process")
    parser.add_argument("--batch-size", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=0, help="LLM.chat and Ray Data alone, so many times in turns")
    parser.add_argument("--threads", type=int, help="torch threads of every way; default: all cores")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options)))
        return
    if options.pairs:
        run_pairs(options)
        return
    plan = [("rayinfer, LLM.chat", 0, options.rows), ("rayinfer, Ray Data", 0, options.rows)]
    plan += [("transformers, generate", 1, options.rows_at_batch_1)]
    plan += [("transformers, generate", size, options.rows) for size in options.batch_sizes]
    plan += [("transformers, generate_batch", 0, options.rows_at_batch_1)]
    speeds: dict[tuple[str, int], float] = {}
    lines: list[list[Any]] = []
    for way, size, num_rows in plan:
        timing = measure(way, options, num_rows, size)
        speeds[way, size] = num_rows / timing["seconds"]
        start_up = f"{timing['start_up']:.1f} s" if "start_up" in timing else ""
        lines.append([way, size or "own", num_rows, f"{speeds[way, size]:.2f}",
                      f"{timing['num_tokens'] / timing['seconds']:.0f}", start_up])  # fmt: skip
    ours, ray_data = speeds["rayinfer, LLM.chat", 0], speeds["rayinfer, Ray Data", 0]
    loop = speeds["transformers, generate", 1]
    best = max(speed for (way, size), speed in speeds.items() if way.startswith("transformers") and size != 1)
    ratios = [
        ["Ray Data to LLM.chat", f"{ray_data / ours:.2f}", ">= 0.95"],
        ["Ray Data to generate at batch 1", f"{ray_data / loop:.2f}", ">= 3"],
        ["Ray Data to the best of transformers", f"{ray_data / best:.2f}", ">= 1.2"],
    ]
    command = f"python benchmarks/cpu_throughput.py {' '.join(sys.argv[1:])}".rstrip()
    text = "\n\n".join([
        "# Rows a second on a CPU", f"`{command}`", describe_machine(),
        f"{gguf_path(MODEL).name}, fp32, greedy, at most {options.max_tokens} tokens a row, "
        f"{options.threads or os.cpu_count()} torch threads.",
        table(["way", "batch size", "rows", "rows/s", "output tokens/s", "start, left out"], lines),
        table(["ratio", "measured", "target"], ratios),
    ])  # fmt: skip
    print(write_result("cpu_throughput.md", text).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
