"""Deterministic mode on this device: are rows the same to the last bit however they are run, and what does it cost?

    python benchmarks/deterministic.py --model FOLDER [--parts bits,speed,products,attention] [--out PATH]

FOLDER needs only a config.json (random weights). Parts:
`products`: the kernel in several launch shapes against torch's product on the model's shapes; whether their bits agree.
`attention`: launch shapes of the fixed prefill kernel for single tokens and for chunks, against the normal kernels.
`bits`: --num-rows rows of W5, greedy and drawn, alone (one row in the engine at a time) against all at once, in other
orders, in small chunks, with a starved KV cache, and without a prefix cache: how many rows have equal tokens and equal
log-probabilities. `speed`: W1 and W5 against the normal mode.
Parts that ended are in PATH (JSON) when a later one does not. Without a GPU every part runs tiny: a test of the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from common import table

from rayinfer import LLM, SamplingParams
from rayinfer.bench.workloads import Workload, build, warmup
from rayinfer.kernels import paged_prefill as prefill_module
from rayinfer.kernels.matmul import TILES, Tile, choose_tile, matmul
from rayinfer.kernels.paged_decode import paged_decode

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
MORE_TILES = [
    *TILES, Tile(128, 256, 64, 8, 8, 4), Tile(128, 256, 64, 8, 8, 3), Tile(128, 128, 64, 8, 8, 4),
    Tile(128, 64, 64, 8, 4, 6), Tile(64, 32, 64, 8, 4, 6), Tile(64, 16, 64, 8, 4, 10), Tile(64, 256, 128, 8, 4, 2),
]  # fmt: skip
# Of the fixed prefill kernel: (query, head) pairs of a tile, tokens of a KV tile, warps, stages.
SHAPES = [
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 32, 4, 3),
    (64, 32, 4, 4),
    (64, 128, 4, 2),
    (128, 64, 8, 3),
    (16, 64, 4, 3),
]
Answer = tuple[list[int], list[Any]]


def load(args: argparse.Namespace, **settings: Any) -> LLM:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    base = {"max_model_len": 2048 if GPU else 96, "load_format": "dummy", "skip_tokenizer_init": True}
    base |= {} if GPU else {"device": "cpu", "cpu_kv_cache_gib": 0.05, "num_threads": 1}
    llm = LLM(args.model, **{**base, **settings})
    llm.engine.scheduler.all_known = "num_gpu_blocks_override" not in settings  # else rows wait, none gives way
    return llm


def vocab_of(args: argparse.Namespace) -> int:
    return json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]


def rows_of(args: argparse.Namespace) -> Workload:
    if GPU:
        return build("W5", vocab_of(args), n=args.num_rows)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, vocab_of(args), rng.integers(3, 30)).tolist() for _ in range(args.num_rows)]
    return Workload("tiny", prompts, rng.integers(2, 12, args.num_rows).tolist())


def answers(llm: LLM, work: Workload, order: list[int], alone: bool = False) -> list[Answer]:
    """Tokens and log-probabilities of rows `order`, in the order of the workload. Odd rows are drawn."""
    found: dict[int, Answer] = {}
    groups = [[i] for i in order] if alone else [order]
    for group in groups:
        params = [
            SamplingParams(temperature=float(i % 2), seed=i, max_tokens=work.out_lens[i], ignore_eos=True, logprobs=1)
            for i in group
        ]
        rows = [{"prompt_token_ids": work.prompts[i]} for i in group]
        outputs = llm.generate(rows, params, use_tqdm=False, on_error="raise")
        for i, output in zip(group, outputs, strict=True):
            done = output.outputs[0]
            values = [sorted((token, one.logprob) for token, one in entry.items()) for entry in done.logprobs or ()]
            found[i] = (done.token_ids, values)
    return [found[i] for i in range(len(work.prompts)) if i in found]


def bits(args: argparse.Namespace) -> dict[str, Any]:
    """Rows that are equal to the same rows alone, in tokens and in both, for each way to run them."""
    work = rows_of(args)
    work.out_lens = [min(n, args.most_tokens) for n in work.out_lens]
    every = list(range(len(work.prompts)))
    rng = np.random.default_rng(1)
    llm = load(args, deterministic=True)
    block = llm.engine.config.block_size
    start = time.perf_counter()
    some = every[: args.num_alone] if args.num_alone else every
    alone = answers(llm, work, some, alone=True)
    print(f"{len(some)} rows alone: {time.perf_counter() - start:.0f} s", flush=True)
    longest = max(len(p) + n for p, n in zip(work.prompts, work.out_lens, strict=True))
    starved = max(-(-llm.engine.max_model_len // block) + 2, 12 * -(-longest // block) if GPU else 0)
    ways: list[tuple[str, dict[str, Any], list[int]]] = [
        ("all at once", {}, every),
        ("shuffled", {}, rng.permutation(every).tolist()),
        ("shuffled again, prefixes cached", {}, rng.permutation(every).tolist()),
        ("chunks of 256 tokens", {"max_num_batched_tokens": 256 if GPU else 13}, every),
        ("starved KV cache", {"num_gpu_blocks_override": starved}, rng.permutation(every).tolist()),
        ("no prefix cache, 17 rows", {"enable_prefix_caching": False, "max_num_seqs": 17}, every[::-1]),
        ("no CUDA graphs", {"enforce_eager": True}, every),
    ]
    results, whole = {}, None
    for way, settings, order in ways:
        if settings:
            llm = None
            llm = load(args, deterministic=True, **settings)
        start = time.perf_counter()
        got = answers(llm, work, order)
        whole = whole or got
        pairs = list(zip(alone, got, strict=False))
        results[way] = {
            "rows": len(got),
            "equal_to_alone": sum(a == b for a, b in pairs),
            "tokens_equal_to_alone": sum(a[0] == b[0] for a, b in pairs),
            "of": len(pairs),
            "equal_to_all_at_once": sum(a == b for a, b in zip(whole, got, strict=True)),
            "preemptions": llm.engine.snapshot().num_preemptions,
            "wall_s": round(time.perf_counter() - start, 1),
        }
        print(way, results[way], flush=True)
    llm = None
    llm = load(args)
    normal = answers(llm, work, every)
    results["normal mode, for comparison"] = {
        "rows": len(normal),
        "equal_to_alone": sum(a == b for a, b in zip(alone, normal, strict=False)),
        "tokens_equal_to_alone": sum(a[0] == b[0] for a, b in zip(alone, normal, strict=False)),
        "of": len(alone), "equal_to_all_at_once": 0, "preemptions": 0, "wall_s": 0.0,
    }  # fmt: skip
    return results


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Output tokens/s of both modes, each in a second run of the same process."""
    results: dict[str, Any] = {}
    for mode in ("normal", "deterministic"):
        llm = None
        llm = load(args, deterministic=mode == "deterministic", **args.engine_kwargs)
        for name in args.workloads.split(","):
            spec, _, num = name.partition(":")
            work = build(spec, vocab_of(args), n=int(num) if num else None) if GPU else rows_of(args)
            warm = warmup(vocab_of(args)) if GPU else work
            for one in (warm, work):
                llm.reset_prefix_cache()
                params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in one.out_lens]
                rows = [{"prompt_token_ids": p} for p in one.prompts]
                start = time.perf_counter()
                llm.generate(rows, params, use_tqdm=False, on_error="raise")
                wall = time.perf_counter() - start
            results.setdefault(name, {})[mode] = round(work.num_output_tokens / wall, 1)
            print(mode, name, results[name], flush=True)
    for one in results.values():
        one["slow_down"] = round(one["normal"] / one["deterministic"] - 1, 4)
    return results


def median_ms(call: Callable[[], object], num: int = 20) -> float:
    if not GPU:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    import triton

    return triton.testing.do_bench(call, warmup=10, rep=5 * num, return_mode="median")


def products(args: argparse.Namespace) -> dict[str, Any]:
    """Times of the product by shape and M, torch's and the kernel's by tile; which tiles have the default's bits."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config["num_key_value_heads"]) * dim
    shapes = {"qkv": (hidden, qkv), "out": (heads * dim, hidden), "gate_up": (hidden, 2 * wide), "down": (wide, hidden)}
    shapes["head"] = (hidden, config["vocab_size"])
    tiles = MORE_TILES if GPU else [choose_tile(1, 1, 4), Tile(16, 64, 32, 4, 4, 2)]
    results: dict[str, Any] = {}
    for name, (num_in, num_out) in shapes.items():
        w = torch.randn(num_out, num_in, device=DEVICE).mul_(num_in**-0.5).to(DTYPE)
        for rows in (1, 16, 64, 256, 512, 1024, 4096, 16384) if GPU else (3, 40):
            if rows * num_out > 2**30:
                continue
            x = torch.randn(rows, num_in, device=DEVICE).to(DTYPE)
            want = matmul(x, w)
            torch_out = torch.nn.functional.linear(x, w).float()
            error = float((want.float() - torch_out).abs().max() / torch_out.abs().mean())
            line: dict[str, Any] = {"torch_ms": median_ms(lambda x=x, w=w: torch.nn.functional.linear(x, w))}
            line |= {"relative_error": error, "tiles": {}}
            # The row alone, and in other places of a batch, against itself in this one.
            row = rows // 2
            moved = torch.cat([x[row:], x[:row]])
            line["alone"] = torch.equal(matmul(x[row : row + 1].contiguous(), w)[0], want[row])
            line["moved"] = torch.equal(matmul(moved, w)[: rows - row], want[row:])
            for tile in tiles:
                for tma in (True, False):
                    label = f"{'x'.join(map(str, tile))} {'tma' if tma else 'pointers'}"
                    try:
                        same = torch.equal(matmul(x, w, tile=tile, tma=tma), want)
                        ms = median_ms(lambda x=x, w=w, tile=tile, tma=tma: matmul(x, w, tile=tile, tma=tma))
                        line["tiles"][label] = {"ms": round(ms, 4), "same_bits": same}
                    except Exception as error_:  # too much shared memory, say: a result too
                        line["tiles"][label] = {"error": f"{type(error_).__name__}: {str(error_)[:120]}"}
            results[f"{name} M={rows}"] = line
            fast = {label: one["ms"] for label, one in line["tiles"].items() if "ms" in one}
            best = min(fast, key=fast.__getitem__)
            default = f"{'x'.join(map(str, choose_tile(rows, num_out, DTYPE.itemsize)))} tma"
            own, time_ms = fast.get(default, float("nan")), line["torch_ms"]
            print(
                f"{name:8} M={rows:6} torch {time_ms:8.4f} ms, kernel x{own / time_ms:.2f}, best x"
                f"{fast[best] / time_ms:.2f} ({best}), alone {line['alone']}, moved {line['moved']}, same bits: "
                f"{sum(bool(one.get('same_bits')) for one in line['tiles'].values())} of {len(line['tiles'])}",
                flush=True,
            )
    return results


def attention(args: argparse.Namespace) -> dict[str, Any]:
    """Times of the fixed kernel's launch shapes, which have the default's bits, and single tokens against chunks."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    own_shape, results = prefill_module._launch_shape, {}
    cases = {"decode 1000 x 640": (1000, 640, 1), "decode 64 x 2000": (64, 2000, 1), "chunk 32 x 512": (32, 512, 512)}
    cases["chunk 8 x 2048"] = (8, 2048, 2048)
    for name, (rows, length, queries) in cases.items():
        rows, length, queries = (rows, length, queries) if GPU else (3, 40, min(queries, 20))
        width = -(-length // 16)
        cache = [
            torch.randn(rows * width + 1, kv_heads, 16, dim, device=DEVICE).to(DTYPE).transpose(1, 2) for _ in "kv"
        ]
        blocks = torch.randperm(rows * width, device=DEVICE).int().view(rows, width)
        lens = torch.full((rows,), length, dtype=torch.int32, device=DEVICE)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * queries
        q = torch.randn(rows * queries, heads, dim, device=DEVICE).to(DTYPE)
        kwargs: dict[str, Any] = {"scale": dim**-0.5}

        def fixed(q=q, cache=cache, blocks=blocks, lens=lens, starts=starts, queries=queries, kwargs=kwargs):
            return prefill_module.paged_prefill(
                q, *cache, blocks, lens, starts, max_query_len=queries, fixed=True, **kwargs
            )

        def normal(q=q, cache=cache, blocks=blocks, lens=lens, starts=starts, queries=queries, kwargs=kwargs):
            if queries == 1:
                return paged_decode(q, *cache, blocks, lens, **kwargs)
            return prefill_module.paged_prefill(q, *cache, blocks, lens, starts, max_query_len=queries, **kwargs)

        want = fixed()
        line: dict[str, Any] = {"normal_ms": median_ms(normal), "shapes": {}}
        line["relative_error"] = float((want.float() - normal().float()).abs().max() / want.float().abs().mean())
        # Each row's last token alone, as a decode: the same bits as in its chunk.
        last = q.view(rows, queries, heads, dim)[:, -1].contiguous()
        single = prefill_module.paged_prefill(
            last, *cache, blocks, lens, torch.arange(rows + 1, dtype=torch.int32, device=DEVICE), max_query_len=1,
            fixed=True, **kwargs,
        )  # fmt: skip
        line["single_as_in_chunk"] = torch.equal(single, want.view(rows, queries, heads, dim)[:, -1])
        for shape in SHAPES if GPU else [(32, 32, 4, 2), (16, 32, 4, 2)]:
            prefill_module._launch_shape = lambda *_, shape=shape: shape
            try:
                line["shapes"][str(shape)] = {"same_bits": torch.equal(fixed(), want), "ms": round(median_ms(fixed), 4)}
            except Exception as error:
                line["shapes"][str(shape)] = {"error": f"{type(error).__name__}: {str(error)[:120]}"}
            finally:
                prefill_module._launch_shape = own_shape
        results[name] = line
        print(name, json.dumps(line), flush=True)
    return results


PARTS = {"products": products, "attention": attention, "bits": bits, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--num-rows", type=int, default=1000 if GPU else 6)
    parser.add_argument("--num-alone", type=int, default=0, help="rows that also run alone; 0: all")
    parser.add_argument("--most-tokens", type=int, default=64, help="of a row's output, in `bits`")
    parser.add_argument("--workloads", default="W1,W5")
    parser.add_argument("--engine-kwargs", type=json.loads, default={}, help="JSON, for `speed`")
    parser.add_argument("--out", default="deterministic.json")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if GPU else "cpu, tiny"
    report: dict[str, Any] = {"device": device, "model": Path(args.model).name, "torch": torch.__version__}
    for part in args.parts.split(","):
        report[part] = PARTS[part](args)
        Path(args.out).write_text(json.dumps(report, indent=1))
    if "bits" in report:
        header = ["rows", "equal to the row alone", "its tokens", "of", "equal to all at once", "preemptions"]
        keys = ["equal_to_alone", "tokens_equal_to_alone", "of", "equal_to_all_at_once", "preemptions"]
        print(table(header, [[way, *(one[key] for key in keys)] for way, one in report["bits"].items()]), "\n")
    if "speed" in report:
        lines = [
            [name, *(one[k] for k in ("normal", "deterministic", "slow_down"))] for name, one in report["speed"].items()
        ]
        print(table(["output tokens/s", "normal", "deterministic", "slow-down"], lines))


if __name__ == "__main__":
    main()
