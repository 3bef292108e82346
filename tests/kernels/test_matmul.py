"""The product of one order of sums against torch in float64, and against itself in other batches."""

from __future__ import annotations

import pytest
import torch

from rayinfer.kernels.matmul import TILES, choose_tile, matmul

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _operands(rows, num_in, num_out, dtype, device, slack):
    """x, W and b inside larger tensors of NaN: a read past an edge shows."""
    x_MI = torch.full((rows + 3, num_in + slack), float("nan"), dtype=dtype)
    w_OI = torch.full((num_out + 3, num_in + slack), float("nan"), dtype=dtype)
    x_MI[:rows, :num_in] = torch.randn(rows, num_in)
    w_OI[:num_out, :num_in] = torch.randn(num_out, num_in) * num_in**-0.5
    return (
        x_MI.to(device)[:rows, :num_in],
        w_OI.to(device)[:num_out, :num_in],
        torch.randn(num_out).to(dtype).to(device),
    )


@pytest.mark.parametrize("slack", [0, 8], ids=["dense", "strided"])
@pytest.mark.parametrize(("rows", "num_in", "num_out"), [(1, 64, 48), (3, 37, 5), (150, 136, 300), (33, 200, 97)])
def test_matches_torch(rows, num_in, num_out, slack, dtype, device):
    x_MI, w_OI, bias_O = _operands(rows, num_in, num_out, dtype, device, slack)
    want_MO = x_MI.double() @ w_OI.double().T
    for bias, want in ((None, want_MO), (bias_O, want_MO + bias_O.double())):
        got_MO = matmul(x_MI, w_OI, bias)
        assert got_MO.dtype == dtype
        torch.testing.assert_close(got_MO.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_no_rows(device):
    assert matmul(torch.zeros(0, 16, device=device), torch.zeros(8, 16, device=device)).shape == (0, 8)


def test_both_ways_to_load(dtype, device):
    """The tensor memory accelerator and plain pointers give the same bits."""
    x_MI, w_OI, bias_O = _operands(70, 136, 272, dtype, device, 8)
    assert torch.equal(matmul(x_MI, w_OI, bias_O, tma=True), matmul(x_MI, w_OI, bias_O, tma=False))


@pytest.mark.usefixtures("dot_by_rows")
def test_rows_do_not_depend_on_the_batch(dtype, device):
    x_MI, w_OI, bias_O = _operands(290, 96, 40, dtype, device, 0)
    whole_MO = matmul(x_MI, w_OI, bias_O)
    for first, last in ((0, 1), (0, 17), (129, 130), (100, 290)):
        assert torch.equal(matmul(x_MI[first:last].contiguous(), w_OI, bias_O), whole_MO[first:last])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_in", "num_out"), [(4096, 6144), (14336, 4096), (1000, 4096), (1024, 28672)])
def test_every_tile_has_the_same_bits(num_in, num_out, dtype, device):
    """And so has each row, whichever tile is chosen for the number of rows."""
    x_MI, w_OI, bias_O = _operands(1300, num_in, num_out, dtype, device, 0)
    want_MO = matmul(x_MI, w_OI, bias_O)
    chosen = set()
    for rows in (1, 16, 64, 65, 128, 256, 512, 1300):
        chosen.add(choose_tile(rows, num_out, dtype.itemsize))
        for tile in (None, *TILES):
            assert torch.equal(matmul(x_MI[:rows], w_OI, bias_O, tile=tile), want_MO[:rows])
    assert len(chosen) > 1
