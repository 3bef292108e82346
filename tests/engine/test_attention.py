"""The torch backend against attention written out naively in float64, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from rayinfer.attention import LayerSpec, StepMeta, get_backend
from rayinfer.attention.torch import _alike

BLOCK_SIZE = 4
# (tokens in the cache once the step is written, tokens of this step): decodes first.
MIXED = [(1, 1), (17, 1), (4, 1), (9, 1), (5, 5), (30, 3), (8, 8), (13, 12)]


def _naive(q_HD, k_LKD, v_LKD, spec: LayerSpec, position: int) -> torch.Tensor:
    """One token's output [H, D]; only keys that it sees are touched."""
    group = spec.num_heads // spec.num_kv_heads
    first = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
    out = []
    for head in range(spec.num_heads):
        k_LD, v_LD = (x[first : position + 1, head // group].double() for x in (k_LKD, v_LKD))
        scores = [spec.scale * float(q_HD[head].double() @ key) for key in k_LD]
        if spec.softcap is not None:
            scores = [spec.softcap * math.tanh(score / spec.softcap) for score in scores]
        out.append(torch.tensor(scores, dtype=torch.float64).softmax(0) @ v_LD)
    return torch.stack(out)


def _run(spec: LayerSpec, rows, dtype=torch.float32, seed: int = 0):
    """Backend and naive outputs [T, H, D] of a step; everything that no row owns is NaN."""
    torch.manual_seed(seed)
    backend = get_backend("torch", torch.device("cpu"))
    backend.check(spec, dtype, BLOCK_SIZE)
    num_blocks = sum(-(-length // BLOCK_SIZE) for length, _ in rows) + 8
    cache = backend.allocate(spec, num_blocks, BLOCK_SIZE, dtype, torch.device("cpu"))
    assert not cache.k_NSKD.any()
    cache.k_NSKD[1:] = cache.v_NSKD[1:] = float("nan")
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    width = max(-(-length // BLOCK_SIZE) for length, _ in rows) + 2
    table = torch.tensor(free[-8:], dtype=torch.int32)[torch.randint(0, 8, (len(rows), width))]  # NaN past the end
    keys, values, positions, slots, starts = [], [], [], [], [0]
    for row, (length, num_new) in enumerate(rows):
        blocks = [free.pop(0) for _ in range(-(-length // BLOCK_SIZE))]
        table[row, : len(blocks)] = torch.tensor(blocks)
        k_LKD, v_LKD = torch.randn(2, length, spec.num_kv_heads, spec.head_dim).to(dtype)
        where = [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        old = torch.tensor(where[: length - num_new], dtype=torch.long)
        cache.k_NSKD.view(-1, spec.num_kv_heads, spec.head_dim)[old] = k_LKD[: length - num_new]
        cache.v_NSKD.view(-1, spec.num_kv_heads, spec.head_dim)[old] = v_LKD[: length - num_new]
        keys.append(k_LKD)
        values.append(v_LKD)
        positions += range(length - num_new, length)
        slots += where[length - num_new :]
        starts.append(len(positions))
    meta = StepMeta(
        positions_T=torch.tensor(positions + [0, 0]),
        slot_mapping_T=torch.tensor(slots + [-1, -1]),  # two tokens of padding
        block_table_RP=table,
        seq_lens_R=torch.tensor([length for length, _ in rows], dtype=torch.int32),
        query_start_R1=torch.tensor(starts, dtype=torch.int32),
        num_decodes=sum(num_new == 1 for _, num_new in rows),
        max_seq_len=max(length for length, _ in rows),
        max_query_len=max(num_new for _, num_new in rows),
    )
    new = [torch.cat([x[-n:] for x, (_, n) in zip(part, rows, strict=True)]) for part in (keys, values)]
    pad = torch.full((2, spec.num_kv_heads, spec.head_dim), 7.0, dtype=dtype)
    backend.write(torch.cat([new[0], pad]), torch.cat([new[1], pad]), cache, meta)
    q_THD = torch.randn(len(positions) + 2, spec.num_heads, spec.head_dim).to(dtype)
    out_THD = torch.empty_like(q_THD)
    if meta.num_decodes:
        backend.decode(q_THD, cache, spec, meta, out_THD)
    if meta.num_decodes < len(rows):
        backend.prefill(q_THD, cache, spec, meta, out_THD)
    want = []
    for row in range(len(rows)):
        for token in range(starts[row], starts[row + 1]):
            want.append(_naive(q_THD[token], keys[row], values[row], spec, positions[token]))
    assert not cache.k_NSKD[0].any(), "padding is written nowhere"
    return out_THD[: len(positions)], torch.stack(want)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sliding_window", [None, 1, 4, 7, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (4, 1)])
def test_equals_naive_attention(num_heads, num_kv_heads, sliding_window, softcap):
    spec = LayerSpec(0, num_heads, num_kv_heads, 12, 0.4, sliding_window, softcap)
    got, want = _run(spec, MIXED)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


LONG_AND_SHORT = [(1, 1), (300, 1), (3, 1), (90, 1), (2, 1), (40, 1), (8, 1), (310, 1), (4, 1), (5, 3)]


@pytest.mark.parametrize(
    "rows",
    [[(7, 1)], [(9, 9)], [(33, 1), (1, 1), (12, 1)], [(2, 2), (31, 30)], [(4, 1), (8, 4)], LONG_AND_SHORT],
)
@pytest.mark.parametrize("sliding_window", [None, 5])
def test_steps_of_one_kind(rows, sliding_window):
    """Decodes alone, chunks alone, lengths at the edges of blocks, and decodes that are grouped by length."""
    got, want = _run(LayerSpec(0, 6, 2, 8, 8**-0.5, sliding_window), rows, seed=1)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def test_long_rows_do_not_pad_short_ones():
    num_B = torch.tensor([-(-length // BLOCK_SIZE) for length, num_new in LONG_AND_SHORT if num_new == 1])
    groups = [sorted(num_B[rows].tolist()) for rows in _alike(num_B)]
    assert groups == [[75, 78], [23], [1, 1, 1, 1, 2, 10]]
    assert [len(rows) for rows in _alike(torch.tensor([9, 2, 8, 1, 9]))] == [5]  # little to spare


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    got, want = _run(LayerSpec(0, 6, 2, 16, 0.25, 7), MIXED, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=3e-2, rtol=3e-2)
