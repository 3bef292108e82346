"""Check every kernel against plain torch in float32 on this GPU, then time it against what the hardware allows.

    python benchmarks/kernels.py [--out PATH] [--only TEXT] [--dry] [--tune]

The floor of a case is the larger of bytes / measured bandwidth and FLOPs / measured GEMM rate, both measured first.
Times are medians; the L2 cache is flushed before each run. `--dry` takes tiny shapes and no times: a test of this
script. `--tune` times the shared-prefix kernel in many launch shapes instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from torch.nn import functional as F

from rayinfer.kernels import paged_decode as decode_module
from rayinfer.kernels import shared_prefix as prefix_module
from rayinfer.kernels.act_mul import act_mul
from rayinfer.kernels.paged_decode import paged_decode
from rayinfer.kernels.paged_prefill import paged_prefill
from rayinfer.kernels.rms_norm import add_rms_norm
from rayinfer.kernels.rope_kv import qk_norm_rope_write
from rayinfer.kernels.sampling import greedy, sample
from rayinfer.kernels.shared_prefix import shared_prefix
from rayinfer.sampler import reference as torch_sampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter's bfloat16 is wrong.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SIZE = DTYPE.itemsize


@dataclass
class Case:
    """One call to check and time; `check` returns the largest error, relative to what is allowed (1)."""

    name: str
    run: Callable[[], object]
    check: Callable[[], float]
    num_bytes: float = 0.0
    flops: float = 0.0


def _error(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-2) -> float:
    """Largest |got - want| / (tolerance * (|want| + rms of want)); NaN counts as infinite."""
    want = want.float()
    error = ((got.float() - want).abs() / (tolerance * (want.abs() + want.square().mean().sqrt()))).max()
    return float(torch.nan_to_num(error, nan=float("inf")))


def _paged(lengths: list[int], kv_heads: int, dim: int, block_size: int = 16):
    """A head-major cache of random KV with blocks dealt out at random, its block table and lengths."""
    width = -(-max(lengths) // block_size)
    counts = torch.tensor([-(-n // block_size) for n in lengths])
    shuffled = torch.randperm(int(counts.sum()))
    table = torch.zeros(len(lengths), width, dtype=torch.int32)
    for row, (start, count) in enumerate(zip((counts.cumsum(0) - counts).tolist(), counts.tolist(), strict=True)):
        table[row, :count] = shuffled[start : start + count]
    shape = (len(shuffled), kv_heads, block_size, dim)
    k, v = (torch.randn(shape, dtype=DTYPE, device=DEVICE).transpose(1, 2) for _ in range(2))
    return k, v, table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def _attention(q_QHD, k_NSKD, v_NSKD, blocks, length, scale, window=None):
    """Attention of a row's last Q tokens in float32."""
    group = q_QHD.shape[1] // k_NSKD.shape[2]
    k, v = (
        x[blocks.long()].flatten(0, 1)[:length].float().repeat_interleave(group, 1).transpose(0, 1)
        for x in (k_NSKD, v_NSKD)
    )
    position = torch.arange(length - q_QHD.shape[0], length, device=DEVICE)[:, None]
    key = torch.arange(length, device=DEVICE)
    seen = (key <= position) & (key > position - (window or length + 1))
    return F.scaled_dot_product_attention(q_QHD.float().transpose(0, 1), k, v, seen, scale=scale).transpose(0, 1)


def _decode_cases(dry: bool) -> Iterator[Case]:
    models = {"8B": (32, 8, 128, None), "0.6B": (16, 8, 128, None), "gemma": (4, 1, 256, 512), "smol": (9, 3, 64, None)}
    mixes = [
        ("8B", 64, ""),
        ("8B", 256, ""),
        ("8B", 1024, ""),
        ("8B", 256, " mixed"),
        ("0.6B", 64, ""),
        ("0.6B", 256, ""),
    ]
    mixes += [("0.6B", 1024, ""), ("gemma", 256, ""), ("smol", 256, ""), ("8B", 4, " long")]
    mixes += [("8B", 488, f" beside prompts, item {item}") for item in (0, 1, 2, 4)]
    for model, rows, mix in mixes:
        heads, kv_heads, dim, window = models[model]
        rows = 3 if dry else rows
        length_B = torch.randint(512, 1500, (rows,))
        if mix == " mixed":  # most rows short, one in sixteen long
            length_B = torch.where(torch.rand(rows) < 1 / 16, torch.randint(4096, 16384, (rows,)), length_B // 4)
        elif mix == " long":
            length_B = torch.full((rows,), 65536)
        elif "prompts" in mix:  # 400 rows that decode, and the tokens of a prompt as rows of their own
            length_B = torch.where(torch.arange(rows) < 400, length_B // 3, torch.arange(rows) - 399)
        item = int(mix.rpartition(" ")[2]) if "item" in mix else decode_module._ITEM_TILES
        lengths = ((length_B % 90) + 1 if dry else length_B).tolist()
        k, v, table, lens = _paged(lengths, kv_heads, dim)
        q = torch.randn(rows, heads, dim, dtype=DTYPE, device=DEVICE)
        scale = dim**-0.5

        def run(q=q, k=k, v=v, table=table, lens=lens, scale=scale, window=window, item=item):
            decode_module._ITEM_TILES = item
            return paged_decode(q, k, v, table, lens, scale=scale, sliding_window=window)

        def check(run=run, q=q, k=k, v=v, table=table, lengths=lengths, scale=scale, window=window):
            out = run()
            rows = {0, len(lengths) // 2, len(lengths) - 1, lengths.index(max(lengths)), lengths.index(min(lengths))}
            want = {
                r: _attention(q[r : r + 1], k, v, table[r, : -(-n // 16)], n, scale, window)
                for r in rows
                if (n := lengths[r])
            }
            return max(_error(out[r : r + 1], w) for r, w in want.items())

        tokens = sum(min(n, window) if window else n for n in lengths)
        yield Case(
            f"decode {model} B{rows}{mix}", run, check, tokens * kv_heads * dim * 2 * SIZE, tokens * heads * dim * 4
        )


# Of the shared-prefix kernel: pairs of a tile, tokens of a KV tile, warps, stages, programs a multiprocessor.
LAUNCH_SHAPES = [(64, 64, 4, 2, 2), (64, 64, 4, 3, 2), (64, 64, 4, 2, 4), (64, 32, 4, 3, 3), (64, 32, 4, 4, 2)]
LAUNCH_SHAPES += [(128, 64, 8, 2, 1), (128, 64, 8, 3, 1), (128, 64, 8, 2, 2), (128, 32, 8, 3, 1), (128, 128, 8, 2, 1)]


def _prefix_cases(dry: bool) -> Iterator[Case]:
    """Groups of rows with a prefix: the prefix alone, all of it, and the same rows without groups (and their floor)."""
    heads, kv_heads, dim, scale = 32, 8, 128, 128**-0.5
    for num_groups, size, shared in ((1, 1000, 1536), (64, 16, 1536), (1, 64, 8192)):
        name, int32 = f"8B {num_groups}x{size}+{shared}", dict(dtype=torch.int32, device=DEVICE)
        num_groups, size, shared = (min(num_groups, 2), 3, 48) if dry else (num_groups, size, shared)
        rows = num_groups * size
        lengths = (
            shared + torch.randint(1, 40, (rows,)) if dry else shared + torch.randint(128, 192, (rows,))
        ).tolist()
        k, v, table, lens = _paged(lengths, kv_heads, dim)
        first = torch.arange(rows, device=DEVICE) // size * size
        table[:, : shared // 16] = table[first, : shared // 16]
        starts = torch.arange(num_groups + 1, **int32) * size
        shared_lens = torch.full((rows,), shared, **int32)
        q = torch.randn(rows, heads, dim, dtype=DTYPE, device=DEVICE)

        def prefix(inputs=(q, k, v, table), starts=starts, shared_lens=shared_lens):
            return shared_prefix(*inputs, starts, shared_lens[: len(starts) - 1], scale=scale)

        def run(inputs=(q, k, v, table), lens=lens, shared_lens=shared_lens, prefix=prefix):
            return paged_decode(*inputs, lens, scale=scale, shared_len_B=shared_lens, prefix=prefix())

        def without(inputs=(q, k, v, table), lens=lens):
            return paged_decode(*inputs, lens, scale=scale)

        def check(run, q=q, k=k, v=v, table=table, lengths=lengths):
            out, rows = run(), range(0, len(lengths), max(1, len(lengths) // 8))
            want = [_attention(q[r : r + 1], k, v, table[r, : -(-lengths[r] // 16)], lengths[r], scale) for r in rows]
            return max(_error(out[r : r + 1], w) for r, w in zip(rows, want, strict=True))

        in_out, token = 2 * rows * heads * dim * SIZE, kv_heads * dim * 2 * SIZE
        num_bytes, flops = num_groups * shared * token, rows * shared * heads * dim * 4
        parts = num_bytes + in_out // 2 + rows * heads * dim * 4, flops
        num_bytes += (sum(lengths) - rows * shared) * token + in_out
        flops = sum(lengths) * heads * dim * 4
        yield Case(f"prefix alone {name}", prefix, lambda run=run, check=check: check(run), *parts)
        yield Case(f"prefix {name}", run, lambda run=run, check=check: check(run), num_bytes, flops)
        yield Case(f"no groups {name}", without, lambda run=without, check=check: check(run), num_bytes, flops)


def _tune(dry: bool) -> None:
    for case in _prefix_cases(dry):
        if "alone" in case.name:
            for shape in LAUNCH_SHAPES:
                prefix_module._launch_shape = lambda *_, shape=shape: shape
                error, seconds = case.check(), 0.0 if dry else _seconds(case.run)
                print(f"{case.name:32}{shape!s:24}{error:7.2f}{seconds * 1e6:10.1f} us", flush=True)


def _prefill_cases(dry: bool) -> Iterator[Case]:
    shapes = [("8B 4x2048", 32, 8, 128, 4, 2048, 0), ("8B 16x512", 32, 8, 128, 16, 512, 0)]
    shapes += [("8B 2x1024+3072", 32, 8, 128, 2, 1024, 3072), ("smol 16x512", 9, 3, 64, 16, 512, 0)]
    for name, heads, kv_heads, dim, rows, queries, context in shapes:
        rows, queries, context = (2, 21, context and 19) if dry else (rows, queries, context)
        length = queries + context
        k, v, table, lens = _paged([length] * rows, kv_heads, dim)
        q = torch.randn(rows * queries, heads, dim, dtype=DTYPE, device=DEVICE)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * queries
        scale = dim**-0.5

        def run(q=q, k=k, v=v, table=table, lens=lens, starts=starts, queries=queries, scale=scale):
            return paged_prefill(q, k, v, table, lens, starts, max_query_len=queries, scale=scale)

        def check(run=run, q=q, k=k, v=v, table=table, length=length, queries=queries, scale=scale):
            return _error(run()[-queries:], _attention(q[-queries:], k, v, table[-1], length, scale))

        pairs = rows * queries * (context + (queries + 1) / 2)
        size = SIZE * dim * rows * (2 * kv_heads * length + 2 * heads * queries)
        yield Case(f"prefill {name}", run, check, size, pairs * heads * dim * 4)


def _small_cases(dry: bool) -> Iterator[Case]:
    for tokens in (3,) if dry else (256, 1024, 8192):
        for model, heads, kv_heads, dim, qk_norm in (("8B", 32, 8, 128, False), ("0.6B", 16, 8, 128, True)):
            width = (heads + 2 * kv_heads) * dim
            qkv = torch.randn(tokens, width, dtype=DTYPE, device=DEVICE)
            angle = torch.rand(4096, dim // 2, device=DEVICE).repeat(1, 2) * 6
            positions = torch.randint(0, 4096, (tokens,), device=DEVICE)
            k, v, _, _ = _paged([tokens], kv_heads, dim)
            slots = torch.randperm(k.shape[0] * 16, device=DEVICE)[:tokens]
            weight = torch.randn(dim, dtype=DTYPE, device=DEVICE) if qk_norm else None
            tables = (angle.cos(), angle.sin(), positions, slots, k, v)
            shape = dict(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, q_weight=weight, k_weight=weight)

            def rope(qkv=qkv, tables=tables, shape=shape):
                return qk_norm_rope_write(qkv, *tables, **shape)

            def check(rope=rope, qkv=qkv, tables=tables, shape=shape, weight=weight):
                cos, sin, positions, slots, k, v = tables
                q = rope()
                heads, kv_heads, dim = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
                x = qkv.float().unflatten(1, (-1, dim))
                qk, value = x[:, : heads + kv_heads], x[:, heads + kv_heads :]
                if weight is not None:
                    qk = F.rms_norm(qk, (dim,), weight.float(), 1e-6)
                turned = torch.cat([-qk[..., dim // 2 :], qk[..., : dim // 2]], -1)
                qk = qk * cos[positions][:, None] + turned * sin[positions][:, None]
                k, v = (c.transpose(1, 2)[slots // 16, :, slots % 16] for c in (k, v))
                return max(_error(q, qk[:, :heads]), _error(k, qk[:, heads:]), _error(v, value))

            yield Case(f"rope+kv {model} T{tokens}", rope, check, 2 * tokens * width * SIZE + tokens * dim * 8)
        x, residual = torch.randn(2, tokens, 4096, dtype=DTYPE, device=DEVICE)
        weight = torch.randn(4096, dtype=DTYPE, device=DEVICE)

        def norm(x=x, residual=residual, weight=weight):
            return add_rms_norm(x, residual, weight, 1e-5)

        def check_norm(norm=norm, x=x, residual=residual, weight=weight):
            total = (x + residual).float()
            got, got_sum = norm()
            return max(_error(got, F.rms_norm(total, (4096,), weight.float(), 1e-5)), _error(got_sum, total))

        yield Case(f"add_rms_norm T{tokens}", norm, check_norm, 4 * tokens * 4096 * SIZE)
        wide = torch.randn(tokens, 28672, dtype=DTYPE, device=DEVICE)

        def gate(wide=wide):
            return act_mul(wide, "silu")

        def check_gate(gate=gate, wide=wide):
            a, b = wide.float().chunk(2, 1)
            return _error(gate(), F.silu(a) * b)

        yield Case(f"act_mul T{tokens}", gate, check_gate, 3 * tokens * 14336 * SIZE)


def _sampling_cases(dry: bool) -> Iterator[Case]:
    num_tokens = 5000 if dry else 128256
    for rows, dtype in ((2, DTYPE),) if dry else ((256, DTYPE), (1024, DTYPE), (1024, torch.float32)):
        rank = torch.rand(rows, num_tokens, device=DEVICE).argsort(1) + 1
        logits = (-1.5 * rank.float().log() + 0.3 * torch.randn(rows, num_tokens, device=DEVICE)).to(dtype)
        flat = torch.randn(rows, num_tokens, device=DEVICE).to(dtype)
        del rank
        seed = torch.arange(rows, device=DEVICE) * 977
        label = f"R{rows} {str(dtype).removeprefix('torch.')}"
        size = rows * num_tokens * dtype.itemsize

        def best(logits=logits):
            return greedy(logits)

        def check_best(best=best, logits=logits):
            tied = logits == logits.amax(1, keepdim=True)
            lowest = torch.where(tied, torch.arange(logits.shape[1], device=DEVICE), logits.shape[1]).amin(1)
            return float((best() != lowest).sum()) * 2

        yield Case(f"greedy {label}", best, check_best, size)
        filters = {"": (0, 1.0), " k50": (50, 1.0), " p.9": (0, 0.9), " k50 p.9": (50, 0.9), " flat p.9": (0, 0.9)}
        for name, (top_k, top_p) in filters.items():
            source = flat if "flat" in name else logits
            columns = [torch.full((rows,), x, device=DEVICE) for x in (1.0, top_k, top_p, 0.0)]

            def draw(source=source, columns=columns, seed=seed):
                temperature, top_k, top_p, min_p = columns
                return sample(source, temperature, top_k, top_p, min_p, seed, seed)

            def check(draw=draw, source=source, columns=columns, seed=seed):
                some = slice(0, 64)  # the reference sorts
                temperature, top_k, top_p, min_p = (c[some] for c in columns)
                want = torch_sampler.sample(
                    source[some].float(), temperature, top_k, top_p, min_p, seed[some], seed[some]
                )
                # Sums of probabilities are rounded in another order: one row in 64 may fall the other way.
                return float((draw()[some] != want).sum()) / 1.5

            yield Case(f"sample {label}{name}", draw, check, size)


def _ceilings() -> tuple[float, float]:
    """Bandwidth in bytes/s (the better of copy and read) and bf16 GEMM rate in FLOP/s of this GPU."""
    a = torch.empty(1 << 30, dtype=torch.float32, device=DEVICE).normal_()
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / _seconds(lambda: b.copy_(a))
    read = a.nbytes / _seconds(lambda: a.amax())
    m = torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE)
    gemm = 2 * 8192**3 / _seconds(lambda: m @ m)
    print(f"copy {copy / 1e12:.2f} TB/s, read {read / 1e12:.2f} TB/s, GEMM {gemm / 1e12:.0f} TFLOP/s")
    return max(copy, read), gemm


def _seconds(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median") / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the records there, as JSON")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, no times")
    parser.add_argument("--tune", action="store_true", help="only the shared-prefix kernel, in many launch shapes")
    args = parser.parse_args()
    if not args.dry and DEVICE.type != "cuda":
        parser.error("times need a CUDA GPU; --dry runs without one")
    torch.manual_seed(time.time_ns() % 2**31)
    started = time.perf_counter()
    if args.tune:
        _tune(args.dry)
        return 0
    bandwidth, rate = (1.0, 1.0) if args.dry else _ceilings()
    records, failed = [], False
    print(f"{'case':32}{'error':>7}{'us':>10}{'floor us':>10}{'of floor':>9}{'GB/s':>8}{'TFLOP/s':>9}")
    for cases in (_decode_cases, _prefix_cases, _prefill_cases, _small_cases, _sampling_cases):
        for case in cases(args.dry):
            if args.only not in case.name:
                continue
            error = case.check()
            failed |= not error <= 1
            seconds = 0.0 if args.dry else _seconds(case.run)
            floor = max(case.num_bytes / bandwidth, case.flops / rate)
            records.append(dict(case=case.name, error=error, us=seconds * 1e6, floor_us=floor * 1e6))
            line = f"{case.name:32}{error:7.2f}"
            if not args.dry:
                line += f"{seconds * 1e6:10.1f}{floor * 1e6:10.1f}{floor / seconds:9.2f}"
                line += f"{case.num_bytes / seconds / 1e9:8.0f}{case.flops / seconds / 1e12:9.1f}"
            print(line + ("" if error <= 1 else "  WRONG"), flush=True)
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "interpreter"
    print(
        f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {time.perf_counter() - started:.0f} s in all"
    )
    if args.out:
        figures = dict(gpu=gpu, torch=torch.__version__, triton=triton.__version__, bytes_per_s=bandwidth, flops=rate)
        args.out.write_text(json.dumps(dict(**figures, cases=records), indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
