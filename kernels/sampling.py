"""Sampling, one program a row, without a sort: a filter is a threshold, found by bisection over integer keys.

The keys order floats as unsigned integers. A first pass bounds the threshold from below by the maxima of L lanes (k
distinct tokens reach the k-th largest maximum, so the threshold is no lower); the few tokens above the bound are
copied aside, and the search runs on them. Rows too flat for that are searched in place, at more passes over the row.

Legend: R rows, V tokens of the vocabulary, L lanes, each a stride through the row.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # lanes
_ASIDE = 4096  # the most tokens of a row that are copied aside
_FLOOR = tl.constexpr(-3.0e38)


@triton.jit
def _mix(x):
    """The 32-bit finaliser of MurmurHash3 (A. Appleby, public domain)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _gumbel(state, token_L):
    """Gumbel noise of (row state, token). u has 23 bits: with 24 the largest would round up to 1 in float32."""
    x_L = _mix(state ^ (token_L.to(tl.uint32) * 0x9E3779B1))
    u_L = ((x_L >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u_L))


@triton.jit
def _key(x):
    """uint32 in the order of the floats; -0 and 0 are equal."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _draw(x_ptr, id_ptr, num, inverse, tau, floor, state, noisy, has_ids, BLOCK: tl.constexpr):
    """Argmax of x, or if noisy of x * inverse + noise where key >= tau and x * inverse >= floor; lowest id on ties.

    Returns the token, or -1 where a value is NaN or the best is not finite.
    """
    lane_L = tl.arange(0, BLOCK)
    best_L = tl.full([BLOCK], float("-inf"), tl.float32)
    token_L = tl.zeros([BLOCK], tl.int32)
    nan_L = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, num, BLOCK, num_stages=3):
        at_L = start + lane_L
        x_L = tl.load(x_ptr + at_L, mask=at_L < num, other=float("-inf")).to(tl.float32)
        nan_L |= (x_L != x_L).to(tl.int32)
        if has_ids:
            at_L = tl.load(id_ptr + at_L, mask=at_L < num, other=0)
        if noisy:
            x_L = x_L * inverse
            keep_L = (_key(x_L) >= tau) & (x_L >= floor)
            x_L = tl.where(keep_L, x_L + _gumbel(state, at_L), float("-inf"))
        better_L = x_L > best_L
        best_L = tl.where(better_L, x_L, best_L)
        token_L = tl.where(better_L, at_L, token_L)
    best = tl.max(best_L, 0)
    token = tl.min(tl.where(best_L == best, token_L, 0x7FFFFFFF), 0)
    bad = (tl.max(nan_L, 0) > 0) | (tl.abs(best) == float("inf"))
    return tl.where(bad, -1, token)


@triton.jit
def _tally(x_ptr, num, inverse, top, tau, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Number of values with key >= tau, or (MASS) the sum of their exp(x * inverse - top)."""
    lane_L = tl.arange(0, BLOCK)
    total_L = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, num, BLOCK, num_stages=3):
        at_L = start + lane_L
        x_L = tl.load(x_ptr + at_L, mask=at_L < num, other=float("-inf")).to(tl.float32) * inverse
        weight_L = tl.exp(x_L - top) if MASS else 1.0
        total_L += tl.where((at_L < num) & (_key(x_L) >= tau), weight_L, 0.0)
    return tl.sum(total_L, 0)


@triton.jit
def _threshold(x_ptr, num, inverse, top, low, goal, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key whose tally reaches the goal; `low` is one that does."""
    high = _key(top) + 1
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        tally = _tally(x_ptr, num, inverse, top, middle, MASS, BLOCK)
        low = tl.where(tally >= goal, middle, low)
        high = tl.where(tally >= goal, high, middle)
        if not MASS:
            high = tl.where(tally == goal, middle + 1, high)  # exactly k tokens: any lower key keeps the same set
    return low


@triton.jit
def _lane_bound(max_L, weight_L, top, goal):
    """A key, not far below the largest, that lanes of enough weight reach; all lanes together must reach the goal."""
    key_L = _key(max_L)
    low = tl.min(key_L, 0)
    high = _key(top) + 1
    for _ in range(16):
        middle = low + ((high - low) >> 1)
        enough = tl.sum(tl.where(key_L >= middle, weight_L, 0.0), 0) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _put_aside(x_ptr, num, inverse, low, aside_ptr, id_ptr, ASIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy values with key >= low, and their ids, in order; return how many there are. Only ASIDE of them fit."""
    lane_L = tl.arange(0, BLOCK)
    num_aside = 0
    for start in tl.range(0, num, BLOCK, num_stages=3):
        at_L = start + lane_L
        x_L = tl.load(x_ptr + at_L, mask=at_L < num, other=float("-inf"))
        hit_L = ((at_L < num) & (_key(x_L.to(tl.float32) * inverse) >= low)).to(tl.int32)
        num_hits = tl.sum(hit_L, 0)
        if num_hits > 0:
            to_L = num_aside + tl.cumsum(hit_L, 0) - 1
            fits_L = (hit_L > 0) & (to_L < ASIDE)
            tl.store(aside_ptr + to_L, x_L, mask=fits_L)
            tl.store(id_ptr + to_L, at_L, mask=fits_L)
        num_aside += num_hits
    tl.debug_barrier()  # what one thread stored, others read
    return num_aside


@triton.jit
def _sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, aside_ptr, id_ptr,
    token_ptr, stride, num_tokens, ASIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * stride
    aside_ptr += row * ASIDE
    id_ptr += row * ASIDE
    num = num_tokens
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    inverse = 1 / tl.maximum(temperature, 1e-30)  # of a temperature so small that its draw is the likeliest token
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_k = tl.where(top_k < num_tokens, tl.maximum(top_k, 0), 0)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    tau = tl.zeros([], tl.uint32)
    floor = float("-inf")
    fits = False
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        lane_L = tl.arange(0, BLOCK)
        max_L = tl.full([BLOCK], _FLOOR, tl.float32)
        sum_L = tl.zeros([BLOCK], tl.float32)
        nan_L = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, num, BLOCK, num_stages=3):
            at_L = start + lane_L
            x_L = tl.load(x_ptr + at_L, mask=at_L < num, other=float("-inf")).to(tl.float32) * inverse
            nan_L |= (x_L != x_L).to(tl.int32)
            new_L = tl.maximum(max_L, x_L)
            sum_L = sum_L * tl.exp(max_L - new_L) + tl.exp(x_L - new_L)
            max_L = new_L
        top = tl.max(max_L, 0)
        # A row that is not good goes to the draw as it is, and fails there.
        if (tl.max(nan_L, 0) == 0) & (top > _FLOOR) & (top < float("inf")):
            floor = top + tl.where(min_p > 0, tl.log(tl.maximum(min_p, 1e-30)), float("-inf"))
            if (top_k > 0) | (top_p < 1):
                # The lanes' maxima are values of distinct tokens: what they reach, the row reaches.
                weight_L = tl.exp(max_L - top)
                mass = tl.sum(sum_L * weight_L, 0)
                weight_L = tl.where(top_k > 0, 1.0, weight_L)
                goal = tl.where(top_k > 0, top_k.to(tl.float32), top_p * mass)
                if tl.sum(weight_L, 0) >= goal:
                    low = _lane_bound(max_L, weight_L, top, goal)
                    num_aside = _put_aside(x_ptr, num, inverse, low, aside_ptr, id_ptr, ASIDE, BLOCK)
                    fits = num_aside <= ASIDE
                    tau = tl.where(fits, low, tau)
                    x_ptr = tl.where(fits, aside_ptr, x_ptr)
                    num = tl.where(fits, num_aside, num)
                if top_k > 0:
                    tau = _threshold(x_ptr, num, inverse, top, tau, top_k.to(tl.float32), False, BLOCK)
                    mass = _tally(x_ptr, num, inverse, top, tau, True, BLOCK)
                if top_p < 1:
                    tau = _threshold(x_ptr, num, inverse, top, tau, top_p * mass, True, BLOCK)
    seed = tl.load(seed_ptr + row)
    state = tl.load(position_ptr + row).to(tl.uint32) + 0x9E3779B9
    state = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ _mix(state))
    state = _mix(state ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    token = _draw(x_ptr, id_ptr, num, inverse, tau, floor, state, temperature > 0, fits, BLOCK)
    tl.store(token_ptr + row, token)


def sample(
    logits_RV: torch.Tensor, temperature_R: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor,
    min_p_R: torch.Tensor, seed_R: torch.Tensor, position_R: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Draw one token a row: temperature, top-k, top-p over the rest, min-p, then Gumbel-max.

    Ties at a threshold stay. The noise of a token is a function of (seed, position, token) alone.

    Args:
        logits_RV: float32, float16 or bfloat16 [R, V], rows may be strided.
        temperature_R: float32; 0 takes the likeliest token.
        top_k_R: int32 or int64; 0 or less keeps all.
        top_p_R, min_p_R: float32; 1 and 0 keep all.
        seed_R, position_R: int64. These six are contiguous.

    Returns:
        int32 [R]; -1 for a row that holds NaN or whose largest logit is infinite.
    """
    num_rows, num_tokens = logits_RV.shape
    assert logits_RV.stride(1) == 1
    assert all(x.is_contiguous() for x in (temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R))
    device = logits_RV.device
    token_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    if num_rows > 0:
        aside = torch.empty(num_rows, _ASIDE, dtype=logits_RV.dtype, device=device)
        ids = torch.empty(num_rows, _ASIDE, dtype=torch.int32, device=device)
        _sample_kernel[(num_rows,)](
            logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R, aside, ids, token_R,
            logits_RV.stride(0), num_tokens, ASIDE=_ASIDE, BLOCK=_BLOCK, num_warps=16,
        )  # fmt: skip
    return token_R


@triton.jit
def _greedy_kernel(logits_ptr, token_ptr, stride, num_tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    unused = tl.zeros([], tl.uint32)
    token = _draw(logits_ptr + row * stride, token_ptr, num_tokens, 1.0, unused, 0.0, unused, False, False, BLOCK)
    tl.store(token_ptr + row, token)


def greedy(logits_RV: torch.Tensor) -> torch.Tensor:
    """Likeliest token of each row, int32 [R]; the lowest id on ties; -1 as in `sample`."""
    num_rows, num_tokens = logits_RV.shape
    assert logits_RV.stride(1) == 1
    token_R = torch.empty(num_rows, dtype=torch.int32, device=logits_RV.device)
    if num_rows > 0:
        _greedy_kernel[(num_rows,)](logits_RV, token_R, logits_RV.stride(0), num_tokens, BLOCK=4096, num_warps=8)
    return token_R
