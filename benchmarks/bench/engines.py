"""What `rayinfer bench` runs in a process for each engine: the same rows, one line of JSON a workload.

The arguments of `main`: a key of ENGINES, a file with the request (from bench.py), a file for the lines. Every row gets
exactly the tokens that its workload says (EOS is ignored), so that engines differ in time alone. Nothing of rayinfer's
engine is loaded in a peer's process.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rayinfer.bench.workloads import Workload, warmup

Line = dict[str, Any]
STATIC_BATCH = 64  # rows of one transformers batch
STEPS = 8  # of a stretch that is profiled
# What a kernel, or on a CPU an operation of torch, is counted as; all else is a small operation.
PARTS = {
    "attention": r"_prefill_kernel|_decode_kernel|_prefix_kernel|merge_kernel|flash|scaled_dot_product|attention",
    "gemm": r"gemm|nvjet|cutlass|cublas|_matmul_kernel|splitk|::(add|b|base_add)?mm\b|linear",
}


def run_rayinfer(request: Line) -> Iterator[Line]:
    import rayinfer
    from rayinfer.llm import LLM

    yield _ceilings(request)
    options = {"load_format": request["load_format"], **request["engine_kwargs"]}
    init, llm = _timed(lambda: LLM(request["model"], **options))
    engine = llm.engine
    more = {"kv_tokens": (engine.pool.num_blocks - 1) * engine.pool.block_size, "max_rows": engine.max_num_seqs}
    num_steps: dict[str, int] = {}
    before = 0
    for work, line in _generate(rayinfer, llm, request, init):
        done = engine.snapshot().num_steps
        num_steps[work.name], before = done - before, done
        if work is not request["warmup"]:
            yield {**line, **more, "steps": num_steps[work.name], "shape": _shape(engine)}
    for work in request["works"] if request["shares"] else ():  # last: if this is cut short, all times are there
        llm.reset_prefix_cache()
        asked = sorted(zip(*_asked(rayinfer, work), strict=True), key=lambda row: -row[1].max_tokens)  # as LLM does
        for number, (row, params) in enumerate(asked):
            engine.add(str(number), engine.inputs.encode_batch([{**row, "sampling_params": params}])[0])
        yield {"workload": work.name, "shares": _shares(engine, num_steps[work.name])}


def run_vllm(request: Line) -> Iterator[Line]:
    """With its defaults, which are its best on one GPU, and the flags that benchmarks of it set."""
    import vllm

    options = {"enable_prefix_caching": True, "max_num_seqs": 1024, "disable_log_stats": True}
    options |= {key: request[key] for key in ("load_format", "dtype", "max_model_len")}
    init, llm = _timed(lambda: vllm.LLM(model=request["model"], skip_tokenizer_init=True, **options))
    cache = llm.llm_engine.vllm_config.cache_config
    for work, line in _generate(vllm, llm, request, init):
        if work is not request["warmup"]:
            yield {**line, "kv_tokens": cache.num_gpu_blocks * cache.block_size}


def _asked(module: Any, work: Workload) -> tuple[list[dict], list[Any]]:
    """Rows and sampling parameters; rayinfer and vllm have the same names for them."""
    params = {"temperature": work.temperature, "ignore_eos": True, "detokenize": False}
    rows = [{"prompt_token_ids": prompt} for prompt in work.prompts]
    return rows, [module.SamplingParams(max_tokens=n, **params) for n in work.out_lens]


def _generate(module: Any, llm: Any, request: Line, init: float) -> Iterator[tuple[Workload, Line]]:
    """Warm up, then run every workload, each with an empty prefix cache."""
    for work in (request["warmup"], *request["works"]):
        llm.reset_prefix_cache()
        asked = _asked(module, work)
        wall, outputs = _timed(partial(llm.generate, *asked, use_tqdm=False))
        yield work, _line(work, wall, sum(len(output.outputs[0].token_ids) for output in outputs), init)


def run_transformers(request: Line) -> Iterator[Line]:
    """Its `generate` in static batches of rows that are alike in length; a batch ends with its longest row."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rayinfer.models.source import find_source

    start, source = time.perf_counter(), find_source(request["model"])
    device, options = request["device"], {"dtype": getattr(torch, request["dtype"]), "attn_implementation": "sdpa"}
    if request["load_format"] == "dummy":
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.path), **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(source.path, **source.hub_kwargs(), **options).to(device)
    model.eval()
    init = time.perf_counter() - start

    def generate(work: Workload) -> None:
        order = sorted(range(len(work.prompts)), key=lambda i: (work.out_lens[i], len(work.prompts[i])))
        for first in range(0, len(order), STATIC_BATCH):
            prompts = [work.prompts[i] for i in order[first : first + STATIC_BATCH]]
            longest = max(work.out_lens[i] for i in order[first : first + STATIC_BATCH])
            ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, prompt in enumerate(prompts):
                ids[i, -len(prompt) :], mask[i, -len(prompt) :] = torch.tensor(prompt), 1
            sampled = {"do_sample": work.temperature > 0, "temperature": work.temperature or 1.0}
            model.generate(
                ids.to(device), attention_mask=mask.to(device), min_new_tokens=longest, max_new_tokens=longest,
                pad_token_id=0, **sampled,
            )  # fmt: skip

    generate(request["warmup"])
    for work in request["works"]:
        wall, _ = _timed(partial(generate, work))
        yield _line(work, wall, work.num_output_tokens, init)


def _ceilings(request: Line) -> Line:
    """Fields of roofline.Ceilings: FLOP/s of a square product and bytes/s of a copy, the best of a few."""
    import torch

    device, dtype = request["device"], getattr(torch, request["dtype"])
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    whole = torch.empty((2**30 if device == "cuda" else 2**26) // dtype.itemsize, device=device, dtype=dtype)
    other = torch.empty_like(whole)

    def best(call: Callable[[], object]) -> float:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        run()
        return min(_timed(run)[0] for _ in range(10))

    flops = 2 * size**3 / best(lambda: torch.mm(a, b))
    bandwidth = 2 * whole.nbytes / best(lambda: other.copy_(whole))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    source = f"measured: {name}, {size} x {size} {request['dtype']} product, {whole.nbytes / 2**30:.2g} GiB copy"
    return {"flops": flops, "bandwidth": bandwidth, "source": source}


ENGINES = {"rayinfer": run_rayinfer, "vllm": run_vllm, "transformers": run_transformers}


def part_of(name: str) -> str:
    """Which part of a step a kernel or an operation of torch belongs to: gemm, attention or small."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), "small")


def _shares(engine: Any, num_steps: int) -> dict[str, float]:
    """Shares of the time of a few steps after a quarter and a half of a workload, whose rows have been added.

    host is what is left: on a GPU, it was idle; the profiler itself makes the host slower, so it is no less than it
    seems. The rows are aborted.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda, times, wall, done = engine.device.type == "cuda", Counter[str](), 0.0, 0
    wait: Callable[[], object] = torch.cuda.synchronize if cuda else int
    length = max(1, min(STEPS, num_steps // 4))
    for start in (num_steps // 4, num_steps // 2):
        while done < start and engine.has_work:
            engine.step()
            done += 1
        wait()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
            begin = time.perf_counter()
            for _ in range(length):
                engine.step()
            wait()
            wall += time.perf_counter() - begin
        done += length
        for event in trace.key_averages():
            time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
            if cuda or event.key.startswith("aten::"):
                times[part_of(event.key)] += time_us / 1e6
    engine.abort_all()
    shares = {part: times[part] / wall for part in (*PARTS, "small")}
    return {**shares, "host": max(0.0, 1 - sum(shares.values()))}


def _shape(engine: Any) -> Line:
    """Fields of a roofline.Shape, from the loaded model."""
    module, spec, info = engine.model.module, engine.model.specs[0], engine.model.info
    text = module.config.get_text_config()
    outer = {id(module.get_input_embeddings().weight), id(module.get_output_embeddings().weight)}
    inner = [p for p in module.parameters() if p.ndim == 2 and id(p) not in outer]
    return {
        "num_body": sum(p.numel() for p in inner), "num_layers": info.num_layers, "hidden": info.hidden_size,
        "intermediate": getattr(text, "intermediate_size", 4 * info.hidden_size), "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "vocab": info.vocab_size,
        "item_bytes": engine.model.dtype.itemsize,
    }  # fmt: skip


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _line(work: Workload, wall: float, num: int, init: float) -> Line:
    if num != work.num_output_tokens:
        raise RuntimeError(f"{work.name}: {num} tokens were generated, {work.num_output_tokens} were asked for")
    return {
        "workload": work.name, "sha256": work.digest(), "wall_s": round(wall, 3), "init_s": round(init, 1),
        "output_tok_s": round(num / wall, 2),
    }  # fmt: skip


def main() -> None:
    """Run one engine, in a process of its own."""
    engine, request_path, result_path = sys.argv[1:]
    request = json.loads(Path(request_path).read_text())
    request["works"] = [Workload(**work) for work in request["works"]]
    request["warmup"] = warmup(request["vocab"], n=8 if request["device"] == "cpu" else 32)
    if threads := request["engine_kwargs"].get("num_threads"):  # for every engine, and for what the device can do
        import torch

        torch.set_num_threads(threads)
    with open(result_path, "a") as file:
        for line in ENGINES[engine](request):
            print(json.dumps({"engine": engine, **line}), file=file, flush=True)
