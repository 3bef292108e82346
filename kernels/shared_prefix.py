"""Attention of groups of decode rows over the prefix that each group shares, read once for the whole group.

It yields, beside the output over the prefix, the log-sum-exp that `paged_decode` goes on from over the rest of each row
(Juravsky et al., "Hydragen", 2024). The (row, head) pairs of a group fill tiles, and a fixed number of programs shares
the KV tiles equally, found on the device, as in `paged_decode`: one CUDA graph serves every mix of groups.

Legend: B rows, H query heads, K key/value heads, D head size, N blocks, S slots a block, P blocks of a row, G groups,
M pairs of a tile; a pair's number is row * GROUP + head, of the GROUP = H / K heads of a KV head.
"""

import torch
import triton
import triton.language as tl

from rayinfer.kernels.paged_tiles import FLOOR, attend_tiles, check_inputs, merge_kernel, num_processors

# With fewer KV tiles each, a program's start and the merge cost more than the tiles.
_MIN_TILES = 4


# These vary from step to step: a value that is 1 or a multiple of 16, or another alignment, would compile anew.
@triton.jit(
    do_not_specialize=["num_rows", "num_groups", "table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "group_start_ptr", "group_len_ptr"],
)
def _prefix_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, task_ptr, table_ptr, group_start_ptr, group_len_ptr, num_rows,
    num_groups, q_strides, table_stride, k_strides, v_strides, scale, softcap, NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr, MIN_TILES: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles are numbered over (group, KV head, tile of pairs, KV tile); program i takes [i * share, (i + 1) * share).

    `out_ptr` and `lse_ptr` begin with two parts of BLOCK_M pairs for each program; whole results follow.
    """
    pid = tl.program_id(0)
    group_G = tl.arange(0, BLOCK_G)
    start_G = tl.load(group_start_ptr + group_G, mask=group_G < num_groups, other=0)
    stop_G = tl.load(group_start_ptr + group_G + 1, mask=group_G < num_groups, other=0)
    len_G = tl.load(group_len_ptr + group_G, mask=group_G < num_groups, other=0)
    tiles_G = tl.cdiv((stop_G - start_G) * GROUP, BLOCK_M) * tl.cdiv(len_G, BLOCK_N) * NUM_KV_HEADS
    end_G = tl.cumsum(tiles_G, 0)
    total = tl.sum(tiles_G, 0)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), MIN_TILES)
    at = pid * share
    stop = tl.minimum(at + share, total)
    tl.store(task_ptr + 2 * pid, -1)

    m_M = tl.arange(0, BLOCK_M)
    d_D = tl.arange(0, BLOCK_D)
    while at < stop:
        group = tl.sum((end_G <= at).to(tl.int32), 0)
        group_at = tl.sum(tl.where(group_G < group, tiles_G, 0), 0)
        row = tl.load(group_start_ptr + group).to(tl.int64)
        num_pairs = (tl.load(group_start_ptr + group + 1) - row) * GROUP
        length = tl.load(group_len_ptr + group)
        tiles = tl.cdiv(length, BLOCK_N)
        item = (at - group_at) // tiles
        kv_head = item // tl.cdiv(num_pairs, BLOCK_M)
        first_pair = item % tl.cdiv(num_pairs, BLOCK_M) * BLOCK_M
        item_start = group_at + item * tiles
        begin = at - item_start
        end = tl.minimum(stop - item_start, tiles)

        valid_M = first_pair + m_M < num_pairs
        pair_M = row * GROUP + first_pair + m_M
        mask_MD = valid_M[:, None] & (d_D < HEAD_DIM)[None, :]
        q_M = q_ptr + pair_M // GROUP * q_strides[0] + (kv_head * GROUP + pair_M % GROUP) * q_strides[1]
        q_MD = tl.load(q_M[:, None] + d_D[None, :], mask=mask_MD, other=0.0)
        acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        max_M = tl.full([BLOCK_M], FLOOR, tl.float32)
        sum_M = tl.zeros([BLOCK_M], tl.float32)
        whole = length // BLOCK_N  # tiles before this one need no mask
        for masked in tl.static_range(2):
            acc_MD, max_M, sum_M = attend_tiles(
                q_MD, tl.full([BLOCK_M], 0, tl.int32) + (length - 1), acc_MD, max_M, sum_M,
                k_ptr + kv_head * k_strides[2], v_ptr + kv_head * v_strides[2], table_ptr + row * table_stride,
                k_strides, v_strides, length,
                tl.maximum(begin, whole) if masked else begin, end if masked else tl.minimum(end, whole),
                scale, softcap, HEAD_DIM, PAGE, 0, SOFTCAP, masked == 1, BLOCK_N,
            )  # fmt: skip
        # A share touches two cut items at most: one that began before it, and one that goes on after it.
        entry = (2 * pid + (begin == 0).to(tl.int32)) * BLOCK_M
        result = (kv_head * num_rows + row) * GROUP + first_pair
        if (begin == 0) & (end == tiles):
            entry = (result + 2 * tl.num_programs(0) * BLOCK_M).to(tl.int32)
        elif begin == 0:
            tl.store(task_ptr + 2 * pid, result.to(tl.int32))
            tl.store(task_ptr + 2 * pid + 1, (item_start + tiles - 1) // share)
        tl.store(out_ptr + (entry + m_M)[:, None] * HEAD_DIM + d_D[None, :], acc_MD / sum_M[:, None], mask=mask_MD)
        lse_M = tl.where(valid_M, max_M + tl.log2(sum_M), float("-inf"))
        tl.store(lse_ptr + entry + m_M, lse_M, mask=valid_M | (entry < 2 * tl.num_programs(0) * BLOCK_M))
        at = item_start + end


def _launch_shape(block_d: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Pairs of a tile, tokens of a KV tile, warps, pipeline stages, and programs for each multiprocessor.

    The largest tiles that do not spill. 64 pairs and not 128: small groups fill them better.
    """
    if itemsize == 4:  # no tensor cores in float32
        return 16, 32, 4, 2, 2
    if torch.version.hip:
        return (64, 16, 4, 2, 1) if block_d > 128 else (64, 32, 4, 2, 2)
    return (128, 32, 8, 2, 1) if block_d > 128 else (64, 64, 4, 2, 2)


def shared_prefix(
    q_BHD: torch.Tensor, k_NSKD: torch.Tensor, v_NSKD: torch.Tensor, block_table_BP: torch.Tensor,
    group_start_G1: torch.Tensor, group_len_G: torch.Tensor, *, scale: float, softcap: float | None = None,
    num_programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of each group's rows over the first `group_len` cached tokens of the group's first row, all of them.

    Args:
        q_BHD, k_NSKD, v_NSKD, block_table_BP, scale, softcap: as in `paged_decode`.
        group_start_G1, group_len_G: int32, as in `StepMeta`.
        num_programs: how many programs share the tiles; default by device.

    Returns:
        `prefix` of `paged_decode`: the output, float32 [K, B, H / K, D], and the log2 of the sum of exponentiated
        scores, float32 [K, B, H / K]. Rows that are alone are not written.
    """
    num_rows, num_heads, head_dim = q_BHD.shape
    num_kv_heads, num_groups, device = k_NSKD.shape[2], len(group_len_G), q_BHD.device
    group = num_heads // num_kv_heads
    check_inputs(q_BHD, k_NSKD, v_NSKD, block_table_BP)
    assert len(group_start_G1) == num_groups + 1
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m, block_n, num_warps, num_stages, programs_per_sm = _launch_shape(block_d, q_BHD.element_size())
    num_programs = num_programs or programs_per_sm * num_processors(device)
    num_parts = 2 * num_programs * block_m
    out = torch.empty(num_parts + num_rows * num_heads, head_dim, device=device, dtype=torch.float32)
    lse = torch.empty(num_parts + num_rows * num_heads, device=device, dtype=torch.float32)
    task = torch.empty(2 * num_programs, device=device, dtype=torch.int32)
    tensors = (q_BHD, k_NSKD, v_NSKD, out, lse, task, block_table_BP, group_start_G1, group_len_G)
    strides = (q_BHD.stride()[:2], block_table_BP.stride(0), k_NSKD.stride()[:3], v_NSKD.stride()[:3])
    _prefix_kernel[(num_programs,)](
        *tensors, num_rows, num_groups, *strides, scale, softcap or 0.0,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, PAGE=k_NSKD.shape[1], SOFTCAP=bool(softcap),
        MIN_TILES=_MIN_TILES, BLOCK_G=max(64, triton.next_power_of_2(num_groups)), BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_D=block_d, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    prefix = out[num_parts:], lse[num_parts:]
    # The pairs of an item lie one after another in the results: to the merge they are heads of one KV head.
    shape = dict(NUM_KV_HEADS=1, GROUP=block_m, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_P=16)
    merge_kernel[(num_programs, block_m)](out, lse, task, *prefix, (head_dim, head_dim), **shape, num_warps=2)
    return prefix[0].view(num_kv_heads, num_rows, group, head_dim), prefix[1].view(num_kv_heads, num_rows, group)
