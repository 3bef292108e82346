"""Norms and gates against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rayinfer.kernels.act_mul import act_mul
from rayinfer.kernels.rms_norm import add_rms_norm, rms_norm

# Half precision: the last bit may fall the other way.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _norm(gemma, channels, dtype):
    module = (Gemma3RMSNorm if gemma else LlamaRMSNorm)(channels, eps=1e-5).to(dtype)
    torch.nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 16), (5, 576), (3, 640), (2, 4100)])
def test_rms_norm(tokens, channels, gemma, dtype, device):
    module = _norm(gemma, channels, dtype)
    x_TC = (torch.randn(tokens, channels) * 3).to(dtype)
    with torch.no_grad():
        want_TC = module(x_TC)
    got_TC = rms_norm(x_TC.to(device), module.weight.detach().to(device), 1e-5, gemma=gemma)
    torch.testing.assert_close(got_TC.cpu(), want_TC, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 16), (5, 576), (2, 4100)])
def test_add_rms_norm(tokens, channels, gemma, dtype, device):
    module = _norm(gemma, channels, dtype)
    wide_TC = torch.randn(tokens, channels + 8).to(dtype)  # rows may be strided
    residual_TC = torch.randn(tokens, channels).to(dtype)
    x_TC = wide_TC[:, :channels]
    with torch.no_grad():
        want_sum_TC = x_TC + residual_TC
        want_TC = module(want_sum_TC)
    weight_C = module.weight.detach().to(device)
    got_TC, sum_TC = add_rms_norm(wide_TC.to(device)[:, :channels], residual_TC.to(device), weight_C, 1e-5, gemma=gemma)
    assert torch.equal(sum_TC.cpu(), want_sum_TC)
    torch.testing.assert_close(got_TC.cpu(), want_TC, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("kind", "name"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu")])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 16), (3, 1536), (2, 1037)])
def test_act_mul(tokens, channels, kind, name, dtype, device):
    x_T2I = (torch.randn(tokens, 2 * channels) * 4).to(dtype)
    x_T2I[0, :2] = torch.tensor([60.0, -60.0])  # saturates, on both sides
    want_TI = ACT2FN[name](x_T2I[:, :channels]) * x_T2I[:, channels:]
    got_TI = act_mul(x_T2I.to(device), kind)
    assert got_TI.stride(0) == 2 * channels or tokens == 1  # in place
    torch.testing.assert_close(got_TI.cpu(), want_TI, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
