"""Attention by other packages, over the torch backend's cache: FlashAttention 3 (its own or vLLM's) and FlashInfer.

Both take rows of any number of query tokens, so single tokens go the same way as prompt chunks. Prefix groups are not
made use of. Sources: https://github.com/Dao-AILab/flash-attention (hopper), https://docs.flashinfer.ai
"""

import contextlib
import importlib
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rayinfer.attention.base import LayerCache, LayerSpec, StepMeta
from rayinfer.attention.torch import TorchBackend
from rayinfer.errors import ConfigError


class PackageBackend(TorchBackend):
    """What the two have in common: `_attend` computes the rows of a slice, of single tokens or (no end) of chunks.

    Args:
        device: a GPU that the package has kernels for.

    Raises:
        ConfigError: another device, or the package is not installed.
    """

    name: str
    modules: tuple[str, ...]  # the first that is there is used
    way_out: str  # how to install one
    head_dims: Container[int]
    heads: str  # these, in words
    _attend: Callable[..., None]

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ConfigError(f"{self.name} attention: device = {device.type}: only cuda is allowed; choose 'auto'")
        for name in self.modules:
            with contextlib.suppress(ImportError):
                self.module: Any = importlib.import_module(name)
                return
        missing = f"{self.name} attention: {' and '.join(self.modules)} cannot be imported"
        raise ConfigError(f"{missing}; {self.way_out}, or choose 'auto'")

    @classmethod
    def check(cls, spec: LayerSpec, dtype: torch.dtype, block_size: int) -> None:
        """Raise ConfigError if this layer cannot be computed, saying which value and what is allowed."""
        way_out = "; prefill_backend and decode_backend 'auto' take it"
        if dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(f"{cls.name} attention: dtype = {dtype}: float16 and bfloat16 are allowed{way_out}")
        if spec.head_dim not in cls.head_dims:
            raise ConfigError(f"{cls.name} attention: head_dim = {spec.head_dim}: {cls.heads} are allowed{way_out}")

    def prefill(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        self._attend(q_THD, cache, spec, meta, out_THD, slice(meta.num_decodes, None))

    def decode(self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor) -> None:
        rows = slice(0, meta.num_decodes)
        self._attend(q_THD[rows], cache, spec, meta, out_THD[rows], rows)


class FlashAttnBackend(PackageBackend):
    """FlashAttention 3."""

    name, in_graphs = "flash_attn", True
    modules = ("flash_attn_interface", "vllm.vllm_flash_attn")
    way_out = "build the first from the folder hopper of Dao-AILab/flash-attention, or pip install vllm"
    head_dims, heads = range(8, 257, 8), "multiples of 8 up to 256"

    def _attend(
        self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor, rows: slice
    ) -> None:
        tensors = q_THD, cache.k_NSKD, cache.v_NSKD
        lens_R, table_RP = meta.seq_lens_R[rows], meta.block_table_RP[rows]
        same: dict[str, Any] = dict(
            cu_seqlens_q=meta.query_start_R1[rows.start : rows.stop and rows.stop + 1], softmax_scale=spec.scale,
            max_seqlen_q=1 if rows.stop else meta.max_query_len, causal=True, softcap=spec.softcap or 0.0,
            window_size=((spec.sliding_window or 0) - 1, 0),  # keys to the left of the query's own; -1: all
        )  # fmt: skip
        if self.module.__name__ == "flash_attn_interface":
            out = self.module.flash_attn_with_kvcache(*tensors, cache_seqlens=lens_R, page_table=table_RP, **same)
            out_THD[rows.start :] = out[rows.start :]
        else:
            same |= dict(max_seqlen_k=meta.max_seq_len, seqused_k=lens_R, block_table=table_RP, out=out_THD)
            self.module.flash_attn_varlen_func(*tensors, fa_version=3, **same)


class FlashInferBackend(PackageBackend):
    """Plans each step on the host, from lengths that it reads back, so not in CUDA graphs."""

    name = "flashinfer"
    modules = ("flashinfer",)
    way_out = "pip install flashinfer-python"
    head_dims, heads = (64, 128, 256), "64, 128 and 256"

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._space = torch.zeros(2**27, dtype=torch.uint8, device=device)  # of the size that FlashInfer recommends
        self._plans: dict[Any, tuple[Any, StepMeta | None, slice]] = {}  # wrapper, the step it is planned for, tokens

    def _attend(
        self, q_THD: Tensor, cache: LayerCache, spec: LayerSpec, meta: StepMeta, out_THD: Tensor, rows: slice
    ) -> None:
        key = replace(spec, layer=0), rows.stop is None
        wrapper, planned, tokens = self._plans.get(key, (None, None, slice(0)))
        if wrapper is None:
            wrapper = self.module.BatchPrefillWithPagedKVCacheWrapper(self._space, backend="fa2")
        if planned is not meta:  # a plan is for all layers alike
            lens_R, start_R1 = meta.seq_lens_R[rows].cpu(), meta.query_start_R1.cpu()
            start_R1 = start_R1[rows.start : rows.stop and rows.stop + 1]
            table_RP, size = meta.block_table_RP[rows], cache.k_NSKD.shape[1]
            pages_R = (lens_R + size - 1) // size
            used_RP = torch.arange(table_RP.shape[1]) < pages_R[:, None]
            wrapper.plan(
                start_R1 - start_R1[0], F.pad(pages_R.cumsum(0), (1, 0)).int(), table_RP[used_RP.to(table_RP.device)],
                lens_R - (pages_R - 1) * size, spec.num_heads, spec.num_kv_heads, spec.head_dim, size, causal=True,
                sm_scale=spec.scale, window_left=(spec.sliding_window or 0) - 1, logits_soft_cap=spec.softcap,
                q_data_type=q_THD.dtype, seq_lens=lens_R,
            )  # fmt: skip
            tokens = slice(int(start_R1[0]), int(start_R1[-1]))
            self._plans[key] = wrapper, meta, tokens
        wrapper.run(q_THD[tokens], (cache.k_NSKD, cache.v_NSKD), out=out_THD[tokens])


PACKAGES = {backend.name: backend for backend in (FlashAttnBackend, FlashInferBackend)}
