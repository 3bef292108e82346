"""A loaded causal LM as the runner uses it: bind caches and backends once, then forward steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rayinfer.attention.base import AttentionBackend, LayerCache, LayerSpec, StepMeta

if TYPE_CHECKING:
    from rayinfer.models.paged import PagedState


@dataclass(frozen=True)
class ModelInfo:
    """What the config files say, before any weight is read.

    Attributes:
        architecture: the transformers class that runs the model.
        max_position_embeddings: the model's own limit on prompt plus output; None if it names none.
        max_model_len: the limit that rows have: the configured one, else the model's own.
        eos_token_ids: of the generation config and the model config together, sorted.
        dtype: of the weights once loaded.
        specs: attention of each layer; empty before the weights are there if it routes by values (mixtures of experts).
    """

    architecture: str
    vocab_size: int
    max_position_embeddings: int | None
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    num_layers: int
    hidden_size: int
    specs: tuple[LayerSpec, ...] = ()


class Model:
    """A transformers causal LM whose attention is paged.

    Attributes:
        info: what the config says. specs: attention of each layer; the index is the layer's cache.
        module: the transformers model. fused: whether its decoder was swapped for the fused one.
        device, dtype: of the weights. one_by_one: tokens are computed one at a time, so that each product has one shape
            and its bits do not depend on the step (`EngineConfig.deterministic` on a CPU).
    """

    def __init__(self, info: ModelInfo, module: nn.Module, state: PagedState, fused: bool, one_by_one: bool = False):
        self.info = replace(info, specs=tuple(state.specs))
        self.module = module
        self.fused, self.one_by_one = fused, one_by_one
        self._state, self.specs = state, state.specs
        weight = next(module.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._slices_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    def bind(self, caches: Sequence[LayerCache], prefill: AttentionBackend, decode: AttentionBackend) -> None:
        """Set the KV cache of each layer and the backends for prompt chunks and single tokens."""
        assert len(caches) == len(self.specs), f"{len(caches)} caches for {len(self.specs)} layers"
        self._state.caches = list(caches)
        self._state.prefill, self._state.decode = prefill, decode

    @torch.inference_mode()
    def forward(self, input_ids_T: Tensor, meta: StepMeta, logits_index_L: Tensor | None = None) -> Tensor:
        """Compute one step: write its keys and values, return logits [L, V] in the model's dtype.

        Args:
            input_ids_T: int64 tokens of the step, padding included.
            meta: the step; its positions_T goes to the model.
            logits_index_L: int64, tokens of the step whose logits are wanted; None: all. They are those of
                `meta.outputs` where that is given.
        """
        forward = self._forward_one_by_one if self.one_by_one else self._forward
        return forward(input_ids_T, meta, logits_index_L)

    def _forward_one_by_one(self, input_ids_T: Tensor, meta: StepMeta, logits_index_L: Tensor | None) -> Tensor:
        """Each token a step of its own, in the order of positions: rows of a step may share blocks that it fills."""
        if meta.outputs is not None:
            logits_index_L = meta.outputs.index_L
        row_T = torch.repeat_interleave(meta.query_start_R1.diff()).tolist()
        wanted = list(range(len(row_T))) if logits_index_L is None else logits_index_L.tolist()
        logits, none = {}, torch.zeros(0, dtype=torch.int64, device=self.device)
        for token in meta.positions_T[: len(row_T)].argsort().tolist():
            at, row, length = slice(token, token + 1), row_T[token], int(meta.positions_T[token]) + 1
            one = StepMeta(
                positions_T=meta.positions_T[at], slot_mapping_T=meta.slot_mapping_T[at], num_decodes=1,
                block_table_RP=meta.block_table_RP[row : row + 1], seq_lens_R=torch.tensor([length], dtype=torch.int32),
                query_start_R1=torch.tensor([0, 1], dtype=torch.int32), max_seq_len=length, max_query_len=1,
            )  # fmt: skip
            logits[token] = self._forward(input_ids_T[at], one, None if token in wanted else none)
        return torch.cat([logits[token] for token in wanted] or [logits[0][:0]])

    def _forward(self, input_ids_T: Tensor, meta: StepMeta, logits_index_L: Tensor | None) -> Tensor:
        self._state.meta = meta
        if self.fused and meta.outputs is not None:
            logits_index_L = None  # the last layer has left the others out
        kwargs: dict[str, Any] = {"position_ids": meta.positions_T[None], "use_cache": False}
        keep = {"logits_to_keep": logits_index_L} if self._slices_logits and logits_index_L is not None else {}
        logits_LV = self.module(input_ids=input_ids_T[None], **kwargs, **keep).logits[0]
        return logits_LV if keep or logits_index_L is None else logits_LV[logits_index_L]
