"""RMS norm (Zhang and Sennrich, 2019), alone and with the residual addition before it. T tokens, C channels."""

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, x_stride, residual_stride, eps, num_channels,
    ADD: tl.constexpr, GEMMA: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    c_C = tl.arange(0, BLOCK_C)
    mask_C = c_C < num_channels
    x_C = tl.load(x_ptr + token * x_stride + c_C, mask=mask_C, other=0.0).to(tl.float32)
    if ADD:
        x_C += tl.load(residual_ptr + token * residual_stride + c_C, mask=mask_C, other=0.0).to(tl.float32)
        # The norm sees what is stored, so that a layer's input does not depend on what was fused.
        x_C = x_C.to(DTYPE).to(tl.float32)
        tl.store(sum_ptr + token * num_channels + c_C, x_C.to(DTYPE), mask=mask_C)
    weight_C = tl.load(weight_ptr + c_C, mask=mask_C, other=0.0).to(tl.float32)
    x_C = x_C * tl.rsqrt(tl.sum(x_C * x_C, 0) / num_channels + eps)
    if GEMMA:
        x_C = x_C * (1.0 + weight_C)
    else:
        x_C = x_C.to(DTYPE).to(tl.float32) * weight_C
    tl.store(out_ptr + token * num_channels + c_C, x_C.to(DTYPE), mask=mask_C)


def rms_norm(x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float, *, gemma: bool = False) -> torch.Tensor:
    """RMS norm over channels in float32; the result, [T, C], has x's dtype.

    With gemma=False the normalised value is rounded to x's dtype and then multiplied by the weight (LlamaRMSNorm);
    with gemma=True it is multiplied by 1 + weight in float32 and rounded once (Gemma3RMSNorm).
    """
    return add_rms_norm(x_TC, None, weight_C, eps, gemma=gemma)[0]


def add_rms_norm(
    x_TC: torch.Tensor, residual_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float, *, gemma: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of x + residual, and that sum rounded to x's dtype: (normed_TC, sum_TC). None adds nothing."""
    num_tokens, num_channels = x_TC.shape
    residual = x_TC if residual_TC is None else residual_TC
    assert residual.shape == x_TC.shape
    assert x_TC.stride(1) == residual.stride(1) == weight_C.stride(0) == 1
    out_TC = torch.empty(num_tokens, num_channels, dtype=x_TC.dtype, device=x_TC.device)
    sum_TC = out_TC if residual_TC is None else torch.empty_like(out_TC)
    if num_tokens > 0:
        block_c = triton.next_power_of_2(num_channels)
        _rms_norm_kernel[(num_tokens,)](
            x_TC, residual, weight_C, out_TC, sum_TC, x_TC.stride(0), residual.stride(0), eps, num_channels,
            ADD=residual_TC is not None, GEMMA=gemma, BLOCK_C=block_c, num_warps=min(16, max(1, block_c // 512)),
        )  # fmt: skip
    return out_TC, sum_TC
