"""What the paged attention kernels share: the loop over KV tiles (online softmax, Milakov and Gimelshein, 2018) and the
merge of results over parts of a row.

Legend: M rows of a query tile, N tokens of a KV tile, D head size; the others are in `rayinfer.attention.base`.
"""

import functools

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# A finite floor for the running maximum: rows that see no key end with sum 0 and not with inf - inf.
FLOOR = tl.constexpr(-1.0e30)


@triton.jit
def attend_tiles(
    q_MD, pos_M, acc_MD, max_M, sum_M, k_ptr, v_ptr, table_ptr, k_strides, v_strides, seq_len, first, last, scale,
    softcap, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take KV tiles [first, last) of one row and one KV head into (acc, max, sum); scores are in log2 units.

    Without MASKED the tiles must lie below `seq_len` and below every position in `pos_M`.
    """
    n_N = tl.arange(0, BLOCK_N)
    d_D = tl.arange(0, q_MD.shape[1])
    token_N = first * BLOCK_N + n_N
    page_N = tl.load(table_ptr + token_N // PAGE, mask=token_N < seq_len, other=0)
    for tile in range(first, last):
        token_N = tile * BLOCK_N + n_N
        slot_N = token_N % PAGE
        k_ND = k_ptr + (page_N.to(tl.int64) * k_strides[0] + slot_N * k_strides[1])[:, None] + d_D[None, :]
        v_ND = v_ptr + (page_N.to(tl.int64) * v_strides[0] + slot_N * v_strides[1])[:, None] + d_D[None, :]
        # The next tile's page numbers are asked for one tile ahead: K and V loads then wait for nothing.
        page_N = tl.load(table_ptr + (token_N + BLOCK_N) // PAGE, mask=token_N + BLOCK_N < seq_len, other=0)
        if MASKED:
            # Slots past the row's end may hold NaN, and 0 * NaN is NaN: they are never loaded.
            mask_ND = (token_N < seq_len)[:, None] & (d_D < HEAD_DIM)[None, :]
            k_ND = tl.load(k_ND, mask=mask_ND, other=0.0)
            v_ND = tl.load(v_ND, mask=mask_ND, other=0.0)
        elif q_MD.shape[1] == HEAD_DIM:
            k_ND = tl.load(k_ND)
            v_ND = tl.load(v_ND)
        else:
            k_ND = tl.load(k_ND, mask=(d_D < HEAD_DIM)[None, :], other=0.0)
            v_ND = tl.load(v_ND, mask=(d_D < HEAD_DIM)[None, :], other=0.0)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if SOFTCAP:
            # c * tanh(x) with tanh(x) = 1 - 2 / (exp(2x) + 1), which saturates instead of overflowing.
            grown_MN = tl.exp2(score_MN * (scale * 2 * LOG2E / softcap))
            score_MN = (softcap * LOG2E) * (1 - 2 / (grown_MN + 1))
        else:
            score_MN = score_MN * (scale * LOG2E)
        if MASKED:
            seen_MN = token_N[None, :] <= pos_M[:, None]
            if WINDOW > 0:
                seen_MN = seen_MN & (token_N[None, :] > pos_M[:, None] - WINDOW)
            score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1))
        p_MN = tl.exp2(score_MN - new_max_M[:, None])
        decay_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * decay_M[:, None], input_precision="ieee")
        max_M = new_max_M
    return acc_MD, max_M, sum_M


@triton.jit
def merge_kernel(
    part_ptr, lse_ptr, task_ptr, out_ptr, out_lse_ptr, out_strides, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Merge the parts of the item that program `pid` of the kernel before began and did not end, for one query head.

    With `out_lse_ptr` items are where their first head's log-sum-exp goes; a head whose parts have none is left out.
    """
    pid = tl.program_id(0)
    g = tl.program_id(1)
    item = tl.load(task_ptr + 2 * pid)
    if item >= 0:
        last = tl.load(task_ptr + 2 * pid + 1)
        d_D = tl.arange(0, BLOCK_D)
        acc_D = tl.zeros([BLOCK_D], tl.float32)
        high = FLOOR
        total = 0.0
        for first in range(pid, last + 1, BLOCK_P):
            program_P = first + tl.arange(0, BLOCK_P)
            part_P = (2 * program_P + (program_P == pid).to(tl.int32)) * GROUP + g
            lse_P = tl.load(lse_ptr + part_P, mask=program_P <= last, other=float("-inf"))
            mask_PD = (program_P <= last)[:, None] & (d_D < HEAD_DIM)[None, :]
            part_PD = tl.load(part_ptr + part_P[:, None] * HEAD_DIM + d_D[None, :], mask=mask_PD, other=0.0)
            new_high = tl.maximum(high, tl.max(lse_P, 0))
            weight_P = tl.exp2(lse_P - new_high)
            decay = tl.exp2(high - new_high)
            acc_D = acc_D * decay + tl.sum(part_PD * weight_P[:, None], 0)
            total = total * decay + tl.sum(weight_P, 0)
            high = new_high
        row = (item // NUM_KV_HEADS).to(tl.int64)
        head = (item % NUM_KV_HEADS) * GROUP + g
        out_D = out_ptr + row * out_strides[0] + head * out_strides[1] + d_D
        if out_lse_ptr is None:
            acc_D = acc_D / tl.where(total == 0, 1.0, total)  # an empty row's zeros
            tl.store(out_D, acc_D.to(out_ptr.dtype.element_ty), mask=d_D < HEAD_DIM)
        elif total > 0:
            tl.store(out_D, acc_D / total, mask=d_D < HEAD_DIM)
            tl.store(out_lse_ptr + item + g, high + tl.log2(total))


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small number where there is none (the interpreter)."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_inputs(q_THD: torch.Tensor, k_NSKD: torch.Tensor, v_NSKD: torch.Tensor, table_RP: torch.Tensor) -> None:
    """Our own invariants: heads and block tables contiguous, as many query heads for each KV head, and of the KV cache
    one shape and a power of two of slots a block."""
    assert k_NSKD.shape == v_NSKD.shape
    assert q_THD.stride(2) == k_NSKD.stride(3) == v_NSKD.stride(3) == table_RP.stride(1) == 1
    assert q_THD.shape[1] % k_NSKD.shape[2] == 0
    assert k_NSKD.shape[1] & (k_NSKD.shape[1] - 1) == 0
