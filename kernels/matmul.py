"""x W^T + b with one order of sums: what a row comes to does not depend on how many other rows there are, or on which.

Every tile takes the input channels in the same order, in steps of one size, and nothing is split over them. A tensor
core's sum does not depend on how many rows and output channels its tile has (seen on an H200 for all shapes below, and
tested), so these follow the number of rows. Legend: M rows, O output channels, I input channels.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """Rows, output and input channels of a tile; tiles of rows that share weights in L2; warps and pipeline stages."""

    m: int
    o: int
    i: int
    group: int
    warps: int
    stages: int


# The number of rows varies from step to step, and a value that is 1 or a multiple of 16 would compile anew.
@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, num_rows, num_out, num_in, x_stride, w_stride, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take the same weights for GROUP tiles of rows, then go on to the next weights.
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    per_group = GROUP * tl.cdiv(num_out, BLOCK_O)
    first = tl.program_id(0) // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    at_m = (first + tl.program_id(0) % per_group % size) * BLOCK_M
    at_o = tl.program_id(0) % per_group // size * BLOCK_O
    row_M = (at_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_O = (at_o + tl.arange(0, BLOCK_O)).to(tl.int64)
    i_I = tl.arange(0, BLOCK_I)
    acc_MO = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for at_i in range(0, num_in, BLOCK_I):
        if TMA:  # x_ptr and w_ptr are descriptors; what lies outside reads as zeros
            x_MI = x_ptr.load([at_m, at_i])
            w_OI = w_ptr.load([at_o, at_i])
        else:
            inside_I = i_I < num_in - at_i
            x_MI = x_ptr + row_M[:, None] * x_stride + (at_i + i_I)[None, :]
            w_OI = w_ptr + o_O[:, None] * w_stride + (at_i + i_I)[None, :]
            x_MI = tl.load(x_MI, mask=(row_M < num_rows)[:, None] & inside_I[None, :], other=0.0)
            w_OI = tl.load(w_OI, mask=(o_O < num_out)[:, None] & inside_I[None, :], other=0.0)
        acc_MO = tl.dot(x_MI, tl.trans(w_OI), acc_MO, input_precision="ieee")
    if bias_ptr is not None:
        acc_MO += tl.load(bias_ptr + o_O, mask=o_O < num_out, other=0.0).to(tl.float32)[None, :]
    out_MO = out_ptr + row_M[:, None] * num_out + o_O[None, :]
    tl.store(out_MO, acc_MO.to(out_ptr.dtype.element_ty), mask=(row_M < num_rows)[:, None] & (o_O < num_out)[None, :])


# For the tensor cores of a Hopper GPU, the largest first. Small ones when there are few rows: 16 tiles of 128 x 256
# over a product's 4,096 output channels read the weights at a fifth of the memory's speed.
TILES = Tile(128, 128, 64, 8, 4, 4), Tile(64, 256, 64, 8, 4, 4), Tile(64, 128, 64, 8, 4, 6), Tile(64, 64, 64, 8, 4, 8)
_MIN_TILES = 96  # of a product, for about as many multiprocessors


def choose_tile(num_rows: int, num_out: int, itemsize: int) -> Tile:
    """The launch shape of a product; where it was not seen to leave the bits alone, one whatever the number of rows.

    float32 has no tensor cores here: small tiles, or the registers spill. AMD has 64 KiB of shared memory.
    """
    if itemsize == 4 or torch.version.hip:
        return Tile(32, 64, 32, 8, 4, 2) if itemsize == 4 else Tile(128, 128, 64, 8, 8, 2)
    fitting = TILES[num_rows <= 64 :]  # a tile has at least 64 rows, as Hopper's products do
    enough = (t for t in fitting if triton.cdiv(num_rows, t.m) * triton.cdiv(num_out, t.o) >= _MIN_TILES)
    return next(enough, TILES[-1])


def _is_aligned(t: torch.Tensor) -> bool:
    """As the tensor memory accelerator wants it: address and stride are multiples of 16 bytes."""
    return (t.is_meta or t.data_ptr() % 16 == 0) and t.stride(0) * t.element_size() % 16 == 0


def matmul(
    x_MI: torch.Tensor, w_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, tile: Tile | None = None,
    tma: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """x W^T + b, each row the same to the last bit in any batch and at any place in it.

    Args:
        x_MI, w_OI: float32, float16 or bfloat16, of one dtype; the last dimension is contiguous. bias_O: [O], or none.
        tile: another launch shape (to try them out). tma: whether the tensor memory accelerator
            loads; default: on NVIDIA, if addresses and strides are multiples of 16 bytes, as it wants them.

    Returns:
        [M, O] of x's dtype, contiguous; sums are in float32, rounded once.
    """
    (num_rows, num_in), num_out = x_MI.shape, w_OI.shape[0]
    assert w_OI.shape[1] == num_in
    assert x_MI.dtype == w_OI.dtype
    assert x_MI.stride(1) == w_OI.stride(1) == 1
    out_MO = torch.empty(num_rows, num_out, dtype=x_MI.dtype, device=x_MI.device)
    if num_rows == 0:
        return out_MO
    tile = tile or choose_tile(num_rows, num_out, x_MI.element_size())
    if tma is None:
        tma = not torch.version.hip and _is_aligned(x_MI) and _is_aligned(w_OI)
    loads: tuple[Any, Any] = (x_MI, w_OI)
    if tma:
        blocks = ((x_MI, [tile.m, tile.i]), (w_OI, [tile.o, tile.i]))
        loads = tuple(TensorDescriptor(t, t.shape, t.stride(), block) for t, block in blocks)  # type: ignore[assignment]
    _matmul_kernel[(triton.cdiv(num_rows, tile.m) * triton.cdiv(num_out, tile.o),)](
        *loads, bias_O, out_MO, num_rows, num_out, num_in, x_MI.stride(0), w_OI.stride(0), TMA=tma,
        BLOCK_M=tile.m, BLOCK_O=tile.o, BLOCK_I=tile.i, GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_MO
