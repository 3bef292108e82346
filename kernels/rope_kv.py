"""What happens between the QKV projection and attention, in one pass: QK-norm, rotary, and the write into the cache.

Legend: T tokens, C = (H + 2K) * D, H query heads, K key/value heads, D head size, N blocks, S slots a block,
M positions of the rotary table, R rotary width; in the kernels, E rows of (token, head) and J half of R.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = tl.constexpr(32)  # (token, head) pairs of a program


@triton.jit
def _slot_offset(slot_E, strides, PAGE: tl.constexpr):
    """Offset of cache slots, in elements: caches hold more than 2**31 of them."""
    return (slot_E // PAGE) * strides[0] + (slot_E % PAGE) * strides[1]


@triton.jit
def _normed(x_EJ, rstd_E, weight_ptr, d_J, mask_J, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """RMS norm in transformers' rounding: Gemma's multiplies in float32, the others round before the weight."""
    w_J = tl.load(weight_ptr + d_J, mask=mask_J, other=0.0).to(tl.float32)
    x_EJ = x_EJ * rstd_E[:, None]
    if NORM == "gemma":
        x_EJ = x_EJ * (1.0 + w_J)[None, :]
    else:
        x_EJ = x_EJ.to(DTYPE).to(tl.float32) * w_J[None, :]
    return x_EJ.to(DTYPE).to(tl.float32)


@triton.jit
def _move_heads(
    step, weight_ptr, target_ptr, strides, block, HEADS: tl.constexpr, SOURCE: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr, NORM: tl.constexpr, PAGE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Take a block of (token, head) pairs of HEADS heads, from column SOURCE on, to their tokens (PAGE 0) or slots.

    Values pass through as they are where ROTARY is 0: the first half of a head is then `low`, the second `high`.
    """
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, num_tokens, qkv_stride, table_stride, eps = step
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    TURNED: tl.constexpr = ROTARY if ROTARY > 0 else HEAD_DIM
    HALF: tl.constexpr = TURNED // 2
    e_E = block * _ROWS + tl.arange(0, _ROWS)
    token_E = (e_E // HEADS).to(tl.int64)
    head_E = e_E % HEADS
    real_E = token_E < num_tokens
    j_J = tl.arange(0, BLOCK_J)
    half_J = j_J < HALF
    mask_EJ = real_E[:, None] & half_J[None, :]
    source_E = qkv_ptr + token_E * qkv_stride + SOURCE + head_E * HEAD_DIM
    low_EJ = tl.load(source_E[:, None] + j_J[None, :], mask=mask_EJ, other=0.0).to(tl.float32)
    high_EJ = tl.load(source_E[:, None] + (HALF + j_J)[None, :], mask=mask_EJ, other=0.0).to(tl.float32)
    r_R = TURNED + tl.arange(0, BLOCK_REST)
    mask_ER = real_E[:, None] & (r_R < HEAD_DIM)[None, :]
    if TURNED < HEAD_DIM:
        rest_ER = tl.load(source_E[:, None] + r_R[None, :], mask=mask_ER, other=0.0).to(tl.float32)

    if NORM != "none":
        square_E = tl.sum(low_EJ * low_EJ, 1) + tl.sum(high_EJ * high_EJ, 1)
        if TURNED < HEAD_DIM:
            square_E += tl.sum(rest_ER * rest_ER, 1)
        rstd_E = tl.rsqrt(square_E / HEAD_DIM + eps)
        low_EJ = _normed(low_EJ, rstd_E, weight_ptr, j_J, half_J, NORM, DTYPE)
        high_EJ = _normed(high_EJ, rstd_E, weight_ptr, j_J + HALF, half_J, NORM, DTYPE)
        if TURNED < HEAD_DIM:
            rest_ER = _normed(rest_ER, rstd_E, weight_ptr, r_R, r_R < HEAD_DIM, NORM, DTYPE)
    if ROTARY > 0:
        position_E = tl.load(positions_ptr + token_E, mask=real_E, other=0)
        angle_EJ = (position_E * table_stride)[:, None] + j_J[None, :]
        cos_low_EJ = tl.load(cos_ptr + angle_EJ, mask=mask_EJ, other=0.0).to(tl.float32)
        cos_high_EJ = tl.load(cos_ptr + angle_EJ + HALF, mask=mask_EJ, other=0.0).to(tl.float32)
        sin_low_EJ = tl.load(sin_ptr + angle_EJ, mask=mask_EJ, other=0.0).to(tl.float32)
        sin_high_EJ = tl.load(sin_ptr + angle_EJ + HALF, mask=mask_EJ, other=0.0).to(tl.float32)
        turned_EJ = low_EJ * cos_low_EJ - high_EJ * sin_low_EJ
        high_EJ = high_EJ * cos_high_EJ + low_EJ * sin_high_EJ
        low_EJ = turned_EJ

    if PAGE > 0:
        slot_E = tl.load(slots_ptr + token_E, mask=real_E, other=-1)
        real_E = slot_E >= 0
        mask_EJ = mask_EJ & real_E[:, None]
        mask_ER = mask_ER & real_E[:, None]
        target_E = target_ptr + _slot_offset(slot_E, strides, PAGE) + head_E * strides[2]
    else:
        target_E = target_ptr + token_E * strides[0] + head_E * strides[2]
    tl.store(target_E[:, None] + j_J[None, :], low_EJ.to(DTYPE), mask=mask_EJ)
    tl.store(target_E[:, None] + (HALF + j_J)[None, :], high_EJ.to(DTYPE), mask=mask_EJ)
    if TURNED < HEAD_DIM:
        tl.store(target_E[:, None] + r_R[None, :], rest_ER.to(DTYPE), mask=mask_ER)


# A number that varies from step to step would compile anew where it is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_tokens"])
def _qk_norm_rope_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, v_ptr,
    num_tokens, qkv_stride, table_stride, k_strides, v_strides, eps, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """First all programs of q, then those of k, then of v."""
    Q_WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    V_START: tl.constexpr = Q_WIDTH + NUM_KV_HEADS * HEAD_DIM
    step = (qkv_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, num_tokens, qkv_stride, table_stride, eps)
    q_strides = (Q_WIDTH, 0, HEAD_DIM)
    pid = tl.program_id(0)
    num_q = tl.cdiv(num_tokens * NUM_HEADS, _ROWS)
    num_k = tl.cdiv(num_tokens * NUM_KV_HEADS, _ROWS)
    if pid < num_q:
        _move_heads(
            step, q_weight_ptr, q_ptr, q_strides, pid, NUM_HEADS, 0, HEAD_DIM, ROTARY, NORM, 0, BLOCK_J, BLOCK_REST
        )
    elif pid < num_q + num_k:
        _move_heads(
            step, k_weight_ptr, k_ptr, k_strides, pid - num_q, NUM_KV_HEADS, Q_WIDTH, HEAD_DIM, ROTARY, NORM, PAGE,
            BLOCK_J, BLOCK_REST,
        )  # fmt: skip
    else:
        block = pid - num_q - num_k
        _move_heads(
            step, k_weight_ptr, v_ptr, v_strides, block, NUM_KV_HEADS, V_START, HEAD_DIM, 0, "none", PAGE, BLOCK_V, 1
        )


def qk_norm_rope_write(
    qkv_TC: Tensor, cos_MR: Tensor, sin_MR: Tensor, positions_T: Tensor, slot_mapping_T: Tensor, k_NSKD: Tensor,
    v_NSKD: Tensor, *, num_heads: int, num_kv_heads: int, head_dim: int, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 1e-6, gemma: bool = False,
) -> Tensor:  # fmt: skip
    """RMS-normalise heads of q and k, rotate them, write k and v into the cache, return q.

    Args:
        qkv_TC: query heads, key heads, value heads side by side; rows may be strided.
        cos_MR, sin_MR: rotate-half (NeoX) tables as transformers lays them, cat(freqs, freqs), any float dtype; the
            first R dimensions of a head rotate, in float32, the others pass.
        positions_T: int64, the table's row for each token.
        slot_mapping_T: int64, block * block_size + offset; -1 writes nothing.
        k_NSKD, v_NSKD: the cache, of qkv's dtype.
        q_weight, k_weight: [D] of the per-head RMS norm, both or none.
        eps, gemma: of that norm; gemma multiplies by 1 + weight in float32 (Gemma3RMSNorm).

    Returns:
        The queries, [T, H, D], of qkv's dtype.
    """
    num_tokens, rotary = qkv_TC.shape[0], cos_MR.shape[1]
    assert qkv_TC.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim
    assert 0 < rotary <= head_dim
    assert rotary % 2 == head_dim % 2 == 0
    assert cos_MR.stride() == sin_MR.stride() == (rotary, 1)
    assert (q_weight is None) == (k_weight is None)
    assert qkv_TC.stride(1) == k_NSKD.stride(3) == v_NSKD.stride(3) == 1
    q_THD = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv_TC.dtype, device=qkv_TC.device)
    rows = _ROWS.value
    num_programs = triton.cdiv(num_tokens * num_heads, rows) + 2 * triton.cdiv(num_tokens * num_kv_heads, rows)
    if num_tokens > 0:
        _qk_norm_rope_write_kernel[(num_programs,)](
            qkv_TC, cos_MR, sin_MR, positions_T, slot_mapping_T, qkv_TC if q_weight is None else q_weight,
            qkv_TC if k_weight is None else k_weight, q_THD, k_NSKD, v_NSKD, num_tokens, qkv_TC.stride(0), rotary,
            k_NSKD.stride()[:3], v_NSKD.stride()[:3], eps, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim, ROTARY=rotary, NORM="none" if q_weight is None else "gemma" if gemma else "llama",
            PAGE=k_NSKD.shape[1], BLOCK_J=triton.next_power_of_2(rotary // 2), num_warps=4 if head_dim <= 128 else 8,
            BLOCK_V=triton.next_power_of_2(head_dim // 2), BLOCK_REST=triton.next_power_of_2(max(1, head_dim - rotary)),
        )  # fmt: skip
    return q_THD


# These vary from step to step, and a value that is 1 or a multiple of 16 would compile anew.
@triton.jit(do_not_specialize=["num_tokens"])
def _write_kv_kernel(
    key_ptr, value_ptr, slots_ptr, k_ptr, v_ptr, num_tokens, key_strides, value_strides, k_strides, v_strides,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    e_E = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    token_E = (e_E // NUM_KV_HEADS).to(tl.int64)
    head_E = e_E % NUM_KV_HEADS
    d_D = tl.arange(0, BLOCK_D)
    slot_E = tl.load(slots_ptr + token_E, mask=token_E < num_tokens, other=-1)
    mask_ED = (slot_E >= 0)[:, None] & (d_D < HEAD_DIM)[None, :]
    key_E = token_E * key_strides[0] + head_E * key_strides[1]
    value_E = token_E * value_strides[0] + head_E * value_strides[1]
    k_E = _slot_offset(slot_E, k_strides, PAGE) + head_E * k_strides[2]
    v_E = _slot_offset(slot_E, v_strides, PAGE) + head_E * v_strides[2]
    key_ED = tl.load(key_ptr + key_E[:, None] + d_D[None, :], mask=mask_ED)
    value_ED = tl.load(value_ptr + value_E[:, None] + d_D[None, :], mask=mask_ED)
    tl.store(k_ptr + k_E[:, None] + d_D[None, :], key_ED, mask=mask_ED)
    tl.store(v_ptr + v_E[:, None] + d_D[None, :], value_ED, mask=mask_ED)


def write_kv(k_TKD: Tensor, v_TKD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, slot_mapping_T: Tensor) -> None:
    """Store keys and values of T tokens in the cache at `slot_mapping_T` (int64; -1 writes nothing).

    All four tensors are of one dtype; their last dimension is contiguous, the others may be strided.
    """
    num_tokens, num_kv_heads, head_dim = k_TKD.shape
    assert k_TKD.stride(2) == v_TKD.stride(2) == k_NSKD.stride(3) == v_NSKD.stride(3) == 1
    if num_tokens > 0:
        _write_kv_kernel[(triton.cdiv(num_tokens * num_kv_heads, _ROWS.value),)](
            k_TKD, v_TKD, slot_mapping_T, k_NSKD, v_NSKD, num_tokens, k_TKD.stride()[:2], v_TKD.stride()[:2],
            k_NSKD.stride()[:3], v_NSKD.stride()[:3], NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
            PAGE=k_NSKD.shape[1], BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
        )  # fmt: skip
