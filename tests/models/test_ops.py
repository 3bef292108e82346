"""The torch operations against the transformers functions that they stand for."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rayinfer import ops

EXACT = {"rtol": 0, "atol": 0}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
GEMMA = pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])


def norm_module(dim: int, gemma: bool, dtype: torch.dtype) -> torch.nn.Module:
    module = (Gemma3RMSNorm if gemma else LlamaRMSNorm)(dim, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight += torch.randn(dim).to(dtype) * 0.3
    return module


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Half precision must round alike; fp32 may differ by the order of a sum."""
    return {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else EXACT


@DTYPES
@GEMMA
def test_rms_norm(dtype, gemma):
    module, x = norm_module(96, gemma, dtype), torch.randn(7, 96).to(dtype) * 3
    before = x.clone()
    torch.testing.assert_close(ops.rms_norm(x, module.weight, 1e-5, gemma=gemma), module(x), **tolerance(dtype))
    torch.testing.assert_close(x, before, **EXACT)


@DTYPES
@GEMMA
def test_add_rms_norm(dtype, gemma):
    module, x, residual = norm_module(96, gemma, dtype), torch.randn(7, 96).to(dtype), torch.randn(7, 96).to(dtype)
    before = x.clone(), residual.clone()
    normed, total = ops.add_rms_norm(x, residual, module.weight, 1e-5, gemma=gemma)
    torch.testing.assert_close(total, x + residual, **EXACT)
    torch.testing.assert_close(normed, module(x + residual), **tolerance(dtype))
    torch.testing.assert_close((x, residual), before, **EXACT)


@DTYPES
@pytest.mark.parametrize("kind", ops._ACT)
def test_act_mul(dtype, kind):
    act = {"silu": torch.nn.SiLU(), "gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU(approximate="tanh")}[kind]
    x = torch.randn(5, 64).to(dtype)
    before = x.clone()
    torch.testing.assert_close(ops.act_mul(x, kind), act(x[:, :32]) * x[:, 32:], **EXACT)
    torch.testing.assert_close(x, before, **EXACT)


@DTYPES
@pytest.mark.parametrize("norm", [None, False, True], ids=["plain", "qwen", "gemma"])
@pytest.mark.parametrize("layout", ["NSKD", "NKSD"])
def test_qk_norm_rope_write(dtype, norm, layout):
    H, K, D, S, T = 6, 2, 16, 4, 5
    qkv = torch.randn(T, (H + 2 * K) * D).to(dtype)
    positions, slots = torch.tensor([3, 0, 9, 4, 1]), torch.tensor([7, 4, -1, 10, 1])
    angles = (torch.arange(12)[:, None] * torch.rand(D // 2)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q, k, v = (x.unflatten(1, (-1, D)) for x in qkv.split([H * D, K * D, K * D], dim=1))
    weights = {}
    if norm is not None:
        q_norm, k_norm = norm_module(D, norm, dtype), norm_module(D, norm, dtype)
        weights = {"q_weight": q_norm.weight, "k_weight": k_norm.weight, "eps": 1e-5, "gemma": norm}
        q, k = q_norm(q), k_norm(k)
    q, k = apply_rotary_pos_emb(q, k, cos[positions], sin[positions])

    shape = (3, S, K, D) if layout == "NSKD" else (3, K, S, D)
    caches = [torch.full(shape, 8.0, dtype=dtype) for _ in range(2)]
    k_cache, v_cache = caches if layout == "NSKD" else [cache.transpose(1, 2) for cache in caches]
    out = ops.qk_norm_rope_write(
        qkv, cos, sin, positions, slots, k_cache, v_cache, num_heads=H, num_kv_heads=K, head_dim=D, **weights
    )
    bounds = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": torch.finfo(dtype).eps * 4}
    assert out.is_contiguous()
    torch.testing.assert_close(out, q, **bounds)
    for cache, new in ((k_cache, k), (v_cache, v)):
        expected = torch.full((3, S, K, D), 8.0, dtype=dtype)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot // S, slot % S] = new[token]
        torch.testing.assert_close(cache.contiguous(), expected, **bounds)
