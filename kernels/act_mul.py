"""The gate of a gated feed-forward block: act(x[:, :I]) * x[:, I:]. T tokens, I intermediate channels."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _act_mul_kernel(x_ptr, x_stride, num_channels, KIND: tl.constexpr, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_I = i_I < num_channels
    gate_I = tl.load(x_ptr + token * x_stride + i_I, mask=mask_I, other=0.0).to(tl.float32)
    up_I = tl.load(x_ptr + token * x_stride + num_channels + i_I, mask=mask_I, other=0.0).to(tl.float32)
    if KIND == "silu":
        gate_I = gate_I / (1.0 + tl.exp(-gate_I))
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is the logistic function of 2y.
        y_I = 0.7978845608028654 * (gate_I + 0.044715 * gate_I * gate_I * gate_I)
        gate_I = gate_I / (1.0 + tl.exp(-2.0 * y_I))
    else:
        gate_I = 0.5 * gate_I * (1.0 + tl.erf(gate_I * 0.7071067811865476))
    # transformers rounds the activation before it multiplies.
    out_I = gate_I.to(DTYPE).to(tl.float32) * up_I
    tl.store(x_ptr + token * x_stride + i_I, out_I.to(DTYPE), mask=mask_I)


def act_mul(x_T2I: torch.Tensor, kind: str) -> torch.Tensor:
    """Activate the first half of the channels and multiply by the second, in place, for what is wide is large.

    Args:
        x_T2I: [T, 2I], the last dimension contiguous.
        kind: "silu", "gelu_tanh" (tanh approximation) or "gelu" (erf), computed in float32.

    Returns:
        The first half, [T, I].
    """
    assert x_T2I.stride(1) == 1
    assert x_T2I.shape[1] % 2 == 0
    num_tokens, num_channels = x_T2I.shape[0], x_T2I.shape[1] // 2
    grid = (num_tokens, triton.cdiv(num_channels, _BLOCK))
    if num_tokens:
        _act_mul_kernel[grid](x_T2I, x_T2I.stride(0), num_channels, KIND=kind, BLOCK=_BLOCK, num_warps=4)
    return x_T2I[:, :num_channels]
