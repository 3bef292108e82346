"""Attention of one query token a row over its paged KV.

Split-KV decoding (Dao et al., "Flash-Decoding", 2023) with the work cut as stream-K cuts a GEMM (Osama et al., 2023):
a fixed number of programs shares the step's KV tiles equally, whatever the mix of lengths. Each program finds its share
from `seq_lens` on the device, so one CUDA graph serves every mix and the host never waits. The query heads of one KV
head sit in one tile (GQA packing): each key and value is read once.

Legend: B rows, H query heads, K key/value heads, G = H / K, D head size, N blocks, S slots a block, P blocks a row.
"""

import torch
import triton
import triton.language as tl

from rayinfer.kernels.paged_tiles import FLOOR, attend_tiles, check_inputs, merge_kernel, num_processors

# With fewer tiles each, a program's start and the merge cost more than the tiles.
_MIN_TILES = 2
# An item, a row's tiles for one KV head, costs as much as so many tiles more: a program waits for its first pages, keys
# and values. Cut by tiles alone, the programs with many short items end last.
_ITEM_TILES = 2
# To find its share, a program looks at all rows; two kernels, for few and many, are enough for all but huge batches.
_FEW_ROWS, _MANY_ROWS = 128, 1024


@triton.jit
def _first_tile(seq_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """First KV tile that a row's query sees."""
    if WINDOW > 0:
        return tl.maximum(seq_len - WINDOW, 0) // BLOCK_N
    else:
        return seq_len * 0


@triton.jit
def _num_tiles(seq_len, ITEM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """KV tiles of a row; one for an empty row too, so that its zeros are written; and ITEM for its start."""
    return tl.maximum(tl.cdiv(seq_len, BLOCK_N) - _first_tile(seq_len, WINDOW, BLOCK_N), 1) + ITEM


# These vary from step to step: a value that is 1 or a multiple of 16, or another alignment, would compile anew.
@triton.jit(
    do_not_specialize=["num_rows", "table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "shared_len_ptr"],
)
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, lse_ptr, task_ptr, table_ptr, seq_lens_ptr, shared_len_ptr, prefix_ptr,
    prefix_lse_ptr, num_rows, q_strides, out_strides, table_stride, k_strides, v_strides, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MIN_TILES: tl.constexpr, ITEM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles are numbered over (row, KV head, tile of the row); program i takes numbers [i * share, (i + 1) * share).

    The first ITEM tiles of an item are none: they stand for its start.
    """
    pid = tl.program_id(0)
    row_B = tl.arange(0, BLOCK_B)
    len_B = tl.load(seq_lens_ptr + row_B, mask=row_B < num_rows, other=0)
    if shared_len_ptr is not None:
        len_B -= tl.load(shared_len_ptr + row_B, mask=row_B < num_rows, other=0)
    tiles_B = tl.where(row_B < num_rows, _num_tiles(len_B, ITEM, WINDOW, BLOCK_N), 0) * NUM_KV_HEADS
    end_B = tl.cumsum(tiles_B, 0)
    total = tl.sum(tiles_B, 0)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), MIN_TILES)
    at = pid * share
    stop = tl.minimum(at + share, total)
    row = tl.sum((end_B <= at).to(tl.int32), 0)
    row_start = tl.sum(tl.where(row_B < row, tiles_B, 0), 0)
    tl.store(task_ptr + 2 * pid, -1)

    m_M = tl.arange(0, BLOCK_M)
    d_D = tl.arange(0, BLOCK_D)
    mask_MD = (m_M < GROUP)[:, None] & (d_D < HEAD_DIM)[None, :]
    while at < stop:
        seq_len = tl.load(seq_lens_ptr + row)
        first_block = 0
        if shared_len_ptr is not None:
            # What follows the prefix is a row of its own: only windows look at positions, and there are none.
            shared_len = tl.load(shared_len_ptr + row)
            seq_len -= shared_len
            first_block = shared_len // PAGE
        tiles = _num_tiles(seq_len, ITEM, WINDOW, BLOCK_N)
        kv_head = (at - row_start) // tiles
        item_start = row_start + kv_head * tiles
        begin = at - item_start
        end = tl.minimum(stop - item_start, tiles)
        low = _first_tile(seq_len, WINDOW, BLOCK_N) - ITEM

        q_MD = q_ptr + row.to(tl.int64) * q_strides[0] + (kv_head * GROUP + m_M)[:, None] * q_strides[1] + d_D[None, :]
        acc_MD, max_M, sum_M = attend_tiles(
            tl.load(q_MD, mask=mask_MD, other=0.0), tl.full([BLOCK_M], 0, tl.int32) + (seq_len - 1),
            tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.full([BLOCK_M], FLOOR, tl.float32),
            tl.zeros([BLOCK_M], tl.float32), k_ptr + kv_head.to(tl.int64) * k_strides[2],
            v_ptr + kv_head.to(tl.int64) * v_strides[2], table_ptr + row.to(tl.int64) * table_stride + first_block,
            k_strides, v_strides, seq_len, low + tl.maximum(begin, ITEM), low + tl.maximum(end, ITEM), scale, softcap,
            HEAD_DIM, PAGE, WINDOW, SOFTCAP, True, BLOCK_N,
        )  # fmt: skip
        if shared_len_ptr is not None:
            # The prefix joins last, when the tiles' registers are free, in the program that began the item.
            known_M = (m_M < GROUP) & (begin == 0) & (shared_len > 0)
            pair = (kv_head.to(tl.int64) * num_rows + row) * GROUP
            prefix_MD = prefix_ptr + pair * HEAD_DIM + (m_M[:, None] * HEAD_DIM + d_D[None, :])
            prefix_MD = tl.load(prefix_MD, mask=known_M[:, None] & mask_MD, other=0.0)
            lse_M = tl.load(prefix_lse_ptr + pair + m_M, mask=known_M, other=float("-inf"))
            new_max_M = tl.maximum(max_M, lse_M)
            decay_M = tl.exp2(max_M - new_max_M)
            weight_M = tl.exp2(lse_M - new_max_M)
            acc_MD = acc_MD * decay_M[:, None] + prefix_MD * weight_M[:, None]
            sum_M = sum_M * decay_M + weight_M
            max_M = new_max_M
        acc_MD = acc_MD / tl.where(sum_M == 0, 1.0, sum_M)[:, None]
        if (begin == 0) & (end == tiles):
            out_MD = out_ptr + row.to(tl.int64) * out_strides[0] + d_D[None, :]
            out_MD += (kv_head * GROUP + m_M)[:, None] * out_strides[1]
            tl.store(out_MD, acc_MD.to(out_ptr.dtype.element_ty), mask=mask_MD)
        else:
            # A share touches two cut items at most: one that began before it, and one that goes on after it.
            part_M = (2 * pid + (begin == 0).to(tl.int32)) * GROUP + m_M
            tl.store(part_ptr + part_M[:, None] * HEAD_DIM + d_D[None, :], acc_MD, mask=mask_MD)
            tl.store(lse_ptr + part_M, max_M + tl.log2(sum_M), mask=m_M < GROUP)
            if begin == 0:
                tl.store(task_ptr + 2 * pid, row * NUM_KV_HEADS + kv_head)
                tl.store(task_ptr + 2 * pid + 1, (item_start + tiles - 1) // share)
        at = item_start + end
        if at == row_start + tiles * NUM_KV_HEADS:
            row_start = at
            row += 1


def _launch_shape(block_m: int, block_d: int, itemsize: int) -> tuple[int, int, int, int]:
    """Tokens of a KV tile, warps, pipeline stages, and programs for each multiprocessor.

    Many small programs hide the start of a row best: on an H200, (16, 2, 3, 6) against (64, 4, 3, 3) read 3.6 against
    3.2 TB/s at 160 tokens a row and the same 4.1 to 4.3 at 570 and more. An AMD compute unit has 64 KiB of shared
    memory, for one or two programs of large tiles.
    """
    if torch.version.hip:
        return min(128, max(16, 16384 // (block_d * itemsize))), 4, 2, 2
    return min(128, max(16, 4096 // (block_d * itemsize))), 2 if block_m * block_d <= 4096 else 4, 3, 6


def paged_decode(
    q_BHD: torch.Tensor, k_NSKD: torch.Tensor, v_NSKD: torch.Tensor, block_table_BP: torch.Tensor,
    seq_lens_B: torch.Tensor, *, scale: float, sliding_window: int | None = None, softcap: float | None = None,
    out_BHD: torch.Tensor | None = None, num_programs: int | None = None, shared_len_B: torch.Tensor | None = None,
    prefix: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:  # fmt: skip
    """Attention of each row's last token, at position seq_len - 1, over the row's cached keys and values.

    Args:
        q_BHD: float32, float16 or bfloat16; the last dimension is contiguous.
        k_NSKD, v_NSKD: the cache, of q's dtype, in logical order; the memory may be permuted, D contiguous.
        block_table_BP: int32, blocks of each row.
        seq_lens_B: int32, cached tokens of each row, the query's own included; a row of 0 gets zeros and reads nothing.
        scale: factor of q . k; `sliding_window` and `softcap` as in `LayerSpec`.
        out_BHD: where to write; a new tensor by default.
        num_programs: how many programs share the tiles; default by device.
        shared_len_B: int32, tokens at the front of each row, a multiple of S below seq_len or 0, whose attention is
            `prefix`, what `shared_prefix` returned. Not with a window.

    Returns:
        The output, [B, H, D] of q's dtype; accumulation is in float32.
    """
    num_rows, num_heads, head_dim = q_BHD.shape
    num_kv_heads, group = k_NSKD.shape[2], num_heads // k_NSKD.shape[2]
    device = q_BHD.device
    check_inputs(q_BHD, k_NSKD, v_NSKD, block_table_BP)
    out_BHD = torch.empty_like(q_BHD) if out_BHD is None else out_BHD
    if num_rows == 0:
        return out_BHD
    block_m, block_d = (max(16, triton.next_power_of_2(size)) for size in (group, head_dim))
    block_n, num_warps, num_stages, programs_per_sm = _launch_shape(block_m, block_d, q_BHD.element_size())
    assert shared_len_B is None or (prefix[0] is not None and not sliding_window)
    num_programs = num_programs or programs_per_sm * num_processors(device)
    num_parts = 2 * num_programs
    part = torch.empty(num_parts, group, head_dim, device=device, dtype=torch.float32)
    lse = torch.empty(num_parts, group, device=device, dtype=torch.float32)
    task = torch.empty(num_parts, device=device, dtype=torch.int32)
    tensors = (q_BHD, k_NSKD, v_NSKD, out_BHD, part, lse, task, block_table_BP, seq_lens_B, shared_len_B)
    strides = (q_BHD.stride()[:2], out_BHD.stride()[:2], block_table_BP.stride(0))
    shape = dict(NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d)
    _decode_kernel[(num_programs,)](
        *tensors, *prefix, num_rows, *strides, k_NSKD.stride()[:3], v_NSKD.stride()[:3], scale, softcap or 0.0,
        BLOCK_B=_FEW_ROWS if num_rows <= _FEW_ROWS else max(_MANY_ROWS, triton.next_power_of_2(num_rows)),
        BLOCK_M=block_m, BLOCK_N=block_n, PAGE=k_NSKD.shape[1], WINDOW=sliding_window or 0, SOFTCAP=bool(softcap),
        MIN_TILES=_MIN_TILES, ITEM=_ITEM_TILES, **shape, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    outputs = (out_BHD, None, out_BHD.stride()[:2])
    merge_kernel[(num_programs, group)](part, lse, task, *outputs, **shape, BLOCK_P=16, num_warps=2)
    return out_BHD
