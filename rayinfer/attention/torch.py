"""Attention in plain torch: what a CPU runs, and the reference that other backends are compared with.

Decode gathers the KV of rows of like length, padded to the longest of them, and makes one scaled_dot_product_attention
call for them in a layer, with the query heads of a KV head packed as its "query tokens". Index tensors are worked out
once a step, not once a layer.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rayinfer.attention.base import LayerCache, LayerSpec, StepMeta

MIN_SPARED = 64  # blocks of padding: what one more group of rows in each layer costs


class TorchBackend:
    """Any head size, block size and dtype that torch's scaled_dot_product_attention takes."""

    in_graphs = False  # the shapes of a step depend on its lengths

    def check(self, spec: LayerSpec, dtype: torch.dtype, block_size: int) -> None:
        """Nothing is refused."""

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        return LayerCache(*(_zeros(shape, dtype, device) for _ in range(2)))

    def write(self, k_TKD: Tensor, v_TKD: Tensor, cache: LayerCache, meta: StepMeta) -> None:
        from rayinfer.ops import get_ops

        get_ops(k_TKD.device).write_kv(k_TKD, v_TKD, cache.k_NSKD, cache.v_NSKD, meta.slot_mapping_T)

    def prefill(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        for first, last, seq_len, blocks, mask_qL in self._chunks(cache, spec, meta):
            num_new, group = last - first, spec.num_heads // spec.num_kv_heads
            q_KgqD = q_THD[first:last].transpose(0, 1).reshape(spec.num_kv_heads, group, num_new, spec.head_dim)
            kv_LKD = (c[blocks].flatten(0, 1)[:seq_len] for c in (cache.k_NSKD, cache.v_NSKD))
            k_K1LD, v_K1LD = (x_LKD.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x_LKD in kv_LKD)
            out_KgqD = _attend(q_KgqD, k_K1LD, v_K1LD, mask_qL, spec)
            out_THD[first:last] = out_KgqD.reshape(spec.num_heads, num_new, spec.head_dim).transpose(0, 1)

    def decode(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        group = spec.num_heads // spec.num_kv_heads
        for rows, blocks_BP, mask_B1L, stale in self._gather(cache, spec, meta):
            gathered: list[Tensor] = []
            for c in (cache.k_NSKD, cache.v_NSKD):
                kv_BLKD = c.index_select(0, blocks_BP.flatten()).view(len(rows), -1, spec.num_kv_heads, spec.head_dim)
                kv_BLKD[stale] = 0  # slots past a row's end may hold NaN, and 0 * NaN is NaN
                gathered.append(kv_BLKD.transpose(1, 2))
            q_BKgD = q_THD[rows].reshape(len(rows), spec.num_kv_heads, group, spec.head_dim)
            out_BKgD = _attend(q_BKgD, gathered[0], gathered[1], mask_B1L, spec)
            out_THD[rows] = out_BKgD.reshape(len(rows), spec.num_heads, spec.head_dim)

    def _chunks(self, cache: LayerCache, spec: LayerSpec, meta: StepMeta) -> list[tuple]:
        """(first token, last token, seq_len, blocks, mask) of each prompt chunk, once a step and window."""
        key = ("chunks", spec.sliding_window)
        if key not in meta.scratch:
            block_size, chunks = cache.k_NSKD.shape[1], []
            starts, lens = meta.query_start_R1.tolist(), meta.seq_lens_R.tolist()
            for row in range(meta.num_decodes, len(lens)):
                first, last, seq_len = starts[row], starts[row + 1], lens[row]
                query = torch.arange(seq_len - (last - first), seq_len, device=meta.seq_lens_R.device)
                keys = torch.arange(seq_len, device=query.device)
                mask_qL = keys[None, :] <= query[:, None]
                if spec.sliding_window is not None:
                    mask_qL &= keys[None, :] > query[:, None] - spec.sliding_window
                blocks = meta.block_table_RP[row, : -(-seq_len // block_size)].long()
                chunks.append((first, last, seq_len, blocks, mask_qL))
            meta.scratch[key] = chunks
        return meta.scratch[key]

    def _gather(self, cache: LayerCache, spec: LayerSpec, meta: StepMeta) -> list[tuple]:
        """For groups of decode rows: row numbers, the blocks [B, P'] that they can see, their mask [B, 1, 1, P' * S],
        and (row, slot) of stale entries."""
        key = ("gather", spec.sliding_window)
        if key not in meta.scratch:
            size, table_BP = cache.k_NSKD.shape[1], meta.block_table_RP[: meta.num_decodes].long()
            lens_B = meta.seq_lens_R[: meta.num_decodes].long()
            first_B = (lens_B - (spec.sliding_window or meta.max_seq_len)).clamp_(min=0)  # first visible token
            base_B = first_B // size  # block that holds it
            num_B = (lens_B + size - 1) // size - base_B
            groups = []
            for rows in _alike(num_B):
                index_BP = base_B[rows, None] + torch.arange(int(num_B[rows].max()), device=lens_B.device)
                in_row = index_BP * size < lens_B[rows, None]
                slots = (index_BP[..., None] * size + torch.arange(size, device=lens_B.device)).flatten(1)
                index_BP.clamp_(max=table_BP.shape[1] - 1)
                blocks_BP = table_BP[rows].gather(1, index_BP) * in_row  # block 0: zeros
                visible = (slots >= first_B[rows, None]) & (slots < lens_B[rows, None])
                # What is read and not visible: of the last block, and of the first one of a window.
                stale = torch.nonzero(~visible & in_row.repeat_interleave(size, 1), as_tuple=True)
                groups.append((rows, blocks_BP, visible[:, None, None, :], stale))
            meta.scratch[key] = groups
        return meta.scratch[key]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU, numpy's: the system gives it pages when they are first written, so a cache that stays half empty
    takes half the memory; torch writes them all, which took 1 to 4 s for 4 GiB."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _alike(num_B: Tensor) -> list[Tensor]:
    """Rows in groups of like numbers of blocks: a long row is not to pad all the others to its length."""
    order_B = num_B.argsort(descending=True)
    sorted_B, starts = num_B[order_B].tolist(), [0]
    for row, num in enumerate(sorted_B):
        spared = sorted_B[starts[-1]] - num
        if spared >= num and spared * (len(sorted_B) - row) >= MIN_SPARED:
            starts.append(row)
    return list(order_B.tensor_split(starts[1:]))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: LayerSpec) -> Tensor:
    """softmax(scale * q k^T) v with an optional soft cap on the scores; mask is True where a key is seen."""
    if spec.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale)
    scores = (q @ k.transpose(-1, -2)).float() * spec.scale
    scores = spec.softcap * torch.tanh(scores / spec.softcap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype) @ v
