"""The small fused operations of a decoder: Triton kernels on a GPU, the torch functions below on a CPU.

Shapes: T tokens, C channels, I intermediate size, H query heads, K key/value heads, D head size, R rotary size (the
first R of D), M table positions, N KV blocks, S slots of a block. No input is overwritten but the KV cache and, by the
kernel of `act_mul`, its own.
"""

import functools
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def get_ops(device: torch.device) -> Any:
    """The operations for tensors on `device`: the functions below, or kernels of their names and signatures."""
    return _triton_ops() if device.type == "cuda" else sys.modules[__name__]


@functools.cache
def _triton_ops() -> SimpleNamespace:
    from rayinfer.kernels import act_mul, rms_norm, rope_kv

    names = dict(rms_norm=rms_norm.rms_norm, add_rms_norm=rms_norm.add_rms_norm, act_mul=act_mul.act_mul)
    return SimpleNamespace(**names, qk_norm_rope_write=rope_kv.qk_norm_rope_write, write_kv=rope_kv.write_kv)


_ACT: dict[str, Any] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def rms_norm(x_TC: Tensor, weight_C: Tensor, eps: float, *, gemma: bool = False) -> Tensor:
    """Root-mean-square norm over the last axis, in fp32 (https://arxiv.org/abs/1910.07467).

    gemma=False rounds the normalised values to x's dtype, then multiplies by the weight; gemma=True multiplies by
    (1 + weight) in fp32, then rounds. Both as transformers does. A weight of more axes is taken as it broadcasts.
    """
    if x_TC.dtype == torch.float32 and weight_C.dim() == 1:
        return F.rms_norm(x_TC, weight_C.shape, weight_C + 1 if gemma else weight_C, eps)
    normed = F.rms_norm(x_TC.float(), x_TC.shape[-1:], None, eps)
    return normed.mul_(weight_C.float() + 1).to(x_TC.dtype) if gemma else normed.to(x_TC.dtype).mul_(weight_C)


def add_rms_norm(
    x_TC: Tensor, residual_TC: Tensor, weight_C: Tensor, eps: float, *, gemma: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual), the sum rounded to x's dtype before the norm."""
    sum_TC = x_TC + residual_TC
    return rms_norm(sum_TC, weight_C, eps, gemma=gemma), sum_TC


def act_mul(x_T2I: Tensor, kind: str) -> Tensor:
    """act(first half of the last axis) * second half; kind is one of _ACT."""
    gate_TI, up_TI = x_T2I.chunk(2, dim=-1)
    return _ACT[kind](gate_TI).mul_(up_TI)


def qk_norm_rope_write(
    qkv_TC: Tensor, cos_MR: Tensor, sin_MR: Tensor, positions_T: Tensor, slot_mapping_T: Tensor, k_NSKD: Tensor,
    v_NSKD: Tensor, *, num_heads: int, num_kv_heads: int, head_dim: int, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 1e-6, gemma: bool = False,
) -> Tensor:  # fmt: skip
    """Split merged QKV, norm q and k by head (if weights are given), rotate them, write k and v to the cache.

    Args:
        qkv_TC: C = (H + 2K) * D, query heads first, then keys, then values.
        cos_MR, sin_MR: rotary tables in the layout of `rotate_half` (both halves of R alike).
        positions_T: int64 rows of the tables. slot_mapping_T: int64, -1 writes nothing.

    Returns:
        The rotated queries [T, H, D], contiguous.
    """
    qkv_TND = qkv_TC.view(qkv_TC.shape[0], -1, head_dim)
    qk_TND = qkv_TND[:, : num_heads + num_kv_heads]
    if q_weight is not None and k_weight is not None:
        weight_ND = torch.cat([q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)])
        qk_TND = rms_norm(qk_TND, weight_ND, eps, gemma=gemma)
    qk_TND = _rotate(qk_TND, cos_MR[positions_T], sin_MR[positions_T])
    q_THD, k_TKD = qk_TND.split([num_heads, num_kv_heads], dim=1)
    write_kv(k_TKD, qkv_TND[:, num_heads + num_kv_heads :], k_NSKD, v_NSKD, slot_mapping_T)
    return q_THD.contiguous()


def _rotate(x_TND: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotary embedding, halves layout (https://arxiv.org/abs/2104.09864): x * cos + rotate_half(x) * sin."""
    rotary_dim = cos_TR.shape[-1]
    half = rotary_dim // 2
    out_TND = x_TND.clone(memory_format=torch.contiguous_format)
    out_TND[..., :rotary_dim].mul_(cos_TR[:, None])
    out_TND[..., :half].addcmul_(x_TND[..., half:rotary_dim], sin_TR[:, None, :half], value=-1)
    out_TND[..., half:rotary_dim].addcmul_(x_TND[..., :half], sin_TR[:, None, half:])
    return out_TND


def write_kv(k_TKD: Tensor, v_TKD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, slot_mapping_T: Tensor) -> None:
    """Store keys and values at slot_mapping_T (block * S + offset); -1 writes nothing. Any strides of the cache."""
    if slot_mapping_T.numel() and slot_mapping_T.min() < 0:
        used = slot_mapping_T >= 0
        slot_mapping_T, k_TKD, v_TKD = slot_mapping_T[used], k_TKD[used], v_TKD[used]
    block_size = k_NSKD.shape[1]
    for x_TKD, cache in ((k_TKD, k_NSKD), (v_TKD, v_NSKD)):
        if cache.stride(0) == block_size * cache.stride(1):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping_T, x_TKD)
        else:
            cache[slot_mapping_T // block_size, slot_mapping_T % block_size] = x_TKD
