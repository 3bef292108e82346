"""Causal attention of prompt chunks over paged KV for Hopper GPUs, in Gluon (Triton's layer with explicit layouts).

The same function as `paged_prefill`, for the shapes that matter most: 16-bit types, heads of 64 or 128, no window, no
softcap. The order of work is FlashAttention-3's (Shah et al., 2024): one group of warps copies K and V tiles, two
others compute, each on half of the queries, so that the softmax of one runs beside the products of the other, and
within each the product of the next scores beside the softmax of the last ones. Plain Triton does neither.

Legend: M (query, head) pairs of a tile, N tokens of a KV tile, D head size; the others as in `paged_prefill`.
"""

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from rayinfer.kernels.paged_tiles import num_processors

_LOG2E = 1.4426950408889634
_FLOOR = gl.constexpr(-1.0e30)  # as in paged_tiles: a tile row that sees no key ends with sum 0
_THREADS = gl.constexpr(128)  # of each group of warps
_BLOCK_M = 128  # two groups compute, 64 each: what one wgmma takes


@gluon.jit
def _item(item, rows, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Row and KV head of a query tile, its first query, and the KV tiles that it sees: none for tiles past the row."""
    order_ptr, seq_lens_ptr, query_start_ptr, num_kv_heads, num_rows, _num_items = rows
    place = gl.load(order_ptr + item // num_kv_heads)
    row = place % num_rows
    start = gl.load(query_start_ptr + row)
    num_queries = gl.load(query_start_ptr + row + 1) - start
    seq_len = gl.load(seq_lens_ptr + row)
    first_query = place // num_rows * (BLOCK_M // GROUP)
    last_pos = seq_len - num_queries + gl.minimum(first_query + BLOCK_M // GROUP, num_queries) - 1
    num_tiles = gl.where(first_query < num_queries, last_pos // BLOCK_N + 1, 0)
    return row.to(gl.int64), (item % num_kv_heads).to(gl.int64), start, num_queries, seq_len, first_query, num_tiles


@gluon.jit
def _copy(smem, ptr, page_N, token_N, inside_N, strides, PAGE: gl.constexpr, LOAD: gl.constexpr):
    """Ask for a tile of K or V. Slots past the row's end may hold NaN, and 0 * NaN is NaN: they are set to zero."""
    d_D = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, LOAD))
    at_N = page_N.to(gl.int64) * strides[0] + (token_N % PAGE) * strides[1]
    mask_ND = inside_N[:, None] & (d_D >= 0)[None, :]
    hopper.async_copy.async_copy_global_to_shared(smem, ptr + at_N[:, None] + d_D[None, :], mask_ND)


@gluon.jit
def _produce(source, rows, buffers, GROUP: gl.constexpr, PAGE: gl.constexpr, BLOCK_M: gl.constexpr):
    """The warps that copy: K and V tiles of one query tile after the other, as far ahead as there is room."""
    k_ptr, v_ptr, table_ptr, table_stride, k_strides, v_strides = source
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = buffers
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = k_smem.shape[2]
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [_THREADS // 32, 1], [1, 0])
    n_N = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD))
    turn = 0
    for item in range(gl.program_id(0), rows[5], gl.num_programs(0)):
        row, kv_head, _, _, seq_len, _, num_tiles = _item(item, rows, GROUP, BLOCK_M, BLOCK_N)
        k_head_ptr = k_ptr + kv_head * k_strides[2]
        v_head_ptr = v_ptr + kv_head * v_strides[2]
        pages_ptr = table_ptr + row * table_stride
        page_N = gl.load(pages_ptr + n_N // PAGE, mask=n_N < seq_len, other=0)
        for tile in range(num_tiles):
            token_N = tile * BLOCK_N + n_N
            inside_N = token_N < seq_len
            stage = turn % STAGES
            free = (turn // STAGES & 1) ^ 1
            hopper.mbarrier.wait(k_empty.index(stage), free)
            _copy(k_smem.index(stage), k_head_ptr, page_N, token_N, inside_N, k_strides, PAGE, LOAD)
            hopper.async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
            hopper.mbarrier.wait(v_empty.index(stage), free)
            _copy(v_smem.index(stage), v_head_ptr, page_N, token_N, inside_N, v_strides, PAGE, LOAD)
            hopper.async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
            page_N = gl.load(pages_ptr + (token_N + BLOCK_N) // PAGE, mask=token_N + BLOCK_N < seq_len, other=0)
            turn += 1


@gluon.jit
def _softmax(score_MN, max_M, sum_M, tile, masked_from, pos_M, scale, BLOCK_N: gl.constexpr, SCORE: gl.constexpr):
    """exp2 of the scores, the new maximum and sum, and the factor of what was summed before; log2 units."""
    if tile >= masked_from:
        token_N = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORE))
        score_MN = gl.where(token_N[None, :] <= pos_M[:, None], score_MN, float("-inf"))
    new_max_M = gl.maximum(max_M, gl.max(score_MN, 1) * scale)
    p_MN = gl.exp2(score_MN * scale - new_max_M[:, None])
    decay_M = gl.exp2(max_M - new_max_M)
    return p_MN, new_max_M, sum_M * decay_M + gl.sum(p_MN, 1), decay_M


@gluon.jit
def _product(a, b, full, turn, acc, ADD: gl.constexpr):
    """Begin a (+)= a b once the tile of this turn is there."""
    hopper.mbarrier.wait(full.index(turn % full.shape[0]), turn // full.shape[0] & 1)
    hopper.fence_async_shared()
    return hopper.warpgroup_mma(a, b, acc, use_acc=ADD, is_async=True)


@gluon.jit
def _consume(target, rows, scale, q_smem, buffers, GROUP: gl.constexpr, HALF: gl.constexpr):
    """The warps that compute one half of each query tile."""
    q_ptr, out_ptr, q_strides, out_strides = target
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = buffers
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = k_smem.shape[2]
    BLOCK_M: gl.constexpr = q_smem.shape[0]
    USED: gl.constexpr = 2 * BLOCK_M // GROUP * GROUP  # of both halves
    WARPS: gl.constexpr = _THREADS // 32
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    PROB: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [WARPS, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    d_D = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LOAD))
    m_M = HALF * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LOAD))
    row_M = HALF * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SCORE))
    zero_MN = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=SCORE)
    turn = 0
    for item in range(gl.program_id(0), rows[5], gl.num_programs(0)):
        _row, kv_head, start, num_queries, seq_len, first_query, num_tiles = _item(
            item, rows, GROUP, 2 * BLOCK_M, BLOCK_N
        )
        if num_tiles > 0:
            query_M = first_query + m_M // GROUP
            mask_MD = ((m_M < USED) & (query_M < num_queries))[:, None] & (d_D >= 0)[None, :]
            token_M = (start + query_M).to(gl.int64)
            head_M = kv_head * GROUP + m_M % GROUP
            q_MD = q_ptr + (token_M * q_strides[0] + head_M * q_strides[1])[:, None] + d_D[None, :]
            q_smem.store(gl.load(q_MD, mask=mask_MD, other=0.0))
            hopper.fence_async_shared()

            context = seq_len - num_queries
            masked_from = (context + first_query + 1) // BLOCK_N  # tiles before it are seen whole by every query
            at_M = first_query + row_M // GROUP
            pos_M = gl.where((row_M < USED) & (at_M < num_queries), context + at_M, -1)  # position -1 sees no key
            max_M = gl.full([BLOCK_M], _FLOOR, gl.float32, layout=gl.SliceLayout(1, SCORE))
            sum_M = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, SCORE))
            acc_MD = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, layout=ACC)

            score = _product(q_smem, k_smem.index(turn % STAGES).permute((1, 0)), k_full, turn, zero_MN, False)
            score_MN = hopper.warpgroup_mma_wait(0, deps=(score,))
            hopper.mbarrier.arrive(k_empty.index(turn % STAGES))
            p_MN, max_M, sum_M, decay_M = _softmax(score_MN, max_M, sum_M, 0, masked_from, pos_M, scale, BLOCK_N, SCORE)
            p_MN = gl.convert_layout(p_MN.to(dtype), PROB)
            for tile in range(1, num_tiles):
                k_DN = k_smem.index((turn + 1) % STAGES).permute((1, 0))
                score = _product(q_smem, k_DN, k_full, turn + 1, zero_MN, False)
                acc = _product(p_MN, v_smem.index(turn % STAGES), v_full, turn, acc_MD, True)
                score_MN = hopper.warpgroup_mma_wait(1, deps=(score,))
                hopper.mbarrier.arrive(k_empty.index((turn + 1) % STAGES))
                new_MN, max_M, sum_M, decay_M = _softmax(
                    score_MN, max_M, sum_M, tile, masked_from, pos_M, scale, BLOCK_N, SCORE
                )
                acc_MD = hopper.warpgroup_mma_wait(0, deps=(acc,))
                hopper.mbarrier.arrive(v_empty.index(turn % STAGES))
                turn += 1
                acc_MD = acc_MD * gl.convert_layout(decay_M, gl.SliceLayout(1, ACC))[:, None]
                p_MN = gl.convert_layout(new_MN.to(dtype), PROB)

            acc = _product(p_MN, v_smem.index(turn % STAGES), v_full, turn, acc_MD, True)
            acc_MD = hopper.warpgroup_mma_wait(0, deps=(acc,))
            hopper.mbarrier.arrive(v_empty.index(turn % STAGES))
            turn += 1
            total_M = gl.convert_layout(gl.where(sum_M == 0, 1.0, sum_M), gl.SliceLayout(1, ACC))
            out_MD = out_ptr + (token_M * out_strides[0] + head_M * out_strides[1])[:, None] + d_D[None, :]
            gl.store(out_MD, gl.convert_layout((acc_MD / total_M[:, None]).to(dtype), LOAD), mask=mask_MD)


# These vary from step to step: a value that is 1 or a multiple of 16, or another alignment, would compile anew.
@gluon.jit(
    do_not_specialize=["table_stride", "num_rows", "num_items"],
    do_not_specialize_on_alignment=["table_ptr", "order_ptr", "seq_lens_ptr", "query_start_ptr"],
)
def _hopper_prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, order_ptr, seq_lens_ptr, query_start_ptr, q_strides, out_strides,
    table_stride, k_strides, v_strides, scale, num_kv_heads, num_rows, num_items, GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    KV: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BAR: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    HALF_M: gl.constexpr = BLOCK_M // 2
    q_smem = gl.allocate_shared_memory(dtype, [2, HALF_M, HEAD_DIM], KV)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], KV)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], KV)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(k_full.index(i), count=_THREADS)
        hopper.mbarrier.init(v_full.index(i), count=_THREADS)
        hopper.mbarrier.init(k_empty.index(i), count=2)
        hopper.mbarrier.init(v_empty.index(i), count=2)
    rows = (order_ptr, seq_lens_ptr, query_start_ptr, num_kv_heads, num_rows, num_items)
    buffers = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    source = (k_ptr, v_ptr, table_ptr, table_stride, k_strides, v_strides)
    target = (q_ptr, out_ptr, q_strides, out_strides)
    # Registers of a thread: those that compute get 208, those that copy what is left of 3 * 168.
    gl.warp_specialize([
        (_consume, (target, rows, scale, q_smem.index(0), buffers, GROUP, 0)),
        (_consume, (target, rows, scale, q_smem.index(1), buffers, GROUP, 1)),
        (_produce, (source, rows, buffers, GROUP, PAGE, BLOCK_M)),
    ], [4, 4], [208, 88])  # fmt: skip


_capability = functools.cache(torch.cuda.get_device_capability)  # asked for in every layer of every step


def takes(q_THD: torch.Tensor, sliding_window: int | None, softcap: float | None) -> bool:
    """Whether `hopper_prefill` computes this on this device."""
    device = q_THD.device
    if torch.version.hip or device.type == "cpu" or (device.type == "cuda" and _capability(device)[0] != 9):
        return False
    return q_THD.shape[2] in (64, 128) and q_THD.element_size() == 2 and not sliding_window and not softcap


def order_of_tiles(
    seq_lens_R: torch.Tensor, query_start_R1: torch.Tensor, num_tiles: int, tile_size: int, block_n: int
) -> torch.Tensor:
    """Query tiles of `tile_size` tokens, those that see the most KV tiles first, and those past their rows last.

    Programs take every n-th tile, so each gets as many long ones, in whatever order rows of different lengths come.

    Returns:
        int32 [num_tiles * R], tile * R + row.
    """
    num_queries_R = query_start_R1.diff()
    first_N1 = torch.arange(0, num_tiles * tile_size, tile_size, device=seq_lens_R.device)[:, None]
    end_NR = seq_lens_R - num_queries_R + torch.minimum(first_N1 + tile_size, num_queries_R)
    seen_NR = torch.where(first_N1 < num_queries_R, (end_NR - 1) // block_n, -1)
    return seen_NR.flatten().argsort(descending=True, stable=True).int()


def hopper_prefill(
    q_THD: torch.Tensor, k_NSKD: torch.Tensor, v_NSKD: torch.Tensor, block_table_RP: torch.Tensor,
    seq_lens_R: torch.Tensor, query_start_R1: torch.Tensor, max_query_len: int, scale: float, out_THD: torch.Tensor,
    scratch: dict[int, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """`paged_prefill` without window and softcap, for a positive scale and up to 64 query heads a KV head."""
    num_heads, head_dim = q_THD.shape[1:]
    num_rows, num_kv_heads, page = seq_lens_R.shape[0], k_NSKD.shape[2], k_NSKD.shape[1]
    group = num_heads // num_kv_heads
    # Short rows are mostly diagonal, where a narrower KV tile wastes less: 155 instead of 121 TFLOP/s at 220 tokens.
    block_n, num_stages = (64, 3) if block_table_RP.shape[1] * page <= 384 else (128, 2)
    tile_size = _BLOCK_M // group
    if (order := scratch.get(tile_size)) is None:
        num_tiles = triton.cdiv(max_query_len, tile_size)
        order = scratch[tile_size] = order_of_tiles(seq_lens_R, query_start_R1, num_tiles, tile_size, block_n)
    num_items = len(order) * num_kv_heads
    _hopper_prefill_kernel[(min(num_processors(q_THD.device), num_items),)](
        q_THD, k_NSKD, v_NSKD, out_THD, block_table_RP, order, seq_lens_R, query_start_R1, q_THD.stride()[:2],
        out_THD.stride()[:2], block_table_RP.stride(0), k_NSKD.stride()[:3], v_NSKD.stride()[:3], scale * _LOG2E,
        num_kv_heads, num_rows, num_items, GROUP=group, HEAD_DIM=head_dim, PAGE=page, BLOCK_M=_BLOCK_M,
        BLOCK_N=block_n, STAGES=num_stages, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out_THD
