"""The fused QK-norm, rotary and KV write against transformers' own modules, and the plain KV write."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rayinfer.kernels.rope_kv import qk_norm_rope_write, write_kv

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _cache(num_blocks, block_size, kv_heads, dim, dtype, device, head_major):
    shape = (2, num_blocks, kv_heads, block_size, dim) if head_major else (2, num_blocks, block_size, kv_heads, dim)
    cache = torch.full(shape, float("nan"), dtype=dtype, device=device)
    return cache.transpose(2, 3) if head_major else cache


def _tables(positions, rotary, dtype):
    """cos and sin of `positions` tokens, as transformers' rotary embeddings lay them."""
    inverse = 10000.0 ** -(torch.arange(0, rotary, 2).float() / rotary)
    angle = torch.arange(positions).float()[:, None] * inverse
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _by_slot(cache_NSKD):
    """The cache as [N * S, K, D], slots in the order of slot_mapping."""
    return cache_NSKD.reshape(-1, *cache_NSKD.shape[2:]).cpu()


@pytest.mark.parametrize("norm", ["none", "llama", "gemma"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "head_major"),
    [(4, 4, 16, 16, True), (9, 3, 64, 64, True), (8, 1, 80, 80, False), (4, 2, 64, 32, True), (4, 1, 256, 64, False)],
)
def test_matches_transformers(heads, kv_heads, dim, rotary, head_major, norm, dtype, device):
    num_tokens, block_size = 7, 16
    qkv_TC = torch.randn(num_tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    positions_T = torch.randint(0, 50, (num_tokens,))
    slots_T = torch.randperm(4 * block_size)[:num_tokens]
    slots_T[2] = -1  # a padding token: its KV goes nowhere
    cos_MR, sin_MR = _tables(50, rotary, torch.float32)
    q_weight = k_weight = None
    q, k, v = (x.unflatten(1, (-1, dim)) for x in qkv_TC.split([heads * dim, kv_heads * dim, kv_heads * dim], 1))
    if norm != "none":
        modules = [{"llama": LlamaRMSNorm, "gemma": Gemma3RMSNorm}[norm](dim, eps=1e-5).to(dtype) for _ in range(2)]
        for module in modules:
            torch.nn.init.normal_(module.weight)
        q_weight, k_weight = (module.weight.detach().to(device) for module in modules)
        q, k = (module(x).detach() for module, x in zip(modules, (q, k), strict=True))
    # The kernel rotates in float32 and rounds once, and so does the reference.
    turned = apply_rotary_pos_emb(
        q[..., :rotary].float(), k[..., :rotary].float(), cos_MR[positions_T], sin_MR[positions_T], unsqueeze_dim=1
    )
    want_q, want_k = (
        torch.cat([t, x[..., rotary:].float()], -1).to(dtype) for t, x in zip(turned, (q, k), strict=True)
    )

    caches = _cache(4, block_size, kv_heads, dim, dtype, device, head_major)
    out_THD = qk_norm_rope_write(
        qkv_TC.to(device),
        cos_MR.to(device),
        sin_MR.to(device),
        positions_T.to(device),
        slots_T.to(device),
        caches[0],
        caches[1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=1e-5,
        gemma=norm == "gemma",
    )
    close = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(out_THD.cpu(), want_q, **close)
    written = slots_T >= 0
    for cache, want in ((_by_slot(caches[0]), want_k), (_by_slot(caches[1]), v)):
        torch.testing.assert_close(cache[slots_T[written]], want[written], **close)
        untouched = torch.ones(len(cache), dtype=torch.bool)
        untouched[slots_T[written]] = False
        assert cache[untouched].isnan().all()


def test_strided_qkv_and_low_precision_tables(device):
    """qkv may be a slice of a wider tensor, and tables may be in half precision."""
    wide = torch.randn(40, 200)
    qkv_TC = wide[:, 8 : 8 + 6 * 16]
    cos_MR, sin_MR = _tables(64, 16, torch.float16)
    positions_T = torch.arange(40)
    caches = _cache(3, 16, 2, 16, torch.float32, device, True)
    out_THD = qk_norm_rope_write(
        wide.to(device)[:, 8 : 8 + 6 * 16],
        cos_MR.to(device),
        sin_MR.to(device),
        positions_T.to(device),
        positions_T.to(device),
        caches[0],
        caches[1],
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
    )
    q, k, v = qkv_TC.reshape(40, 3, 2, 16).unbind(1)
    want_q, want_k = apply_rotary_pos_emb(q, k, cos_MR[:40].float(), sin_MR[:40].float(), unsqueeze_dim=1)
    torch.testing.assert_close(out_THD.cpu(), want_q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_by_slot(caches[0])[:40], want_k, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_by_slot(caches[1])[:40], v, rtol=0, atol=0)


@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 16), (3, 64), (8, 80)])
def test_write_kv(kv_heads, dim, head_major, dtype, device):
    k_TKD, v_TKD = torch.randn(2, 21, kv_heads, dim).to(dtype)
    slots_T = torch.randperm(64)[:21]
    slots_T[5:7] = -1
    caches = _cache(4, 16, kv_heads, dim, dtype, device, head_major)
    # Keys come as transformers has them, [K, T, D] in memory.
    strided = k_TKD.to(device).transpose(0, 1).contiguous().transpose(0, 1)
    write_kv(strided, v_TKD.to(device), caches[0], caches[1], slots_T.to(device))
    want = torch.full((2, 64, kv_heads, dim), float("nan"), dtype=dtype)
    want[0, slots_T[slots_T >= 0]] = k_TKD[slots_T >= 0]
    want[1, slots_T[slots_T >= 0]] = v_TKD[slots_T >= 0]
    for cache, expected in zip(caches, want, strict=True):
        torch.testing.assert_close(_by_slot(cache), expected, rtol=0, atol=0, equal_nan=True)
