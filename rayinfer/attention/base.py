"""The contract of an attention backend, and what a step tells it.

Shape legend, here and in the kernels: T tokens of a step, R rows of a step, B decode rows, H query heads,
K key/value heads, D head size, N KV blocks, S slots of a block (block_size), P blocks of a row (block-table width).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerSpec:
    """The attention of one layer.

    `sliding_window` counts the keys a query sees, itself included: key j is seen by query i if
    i - sliding_window < j <= i (transformers' convention). `softcap` c turns scores s into c * tanh(s / c).
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None


@dataclass
class StepMeta:
    """What all layers of one step share. Tensors live on the engine's device.

    Rows are ordered decodes first: the first `num_decodes` rows have one query token each, tokens [0, num_decodes)
    of the step; the rest are prompt chunks. Tokens after the last row's are padding (slot_mapping -1).

    Attributes:
        positions_T: int64, position of each token in its row.
        slot_mapping_T: int64, block * block_size + offset where the token's KV goes; -1 writes nothing.
        block_table_RP: int32, KV blocks of each row; entries past the row's length are arbitrary valid blocks.
        seq_lens_R: int32, tokens of each row in the KV cache once this step's are written.
        query_start_R1: int32 [R + 1], first token of each row in the step.
        num_decodes: rows of one token at the front.
        max_seq_len: at least max(seq_lens_R).
        max_query_len: at least the longest prompt chunk (1 if there is none).
        group_start_G1: int32 [G + 1], ascending: decode rows [group_start[g], group_start[g + 1]) are group g; it may
            be empty; rows after the last group are alone. None: no groups. They only tell what can be read once: a
            backend that ignores them (torch) computes the same.
        group_len_G: int32, tokens that a group's rows share, a multiple of block_size: the first blocks of the first
            row's table. 0: its rows are alone.
        shared_len_B: int32 [num_decodes], group_len of each row's group; 0 for rows alone and for padding.
        outputs: the tokens whose hidden states are wanted; None: all. See `StepOutputs`.
        scratch: what a backend worked out for one layer and can use again in the next.
    """

    positions_T: Tensor
    slot_mapping_T: Tensor
    block_table_RP: Tensor
    seq_lens_R: Tensor
    query_start_R1: Tensor
    num_decodes: int
    max_seq_len: int
    max_query_len: int
    group_start_G1: Tensor | None = None
    group_len_G: Tensor | None = None
    shared_len_B: Tensor | None = None
    outputs: StepOutputs | None = None
    scratch: dict[Any, Any] = field(default_factory=dict)


@dataclass
class StepOutputs:
    """Rows that yield a token: of prompt chunks, the last layer computes their last token and no other.

    Attributes:
        index_L: int64, the last token of each such row in the step.
        meta: the same rows as decodes of one token each, their KV written already.
    """

    index_L: Tensor
    meta: StepMeta


@dataclass
class LayerCache:
    """Keys and values of one layer, both [N, S, K, D] in logical order (a backend may permute the memory)."""

    k_NSKD: Tensor
    v_NSKD: Tensor


class AttentionBackend(Protocol):
    """Five methods. A backend must never read KV beyond a row's length: unused slots may hold NaN.

    Attributes:
        in_graphs: a CUDA graph can hold its `decode`, which then reads nothing on the host.
    """

    in_graphs: bool

    def check(self, spec: LayerSpec, dtype: torch.dtype, block_size: int) -> None:
        """Raise ConfigError if this layer cannot be computed, saying which value and what is allowed."""

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Allocate one layer's KV, zero-filled."""

    def write(self, k_TKD: Tensor, v_TKD: Tensor, cache: LayerCache, meta: StepMeta) -> None:
        """Store the step's keys and values at `slot_mapping_T`."""

    def prefill(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        """Attend for rows [num_decodes, R), writing tokens from query_start_R1[num_decodes] on of `out_THD`."""

    def decode(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        """Attend for rows [0, num_decodes), writing tokens [0, num_decodes) of `out_THD`."""
