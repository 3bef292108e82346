"""Causal attention of prompt chunks of many lengths over their rows' paged KV (FlashAttention-2, Dao, 2023).

The query heads of one KV head share a tile with the queries (GQA packing): tile row m is query m // G, head m % G.

Legend: T tokens, R rows, H query heads, K key/value heads, G = H / K, D head size, N blocks, S slots a block.
"""

import torch
import triton
import triton.language as tl

from rayinfer.kernels.hopper_prefill import hopper_prefill, takes
from rayinfer.kernels.paged_tiles import FLOOR, attend_tiles, check_inputs


# These vary from step to step: a value that is 1 or a multiple of 16, or another alignment, would compile anew.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "query_start_ptr"],
)
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, seq_lens_ptr, query_start_ptr, q_strides, out_strides, table_stride,
    k_strides, v_strides, scale, softcap, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FIXED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The last tile of a row sees the most keys: it starts first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    start = tl.load(query_start_ptr + row)
    num_queries = tl.load(query_start_ptr + row + 1) - start
    first_query = tile * BLOCK_Q
    if first_query < num_queries:
        seq_len = tl.load(seq_lens_ptr + row)
        context = seq_len - num_queries
        m_M = tl.arange(0, BLOCK_M)
        d_D = tl.arange(0, BLOCK_D)
        query_M = first_query + m_M // GROUP
        valid_M = (m_M < BLOCK_Q * GROUP) & (query_M < num_queries)
        # Position -1 sees no key: rows without a query stay empty.
        pos_M = tl.where(valid_M, context + query_M, -1)
        head_M = kv_head * GROUP + m_M % GROUP
        token_M = (start + query_M).to(tl.int64)
        mask_MD = valid_M[:, None] & (d_D < HEAD_DIM)[None, :]
        q_MD = q_ptr + (token_M * q_strides[0] + head_M * q_strides[1])[:, None] + d_D[None, :]
        q_MD = tl.load(q_MD, mask=mask_MD, other=0.0)
        acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        max_M = tl.full([BLOCK_M], FLOOR, tl.float32)
        sum_M = tl.zeros([BLOCK_M], tl.float32)
        k_ptr += kv_head * k_strides[2]
        v_ptr += kv_head * v_strides[2]
        table_ptr += row * table_stride

        first_pos = context + first_query
        last_pos = context + tl.minimum(first_query + BLOCK_Q, num_queries) - 1
        end = last_pos // BLOCK_N + 1
        if WINDOW > 0:
            masked_from = tl.maximum(first_pos - WINDOW + 1, 0) // BLOCK_N
        elif FIXED:
            # Code without the mask may round otherwise, and which tiles need none depends on where a chunk begins.
            masked_from = 0
        else:
            # Tiles that every query sees whole need no mask.
            masked_from = (first_pos + 1) // BLOCK_N
            acc_MD, max_M, sum_M = attend_tiles(
                q_MD, pos_M, acc_MD, max_M, sum_M, k_ptr, v_ptr, table_ptr, k_strides, v_strides, seq_len, 0,
                masked_from, scale, softcap, HEAD_DIM, PAGE, WINDOW, SOFTCAP, False, BLOCK_N,
            )  # fmt: skip
        acc_MD, max_M, sum_M = attend_tiles(
            q_MD, pos_M, acc_MD, max_M, sum_M, k_ptr, v_ptr, table_ptr, k_strides, v_strides, seq_len, masked_from,
            end, scale, softcap, HEAD_DIM, PAGE, WINDOW, SOFTCAP, True, BLOCK_N,
        )  # fmt: skip
        acc_MD = acc_MD / tl.where(sum_M == 0, 1.0, sum_M)[:, None]
        out_MD = out_ptr + (token_M * out_strides[0] + head_M * out_strides[1])[:, None] + d_D[None, :]
        tl.store(out_MD, acc_MD.to(out_ptr.dtype.element_ty), mask=mask_MD)


def _launch_shape(
    block_d: int, itemsize: int, group: int, max_query_len: int, fixed: bool
) -> tuple[int, int, int, int]:
    """(query, head) pairs of a tile, tokens of a KV tile, warps, pipeline stages.

    Short chunks are mostly diagonal, where a narrower KV tile wastes less: 220 instead of 176 TFLOP/s at 512 tokens.
    `fixed`: one shape for chunks and single tokens.
    """
    stages = 2 if torch.version.hip else 3
    if itemsize == 4:  # no tensor cores in float32: small tiles, or the registers spill
        return max(32, triton.next_power_of_2(group)), 32, 4, stages
    if fixed:
        return 64, 32 if block_d > 128 else 64, 4, stages
    return 128, 32 if block_d > 128 or max_query_len <= 1024 else 64, 8, stages


def paged_prefill(
    q_THD: torch.Tensor, k_NSKD: torch.Tensor, v_NSKD: torch.Tensor, block_table_RP: torch.Tensor,
    seq_lens_R: torch.Tensor, query_start_R1: torch.Tensor, *, max_query_len: int, scale: float,
    sliding_window: int | None = None, softcap: float | None = None, out_THD: torch.Tensor | None = None,
    fixed: bool = False, scratch: dict[int, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of prompt chunks; query i of a row is at position seq_len - query_len + i and sees up to itself.

    Args:
        q_THD: float32, float16 or bfloat16; the last dimension is contiguous.
        k_NSKD, v_NSKD: the cache, of q's dtype, in logical order, the chunks' own tokens already written.
        block_table_RP: int32, blocks of each row.
        seq_lens_R: int32, cached tokens of each row, the chunk's own included.
        query_start_R1: int32 [R + 1], first token of each row in `q_THD`; tokens of no row are left alone.
        max_query_len: at least the longest chunk; longer chunks would be cut off.
        scale: factor of q . k; `sliding_window` and `softcap` as in `LayerSpec`.
        out_THD: where to write; a new tensor by default.
        fixed: sums in one order, so that a token's result is the same to the last bit in any batch and chunk.
        scratch: keeps what is worked out of lengths and starts for calls with the same ones: a step's other layers.

    Returns:
        The output, [T, H, D] of q's dtype; accumulation is in float32.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_rows, num_kv_heads = seq_lens_R.shape[0], k_NSKD.shape[2]
    group = num_heads // num_kv_heads
    check_inputs(q_THD, k_NSKD, v_NSKD, block_table_RP)
    out_THD = torch.empty_like(q_THD) if out_THD is None else out_THD
    if num_rows == 0 or max_query_len == 0:
        return out_THD
    if not fixed and group <= 64 and takes(q_THD, sliding_window, softcap):
        inputs = (q_THD, k_NSKD, v_NSKD, block_table_RP, seq_lens_R, query_start_R1)
        return hopper_prefill(*inputs, max_query_len, scale, out_THD, {} if scratch is None else scratch)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m, block_n, num_warps, num_stages = _launch_shape(block_d, q_THD.element_size(), group, max_query_len, fixed)
    num_tiles = triton.cdiv(max_query_len, block_m // group)
    _prefill_kernel[(num_tiles, num_kv_heads, num_rows)](
        q_THD, k_NSKD, v_NSKD, out_THD, block_table_RP, seq_lens_R, query_start_R1, q_THD.stride()[:2],
        out_THD.stride()[:2], block_table_RP.stride(0), k_NSKD.stride()[:3], v_NSKD.stride()[:3], scale,
        softcap or 0.0, GROUP=group, HEAD_DIM=head_dim, PAGE=k_NSKD.shape[1], WINDOW=sliding_window or 0,
        SOFTCAP=bool(softcap), FIXED=fixed, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return out_THD
