"""Attention in plain torch: what a CPU runs, and the reference that other backends are compared with.

Decode gathers the KV of all rows, padded to the longest, and makes one scaled_dot_product_attention call a layer with
the query heads of a KV head packed as its "query tokens". Index tensors are worked out once a step, not once a layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rayinfer.attention.base import LayerCache, LayerSpec, StepMeta


class TorchBackend:
    """Any head size, block size and dtype that torch's scaled_dot_product_attention takes."""

    in_graphs = False  # the shapes of a step depend on its lengths

    def check(self, spec: LayerSpec, dtype: torch.dtype, block_size: int) -> None:
        """Nothing is refused."""

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        return LayerCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    def write(self, k_TKD: Tensor, v_TKD: Tensor, cache: LayerCache, meta: StepMeta) -> None:
        from rayinfer.ops import get_ops

        get_ops(k_TKD.device).write_kv(k_TKD, v_TKD, cache.k_NSKD, cache.v_NSKD, meta.slot_mapping_T)

    def prefill(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        for first, last, seq_len, blocks, mask_qL in self._chunks(cache, spec, meta):
            num_new, group = last - first, spec.num_heads // spec.num_kv_heads
            q_KgqD = q_THD[first:last].transpose(0, 1).reshape(spec.num_kv_heads, group, num_new, spec.head_dim)
            k_K1LD, v_K1LD = (
                c[blocks].flatten(0, 1)[:seq_len].transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
                for c in (cache.k_NSKD, cache.v_NSKD)
            )
            out_KgqD = _attend(q_KgqD, k_K1LD, v_K1LD, mask_qL, spec)
            out_THD[first:last] = out_KgqD.reshape(spec.num_heads, num_new, spec.head_dim).transpose(0, 1)

    def decode(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        num_rows, group = meta.num_decodes, spec.num_heads // spec.num_kv_heads
        blocks_BP, mask_B1L, stale = self._gather(cache, spec, meta)
        gathered: list[Tensor] = []
        for c in (cache.k_NSKD, cache.v_NSKD):
            kv_BLKD = c.index_select(0, blocks_BP.flatten()).view(num_rows, -1, spec.num_kv_heads, spec.head_dim)
            kv_BLKD[stale] = 0  # slots past a row's end may hold NaN, and 0 * NaN is NaN
            gathered.append(kv_BLKD.transpose(1, 2))
        q_BKgD = q_THD[:num_rows].reshape(num_rows, spec.num_kv_heads, group, spec.head_dim)
        out_BKgD = _attend(q_BKgD, gathered[0], gathered[1], mask_B1L, spec)
        out_THD[:num_rows] = out_BKgD.reshape(num_rows, spec.num_heads, spec.head_dim)

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

    def _gather(self, cache: LayerCache, spec: LayerSpec, meta: StepMeta) -> tuple:
        """Blocks [B, P'] that decode rows can see, their mask [B, 1, 1, P' * S], and (row, slot) of stale entries."""
        key = ("gather", spec.sliding_window)
        if key not in meta.scratch:
            size = cache.k_NSKD.shape[1]
            lens_B = meta.seq_lens_R[: meta.num_decodes].long()
            window = spec.sliding_window or meta.max_seq_len
            first_B = (lens_B - window).clamp_(min=0)  # first visible token
            base_B = first_B // size  # block that holds it
            num_blocks = int(((lens_B + size - 1) // size - base_B).max())
            index_BP = base_B[:, None] + torch.arange(num_blocks, device=lens_B.device)
            in_row = index_BP * size < lens_B[:, None]
            table_BP = meta.block_table_RP[: meta.num_decodes].long()
            blocks_BP = table_BP.gather(1, index_BP.clamp(max=table_BP.shape[1] - 1)) * in_row  # block 0: zeros
            slots = base_B[:, None] * size + torch.arange(num_blocks * size, device=lens_B.device)
            visible = (slots >= first_B[:, None]) & (slots < lens_B[:, None])
            # What is read and not visible: of the last block, and of the first one of a window.
            stale = torch.nonzero(~visible & in_row.repeat_interleave(size, 1), as_tuple=True)
            meta.scratch[key] = (blocks_BP, visible[:, None, None, :], stale)
        return meta.scratch[key]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: LayerSpec) -> Tensor:
    """softmax(scale * q k^T) v with an optional soft cap on the scores; mask is True where a key is seen."""
    if spec.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale)
    scores = (q @ k.transpose(-1, -2)).float() * spec.scale
    scores = spec.softcap * torch.tanh(scores / spec.softcap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype) @ v
