"""Time the attention backends that are installed next to ours, at the shapes of an 8B model, as Markdown.

    python benchmarks/attention_backends.py

32 query and 8 key/value heads of 128, bfloat16, blocks of 16 tokens dealt out at random. Each backend has the cache
that it allocates itself. Times are medians of one layer's call with the L2 cache flushed before it; what FlashInfer
plans on the host is done once a step, not once a layer, and is a column of its own.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from sys import path

import torch

path.insert(0, str(Path(__file__).resolve().parents[1]))

from rayinfer.attention import LayerSpec, StepMeta, get_backend
from rayinfer.errors import ConfigError

SPEC, SIZE, CUDA = LayerSpec(0, 32, 8, 128, 128**-0.5), 16, torch.device("cuda")
# (name, rows, tokens in the cache, tokens of this step)
CASES = [
    ("decode, 8 rows of 1,024", 8, 1024, 1), ("decode, 64 rows of 1,024", 64, 1024, 1),
    ("decode, 256 rows of 1,024", 256, 1024, 1), ("decode, 512 rows of 600", 512, 600, 1),
    ("decode, 16 rows of 16,384", 16, 16384, 1), ("prompts, 4 of 2,048", 4, 2048, 2048),
    ("prompts, 32 of 512", 32, 512, 512), ("prompts, 128 tokens behind 1,536, 64 rows", 64, 1664, 128),
]  # fmt: skip


def _meta(rows: int, length: int, new: int) -> tuple[StepMeta, int]:
    """A step of equal rows, and the blocks that they take."""
    width = -(-length // SIZE)
    table = torch.randperm(rows * width, device=CUDA).int().view(rows, width)
    tokens = rows * new
    zeros, starts = torch.zeros(tokens, dtype=torch.int64, device=CUDA), torch.arange(0, tokens + 1, new, device=CUDA)
    lens = torch.full((rows,), length, dtype=torch.int32, device=CUDA)
    return StepMeta(zeros, zeros - 1, table, lens, starts.int(), rows if new == 1 else 0, length, new), rows * width


def _median_us(attend, args: tuple, scratch: torch.Tensor, num: int = 15) -> float:
    for _ in range(3):
        attend(*args)
    times = []
    for _ in range(num):
        scratch.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        attend(*args)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[num // 2]


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds a layer (and what that reaches)\n")
    backends = []
    for name in ("triton", "flash_attn", "flashinfer"):
        try:
            backends.append(get_backend(name, CUDA))
        except ConfigError as error:
            print(f"without {name}: {error}\n")
    print("| | " + " | ".join(b.name for b in backends) + " | plan on the host |")
    print("|---" * (len(backends) + 2) + "|")
    scratch = torch.empty(2**28, dtype=torch.uint8, device=CUDA)
    for name, rows, length, new in CASES:
        cells, outs, plan = [], [], ""
        q = torch.randn(rows * new, 32, 128, device=CUDA).bfloat16()
        meta, num_blocks = _meta(rows, length, new)
        kv = torch.randn(2, num_blocks, SIZE, 8, 128, device=CUDA).bfloat16()
        for backend in backends:
            cache = backend.allocate(SPEC, num_blocks, SIZE, torch.bfloat16, CUDA)
            cache.k_NSKD.copy_(kv[0])
            cache.v_NSKD.copy_(kv[1])
            out = torch.empty_like(q)
            attend = backend.decode if new == 1 else backend.prefill
            if not backend.in_graphs:  # FlashInfer
                attend(q, cache, SPEC, meta, out)
                meta = replace(meta)  # another step of the same rows
                torch.cuda.synchronize()
                begin = time.perf_counter()
                attend(q, cache, SPEC, meta, out)
                plan = f"{(time.perf_counter() - begin) * 1e6:,.0f}"
            us = _median_us(attend, (q, cache, SPEC, meta, out), scratch)
            if new == 1:
                reached = f"{rows * length * 8 * 128 * 4 / us / 1e6:.2f} TB/s"
            else:
                reached = f"{4 * rows * new * (length - (new - 1) / 2) * 32 * 128 / us / 1e6:.0f} TFLOP/s"
            cells.append(f"{us:,.0f} ({reached})")
            outs.append(out.float())
            del cache
        worst = max((float((out - outs[0]).abs().max()) for out in outs[1:]), default=0.0)
        if not worst <= 0.07:
            raise SystemExit(f"{name}: backends differ by {worst:.3f}")
        print(f"| {name} | " + " | ".join(cells) + f" | {plan} |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
