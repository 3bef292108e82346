"""The GPU backend: Triton kernels over a head-major paged cache."""

from typing import Any

import torch
from torch import Tensor

from rayinfer.attention.base import LayerCache, LayerSpec, StepMeta
from rayinfer.errors import ConfigError
from rayinfer.kernels.paged_decode import paged_decode
from rayinfer.kernels.paged_prefill import paged_prefill
from rayinfer.kernels.rope_kv import write_kv
from rayinfer.kernels.shared_prefix import shared_prefix


class TritonBackend:
    """`AttentionBackend` with the kernels of `rayinfer.kernels`.

    Args:
        fixed_order: single tokens go through the prefill kernel too, in one order of sums, and prefix groups are not
            made use of: a token's result is the same to the last bit in any batch and chunk.
    """

    in_graphs = True

    def __init__(self, fixed_order: bool = False):
        self.fixed_order = fixed_order

    def check(self, spec: LayerSpec, dtype: torch.dtype, block_size: int) -> None:
        """Raise ConfigError if this layer cannot be computed, saying which value and what is allowed."""
        way_out = "; prefill_backend='torch' and decode_backend='torch' take it"
        if not 1 <= spec.head_dim <= 256:
            raise ConfigError(f"triton attention: head_dim = {spec.head_dim}: 1 to 256 are allowed{way_out}")
        if spec.num_heads % spec.num_kv_heads or spec.num_heads // spec.num_kv_heads > 64:
            heads = f"num_heads = {spec.num_heads}, num_kv_heads = {spec.num_kv_heads}"
            want = "the first must be a multiple of the second, 64 times at most"
            raise ConfigError(f"triton attention: {heads}: {want}{way_out}")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ConfigError(f"triton attention: dtype = {dtype}: float32, float16 and bfloat16 are allowed{way_out}")
        if block_size < 16 or block_size & (block_size - 1):
            raise ConfigError(f"block_size = {block_size}: triton attention needs a power of two from 16 on")

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Allocate one layer's KV, zero-filled: [N, K, S, D] in memory, so that a block of one head is one piece."""
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        return LayerCache(*(torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(2)))

    def write(self, k_TKD: Tensor, v_TKD: Tensor, cache: LayerCache, meta: StepMeta) -> None:
        """Store the step's keys and values at `slot_mapping_T`."""
        write_kv(k_TKD, v_TKD, cache.k_NSKD, cache.v_NSKD, meta.slot_mapping_T)

    def prefill(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        """Attend for rows [num_decodes, R), writing tokens from query_start_R1[num_decodes] on of `out_THD`."""
        self._prefill(q_THD, cache, spec, meta, out_THD, slice(meta.num_decodes, None))

    def decode(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        """Attend for rows [0, num_decodes), writing tokens [0, num_decodes) of `out_THD`."""
        num = meta.num_decodes
        if self.fixed_order:
            self._prefill(q_THD, cache, spec, meta, out_THD, slice(num))
            return
        rows = (q_THD[:num], cache.k_NSKD, cache.v_NSKD, meta.block_table_RP[:num])
        shared: dict[str, Any] = {}
        # The keys that a window shows are not the same for all rows of a group.
        if meta.group_start_G1 is not None and meta.group_len_G is not None and spec.sliding_window is None:
            prefix = shared_prefix(*rows, meta.group_start_G1, meta.group_len_G, scale=spec.scale, softcap=spec.softcap)
            shared = dict(shared_len_B=meta.shared_len_B, prefix=prefix)
        paged_decode(
            *rows, meta.seq_lens_R[:num], scale=spec.scale, sliding_window=spec.sliding_window,
            softcap=spec.softcap, out_BHD=out_THD[:num], **shared,
        )  # fmt: skip

    def _prefill(
        self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor, rows: slice
    ) -> None:
        paged_prefill(
            q_THD, cache.k_NSKD, cache.v_NSKD, meta.block_table_RP[rows], meta.seq_lens_R[rows],
            meta.query_start_R1[rows.start :], max_query_len=1 if rows.stop else meta.max_query_len, scale=spec.scale,
            sliding_window=spec.sliding_window, softcap=spec.softcap, out_THD=out_THD, fixed=self.fixed_order,
            scratch=meta.scratch,
        )  # fmt: skip
