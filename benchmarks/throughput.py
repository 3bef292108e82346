"""Output tokens/s of rayinfer, and of vLLM and transformers where they are installed: same rows, one run, one machine.

    python benchmarks/throughput.py --model FOLDER --workloads W1,W2:256,W5 --engines rayinfer,vllm,transformers

FOLDER needs only a config.json: weights are random, EOS is ignored, so every engine generates exactly the same number
of tokens. Each engine runs in a process of its own. transformers gets one static batch of --transformers-rows rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import workloads  # noqa: E402
from common import table  # noqa: E402


def vocab_of(model: str) -> int:
    return json.loads((Path(model) / "config.json").read_text())["vocab_size"]


def run_rayinfer(args: argparse.Namespace) -> None:
    from rayinfer import LLM, SamplingParams

    start = time.perf_counter()
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": args.max_model_len}
    llm = LLM(args.model, **options, **args.engine_kwargs)
    init = time.perf_counter() - start

    def generate(work: workloads.Workload) -> tuple[float, int]:
        params = [SamplingParams(temperature=work.temperature, max_tokens=n, ignore_eos=True) for n in work.out_lens]
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in work.prompts], params, use_tqdm=False)
        wall = time.perf_counter() - begin
        return wall, sum(len(o.outputs[0].token_ids) for o in outputs)

    generate(workloads.warmup(vocab_of(args.model)))
    for work in workloads.parse(args.workloads, vocab_of(args.model)):
        llm.reset_prefix_cache()
        before = llm.engine.snapshot().num_steps
        wall, num = generate(work)
        stats = llm.engine.snapshot()
        more = {
            "steps": stats.num_steps - before,
            "preemptions": stats.num_preemptions,
            "kv_tokens": llm.engine.pool.num_blocks * llm.engine.pool.block_size,
        }
        report("rayinfer", args, work, wall, num, init, more)


def run_vllm(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    import vllm

    llm = vllm.LLM(
        model=args.model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=True,
        max_model_len=args.max_model_len, gpu_memory_utilization=0.9, max_num_seqs=1024, disable_log_stats=True,
    )  # fmt: skip
    init = time.perf_counter() - start

    def generate(work: workloads.Workload) -> tuple[float, int]:
        params = [
            vllm.SamplingParams(temperature=work.temperature, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in work.out_lens
        ]
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in work.prompts], params, use_tqdm=False)
        return time.perf_counter() - begin, sum(len(o.outputs[0].token_ids) for o in outputs)

    generate(workloads.warmup(vocab_of(args.model)))
    for work in workloads.parse(args.workloads, vocab_of(args.model)):
        llm.reset_prefix_cache()
        wall, num = generate(work)
        cache = llm.llm_engine.vllm_config.cache_config
        report("vllm", args, work, wall, num, init, {"kv_tokens": cache.num_gpu_blocks * cache.block_size})


def run_transformers(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(args.model), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    init = time.perf_counter() - start
    for work in workloads.parse(args.workloads, vocab_of(args.model)):
        n = min(args.transformers_rows, len(work.prompts))
        part = workloads.Workload(work.name, work.prompts[:n], work.out_lens[:n])
        width = max(map(len, part.prompts))
        ids = torch.zeros(n, width, dtype=torch.long)
        mask = torch.zeros(n, width, dtype=torch.long)
        for i, prompt in enumerate(part.prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        begin = time.perf_counter()
        longest = max(part.out_lens)
        model.generate(
            ids.to(device), attention_mask=mask.to(device), do_sample=work.temperature > 0, min_new_tokens=longest,
            max_new_tokens=longest, pad_token_id=0,
        )  # fmt: skip
        report("transformers", args, part, time.perf_counter() - begin, part.num_output_tokens, init, {})


def report(
    engine: str, args: argparse.Namespace, work: workloads.Workload, wall: float, num: int, init: float, more: dict
) -> None:
    assert num == work.num_output_tokens, (engine, work.name, num, work.num_output_tokens)
    line = {
        "engine": engine, "model": Path(args.model).name, "workload": work.name, "rows": len(work.prompts),
        "sha256": work.digest(), "temperature": work.temperature, "wall_s": round(wall, 3),
        "output_tok_s": round(num / wall, 1), "init_s": round(init, 1), **more,
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(line) + "\n")


RUN = {"rayinfer": run_rayinfer, "vllm": run_vllm, "transformers": run_transformers}


def summary(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: a line a workload, tokens/s an engine, and rayinfer over vLLM where the rows are the same."""
    cells = {(line["workload"], line["engine"]): line for line in lines}
    rows = []
    for name in dict.fromkeys(line["workload"] for line in lines):
        found = [cells.get((name, engine)) for engine in RUN]
        ours, peer, _ = found
        same = ours and peer and ours["sha256"] == peer["sha256"]
        ratio = f"{ours['output_tok_s'] / peer['output_tok_s']:.2f}" if ours and peer and same else "-"
        shown = [f"{f['output_tok_s']:,.0f} ({f['rows']} rows)" if f else "-" for f in found]
        rows.append([name, *shown, ratio])
    inits = [f"{engine} {line['init_s']} s" for (_, engine), line in cells.items()]
    return table(["workload", *RUN, "rayinfer / vllm"], rows) + "\n\nStart: " + ", ".join(dict.fromkeys(inits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--workloads", default="W1,W2:256,W3:500,W4,W5")
    parser.add_argument("--engines", default="rayinfer,vllm,transformers")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--transformers-rows", type=int, default=64)
    parser.add_argument("--engine-kwargs", type=json.loads, default={}, help="JSON of more rayinfer.LLM arguments")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one engine")
    parser.add_argument("--out", default="throughput.jsonl")
    parser.add_argument("--child", choices=RUN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        RUN[args.child](args)
        return
    Path(args.out).write_text("")
    for engine in args.engines.split(","):
        try:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", engine], timeout=args.timeout)
        except subprocess.TimeoutExpired:
            print(f"{engine}: stopped after {args.timeout} s", flush=True)
    print(summary([json.loads(line) for line in Path(args.out).read_text().splitlines()]))


if __name__ == "__main__":
    main()
