"""Compile every kernel ahead of time, without a GPU, and print registers, spills and shared memory.

    python benchmarks/aot.py [--target cuda|hip] [--json PATH]

The real wrappers are called on `meta` tensors of real shapes, so what is compiled is what an engine launches. Only the
GPU driver is replaced, by one that names the target, and launches stop at the compiled kernel.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rayinfer.kernels.act_mul import act_mul
from rayinfer.kernels.matmul import matmul
from rayinfer.kernels.paged_decode import paged_decode
from rayinfer.kernels.paged_prefill import paged_prefill
from rayinfer.kernels.rms_norm import add_rms_norm, rms_norm
from rayinfer.kernels.rope_kv import qk_norm_rope_write, write_kv
from rayinfer.kernels.sampling import greedy, sample
from rayinfer.kernels.shared_prefix import shared_prefix

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
MAX_SHARED = {"cuda": 227 * 1024, "hip": 64 * 1024}  # bytes a block may use: sm_90, CDNA 3
BF16, F32 = torch.bfloat16, torch.float32
# name -> query heads, KV heads, head size, sliding window, softcap, dtype
MODELS = {
    "llama-8b": (32, 8, 128, None, None, BF16),
    "smollm2": (9, 3, 64, None, None, BF16),
    "gemma-window": (4, 1, 256, 512, None, BF16),
    "softcap-fp32": (8, 4, 80, None, 50.0, F32),
}


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cases() -> dict[str, Callable[[], object]]:
    """One call of a wrapper a case."""
    rows, tokens = 256, 2048
    int32, int64 = torch.int32, torch.int64
    table, lens = _meta(rows, 256, dtype=int32), _meta(rows, dtype=int32)
    starts, slots = _meta(rows + 1, dtype=int32), _meta(tokens, dtype=int64)
    cases: dict[str, Callable[[], object]] = {}
    for name, (heads, kv_heads, dim, window, softcap, dtype) in MODELS.items():
        cache = _meta(4096, kv_heads, 16, dim, dtype=dtype).transpose(1, 2)
        q = _meta(tokens, heads, dim, dtype=dtype)
        layer = dict(scale=1.0, sliding_window=window, softcap=softcap)

        def decode(q=q, cache=cache, layer=layer):
            paged_decode(q[:rows], cache, cache, table, lens, **layer)

        def prefix(q=q, cache=cache, softcap=softcap):
            inputs = (q[:rows], cache, cache, table)
            part = shared_prefix(*inputs, starts[:65], lens[:64], scale=1.0, softcap=softcap)
            paged_decode(*inputs, lens, scale=1.0, softcap=softcap, shared_len_B=lens, prefix=part)

        def prefill(q=q, cache=cache, layer=layer):
            paged_prefill(q, cache, cache, table, lens, starts, max_query_len=tokens, **layer)

        def fixed(q=q, cache=cache, layer=layer):
            paged_prefill(q, cache, cache, table, lens, starts, max_query_len=tokens, fixed=True, **layer)

        norm = name == "gemma-window"

        def rope(cache=cache, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, norm=norm):
            weight = _meta(dim, dtype=dtype) if norm else None
            angles = _meta(8192, dim, dtype=F32)
            qkv = _meta(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
            shape = dict(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
            norms = dict(q_weight=weight, k_weight=weight, gemma=norm)
            qk_norm_rope_write(qkv, angles, angles, slots, slots, cache, cache, **shape, **norms)

        cases[f"decode {name}"] = decode
        cases[f"prefix {name}"] = prefix
        cases[f"prefill {name}"] = prefill
        cases[f"prefill {name} fixed"] = fixed
        cases[f"rope {name}"] = rope
    cache, kv = _meta(4096, 8, 16, 128).transpose(1, 2), _meta(tokens, 8, 128)
    cases["write_kv"] = lambda: write_kv(kv, kv, cache, cache, slots)
    x, weight = _meta(tokens, 4096), _meta(4096)
    cases["rms_norm"] = lambda: rms_norm(x, weight, 1e-5)
    cases["add_rms_norm"] = lambda: add_rms_norm(x, x, weight, 1e-5)
    cases["add_rms_norm gemma"] = lambda: add_rms_norm(x, x, weight, 1e-5, gemma=True)
    for dtype, num, out in (
        (BF16, 16, 6144),
        (BF16, 16, 28672),
        (BF16, 128, 6144),
        (BF16, tokens, 6144),
        (F32, tokens, 6144),
    ):
        product = [_meta(num, 4096, dtype=dtype), _meta(out, 4096, dtype=dtype), _meta(out, dtype=dtype)]
        short = f"{str(dtype).removeprefix('torch.')} {num} x {out}"
        cases[f"matmul {short}"] = lambda product=product: matmul(*product)  # type: ignore[misc]
        cases[f"matmul {short} pointers"] = lambda product=product: matmul(*product, tma=False)  # type: ignore[misc]
    for kind in ("silu", "gelu_tanh", "gelu"):
        cases[f"act_mul {kind}"] = lambda kind=kind: act_mul(_meta(tokens, 28672), kind)  # type: ignore[misc]
    for dtype in (BF16, F32):
        logits, real = _meta(rows, 128256, dtype=dtype), _meta(rows, dtype=F32)
        whole = _meta(rows, dtype=int64)
        short = str(dtype).removeprefix("torch.")
        cases[f"greedy {short}"] = lambda logits=logits: greedy(logits)  # type: ignore[misc]
        cases[f"sample {short}"] = lambda logits=logits, real=real, whole=whole: sample(  # type: ignore[misc]
            logits, real, lens, real, real, whole, whole
        )
    return cases


def _cuda_figures(kernel: SimpleNamespace) -> dict[str, int]:
    """Registers and spilled bytes that ptxas reports for the kernel's PTX."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        command = [str(ptxas), "-v", "--gpu-name", "sm_90a", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    if registers is None:
        raise ValueError(f"ptxas reported no registers: {report}")
    return {"registers": int(registers[1]), "spills": sum(map(int, spills))}


def _hip_figures(kernel: SimpleNamespace) -> dict[str, int]:
    """Vector registers, and registers spilled, from the code object's metadata."""
    text = kernel.asm["amdgcn"]
    values = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    return {"registers": values["vgpr_count"], "spills": values["vgpr_spill_count"] + values["sgpr_spill_count"]}


def compile_all(target: str) -> list[dict[str, Any]]:
    """Compile every case for "cuda" (sm_90) or "hip" (gfx942); one record for each kernel of a case.

    Raises whatever the compiler raises. Records hold case, kernel, registers, spills, shared (bytes), seconds.
    """
    stub = SimpleNamespace(
        get_current_target=lambda: TARGETS[target], get_current_device=lambda: target, get_current_stream=lambda _: 0
    )
    compiled: list[Any] = []
    original = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(original(self, *args, grid=grid, warmup=True, **kwargs))

    records = []
    driver.set_active(stub)
    torch.version.hip = "gfx942" if target == "hip" else None  # what the wrappers choose pipeline depths by
    JITFunction.run = compile_only
    try:
        for case, call in _cases().items():
            compiled.clear()
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
            for kernel in compiled:
                figures = _cuda_figures(kernel) if target == "cuda" else _hip_figures(kernel)
                records.append(
                    dict(case=case, kernel=kernel.name, **figures, shared=kernel.metadata.shared, seconds=seconds)
                )
    finally:
        JITFunction.run = original
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: both")
    parser.add_argument("--json", type=Path, help="write the records there")
    args = parser.parse_args()
    results, failed = {}, False
    for target in args.target or TARGETS:
        records = results[target] = compile_all(target)
        print(f"{TARGETS[target].arch}, triton {triton.__version__}, shared memory allowed: {MAX_SHARED[target]} B")
        print(f"{'case':28}{'kernel':28}{'registers':>10}{'spills':>8}{'shared':>8}{'s':>7}")
        for r in records:
            too_much = r["shared"] > MAX_SHARED[target]
            failed |= too_much
            mark = "  TOO MUCH SHARED MEMORY" if too_much else ""
            print(
                f"{r['case']:28}{r['kernel']:28}{r['registers']:10}{r['spills']:8}{r['shared']:8}{r['seconds']:7.1f}{mark}"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
