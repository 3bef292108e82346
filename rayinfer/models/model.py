"""A loaded causal LM as the runner uses it: bind caches and backends once, then forward steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayinfer.attention.base import AttentionBackend, LayerCache, LayerSpec, StepMeta
from rayinfer.models.paged import PagedState


@dataclass(frozen=True)
class ModelInfo:
    """What the config files say, before any weight is read.

    Attributes:
        architecture: the transformers class that runs the model.
        max_position_embeddings: the model's own limit on prompt plus output; None if it names none.
        eos_token_ids: of the generation config and the model config together, sorted.
        dtype: of the weights once loaded.
    """

    architecture: str
    model_type: str
    vocab_size: int
    max_position_embeddings: int | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    dtype: torch.dtype
    num_layers: int
    hidden_size: int


class Model:
    """A transformers causal LM whose attention is paged.

    Attributes:
        info: what the config says. specs: attention of each layer; the index is the layer's cache.
        module: the transformers model. fused: whether its decoder was swapped for the fused one.
        device, dtype: of the weights.
    """

    def __init__(self, info: ModelInfo, module: nn.Module, state: PagedState, fused: bool):
        self.info = info
        self.module = module
        self.fused = fused
        self._state = state
        weight = next(module.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._slices_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    @property
    def specs(self) -> list[LayerSpec]:
        return self._state.specs

    def bind(self, caches: Sequence[LayerCache], prefill: AttentionBackend, decode: AttentionBackend) -> None:
        """Set the KV cache of each layer and the backends for prompt chunks and single tokens."""
        assert len(caches) == len(self.specs), f"{len(caches)} caches for {len(self.specs)} layers"
        self._state.caches = list(caches)
        self._state.prefill, self._state.decode = prefill, decode

    @torch.inference_mode()
    def forward(
        self, input_ids_T: torch.Tensor, meta: StepMeta, logits_index_L: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute one step: write its keys and values, return logits [L, V] in the model's dtype.

        Args:
            input_ids_T: int64 tokens of the step, padding included.
            meta: the step; its positions_T goes to the model.
            logits_index_L: int64, tokens of the step whose logits are wanted; None: all. They are those of
                `meta.outputs` where that is given.
        """
        self._state.meta = meta
        if self.fused and meta.outputs is not None:
            logits_index_L = None  # the last layer has left the others out
        kwargs: dict[str, Any] = {}
        if logits_index_L is not None and self._slices_logits:
            kwargs["logits_to_keep"] = logits_index_L
        positions = meta.positions_T[None]
        logits_LV = self.module(input_ids=input_ids_T[None], position_ids=positions, use_cache=False, **kwargs).logits[
            0
        ]
        if logits_index_L is not None and not self._slices_logits:
            logits_LV = logits_LV[logits_index_L]
        return logits_LV
