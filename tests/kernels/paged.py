"""A paged cache to test on, and attention in plain torch, one row and one query at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayinfer.attention.base import LayerCache

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Paged:
    """Rows of random keys and values in a cache whose every unused slot holds NaN."""

    cache: LayerCache
    table_RP: torch.Tensor
    seq_lens_R: torch.Tensor
    keys: list[torch.Tensor]  # float32 [seq_len, K, D] of each row
    values: list[torch.Tensor]


def make_paged(
    seq_lens: list[int],
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    head_major: bool = True,
) -> Paged:
    per_row = max(1, -(-max(seq_lens) // block_size)) + 1
    num_blocks = per_row * len(seq_lens) + 3
    # Blocks are dealt out at random; entries past a row's length name blocks that hold NaN.
    table = torch.randperm(num_blocks)[: per_row * len(seq_lens)].view(len(seq_lens), per_row)
    caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    keys, values = [], []
    for row, length in enumerate(seq_lens):
        kv = torch.randn(2, length, num_kv_heads, head_dim).to(dtype)
        for token in range(length):
            caches[:, table[row, token // block_size], token % block_size] = kv[:, token]
        keys.append(kv[0].float())
        values.append(kv[1].float())
    caches = caches.to(device)
    if head_major:
        caches = caches.transpose(2, 3).contiguous().transpose(2, 3)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    return Paged(LayerCache(caches[0], caches[1]), table.int().to(device), lens, keys, values)


def share(paged: Paged, starts: list[int], lengths: list[int]) -> Paged:
    """Give rows [starts[g], starts[g + 1]) the first lengths[g] tokens of their first row, for each group g."""
    block_size = paged.cache.k_NSKD.shape[1]
    for first, last, length in zip(starts, starts[1:], lengths, strict=False):
        assert length % block_size == 0
        paged.table_RP[first:last, : length // block_size] = paged.table_RP[first, : length // block_size].clone()
        for row in range(first + 1, last):
            for kept, its in ((paged.keys, paged.keys[first]), (paged.values, paged.values[first])):
                kept[row] = torch.cat([its[:length], kept[row][length:]])
    return paged


def reference(
    q_QHD: torch.Tensor,
    k_LKD: torch.Tensor,
    v_LKD: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of a row's last Q tokens over its L keys, float64 inside, float32 out [Q, H, D]."""
    num_queries, length = q_QHD.shape[0], k_LKD.shape[0]
    group = q_QHD.shape[1] // k_LKD.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k_LKD, v_LKD))
    scores_HQL = torch.einsum("qhd,lhd->hql", q_QHD.double(), k) * scale
    if softcap is not None:
        scores_HQL = softcap * torch.tanh(scores_HQL / softcap)
    query_Q1 = torch.arange(length - num_queries, length)[:, None]
    key_L = torch.arange(length)
    seen_QL = key_L <= query_Q1
    if sliding_window is not None:
        seen_QL &= key_L > query_Q1 - sliding_window
    scores_HQL = scores_HQL.masked_fill(~seen_QL, float("-inf"))
    return torch.einsum("hql,lhd->qhd", scores_HQL.softmax(-1), v).float()
