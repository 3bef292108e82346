"""paged_decode against attention in plain torch."""

from __future__ import annotations

import pytest
import torch

from rayinfer.kernels import paged_decode as paged_decode_module
from rayinfer.kernels.paged_decode import paged_decode
from tests.kernels.paged import TOLERANCE, make_paged, reference


def _check(seq_lens, heads, kv_heads, dim, block_size, dtype, device, *, head_major=True, num_programs=None, **layer):
    paged = make_paged(seq_lens, kv_heads, dim, block_size, dtype, device, head_major)
    q_BHD = torch.randn(len(seq_lens), heads, dim).to(dtype)
    scale = dim**-0.5
    out_BHD = torch.full_like(q_BHD, float("nan")).to(device)
    paged_decode(
        q_BHD.to(device),
        paged.cache.k_NSKD,
        paged.cache.v_NSKD,
        paged.table_RP,
        paged.seq_lens_R,
        scale=scale,
        out_BHD=out_BHD,
        num_programs=num_programs,
        **layer,
    )
    for row, length in enumerate(seq_lens):
        want_HD = torch.zeros(heads, dim)
        if length > 0:
            want_HD = reference(q_BHD[row : row + 1].float(), paged.keys[row], paged.values[row], scale, **layer)[0]
        torch.testing.assert_close(out_BHD[row].cpu().float(), want_HD, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [
        (2, 2, 16, 16),
        (9, 3, 64, 16),
        (4, 1, 128, 32),
        (8, 1, 80, 16),
        (4, 2, 256, 32),
        (32, 1, 32, 64),
        (6, 2, 96, 128),
    ],
)
def test_matches_torch(heads, kv_heads, dim, block_size, dtype, device):
    _check([45, 1, 0, 16, 131], heads, kv_heads, dim, block_size, dtype, device)


@pytest.mark.parametrize("num_programs", [1, 2, 5, 64])
def test_any_number_of_programs(num_programs, device):
    """The cut falls inside rows, between them, and leaves programs without work; padding rows give zeros."""
    _check([300, 0, 17, 260, 0], 4, 2, 64, 16, torch.float32, device, num_programs=num_programs)


@pytest.mark.parametrize("few", [0, 4])
def test_for_few_rows_and_for_many(few, device, monkeypatch):
    """The kernel that looks for its share among up to 1,024 rows, and the one whose limit the rows just reach."""
    monkeypatch.setattr(paged_decode_module, "_FEW_ROWS", few)
    _check([30, 0, 17, 40], 4, 2, 64, 16, torch.float32, device)


def test_long_row_is_merged_from_many_parts(device):
    """More parts than the merge takes in one go; with 16 heads some have their largest score in the later ones."""
    _check([2600], 16, 1, 128, 32, torch.float32, device, num_programs=40)


@pytest.mark.parametrize("num_programs", [None, 0])
@pytest.mark.parametrize("window", [1, 16, 40, 512])
def test_sliding_window(window, num_programs, device):
    _check([100, 3, 333], 4, 2, 64, 16, torch.float32, device, sliding_window=window, num_programs=num_programs)


def test_softcap(dtype, device):
    _check([70, 5], 4, 2, 64, 16, dtype, device, softcap=2.0)


def test_token_major_cache(dtype, device):
    _check([70, 5], 6, 2, 64, 16, dtype, device, head_major=False)


def test_huge_scores_stay_finite(device):
    paged = make_paged([40], 1, 16, 16, torch.float32, device)
    args = (paged.cache.k_NSKD, paged.cache.v_NSKD, paged.table_RP, paged.seq_lens_R)
    q_BHD = torch.full((1, 1, 16), 1000.0)
    for softcap in (None, 30.0):
        out_BHD = paged_decode(q_BHD.to(device), *args, scale=1.0, softcap=softcap)
        want = reference(q_BHD, paged.keys[0], paged.values[0], 1.0, softcap=softcap)
        torch.testing.assert_close(out_BHD.cpu(), want, rtol=1e-4, atol=1e-4)
