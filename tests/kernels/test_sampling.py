"""sample and greedy against plain torch: a sort for the filters, Python integers for the hash."""

from __future__ import annotations

import math

import pytest
import torch

from rayinfer.kernels.sampling import greedy, sample
from rayinfer.sampler import reference

U32 = 0xFFFFFFFF


def _mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & U32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & U32
    return x ^ (x >> 16)


def _gumbel(seed: int, position: int, num_tokens: int) -> torch.Tensor:
    state = _mix((seed & U32) ^ _mix((position + 0x9E3779B9) & U32))
    state = _mix(state ^ (seed >> 32))
    u = [((_mix(state ^ (t * 0x9E3779B1 & U32)) >> 9) + 0.5) * 2.0**-23 for t in range(num_tokens)]
    return torch.tensor([-math.log(-math.log(x)) for x in u], dtype=torch.float64)


def _kept(scaled_V: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Tokens that the filters keep, bool [V], computed one after the other in float64."""
    keep_V = torch.ones_like(scaled_V, dtype=torch.bool)
    if 0 < top_k < len(scaled_V):
        keep_V &= scaled_V >= scaled_V.sort(descending=True).values[top_k - 1]
    if top_p < 1:
        p_V = scaled_V.masked_fill(~keep_V, float("-inf")).softmax(-1)
        ordered = p_V.sort(descending=True).values
        last = int((ordered.cumsum(0) < top_p).sum().clamp(max=len(p_V) - 1))
        keep_V &= p_V >= ordered[last]
    p_V = scaled_V.softmax(-1)
    return keep_V & (p_V >= min_p * p_V.max())


def _want(logits_V, temperature, top_k, top_p, min_p, seed, position) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.double() / temperature
    noisy_V = scaled_V + _gumbel(seed, position, len(logits_V))
    return int(noisy_V.masked_fill(~_kept(scaled_V, top_k, top_p, min_p), float("-inf")).argmax())


def _sample(logits_RV, rows, device, sample=sample):
    """`rows` are (temperature, top_k, top_p, min_p, seed, position)."""
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    columns = [torch.tensor(c, dtype=d, device=device) for c, d in zip(zip(*rows, strict=True), dtypes, strict=True)]
    return sample(logits_RV.to(device), *columns)


ROWS = [
    (0.0, 0, 1.0, 0.0, 1, 0),
    (1.0, 0, 1.0, 0.0, 2, 5),
    (0.7, 5, 1.0, 0.0, 3, 9),
    (1.3, -1, 0.8, 0.0, 4, 100),
    (1.0, 0, 1.0, 0.2, 5, 7),
    (0.9, 20, 0.9, 0.05, 2**40 + 17, 2**33),
    (2.0, 1, 0.5, 0.0, 2**63 - 1, 1),
    (1.0, 10**6, 1e-6, 0.0, 0, 0),
    (1.0, 0, 0.999, 1.0, 6, 3),
]


@pytest.mark.parametrize("num_tokens", [1, 100, 4096, 9001])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0], ids=["flat", "normal", "peaked"])
def test_equals_torch(num_tokens, spread, device):
    """Every filter and mix of filters; flat rows leave the lane bound and are searched in place."""
    logits_RV = torch.randn(len(ROWS), num_tokens) * spread
    got = _sample(logits_RV, ROWS, device).tolist()
    assert got == [_want(x, *row) for x, row in zip(logits_RV, ROWS, strict=True)]
    assert got == _sample(logits_RV, ROWS, torch.device("cpu"), reference.sample).tolist()


def test_half_precision_logits(dtype, device):
    logits_RV = (torch.randn(len(ROWS), 3000) * 3).to(dtype)
    got = _sample(logits_RV, ROWS, device).tolist()
    assert got == [_want(x.float(), *row) for x, row in zip(logits_RV, ROWS, strict=True)]


def test_rows_do_not_depend_on_the_batch(device):
    logits_RV = torch.randn(len(ROWS), 5000) * 3
    together = _sample(logits_RV, ROWS, device)
    for i in (3, 5):
        assert _sample(logits_RV[i : i + 1], ROWS[i : i + 1], device)[0] == together[i]


def test_draws_follow_the_distribution(device):
    """Total variation distance of 300 draws of one seed from the softmax; its expectation is below 0.07."""
    logits_V = torch.randn(8) * 2
    num_draws = 300
    rows = [(0.8, 0, 1.0, 0.0, 1234, position) for position in range(num_draws)]
    tokens = _sample(logits_V.expand(num_draws, -1), rows, device).cpu()
    got_V = torch.bincount(tokens, minlength=8) / num_draws
    assert 0.5 * (got_V - (logits_V / 0.8).softmax(-1)).abs().sum() < 0.12


def test_masked_tokens_are_never_drawn(device):
    logits_RV = torch.full((24, 300), float("-inf"))
    logits_RV[:, [7, 250]] = torch.tensor([1.0, 1.5])
    rows = [(1.0, (0, 2, 50)[i % 3], (1.0, 0.9)[i % 2], 0.0, i, i) for i in range(24)]
    assert set(_sample(logits_RV, rows, device).tolist()) == {7, 250}


def test_largest_u_gives_no_infinite_noise(device):
    """Half a step above 2**24 - 1 rounds to 1 in float32: that noise must not win against any logit."""
    # The hash is a bijection of the state, so some token of each row has the largest u; find rows where it is low.
    seed, num_tokens = 0, 200_000
    position, token = next(
        (position, t) for position in range(1000) for t in _tokens_of_largest_u(seed, position) if t < num_tokens
    )
    logits_RV = torch.zeros(1, num_tokens)
    logits_RV[0, 3] = 100.0
    assert token != 3
    assert _sample(logits_RV, [(1.0, 0, 1.0, 0.0, seed, position)], device).tolist() == [3]


def _unmix(x: int) -> int:
    """Inverse of `_mix`."""
    x ^= x >> 16
    x = (x * pow(0xC2B2AE35, -1, 2**32)) & U32
    x ^= (x >> 13) ^ (x >> 26)
    x = (x * pow(0x85EBCA6B, -1, 2**32)) & U32
    return x ^ (x >> 16)


def _tokens_of_largest_u(seed: int, position: int) -> list[int]:
    state = _mix(_mix((seed & U32) ^ _mix((position + 0x9E3779B9) & U32)) ^ (seed >> 32))
    inverse = pow(0x9E3779B1, -1, 2**32)
    return [((_unmix(0xFFFFFF00 | low) ^ state) * inverse) & U32 for low in range(256)]


def test_ties_at_a_threshold_stay(device):
    """Top-k 2 of four equal likeliest tokens keeps the four."""
    logits_V = torch.tensor([1.0, 5.0, 5.0, -2.0, 5.0, 5.0])
    rows = [(1.0, 2, 1.0, 0.0, 9, position) for position in range(40)]
    assert set(_sample(logits_V.expand(40, -1), rows, device).tolist()) == {1, 2, 4, 5}


@pytest.mark.parametrize("num_tokens", [5, 8200])
def test_bad_rows(num_tokens, dtype, device):
    """NaN anywhere, an infinite maximum, or nothing finite: -1, and neighbours keep their tokens."""
    clean = (torch.randn(5, num_tokens) * 3).to(dtype)
    logits_RV = clean.clone()
    logits_RV[0, -1] = float("nan")
    logits_RV[1, 0] = float("nan")
    logits_RV[2, 3] = float("inf")
    logits_RV[3] = float("-inf")
    assert greedy(logits_RV.to(device)).tolist() == [-1, -1, -1, -1, int(clean[4].argmax())]
    for row in (ROWS[0], ROWS[1], ROWS[4], ROWS[5]):
        got = _sample(logits_RV, [row] * 5, device).tolist()
        assert got == [-1, -1, -1, -1, _want(clean[4].float(), *row)]


def test_greedy(dtype, device):
    """The lowest id on ties; rows may be strided."""
    wide = torch.randn(4, 9000).to(dtype)
    logits_RV = wide[:, :8999]
    logits_RV[1, [4097, 17, 8000]] = 50.0
    logits_RV[2] = -3.0
    got = greedy(wide.to(device)[:, :8999])
    assert got.dtype == torch.int32
    assert got.tolist() == [int(logits_RV[0].argmax()), 17, 0, int(logits_RV[3].argmax())]
