"""paged_prefill against attention in plain torch."""

from __future__ import annotations

import pytest
import torch

from rayinfer.kernels.hopper_prefill import order_of_tiles
from rayinfer.kernels.paged_prefill import paged_prefill
from tests.kernels.paged import TOLERANCE, make_paged, reference


def _check(lens, heads, kv_heads, dim, block_size, dtype, device, *, head_major=True, slack=0, **layer):
    """`lens` are (query tokens, cached tokens before them) of each row; `slack` is added to max_query_len."""
    query_lens = [query for query, _ in lens]
    paged = make_paged(
        [query + context for query, context in lens], kv_heads, dim, block_size, dtype, device, head_major
    )
    start_R1 = torch.tensor([0, *query_lens]).cumsum(0).int()
    num_tokens, num_padding = sum(query_lens), 2
    q_THD = torch.randn(num_tokens + num_padding, heads, dim).to(dtype)
    scale = dim**-0.5
    out_THD = torch.full_like(q_THD, 7.0).to(device)
    paged_prefill(
        q_THD.to(device),
        paged.cache.k_NSKD,
        paged.cache.v_NSKD,
        paged.table_RP,
        paged.seq_lens_R,
        start_R1.to(device),
        max_query_len=max(query_lens) + slack,
        scale=scale,
        out_THD=out_THD,
        **layer,
    )
    out_THD = out_THD.cpu()
    for row in range(len(lens)):
        tokens = slice(int(start_R1[row]), int(start_R1[row + 1]))
        want_QHD = reference(q_THD[tokens].float(), paged.keys[row], paged.values[row], scale, **layer)
        torch.testing.assert_close(out_THD[tokens].float(), want_QHD, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (out_THD[num_tokens:] == 7.0).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(2, 2, 16, 16), (9, 3, 64, 16), (4, 1, 128, 32), (8, 1, 80, 16), (4, 2, 256, 32)],
)
def test_matches_torch(heads, kv_heads, dim, block_size, dtype, device):
    """Whole prompts, chunks on top of a context, one token, and an empty (padding) row."""
    _check([(45, 0), (1, 30), (0, 0), (17, 64), (3, 127)], heads, kv_heads, dim, block_size, dtype, device)


def test_many_tiles(device):
    """Chunks longer than a tile, with whole tiles before the diagonal; a bound above the longest chunk."""
    _check([(150, 140), (33, 0)], 4, 2, 32, 16, torch.float32, device, slack=100)


@pytest.mark.parametrize("window", [1, 16, 40, 512])
def test_sliding_window(window, device):
    _check([(70, 90), (5, 0)], 4, 2, 64, 16, torch.float32, device, sliding_window=window)


def test_softcap(dtype, device):
    _check([(20, 60), (5, 0)], 4, 2, 64, 16, dtype, device, softcap=2.0)


def test_token_major_cache(dtype, device):
    _check([(20, 60), (5, 0)], 6, 2, 64, 16, dtype, device, head_major=False)


def test_large_group(device):
    _check([(5, 20)], 32, 1, 16, 16, torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (14, 2, 64), (4, 4, 128)])
def test_long_rows(heads, kv_heads, dim, dtype, device):
    """Many KV tiles a row and many query tiles: on a Hopper GPU, a pipeline of its own for 16-bit types."""
    _check([(300, 701), (0, 0), (513, 0), (1, 400), (129, 1024)], heads, kv_heads, dim, 16, dtype, device, slack=70)


@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("lens", [[(300, 701), (0, 0), (513, 0), (1, 400), (129, 1024)], [(64, 0)] * 3, [(1, 0)]])
def test_order_of_tiles(lens, block_n):
    """Each query tile of each row once, those that see the most KV tiles first, and those past a row's end last."""
    size, num_rows = 32, len(lens)
    start_R1 = torch.tensor([0, *(queries for queries, _ in lens)]).cumsum(0).int()
    num_tiles = -(-max(queries for queries, _ in lens) // size) + 1
    seq_lens_R = torch.tensor([queries + context for queries, context in lens]).int()
    order = order_of_tiles(seq_lens_R, start_R1, num_tiles, size, block_n).tolist()
    seen = []
    for place in order:
        (queries, context), first = lens[place % num_rows], place // num_rows * size
        keys = [context + query + 1 for query in range(first, min(first + size, queries))]
        seen.append(-(-max(keys) // block_n) if keys else 0)
    assert seen == sorted(seen, reverse=True)
    assert sorted(order) == list(range(num_tiles * num_rows))
