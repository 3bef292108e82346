"""TritonBackend: a step of decodes and prompt chunks through the contract's methods, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rayinfer.attention.base import LayerSpec, StepMeta
from rayinfer.attention.triton import TritonBackend
from rayinfer.errors import ConfigError
from tests.kernels.paged import TOLERANCE, make_paged, reference, share

SPEC = LayerSpec(layer=0, num_heads=6, num_kv_heads=2, head_dim=64, scale=0.125, sliding_window=24, softcap=20.0)


def test_mixed_step(dtype, device):
    """Two decodes, a padding row, two chunks and padding tokens, after a step that wrote their context."""
    backend, block_size = TritonBackend(), 16
    cache = backend.allocate(SPEC, 12, block_size, dtype, device)
    assert cache.k_NSKD.shape == cache.v_NSKD.shape == (12, block_size, 2, 64)
    assert not cache.k_NSKD.any()
    assert not cache.v_NSKD.any()
    seq_lens, query_lens = [20, 33, 0, 40, 5], [1, 1, 1, 30, 5]
    table_RP = torch.tensor([[3, 7, 0], [1, 9, 4], [0, 0, 0], [2, 11, 6], [8, 0, 0]])
    kv = [torch.randn(2, length, 2, 64).to(dtype) for length in seq_lens]

    def slots(row: int, first: int, last: int) -> list[int]:
        return [int(table_RP[row, i // block_size]) * block_size + i % block_size for i in range(first, last)]

    def meta(ranges: list[tuple[int, int]]) -> StepMeta:
        slot_mapping = [slot for row, r in enumerate(ranges) for slot in slots(row, *r) or [-1]] + [-1, -1]
        starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(device)
        return StepMeta(
            positions_T=torch.zeros(len(slot_mapping), dtype=torch.int64, device=device),
            slot_mapping_T=torch.tensor(slot_mapping, device=device),
            block_table_RP=table_RP.int().to(device),
            seq_lens_R=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            query_start_R1=starts,
            num_decodes=3,
            max_seq_len=48,
            max_query_len=30,
        )

    def write(ranges: list[tuple[int, int]]) -> StepMeta:
        step = meta(ranges)
        new = [x[:, a:b] if b > a else torch.zeros(2, 1, 2, 64).to(dtype) for x, (a, b) in zip(kv, ranges, strict=True)]
        k_TKD, v_TKD = torch.cat([*new, torch.full((2, 2, 2, 64), float("nan")).to(dtype)], 1).to(device)
        backend.write(k_TKD, v_TKD, cache, step)
        return step

    firsts = [length - min(query, length) for length, query in zip(seq_lens, query_lens, strict=True)]
    write([(0, first) for first in firsts])
    step = write(list(zip(firsts, seq_lens, strict=True)))
    q_THD = torch.randn(sum(query_lens) + 2, 6, 64).to(dtype)
    out_THD = torch.full_like(q_THD, 7.0).to(device)
    backend.prefill(q_THD.to(device), cache, SPEC, step, out_THD)
    assert (out_THD[:3] == 7.0).all()
    backend.decode(q_THD.to(device), cache, SPEC, step, out_THD)
    starts = step.query_start_R1.tolist()
    for row, (k, v) in enumerate(kv):
        got = out_THD[starts[row] : starts[row + 1]].cpu().float()
        if seq_lens[row] == 0:
            assert not got.any()
            continue
        q_QHD = q_THD[starts[row] : starts[row + 1]].float()
        want = reference(q_QHD, k.float(), v.float(), SPEC.scale, SPEC.sliding_window, SPEC.softcap)
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (out_THD[starts[-1] :] == 7.0).all()


@pytest.mark.parametrize(
    ("changes", "dtype", "block_size", "named"),
    [
        (dict(head_dim=320), torch.float32, 16, "head_dim = 320"),
        (dict(num_heads=7), torch.float32, 16, "num_heads = 7"),
        (dict(num_heads=256), torch.float32, 16, "num_heads = 256"),
        ({}, torch.float64, 16, "float64"),
        ({}, torch.float16, 8, "block_size = 8"),
        ({}, torch.float16, 48, "block_size = 48"),
    ],
)
def test_refuses(changes, dtype, block_size, named):
    with pytest.raises(ConfigError, match=named):
        TritonBackend().check(replace(SPEC, **changes), dtype, block_size)


def test_accepts():
    TritonBackend().check(SPEC, torch.bfloat16, 128)


@pytest.mark.parametrize("window", [None, 24])
def test_groups(window, dtype, device):
    """A step with a group of three, a row alone and padding; where there is a window, groups must change nothing."""
    spec = replace(SPEC, sliding_window=window)
    paged = share(make_paged([70, 50, 65, 9, 0], 2, 64, 16, dtype, device), [0, 3, 3], [48, 16])
    int32 = dict(dtype=torch.int32, device=device)
    meta = StepMeta(
        positions_T=torch.zeros(5, dtype=torch.int64, device=device),
        slot_mapping_T=torch.full((5,), -1, device=device),
        block_table_RP=paged.table_RP,
        seq_lens_R=paged.seq_lens_R,
        query_start_R1=torch.arange(6, **int32),
        num_decodes=5,
        max_seq_len=70,
        max_query_len=1,
        group_start_G1=torch.tensor([0, 3, 3], **int32),
        group_len_G=torch.tensor([48, 16], **int32),
        shared_len_B=torch.tensor([48, 48, 48, 0, 0], **int32),
    )
    q_THD = torch.randn(5, 6, 64).to(dtype).to(device)
    out_THD = torch.full_like(q_THD, 7.0)
    TritonBackend().decode(q_THD, paged.cache, spec, meta, out_THD)
    for row, (k, v) in enumerate(zip(paged.keys[:4], paged.values, strict=False)):
        want = reference(q_THD[row : row + 1].cpu().float(), k, v, spec.scale, window, spec.softcap)
        torch.testing.assert_close(
            out_THD[row : row + 1].cpu().float(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
    assert not out_THD[4].any()
