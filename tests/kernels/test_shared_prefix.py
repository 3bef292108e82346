"""shared_prefix with paged_decode against attention of whole rows in plain torch, and against decode without groups."""

from __future__ import annotations

import pytest
import torch

from rayinfer.kernels.paged_decode import paged_decode
from rayinfer.kernels.shared_prefix import shared_prefix
from tests.kernels.paged import TOLERANCE, make_paged, reference, share


def _check(starts, lengths, seq_lens, heads, kv_heads, dim, block_size, dtype, device, **options):
    """`starts` are group_start [G + 1], `lengths` group_len [G], `options` head_major, programs and softcap."""
    head_major, programs = options.pop("head_major", True), options.pop("programs", (None, None))
    paged = make_paged(seq_lens, kv_heads, dim, block_size, dtype, device, head_major)
    paged = share(paged, starts, lengths)
    scale, q_BHD = dim**-0.5, torch.randn(len(seq_lens), heads, dim).to(dtype).to(device)
    cache = (paged.cache.k_NSKD, paged.cache.v_NSKD)
    alone = paged_decode(q_BHD, *cache, paged.table_RP, paged.seq_lens_R, scale=scale, **options)

    shared_len, table_BP = torch.zeros(len(seq_lens), dtype=torch.int32), paged.table_RP.clone()
    unused = table_BP[-1, -1]  # holds NaN
    for first, last, length in zip(starts, starts[1:], lengths, strict=False):
        shared_len[first:last] = length
        table_BP[first + 1 : last, : length // block_size] = unused  # a group's prefix is read in its first row alone
    groups = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths))
    prefix = shared_prefix(q_BHD, *cache, table_BP, *groups, scale=scale, num_programs=programs[0], **options)
    for row, length in enumerate(shared_len.tolist()):
        if length == 0:
            for part in prefix:
                part[:, row] = float("nan")  # never read
    got = paged_decode(
        q_BHD,
        *cache,
        table_BP,
        paged.seq_lens_R,
        scale=scale,
        num_programs=programs[1],
        shared_len_B=shared_len.to(device),
        prefix=prefix,
        **options,
    )
    close = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(got, alone, **close)
    for row, length in enumerate(seq_lens):
        want_HD = torch.zeros(heads, dim)
        if length > 0:
            q_1HD = q_BHD[row : row + 1].cpu().float()
            want_HD = reference(q_1HD, paged.keys[row], paged.values[row], scale, **options)[0]
        torch.testing.assert_close(got[row].cpu().float(), want_HD, **close)


# Groups of 3, 1, 0 and 4 rows, one of two rows that share nothing, rows alone, padding, unused groups.
STARTS, LENGTHS = [0, 3, 4, 4, 6, 10, 10, 10], [32, 96, 64, 0, 64, 0, 32]
SEQ_LENS = [45, 33, 64, 131, 70, 1, 65, 66, 97, 80, 40, 0]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(2, 2, 16, 16), (9, 3, 64, 16), (4, 1, 128, 32), (8, 1, 80, 16), (4, 2, 256, 32), (64, 1, 32, 16), (6, 2, 96, 32)],
)
def test_matches_torch(heads, kv_heads, dim, block_size, dtype, device):
    _check(STARTS, LENGTHS, SEQ_LENS, heads, kv_heads, dim, block_size, dtype, device)


@pytest.mark.parametrize("programs", [(1, 1), (2, 5), (5, 2), (70, 40)])
def test_any_number_of_programs(programs, device):
    """Items are cut at other places: whole, in two, in many parts; programs are left without work."""
    starts, lengths, seq_lens = [0, 9, 9, 11], [336, 16, 80], [337, *[340] * 8, 90, 81, 200]
    _check(starts, lengths, seq_lens, 8, 2, 64, 16, torch.float32, device, programs=programs)


@pytest.mark.parametrize("num_rows", [15, 16, 17])
def test_groups_end_at_tile_edges(num_rows, dtype, device):
    """16 rows of 4 heads fill a tile of 64 pairs (four of 16 in float32): one row less, and one more."""
    _check([0, num_rows], [48], [49 + row % 3 for row in range(num_rows + 1)], 4, 1, 32, 16, dtype, device)


def test_softcap(dtype, device):
    _check([0, 2], [48], [70, 50, 5], 4, 2, 64, 16, dtype, device, softcap=2.0)


def test_token_major_cache(dtype, device):
    _check([1, 3], [48], [70, 50, 65], 6, 2, 64, 16, dtype, device, head_major=False)


def test_no_group_has_rows(device):
    """What a graph replays when nothing is shared."""
    _check([0, 0, 0], [0, 0], [20, 3], 4, 2, 32, 16, torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (8, 1, 256)])
def test_large(heads, kv_heads, dim, dtype, device):
    """Many items, cut at many places; groups of all sizes, one prefix longer than all other rows."""
    if device.type != "cuda":
        pytest.skip("too slow under the interpreter")
    sizes, lengths = [1, 40, 5, 0, 16, 3], [512, 1040, 2048, 64, 0, 1008]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    shared = torch.tensor(lengths).repeat_interleave(torch.tensor(sizes))
    seq_lens = (shared + torch.randint(1, 300, shared.shape)).tolist() + [700, 0, 0]
    _check(starts, lengths, seq_lens, heads, kv_heads, dim, 16, dtype, device)
